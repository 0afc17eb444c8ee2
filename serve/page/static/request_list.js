// The live requests: a row for each, the running ones first.

import { element, requestName, setText } from "./dom.js";
import { REQUEST_STATES } from "./pool.js";

const MOST_ROWS = 100;
const ORDER = { running: 0, swapped: 1, preempted: 2, waiting: 3 };

export class RequestList {
  #pool;
  #list;
  #note;
  #map;
  #rows = new Map();
  #lit = new Set();

  constructor(pool, list, note, map, pointing) {
    this.#pool = pool;
    this.#list = list;
    this.#note = note;
    this.#map = map;
    const numberAt = (event) => Number(event.target.closest?.("[data-number]")?.dataset.number ?? 0);
    for (const kind of ["pointerover", "focusin"]) {
      list.addEventListener(kind, (event) => {
        const number = numberAt(event);
        pointing.requests(number ? () => [pool.requests.get(number)].filter(Boolean) : null);
      });
    }
    for (const kind of ["pointerleave", "focusout"]) list.addEventListener(kind, () => pointing.requests(null));
  }

  show() {
    const order = [...this.#pool.requests.values()].sort(byState);
    const shown = order.slice(0, MOST_ROWS);
    const keep = new Set(shown.map((request) => request.number));
    for (const [number, row] of this.#rows) {
      if (keep.has(number)) continue;
      row.box.remove();
      this.#rows.delete(number);
    }
    shown.forEach((request, at) => {
      const row = this.#rows.get(request.number) ?? this.#make(request);
      row.update(request, this.#map);
      if (this.#list.children[at] !== row.box) this.#list.insertBefore(row.box, this.#list.children[at] ?? null);
    });
    const more = order.length - shown.length;
    const text = order.length ? `${order.length}${more ? `, the first ${MOST_ROWS} shown` : ""}` : "none";
    setText(this.#note, text);
  }

  /** Marks the rows of these requests. */
  light(requests) {
    const numbers = new Set([...requests].map((request) => request.number));
    for (const number of this.#lit) if (!numbers.has(number)) this.#rows.get(number)?.box.classList.remove("lit");
    for (const number of numbers) this.#rows.get(number)?.box.classList.add("lit");
    this.#lit = numbers;
  }

  #make(request) {
    const row = new RequestRow(request);
    this.#rows.set(request.number, row);
    return row;
  }
}

function byState(a, b) {
  return ORDER[REQUEST_STATES[a.state]] - ORDER[REQUEST_STATES[b.state]] || a.number - b.number;
}

class RequestRow {
  constructor(request) {
    this.box = element("li");
    this.box.dataset.number = request.number;
    this.box.tabIndex = 0;
    this.swatch = element("span", undefined, "swatch");
    this.tokens = element("span", undefined, "tokens");
    this.blocks = element("span", undefined, "blocks");
    this.prompt = element("i", undefined, "prompt");
    this.output = element("i", undefined, "output");
    const bar = element("span", undefined, "progress");
    bar.append(this.prompt, this.output);
    const id = element("span", requestName(request), "id");
    id.title = id.textContent;
    this.box.append(this.swatch, id, bar, this.tokens, this.blocks);
  }

  update(request, map) {
    const state = REQUEST_STATES[request.state];
    const held = request.tables.reduce((sum, table) => sum + table.filter(Boolean).length, 0) + request.host;
    const whole = Math.max(1, request.prompt + request.sampled);
    this.box.dataset.state = state;
    setText(this.tokens, `${request.prompt} + ${request.sampled}`);
    setText(this.blocks, state === "running" ? `${held} ${held === 1 ? "block" : "blocks"}` : state);
    const computed = Math.min(request.computed, request.prompt);
    this.prompt.style.width = `${(100 * computed) / whole}%`;
    this.output.style.width = `${(100 * request.sampled) / whole}%`;
    this.swatch.style.background = map.byRequest && state === "running" ? map.colourOf(request.number) : "";
    const about = [state, `${request.cached} prompt tokens from the cache`];
    if (request.preemptions) about.push(`preempted ${request.preemptions} times`);
    this.box.title = about.join(", ");
  }
}
