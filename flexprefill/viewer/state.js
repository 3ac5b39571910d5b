// What is open, chosen and looked at.

const { HeatMap, Pane } = window.flexprefill;

const element = (id) => document.getElementById(id);
const panes = [new Pane(element("pane-a")), new Pane(element("pane-b"))];
const heat = new HeatMap(element("heat"));
const wanted = JSON.parse(element("files").textContent); // [{ name, size, embedded, reason }]

const state = {
  files: [null, null], // A, and the file that it is compared with
  compare: "nothing", // "nothing", "head": B is of A's file, "file": of the other
  chosen: [{ layer: 0, column: 0 }, { layer: 0, column: 0 }],
  heads: [], // what is shown, as loadHead gives it
  counts: null, // of the two heads: { both, onlyA, onlyB }
  differences: null, // of the two files, as differencesOf gives it
  difference: false, // both in one map
  colour: "kept", // what a map alone is coloured by: "kept" or "pattern"
  heatBy: "density", // "density", "pattern" or "difference"
  view: { left: 0, top: 0, zoom: 1 }, // blocks, blocks, times the scale that shows the whole
  cursor: null, // the block pointed at
  found: { keys: [], queries: [], tokens: [] }, // blocks whose text is searched for, and the first token of each match
  colours: {},
  message: "",
};

// The file that A or B is of, null where nothing is compared.
function fileOf(slot) {
  if (slot === 0 || state.compare === "head") return state.files[0];
  return state.compare === "file" ? state.files[1] : null;
}

const shown = () => (state.files[0] ? [0, 1].filter((slot) => fileOf(slot)) : []);
const comparable = () => state.heads.length === 2 && state.heads[0].map.geometry.equals(state.heads[1].map.geometry);
const inOneMap = () => state.difference && comparable();
const drawnPanes = () => panes.filter((pane) => pane.picture);

// The same head in a file that may have fewer layers and heads.
function nearest(file, { layer: number, column }) {
  const layer = file.layer(number) ?? file.layers[0];
  return { layer: layer.number, column: Math.min(column, layer.columns - 1) };
}

// How many blocks a head differs in between the two files; undefined where it has no counterpart or is not compared.
function apart({ layer, column }) {
  const counts = state.compare === "file" && state.differences?.heads.get(`${layer}:${column}`);
  return counts ? counts.onlyA + counts.onlyB : undefined;
}

Object.assign(window.flexprefill, {
  apart, comparable, drawnPanes, element, fileOf, heat, inOneMap, nearest, panes, shown, state, wanted,
});
