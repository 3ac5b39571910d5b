// The prompt's text, where the file has it: that of the block pointed at, and the search in it.

const { comparable, drawnPanes, element, fileOf, grouped, shown, state } = window.flexprefill;

// The text of the heads that are shown; B's where A has none and both are of one length.
function promptText() {
  if (!state.heads.length) return null;
  const slots = shown().filter((slot) => slot === 0 || comparable());
  return slots.map((slot) => fileOf(slot).tokens).find(Boolean) ?? null;
}

// Shows the text of a block's queries and keys; nothing where none is pointed at.
function showText(block) {
  const tokens = promptText();
  element("texts").hidden = element("search-tools").hidden = !tokens;
  const isBeside = Boolean(tokens) && drawnPanes().length === 1; // there is room beside one map
  element("stage").classList.toggle("beside", isBeside);
  if (!tokens) return;
  const { blockSize, offset, keyLength } = state.heads[0].map.geometry;
  const textOf = (first) => tokens.slice(first, Math.min(first + blockSize, keyLength)).join("");
  element("query-text").textContent = block ? textOf(offset + block.row * blockSize) : "";
  element("key-text").textContent = block ? textOf(block.column * blockSize) : "";
}

// Finds a text in the prompt, in capitals or not: the blocks that hold it, and the first token of each match.
function find(words) {
  const tokens = promptText();
  state.found = { keys: [], queries: [], tokens: [] };
  if (!tokens || !words) return;
  const lower = tokens.map((token) => token.toLowerCase());
  const text = lower.join("");
  const wanted = words.toLowerCase();
  const keys = new Set();
  const queries = new Set();
  const { blockSize, offset, rows } = state.heads[0].map.geometry;
  let token = 0;
  let start = 0; // of the token in the text
  for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + 1)) {
    while (start + lower[token].length <= at) start += lower[token++].length;
    state.found.tokens.push(token);
    for (let each = token, end = start; end < at + wanted.length; end += lower[each++].length) {
      keys.add(Math.floor(each / blockSize));
      if (each >= offset) queries.add(Math.floor((each - offset) / blockSize));
    }
  }
  state.found.keys = [...keys];
  state.found.queries = [...queries].filter((row) => row < rows);
}

function foundText(at) {
  const { tokens, keys } = state.found;
  if (!tokens.length) return element("search").value ? "not found" : "";
  const blocks = keys.length === 1 ? "1 block" : `${grouped(keys.length)} blocks`;
  return `${at === null ? "" : `${grouped(at + 1)} of `}${grouped(tokens.length)} in ${blocks}`;
}

// The block where the text of a token meets itself: its keys, and its queries if they are in the map.
function blockOfToken(token) {
  const { blockSize, offset, rows } = state.heads[0].map.geometry;
  const row = Math.min(Math.max(0, Math.floor((token - offset) / blockSize)), rows - 1);
  return { row, column: Math.floor(token / blockSize) };
}

Object.assign(window.flexprefill, { blockOfToken, find, foundText, showText });
