// The address keeps what is looked at; of the prompt and what is searched in it, nothing.

const { element, fileOf, nearest, panes, state } = window.flexprefill;

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
  if (state.colour !== "kept") kept.colour = state.colour;
  if (state.heatBy !== "density") kept.heat = state.heatBy;
  if (document.documentElement.style.colorScheme) kept.theme = document.documentElement.style.colorScheme;
  history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
}

// Puts what an address, from its # on, says into the state, as far as it fits the files.
function recall(address) {
  const kept = new URLSearchParams(address.slice(1));
  const number = (name, otherwise) => {
    const value = Number(kept.get(name) ?? otherwise);
    return Number.isFinite(value) && value >= 0 ? value : otherwise;
  };
  const oneOf = (name, select, otherwise) =>
    [...element(select).options].some(({ value }) => value === kept.get(name)) ? kept.get(name) : otherwise;
  const [file] = state.files;
  Object.assign(state.view, { zoom: number("zoom", 1), left: number("left", 0), top: number("top", 0) });
  state.difference = kept.get("difference") === "1";
  state.colour = oneOf("colour", "colour", "kept");
  state.heatBy = oneOf("heat", "heat-by", "density");
  if (["light", "dark"].includes(kept.get("theme"))) document.documentElement.style.colorScheme = kept.get("theme");
  const layer = number("layer", file.layers[0].number);
  state.chosen[0] = nearest(file, { layer, column: Math.floor(number("head", 0)) });
  if (kept.get("compare") === "head" || (kept.get("compare") === "file" && state.files[1])) {
    state.compare = kept.get("compare");
    const other = kept.get("other")?.split(".").map((part) => Math.floor(Number(part)) || 0);
    state.chosen[1] = nearest(fileOf(1), other ? { layer: other[0], column: other[1] ?? 0 } : state.chosen[0]);
  }
}

Object.assign(window.flexprefill, { recall, remember, rememberSoon });
