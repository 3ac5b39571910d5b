// One map on the page: its pixels on one canvas; axes, the pointed-at block and a small overview on another above it.

const { css, grouped, paint } = window.flexprefill;

const MARGIN = { left: 68, top: 34 }; // CSS pixels, for the axes
const TICK_SPACING = 84; // CSS pixels, at least
const OVERVIEW = 96; // CSS pixels, its longer side

class Pane {
  constructor(element) {
    this.element = element;
    this.canvas = element.querySelector("canvas.map");
    this.frame = element.querySelector("canvas.frame");
    this.picture = null; // { causal, inks }
  }

  // Takes the size that the page gives it; pixels of the device, so that a block's edge is sharp.
  resize() {
    this.ratio = window.devicePixelRatio;
    for (const canvas of [this.canvas, this.frame]) {
      const width = Math.max(1, Math.round(canvas.clientWidth * this.ratio));
      const height = Math.max(1, Math.round(canvas.clientHeight * this.ratio));
      if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    }
  }

  // Pixels a block at which the whole map is seen.
  fitScale({ rows, columns }) {
    return Math.min(this.canvas.width / columns, this.canvas.height / rows);
  }

  draw(view, cursor, colours) {
    const context = this.canvas.getContext("2d", { willReadFrequently: true });
    const { width, height } = this.canvas;
    if (!this.image || this.image.width !== width || this.image.height !== height) {
      this.image = context.createImageData(width, height);
    }
    paint(this.image, view, this.picture.causal, this.picture.inks, colours);
    context.putImageData(this.image, 0, 0);
    this.drawFrame(view, cursor, colours);
  }

  drawFrame(view, cursor, colours) {
    const context = this.frame.getContext("2d");
    const { geometry } = this.picture.causal;
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.clearRect(0, 0, this.frame.clientWidth, this.frame.clientHeight);
    const plane = {
      scale: view.scale / this.ratio,
      left: view.left,
      top: view.top,
      width: this.canvas.clientWidth,
      height: this.canvas.clientHeight,
    };
    drawAxes(context, plane, geometry, colours);
    context.save();
    context.translate(MARGIN.left, MARGIN.top);
    context.beginPath();
    context.rect(0, 0, plane.width, plane.height);
    context.clip();
    drawEdge(context, plane, geometry, colours);
    if (cursor) drawCursor(context, plane, geometry, cursor, colours);
    if (view.scale > 1.4 * this.fitScale(geometry)) drawOverview(context, plane, geometry, colours);
    context.restore();
  }

  // The block at a place of the window, or null beside the visible ones.
  blockAt(view, clientX, clientY) {
    const box = this.canvas.getBoundingClientRect();
    const { geometry } = this.picture.causal;
    const column = Math.floor(view.left + ((clientX - box.left) * this.ratio) / view.scale);
    const row = Math.floor(view.top + ((clientY - box.top) * this.ratio) / view.scale);
    const inside = row >= 0 && row < geometry.rows && column >= 0 && column < geometry.visible(row);
    return inside ? { row, column } : null;
  }

  // The middle of a block in pixels of the canvas.
  middleOf(view, { row, column }) {
    return { x: (column + 0.5 - view.left) * view.scale, y: (row + 0.5 - view.top) * view.scale };
  }
}

