// The pattern that each kept block belongs to: the rule of flexprefill.inspection.block_patterns, whose names and numbers
// the page brings along. The page needs the rule itself for files that Python has not seen.

const {
  patterns: PATTERNS, line_share: LINE_SHARE, min_line_blocks: MIN_LINE_BLOCKS, unknown: NO_CONFIG,
  recall_entry: RECALL_ENTRY,
} = JSON.parse(document.getElementById("rule").textContent);
const DENSE = "dense"; // what a head that keeps everything is called; its blocks' patterns say nothing

// classOf(row, column): the pattern of a kept block; counts: blocks by pattern; kept: blocks; dense: whether all are kept;
// main: "dense", or the pattern of most of its blocks, or "" where it keeps none.
function classify(map, config) {
  const { geometry } = map;
  const { rows, columns } = geometry;
  const { sink_blocks: sinks, window_blocks: window, last_full_blocks: lasts } = config ?? NO_CONFIG;

  const keptOfRow = new Int32Array(rows);
  map.forEach((row) => (keptOfRow[row] += 1));
  const isLast = (row) => row >= rows - lasts && keptOfRow[row] === geometry.visible(row);
  // free blocks are neither sink nor window nor in a last row: columns sinks … freeEnd - 1 of a row
  const freeEnd = Int32Array.from({ length: rows }, (_, row) =>
    isLast(row) ? sinks : Math.max(sinks, geometry.visible(row) - window),
  );
  const diagonalOf = (row, column) => rows - 1 - row + column;

  const freeRanges = (firstLine) => Array.from(freeEnd, (end, row) => [firstLine(row), end - sinks]);
  const ofColumn = { kept: new Int32Array(columns), free: covered(freeRanges(() => sinks), columns) };
  const ofDiagonal = {
    kept: new Int32Array(rows + columns),
    free: covered(freeRanges((row) => diagonalOf(row, sinks)), rows + columns),
  };
  map.forEach((row, column) => {
    if (column < sinks || column >= freeEnd[row]) return;
    ofColumn.kept[column] += 1;
    ofDiagonal.kept[diagonalOf(row, column)] += 1;
  });
  const lineShare = ({ kept, free }, line) => {
    const share = kept[line] / free[line];
    return free[line] >= MIN_LINE_BLOCKS && share >= LINE_SHARE ? share : 0;
  };

  const classOf = (row, column) => {
    if (column < sinks) return "sink";
    if (column >= geometry.visible(row) - window) return "window";
    if (isLast(row)) return "last";
    const vertical = lineShare(ofColumn, column);
    const slash = lineShare(ofDiagonal, diagonalOf(row, column));
    if (!vertical && !slash) return "scattered";
    return vertical >= slash ? "vertical" : "slash";
  };

  const counts = Object.fromEntries(PATTERNS.map((pattern) => [pattern, 0]));
  map.forEach((row, column) => (counts[classOf(row, column)] += 1));
  const kept = map.count();
  const dense = kept === geometry.bits;
  const largest = PATTERNS.reduce((best, pattern) => (counts[pattern] > counts[best] ? pattern : best));
  return { classOf, counts, kept, dense, main: dense ? DENSE : kept ? largest : "" };
}

// On how many of the ranges [start, start + length) each of `lines` lines lies.
function covered(ranges, lines) {
  const steps = new Int32Array(lines + 1);
  for (const [start, length] of ranges) {
    if (length === 0) continue;
    steps[start] += 1;
    steps[start + length] -= 1;
  }
  let depth = 0;
  return steps.map((step) => (depth += step));
}

Object.assign(window.flexprefill, { DENSE, PATTERNS, RECALL_ENTRY, classify });
