// What keys, clicks, files and the address do about the state.

const {
  Gallery, MaskFileError, apart, blockOfToken, comparable, compose, differencesOf, drawNow, drawSoon, element, fileOf, find,
  fit, follow, forgetFile, foundText, grouped, heat, heatText, listenTo, loadHead, move, nearest, openMaskFile, panes,
  patternsOf, pixelView, placesOf, point, recall, refreshPage, remember, save, say, shown, sourceOfBytes, sourceOfFile, state, wanted, zoomMiddle,
} = window.flexprefill;

const COLOURS = {
  paper: "--paper", ink: "--ink", muted: "--muted", line: "--line", cursor: "--cursor", kept: "--kept", found: "--found",
  dropped: "--dropped", both: "--both", onlyA: "--only-a", onlyB: "--only-b", dense: "--dense", sink: "--sink",
  window: "--window", last: "--last", vertical: "--vertical", slash: "--slash", scattered: "--scattered",
};
const RAMP = ["--ramp-0", "--ramp-1", "--ramp-2", "--ramp-3", "--ramp-4"];
const STEP = 1 / 8; // of the view, that an arrow key moves
const ZOOM = 1.5;
const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

const gallery = new Gallery((place) => {
  choose(0, place);
  element("stage").scrollIntoView({ block: "start" });
});

// ---- files and heads

async function open(slot, source) {
  try {
    const file = await openMaskFile(source);
    if (state.files[slot]) forgetFile(state.files[slot]);
    state.files[slot] = file;
    state.differences = null;
    if (slot === 1) state.compare = "file";
    if (slot === 0) Object.assign(state.view, { left: 0, top: 0, zoom: 1 });
    state.chosen[slot] = nearest(file, state.chosen[0]);
    if (slot === 0 && fileOf(1)) state.chosen[1] = nearest(fileOf(1), state.chosen[0]);
    say("");
  } catch (error) {
    say(error.message);
  }
  await show();
  if (state.files[1] && !state.differences) await compareFiles();
}

// Counts where the two files differ, and shows the head that differs most.
async function compareFiles() {
  const [a, b] = state.files;
  const { chosen } = state;
  const before = JSON.stringify(chosen);
  try {
    const differences = await differencesOf(a, b, (done, all) => {
      element("files-apart").textContent = `comparing heads: ${grouped(done)} of ${grouped(all)}`;
    });
    if (a !== state.files[0] || b !== state.files[1]) return;
    state.differences = differences;
    if (differences.heads.size) state.heatBy = "difference";
  } catch (error) {
    say(error.message);
    return;
  }
  const most = placesOf(a).reduce((best, place) => ((apart(place) ?? 0) > (apart(best) ?? 0) ? place : best), chosen[0]);
  if (JSON.stringify(state.chosen) === before && apart(most)) await choose(0, most);
  else await show();
}

let latest = 0;

function show() {
  return track(showChosen(++latest));
}

const busy = new Set(); // what was asked for and is not done

async function track(promise) {
  busy.add(promise);
  try {
    return await promise;
  } catch (error) {
    say(error.message); // such as a damaged head among all
    if (!(error instanceof MaskFileError)) console.error(error);
  } finally {
    busy.delete(promise);
  }
}

async function showChosen(mine) {
  let heads = [];
  try {
    heads = await Promise.all(shown().map((slot) => loadHead(fileOf(slot), state.chosen[slot])));
  } catch (error) {
    if (mine === latest) say(error.message);
  }
  if (mine !== latest) return;
  const { row, column } = state.cursor ?? {};
  if (!heads[0]?.map.geometry.sees(row, column)) state.cursor = null;
  state.heads = heads;
  refresh();
  try {
    if (state.files[0]) await gallery.refresh();
  } catch (error) {
    say(error.message);
  }
}

// Draws and says anew what is shown.
function refresh() {
  compose();
  refreshPage();
  find(element("search").value);
  point(state.cursor);
  drawSoon();
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
  refresh();
}

function colourBy(colour) {
  state.colour = colour;
  refresh();
  gallery.redraw();
}

// The heat map's patterns need every head read.
async function heatBy(what) {
  state.heatBy = what;
  refresh();
  if (what !== "pattern") return;
  const [file] = state.files;
  try {
    await patternsOf(file, (done, all) => {
      element("heat-text").textContent = `reading heads: ${grouped(done)} of ${grouped(all)}`;
      drawSoon();
    });
  } catch (error) {
    say(error.message);
  }
  refresh();
}

function stepCursor(rows, columns) {
  const { geometry } = panes[0].picture.causal;
  const view = pixelView();
  const from = state.cursor ?? { row: Math.floor(view.top), column: Math.floor(view.left) };
  const to = state.cursor ? [from.row + rows, from.column + columns] : [from.row, from.column];
  const row = Math.min(Math.max(to[0], 0), geometry.rows - 1);
  const column = Math.min(Math.max(to[1], 0), geometry.visible(row) - 1);
  follow({ row, column });
  point({ row, column });
}