function drawAxes(context, plane, geometry, colours) {
  const { blockSize, offset, queryLength, keyLength } = geometry;
  const right = MARGIN.left + Math.min(plane.width, (geometry.columns - plane.left) * plane.scale);
  const bottom = MARGIN.top + Math.min(plane.height, (geometry.rows - plane.top) * plane.scale);
  context.fillStyle = css(colours.muted);
  context.strokeStyle = css(colours.line);
  context.lineWidth = 1;
  context.font = "11px ui-sans-serif, system-ui, sans-serif";
  context.beginPath();
  context.moveTo(MARGIN.left - 0.5, bottom);
  context.lineTo(MARGIN.left - 0.5, MARGIN.top - 0.5);
  context.lineTo(right, MARGIN.top - 0.5);

  const pixelsPerToken = plane.scale / blockSize;
  const step = blockSize * 2 ** Math.max(0, Math.ceil(Math.log2(TICK_SPACING / plane.scale)));
  context.textAlign = "center";
  context.textBaseline = "alphabetic";
  for (let key = Math.ceil((plane.left * blockSize) / step) * step; key <= keyLength; key += step) {
    const x = MARGIN.left + key * pixelsPerToken - plane.left * plane.scale;
    if (x > right + 1) break;
    context.moveTo(Math.round(x) - 0.5, MARGIN.top - 5);
    context.lineTo(Math.round(x) - 0.5, MARGIN.top);
    const text = grouped(key);
    const half = context.measureText(text).width / 2;
    const furthest = MARGIN.left + plane.width - half;
    context.fillText(text, Math.min(Math.max(x, MARGIN.left + 4), furthest), MARGIN.top - 9);
  }
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (let query = Math.ceil((plane.top * blockSize) / step) * step; query <= queryLength; query += step) {
    const y = MARGIN.top + query * pixelsPerToken - plane.top * plane.scale;
    if (y > bottom + 1) break;
    context.moveTo(MARGIN.left - 5, Math.round(y) - 0.5);
    context.lineTo(MARGIN.left, Math.round(y) - 0.5);
    const furthest = MARGIN.top + plane.height - 6;
    context.fillText(grouped(offset + query), MARGIN.left - 9, Math.min(Math.max(y, MARGIN.top + 6), furthest));
  }
  context.stroke();
  context.textAlign = "left";
  context.fillText("key tokens →", MARGIN.left + 2, 8);
  context.save();
  context.translate(9, MARGIN.top + 2);
  context.rotate(-Math.PI / 2);
  context.textAlign = "right";
  context.fillText("← query tokens", 0, 0);
  context.restore();
}

// The line between the visible blocks and the causal future, as steps where a step can be seen.
function drawEdge(context, { left, top, scale, height }, geometry, colours) {
  const first = Math.max(0, Math.floor(top));
  const end = Math.min(geometry.rows, Math.ceil(top + height / scale));
  const stride = Math.max(1, Math.floor(1 / scale));
  context.beginPath();
  for (let row = first; row < end; row += stride) {
    const x = (geometry.visible(row) - left) * scale;
    context.lineTo(x, (row - top) * scale);
    context.lineTo(x, (Math.min(row + stride, geometry.rows) - top) * scale);
  }
  context.strokeStyle = css(colours.line);
  context.lineWidth = 1;
  context.stroke();
}

function drawCursor(context, { left, top, scale, width, height }, geometry, { row, column }, colours) {
  const side = Math.max(scale, 5);
  const x = (column + 0.5 - left) * scale;
  const y = (row + 0.5 - top) * scale;
  const [red, green, blue] = colours.cursor;
  context.fillStyle = `rgb(${red} ${green} ${blue} / 0.1)`;
  context.fillRect(0, y - scale / 2, Math.min(width, (geometry.visible(row) - left) * scale), Math.max(scale, 1));
  context.fillRect(x - scale / 2, 0, Math.max(scale, 1), Math.min(height, (geometry.rows - top) * scale));
  context.strokeStyle = css(colours.cursor);
  context.lineWidth = 2;
  context.strokeRect(x - side / 2, y - side / 2, side, side);
}

// Which part of the map is in view.
function drawOverview(context, plane, geometry, colours) {
  const scale = OVERVIEW / Math.max(geometry.rows, geometry.columns);
  const { rows, columns } = geometry;
  context.save();
  context.translate(plane.width - columns * scale - 12, 12);
  context.fillStyle = css(colours.paper);
  context.strokeStyle = css(colours.line);
  context.lineWidth = 1;
  context.beginPath();
  context.roundRect(-6, -6, columns * scale + 12, rows * scale + 12, 6);
  context.fill();
  context.stroke();
  context.fillStyle = css(colours.dropped);
  context.beginPath();
  context.moveTo(0, 0);
  context.lineTo(geometry.visible(0) * scale, 0);
  context.lineTo(columns * scale, rows * scale);
  context.lineTo(0, rows * scale);
  context.fill();
  context.strokeStyle = css(colours.cursor);
  context.lineWidth = 1.5;
  const width = Math.min(plane.width / plane.scale, columns - plane.left) * scale;
  const height = Math.min(plane.height / plane.scale, rows - plane.top) * scale;
  context.strokeRect(plane.left * scale, plane.top * scale, Math.max(width, 3), Math.max(height, 3));
  context.restore();
}

Object.assign(window.flexprefill, { MARGIN, Pane });
