// What the page says in words, bars and lists of the state.

const {
  DENSE, PATTERNS, RECALL_ENTRY, apart, comparable, densityOf, element, fileOf, grouped, headName, headText, heat, inOneMap,
  panes, placesOf, recallOf, shown, state, wanted,
} = window.flexprefill;

function say(message) {
  state.message = message;
  element("message").textContent = message;
  element("message").hidden = !message;
}

function refreshPage() {
  const [file] = state.files;
  element("ask").hidden = Boolean(file);
  element("viewer").hidden = !file;
  element("title").textContent = state.files.filter(Boolean).map(({ name }) => name).join("  ↔  ");
  element("wanted").textContent = wanted.map(({ reason }) => reason).join("\n");
  if (!file) return;
  element("wanted-b").textContent = state.files[1] ? "" : (wanted[1]?.reason ?? "");
  document.body.classList.toggle("alone", state.compare === "nothing");
  fillChoices();
  element("difference").hidden = state.compare === "nothing";
  element("difference").disabled = !comparable();
  element("difference").setAttribute("aria-pressed", inOneMap());
  element("colour").parentElement.hidden = comparable();
  element("colour").value = state.colour;
  element("pane-a").hidden = !panes[0].picture;
  element("pane-b").hidden = !panes[1].picture;
  element("panes").classList.toggle("two", Boolean(panes[1].picture));
  state.heads.forEach((head, slot) => describePane(panes[slot], slot, head));
  const caption = panes[0].element.querySelector("figcaption");
  if (inOneMap()) caption.append(" against ", tag(1), ` ${captionOf(state.heads[1])}`);
  element("legend").replaceChildren(...legend().map(legendItem));
  element("patterns").replaceChildren(...state.heads.flatMap(patternBar));
  element("facts").replaceChildren(...facts(file));
  element("files-apart").textContent = filesApart();
  refreshHeat(file);
}

function refreshHeat(file) {
  const known = { difference: state.compare === "file", recall: placesOf(file).some((place) => recallOf(file, place)) };
  for (const [name, isKnown] of Object.entries(known)) {
    element("heat-by").querySelector(`[value=${name}]`).hidden = !isKnown;
    if (!isKnown && state.heatBy === name) state.heatBy = "density";
  }
  const most = element("heat-most");
  element("heat-scale").hidden = state.heatBy === "pattern";
  element("heat-legend").hidden = state.heatBy !== "pattern";
  element("heat-legend").replaceChildren(...[DENSE, ...PATTERNS].map((name) => legendItem([name, name])));
  const write = { density: percent, difference: (blocks) => `${grouped(blocks)} blocks`, recall: (lost) => `${percent(lost)} lost` };
  if (state.heatBy in write) {
    element("heat-least").textContent = write[state.heatBy](0);
    most.textContent = write[state.heatBy](heatMost());
  }
  element("heat-by").value = state.heatBy;
  element("heat-text").textContent = heatText(state.chosen[0]);
  heat.canvas.setAttribute("aria-label", `Layers × heads. Chosen: ${heatText(state.chosen[0])}`);
}

// What the heat map colours a head by: a density, blocks that differ, or mass that is lost.
function heatValue(place) {
  const [file] = state.files;
  if (state.heatBy === "difference") return apart(place) ?? 0;
  if (state.heatBy === "recall") return 1 - (recallOf(file, place)?.mean ?? 1);
  return densityOf(file, place);
}

const heatMost = () => placesOf(state.files[0]).reduce((most, place) => Math.max(most, heatValue(place)), 0);

