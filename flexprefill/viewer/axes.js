// Where ticks, totals and marks of a map stand; the page's canvas and saved pictures draw the same ones.

const { grouped } = window.flexprefill;

const MARGIN = { left: 58, top: 34, right: 46, bottom: 46 }; // CSS pixels: axes, and totals on the other two sides
const TICK_SPACING = 72; // CSS pixels, at least
const BAR = { gap: 6, length: 26, line: 2, opacity: 0.6 }; // CSS pixels, of the totals

// A number of tokens, whole multiples of 1,024 as K and of 1,048,576 as M, as the command line's pictures have them.
function tokenLabel(tokens) {
  if (tokens && tokens % 2 ** 20 === 0) return `${grouped(tokens / 2 ** 20)}M`;
  return tokens && tokens % 1024 === 0 ? `${grouped(tokens / 1024)}K` : grouped(tokens);
}

// The part of a map that a plane { left, top, scale, width, height } shows, in pixels: where it ends.
function mapEnd({ left, top, scale, width, height }, { rows, columns }) {
  return { right: Math.min(width, (columns - left) * scale), bottom: Math.min(height, (rows - top) * scale) };
}

// The ticks of both axes, [{ at, text }] with `at` in pixels from the map's corner.
function ticks(plane, geometry) {
  const { blockSize, offset, queryLength, keyLength } = geometry;
  const { right, bottom } = mapEnd(plane, geometry);
  const step = blockSize * 2 ** Math.max(0, Math.ceil(Math.log2(TICK_SPACING / plane.scale)));
  const along = (start, length, end, shift) => {
    const found = [];
    for (let token = Math.ceil((start * blockSize) / step) * step; token <= length; token += step) {
      const at = (token / blockSize - start) * plane.scale;
      if (at > end + 1) break;
      found.push({ at, text: tokenLabel(shift + token) });
    }
    return found;
  };
  return {
    keys: along(plane.left, keyLength, right, 0),
    queries: along(plane.top, queryLength, bottom, offset),
  };
}

// Lengths of bars, one a pixel, for totals by block: by the mean of the blocks under each pixel; `most` is a whole bar.
function bars(totals, most, start, scale, end) {
  return Float64Array.from({ length: Math.max(0, Math.ceil(end)) }, (_, pixel) => {
    const first = Math.min(Math.floor(start + pixel / scale), totals.length - 1);
    const last = Math.min(Math.max(first + 1, Math.ceil(start + (pixel + 1) / scale)), totals.length);
    let sum = 0;
    for (let block = first; block < last; block++) sum += totals[block];
    return (BAR.length * sum) / (last - first) / most;
  });
}

Object.assign(window.flexprefill, { BAR, MARGIN, bars, mapEnd, ticks });
