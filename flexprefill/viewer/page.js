// What keys, mouse, files and address do about the state, and when it is drawn.

const {
  BlockMap, blockText, classify, comparable, element, fileOf, headText, heat, nearest, openMaskFile, panes, refreshPage,
  say, shown, sourceOfBytes, sourceOfFile, state, wanted,
} = window.flexprefill;

const COLOURS = {
  paper: "--paper", ink: "--ink", muted: "--muted", line: "--line", cursor: "--cursor", kept: "--kept",
  dropped: "--dropped", both: "--both", onlyA: "--only-a", onlyB: "--only-b",
};
const RAMP = ["--ramp-0", "--ramp-1", "--ramp-2", "--ramp-3", "--ramp-4"];
const LARGEST_BLOCK = 64; // CSS pixels of a block at the highest zoom, unless the whole map is shown larger
const KEPT_HEADS = 8; // maps held after they were shown
const STEP = 1 / 8; // of the view, that an arrow key moves
const ZOOM = 1.5;
const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

// ---- files and heads

async function open(slot, source) {
  try {
    const file = await openMaskFile(source);
    state.files[slot] = file;
    if (slot === 1) state.compare = "file";
    if (slot === 0) Object.assign(state.view, { left: 0, top: 0, zoom: 1 });
    state.chosen[slot] = nearest(file, state.chosen[0]);
    if (slot === 0 && fileOf(1)) state.chosen[1] = nearest(fileOf(1), state.chosen[0]);
    say("");
  } catch (error) {
    say(error.message);
  }
  await show();
}

const heldHeads = new Map();

async function loadHead(file, { layer, column }) {
  const held = heldHeads.get(file)?.get(`${layer}:${column}`);
  if (held) return held;
  const { geometry } = file.layer(layer);
  const map = BlockMap.fromTriangle(geometry, await file.readHead(layer, column));
  const head = { file, layer, column, map, causal: BlockMap.causal(geometry), patterns: classify(map, file.config) };
  if (!heldHeads.has(file)) heldHeads.set(file, new Map());
  const heads = heldHeads.get(file);
  heads.set(`${layer}:${column}`, head);
  if (heads.size > KEPT_HEADS) heads.delete(heads.keys().next().value);
  for (const closed of heldHeads.keys()) if (!state.files.includes(closed)) heldHeads.delete(closed);
  return head;
}

let latest = 0;
let pending = Promise.resolve();

function show() {
  pending = showChosen(++latest);
  return pending;
}

async function showChosen(mine) {
  let heads = [];
  try {
    heads = await Promise.all(shown().map((slot) => loadHead(fileOf(slot), state.chosen[slot])));
  } catch (error) {
    if (mine === latest) say(error.message);
  }
  if (mine !== latest) return;
  state.heads = heads;
  state.cursor = null;
  compose();
  refreshPage();
  point(state.cursor);
  drawSoon();
}

// What each pane is to draw.
function compose() {
  const [a, b] = state.heads;
  const colours = state.colours;
  panes.forEach((pane) => (pane.picture = null));
  if (!a) return;
  if (!comparable()) {
    state.heads.forEach(({ map, causal }, slot) => {
      panes[slot].picture = { causal, inks: [{ map, colour: colours.kept }] };
    });
    return;
  }
  const both = { map: a.map.and(b.map), colour: colours.both };
  const onlyA = { map: a.map.andNot(b.map), colour: colours.onlyA };
  const onlyB = { map: b.map.andNot(a.map), colour: colours.onlyB };
  state.counts = { both: both.map.count(), onlyA: onlyA.map.count(), onlyB: onlyB.map.count() };
  if (state.difference) {
    panes[0].picture = { causal: a.causal, inks: [both, onlyA, onlyB] };
  } else {
    panes[0].picture = { causal: a.causal, inks: [both, onlyA] };
    panes[1].picture = { causal: b.causal, inks: [both, onlyB] };
  }
}

// ---- choosing

