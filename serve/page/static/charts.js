// Two small charts: bars of the latest steps, and a line of the last two minutes.

const BAR_SLOTS = 200;
const SPARK_SECONDS = 120;
const GUTTER = 46; // CSS pixels at the left for the scale

/** Fits a canvas to its box; returns its context and sizes in device pixels. */
function fit(canvas) {
  const ratio = Math.min(window.devicePixelRatio || 1, 3);
  const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  const height = Math.max(1, Math.round(canvas.clientHeight * ratio));
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, width, height);
  return { context, width, height, ratio };
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** A bar for each step: as high as its bucket, split into tokens of prompts, decoded tokens and padding. */
export class StepChart {
  #canvas;
  #steps = [];
  #pointed = -1;
  #describe;
  #queued = false;

  constructor(canvas, describe) {
    this.#canvas = canvas;
    this.#describe = describe;
    new ResizeObserver(() => this.show(this.#steps)).observe(canvas);
    canvas.addEventListener("pointermove", (event) => this.#point(event.offsetX));
    canvas.addEventListener("pointerleave", () => this.#point(-1));
  }

  show(steps) {
    this.#steps = steps;
    if (this.#queued) return;
    this.#queued = true;
    requestAnimationFrame(() => this.#draw());
  }

  #point(x) {
    const slot = Math.floor(((x - GUTTER) / (this.#canvas.clientWidth - GUTTER)) * BAR_SLOTS);
    this.#pointed = x < GUTTER ? -1 : slot - (BAR_SLOTS - this.#steps.length);
    this.#describe(this.#steps[this.#pointed] ?? null);
    this.show(this.#steps);
  }

  #draw() {
    this.#queued = false;
    const { context, width, height, ratio } = fit(this.#canvas);
    const most = Math.max(16, ...this.#steps.map(bucketOf));
    const colours = ["step-prompt", "step-decode", "step-padding"].map(colour);
    const faint = colour("faint");
    // A square root: a step of one decoded token is still seen beside one that is full of prompts.
    const scale = (height - ratio) / Math.sqrt(most);
    context.font = `${Math.round(10 * ratio)}px ui-monospace, "JetBrains Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace`;
    context.textAlign = "right";
    context.textBaseline = "middle";
    const start = GUTTER * ratio;
    for (const level of levels(most)) {
      const y = Math.round(height - scale * Math.sqrt(level));
      context.fillStyle = colour("line");
      context.fillRect(start, y, width - start, 1);
      context.fillStyle = faint;
      context.fillText(String(level), start - 9 * ratio, Math.max(y, 6 * ratio));
    }
    const slotWidth = (width - start) / BAR_SLOTS;
    const gap = slotWidth >= 3 * ratio ? ratio : 0;
    this.#steps.forEach((step, at) => {
      const slot = BAR_SLOTS - this.#steps.length + at;
      const left = Math.round(start + slot * slotWidth);
      const right = Math.round(start + (slot + 1) * slotWidth) - gap;
      const bucket = bucketOf(step);
      const full = scale * Math.sqrt(bucket);
      let below = 0;
      context.globalAlpha = this.#pointed < 0 || this.#pointed === at ? 1 : 0.4;
      step.slice(2, 5).forEach((tokens, part) => {
        const top = below + (full * tokens) / (bucket * step[1]);
        context.fillStyle = colours[part];
        context.fillRect(left, Math.round(height - top), right - left, Math.round(top) - Math.round(below));
        below = top;
      });
      context.globalAlpha = 1;
    });
    this.#canvas.dataset.steps = this.#steps.length;
  }
}

/** Tokens of the program of a step, padding included. */
export function bucketOf([, numSteps, prompt, decode, padding]) {
  return Math.max(1, Math.round((prompt + decode + padding) / Math.max(1, numSteps)));
}

function levels(most) {
  const found = [];
  for (let level = 4; level <= most; level *= 4) found.push(level);
  return found.slice(-3);
}

/** Draws values of the last two minutes, the newest at the right; `most` is the top of the scale, if it is fixed. */
export function drawSpark(canvas, values, colourName, most = 0) {
  const { context, width, height, ratio } = fit(canvas);
  const top = Math.max(most, ...values, 1e-9);
  const line = 1.25 * ratio;
  const place = (value) => height - line - (value / top) * (height - 2 * line);
  context.beginPath();
  values.forEach((value, at) => {
    const x = ((at + 1) / values.length) * width;
    if (at === 0) context.moveTo(x, place(value));
    else context.lineTo(x, place(value));
  });
  context.strokeStyle = colour(colourName);
  context.lineWidth = line;
  context.lineJoin = "round";
  context.stroke();
  context.lineTo(width, height);
  context.lineTo(width / values.length, height);
  context.closePath();
  context.globalAlpha = 0.14;
  context.fillStyle = context.strokeStyle;
  context.fill();
  context.globalAlpha = 1;
}

/** Of each of the last whole seconds a figure of the pool, the newest last. */
export function history(pool, figure, held) {
  const last = Math.floor(pool.now()) - 1;
  const values = [];
  let before = 0;
  for (let second = last - SPARK_SECONDS + 1; second <= last; second += 1) {
    const found = pool.seconds.get(second);
    before = found ? found[figure] : held ? before : 0;
    values.push(before);
  }
  return values;
}
