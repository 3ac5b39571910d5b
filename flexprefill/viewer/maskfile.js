// Mask files of format version 2, read by slices: header and tables when one is opened, a head's bytes when it is asked
// for. What is read is checked against the file's own checksums.

const FORMAT = "flexprefill-masks";
const VERSION = "2";
const LARGEST_HEADER = 100_000_000; // safetensors' own limit

class MaskFileError extends Error {}

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let remainder = byte;
  for (let bit = 0; bit < 8; bit++) remainder = remainder & 1 ? (remainder >>> 1) ^ 0xedb88320 : remainder >>> 1;
  return remainder;
});

// The same number as Python's zlib.crc32.
function crc32(bytes) {
  let remainder = 0xffffffff;
  for (let at = 0; at < bytes.length; at++) {
    remainder = (remainder >>> 8) ^ CRC_TABLE[(remainder ^ bytes[at]) & 0xff];
  }
  return ~remainder >>> 0;
}

// The sizes of a layer's maps in blocks: rows of query blocks, columns of key blocks, and which of them are visible.
class Geometry {
  constructor({ q_len, kv_len, block_size }) {
    Object.assign(this, { queryLength: q_len, keyLength: kv_len, blockSize: block_size, offset: kv_len - q_len });
    this.rows = Math.ceil(q_len / block_size);
    this.columns = Math.ceil(kv_len / block_size);
    this.firstVisible = Math.floor((this.offset + Math.min(block_size, q_len) - 1) / block_size) + 1;
    // every row but the last sees one block more than the row above; the last one sees them all
    this.bits = (this.rows - 1) * this.firstVisible + ((this.rows - 1) * (this.rows - 2)) / 2 + this.columns;
    this.bytes = Math.ceil(this.bits / 8);
  }

  // How many leading key blocks query block `row` sees, at least in part.
  visible(row) {
    return row === this.rows - 1 ? this.columns : this.firstVisible + row;
  }

  // Whether the map has these blocks, and the query block sees the key block.
  sees(row, column) {
    return row >= 0 && row < this.rows && column >= 0 && column < this.visible(row);
  }

  // How many query blocks see key block `column`, at least in part.
  seenBy(column) {
    return this.rows - Math.min(Math.max(0, column + 1 - this.firstVisible), this.rows - 1);
  }

  equals(other) {
    return ["queryLength", "keyLength", "blockSize"].every((size) => this[size] === other[size]);
  }
}

class MaskFile {
  #source;

  constructor(source, about, density, checksums) {
    this.#source = source;
    Object.assign(this, { name: source.name, size: source.size, density, checksums, ...about });
    this.bytesRead = 0;
  }

  layer(number) {
    return this.layers.find((layer) => layer.number === number);
  }

  // The packed causal triangle of one head; `column` counts the heads of all batch entries of the layer.
  async readHead(number, column) {
    const { start, first, geometry } = this.layer(number);
    const from = start + column * geometry.bytes;
    const bytes = await this.#source.read(from, from + geometry.bytes);
    this.bytesRead += bytes.length;
    if (crc32(bytes) !== this.checksums[first + column]) {
      throw new MaskFileError(
        `${this.name} is damaged: layer ${number}, ${headName(this.layer(number), column)} does not match its checksum`,
      );
    }
    return bytes;
  }
}

function headName({ batch, heads, names }, column) {
  const name = batch === 1 ? `head ${column}` : `batch ${Math.floor(column / heads)} head ${column % heads}`;
  return names ? `${name} (${names[column % heads]})` : name;
}

// Opens a source { name, size, read(start, end) -> Promise<Uint8Array> }; throws a MaskFileError that says what is wrong.
async function openMaskFile(source) {
  const refuse = (reason) => {
    throw new MaskFileError(`${source.name} ${reason}`);
  };
  const tooShort = (wanted) =>
    refuse(`is no mask file, or cut short: it should have ${wanted} bytes, and has ${grouped(source.size)}`);

  if (source.size < 8) tooShort("at least 8");
  const prefix = await source.read(0, 8);
  const headerLength = Number(new DataView(prefix.buffer, prefix.byteOffset).getBigUint64(0, true));
  if (headerLength > LARGEST_HEADER) refuse("is no safetensors file: its first 8 bytes are no header's length");
  if (8 + headerLength > source.size) tooShort(`at least ${grouped(8 + headerLength)}`);
  const head = await source.read(0, 8 + headerLength);

  let header;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(head.subarray(8)));
  } catch {
    refuse("is no safetensors file, or damaged: its header is no JSON");
  }
  const { __metadata__: metadata, ...tensors } = header ?? {};
  if (metadata?.format !== FORMAT) refuse("is a safetensors file, but not one of masks");
  if (metadata.format_version === "1") {
    refuse("has format version 1, and this page reads version 2: save it again with load_masks and save_masks");
  }
  if (metadata.format_version !== VERSION) {
    refuse(`has format version ${metadata.format_version}, and this page reads version 2: a newer one may read it`);
  }

  let about;
  try {
    about = described(metadata, 8 + headerLength);
  } catch (error) {
    refuse(`has a damaged header: ${error.message}`);
  }
  const { layers } = about;
  const last = layers.at(-1);
  const count = last.first + last.columns;
  const tables = last.start + last.columns * last.geometry.bytes;
  checkTensors(tensors, layers, count, tables, 8 + headerLength, refuse);
  const size = tables + 8 * count + 8;
  if (source.size < size) {
    refuse(`is cut short: its header asks for ${grouped(size)} bytes, and it has ${grouped(source.size)}`);
  }
  if (source.size > size) {
    refuse(`is too long: its header asks for ${grouped(size)} bytes, and it has ${grouped(source.size)}`);
  }

  const tail = await source.read(tables, size);
  const words = (from, to) => {
    const view = new DataView(tail.buffer, tail.byteOffset);
    return Uint32Array.from({ length: (to - from) / 4 }, (_, word) => view.getUint32(from + 4 * word, true));
  };
  const [headerSum, tableSum] = words(8 * count, 8 * count + 8);
  if (crc32(head) !== headerSum) refuse("is damaged: its header does not match its checksum");
  if (crc32(tail.subarray(0, 8 * count)) !== tableSum) refuse("is damaged: its tables do not match their checksum");

  const density = new Float32Array(words(0, 4 * count).buffer);
  const file = new MaskFile(source, about, density, words(4 * count, 8 * count));
  file.bytesRead = prefix.length + head.length + tail.length;
  return file;
}