// What the heat map says of a head.
function heatText(place) {
  const file = state.files[0];
  const main = file.patterns?.get(`${place.layer}:${place.column}`)?.main;
  const blocks = apart(place);
  return [
    headText(file, place),
    ...(state.heatBy === "pattern" && main && main !== DENSE ? [`mostly ${main}`] : []),
    ...(blocks === undefined ? [] : [blocks ? `differs in ${grouped(blocks)} blocks` : "equal in both files"]),
  ].join(", ");
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function node(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

const tag = (slot) => node("b", "AB"[slot], slot ? "tag b" : "tag");

const captionOf = ({ file, layer, column }) => headText(file, { layer, column });

function describePane(pane, slot, head) {
  const text = captionOf(head);
  const { geometry } = head.map;
  pane.element.querySelector("figcaption").replaceChildren(tag(slot), ` ${text}`);
  const size = `${grouped(geometry.queryLength)} queries × ${grouped(geometry.keyLength)} keys`;
  pane.canvas.setAttribute("aria-label", `${"AB"[slot]}, ${text}, ${size} in blocks of ${geometry.blockSize}`);
}

// How much the two files differ, in one sentence.
function filesApart() {
  if (state.compare !== "file" || !state.differences) return "";
  const { heads, apart: without } = state.differences;
  const counts = [...heads.values()];
  const unequal = counts.filter(({ onlyA, onlyB }) => onlyA + onlyB);
  const [onlyA, onlyB] = ["onlyA", "onlyB"].map((side) => counts.reduce((sum, count) => sum + count[side], 0));
  const compared = counts.length === 1 ? "1 head" : `${grouped(counts.length)} heads`;
  const differing = `${grouped(onlyA + onlyB)} blocks differ: ${grouped(onlyA)} only in A, ${grouped(onlyB)} only in B.`;
  return [
    ...(counts.length ? [unequal.length ? differing : `The masks of ${compared} are equal.`] : []),
    ...(unequal.length ? [`${grouped(unequal.length)} of ${compared} differ.`] : []),
    ...(without ? [`${grouped(without)} heads of A have no counterpart of their size in B.`] : []),
  ].join(" ");
}

// [class of the swatch, text], or a text alone.
function legend() {
  const plain = state.colour === "pattern" ? patternLegend() : [["kept", "kept"], ["dropped", "dropped"]];
  if (state.heads.length === 2 && !comparable()) return ["A and B have other lengths: no differences", ...plain];
  if (!comparable()) return plain;
  const { both, onlyA, onlyB } = state.counts;
  const seen = state.heads[0].map.geometry.bits;
  return [
    ["both", `both ${percent(both / seen)}`],
    ["only-a", `only A ${percent(onlyA / seen)}`],
    ["only-b", `only B ${percent(onlyB / seen)}`],
    ["dropped", "neither"],
  ];
}

function patternLegend() {
  const used = (name) => state.heads.some(({ patterns }) => (patterns.dense ? name === DENSE : patterns.counts[name]));
  return [...[DENSE, ...PATTERNS].filter(used).map((name) => [name, name]), ["dropped", "dropped"]];
}

function legendItem(item) {
  if (typeof item === "string") return item;
  const made = node("span", "");
  made.append(node("i", "", `swatch ${item[0]}`), item[1]);
  return made;
}

function patternBar({ patterns: { counts, kept, dense } }, slot) {
  const names = dense ? [DENSE] : PATTERNS;
  const shares = dense ? [1] : PATTERNS.map((pattern) => kept && counts[pattern] / kept);
  const texts = dense ? ["dense: keeps every block"] : PATTERNS.map((pattern, at) => `${pattern} ${percent(shares[at])}`);
  const bar = node("div", "", "bar");
  const list = node("ul", "");
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", `${"AB"[slot]}: ${texts.join(", ")}`);
  names.forEach((name, at) => {
    const part = node("i", "", name);
    part.style.width = `${100 * shares[at]}%`;
    bar.append(part);
    const line = node("li", "");
    line.append(legendItem([name, texts[at]]));
    list.append(line);
  });
  return state.heads.length === 2 ? [tag(slot), bar, list] : [bar, list];
}

function facts(file) {
  const { name, size, layers, metadata, config, user, tokens } = file;
  const { queryLength, keyLength, blockSize } = state.heads[0]?.map.geometry ?? layers[0].geometry;
  const own = {
    name,
    size: `${grouped(size)} bytes`,
    layers: grouped(layers.length),
    heads: grouped(placesOf(file).length),
    tokens: queryLength === keyLength ? grouped(keyLength) : `last ${grouped(queryLength)} of ${grouped(keyLength)}`,
    block: `${blockSize} tokens`,
    "prompt text": tokens ? "in the file: private" : "not in the file",
    model: metadata.model,
    dtype: metadata.dtype,
    scoring: metadata.scoring,
    "written by": written(metadata.library),
  };
  const settings = Object.entries(config ?? {}).filter(([key]) => key !== "block_size");
  const others = Object.entries(user).filter(([key]) => key !== RECALL_ENTRY);
  return [...Object.entries(own), ...settings, ...others]
    .filter(([, value]) => value !== undefined && value !== "")
    .flatMap(([key, value]) => [node("dt", key.replaceAll("_", " ")), node("dd", String(value))]);
}

function written(library) {
  try {
    return Object.entries(JSON.parse(library)).map((pair) => pair.join(" ")).join(", ");
  } catch {
    return library;
  }
}

function fillChoices() {
  const options = [["nothing", "nothing"], ["head", "another head of this file"]];
  if (state.files[1]) options.push(["file", state.files[1].name]);
  fill(element("compare"), options, state.compare);
  element("choice-b").hidden = state.compare === "nothing";
  for (const slot of shown()) {
    const file = fileOf(slot);
    const { layer: number, column } = state.chosen[slot];
    const layer = file.layer(number);
    fill(element(`layer-${"ab"[slot]}`), file.layers.map((each) => [each.number, each.number]), number);
    const heads = Array.from({ length: layer.columns }, (_, each) => [each, headName(layer, each).replace(/^head /, "")]);
    fill(element(`head-${"ab"[slot]}`), heads, column);
  }
}

function fill(select, options, value) {
  select.replaceChildren(...options.map(([key, text]) => new Option(text, key)));
  select.value = value;
}

// What is known of a block.
function blockText({ row, column }) {
  const { geometry } = panes[0].picture.causal;
  const { blockSize, offset, queryLength, keyLength } = geometry;
  const tokens = (block, start, end) => {
    const last = Math.min((block + 1) * blockSize, end) - 1;
    return `${grouped(start + block * blockSize)}–${grouped(start + last)}`;
  };
  const distance = geometry.visible(row) - 1 - column;
  const verdict = ({ map, patterns }) => {
    if (!map.geometry.sees(row, column)) return "not there";
    if (!map.has(row, column)) return "dropped";
    return `kept, ${patterns.dense ? DENSE : patterns.classOf(row, column)}`;
  };
  const verdicts = state.heads.map((head, slot) => (state.heads[1] ? `${"AB"[slot]} ${verdict(head)}` : verdict(head)));
  return [
    `queries ${tokens(row, offset, queryLength)} (block ${grouped(row)})`,
    `keys ${tokens(column, 0, keyLength)} (block ${grouped(column)})`,
    `distance ${grouped(distance)} blocks (${grouped(distance * blockSize)} tokens)`,
    ...verdicts,
  ].join(" · ");
}

// The totals of a block's row and column.
function totalsText({ row, column }) {
  const sentence = ({ map: { geometry }, totals }, slot) => {
    if (row >= geometry.rows || column >= geometry.columns) return "";
    const whose = state.heads[1] ? `${"AB"[slot]}: ` : "";
    return (
      `${whose}the query block keeps ${grouped(totals.rows[row])} of ${grouped(geometry.visible(row))} key blocks, ` +
      `the key block is kept by ${grouped(totals.columns[column])} of ${grouped(geometry.seenBy(column))} query blocks`
    );
  };
  return state.heads.map(sentence).filter(Boolean).join(" · ");
}

Object.assign(window.flexprefill, { blockText, heatMost, heatText, heatValue, legend, node, refreshPage, say, totalsText });
