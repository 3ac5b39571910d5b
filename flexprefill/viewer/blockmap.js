// The bitset of one head, and its counts in ever larger squares.

const WORD_BITS = 32;

class BlockMap {
  static #causal = new Map();
  #levels = [];

  // words: Uint32Array [rows, width]; bit j of word w is key block 32 w + j, zero in the causal future.
  constructor(geometry, words) {
    this.geometry = geometry;
    this.words = words;
    this.width = Math.ceil(geometry.columns / WORD_BITS);
  }

  // From a head's bytes in a file: each row's visible bits, one after another.
  static fromTriangle(geometry, bytes) {
    return BlockMap.#fill(geometry, (position, count) => {
      const byte = Math.floor(position / 8);
      const shift = position % 8;
      const low = bytes[byte] | (bytes[byte + 1] << 8) | (bytes[byte + 2] << 16) | (bytes[byte + 3] << 24);
      const word = shift ? (low >>> shift) | (bytes[byte + 4] << (WORD_BITS - shift)) : low;
      return count === WORD_BITS ? word : word & ((1 << count) - 1);
    });
  }

  // The map that keeps every visible block; one for all heads of these sizes.
  static causal(geometry) {
    const { queryLength, keyLength, blockSize } = geometry;
    const name = [queryLength, keyLength, blockSize].join();
    if (!BlockMap.#causal.has(name)) {
      BlockMap.#causal.set(name, BlockMap.#fill(geometry, (_, count) => (count === WORD_BITS ? -1 : (1 << count) - 1)));
    }
    return BlockMap.#causal.get(name);
  }

  // One map for each name, of the kept blocks that nameOf(row, column) gives it.
  split(names, nameOf) {
    const parts = Object.fromEntries(names.map((name) => [name, new Uint32Array(this.words.length)]));
    this.forEach((row, column) => {
      parts[nameOf(row, column)][row * this.width + (column >>> 5)] |= 1 << (column & 31);
    });
    return names.map((name) => new BlockMap(this.geometry, parts[name]));
  }

  static #fill(geometry, readBits) {
    const width = Math.ceil(geometry.columns / WORD_BITS);
    const words = new Uint32Array(geometry.rows * width);
    let position = 0;
    for (let row = 0; row < geometry.rows; row++) {
      const visible = geometry.visible(row);
      for (let column = 0; column < visible; column += WORD_BITS) {
        const count = Math.min(WORD_BITS, visible - column);
        words[row * width + column / WORD_BITS] = readBits(position + column, count);
      }
      position += visible;
    }
    return new BlockMap(geometry, words);
  }

  has(row, column) {
    return ((this.words[row * this.width + (column >>> 5)] >>> (column & 31)) & 1) === 1;
  }

  and(other) {
    return new BlockMap(this.geometry, this.words.map((word, at) => word & other.words[at]));
  }

  andNot(other) {
    return new BlockMap(this.geometry, this.words.map((word, at) => word & ~other.words[at]));
  }

  // Calls visit(row, column) for each kept block, in order.
  forEach(visit) {
    for (let row = 0; row < this.geometry.rows; row++) {
      for (let at = 0; at < this.width; at++) {
        let word = this.words[row * this.width + at];
        while (word) {
          const lowest = word & -word;
          visit(row, at * WORD_BITS + 31 - Math.clz32(lowest));
          word ^= lowest;
        }
      }
    }
  }

  // How many blocks are kept.
  count() {
    return this.words.reduce((sum, word) => sum + popcount(word), 0);
  }

  // How many key blocks each query block keeps, and how many query blocks keep each key block.
  totals() {
    const rows = new Uint32Array(this.geometry.rows);
    const columns = new Uint32Array(this.geometry.columns);
    this.forEach((row, column) => {
      rows[row] += 1;
      columns[column] += 1;
    });
    return { rows, columns };
  }

  // How many blocks each square of 2 ** level blocks keeps: { counts, rows, columns }.
  level(level) {
    this.#levels[level] ??= level === 0 ? this.#cells() : level === 1 ? this.#pairs() : this.#halved(level);
    return this.#levels[level];
  }

  #cells() {
    const { rows, columns } = this.geometry;
    const counts = new Uint8Array(rows * columns);
    this.forEach((row, column) => (counts[row * columns + column] = 1));
    return { counts, rows, columns };
  }

  // straight from the words, 16 pairs at once, so that the whole view of a long map never unpacks it
  #pairs() {
    const rows = Math.ceil(this.geometry.rows / 2);
    const columns = Math.ceil(this.geometry.columns / 2);
    const counts = new Uint8Array(rows * columns);
    for (let row = 0; row < this.geometry.rows; row++) {
      for (let at = 0; at < this.width; at++) {
        const word = this.words[row * this.width + at];
        let sums = word - ((word >>> 1) & 0x55555555);
        const start = (row >>> 1) * columns + at * (WORD_BITS / 2);
        for (let pair = 0; sums; pair++, sums >>>= 2) counts[start + pair] += sums & 3;
      }
    }
    return { counts, rows, columns };
  }

  #halved(level) {
    const finer = this.level(level - 1);
    const rows = Math.ceil(finer.rows / 2);
    const columns = Math.ceil(finer.columns / 2);
    const Counts = level < 4 ? Uint8Array : level < 8 ? Uint16Array : Uint32Array; // up to 4 ** level
    const counts = new Counts(rows * columns);
    for (let row = 0; row < finer.rows; row++) {
      const from = row * finer.columns;
      const to = (row >>> 1) * columns;
      for (let column = 0; column < finer.columns; column++) {
        counts[to + (column >>> 1)] += finer.counts[from + column];
      }
    }
    return { counts, rows, columns };
  }
}

function popcount(word) {
  word -= (word >>> 1) & 0x55555555;
  word = (word & 0x33333333) + ((word >>> 2) & 0x33333333);
  return (((word + (word >>> 4)) & 0x0f0f0f0f) * 0x01010101) >>> 24;
}

Object.assign(window.flexprefill, { BlockMap, popcount });
