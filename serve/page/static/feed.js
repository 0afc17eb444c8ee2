// The stream of events about the engine: connects, comes back after a failure, rests while nobody looks.

import { ask, health } from "./access.js";
import { events } from "./sse.js";

const FIRST_DELAY = 500;
const LONGEST_DELAY = 15_000;
const SILENCE = 40_000; // the server says something every 15 s
const HIDDEN_FOR = 30_000; // a page that nobody sees asks for nothing after so long

/** Calls onEvent with each event and onStatus with what is known of the engine while there are none. */
export class Feed {
  #onEvent;
  #onStatus;
  #abort = null;
  #delay = FIRST_DELAY;
  #wake = () => {};
  #hiddenTimer = 0;

  constructor(onEvent, onStatus) {
    this.#onEvent = onEvent;
    this.#onStatus = onStatus;
    document.addEventListener("visibilitychange", () => this.#visibility());
  }

  /** Begins, and goes on for as long as the page lives. */
  async run() {
    for (;;) {
      if (document.hidden) await this.#visible();
      const reason = await this.#connect();
      if (reason === "restart" || document.hidden) continue;
      await this.#wait(reason === "locked" ? 2 ** 30 : this.#delay * (0.75 + Math.random() / 2));
      this.#delay = Math.min(2 * this.#delay, LONGEST_DELAY);
    }
  }

  /** Connects anew at once, as after a change of the key. */
  restart() {
    this.#delay = FIRST_DELAY;
    this.#abort?.abort("restart");
    this.#wake();
  }

  async #connect() {
    const abort = (this.#abort = new AbortController());
    let watchdog = 0;
    const heard = () => {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => abort.abort("silence"), SILENCE);
    };
    heard();
    try {
      const response = await ask("page/events", { signal: abort.signal });
      for await (const data of events(response)) {
        heard();
        this.#delay = FIRST_DELAY;
        if (data !== null) this.#onEvent(JSON.parse(data));
      }
    } catch (error) {
      if (abort.signal.reason === "restart") return "restart";
      if (error.status === 401) {
        this.#onStatus({ status: "locked" });
        return "locked";
      }
      if (error.status) {
        const known = await health();
        this.#onStatus(known.status === "ready" ? { status: "refused", error: error.message } : known);
        return "refused";
      }
      if (!(error instanceof TypeError || error.name === "AbortError" || abort.signal.aborted)) console.error(error);
    } finally {
      clearTimeout(watchdog);
      abort.abort();
    }
    if (!document.hidden) {
      const known = await health();
      this.#onStatus(known.status === "ready" ? { status: "connecting" } : known);
    }
    return "lost";
  }

  #wait(milliseconds) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, Math.min(milliseconds, 2 ** 30));
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }

  #visible() {
    return new Promise((resolve) => {
      const seen = () => {
        if (document.hidden) return;
        document.removeEventListener("visibilitychange", seen);
        resolve();
      };
      document.addEventListener("visibilitychange", seen);
    });
  }

  #visibility() {
    clearTimeout(this.#hiddenTimer);
    if (document.hidden) this.#hiddenTimer = setTimeout(() => this.#abort?.abort("restart"), HIDDEN_FOR);
    else this.#wake();
  }
}