// ---- the search in the prompt's text

let match = null; // which of the places found was jumped to

function search() {
  find(element("search").value);
  match = null;
  element("found").textContent = foundText(match);
}

function jump(step) {
  const { tokens } = state.found;
  if (!tokens.length) return;
  match = match === null ? (step > 0 ? 0 : tokens.length - 1) : (match + step + tokens.length) % tokens.length;
  element("found").textContent = foundText(match);
  const block = blockOfToken(tokens[match]);
  follow(block);
  point(block);
}

// ---- keys and clicks

document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || element("help-dialog").open) return;
  if (target.id === "search") {
    if (key === "Enter") act(event, () => jump(event.shiftKey ? -1 : 1));
    return;
  }
  if (key === "?") return act(event, () => element("help-dialog").showModal());
  if (!state.files[0] || target.tagName === "SELECT") return;
  if (key === "[" || key === "]") return act(event, () => stepHead(key === "[" ? -1 : 1));
  if (key === "{" || key === "}") return act(event, () => stepLayer(key === "{" ? -1 : 1));
  if (!panes[0].picture) return;
  if (key === "d") return act(event, toggleDifference);
  if (key === "/" && !element("search-tools").hidden) return act(event, () => element("search").focus());
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

panes.forEach(listenTo);

heat.canvas.addEventListener("click", (event) => {
  const choice = heat.headAt(event.clientX, event.clientY);
  if (!choice) return;
  if (!event.shiftKey) choose(0, choice);
  else if (state.compare === "nothing") compareWith("head", choice);
  else choose(1, choice);
});
heat.canvas.addEventListener("pointermove", (event) => {
  element("heat-text").textContent = heatText(heat.headAt(event.clientX, event.clientY) ?? state.chosen[0]);
});
heat.canvas.addEventListener("pointerleave", () => {
  element("heat-text").textContent = heatText(state.chosen[0]);
});

[0, 1].forEach((slot) => {
  const name = "ab"[slot];
  const chosen = (part) => ({ target }) => choose(slot, { ...state.chosen[slot], [part]: Number(target.value) });
  element(`layer-${name}`).addEventListener("change", chosen("layer"));
  element(`head-${name}`).addEventListener("change", chosen("column"));
  element(`open-${name}`).addEventListener("change", ({ target }) => {
    if (target.files.length) track(open(state.files[0] ? slot : 0, sourceOfFile(target.files[0])));
    target.value = ""; // the same file can be chosen again
  });
});
const onChange = (id, does) => element(id).addEventListener("change", ({ target }) => track(does(target.value)));
onChange("compare", (value) => compareWith(value));
onChange("colour", colourBy);
onChange("heat-by", heatBy);
onChange("sort", () => gallery.refresh());
onChange("filter", () => gallery.refresh());
onChange("save", (what) => {
  element("save").value = "";
  return save[what]();
});
const onClick = (id, does) => element(id).addEventListener("click", does);
onClick("zoom-in", () => panes[0].picture && zoomMiddle(ZOOM));
onClick("zoom-out", () => panes[0].picture && zoomMiddle(1 / ZOOM));
onClick("fit", fit);
onClick("difference", toggleDifference);
onClick("help", () => element("help-dialog").showModal());
onClick("found-before", () => jump(-1));
onClick("found-next", () => jump(1));
onClick("theme", () => {
  document.documentElement.style.colorScheme = isDark() ? "light" : "dark";
  recolour();
});
element("search").addEventListener("input", () => {
  search();
  drawSoon();
});

document.addEventListener("dragover", (event) => act(event, () => document.body.classList.add("dropping")));
document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  track(openDropped([...event.dataTransfer.files]));
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
new ResizeObserver(drawSoon).observe(element("right"));

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
  if (!state.files[0]) return;
  compose();
  drawSoon();
  gallery.redraw();
}

// ---- start

async function returnTo(address) {
  recall(address);
  recolour();
  await show();
  if (state.heatBy === "pattern") await heatBy("pattern");
}

window.addEventListener("hashchange", () => state.files[0] && track(returnTo(location.hash)));

async function start() {
  const address = location.hash; // which changes as files open
  recolour();
  for (const [slot, { name, embedded }] of wanted.entries()) {
    if (!embedded) continue;
    const bytes = bytesOf(element(`bytes-${slot}`).textContent);
    element(`bytes-${slot}`).remove();
    await open(slot, sourceOfBytes(name, bytes));
  }
  if (state.files[0] && address) await returnTo(address);
  refreshPage();
}

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let at = 0; at < bytes.length; at++) bytes[at] = text.charCodeAt(at);
  return bytes;
}

track(start());

// For tests: where a block is, and a promise of everything asked for so far being drawn.
Object.assign(window.flexprefill, {
  middleOf: (slot, block) => panes[slot].middleOf(pixelView(), block),
  settled: async () => {
    while (busy.size) await Promise.allSettled(busy);
    drawNow();
    await gallery.drawing;
    remember();
  },
});
