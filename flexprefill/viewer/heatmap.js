// Layers down, heads to the right, each cell in the colour of its head.

const { DENSE, css, densityOf, headName, recallOf } = window.flexprefill;

const LABELS = { left: 30, top: 18 }; // CSS pixels
const CELL = { least: 3, most: 26 };

class HeatMap {
  constructor(canvas) {
    this.canvas = canvas;
  }

  // colourOf(place): a head's colour. isMarked(place): whether it differs from the other file's.
  draw(file, { chosen, other, colourOf, isMarked }, colours) {
    this.file = file;
    const columns = Math.max(...file.layers.map((layer) => layer.columns));
    const room = this.canvas.parentElement.clientWidth - LABELS.left - 2;
    this.cell = Math.min(CELL.most, Math.max(CELL.least, Math.floor(room / columns)));
    const width = LABELS.left + columns * this.cell + 2;
    const height = LABELS.top + file.layers.length * this.cell + 2;
    const ratio = window.devicePixelRatio;
    Object.assign(this.canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });

    const context = this.canvas.getContext("2d", { willReadFrequently: true });
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const inset = this.cell > 9 ? 1 : 0;
    file.layers.forEach((layer, row) => {
      for (let column = 0; column < layer.columns; column++) {
        const place = { layer: layer.number, column };
        const [x, y] = this.#corner(row, column);
        context.fillStyle = css(colourOf(place));
        context.fillRect(x, y, this.cell - inset, this.cell - inset);
        if (!isMarked(place)) continue;
        const size = Math.max(2, Math.round(this.cell / 4));
        context.fillStyle = css(colours.cursor);
        context.fillRect(x + this.cell - inset - size, y, size, size);
      }
    });
    context.fillStyle = css(colours.muted);
    context.font = "10px ui-sans-serif, system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = 2 ** Math.max(0, Math.ceil(Math.log2(13 / this.cell)));
    file.layers.forEach((layer, row) => {
      if (row % every === 0) context.fillText(layer.number, LABELS.left - 6, this.#corner(row, 0)[1] + this.cell / 2);
    });
    context.textAlign = "center";
    for (let column = 0; column < columns; column += 2 ** Math.max(0, Math.ceil(Math.log2(22 / this.cell)))) {
      context.fillText(column, this.#corner(0, column)[0] + this.cell / 2, LABELS.top - 9);
    }
    if (other) this.#outline(context, other, colours.onlyB);
    this.#outline(context, chosen, colours.ink);
  }

  #corner(row, column) {
    return [LABELS.left + column * this.cell, LABELS.top + row * this.cell];
  }

  #outline(context, { layer, column }, colour) {
    const row = this.file.layers.findIndex(({ number }) => number === layer);
    if (row < 0) return;
    const [x, y] = this.#corner(row, column);
    context.strokeStyle = css(colour);
    context.lineWidth = 2;
    context.strokeRect(x - 0.5, y - 0.5, this.cell, this.cell);
  }

  // The head at a place of the window, { layer, column }, or null.
  headAt(clientX, clientY) {
    const box = this.canvas.getBoundingClientRect();
    const layer = this.file.layers[Math.floor((clientY - box.top - LABELS.top) / this.cell)];
    const column = Math.floor((clientX - box.left - LABELS.left) / this.cell);
    return layer && column >= 0 && column < layer.columns ? { layer: layer.number, column } : null;
  }

  // The middle of a head's cell in pixels of the canvas.
  middleOf({ layer, column }) {
    const row = this.file.layers.findIndex(({ number }) => number === layer);
    const [x, y] = this.#corner(row, column).map((edge) => (edge + this.cell / 2 - 1) * window.devicePixelRatio);
    return { x, y };
  }
}

// "12.3 %", or "dense"
function keptText(file, place) {
  const density = densityOf(file, place);
  return density === 1 ? DENSE : `${(100 * density).toFixed(1)} %`;
}

// "layer 3, head 5: 12.3 % kept", and the recall that the file says
function headText(file, place) {
  const kept = keptText(file, place);
  const name = headName(file.layer(place.layer), place.column);
  const recall = recallOf(file, place);
  const measured = recall ? `, recall ${recall.mean.toFixed(3)}, least ${recall.least.toFixed(3)}` : "";
  return `layer ${place.layer}, ${name}: ${kept === DENSE ? kept : `${kept} kept`}${measured}`;
}

Object.assign(window.flexprefill, { HeatMap, headText, keptText });