// Where B is of another file it follows A; a head of the same file stays.
function choose(slot, choice) {
  state.chosen[slot] = nearest(fileOf(slot), choice);
  if (slot === 0 && state.compare === "file") state.chosen[1] = nearest(state.files[1], state.chosen[0]);
  say("");
  return show();
}

function compareWith(compare, choice = state.chosen[0]) {
  state.compare = compare;
  if (fileOf(1)) state.chosen[1] = nearest(fileOf(1), choice);
  return show();
}

function stepLayer(step) {
  const { layers } = state.files[0];
  const at = layers.findIndex(({ number }) => number === state.chosen[0].layer) + step;
  if (layers[at]) choose(0, { ...state.chosen[0], layer: layers[at].number });
}

function stepHead(step) {
  const { layer, column } = state.chosen[0];
  const next = column + step;
  if (next >= 0 && next < state.files[0].layer(layer).columns) choose(0, { layer, column: next });
}

function toggleDifference() {
  if (!comparable()) return;
  state.difference = !state.difference;
  compose();
  refreshPage();
  point(state.cursor);
  drawSoon();
}

// ---- the view

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

let drawing = false;

function drawSoon() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(drawNow);
}

function drawNow() {
  drawing = false;
  if (!state.files[0]) return;
  heat.draw(state.files[0], state.chosen[0], state.compare === "head" && state.chosen[1], differing(), state.colours);
  if (!panes[0].picture) return;
  const drawn = panes.filter((pane) => pane.picture);
  drawn.forEach((pane) => pane.resize());
  clampView();
  drawn.forEach((pane) => pane.draw(pixelView(), state.cursor, state.colours));
  rememberSoon();
}

// Heads that the two files hold differently, by their checksums alone.
function differing() {
  const [a, b] = state.files;
  if (state.compare !== "file") return new Set();
  return new Set(
    a.layers.flatMap((layer) => {
      const other = b.layer(layer.number);
      const same = (column) =>
        other.geometry.equals(layer.geometry) &&
        a.checksums[layer.first + column] === b.checksums[other.first + column];
      const places = Array.from({ length: Math.min(layer.columns, other?.columns ?? 0) }, (_, column) => column);
      return places.filter((column) => !same(column)).map((column) => `${layer.number}:${column}`);
    }),
  );
}

// ---- the block pointed at

function point(block) {
  state.cursor = block;
  element("readout").textContent = block ? blockText(block) : "Point at a block, or press Shift and an arrow key.";
  const drawn = panes.filter((pane) => pane.picture);
  drawn.forEach((pane) => pane.ratio && pane.drawFrame(pixelView(), block, state.colours));
}

function stepCursor(rows, columns) {
  const { geometry } = panes[0].picture.causal;
  const view = pixelView();
  const { width, height } = panes[0].canvas;
  const from = state.cursor ?? { row: Math.floor(view.top), column: Math.floor(view.left) };
  const to = state.cursor ? [from.row + rows, from.column + columns] : [from.row, from.column];
  const row = Math.min(Math.max(to[0], 0), geometry.rows - 1);
  const column = Math.min(Math.max(to[1], 0), geometry.visible(row) - 1);
  const follow = (start, room, block) => Math.max(Math.min(start, block), block + 1 - room);
  state.view.left = follow(view.left, width / view.scale, column);
  state.view.top = follow(view.top, height / view.scale, row);
  point({ row, column });
  drawSoon();
}

// ---- keys and mouse

document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || element("help-dialog").open) return;
  if (key === "?") return act(event, () => element("help-dialog").showModal());
  if (!state.files[0] || target.tagName === "SELECT") return;
  if (key === "[" || key === "]") return act(event, () => stepHead(key === "[" ? -1 : 1));
  if (key === "{" || key === "}") return act(event, () => stepLayer(key === "{" ? -1 : 1));
  if (!panes[0].picture) return;
  if (key === "d") return act(event, toggleDifference);
  if (key === "0") return act(event, fit);
  if (key === "+" || key === "=") return act(event, () => zoomMiddle(ZOOM));
  if (key === "-") return act(event, () => zoomMiddle(1 / ZOOM));
  if (!(key in ARROWS)) return;
  const [rows, columns] = ARROWS[key];
  if (target === heat.canvas) return act(event, () => (rows ? stepLayer(rows) : stepHead(columns)));
  if (event.shiftKey) return act(event, () => stepCursor(rows, columns));
  const { scale } = pixelView();
  const { width, height } = panes[0].canvas;
  act(event, () => move((rows * STEP * height) / scale, (columns * STEP * width) / scale));
});

