// What is pointed at, by pointer or keys: a block on the map, a request in the list, an answer; and the tooltip.

import { element, requestName } from "./dom.js";
import { DUMMY, OWNED, PINNED, SHARED, STATE_NAMES } from "./pool.js";

const MOST_HOLDERS = 6;

export class Pointing {
  #pool;
  #map;
  #canvas;
  #tooltip;
  #source = null; // a function that gives the requests that are lit
  #onLight;

  constructor(pool, map, canvas, tooltip, onLight) {
    this.#pool = pool;
    this.#map = map;
    this.#canvas = canvas;
    this.#tooltip = tooltip;
    this.#onLight = onLight;
    canvas.addEventListener("pointermove", (event) => this.#atPointer(event));
    canvas.addEventListener("pointerdown", (event) => this.#atPointer(event));
    canvas.addEventListener("pointerleave", () => this.#atBlock(-1));
    canvas.addEventListener("blur", () => this.#atBlock(-1));
    canvas.addEventListener("focus", () => {
      if (canvas.matches(":focus-visible")) this.#atBlock(Math.max(0, this.#map.cursor));
    });
    canvas.addEventListener("keydown", (event) => this.#atKey(event));
  }

  /** Lights the blocks of the requests that `source` gives, now and after every change; null for none. */
  requests(source) {
    this.#source = source;
    this.#light();
  }

  /** The pool has changed. */
  refresh() {
    this.#light();
    if (this.#map.cursor >= 0) this.#describe(this.#map.cursor);
  }

  #atPointer(event) {
    const box = this.#canvas.getBoundingClientRect();
    this.#atBlock(this.#map.blockAt(event.clientX - box.left, event.clientY - box.top));
  }

  #atBlock(block) {
    this.#map.point(block);
    this.#light();
    if (block < 0) this.#tooltip.hidden = true;
    else this.#describe(block);
  }

  #atKey(event) {
    const { columns } = this.#map;
    const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
    const count = this.#pool.numBlocks;
    let target = null;
    if (event.key in moves) target = Math.max(this.#map.cursor, 0) + moves[event.key];
    else if (event.key === "Home") target = 0;
    else if (event.key === "End") target = count - 1;
    else if (event.key === "Escape") target = -1;
    if (target === null || target >= count || (target < 0 && event.key !== "Escape")) return;
    event.preventDefault();
    this.#atBlock(target);
  }

  #light() {
    const requests = new Set(this.#source ? this.#source() : []);
    if (this.#map.cursor >= 0) for (const { request } of this.#pool.holders(this.#map.cursor)) requests.add(request);
    const blocks = new Set();
    for (const request of requests) for (const table of request.tables) for (const block of table) blocks.add(block);
    blocks.delete(0);
    this.#map.light(blocks);
    this.#onLight(requests);
  }

  #describe(block) {
    const state = this.#pool.states[block];
    const lines = [element("strong", `block ${block}`), element("span", this.#stateText(block, state), "dim")];
    const holders = this.#pool.holders(block);
    const size = this.#pool.sizes.block_size;
    for (const { request, place } of holders.slice(0, MOST_HOLDERS)) {
      const first = place * size;
      lines.push(element("code", requestName(request)), element("span", `tokens ${first}\u2013${first + size - 1}`, "dim"));
    }
    if (holders.length > MOST_HOLDERS) lines.push(element("span", `and ${holders.length - MOST_HOLDERS} more`, "dim"));
    this.#tooltip.replaceChildren(...lines);
    this.#tooltip.hidden = false;
    this.#place(block);
  }

  #stateText(block, state) {
    if (state === DUMMY) return "where padding writes to";
    if (state === SHARED) return `shared by ${this.#pool.holders(block).length}`;
    if (state === PINNED) return "a pinned prefix";
    if (state === OWNED) {
      const share = this.#pool.heads.get(block);
      return share === undefined ? "owned" : `owned, ${Math.round(100 * share)} % full`;
    }
    return STATE_NAMES[state] + (STATE_NAMES[state] === "cached" ? ": a prefix that can be found" : "");
  }

  #place(block) {
    const box = this.#canvas.getBoundingClientRect();
    const cell = this.#map.placeOf(block);
    const tip = this.#tooltip.getBoundingClientRect();
    const left = box.left + cell.x + cell.width + 10;
    const top = box.top + cell.y + cell.height + 8;
    const fitsRight = left + tip.width < window.innerWidth - 8;
    const fitsBelow = top + tip.height < window.innerHeight - 8;
    this.#tooltip.style.left = `${Math.max(8, fitsRight ? left : left - tip.width - cell.width - 20)}px`;
    this.#tooltip.style.top = `${Math.max(8, fitsBelow ? top : top - tip.height - cell.height - 16)}px`;
  }
}