// What the header's strings say: layers, the search's settings, the caller's own entries, the prompt's text or null.
function described(metadata, dataStart) {
  const user = JSON.parse(metadata.user);
  if (!areStrings(Object.values(user))) throw new Error("user must be an object of strings");
  const layers = layersOf(JSON.parse(metadata.layers), dataStart);
  const names = (user.heads ?? "").split(",").map((name) => name.trim());
  for (const layer of layers) if (user.heads && names.length === layer.heads) layer.names = names;
  const tokens = "tokens" in metadata ? JSON.parse(metadata.tokens) : null; // the prompt's text
  const fits = ({ batch, geometry }) => batch === 1 && geometry.keyLength === tokens.length;
  if ("tokens" in metadata && !(areStrings(tokens) && layers.every(fits))) {
    throw new Error("tokens must be a string for each key");
  }
  return { metadata, layers, config: JSON.parse(metadata.config), user, tokens };
}

const areStrings = (values) => Array.isArray(values) && values.every((value) => typeof value === "string");

// Per layer: number, batch, heads, columns = batch * heads, geometry, first index in the tables, first byte in the file.
function layersOf(listed, dataStart) {
  let first = 0;
  let start = dataStart;
  const layers = Object.entries(listed).map(([name, sizes]) => {
    const { q_len, kv_len, block_size, shape } = sizes;
    const [batch, heads] = shape;
    if (!/^(0|[1-9]\d*)$/.test(name)) throw new Error(`${JSON.stringify(name)} is no layer number`);
    if (![q_len, kv_len, block_size, batch, heads].every((size) => Number.isInteger(size) && size > 0)) {
      throw new Error(`layer ${name} has sizes ${JSON.stringify(sizes)}`);
    }
    if (q_len > kv_len) throw new Error(`layer ${name} has more queries than keys`);
    const geometry = new Geometry(sizes);
    const layer = { number: Number(name), batch, heads, columns: batch * heads, geometry, first, start };
    first += layer.columns;
    start += layer.columns * geometry.bytes;
    return layer;
  });
  if (!layers.length) throw new Error("it lists no layer");
  return layers;
}

function checkTensors(tensors, layers, count, tables, dataStart, refuse) {
  const expected = Object.fromEntries(
    layers.map(({ number, batch, heads, columns, geometry, start }) => [
      `layer.${number}`,
      { dtype: "U8", shape: [batch, heads, geometry.bytes], at: start, length: columns * geometry.bytes },
    ]),
  );
  expected.density = { dtype: "F32", shape: [count], at: tables, length: 4 * count };
  expected.crc32 = { dtype: "U32", shape: [count], at: tables + 4 * count, length: 4 * count };
  expected.checksums = { dtype: "U32", shape: [2], at: tables + 8 * count, length: 8 };
  for (const [name, { dtype, shape, at, length }] of Object.entries(expected)) {
    const wanted = JSON.stringify([dtype, shape, [at - dataStart, at - dataStart + length]]);
    const stored = tensors[name] && [tensors[name].dtype, tensors[name].shape, tensors[name].data_offsets];
    if (JSON.stringify(stored) !== wanted) {
      refuse(`has a damaged header: ${name} should be ${wanted}, and is ${JSON.stringify(stored) ?? "missing"}`);
    }
  }
  const unknown = Object.keys(tensors).filter((name) => !(name in expected));
  if (unknown.length) refuse(`has a damaged header: it holds ${unknown}, which no layer asks for`);
}

const grouped = (number) => number.toLocaleString("en-US");

const sourceOfFile = (file) => ({
  name: file.name,
  size: file.size,
  read: async (start, end) => new Uint8Array(await file.slice(start, end).arrayBuffer()),
});

const sourceOfBytes = (name, bytes) => ({
  name,
  size: bytes.length,
  read: async (start, end) => bytes.slice(start, end),
});

window.flexprefill = { Geometry, MaskFileError, crc32, grouped, headName, openMaskFile, sourceOfBytes, sourceOfFile };