function act(event, action) {
  event.preventDefault();
  action();
}

for (const pane of panes) {
  const pointers = new Map();
  const inPixels = (event) => {
    const box = pane.canvas.getBoundingClientRect();
    return { x: (event.clientX - box.left) * pane.ratio, y: (event.clientY - box.top) * pane.ratio };
  };
  const middle = () => {
    const places = [...pointers.values()];
    const mean = (axis) => places.reduce((sum, place) => sum + place[axis], 0) / places.length;
    const spread = places.length < 2 ? 1 : Math.hypot(places[0].x - places[1].x, places[0].y - places[1].y);
    return { x: mean("x"), y: mean("y"), spread: Math.max(spread, 1) };
  };
  pane.canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    pane.canvas.setPointerCapture(event.pointerId);
    pane.canvas.classList.add("moving");
    pointers.set(event.pointerId, inPixels(event));
  });
  pane.canvas.addEventListener("pointermove", (event) => {
    if (!pointers.has(event.pointerId)) return point(pane.blockAt(pixelView(), event.clientX, event.clientY));
    const before = middle();
    pointers.set(event.pointerId, inPixels(event));
    const after = middle();
    const { scale } = pixelView();
    move((before.y - after.y) / scale, (before.x - after.x) / scale);
    if (pointers.size > 1) zoomAt(after.spread / before.spread, after.x, after.y);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    pane.canvas.addEventListener(end, (event) => {
      pointers.delete(event.pointerId);
      if (!pointers.size) pane.canvas.classList.remove("moving");
    });
  }
  pane.canvas.addEventListener("pointerleave", () => point(null));
  pane.canvas.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      const lines = event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? event.deltaY / 40 : event.deltaY;
      const { x, y } = inPixels(event);
      zoomAt(2 ** (-lines / 8), x, y);
    },
    { passive: false },
  );
}

heat.canvas.addEventListener("click", (event) => {
  const choice = heat.headAt(event.clientX, event.clientY);
  if (!choice) return;
  if (!event.shiftKey) choose(0, choice);
  else if (state.compare === "nothing") compareWith("head", choice);
  else choose(1, choice);
});
heat.canvas.addEventListener("pointermove", (event) => {
  const under = heat.headAt(event.clientX, event.clientY) ?? state.chosen[0];
  element("heat-text").textContent = headText(state.files[0], under);
});
heat.canvas.addEventListener("pointerleave", () => {
  element("heat-text").textContent = headText(state.files[0], state.chosen[0]);
});

[0, 1].forEach((slot) => {
  const name = "ab"[slot];
  element(`layer-${name}`).addEventListener("change", ({ target }) =>
    choose(slot, { ...state.chosen[slot], layer: Number(target.value) }),
  );
  element(`head-${name}`).addEventListener("change", ({ target }) =>
    choose(slot, { ...state.chosen[slot], column: Number(target.value) }),
  );
  element(`open-${name}`).addEventListener("change", ({ target }) => {
    if (target.files.length) pending = open(state.files[0] ? slot : 0, sourceOfFile(target.files[0]));
    target.value = ""; // the same file can be chosen again
  });
});
element("compare").addEventListener("change", ({ target }) => compareWith(target.value));
element("zoom-in").addEventListener("click", () => panes[0].picture && zoomMiddle(ZOOM));
element("zoom-out").addEventListener("click", () => panes[0].picture && zoomMiddle(1 / ZOOM));
element("fit").addEventListener("click", fit);
element("difference").addEventListener("click", toggleDifference);
element("help").addEventListener("click", () => element("help-dialog").showModal());
element("theme").addEventListener("click", () => {
  document.documentElement.style.colorScheme = isDark() ? "light" : "dark";
  recolour();
});

