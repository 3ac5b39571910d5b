// Which part of the map is looked at, and when it is drawn.

const {
  apart, drawnPanes, element, heat, heatMost, heatValue, panes, rampColour, state,
} = window.flexprefill;

const LARGEST_BLOCK = 64; // CSS pixels of a block at the highest zoom, unless the whole map is shown larger
const LEAST_ROOM = 260; // CSS pixels of height for a map
const PEEK = 56; // CSS pixels of what follows below the map
const narrow = window.matchMedia("(max-width: 820px)"); // as in page.css

function pixelView() {
  const fit = panes[0].fitScale(panes[0].picture.causal.geometry);
  return { left: state.view.left, top: state.view.top, scale: fit * state.view.zoom };
}

// Keeps the view inside of the map, and the map's corner at the axes' where the map is smaller than the pane.
function clampView() {
  const [pane] = panes;
  const { geometry } = pane.picture.causal;
  const fit = pane.fitScale(geometry);
  const { view } = state;
  view.zoom = Math.min(Math.max(view.zoom, 1), Math.max(4, (LARGEST_BLOCK * pane.ratio) / fit));
  const scale = fit * view.zoom;
  view.left = Math.min(Math.max(view.left, 0), Math.max(0, geometry.columns - pane.canvas.width / scale));
  view.top = Math.min(Math.max(view.top, 0), Math.max(0, geometry.rows - pane.canvas.height / scale));
}

function move(rows, columns) {
  state.view.left += columns;
  state.view.top += rows;
  drawSoon();
}

// Zooms and leaves the block under (x, y), in pixels of the canvas, where it is.
function zoomAt(factor, x, y) {
  const before = pixelView();
  state.view.zoom *= factor;
  clampView();
  const { scale } = pixelView();
  state.view.left = before.left + x / before.scale - x / scale;
  state.view.top = before.top + y / before.scale - y / scale;
  drawSoon();
}

function zoomMiddle(factor) {
  const [pane] = panes;
  const { geometry } = pane.picture.causal;
  const half = pane.fitScale(geometry) / 2; // the middle of the map where it is seen whole
  const { x, y } = state.cursor
    ? pane.middleOf(pixelView(), state.cursor)
    : { x: geometry.columns * half, y: geometry.rows * half };
  zoomAt(factor, x, y);
}

function fit() {
  Object.assign(state.view, { left: 0, top: 0, zoom: 1 });
  drawSoon();
}

// Moves the view so that a block is in it.
function follow({ row, column }) {
  const view = pixelView();
  const { width, height } = panes[0].canvas;
  const into = (start, room, block) => Math.max(Math.min(start, block), block + 1 - room);
  state.view.left = into(view.left, width / view.scale, column);
  state.view.top = into(view.top, height / view.scale, row);
  drawSoon();
}

// What is left for a map in height, so that what is said of its blocks is seen below it; any height where pages scroll.
function roomForMap() {
  if (narrow.matches) return Infinity;
  const below = element("below");
  const isBeside = below.offsetTop < element("panes").offsetTop + element("panes").offsetHeight;
  const others = [element("tools"), panes[0].element.querySelector("figcaption"), ...(isBeside ? [] : [below])];
  const taken = others.reduce((sum, { offsetHeight }) => sum + offsetHeight, PEEK);
  return Math.max(LEAST_ROOM, element("right").clientHeight - taken);
}

let drawing = false;

function drawSoon() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(drawNow);
}

function drawNow() {
  drawing = false;
  if (!state.files[0]) return;
  drawHeat();
  if (!panes[0].picture) return;
  const room = roomForMap();
  drawnPanes().forEach((pane) => pane.resize(room));
  clampView();
  element("panes").classList.toggle("zoomed", state.view.zoom > 1);
  drawnPanes().forEach((pane) => pane.draw(pixelView(), state.cursor, state.found, state.colours));
  window.flexprefill.rememberSoon();
}

function drawHeat() {
  const [file] = state.files;
  const { colours, heatBy } = state;
  const most = Math.max(heatMost(), 1e-6);
  const colourOf = (place) => {
    if (heatBy !== "pattern") return rampColour(colours.ramp, heatValue(place) / most);
    const main = file.patterns?.get(`${place.layer}:${place.column}`)?.main;
    return main ? colours[main] : colours.dropped;
  };
  const other = state.compare === "head" && state.chosen[1];
  heat.draw(file, { chosen: state.chosen[0], other, colourOf, isMarked: (place) => apart(place) > 0 }, colours);
}

function drawFrames() {
  drawnPanes().forEach((pane) => pane.ratio && pane.drawFrame(pixelView(), state.cursor, state.found, state.colours));
}

Object.assign(window.flexprefill, { drawFrames, drawNow, drawSoon, fit, follow, move, pixelView, zoomAt, zoomMiddle });
