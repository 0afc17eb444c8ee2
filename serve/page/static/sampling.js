// The controls of sampling: fields by their names in the API; what is left empty is not sent.

import { element } from "./dom.js";

const FIELDS = [
  { name: "temperature", step: "0.1", min: 0, hint: "1" },
  { name: "top_p", step: "0.05", min: 0, max: 1, hint: "1" },
  { name: "top_k", step: "1", min: -1, hint: "off" },
  { name: "min_p", step: "0.01", min: 0, max: 1, hint: "0" },
  { name: "max_tokens", step: "1", min: 1, value: "256" },
  { name: "n", step: "1", min: 1, hint: "1" },
  { name: "seed", step: "1", hint: "any" },
  { name: "repetition_penalty", label: "repetition", step: "0.05", min: 0, hint: "1" },
  { name: "presence_penalty", label: "presence", step: "0.1", min: -2, max: 2, hint: "0" },
  { name: "frequency_penalty", label: "frequency", step: "0.1", min: -2, max: 2, hint: "0" },
];
const TINTED_CANDIDATES = 4;

export class Sampling {
  #form;
  #inputs = new Map();
  #stop;
  #system;
  #tint;

  constructor(form, summary) {
    this.#form = form;
    for (const field of FIELDS) this.#addNumber(field);
    this.#stop = this.#addText("stop", "stop, one a line", 2);
    this.#system = this.#addText("system", "system prompt (chat)", 2);
    this.#tint = element("input");
    this.#tint.type = "checkbox";
    this.#tint.name = "tint";
    const label = element("label", undefined, "switch tint");
    label.append(this.#tint, " tint tokens by their probability");
    form.append(label);
    const show = () => (summary.textContent = this.#summary());
    form.addEventListener("input", show);
    form.addEventListener("submit", (event) => event.preventDefault());
    show();
  }

  get system() {
    return this.#system.value.trim();
  }

  get tints() {
    return this.#tint.checked;
  }

  /** Fields of the request's body; throws with a message if one is wrong. */
  fields(kind) {
    const body = {};
    for (const [name, input] of this.#inputs) {
      if (input.validity.badInput || !input.validity.valid) throw new Error(`${name}: ${input.validationMessage}`);
      if (input.value !== "") body[name] = Number(input.value);
    }
    // Written on one line each, so that a newline or a tab has to be spelled.
    const stops = this.#stop.value.split("\n").filter((line) => line !== "");
    if (stops.length) body.stop = stops.map((line) => line.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
    if (this.#tint.checked && kind === "chat") Object.assign(body, { logprobs: true, top_logprobs: TINTED_CANDIDATES });
    if (this.#tint.checked && kind === "completion") body.logprobs = TINTED_CANDIDATES;
    return body;
  }

  #addNumber({ name, label, hint, value, ...limits }) {
    const input = element("input");
    Object.assign(input, { type: "number", name, placeholder: hint ?? "", inputMode: "decimal" }, limits);
    if (value) input.value = value;
    this.#form.append(labelled(label ?? name.replaceAll("_", " "), input));
    this.#inputs.set(name, input);
  }

  #addText(name, label, rows) {
    const input = element("textarea");
    Object.assign(input, { name, rows, spellcheck: false });
    const box = labelled(label, input);
    box.classList.add("text");
    this.#form.append(box);
    return input;
  }

  #summary() {
    const set = [...this.#inputs].filter(([, input]) => input.value !== "");
    return set.map(([name, input]) => `${name.replaceAll("_", " ")} ${input.value}`).join(", ");
  }
}

function labelled(text, input) {
  const label = element("label");
  label.append(element("span", text), input);
  return label;
}
