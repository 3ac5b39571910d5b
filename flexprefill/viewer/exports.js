// What is saved from the page: the view as PNG and SVG, the tables as CSV.

const {
  BAR, MARGIN, PATTERNS, bars, css, densityOf, drawnPanes, legend, mapEnd, patternsOf,
  pixelView, placesOf, recallOf, state, ticks,
} = window.flexprefill;

const SVG = "http://www.w3.org/2000/svg";
const TITLE = 26; // CSS pixels for a pane's title, above it, and for the legend below
const GAP = 16; // CSS pixels between two panes
const FONT = "12px ui-sans-serif, system-ui, sans-serif";

function save(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function fileName(ending) {
  const { layer, column } = state.chosen[0];
  const base = state.files[0].name.replace(/\.safetensors$/, "").replace(/[^\w.-]+/g, "-");
  return `${base}-layer${layer}-head${column}${ending}`;
}

// Where the panes stand in a picture, in CSS pixels: [{ pane, title, x }], width and height of the whole.
function layout() {
  let x = 0;
  const placed = drawnPanes().map((pane) => {
    const place = { pane, title: pane.element.querySelector("figcaption").textContent, x };
    x += pane.plane.clientWidth + GAP;
    return place;
  });
  const height = Math.max(...placed.map(({ pane }) => pane.plane.clientHeight)) + 2 * TITLE;
  return { placed, width: x - GAP, height };
}

// The legend's words with the colour of each: [{ text, colour }].
function legendColours() {
  const names = { "only-a": "onlyA", "only-b": "onlyB" };
  return legend().map((item) => {
    if (typeof item === "string") return { text: item };
    return { text: item[1], colour: state.colours[names[item[0]] ?? item[0]] };
  });
}

function savePng() {
  const { placed, width, height } = layout();
  const { ratio } = placed[0].pane;
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
  const context = canvas.getContext("2d");
  context.fillStyle = css(state.colours.paper);
  context.fillRect(0, 0, canvas.width, canvas.height);
  for (const { pane, x } of placed) {
    context.drawImage(pane.canvas, Math.round((x + MARGIN.left) * ratio), Math.round((TITLE + MARGIN.top) * ratio));
    context.drawImage(pane.frame, Math.round(x * ratio), Math.round(TITLE * ratio));
  }
  context.scale(ratio, ratio);
  context.font = FONT;
  context.textBaseline = "middle";
  context.fillStyle = css(state.colours.ink);
  for (const { title, x } of placed) context.fillText(title, x + 4, TITLE / 2);
  let x = MARGIN.left;
  for (const { text, colour } of legendColours()) {
    if (colour) {
      context.fillStyle = css(colour);
      context.fillRect(x, height - TITLE / 2 - 5, 10, 10);
    }
    context.fillStyle = css(state.colours.ink);
    context.fillText(text, x + 15, height - TITLE / 2);
    x += context.measureText(text).width + 34;
  }
  return new Promise((resolve) => canvas.toBlob((blob) => resolve(save(fileName(".png"), blob)), "image/png"));
}

function svgNode(name, attributes = {}, children = []) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const short = (number) => String(Math.round(100 * number) / 100);

// Every block that is in view as a shape: sharp at any size.
function saveSvg() {
  const { placed, width, height } = layout();
  const { colours } = state;
  const root = svgNode("svg", { width, height, viewBox: `0 0 ${short(width)} ${short(height)}`, style: `font: ${FONT}` });
  root.append(svgNode("rect", { width: "100%", height: "100%", fill: css(colours.paper) }));
  placed.forEach(({ pane, title, x }, at) => {
    root.append(svgNode("text", { x: x + 4, y: TITLE / 2 + 4, fill: css(colours.ink) }, [title]));
    root.append(svgPane(pane, x, TITLE, `map-${at}`));
  });
  let x = MARGIN.left;
  for (const { text, colour } of legendColours()) {
    if (colour) root.append(svgNode("rect", { x, y: height - TITLE / 2 - 5, width: 10, height: 10, fill: css(colour) }));
    root.append(svgNode("text", { x: x + 15, y: height - TITLE / 2 + 4, fill: css(colours.ink) }, [text]));
    x += 7 * text.length + 34;
  }
  save(fileName(".svg"), new Blob([new XMLSerializer().serializeToString(root)], { type: "image/svg+xml" }));
}

function svgPane(pane, x, y, id) {
  const { causal, inks, totals } = pane.picture;
  const { geometry } = causal;
  const { colours } = state;
  const plane = pane.planeOf(pixelView());
  const { right, bottom } = mapEnd(plane, geometry);
  const clip = svgNode("clipPath", { id }, [svgNode("rect", { width: short(right), height: short(bottom) })]);
  const moved = `scale(${plane.scale}) translate(${-plane.left} ${-plane.top})`;
  const paths = [{ map: causal, colour: colours.dropped }, ...inks].map(({ map, colour }) =>
    svgNode("path", { d: runs(map, plane), fill: css(colour), "shape-rendering": "crispEdges" }),
  );
  const blocks = svgNode("g", { "clip-path": `url(#${id})` }, [svgNode("g", { transform: moved }, paths)]);
  const bar = ({ rows, columns, most, colour, isLine }) => {
    const along = (lengths, shape) =>
      [...lengths].map((length, pixel) => {
        const start = isLine ? Math.max(0, length - BAR.line) : 0;
        return length ? shape(pixel, BAR.gap + start, short(length - start)) : "";
      });
    const ofRows = bars(rows, most.rows, plane.top, plane.scale, bottom);
    const ofColumns = bars(columns, most.columns, plane.left, plane.scale, right);
    const d = [
      ...along(ofRows, (at, x, length) => `M${short(right + x)} ${at}h${length}v1h-${length}z`),
      ...along(ofColumns, (at, y, length) => `M${at} ${short(bottom + y)}v${length}h1v-${length}z`),
    ];
    return svgNode("path", { d: d.join(""), fill: css(colour), opacity: isLine ? 1 : BAR.opacity });
  };
  const text = (content, attributes) =>
    svgNode("text", { fill: css(colours.muted), "font-size": 11, ...attributes }, [content]);
  const { keys, queries } = ticks(plane, geometry);
  const [{ most }] = totals;
  const labels = [
    ...keys.map(({ at, text: label }) => text(label, { x: short(at), y: -9, "text-anchor": "middle" })),
    ...queries.map(({ at, text: label }) => text(label, { x: -9, y: short(at + 4), "text-anchor": "end" })),
    text(`kept in each row, at most ${most.rows}`, {
      transform: `translate(${short(right + 42)} 2) rotate(-90)`, "text-anchor": "end", "font-size": 10,
    }),
    text("key tokens →", { x: 2, y: 12 - MARGIN.top }),
    text(`kept in each column, at most ${most.columns}`, { x: 2, y: bottom + 43, "font-size": 10 }),
    text("← query tokens", { transform: `translate(${13 - MARGIN.left} 2) rotate(-90)`, "text-anchor": "end" }),
  ];
  const place = `translate(${short(x + MARGIN.left)} ${short(y + MARGIN.top)})`;
  return svgNode("g", { transform: place }, [clip, blocks, ...totals.map(bar), ...labels]);
}

// The blocks of a map in view as a path in blocks: one piece for each run in a row.
function runs(map, { left, top, scale, width, height }) {
  const { rows, columns } = map.geometry;
  const [firstRow, endRow] = [Math.floor(top), Math.min(rows, Math.ceil(top + height / scale))];
  const [first, end] = [Math.floor(left), Math.min(columns, Math.ceil(left + width / scale))];
  const pieces = [];
  for (let row = firstRow; row < endRow; row++) {
    for (let column = first; column < end; column++) {
      if (!map.has(row, column)) continue;
      const start = column;
      while (column < end && map.has(row, column)) column++;
      pieces.push(`M${start} ${row}h${column - start}v1h-${column - start}z`);
    }
  }
  return pieces.join("");
}

// One line for each head of A; the names of `flexprefill inspect --csv`.
async function saveHeads() {
  const [file] = state.files;
  const patterns = await patternsOf(file, () => {});
  const compared = state.compare === "file" ? state.differences : null;
  const measured = placesOf(file).some((place) => recallOf(file, place));
  const lines = placesOf(file).map((place) => {
    const { layer, column, key } = place;
    const sizes = file.layer(layer);
    const { counts, kept, dense } = patterns.get(key);
    const apart = compared?.heads.get(key);
    const recall = recallOf(file, place);
    return {
      layer,
      batch: Math.floor(column / sizes.heads),
      head: column % sizes.heads,
      ...(sizes.names && { name: sizes.names[column % sizes.heads] }),
      density: densityOf(file, place),
      kept,
      visible: sizes.geometry.bits,
      ...(measured && { recall: recall?.mean ?? "", recall_least: recall?.least ?? "" }),
      dense,
      ...Object.fromEntries(PATTERNS.map((name) => [name, dense ? "" : kept && counts[name] / kept])),
      ...(compared && { only_a: apart?.onlyA ?? "", only_b: apart?.onlyB ?? "" }),
    };
  });
  saveCsv(fileName("-heads.csv").replace(/-layer.*-heads/, "-heads"), lines);
}

// One line for each query block and each key block of the heads shown.
function saveTotals() {
  const lines = state.heads.flatMap(({ layer, column, map: { geometry }, totals }, slot) => {
    const { blockSize, offset, queryLength, keyLength } = geometry;
    const line = (axis, kept, block, seen, start, length) => ({
      map: "AB"[slot],
      layer,
      head: column,
      axis,
      block,
      first_token: start + block * blockSize,
      last_token: start + Math.min((block + 1) * blockSize, length) - 1,
      kept,
      visible: seen,
    });
    return [
      ...Array.from(totals.rows, (kept, row) => line("query", kept, row, geometry.visible(row), offset, queryLength)),
      ...Array.from(totals.columns, (kept, key) => line("key", kept, key, geometry.seenBy(key), 0, keyLength)),
    ];
  });
  saveCsv(fileName("-totals.csv"), lines);
}

function saveCsv(name, lines) {
  const table = [Object.keys(lines[0]), ...lines.map(Object.values)];
  save(name, new Blob([table.map((cells) => `${cells.map(csvCell).join(",")}\r\n`).join("")], { type: "text/csv" }));
}

// Quoted where it has to be; what a spreadsheet would run as a formula stays text.
function csvCell(value) {
  if (typeof value === "boolean") return value ? "True" : "False"; // as the command line prints them
  if (typeof value !== "string") return String(value);
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

Object.assign(window.flexprefill, { save: { png: savePng, svg: saveSvg, heads: saveHeads, totals: saveTotals } });
