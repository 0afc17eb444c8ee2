// Chat and completion over the OpenAI API of the server, streamed.

import { ask } from "./access.js";
import { Answer } from "./answer.js";
import { element } from "./dom.js";
import { events } from "./sse.js";

const KINDS = {
  chat: { path: "v1/chat/completions", placeholder: "Message", hint: "Enter sends", action: "Send" },
  completion: {
    path: "v1/completions",
    placeholder: "Text to complete",
    hint: "Ctrl + Enter completes",
    action: "Complete",
  },
};

export class Talk {
  #nodes;
  #sampling;
  #pointing;
  #pool;
  #kind = "chat";
  #messages = [];
  #abort = null;
  #drafts = { chat: "", completion: "" };
  model = null;

  /** `nodes` are elements of the page by name. */
  constructor(nodes, sampling, pool, pointing) {
    this.#nodes = nodes;
    this.#sampling = sampling;
    this.#pool = pool;
    this.#pointing = pointing;
    nodes.composer.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    nodes.stop.addEventListener("click", () => this.#abort?.abort());
    nodes.clear.addEventListener("click", () => this.clear());
    nodes.prompt.addEventListener("keydown", (event) => this.#key(event));
    for (const tab of [nodes.tabChat, nodes.tabCompletion]) {
      tab.addEventListener("click", () => this.choose(tab.id.slice("tab-".length)));
      tab.addEventListener("keydown", (event) => {
        if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
        this.choose(this.#kind === "chat" ? "completion" : "chat");
        this.#tab(this.#kind).focus();
      });
    }
  }

  /** Turns to "chat" or "completion". */
  choose(kind) {
    if (kind === this.#kind) return;
    const { prompt, panelChat, panelCompletion, send, composerHint } = this.#nodes;
    this.#drafts[this.#kind] = prompt.value;
    this.#kind = kind;
    prompt.value = this.#drafts[kind];
    prompt.placeholder = KINDS[kind].placeholder;
    prompt.classList.toggle("code", kind === "completion");
    send.textContent = KINDS[kind].action;
    composerHint.textContent = KINDS[kind].hint;
    panelChat.hidden = kind !== "chat";
    panelCompletion.hidden = kind !== "completion";
    for (const each of ["chat", "completion"]) {
      this.#tab(each).setAttribute("aria-selected", String(each === kind));
      this.#tab(each).tabIndex = each === kind ? 0 : -1;
    }
  }

  /** Forgets what was said in the tab that is shown. */
  clear() {
    this.#abort?.abort();
    if (this.#kind === "chat") this.#messages = [];
    this.#log().replaceChildren();
    this.#nodes.prompt.focus();
  }

  /** Sends what is written; returns when the answer has ended. */
  async send() {
    const { prompt } = this.#nodes;
    const [kind, text] = [this.#kind, prompt.value];
    if (this.#abort || text.trim() === "") return;
    let fields;
    try {
      fields = this.#sampling.fields(kind);
    } catch (error) {
      this.#complain(error.message);
      return;
    }
    const tag = `page-${randomName()}`;
    const conversation = this.#messages; // another one once it is cleared
    const body = { ...fields, request_id: tag, stream: true, stream_options: { include_usage: true } };
    if (this.model) body.model = this.model;
    if (kind === "chat") {
      conversation.push({ role: "user", content: text });
      const { system } = this.#sampling;
      body.messages = [...(system ? [{ role: "system", content: system }] : []), ...conversation];
      this.#put(element("div", text, "message"));
      prompt.value = "";
    } else {
      body.prompt = text;
    }
    const answer = new Answer(tag, fields.n ?? 1, kind === "completion" ? text : "");
    this.#put(answer.box);
    this.#lightOn(answer);
    await this.#stream(kind, body, answer, text);
    if (kind === "chat") remember(conversation, answer);
  }

  async #stream(kind, body, answer, text) {
    const abort = (this.#abort = new AbortController());
    this.#busy(true);
    try {
      const response = await ask(KINDS[kind].path, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
        signal: abort.signal,
      });
      for await (const data of events(response)) {
        if (data === null) continue;
        if (data === "[DONE]") break;
        this.#keepAtEnd(kind, () => answer.add(JSON.parse(data)));
      }
      answer.end();
    } catch (error) {
      if (abort.signal.aborted) answer.end(true);
      else this.#failed(kind, answer, error, text);
    } finally {
      this.#abort = null;
      this.#busy(false);
    }
  }

  #failed(kind, answer, error, text) {
    const unreachable = error instanceof TypeError && !error.status;
    const box = answer.fail(unreachable ? "the server did not answer" : error.message);
    this.#keepAtEnd(kind, () => {});
    if (kind !== "chat" || error.status !== 400) return;
    const instead = element("button", "Complete it as text instead", "quiet");
    instead.type = "button";
    instead.addEventListener("click", () => {
      this.choose("completion");
      this.#nodes.prompt.value = text;
      this.#nodes.prompt.focus();
    });
    box.append(" ", instead);
  }

  #complain(message) {
    const box = element("p", message, "error");
    box.setAttribute("role", "alert");
    this.#put(box);
  }

  /** While an answer is pointed at, the blocks of its request stand out. */
  #lightOn(answer) {
    const requests = () => [...this.#pool.requests.values()].filter((request) => request.id.includes(answer.tag));
    for (const kind of ["pointerenter", "focus"]) {
      answer.box.addEventListener(kind, () => this.#pointing.requests(requests));
    }
    for (const kind of ["pointerleave", "blur"]) {
      answer.box.addEventListener(kind, () => this.#pointing.requests(null));
    }
  }

  #busy(is) {
    this.#nodes.stop.hidden = !is;
    this.#nodes.send.hidden = is;
  }

  #key(event) {
    if (event.key === "Escape") this.#abort?.abort();
    if (event.key !== "Enter" || event.isComposing) return;
    const sends = this.#kind === "chat" ? !event.shiftKey : event.ctrlKey || event.metaKey;
    if (!sends) return;
    event.preventDefault();
    this.send();
  }

  #tab(kind) {
    return kind === "chat" ? this.#nodes.tabChat : this.#nodes.tabCompletion;
  }

  #log(kind = this.#kind) {
    return kind === "chat" ? this.#nodes.chatLog : this.#nodes.completionLog;
  }

  #put(node) {
    const log = this.#log();
    log.querySelector(":scope > .hint")?.remove();
    log.append(node);
    log.scrollTop = log.scrollHeight;
  }

  /** Changes something in a log and stays at its end, if that is where the reader is. */
  #keepAtEnd(kind, change) {
    const log = this.#log(kind);
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    change();
    if (isAtEnd) log.scrollTop = log.scrollHeight;
  }
}

function randomName() {
  return [...crypto.getRandomValues(new Uint8Array(6))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The next message comes after this answer, or replaces one that was not answered at all. */
function remember(conversation, answer) {
  if (answer.texts[0]) conversation.push({ role: "assistant", content: answer.texts[0] });
  else conversation.pop();
}
