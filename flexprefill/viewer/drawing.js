// Pixels of a map. Colours are [red, green, blue], 0 … 255.

const GAP_SCALE = 9; // pixels a block; from here on blocks are drawn as separate squares

// Paints the part of a map that starts at block (left, top) into an ImageData, `scale` pixels a block.
//
// causal: the BlockMap of all visible blocks. inks: [{ map, colour }] of disjoint maps. colours: { paper, dropped }.
// From one pixel a block up, a pixel shows the block at its centre. Below, it shows the share of the visible blocks
// under it that each ink keeps, each block weighed by the part of it that lies under the pixel.
function paint(image, { left, top, scale }, causal, inks, colours) {
  if (scale >= 1) paintBlocks(image, left, top, scale, causal, inks, colours);
  else paintShares(image, left, top, scale, causal, inks, colours);
}

function paintBlocks(image, left, top, scale, causal, inks, colours) {
  const { width, height } = image;
  const pixels = new Uint32Array(image.data.buffer);
  const { geometry } = causal;
  const blocks = (length, start, limit) =>
    Int32Array.from({ length: length + 1 }, (_, pixel) => {
      const block = Math.floor(start + (pixel + 0.5) / scale);
      return block < limit ? block : -1;
    });
  const columns = blocks(width, left, geometry.columns);
  const rows = blocks(height, top, geometry.rows);
  const gaps = scale >= GAP_SCALE;
  const paper = packed(colours.paper);
  const dropped = packed(colours.dropped);
  const packedInks = inks.map(({ map, colour }) => ({ map, value: packed(colour) }));

  for (let y = 0; y < height; y++) {
    const row = rows[y];
    const start = y * width;
    if (row < 0 || (gaps && rows[y + 1] !== row)) {
      pixels.fill(paper, start, start + width);
      continue;
    }
    if (y > 0 && rows[y - 1] === row) {
      pixels.copyWithin(start, start - width, start);
      continue;
    }
    const visible = geometry.visible(row);
    for (let x = 0; x < width; x++) {
      const column = columns[x];
      let value = paper;
      if (column >= 0 && column < visible && !(gaps && columns[x + 1] !== column)) {
        value = dropped;
        for (const ink of packedInks) if (ink.map.has(row, column)) value = ink.value;
      }
      pixels[start + x] = value;
    }
  }
}

function paintShares(image, left, top, scale, causal, inks, colours) {
  const { width, height } = image;
  const { geometry } = causal;
  const pixels = new Uint32Array(image.data.buffer);
  const level = Math.floor(Math.log2(1 / scale)); // squares of at most a pixel and more than half of one
  const side = 2 ** level;
  const maps = [causal, ...inks.map(({ map }) => map)].map((map) => map.level(level));
  const [{ rows, columns }] = maps;
  const across = overlaps(width, left / side, scale * side, columns);
  const down = overlaps(height, top / side, scale * side, rows);
  const sums = maps.map(() => new Float64Array(columns));
  const shares = maps.map(() => new Float64Array(width));
  const paper = packed(colours.paper);
  const steps = inks.map(({ colour }) => colour.map((channel, at) => channel - colours.dropped[at]));

  for (let y = 0; y < height; y++) {
    const start = y * width;
    pixels.fill(paper, start, start + width);
    if (down.first[y] === down.last[y]) continue;
    // nothing is visible beyond what the lowest block row under the pixel sees
    const seen = Math.ceil(geometry.visible(Math.min(down.last[y] * side, geometry.rows) - 1) / side);
    const end = Math.max(0, Math.min(width, Math.ceil((seen - left / side) * scale * side)));
    maps.forEach(({ counts }, which) => {
      sumDown(counts, columns, down, y, across.first[0], seen, sums[which]);
      sumAcross(sums[which], across, end, shares[which]);
    });
    const [visible, ...kept] = shares;
    for (let x = 0; x < end; x++) {
      if (visible[x] === 0) continue;
      let [red, green, blue] = colours.dropped;
      for (let ink = 0; ink < kept.length; ink++) {
        const share = kept[ink][x] / visible[x];
        const [redStep, greenStep, blueStep] = steps[ink];
        red += share * redStep;
        green += share * greenStep;
        blue += share * blueStep;
      }
      pixels[start + x] = (255 << 24) | ((blue + 0.5) << 16) | ((green + 0.5) << 8) | (red + 0.5);
    }
  }
}

// The counts of each square under pixel row y, weighed and added up, for squares from … end - 1.
function sumDown(counts, columns, down, y, from, end, sums) {
  sums.fill(0, from, end);
  for (let row = down.first[y]; row < down.last[y]; row++) {
    const weight = down.weights[3 * y + row - down.first[y]];
    const start = row * columns;
    for (let column = from; column < end; column++) sums[column] += weight * counts[start + column];
  }
}

// The same along a row: one sum for each pixel 0 … end - 1.
function sumAcross(sums, { first, last, weights }, end, totals) {
  for (let x = 0; x < end; x++) {
    let total = 0;
    for (let column = first[x], at = 3 * x; column < last[x]; column++, at++) total += weights[at] * sums[column];
    totals[x] = total;
  }
}

// Which squares lie under each pixel, first to last (exclusive), and the part of each that does. A pixel, which is less
// than two squares long, touches at most three.
function overlaps(length, start, scale, limit) {
  const first = new Int32Array(length);
  const last = new Int32Array(length);
  const weights = new Float64Array(3 * length);
  const edge = (pixel) => start + pixel / scale;
  for (let pixel = 0; pixel < length; pixel++) {
    first[pixel] = Math.min(Math.floor(edge(pixel)), limit);
    last[pixel] = Math.min(Math.ceil(edge(pixel + 1)), limit);
    for (let square = first[pixel]; square < last[pixel]; square++) {
      const part = Math.min(edge(pixel + 1), square + 1) - Math.max(edge(pixel), square);
      weights[3 * pixel + square - first[pixel]] = part;
    }
  }
  return { first, last, weights };
}

// One pixel as ImageData's bytes hold it on a little-endian machine, which every browser runs on.
const packed = ([red, green, blue]) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;

const mixed = (from, to, share) => from.map((channel, at) => channel + share * (to[at] - channel));

const css = (colour) => `rgb(${colour.map(Math.round).join(" ")})`;

// The colour of a share, 0 … 1, on a ramp of evenly spaced colours.
function rampColour(ramp, share) {
  const place = Math.min(Math.max(share, 0), 1) * (ramp.length - 1);
  const below = Math.min(Math.floor(place), ramp.length - 2);
  return mixed(ramp[below], ramp[below + 1], place - below);
}

Object.assign(window.flexprefill, { css, mixed, paint, rampColour });
