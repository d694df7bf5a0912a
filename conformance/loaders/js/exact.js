// Exact updates (SPEC 5.6 to 5.9) for pxd.js: blocks checked without the base, and applied to its weights.

const FORMS = { BF16: { size: 2, mantissa: 7 }, F16: { size: 2, mantissa: 10 }, F32: { size: 4, mantissa: 23 } };
const BLOCK = 65536;

class Unreadable extends Error {}

function need(holds) {
  if (!holds) throw new Unreadable();
}

/** Weights of one tensor as unsigned numbers; bytes: Uint8Array, changed in place. */
class Weights {
  constructor(bytes, { size, mantissa }) {
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
    this.size = size;
    this.mantissa = mantissa;
    this.top = 2 ** (8 * size - 1);
  }

  get(place) {
    return this.size === 2 ? this.view.getUint16(2 * place, true) : this.view.getUint32(4 * place, true);
  }

  set(place, pattern) {
    if (this.size === 2) this.view.setUint16(2 * place, pattern, true);
    else this.view.setUint32(4 * place, pattern, true);
  }

  exponent(place) {
    return (this.get(place) & (this.top - 1)) >>> this.mantissa;
  }

  /** Move a weight `by` places in the order of values, modulo 2^w. */
  step(place, by) {
    const all = 2 * this.top;
    const old = this.get(place);
    const ordinal = old >= this.top ? all - 1 - old : old + this.top;
    const made = (((ordinal + by) % all) + all) % all;
    this.set(place, made >= this.top ? made - this.top : all - 1 - made);
  }
}

/** A keyed block: unary numbers from bit 0 up, fields from the highest bit down. */
class Bits {
  constructor(bytes) {
    this.bytes = bytes;
    this.low = 0;
    this.high = 8 * bytes.length;
  }

  at(i) {
    return (this.bytes[i >>> 3] >> (i & 7)) & 1;
  }

  unary() {
    for (let n = 0; ; n++) {
      need(this.low < this.high);
      if (!this.at(this.low++)) return n;
    }
  }

  field(bits) {
    need(this.high - this.low >= bits);
    let value = 0;
    for (let i = 0; i < bits; i++) value = 2 * value + this.at(--this.high);
    return value;
  }

  /** The next 15 field bits, without taking them. */
  ahead() {
    let value = 0;
    for (let i = 1; i <= 15; i++) value = 2 * value + (this.high >= i ? this.at(this.high - i) : 0);
    return value;
  }

  run() {
    return this.unary() * 2 ** 15 + this.ahead();
  }
}

/** SPEC 5.6 and 5.7: first weight, number of weights, A and bytes of each block. */
function* blocks(index, data, count, size) {
  const entries = new DataView(index.buffer, index.byteOffset, index.length);
  let at = 0;
  for (let first = 0; first < count; first += BLOCK) {
    const entry = entries.getUint32(first / BLOCK * 4, true);
    const [key, length, weights] = [entry & 255, entry >>> 8, Math.min(BLOCK, count - first)];
    need(at + length <= data.length);
    if (key === 255) need(length === weights * size);
    else need(length < weights * size && (key ? length >= 1 : length === 0 || length >= 4));
    yield { first, count: weights, key, bytes: data.subarray(at, at + length) };
    at += length;
  }
  need(at === data.length);
}

function rising(places, count) {
  need(places.every((place, i) => place < count && (i === 0 || places[i - 1] < place)));
}

