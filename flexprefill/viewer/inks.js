// What maps are drawn in: [{ map, colour }] of disjoint maps.

const { DENSE, PATTERNS, comparable, panes, state } = window.flexprefill;

// A head alone: its kept blocks, or those of each pattern. head: { map, patterns }.
function inksOfOne({ map, patterns }) {
  const { colours } = state;
  if (state.colour !== "pattern") return [{ map, colour: colours.kept }];
  if (patterns.dense) return [{ map, colour: colours[DENSE] }];
  const used = PATTERNS.filter((name) => patterns.counts[name]);
  return map.split(used, patterns.classOf).map((part, at) => ({ map: part, colour: colours[used[at]] }));
}

// Two maps of one size: what both keep, and what one of them keeps alone.
function inksOfTwo(a, b) {
  const { colours } = state;
  const both = { map: a.and(b), colour: colours.both };
  const onlyA = { map: a.andNot(b), colour: colours.onlyA };
  const onlyB = { map: b.andNot(a), colour: colours.onlyB };
  return { inks: [both, onlyA, onlyB], both, onlyA, onlyB };
}

// What each pane is to draw.
function compose() {
  const { heads, colours } = state;
  panes.forEach((pane) => (pane.picture = null));
  const largest = (axis) => Math.max(1, ...heads.map(({ totals }) => totals[axis].reduce((a, b) => Math.max(a, b))));
  const most = { rows: largest("rows"), columns: largest("columns") }; // one scale for both maps
  const totals = (slot, colour) => ({ ...heads[slot].totals, most, colour });
  if (!comparable()) {
    heads.forEach((head, slot) => {
      panes[slot].picture = { causal: head.causal, inks: inksOfOne(head), totals: [totals(slot, colours.kept)] };
    });
    return;
  }
  const [a, b] = heads;
  const { inks, both, onlyA, onlyB } = inksOfTwo(a.map, b.map);
  state.counts = { both: both.map.count(), onlyA: onlyA.map.count(), onlyB: onlyB.map.count() };
  const [ofA, ofB] = [totals(0, colours.onlyA), totals(1, colours.onlyB)];
  if (state.difference) {
    panes[0].picture = { causal: a.causal, inks, totals: [ofA, { ...ofB, isLine: true }] };
  } else {
    panes[0].picture = { causal: a.causal, inks: [both, onlyA], totals: [ofA] };
    panes[1].picture = { causal: b.causal, inks: [both, onlyB], totals: [ofB] };
  }
}

Object.assign(window.flexprefill, { compose, inksOfOne, inksOfTwo });
