// The row of figures above the map, and the legend with its counts.

import { drawSpark, history } from "./charts.js";
import { element, setText } from "./dom.js";
import { DUMMY, PINNED, STATE_NAMES, SWAPPING } from "./pool.js";

const RATE_SECONDS = 3;

export class Figures {
  #pool;
  #values = {};
  #rateSpark = document.createElement("canvas");
  #usageSpark = document.createElement("canvas");
  #legend;
  #counts = new Map();

  constructor(pool, list, legend) {
    this.#pool = pool;
    this.#legend = legend;
    this.#add(list, "rate", "tokens / s", this.#rateSpark);
    this.#add(list, "usage", "KV in use", this.#usageSpark);
    this.#add(list, "running", "running");
    this.#add(list, "waiting", "waiting");
    this.#add(list, "hits", "prefix hits");
    this.#add(list, "padding", "padding");
    this.#add(list, "preempted", "preemptions");
    STATE_NAMES.forEach((name, state) => {
      if (state === DUMMY || state === SWAPPING) return;
      this.#addState(state, name);
    });
    this.#addState("swapped", "swapped");
    setInterval(() => document.hidden || this.#showTimes(), 1000);
  }

  show() {
    const { counters } = this.#pool;
    this.#set("running", counters.num_running ?? 0);
    this.#set("waiting", counters.num_waiting ?? 0);
    this.#set("hits", percent(counters.prefix_cache_hits, counters.prefix_cache_queries));
    this.#set("padding", percent(counters.num_padded_tokens, counters.num_tokens + counters.num_padded_tokens));
    this.#set("preempted", counters.num_preemptions ?? 0);
    const counts = this.#pool.counts();
    const held = this.#pool.numBlocks - counts[0] - counts[1] - counts[DUMMY];
    this.#set("usage", percent(held, Math.max(1, this.#pool.numBlocks - 1)));
    STATE_NAMES.forEach((_, state) => this.#counts.get(state) && this.#count(state, counts[state]));
    const swapped = counters.num_host_blocks_held ?? 0;
    this.#count("swapped", swapped);
    this.#counts.get("swapped").parentElement.hidden = !counters.num_host_blocks;
    this.#counts.get(PINNED).parentElement.hidden = !counts[PINNED];
    this.#showTimes();
  }

  #showTimes() {
    if (!this.#pool.numBlocks) return;
    const rates = history(this.#pool, "tokens", false);
    const recent = rates.slice(-RATE_SECONDS).reduce((sum, value) => sum + value, 0) / RATE_SECONDS;
    this.#set("rate", recent >= 10 ? Math.round(recent) : Math.round(10 * recent) / 10);
    drawSpark(this.#rateSpark, rates, "spark-rate");
    drawSpark(this.#usageSpark, history(this.#pool, "live", true), "spark-usage", this.#pool.numBlocks - 1);
  }

  #add(list, name, label, spark) {
    const box = element("div", undefined, spark ? "figure wide" : "figure");
    const value = element("dd", "\u2013");
    value.dataset.figure = name;
    box.append(element("dt", label), value);
    if (spark) {
      spark.setAttribute("aria-hidden", "true");
      box.append(spark);
    }
    list.append(box);
    this.#values[name] = value;
  }

  #addState(state, name) {
    const count = element("span", "0", "count");
    const item = element("li", name);
    item.dataset.kind = name;
    item.append(count);
    this.#legend.append(item);
    this.#counts.set(state, count);
  }

  #set(name, value) {
    setText(this.#values[name], value);
  }

  #count(state, value) {
    setText(this.#counts.get(state), value.toLocaleString("en"));
  }
}

function percent(part, whole) {
  return whole > 0 ? `${Math.round((100 * part) / whole)} %` : "\u2013";
}