/** SPEC 5.8: places of the moves, whether each is -1, places and new patterns of the exceptions. */
function gaps({ bytes, count }, size) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const [moves, listed] = [view.getUint16(0, true), view.getUint16(2, true)];
  const patterns = 4 + 2 * listed;
  const signs = patterns + size * listed;
  const rest = signs + Math.ceil(moves / 8);
  need(rest <= bytes.length && (moves % 8 === 0 || bytes[rest - 1] >> moves % 8 === 0));
  const places = Array.from({ length: listed }, (_, i) => view.getUint16(4 + 2 * i, true));
  const made = Array.from({ length: listed }, (_, i) => (size === 2 ? view.getUint16(patterns + 2 * i, true) : view.getUint32(patterns + 4 * i, true)));
  rising(places, count);
  const wide = moves * 384 < count;
  const moved = [];
  let at = rest;
  for (let place = 0; moved.length < moves; place++) {
    need(at + (wide ? 2 : 1) <= bytes.length);
    if (wide) place += view.getUint16(at, true);
    for (; !wide && bytes[at] === 255; at++) place += 255;
    need(wide || at < bytes.length);
    if (!wide) place += bytes[at];
    at += wide ? 2 : 1;
    need(place < count);
    moved.push(place);
  }
  const taken = new Set(moved);
  need(at === bytes.length && !places.some((place) => taken.has(place)));
  return { moved, down: (i) => (bytes[signs + (i >> 3)] >> (i & 7)) & 1, places, patterns: made };
}

function exceptions(bits, count, size) {
  const places = [];
  const patterns = [];
  for (let left = bits.unary(); left > 0; left--) {
    places.push(bits.field(16));
    patterns.push(bits.field(8 * size));
  }
  rising(places, count);
  return { places, patterns };
}

/** SPEC 5.9. */
function keyed(weights, { bytes, count, key }) {
  const bits = new Bits(bytes);
  const listed = exceptions(bits, count, weights.size);
  const classes = Array.from({ length: 16 }, () => []);
  for (let i = 0; i < count; i++) classes[Math.min(Math.max(weights.exponent(i) - key + 1, 0), 15)].push(i);
  for (const place of classes[0]) {
    const q = bits.unary();
    need(q <= 8);
    if (q === 8) {
      weights.set(place, bits.field(8 * weights.size));
      continue;
    }
    const k = Math.min(key - 1 - weights.exponent(place), weights.mantissa + 1);
    const z = q * 2 ** k + bits.field(k);
    weights.step(place, z % 2 ? -(z + 1) / 2 : z / 2);
  }
  let run = bits.run();
  for (let c = 1; c < 16; c++) {
    for (const place of classes[c]) {
      if (run >= 2 ** (15 - c)) {
        run -= 2 ** (15 - c);
        continue;
      }
      weights.step(place, bits.field(c + 1) % 2 ? -1 : 1);
      run = bits.run();
    }
  }
  run -= bits.ahead();
  need(run >= 0 && run < 2 ** 15 && bits.high - bits.low < 8);
  for (let i = bits.low; i < bits.high; i++) need(!bits.at(i));
  listed.places.forEach((place, i) => weights.set(place, listed.patterns[i]));
}

function readable(work) {
  try {
    work();
    return true;
  } catch (error) {
    if (error instanceof Unreadable) return false;
    throw error;
  }
}

/** Whether blocks over `count` weights are sound, as far as that can be told without the base (SPEC 5.7, 5.8). */
export function sound(index, data, count, dtype) {
  const { size } = FORMS[dtype];
  return readable(() => {
    for (const block of blocks(index, data, count, size)) {
      if (block.key > 0 && block.key < 255) exceptions(new Bits(block.bytes), block.count, size);
      else if (block.key === 0 && block.bytes.length) gaps(block, size);
    }
  });
}

/** Apply blocks to weights (Uint8Array, changed in place). False where they cannot be read on these (SPEC 7.4). */
export function applyBlocks(weights, index, data, dtype) {
  const { size } = FORMS[dtype];
  return readable(() => {
    for (const block of blocks(index, data, weights.length / size, size)) {
      const part = new Weights(weights.subarray(size * block.first, size * (block.first + block.count)), FORMS[dtype]);
      if (block.key === 255) weights.set(block.bytes, size * block.first);
      else if (block.key) keyed(part, block);
      else if (block.bytes.length) {
        const { moved, down, places, patterns } = gaps(block, size);
        moved.forEach((place, i) => part.step(place, down(i) ? -1 : 1));
        places.forEach((place, i) => part.set(place, patterns[i]));
      }
    }
  });
}
