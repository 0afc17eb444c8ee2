// How one block looks. Colour is never all there is to tell two states by, where there is room for more.

import { CACHED, DUMMY, FREE, OWNED, PINNED, SHARED, STATE_NAMES, SWAPPING } from "./pool.js";

const ROUND_FROM = 9; // device pixels from which corners are rounded, ...
const DETAIL_FROM = 8; // ... and marks are drawn
// Hues of requests: a golden part of the circle apart, which but for its orange end, the colour of shared blocks, is theirs.
const FIRST_HUE = 110;
const HUES = 300;
const GOLDEN_PART = 0.381966;

/** Colours of the style sheet, read again when the scheme changes. */
export function readColours() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(`--${name}`).trim();
  const states = STATE_NAMES.map((name) => read(`block-${name}`));
  return {
    states,
    ground: read("ground"),
    veil: read("veil"),
    flash: read("flash"),
    mark: read("mark"),
    ink: read("ink"),
    faint: read("faint"),
    lightness: read("hue-lightness"),
    chroma: read("hue-chroma"),
  };
}

/** A colour of a request's own; neighbours in time are far apart in hue. */
export function requestColour(colours, number) {
  const hue = (FIRST_HUE + ((number * GOLDEN_PART) % 1) * HUES) % 360;
  return `oklch(${colours.lightness} ${colours.chroma} ${hue.toFixed(1)})`;
}

/** Draws a block into the rectangle; `share` of it is full, or undefined for one that is not being filled. */
export function drawCell(context, colours, { x, y, width, height }, state, share, owner) {
  const colour = owner && state === OWNED ? requestColour(colours, owner) : colours.states[state];
  const size = Math.min(width, height);
  const detailed = size >= DETAIL_FROM;
  context.fillStyle = colour;
  if (state === FREE) {
    shape(context, x, y, width, height, size);
  } else if (state === CACHED && detailed) {
    hollow(context, x, y, width, height, size, colour);
  } else if (state === CACHED) {
    context.globalAlpha = 0.5;
    shape(context, x, y, width, height, size);
    context.globalAlpha = 1;
  } else if (state === DUMMY) {
    cross(context, x, y, width, height, colour);
  } else if (state === OWNED && share !== undefined) {
    context.globalAlpha = 0.38;
    shape(context, x, y, width, height, size);
    context.globalAlpha = 1;
    context.save();
    context.beginPath();
    context.rect(x, y, Math.round(width * share), height);
    context.clip();
    shape(context, x, y, width, height, size);
    context.restore();
  } else {
    shape(context, x, y, width, height, size);
    if (detailed) mark(context, colours, x, y, width, height, size, state);
  }
}

/** Fills the shape of a cell with what the fill style is. */
export function fillCell(context, { x, y, width, height }) {
  shape(context, x, y, width, height, Math.min(width, height));
}

function shape(context, x, y, width, height, size) {
  if (size < ROUND_FROM) {
    context.fillRect(x, y, width, height);
    return;
  }
  context.beginPath();
  context.roundRect(x, y, width, height, Math.min(4, size / 6));
  context.fill();
}

function hollow(context, x, y, width, height, size, colour) {
  const line = Math.max(1, Math.round(size / 12));
  context.globalAlpha = 0.28;
  shape(context, x, y, width, height, size);
  context.globalAlpha = 1;
  context.strokeStyle = colour;
  context.lineWidth = line;
  context.beginPath();
  context.roundRect(x + line / 2, y + line / 2, width - line, height - line, Math.min(4, size / 6));
  context.stroke();
}

function cross(context, x, y, width, height, colour) {
  context.strokeStyle = colour;
  context.lineWidth = 1;
  context.beginPath();
  for (const [from, to] of [[0, 1], [1, 0]]) {
    context.moveTo(x + 1, y + 1 + from * (height - 2));
    context.lineTo(x + width - 1, y + 1 + to * (height - 2));
  }
  context.stroke();
}

function mark(context, colours, x, y, width, height, size, state) {
  context.fillStyle = colours.mark;
  if (state === SHARED) {
    const inner = Math.round(size * 0.36);
    context.fillRect(Math.round(x + (width - inner) / 2), Math.round(y + (height - inner) / 2), inner, inner);
  } else if (state === PINNED) {
    const corner = Math.round(size * 0.55);
    context.beginPath();
    context.moveTo(x + width, y);
    context.lineTo(x + width, y + corner);
    context.lineTo(x + width - corner, y);
    context.fill();
  } else if (state === SWAPPING) {
    context.fillRect(x, Math.round(y + height / 2) - 1, width, 2);
  }
}
