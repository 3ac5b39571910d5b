// One map on the page: its pixels on one canvas; axes, totals, the pointed-at block and an overview on another above it.

const { BAR, MARGIN, bars, css, grouped, mapEnd, paint, ticks } = window.flexprefill;

const OVERVIEW = 96; // CSS pixels, its longer side
const MOST_BANDS = 16; // blocks found; bands of more would hide the map
const LEAST_HEIGHT = 24; // CSS pixels, of a map of few query blocks

class Pane {
  constructor(element) {
    this.element = element;
    this.plane = element.querySelector(".plane");
    this.canvas = element.querySelector("canvas.map");
    this.frame = element.querySelector("canvas.frame");
    this.picture = null; // { causal, inks, totals: [{ rows, columns, most, colour, isLine }] }
    const { left, top, right, bottom } = MARGIN;
    Object.assign(this.canvas.style, { left: `${left}px`, top: `${top}px`, width: `calc(100% - ${left + right}px)` });
    this.canvas.style.height = `calc(100% - ${top + bottom}px)`;
  }

  // As wide as the page has room, as high as the map then is, and at most `room` CSS pixels. Canvases have pixels of the
  // device, so that a block's edge is sharp.
  resize(room) {
    const { rows, columns } = this.picture.causal.geometry;
    const width = this.plane.clientWidth - MARGIN.left - MARGIN.right;
    const height = Math.max(LEAST_HEIGHT, Math.min((width * rows) / columns, room - MARGIN.top - MARGIN.bottom));
    this.plane.style.height = `${Math.ceil(height) + MARGIN.top + MARGIN.bottom}px`;
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

  // The view in CSS pixels, for what is drawn in them.
  planeOf(view) {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    return { scale: view.scale / this.ratio, left: view.left, top: view.top, width, height };
  }

  draw(view, cursor, found, colours) {
    const context = this.canvas.getContext("2d", { willReadFrequently: true });
    const { width, height } = this.canvas;
    if (!this.image || this.image.width !== width || this.image.height !== height) {
      this.image = context.createImageData(width, height);
    }
    paint(this.image, view, this.picture.causal, this.picture.inks, colours);
    context.putImageData(this.image, 0, 0);
    this.drawFrame(view, cursor, found, colours);
  }

  // found: { keys, queries }, the blocks whose text is searched for.
  drawFrame(view, cursor, found, colours) {
    const context = this.frame.getContext("2d");
    const { geometry } = this.picture.causal;
    const plane = this.planeOf(view);
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.clearRect(0, 0, this.frame.clientWidth, this.frame.clientHeight);
    context.save();
    context.translate(MARGIN.left, MARGIN.top);
    drawAxes(context, plane, geometry, colours);
    for (const totals of this.picture.totals) drawTotals(context, plane, geometry, totals, colours);
    drawFound(context, plane, geometry, found, colours);
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
    return geometry.sees(row, column) ? { row, column } : null;
  }

  // The middle of a block in pixels of the canvas.
  middleOf(view, { row, column }) {
    return { x: (column + 0.5 - view.left) * view.scale, y: (row + 0.5 - view.top) * view.scale };
  }
}

function drawAxes(context, plane, geometry, colours) {
  const { right, bottom } = mapEnd(plane, geometry);
  const { keys, queries } = ticks(plane, geometry);
  context.fillStyle = css(colours.muted);
  context.strokeStyle = css(colours.line);
  context.lineWidth = 1;
  context.font = "11px ui-sans-serif, system-ui, sans-serif";
  context.beginPath();
  context.moveTo(-0.5, bottom);
  context.lineTo(-0.5, -0.5);
  context.lineTo(right, -0.5);
  context.textAlign = "center";
  context.textBaseline = "alphabetic";
  for (const { at, text } of keys) {
    context.moveTo(Math.round(at) - 0.5, -5);
    context.lineTo(Math.round(at) - 0.5, 0);
    const half = context.measureText(text).width / 2;
    context.fillText(text, Math.min(Math.max(at, 4), plane.width + MARGIN.right - half), -9);
  }
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const { at, text } of queries) {
    context.moveTo(-5, Math.round(at) - 0.5);
    context.lineTo(0, Math.round(at) - 0.5);
    context.fillText(text, -9, Math.min(Math.max(at, 6), plane.height + MARGIN.bottom - 6));
  }
  context.stroke();
  context.textAlign = "left";
  context.fillText("key tokens →", 2, 8 - MARGIN.top);
  turned(context, "← query tokens", 9 - MARGIN.left, 2, "right");
}

// How many blocks each query block keeps, to the right of the map, and how many keep each key block, below it: bars, or
// the line of their ends.
function drawTotals(context, plane, geometry, { rows, columns, most, colour, isLine }, colours) {
  const { right, bottom } = mapEnd(plane, geometry);
  context.fillStyle = css(colour);
  context.globalAlpha = isLine ? 1 : BAR.opacity;
  const start = (length) => BAR.gap + (isLine ? Math.max(0, length - BAR.line) : 0);
  bars(rows, most.rows, plane.top, plane.scale, bottom).forEach((length, y) => {
    context.fillRect(right + start(length), y, BAR.gap + length - start(length), 1);
  });
  bars(columns, most.columns, plane.left, plane.scale, right).forEach((length, x) => {
    context.fillRect(x, bottom + start(length), 1, BAR.gap + length - start(length));
  });
  context.globalAlpha = 1;
  context.fillStyle = css(colours.muted);
  context.font = "10px ui-sans-serif, system-ui, sans-serif";
  context.textBaseline = "middle";
  context.textAlign = "left";
  const beyond = BAR.gap + BAR.length + 7;
  if (right > 150) context.fillText(`kept in each column, at most ${grouped(most.columns)}`, 2, bottom + beyond);
  if (bottom > 150) turned(context, `kept in each row, at most ${grouped(most.rows)}`, right + beyond, 2, "right");
}

function turned(context, text, x, y, align) {
  context.save();
  context.translate(x, y);
  context.rotate(-Math.PI / 2);
  context.textAlign = align;
  context.fillText(text, 0, 0);
  context.restore();
}

// A mark on the axis at each block whose text is searched for; a band through the map where they are few.
function drawFound(context, plane, geometry, { keys, queries }, colours) {
  const { right, bottom } = mapEnd(plane, geometry);
  const [red, green, blue] = colours.found;
  const length = Math.max(plane.scale, 2);
  const place = (block, start, end) => {
    const at = (block - start) * plane.scale;
    return at + plane.scale > 0 && at < end ? Math.max(at, 0) : null;
  };
  const draw = (horizontal, at, start, end) => {
    const bar = (from, to, colour) => {
      context.fillStyle = colour;
      context.fillRect(...(horizontal ? [from, at, to - from, length] : [at, from, length, to - from]));
    };
    if (keys.length <= MOST_BANDS && end > start) bar(start, end, `rgb(${red} ${green} ${blue} / 0.25)`);
    bar(-7, -1, css(colours.found));
  };
  for (const block of keys) {
    const at = place(block, plane.left, right);
    const first = (geometry.rows - geometry.seenBy(block) - plane.top) * plane.scale;
    if (at !== null) draw(false, at, Math.max(0, first), bottom);
  }
  for (const block of queries) {
    const at = place(block, plane.top, bottom);
    if (at !== null) draw(true, at, 0, Math.min(right, (geometry.visible(block) - plane.left) * plane.scale));
  }
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

Object.assign(window.flexprefill, { Pane });
