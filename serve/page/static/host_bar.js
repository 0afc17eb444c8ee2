// Host memory: how much of it holds blocks of requests that were swapped out, and evicted prefixes.

import { element, requestName } from "./dom.js";

export class HostBar {
  #pool;
  #box;
  #bar;
  #note;
  #segments = new Map();
  #cached = element("i", undefined, "cached");
  #free = element("i", undefined, "free");

  constructor(pool, box) {
    this.#pool = pool;
    this.#box = box;
    this.#bar = box.querySelector(".bar-of");
    this.#note = box.querySelector(".note");
    this.#bar.append(this.#cached, this.#free);
  }

  show() {
    const { num_host_blocks: all = 0, num_host_blocks_held: held = 0, num_host_blocks_cached: cached = 0 } =
      this.#pool.counters;
    this.#box.hidden = all === 0;
    if (!all) return;
    const swapped = [...this.#pool.requests.values()].filter((request) => request.host > 0);
    const keep = new Set(swapped.map((request) => request.number));
    for (const [number, segment] of this.#segments) {
      if (keep.has(number)) continue;
      segment.remove();
      this.#segments.delete(number);
    }
    for (const request of swapped) {
      const segment = this.#segments.get(request.number) ?? this.#add(request);
      segment.style.flexGrow = request.host;
      segment.title = `${requestName(request)}: ${request.host} blocks`;
    }
    this.#cached.style.flexGrow = cached;
    this.#free.style.flexGrow = all - held - cached;
    this.#note.textContent = `${held} swapped, ${cached} prefixes, ${all - held - cached} free`;
  }

  /** Lets the parts of these requests stand out. */
  light(requests) {
    const numbers = new Set([...requests].map((request) => request.number));
    for (const [number, segment] of this.#segments) segment.classList.toggle("lit", numbers.has(number));
  }

  #add(request) {
    const segment = element("i", undefined, "swapped");
    segment.dataset.number = request.number;
    this.#bar.insertBefore(segment, this.#cached);
    this.#segments.set(request.number, segment);
    return segment;
  }
}
