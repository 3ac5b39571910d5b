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
  heads: [], // what is shown: [{ map, patterns }]
  difference: false, // both in one map
  view: { left: 0, top: 0, zoom: 1 }, // blocks, blocks, times the scale that shows the whole
  cursor: null, // the block pointed at
  colours: {},
  message: "",
};

const fileOf = (slot) => [state.files[0], { nothing: null, head: state.files[0], file: state.files[1] }[state.compare]][slot];
const shown = () => (state.files[0] ? [0, 1].filter((slot) => fileOf(slot)) : []);
const comparable = () => state.heads.length === 2 && state.heads[0].map.geometry.equals(state.heads[1].map.geometry);
const inOneMap = () => state.difference && comparable();

// The same head in a file that may have fewer layers and heads.
function nearest(file, { layer: number, column }) {
  const layer = file.layer(number) ?? file.layers[0];
  return { layer: layer.number, column: Math.min(column, layer.columns - 1) };
}

Object.assign(window.flexprefill, {
  comparable, element, fileOf, heat, inOneMap, nearest, panes, shown, state, wanted,
});