document.addEventListener("dragover", (event) => act(event, () => document.body.classList.add("dropping")));
document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  pending = openDropped([...event.dataTransfer.files]);
});

// The file that the page asks for as A becomes A; a further one is what A is compared with.
async function openDropped(files) {
  for (const file of files) {
    const isSecond = state.files[0] || (files.length > 1 && file.name === wanted[1]?.name);
    await open(isSecond ? 1 : 0, sourceOfFile(file));
  }
}

// ---- light and dark

const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
prefersDark.addEventListener("change", recolour);
new ResizeObserver(drawSoon).observe(element("panes"));

const isDark = () => (document.documentElement.style.colorScheme || (prefersDark.matches ? "dark" : "light")) === "dark";

function recolour() {
  const probe = document.body.appendChild(document.createElement("i"));
  const resolved = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color.match(/\d+/g).slice(0, 3).map(Number);
  };
  for (const [name, variable] of Object.entries(COLOURS)) state.colours[name] = resolved(variable);
  state.colours.ramp = RAMP.map(resolved);
  probe.remove();
  compose();
  drawSoon();
}

// ---- the address keeps what is looked at

let remembering = 0;

function rememberSoon() {
  clearTimeout(remembering);
  remembering = setTimeout(remember, 300); // browsers refuse an address that changes with every frame
}

function remember() {
  clearTimeout(remembering);
  if (!panes[0].picture) return;
  const [a, b] = state.chosen;
  const { left, top, zoom } = state.view;
  const kept = { layer: a.layer, head: a.column, zoom: zoom.toFixed(3), left: left.toFixed(2), top: top.toFixed(2) };
  if (state.compare !== "nothing") Object.assign(kept, { compare: state.compare, other: `${b.layer}.${b.column}` });
  if (state.difference) kept.difference = 1;
  if (document.documentElement.style.colorScheme) kept.theme = document.documentElement.style.colorScheme;
  history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
}

function recall() {
  const kept = new URLSearchParams(location.hash.slice(1));
  const number = (name, otherwise) => {
    const value = Number(kept.get(name) ?? otherwise);
    return Number.isFinite(value) && value >= 0 ? value : otherwise;
  };
  const [file] = state.files;
  Object.assign(state.view, { zoom: number("zoom", 1), left: number("left", 0), top: number("top", 0) });
  state.difference = kept.get("difference") === "1";
  if (["light", "dark"].includes(kept.get("theme"))) document.documentElement.style.colorScheme = kept.get("theme");
  state.chosen[0] = nearest(file, { layer: number("layer", file.layers[0].number), column: Math.floor(number("head", 0)) });
  if (kept.get("compare") === "head" || (kept.get("compare") === "file" && state.files[1])) {
    state.compare = kept.get("compare");
    const [layer, column] = (kept.get("other") ?? "").split(".").map((part) => Math.floor(Number(part)) || 0);
    state.chosen[1] = nearest(fileOf(1), { layer, column: column ?? 0 });
  }
  recolour();
  return show();
}

window.addEventListener("hashchange", () => state.files[0] && recall());

// ---- start

async function start() {
  recolour();
  for (const [slot, { name, embedded }] of wanted.entries()) {
    if (!embedded) continue;
    const text = atob(element(`bytes-${slot}`).textContent);
    const bytes = Uint8Array.from(text, (character) => character.charCodeAt(0));
    element(`bytes-${slot}`).remove();
    await open(slot, sourceOfBytes(name, bytes));
  }
  if (state.files[0] && location.hash) await recall();
  refreshPage();
}

pending = start();

// For tests: what is shown, where a block or a head's cell is, and a promise of everything asked for so far being drawn.
Object.assign(window.flexprefill, {
  middleOf: (slot, block) => panes[slot].middleOf(pixelView(), block),
  pixelView,
  settled: async () => {
    for (let waited = null; waited !== pending; ) await (waited = pending);
    drawNow();
    remember();
  },
});
