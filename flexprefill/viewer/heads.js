// Heads read from files: those shown, and what is known of all.

const { BlockMap, RECALL_ENTRY, classify, popcount } = window.flexprefill;

const KEPT_HEADS = 8; // maps held after they were shown
const TURN = 30; // milliseconds of work until the page gets a turn

const heldHeads = new Map();

// A head that is shown: { file, layer, column, map, causal, patterns, totals }.
async function loadHead(file, { layer, column }) {
  const held = heldHeads.get(file)?.get(`${layer}:${column}`);
  if (held) return held;
  const map = await readMap(file, { layer, column });
  const patterns = classify(map, file.config);
  const head = { file, layer, column, map, causal: BlockMap.causal(map.geometry), patterns, totals: map.totals() };
  if (!heldHeads.has(file)) heldHeads.set(file, new Map());
  const heads = heldHeads.get(file);
  heads.set(`${layer}:${column}`, head);
  if (heads.size > KEPT_HEADS) heads.delete(heads.keys().next().value);
  return head;
}

async function readMap(file, { layer, column }) {
  return BlockMap.fromTriangle(file.layer(layer).geometry, await file.readHead(layer, column));
}

function forgetFile(file) {
  heldHeads.delete(file);
}

// Every head of a file in its order: { layer, column, key }.
function placesOf(file) {
  return file.layers.flatMap(({ number, columns }) =>
    Array.from({ length: columns }, (_, column) => ({ layer: number, column, key: `${number}:${column}` })),
  );
}

const densityOf = (file, { layer, column }) => file.density[file.layer(layer).first + column];

// The share of the exact attention mass that a head's blocks hold, { mean, least } over its rows, if the file says so.
function recallOf(file, { layer, column }) {
  file.recall ??= parsedRecall(file.user[RECALL_ENTRY]);
  const { heads } = file.layer(layer);
  const share = (name) => file.recall[layer]?.[name]?.[Math.floor(column / heads)]?.[column % heads];
  const [mean, least] = [share("mean"), share("least")];
  return [mean, least].every((value) => value >= 0 && value <= 1 && typeof value === "number") ? { mean, least } : null;
}

function parsedRecall(text) {
  try {
    return JSON.parse(text) ?? {};
  } catch {
    return {}; // none, or somebody else's entry
  }
}

// The patterns of every head of a file, { counts, kept, dense, main } by key. tell(done, all) hears how far it is.
async function patternsOf(file, tell) {
  file.patterns ??= new Map();
  const missing = placesOf(file).filter(({ key }) => !file.patterns.has(key));
  await inTurns(missing, tell, async (place) => {
    const { counts, kept, dense, main } = classify(await readMap(file, place), file.config);
    file.patterns.set(place.key, { counts, kept, dense, main });
  });
  return file.patterns;
}

// How two files differ: { heads, apart }, blocks { onlyA, onlyB } by key, and how many heads of A have no counterpart of
// their size in B. Heads whose checksums agree are equal, and are not read.
async function differencesOf(a, b, tell) {
  const heads = new Map();
  const unequal = [];
  for (const { layer, column, key } of placesOf(a)) {
    const [ours, theirs] = [a.layer(layer), b.layer(layer)];
    if (!theirs || column >= theirs.columns || !ours.geometry.equals(theirs.geometry)) continue;
    heads.set(key, { onlyA: 0, onlyB: 0 });
    if (a.checksums[ours.first + column] !== b.checksums[theirs.first + column]) unequal.push({ layer, column, key });
  }
  await inTurns(unequal, tell, async ({ layer, column, key }) => {
    const streams = await Promise.all([a, b].map((file) => file.readHead(layer, column)));
    heads.set(key, countApart(...streams.map(wordsOf)));
  });
  return { heads, apart: placesOf(a).length - heads.size };
}

// Bits that only one of two streams of bytes has.
function countApart(a, b) {
  let [onlyA, onlyB] = [0, 0];
  for (let at = 0; at < a.length; at++) {
    onlyA += popcount(a[at] & ~b[at]);
    onlyB += popcount(b[at] & ~a[at]);
  }
  return { onlyA, onlyB };
}

// A stream's bytes as words of 32 bits, zeros at the end.
function wordsOf(bytes) {
  const padded = new Uint8Array(4 * Math.ceil(bytes.length / 4));
  padded.set(bytes);
  return new Uint32Array(padded.buffer);
}

// Works through items one by one, and lets the page draw and hear keys in between.
async function inTurns(items, tell, work) {
  let begun = performance.now();
  for (const [done, item] of items.entries()) {
    await work(item);
    if (performance.now() - begun < TURN) continue;
    tell(done + 1, items.length);
    await new Promise((resolve) => setTimeout(resolve));
    begun = performance.now();
  }
}

Object.assign(window.flexprefill, { densityOf, differencesOf, forgetFile, loadHead, patternsOf, placesOf, readMap, recallOf });
