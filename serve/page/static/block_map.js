// The map of the KV pool: a canvas for the blocks, of which only what changed is drawn, and one above it for light.

import { drawCell, fillCell, readColours, requestColour } from "./cells.js";
import { CACHED, FREE, OWNED } from "./pool.js";

const LARGEST_CELL = 40; // CSS pixels
const GUTTER = 46; // CSS pixels at the left for block ids
const LABEL_HEIGHT = 14;
const FLASH_MILLISECONDS = 700;
const FRAME_MILLISECONDS = 30;
const MOST_FLASHES = 1500; // more at once are no news but noise

export class BlockMap {
  lit = new Set(); // blocks that stand out
  cursor = -1; // the block that is pointed at
  byRequest = true;
  numDrawn = 0; // cells drawn so far, for tests

  #pool;
  #box;
  #base;
  #overlay;
  #colours = readColours();
  #grid = null;
  #dirty = new Set();
  #flashes = new Map(); // block to when it changed, and what it was
  #shown = new Uint8Array(0); // the states that are drawn
  #all = true;
  #lightChanged = true;
  #scheduled = false;
  #lastFrame = 0;
  #calm = matchMedia("(prefers-reduced-motion: reduce)");

  constructor(pool, box, base, overlay) {
    this.#pool = pool;
    this.#box = box;
    this.#base = base;
    this.#overlay = overlay;
    new ResizeObserver(() => this.redraw()).observe(box);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.#colours = readColours();
      this.redraw();
    });
  }

  get colours() {
    return this.#colours;
  }

  /** Draws everything anew: another size, another pool, other colours. */
  redraw() {
    this.#all = true;
    this.#schedule();
  }

  /** Draws these blocks anew; those whose state is another than what is drawn flash. */
  update(blocks) {
    const now = performance.now();
    for (const block of blocks) {
      this.#dirty.add(block);
      if (this.#shown[block] !== this.#pool.states[block] && !this.#calm.matches && blocks.size < MOST_FLASHES) {
        this.#flashes.set(block, { since: now, colour: this.#flashColour(block) });
      }
    }
    if (blocks.size) this.#schedule();
  }

  /** Lets blocks stand out, all others fade; none for all alike. */
  light(blocks) {
    if (this.lit.size === 0 && blocks.size === 0) return;
    this.lit = blocks;
    this.#lightChanged = true;
    this.#overlay.dataset.lit = blocks.size;
    this.#schedule();
  }

  /** Moves the frame around one block; -1 for none. */
  point(block) {
    if (block === this.cursor) return;
    this.cursor = block;
    this.#lightChanged = true;
    this.#schedule();
  }

  /** The block at a place in CSS pixels of the canvas, or -1. */
  blockAt(x, y) {
    const grid = this.#grid;
    if (!grid) return -1;
    const column = Math.floor((x * grid.ratio - grid.left) / grid.stepX);
    const row = Math.floor((y * grid.ratio) / grid.stepY);
    const block = row * grid.columns + column;
    return column < 0 || column >= grid.columns || row < 0 || block >= this.#pool.numBlocks ? -1 : block;
  }

  /** Where a block is, in CSS pixels of the canvas. */
  placeOf(block) {
    const { x, y, width, height } = this.#cell(block);
    const { ratio } = this.#grid;
    return { x: x / ratio, y: y / ratio, width: width / ratio, height: height / ratio };
  }

  get columns() {
    return this.#grid?.columns ?? 1;
  }

  #schedule() {
    if (this.#scheduled) return;
    this.#scheduled = true;
    requestAnimationFrame((now) => this.#frame(now));
  }

  #frame(now) {
    this.#scheduled = false;
    if (now - this.#lastFrame < FRAME_MILLISECONDS && !this.#all) {
      this.#schedule();
      return;
    }
    this.#lastFrame = now;
    if (this.#all) this.#drawAll();
    const context = this.#base.getContext("2d", { alpha: false });
    for (const block of this.#flashes.keys()) this.#dirty.add(block);
    for (const block of this.#dirty) if (block < this.#pool.numBlocks) this.#draw(context, block, now);
    this.#dirty.clear();
    if (this.#lightChanged) this.#drawLight();
    if (this.#flashes.size) this.#schedule();
    this.#base.dataset.version = this.#pool.version;
  }

  #layOut() {
    const ratio = Math.min(window.devicePixelRatio || 1, 3);
    const width = Math.floor(this.#box.clientWidth * ratio);
    const height = Math.floor(this.#box.clientHeight * ratio);
    const left = Math.round((this.#box.clientWidth < 420 ? GUTTER - 8 : GUTTER) * ratio);
    const count = Math.max(1, this.#pool.numBlocks);
    const room = Math.max(8, width - left);
    const largest = Math.round(LARGEST_CELL * ratio);
    const any = fitting(count, room, height, largest, 1);
    const even = fitting(count, room, height, largest, 8);
    // Rows of eight, sixteen, ... blocks are easier to read off, and worth slightly smaller cells.
    const { step, columns } = even.step >= 0.8 * any.step ? even : any;
    const gap = step >= 12 * ratio ? Math.round(2 * ratio) : step >= 4 ? Math.round(ratio) : step >= 3 ? 1 : 0;
    const stepX = Math.max(step, Math.min(Math.floor(room / columns), Math.round(step * 1.45)));
    const rows = Math.ceil(count / columns);
    const stepY = Math.max(step, Math.min(Math.floor(height / rows), Math.round(stepX * 1.25)));
    return { ratio, width, height, left, columns, stepX, stepY, gap: Math.min(gap, step - 1) };
  }

  #cell(block) {
    const { columns, left, stepX, stepY, gap } = this.#grid;
    const row = Math.floor(block / columns);
    return {
      x: left + (block - row * columns) * stepX,
      y: row * stepY,
      width: stepX - gap,
      height: stepY - gap,
    };
  }

  #drawAll() {
    this.#all = false;
    this.#grid = this.#layOut();
    if (!this.#grid) return;
    const { width, height } = this.#grid;
    for (const canvas of [this.#base, this.#overlay]) {
      if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    }
    const context = this.#base.getContext("2d", { alpha: false });
    context.fillStyle = this.#colours.ground;
    context.fillRect(0, 0, width, height);
    this.#shown = new Uint8Array(this.#pool.numBlocks);
    this.#flashes.clear();
    for (let block = 0; block < this.#pool.numBlocks; block += 1) this.#dirty.add(block);
    this.#drawLabels(context);
    this.#lightChanged = true;
  }

  #drawLabels(context) {
    const { ratio, left, columns, stepY } = this.#grid;
    const rows = Math.ceil(this.#pool.numBlocks / columns);
    const every = Math.max(1, 2 ** Math.ceil(Math.log2((LABEL_HEIGHT * ratio) / stepY)));
    context.fillStyle = this.#colours.faint;
    context.font = `${Math.round(10 * ratio)}px ui-monospace, "JetBrains Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace`;
    context.textAlign = "right";
    context.textBaseline = "middle";
    const centre = stepY >= LABEL_HEIGHT * ratio ? stepY / 2 : (LABEL_HEIGHT * ratio) / 2 - 2 * ratio;
    for (let row = 0; row < rows; row += every) {
      context.fillText(String(row * columns), left - 9 * ratio, row * stepY + centre);
    }
  }

  #draw(context, block, now) {
    const pool = this.#pool;
    const cell = this.#cell(block);
    const state = pool.states[block];
    const { gap } = this.#grid;
    context.fillStyle = this.#colours.ground;
    context.fillRect(cell.x, cell.y, cell.width + gap, cell.height + gap);
    drawCell(context, this.#colours, cell, state, pool.heads.get(block), this.byRequest ? pool.owner[block] : 0);
    this.#shown[block] = state;
    this.numDrawn += 1;
    const flash = this.#flashes.get(block);
    if (flash === undefined) return;
    const age = (now - flash.since) / FLASH_MILLISECONDS;
    if (age >= 1) {
      this.#flashes.delete(block);
      return;
    }
    context.globalAlpha = 0.65 * (1 - age) ** 2;
    context.fillStyle = flash.colour;
    fillCell(context, cell);
    context.globalAlpha = 1;
  }

  /** A block that was taken lights up, one that was given back fades from what it was. */
  #flashColour(block) {
    const [was, is] = [this.#shown[block], this.#pool.states[block]];
    if (is !== FREE && is !== CACHED) return this.#colours.flash;
    return was === OWNED && this.byRequest ? this.colourOf(this.#pool.owner[block]) : this.#colours.states[was];
  }

  #drawLight() {
    this.#lightChanged = false;
    const context = this.#overlay.getContext("2d");
    const { width, height, ratio, left } = this.#grid;
    context.clearRect(0, 0, width, height);
    if (this.lit.size) {
      context.fillStyle = this.#colours.veil;
      context.fillRect(left, 0, width - left, height);
      for (const block of this.lit) {
        if (block >= this.#pool.numBlocks) continue;
        const { x, y, width: w, height: h } = this.#cell(block);
        context.clearRect(x, y, w, h);
        if (Math.min(w, h) >= 7) this.#outline(context, block, this.#colours.ink, Math.max(1, ratio * 0.75));
      }
    }
    if (this.cursor >= 0 && this.cursor < this.#pool.numBlocks) {
      this.#outline(context, this.cursor, this.#colours.ink, 2 * ratio);
    }
  }

  #outline(context, block, colour, line) {
    const { x, y, width, height } = this.#cell(block);
    context.strokeStyle = colour;
    context.lineWidth = line;
    context.strokeRect(x - line / 2, y - line / 2, width + line, height + line);
  }

  /** The colour that a request has where blocks are coloured by request. */
  colourOf(number) {
    return requestColour(this.#colours, number);
  }
}

/** The largest square cells with which so many fit, in rows of a multiple of `unit`. */
function fitting(count, room, height, largest, unit) {
  for (let step = largest; step > 1; step -= 1) {
    const most = Math.floor(room / step);
    const columns = most - (most % unit);
    if (columns > 0 && Math.ceil(count / columns) * step <= height) return { step, columns };
  }
  return { step: 1, columns: Math.max(1, room) };
}
