// The state of the engine as its events add up to it; serve/page/changes.py says what they hold.

export const FREE = 0;
export const CACHED = 1;
export const OWNED = 2;
export const SHARED = 3;
export const PINNED = 4;
export const SWAPPING = 5;
export const DUMMY = 6;
export const STATE_NAMES = ["free", "cached", "owned", "shared", "pinned", "swapping", "padding"];

export const REQUEST_STATES = ["waiting", "running", "preempted", "swapped"];
const MAX_STEPS = 200;
const MAX_SECONDS = 120;

export class Pool {
  sizes = {};
  status = {};
  states = new Uint8Array(0);
  owner = new Int32Array(0); // of each block, the request that took it last
  heads = new Map(); // blocks that are being filled: block to share that is full
  requests = new Map();
  steps = [];
  seconds = new Map();
  counters = {};
  feed = {};
  version = 0;
  #offset = 0; // the engine's clock minus ours, in seconds

  /** Takes an event; returns the set of blocks whose picture changes, or null for all. */
  apply(event) {
    if (event.full) this.#clear(event.sizes);
    const touched = new Set();
    if (event.time !== undefined) this.#offset = event.time - performance.now() / 1000;
    if (event.status) this.status = event.status;
    if (event.feed) this.feed = event.feed;
    this.#applyBlocks(event.blocks ?? [], touched);
    this.#applyRequests(event, touched);
    if (event.steps) this.steps = [...this.steps, ...event.steps].slice(-MAX_STEPS);
    for (const [second, tokens, live] of event.seconds ?? []) this.seconds.set(second, { tokens, live });
    if (event.seconds) {
      const oldest = Math.max(...this.seconds.keys()) - MAX_SECONDS;
      for (const second of this.seconds.keys()) if (second < oldest) this.seconds.delete(second);
    }
    Object.assign(this.counters, event.counters ?? {});
    this.version += 1;
    return event.full ? null : touched;
  }

  get numBlocks() {
    return this.states.length;
  }

  /** Seconds on the engine's clock. */
  now() {
    return performance.now() / 1000 + this.#offset;
  }

  /** How many blocks are in each state. */
  counts() {
    const counts = new Array(STATE_NAMES.length).fill(0);
    for (const state of this.states) counts[state] += 1;
    return counts;
  }

  /** The requests that hold a block, and at which place of their table. */
  holders(block) {
    const found = [];
    for (const request of this.requests.values()) {
      for (const table of request.tables) {
        const place = table.indexOf(block);
        if (place >= 0) found.push({ request, place });
      }
    }
    return found;
  }

  #clear(sizes) {
    this.sizes = sizes;
    this.states = new Uint8Array(sizes.num_blocks ?? 0);
    this.owner = new Int32Array(this.states.length);
    this.heads.clear();
    this.requests.clear();
    this.seconds.clear();
    this.steps = [];
    this.counters = {};
    this.status = {};
  }

  #applyBlocks(runs, touched) {
    let place = 0;
    for (let at = 0; at < runs.length; at += 3) {
      place += runs[at];
      const end = place + runs[at + 1];
      this.states.fill(runs[at + 2], place, end);
      for (; place < end; place += 1) touched.add(place);
    }
  }

  #applyRequests(event, touched) {
    const moved = new Set();
    for (const number of event.ended ?? []) {
      this.#setHead(this.requests.get(number), null, touched);
      this.requests.delete(number);
    }
    for (const [number, id, index, prompt] of event.arrived ?? []) {
      this.requests.set(number, { number, id, index, prompt, tables: [], head: null });
    }
    for (const [number, state, computed, sampled, cached, host, preemptions] of event.progress ?? []) {
      Object.assign(this.requests.get(number), { state, computed, sampled, cached, host, preemptions });
      moved.add(number);
    }
    for (const [number, group, same, ...runs] of event.tables ?? []) {
      this.#applyTable(this.requests.get(number), group, same, runs, touched);
      moved.add(number);
    }
    for (const number of moved) this.#findHead(this.requests.get(number), touched);
  }

  #applyTable(request, group, same, runs, touched) {
    const table = (request.tables[group] ??= []);
    table.length = same;
    for (let at = 0; at < runs.length; at += 2) {
      const [first, length] = [runs[at], runs[at + 1]];
      for (let i = 0; i < length; i += 1) {
        const block = first === 0 ? 0 : first + i;
        table.push(block);
        if (block && this.owner[block] !== request.number) {
          this.owner[block] = request.number;
          touched.add(block);
        }
      }
    }
  }

  /** The block that a request fills now: the part of it that holds something is drawn. */
  #findHead(request, touched) {
    const size = this.sizes.block_size;
    const block = request.tables[0]?.[Math.floor(request.computed / size)];
    this.#setHead(request, block ? { block, share: (request.computed % size) / size } : null, touched);
  }

  #setHead(request, head, touched) {
    if (!request) return;
    if (request.head) {
      this.heads.delete(request.head.block);
      touched.add(request.head.block);
    }
    request.head = head;
    if (head) {
      this.heads.set(head.block, head.share);
      touched.add(head.block);
    }
  }
}
