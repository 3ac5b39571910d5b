// What the page says in words, bars and lists of the state.

const { PATTERNS, comparable, element, fileOf, grouped, headName, headText, heat, inOneMap, panes, shown, state, wanted } =
  window.flexprefill;

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
  element("difference").disabled = !comparable();
  element("difference").setAttribute("aria-pressed", inOneMap());
  element("pane-a").hidden = !panes[0].picture;
  element("pane-b").hidden = !panes[1].picture;
  element("panes").classList.toggle("two", Boolean(panes[1].picture));
  state.heads.forEach((head, slot) => describePane(panes[slot], slot, head));
  if (inOneMap()) panes[0].element.querySelector("figcaption").replaceChildren(tag(0), " against ", tag(1));
  element("legend").replaceChildren(...legend());
  element("patterns").replaceChildren(...state.heads.flatMap(patternBar));
  element("facts").replaceChildren(...facts(file));
  element("heat-most").textContent = percent(Math.max(...file.density));
  element("heat-text").textContent = headText(file, state.chosen[0]);
  heat.canvas.setAttribute("aria-label", `Layers × heads by density. Chosen: ${headText(file, state.chosen[0])}`);
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function node(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

const tag = (slot) => node("b", "AB"[slot], slot ? "tag b" : "tag");

function describePane(pane, slot, { file, layer, column, map: { geometry } }) {
  const text = headText(file, { layer, column });
  pane.element.querySelector("figcaption").replaceChildren(tag(slot), ` ${text}`);
  const size = `${grouped(geometry.queryLength)} queries × ${grouped(geometry.keyLength)} keys`;
  pane.canvas.setAttribute("aria-label", `${"AB"[slot]}, ${text}, ${size} in blocks of ${geometry.blockSize}`);
}

function legend() {
  const item = (className, text) => {
    const made = node("span", "");
    made.append(node("i", "", `swatch ${className}`), text);
    return made;
  };
  if (state.heads.length === 2 && !comparable()) return ["A and B have other lengths: no differences", ...plainLegend()];
  if (!comparable()) return plainLegend();
  const { both, onlyA, onlyB } = state.counts;
  const seen = state.heads[0].map.geometry.bits;
  return [
    item("both", `both ${percent(both / seen)}`),
    item("only-a", `only A ${percent(onlyA / seen)}`),
    item("only-b", `only B ${percent(onlyB / seen)}`),
    item("dropped", "neither"),
  ];
}

function plainLegend() {
  const scale = node("span", "");
  scale.append("dropped", node("i", "", "swatch ramp"), "kept");
  return [scale];
}

function patternBar({ patterns: { shares } }, slot) {
  const bar = node("div", "", "bar");
  const list = node("ul", "");
  const named = PATTERNS.map((pattern) => `${pattern} ${percent(shares[pattern])}`);
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", `${"AB"[slot]}: ${named.join(", ")}`);
  PATTERNS.forEach((pattern, at) => {
    const part = node("i", "", pattern);
    part.style.width = `${100 * shares[pattern]}%`;
    bar.append(part);
    const line = node("li", "");
    line.append(node("i", "", `swatch ${pattern}`), named[at]);
    list.append(line);
  });
  return state.heads.length === 2 ? [tag(slot), bar, list] : [bar, list];
}

function facts({ name, size, layers, metadata, config }) {
  const { queryLength, keyLength, blockSize } = state.heads[0]?.map.geometry ?? layers[0].geometry;
  const lines = {
    name,
    size: `${grouped(size)} bytes`,
    layers: grouped(layers.length),
    tokens: queryLength === keyLength ? grouped(keyLength) : `last ${grouped(queryLength)} of ${grouped(keyLength)}`,
    block: `${blockSize} tokens`,
    model: metadata.model,
    dtype: metadata.dtype,
    scoring: metadata.scoring,
    ...config,
  };
  delete lines.block_size;
  return Object.entries(lines)
    .filter(([, value]) => value !== undefined && value !== "")
    .flatMap(([key, value]) => [node("dt", key.replaceAll("_", " ")), node("dd", String(value))]);
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
    const heads = Array.from({ length: layer.columns }, (_, each) => [each, headName(layer, each).replace("head ", "")]);
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
    if (row >= map.geometry.rows || column >= map.geometry.visible(row)) return "not there";
    return map.has(row, column) ? `kept, ${patterns.classOf(row, column)}` : "dropped";
  };
  const verdicts = state.heads.map((head, slot) => (state.heads[1] ? `${"AB"[slot]} ${verdict(head)}` : verdict(head)));
  return [
    `queries ${tokens(row, offset, queryLength)} (block ${grouped(row)})`,
    `keys ${tokens(column, 0, keyLength)} (block ${grouped(column)})`,
    `distance ${grouped(distance)} blocks (${grouped(distance * blockSize)} tokens)`,
    ...verdicts,
  ].join(" · ");
}

Object.assign(window.flexprefill, { blockText, refreshPage, say });
