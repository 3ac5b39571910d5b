// All heads as small maps, in the order and choice that is asked for.

const {
  BlockMap, DENSE, PATTERNS, apart, classify, densityOf, element, grouped, headName, headText, heatText, inksOfOne,
  inksOfTwo, keptText, node, paint, patternsOf, placesOf, readMap, recallOf, state,
} = window.flexprefill;

const SIDE = 96; // CSS pixels, the longer one
const PLACE = "layer and head"; // the order of the file

// What heads can be sorted by, the largest first.
const patternOf = (file, { key }) => file.patterns.get(key);
const byPattern = (entry) => Object.fromEntries(PATTERNS.map(entry));
const ORDERS = {
  [PLACE]: null,
  density: densityOf,
  difference: (_, place) => apart(place) ?? -1,
  "lost mass": (file, place) => 1 - (recallOf(file, place)?.mean ?? 2),
  ...byPattern((name) => [`share of ${name}`, (file, place) => shareOf(patternOf(file, place), name)]),
};
// Which heads can be shown.
const CHOICES = {
  "all heads": () => true,
  "that differ": (_, place) => apart(place) > 0,
  "of this layer": (_, { layer }) => layer === state.chosen[0].layer,
  [DENSE]: (file, place) => patternOf(file, place).dense,
  ...byPattern((name) => [`mostly ${name}`, (file, place) => patternOf(file, place).main === name]),
};
const COUNTED = new Set([DENSE, ...PATTERNS.flatMap((name) => [`share of ${name}`, `mostly ${name}`])]); // read all heads

const shareOf = ({ counts, kept, dense }, name) => (dense || !kept ? 0 : counts[name] / kept);

class Gallery {
  #sight = new IntersectionObserver((entries) => entries.forEach((entry) => this.#see(entry)), { rootMargin: "300px" });
  #built = "";
  #seen = new Set();

  // choose(place): what a click on a head does.
  constructor(choose) {
    this.choose = choose;
    for (const [select, names] of [["sort", Object.keys(ORDERS)], ["filter", Object.keys(CHOICES)]]) {
      element(select).replaceChildren(...names.map((name) => new Option(name, name)));
    }
  }

  // Makes the list anew where files, order or choice have changed; marks the chosen head.
  async refresh() {
    const [file] = state.files;
    const asked = { sort: element("sort").value, filter: element("filter").value };
    const compared = state.compare === "file";
    const measured = placesOf(file).some((place) => recallOf(file, place));
    for (const [select, name, fits] of [
      ["sort", "difference", compared],
      ["filter", "that differ", compared],
      ["sort", "lost mass", measured],
    ]) {
      element(select).querySelector(`[value="${name}"]`).hidden = !fits;
      if (!fits && asked[select] === name) element(select).selectedIndex = 0;
    }
    const sort = element("sort").value;
    const filter = element("filter").value;
    const layer = filter === "of this layer" ? state.chosen[0].layer : "";
    const other = compared && identity(state.files[1]);
    const built = [identity(file), other, Boolean(state.differences), sort, filter, layer].join();
    if (built !== this.#built) {
      if (COUNTED.has(sort) || COUNTED.has(filter)) {
        await patternsOf(file, (done, all) => this.#tell(`reading heads: ${grouped(done)} of ${grouped(all)}`));
      }
      if (file !== state.files[0]) return;
      this.#built = built;
      this.#fill(file, sort, filter);
    }
    const { layer: number, column } = state.chosen[0];
    for (const thumb of element("thumbs").children) {
      thumb.setAttribute("aria-current", thumb.dataset.key === `${number}:${column}`);
    }
  }

  #tell(text) {
    element("gallery-count").textContent = text;
  }

  #fill(file, sort, filter) {
    const all = placesOf(file);
    const places = all.filter((place) => CHOICES[filter](file, place));
    if (ORDERS[sort]) {
      const value = new Map(places.map((place) => [place, ORDERS[sort](file, place)]));
      places.sort((a, b) => value.get(b) - value.get(a));
    }
    this.#tell(places.length === all.length ? grouped(all.length) : `${grouped(places.length)} of ${grouped(all.length)}`);
    this.#sight.disconnect();
    this.#seen.clear();
    const thumbs = places.map((place) => this.#thumb(file, place));
    element("thumbs").replaceChildren(...thumbs);
    thumbs.forEach((thumb) => this.#sight.observe(thumb));
  }

  #thumb(file, place) {
    const { geometry } = file.layer(place.layer);
    const longer = Math.max(geometry.rows, geometry.columns);
    const thumb = node("button", "", "thumb");
    const canvas = node("canvas", "");
    canvas.style.width = `${Math.max(8, Math.round((SIDE * geometry.columns) / longer))}px`;
    canvas.style.height = `${Math.max(8, Math.round((SIDE * geometry.rows) / longer))}px`;
    const blocks = apart(place);
    const values = [keptText(file, place), ...(blocks ? [`≠ ${grouped(blocks)}`] : [])];
    const name = `${place.layer} · ${headName(file.layer(place.layer), place.column).replace(/^head /, "")}`;
    thumb.append(canvas, node("span", name), node("span", values.join(", "), "quiet"));
    thumb.type = "button";
    thumb.dataset.key = place.key;
    thumb.title = heatText(place);
    thumb.setAttribute("aria-label", headText(file, place));
    thumb.addEventListener("click", () => this.choose(place));
    thumb.draw = () => drawThumb(canvas, file, place);
    return thumb;
  }

  #see({ isIntersecting, target }) {
    if (!isIntersecting) return this.#seen.delete(target);
    this.#seen.add(target);
    return this.#draw(target);
  }

  #draw(thumb) {
    this.drawing = Promise.all([this.drawing, thumb.draw()]);
  }

  // Draws again what is in view, and the rest as it comes into view: in other colours.
  redraw() {
    this.#seen.forEach((thumb) => this.#draw(thumb));
  }
}

async function drawThumb(canvas, file, place) {
  try {
    const map = await readMap(file, place);
    const other = state.compare === "file" && apart(place) !== undefined ? await readMap(state.files[1], place) : null;
    const head = { map, patterns: state.colour === "pattern" && !other ? classify(map, file.config) : null };
    const inks = other ? inksOfTwo(map, other).inks : inksOfOne(head);
    const ratio = window.devicePixelRatio;
    canvas.width = Math.round(parseFloat(canvas.style.width) * ratio);
    canvas.height = Math.round(parseFloat(canvas.style.height) * ratio);
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    const { rows, columns } = map.geometry;
    const scale = columns >= rows ? canvas.width / columns : canvas.height / rows; // the longer side is filled
    paint(image, { left: 0, top: 0, scale }, BlockMap.causal(map.geometry), inks, state.colours);
    context.putImageData(image, 0, 0);
  } catch {
    canvas.parentElement.classList.add("damaged"); // why is said where it is chosen
  }
}

const identities = new WeakMap();

// A number for each open file: two may have one name.
function identity(file) {
  if (!identities.has(file)) identities.set(file, identity.next = (identity.next ?? 0) + 1);
  return identities.get(file);
}

Object.assign(window.flexprefill, { Gallery });
