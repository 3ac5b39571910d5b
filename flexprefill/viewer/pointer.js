// Mouse, pen and fingers on a map: point, move, zoom.

const { blockText, drawFrames, element, move, pixelView, showText, state, totalsText, zoomAt } = window.flexprefill;

const TAP = 8; // CSS pixels that a finger may slip and still tap
const REST = "Point at a block or tap it, or press Shift and an arrow key.";

function point(block) {
  state.cursor = block;
  element("readout").textContent = block ? blockText(block) : REST;
  element("totals").textContent = block ? totalsText(block) : "";
  showText(block);
  drawFrames();
}

function listenTo(pane) {
  const pointers = new Map();
  let begun = null; // where a single pointer went down, until it moved away or another came
  const inPixels = (event) => {
    const box = pane.canvas.getBoundingClientRect();
    return { x: (event.clientX - box.left) * pane.ratio, y: (event.clientY - box.top) * pane.ratio };
  };
  const middle = () => {
    const places = [...pointers.values()];
    const mean = (axis) => places.reduce((sum, place) => sum + place[axis], 0) / places.length;
    const spread = places.length < 2 ? 1 : Math.hypot(places[0].x - places[1].x, places[0].y - places[1].y);
    return { x: mean("x"), y: mean("y"), spread: Math.max(spread, 1) };
  };
  pane.canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    pane.canvas.setPointerCapture(event.pointerId);
    pane.canvas.classList.add("moving");
    pointers.set(event.pointerId, inPixels(event));
    begun = pointers.size === 1 ? { x: event.clientX, y: event.clientY } : null;
  });
  pane.canvas.addEventListener("pointermove", (event) => {
    if (!pointers.has(event.pointerId)) return point(pane.blockAt(pixelView(), event.clientX, event.clientY));
    if (begun && Math.hypot(event.clientX - begun.x, event.clientY - begun.y) < TAP) return;
    begun = null;
    const before = middle();
    pointers.set(event.pointerId, inPixels(event));
    const after = middle();
    const { scale } = pixelView();
    move((before.y - after.y) / scale, (before.x - after.x) / scale);
    if (pointers.size > 1) zoomAt(after.spread / before.spread, after.x, after.y);
  });
  pane.canvas.addEventListener("pointerup", (event) => {
    if (begun) point(pane.blockAt(pixelView(), event.clientX, event.clientY));
    begun = null;
  });
  for (const end of ["pointerup", "pointercancel"]) {
    pane.canvas.addEventListener(end, (event) => {
      pointers.delete(event.pointerId);
      if (!pointers.size) pane.canvas.classList.remove("moving");
    });
  }
  // a finger leaves with every tap: what it tapped stays
  pane.canvas.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null));
  pane.canvas.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      const lines = event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? event.deltaY / 40 : event.deltaY;
      const { x, y } = inPixels(event);
      zoomAt(2 ** (-lines / 8), x, y);
    },
    { passive: false },
  );
}

Object.assign(window.flexprefill, { listenTo, point });
