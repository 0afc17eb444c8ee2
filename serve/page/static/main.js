// Puts the page together.

import { apiKey, ask, setApiKey } from "./access.js";
import { BlockMap } from "./block_map.js";
import { StepChart, bucketOf } from "./charts.js";
import { Feed } from "./feed.js";
import { Figures } from "./figures.js";
import { HostBar } from "./host_bar.js";
import { Pointing } from "./pointing.js";
import { Pool } from "./pool.js";
import { RequestList } from "./request_list.js";
import { Sampling } from "./sampling.js";
import { Talk } from "./talk.js";

const byId = (id) => document.getElementById(id);

const pool = new Pool();
const map = new BlockMap(pool, byId("map"), byId("map-base"), byId("map-overlay"));
const pointing = new Pointing(pool, map, byId("map-overlay"), byId("map-tooltip"), (lit) => {
  requests.light(lit);
  host.light(lit);
});
const requests = new RequestList(pool, byId("requests"), byId("requests-note"), map, pointing);
const host = new HostBar(pool, byId("host"));
const figures = new Figures(pool, byId("figures"), byId("legend"));
const steps = new StepChart(byId("steps"), describeStep);
const sampling = new Sampling(byId("sampling"), byId("sampling-summary"));
const talk = new Talk(
  {
    composer: byId("composer"),
    prompt: byId("prompt"),
    send: byId("send"),
    stop: byId("stop"),
    clear: byId("clear"),
    composerHint: byId("composer-hint"),
    tabChat: byId("tab-chat"),
    tabCompletion: byId("tab-completion"),
    panelChat: byId("panel-chat"),
    panelCompletion: byId("panel-completion"),
    chatLog: byId("chat-log"),
    completionLog: byId("completion-log"),
  },
  sampling,
  pool,
  pointing,
);
const feed = new Feed(onEvent, showStatus);

function onEvent(event) {
  const touched = pool.apply(event);
  if (touched === null) map.redraw();
  else map.update(touched);
  if (event.full) {
    const { num_blocks: count, block_size: size } = pool.sizes;
    byId("pool-size").textContent = count ? `${(count - 1).toLocaleString("en")} blocks of ${size} tokens` : "";
    byId("map-empty").hidden = Boolean(count);
  }
  if (event.steps || event.full) steps.show(pool.steps);
  requests.show();
  figures.show();
  host.show();
  pointing.refresh();
  if (event.status) {
    showStatus({ status: pool.status.state, progress: pool.status.progress });
    if (pool.status.state === "ready") findModel();
  }
}

function showStatus({ status, progress, error }) {
  const texts = { locked: "needs the API key", refused: error, lost: "connecting" };
  let text = texts[status] ?? status;
  if (status === "starting" && progress) {
    text = progress.total ? `${progress.stage} ${progress.done} of ${progress.total}` : progress.stage;
  }
  byId("state").dataset.state = status;
  byId("state").textContent = text;
  if (status === "locked") byId("key").open = true;
}

function describeStep(step) {
  const note = byId("step-note");
  if (!step) {
    note.textContent = "height: tokens of the bucket";
    return;
  }
  const [number, numSteps, prompt, decode, padding, running, waiting, milliseconds] = step;
  const several = numSteps > 1 ? ` \u00d7 ${numSteps} steps` : "";
  note.textContent =
    `step ${number}: bucket ${bucketOf(step)}${several} = ${prompt} prompt + ${decode} decode + ${padding} padding, ` +
    `${running} running, ${waiting} waiting, ${milliseconds.toFixed(1)} ms`;
}

async function findModel() {
  try {
    const { data } = await (await ask("v1/models")).json();
    talk.model = data[0]?.id ?? null;
    byId("model").textContent = talk.model ?? "";
    if (talk.model) document.title = `${talk.model} \u00b7 jaxpaged`;
  } catch {
    // The state of the engine says what is wrong; a request will name it.
  }
}

function showView(button) {
  const narrow = matchMedia("(max-width: 900px)").matches;
  const { view } = document.body.dataset;
  const shown = new Set(view === "both" ? ["talk", "memory"] : [view]);
  const chosen = button.dataset.show;
  if (narrow) {
    shown.clear();
    shown.add(chosen);
  } else if (shown.has(chosen) && shown.size > 1) {
    shown.delete(chosen);
  } else {
    shown.add(chosen);
  }
  document.body.dataset.view = shown.size > 1 ? "both" : [...shown][0];
  showPressed();
}

function showPressed() {
  const narrow = matchMedia("(max-width: 900px)").matches;
  const view = narrow && document.body.dataset.view === "both" ? "memory" : document.body.dataset.view;
  for (const button of document.querySelectorAll("[data-show]")) {
    button.setAttribute("aria-pressed", String(view === "both" || view === button.dataset.show));
  }
}

for (const button of document.querySelectorAll("[data-show]")) {
  button.addEventListener("click", () => showView(button));
}
matchMedia("(max-width: 900px)").addEventListener("change", showPressed);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  steps.show(pool.steps);
  figures.show();
});
byId("by-request").addEventListener("change", (event) => {
  map.byRequest = event.target.checked;
  document.body.dataset.colours = map.byRequest ? "request" : "state";
  map.redraw();
  requests.show();
});
byId("key-input").value = apiKey();
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setApiKey(byId("key-input").value.trim());
  byId("key").open = false;
  feed.restart();
});

showPressed();
// For a look from the console, and for tests.
window.jaxpaged = { pool, map, feed, talk };
feed.run();
