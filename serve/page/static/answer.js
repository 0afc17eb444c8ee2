// One answer while it comes: texts of its choices, tinted if wanted, and what it took. Always text, never markup.

import { element } from "./dom.js";

export class Answer {
  box = element("article", undefined, "answer");
  texts = [];
  tag;

  #choices = [];
  #choiceBox = element("div", undefined, "choices");
  #meta = element("footer", "\u2026");
  #begun = performance.now();
  #first = 0;
  #last = 0;
  #chunks = 0;
  #usage = null;
  #finish = [];

  /** `tag` is part of the request's id in the engine; `lead` stands before each choice, as a prompt that goes on. */
  constructor(tag, count, lead = "") {
    this.tag = tag;
    this.box.tabIndex = 0;
    this.box.dataset.running = "true";
    this.#choiceBox.dataset.count = count;
    for (let index = 0; index < count; index += 1) {
      const text = element("div", undefined, "text");
      if (lead) text.append(element("span", lead, "lead"));
      this.#choiceBox.append(text);
      this.#choices.push(text);
      this.texts.push("");
    }
    this.box.append(this.#choiceBox, this.#meta);
  }

  /** A chunk of the stream. */
  add(chunk) {
    if (chunk.error) throw new Error(chunk.error.message ?? String(chunk.error));
    if (chunk.usage) this.#usage = chunk.usage;
    for (const choice of chunk.choices ?? []) {
      const text = choice.delta ? (choice.delta.content ?? "") : (choice.text ?? "");
      if (!(choice.index in this.#choices)) continue;
      if (choice.finish_reason) this.#finish[choice.index] = choice.finish_reason;
      if (!text && !choice.logprobs) continue;
      this.#last = performance.now();
      this.#first ||= this.#last;
      this.#chunks += 1;
      this.texts[choice.index] += text;
      this.#append(this.#choices[choice.index], text, tokensOf(choice.logprobs));
    }
    this.#show();
  }

  /** Nothing more comes. */
  end(stopped = false) {
    this.box.dataset.running = "false";
    if (stopped) this.#finish = ["stopped"];
    this.#show();
  }

  fail(message) {
    this.end();
    const box = element("p", message, "error");
    box.setAttribute("role", "alert");
    this.box.append(box);
    return box;
  }

  #append(box, text, tokens) {
    if (tokens && tokens.map((token) => token.text).join("") === text) {
      for (const token of tokens) {
        const span = element("span", token.text, `p${level(token.probability)}`);
        span.title = token.title;
        box.append(span);
      }
      return;
    }
    const last = box.lastChild;
    if (last?.nodeType === Node.TEXT_NODE) last.appendData(text);
    else box.append(text);
  }

  #show() {
    const parts = [];
    const sampled = this.#usage?.completion_tokens;
    if (sampled !== undefined) parts.push(`${this.#usage.prompt_tokens} + ${sampled} tokens`);
    const cached = this.#usage?.prompt_tokens_details?.cached_tokens;
    if (cached) parts.push(`${cached} from the cache`);
    if (this.#first) parts.push(`first after ${duration(this.#first - this.#begun)}`);
    const seconds = (this.#last - this.#first) / 1000;
    const count = sampled ?? this.#chunks;
    if (seconds > 0.02 && count > 1) parts.push(`${Math.round((count - this.#choices.length) / seconds)} tokens/s`);
    const reasons = [...new Set(this.#finish.filter(Boolean))];
    if (reasons.length) parts.push(reasons.join(", "));
    this.#meta.textContent = parts.join(" \u00b7 ") || "\u2026";
  }
}

/** Tokens of a chunk with their probabilities, from either form of the API. */
function tokensOf(logprobs) {
  if (logprobs?.content) {
    return logprobs.content.map((token) => describe(token.token, token.logprob, token.top_logprobs));
  }
  if (logprobs?.tokens) {
    return logprobs.tokens.map((text, at) => {
      const top = Object.entries(logprobs.top_logprobs?.[at] ?? {});
      return describe(text, logprobs.token_logprobs[at], top.map(([token, logprob]) => ({ token, logprob })));
    });
  }
  return null;
}

function describe(text, logprob, top) {
  const shown = (top ?? []).map(({ token, logprob: value }) => `${JSON.stringify(token)} ${percent(value)}`);
  return { text, probability: Math.exp(logprob ?? 0), title: [percent(logprob ?? 0), ...shown].join("\n") };
}

function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  return `${value >= 10 ? value.toFixed(0) : value.toFixed(1)} %`;
}

function level(probability) {
  return [0.9, 0.6, 0.3, 0.1].findIndex((bound) => probability >= bound) + 1 || 5;
}

function duration(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
}
