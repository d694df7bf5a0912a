// A loader of PXD 1.0 without dependencies, for browsers and Node 20: decode and apply, strict on every clause of SPEC.md.
//
//   const delta = await parse(bytes)                  // Uint8Array; steps 1 to 11 of SPEC 8; throws Rejection
//   delta.manifest, delta.contentId, delta.signs(module, k), delta.scales(module, k), delta.exact(module)
//   const tensors = await apply(delta, base)          // Map name -> {dtype, shape, data}; step 12 and SPEC 6
//
// Arithmetic is binary32 by Math.fround: the exact sum of two binary32 numbers rounded to binary64 and then to
// binary32 is the sum rounded once, because 53 >= 2 * 24 + 2; every term is exact in binary32.

import { applyBlocks, sound } from "./exact.js";

const BITS = new Map(Object.entries({
  F4: 4, F6_E2M3: 6, F6_E3M2: 6, BOOL: 8, U8: 8, I8: 8, F8_E4M3: 8, F8_E4M3FNUZ: 8, F8_E5M2: 8, F8_E5M2FNUZ: 8, F8_E8M0: 8,
  U16: 16, I16: 16, F16: 16, BF16: 16, U32: 32, I32: 32, F32: 32, U64: 64, I64: 64, F64: 64, C64: 64,
}));
const FLOATS = new Set(["BF16", "F16", "F32"]);
const AXES = new Map(Object.entries({ row: ["row"], col: ["col"], "row+col": ["row", "col"], tensor: ["scalar"] }));
const VALUES = 2 ** 22;
const MAGIC = '{"__metadata__":{"format":"pxd","pxd":"';
const NAME = /^(?!__)[!-.0-[\]-~]{1,512}$/;
const ASSET = /^([A-Za-z0-9_][A-Za-z0-9_-]{0,62}\/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,118}\.(json|txt|model|jinja|tiktoken|md)$/;
const HEX = /^[0-9a-f]{64}$/;
const PHASES = { 1: "container", 2: "profile", 3: "payload", 4: "binding" };
const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const utf8 = new TextEncoder();

/** The file, or the pair of file and base, is refused: `code` and `phase` of SPEC 8. */
export class Rejection extends Error {
  constructor(code) {
    super(code);
    this.code = code;
    this.phase = code && PHASES[code[1]];
  }
}

function need(holds, code) {
  if (!holds) throw new Rejection(code);
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// ---- Strict JSON (SPEC 2.7 to 2.11). Objects are Maps, so that no key is special and order is kept. ----

class Json {
  /**
   * source: a string. canonical: whether it is RFC 8785 (key order apart: `sorted`). wellFormed: no surrogate is unpaired.
   * loose: white space may follow, as in a base (SPEC 7.5).
   */
  constructor(source, codes, { loose = false } = {}) {
    this.source = source;
    this.at = 0;
    this.codes = codes; // syntax, duplicate key, number, depth
    this.canonical = true;
    this.sorted = true;
    this.wellFormed = true;
    this.values = 0;
    this.members = new Map(); // of the outermost object: key -> its value as it is written
    this.space();
    need(this.peek() === "{", codes[0]);
    this.value = this.any(0);
    this.end = this.at;
    if (loose) this.space();
    while (this.peek() === " ") this.at++;
    need(this.at === source.length, codes[0]); // SPEC 2.8
  }

  peek() {
    return this.source[this.at];
  }

  space() {
    for (; " \t\r\n".includes(this.peek() ?? "x"); this.at++) this.canonical = false;
  }

  take(mark) {
    need(this.peek() === mark, this.codes[0]);
    this.at++;
  }

  any(depth) {
    const mark = this.peek();
    need(this.values++ <= VALUES, this.codes[3]); // SPEC 2.11; the outermost object is none of its members
    if (mark === '"') return this.string();
    if (mark === "{" || mark === "[") {
      need(depth < 8, this.codes[3]);
      this.at++;
      return mark === "{" ? this.object(depth + 1) : this.array(depth + 1);
    }
    for (const [word, value] of [["null", null], ["true", true], ["false", false]]) {
      if (this.source.startsWith(word, this.at)) {
        this.at += word.length;
        return value;
      }
    }
    return this.number();
  }

  object(depth) {
    const made = new Map();
    let before;
    this.space();
    while (this.peek() !== "}" || made.size) {
      const key = this.string();
      need(!made.has(key), this.codes[1]);
      if (before !== undefined && !(before < key)) this.sorted = false; // JavaScript compares UTF-16 code units
      before = key;
      this.space();
      this.take(":");
      this.space();
      const start = this.at;
      made.set(key, this.any(depth));
      if (depth === 1) this.members.set(key, this.source.slice(start, this.at));
      this.space();
      if (this.peek() === "}") break;
      this.take(",");
      this.space();
    }
    this.at++;
    return made;
  }

  array(depth) {
    const made = [];
    this.space();
    while (this.peek() !== "]" || made.length) {
      made.push(this.any(depth));
      this.space();
      if (this.peek() === "]") break;
      this.take(",");
      this.space();
    }
    this.at++;
    return made;
  }

  number() {
    const form = /-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/y;
    form.lastIndex = this.at;
    const found = form.exec(this.source);
    need(found, this.codes[0]);
    this.at = form.lastIndex;
    const value = Number(found[0]);
    need(!found[1] && !found[2] && Number.isSafeInteger(value), this.codes[2]); // SPEC 2.10
    if (Object.is(value, -0)) this.canonical = false;
    return value;
  }

  string() {
    this.take('"');
    const parts = [];
    const plain = /[^"\\\u0000-\u001f]*/y;
    for (;;) {
      plain.lastIndex = this.at;
      parts.push(plain.exec(this.source)[0]);
      this.at = plain.lastIndex;
      if (this.peek() !== "\\") break;
      parts.push(this.escape());
      if (parts.length > 4096) parts.splice(0, parts.length, parts.join("")); // of many escapes each part is a few bytes
    }
    this.take('"');
    const made = parts.length === 1 ? parts[0] : parts.join("");
    if (!made.isWellFormed()) this.canonical = this.wellFormed = false; // only an escape can give a lone surrogate
    return made;
  }

  escape() {
    const short = { '"': '"', "\\": "\\", "/": "/", b: "\b", f: "\f", n: "\n", r: "\r", t: "\t" };
    const mark = this.source[this.at + 1];
    this.at += 2;
    if (Object.hasOwn(short, mark ?? "")) {
      if (mark === "/") this.canonical = false;
      return short[mark];
    }
    const digits = this.source.slice(this.at, this.at + 4);
    need(mark === "u" && /^[0-9a-fA-F]{4}$/.test(digits), this.codes[0]);
    this.at += 4;
    const value = parseInt(digits, 16);
    const isShort = value < 0x20 && "\b\f\n\r\t".includes(String.fromCharCode(value));
    if (value >= 0x20 || isShort || digits !== digits.toLowerCase()) this.canonical = false;
    return String.fromCharCode(value);
  }
}

const array = (value) => Array.isArray(value);
const string = (value) => typeof value === "string";
const integer = (value) => typeof value === "number";

// ---- Steps 1 to 6: container ----

function checkKind(bytes) {
  need(bytes.length > 0, "E103");
  const start = Array.from(bytes.subarray(0, 4096), (byte) => String.fromCharCode(byte)).join("");
  need(!start.startsWith("version https://git-lfs"), "E104");
  need(!/^[ \t\r\n\f\v]*<(!doctype|html)/i.test(start), "E105");
  need(!start.startsWith("PK"), "E106");
  need(!/^\x80[\x02-\x05]/.test(start), "E107");
  need(!/^\0+$/.test(start.slice(0, 8)), "E108");
  need(bytes[0] === 0xf8, bytes[8] === 0x7b ? "E112" : "E109");
  need(bytes.length >= 4096, "E103");
}

function headerLength(bytes) {
  checkKind(bytes);
  const length = new DataView(bytes.buffer, bytes.byteOffset, 8).getBigUint64(0, true);
  need(length >= 4088n && length <= 1n << 26n && (length + 8n) % 4096n === 0n, "E110"); // SPEC 2.3
  need(length + 8n <= bytes.length, "E111"); // SPEC 2.4
  const magic = utf8.encode(MAGIC);
  need(magic.every((byte, i) => bytes[8 + i] === byte), "E112"); // SPEC 2.5
  need('1.0"'.split("").every((c, i) => bytes[8 + magic.length + i] === c.charCodeAt(0)), "E201"); // SPEC 2.6
  return Number(length);
}

/** Bytes of a tensor; 2^53, which no tensor has, where they are no whole number (SPEC 2.14). */
function bytesOf(dtype, shape) {
  const bits = shape.reduce((product, dimension) => product * BigInt(dimension), BigInt(BITS.get(dtype)));
  return bits % 8n ? 1n << 53n : bits / 8n;
}

function readRecord(name, record) {
  need(record instanceof Map && record.size === 3 && utf8.encode(name).length <= 1024, "E118"); // SPEC 2.12
  const [dtype, shape, offsets] = ["dtype", "shape", "data_offsets"].map((key) => record.get(key));
  need(string(dtype) && array(shape) && shape.every(integer) && array(offsets) && offsets.length === 2 && offsets.every(integer), "E118");
  need(BITS.has(dtype), "E119");
  need(shape.length <= 8 && shape.every((size) => size >= 1), "E120"); // SPEC 2.14
  const size = bytesOf(dtype, shape);
  need(size < 1n << 53n, "E120");
  const [begin, end] = offsets;
  need(begin >= 0 && BigInt(end) - BigInt(begin) === size, "E121");
  return { name, dtype, shape, begin, end };
}

function readHeader(bytes) {
  const length = headerLength(bytes);
  let source;
  try {
    source = text.decode(bytes.subarray(8, 8 + length));
  } catch {
    throw new Rejection("E113");
  }
  const json = new Json(source, ["E114", "E115", "E116", "E117"]);
  const metadata = json.value.get("__metadata__");
  const order = (map, keys) => [...map.keys()].join() === keys;
  need(metadata.size === 3 && string(metadata.get("manifest")), "E118");
  const records = [];
  for (const [name, record] of json.value) {
    if (name === "__metadata__") continue;
    records.push(readRecord(name, record));
    if (!order(record, "dtype,shape,data_offsets")) json.canonical = false;
  }
  const spaces = source.length - json.end;
  need(json.canonical && order(metadata, "format,pxd,manifest") && spaces < 4096, "E122"); // SPEC 2.16
  let end = 0;
  for (const record of records) {
    need(record.begin === end, "E123"); // SPEC 2.17
    end = record.end;
  }
  need(bytes.length - 8 - length >= end, "E124"); // SPEC 2.18
  need(bytes.length - 8 - length === end, "E125");
  return { records, data: bytes.subarray(8 + length), manifest: metadata.get("manifest") };
}

// ---- Step 7: manifest. A schema is a function from a parsed value to a typed one; it throws E205. ----

const is = (test) => (value) => (need(test(value), "E205"), value);
const word = is(string);
const whole = is(integer);
const count = is((value) => integer(value) && value >= 0);
const hex = is((value) => string(value) && HEX.test(value));
const digest = is((value) => string(value) && value.startsWith("sha256:") && HEX.test(value.slice(7)));
const oneOf = (known) => is((value) => string(value) && known.has(value));
const orNull = (schema) => (value) => (value === null ? null : schema(value));
const list = (schema) => (value) => is(array)(value).map(schema);
const keyed = (schema) => (value) => {
  need(value instanceof Map && value.size === Object.keys(schema).length, "E205");
  return Object.fromEntries(Object.entries(schema).map(([key, part]) => (need(value.has(key), "E205"), [key, part(value.get(key))])));
};
const pair = (value) => (need(array(value) && value.length === 2, "E205"), value.map(word));
const texts = (value) => (need(value instanceof Map, "E205"), new Map([...value].map(([key, held]) => [key, word(held)])));

const PART = (value) => (need(array(value) && value.length === 2, "E205"), { axis: oneOf(AXES)(value[0]), exponent: whole(value[1]) });
const BASE = orNull(keyed({ dtype: oneOf(BITS), shape: list(count) }));

/** A module's entry with what it leaves out: base, dtype and encoding (SPEC 3.4). */
function MODULE(value) {
  need(value instanceof Map && value.has("components") !== value.has("encoding"), "E205");
  const given = new Map(Object.entries({ base: BASE, components: list(PART), dtype: oneOf(BITS), encoding: oneOf(new Set(["full", "same", "exact"])), name: word, shape: list(count), size: count }));
  need([...value.keys()].every((key) => given.has(key)) && value.has("name") && value.has("shape"), "E205");
  const said = Object.fromEntries([...value].map(([key, part]) => [key, given.get(key)(part)]));
  need(said.dtype !== "BF16" && (said.size !== undefined) === (said.encoding === "exact"), "E205");
  const { name, shape, dtype = "BF16", encoding = "sign", components = [], size = 0 } = said;
  const like = { dtype, shape };
  if (said.base) need(said.base.dtype !== dtype || !sameShape(said.base.shape, shape), "E205");
  return { name, shape, dtype, encoding, components, size, base: said.base === undefined ? like : said.base };
}

/** SPEC 3.13: the digest of each base tensor and of each tensor of the file, in order. */
function giveDigests(modules, table) {
  let next = 0;
  const take = () => (need(next < table.length, "E213"), table[next++]);
  for (const module of modules) {
    const { base, shape, encoding } = module;
    module.grown = Boolean(base) && shape.length > 0 && base.shape.length > 0 && shape[0] > base.shape[0];
    if (base) module.base = { ...base, sha256: take() };
    module.sha256 = encoding !== "same" || module.grown ? take() : null;
    module.result = encoding === "exact" ? take() : null;
  }
  need(next === table.length, "E213");
}

/** Hex digests from base64 without padding, whose unused bits are 0. */
function digestsOf(written) {
  need(string(written) && /^[A-Za-z0-9+/]*$/.test(written) && written.length % 4 !== 1, "E205");
  const raw = atob(written);
  need(raw.length % 32 === 0 && btoa(raw).replace(/=*$/, "") === written, "E205");
  return Array.from({ length: raw.length / 32 }, (_, i) => {
    const bytes = Array.from(raw.slice(32 * i, 32 * i + 32), (c) => c.charCodeAt(0).toString(16).padStart(2, "0"));
    return bytes.join("");
  });
}

const LISTS = new Set(["assets", "dropped", "metadata", "modules", "tied"]);
const SCHEMA = {
  assets: list(keyed({ path: word, sha256: hex })),
  base: keyed({ digest, id: word, revision: orNull(word) }),
  calibration: orNull(keyed({ digest, samples: count, seed: count, sequence_length: count, source: word })),
  digests: digestsOf, dropped: list(word), features: list(word), fine_tuned: keyed({ id: word, revision: orNull(word) }), metadata: texts,
  modules: list(MODULE), producer: keyed({ name: word, version: word }), tied: list(pair),
};
const MANIFEST = keyed(SCHEMA);
const CHAINED = keyed({ ...SCHEMA, previous: orNull(digest), result: orNull(digest) }); // with the feature `exact`

function readManifest(source) {
  const json = new Json(source, ["E202", "E202", "E202", "E202"]);
  need(json.canonical && json.sorted && json.end === source.length, "E203"); // SPEC 3.2
  const features = list(word)(json.value.get("features"));
  need(features.length === 0 || sameShape(features, ["exact"]), "E204"); // SPEC 3.3
  const manifest = (features.length ? CHAINED : MANIFEST)(json.value);
  giveDigests(manifest.modules, manifest.digests);
  for (const [key, written] of json.members) { // SPEC 3.8
    const value = json.value.get(key);
    if (LISTS.has(key)) need((value.length ?? value.size) <= 2 ** 18, "E208");
    else if (!["digests", "previous", "result"].includes(key)) need(utf8.encode(written).length <= 2 ** 16, "E208");
    if (key === "metadata") need(utf8.encode(written).length <= 2 ** 24, "E208");
  }
  return manifest;
}

// ---- Step 8: names, limits, encodings, base digest, assets ----

// Names are checked to be ASCII before they are compared, so that code units order them as bytes do.
const sorted = (items) => items.every((item, i) => i === 0 || items[i - 1] <= item);
const unique = (items) => new Set(items).size === items.length;

function checkNames({ modules, tied, dropped }) {
  const names = modules.map((module) => module.name);
  const aliases = tied.map(([, alias]) => alias);
  need([...names, ...tied.flat(), ...dropped].every((name) => NAME.test(name)), "E206"); // SPEC 3.5
  need(sorted(aliases) && sorted(dropped) && unique(dropped), "E205"); // SPEC 3.7
  const known = new Set(names);
  const taken = new Set(aliases);
  need(unique(names) && unique(aliases) && !aliases.some((alias) => known.has(alias)), "E207"); // SPEC 3.6
  need(tied.every(([name]) => known.has(name)) && !dropped.some((name) => known.has(name) || taken.has(name)), "E207");
}

const sameShape = (a, b) => a.length === b.length && a.every((size, i) => size === b[i]);

function checkModule(module, chained) {
  const { base, components, dtype, encoding, shape } = module;
  for (const { dtype: kind, shape: sizes } of base ? [module, base] : [module]) { // SPEC 3.8
    need(sizes.length <= 8 && sizes.every((size) => size >= 1) && bytesOf(kind, sizes) < 1n << 53n, "E208");
  }
  need(components.length <= 8, "E208");
  need(components.every(({ exponent }) => exponent >= -64 && exponent <= 63), "E209"); // SPEC 3.9
  module.covered = shape;
  module.tail = null;
  if (encoding === "full") return undefined;
  need(base && base.shape.length === shape.length && sameShape(base.shape.slice(1), shape.slice(1)), "E209"); // SPEC 3.10
  if (module.grown) {
    module.covered = [base.shape[0], ...shape.slice(1)];
    module.tail = [shape[0] - base.shape[0], ...shape.slice(1)];
  }
  const floats = FLOATS.has(dtype) && FLOATS.has(base.dtype);
  if (encoding === "sign") return need(floats && components.length && shape.length >= 2, "E209");
  if (encoding === "exact") return need(chained && floats && dtype === base.dtype && module.size >= 1, "E209");
  return need(floats || dtype === base.dtype, "E209");
}

async function digestOfRows(rows) {
  const ordered = rows.sort((a, b) => (a[0] < b[0] ? -1 : 1));
  return `sha256:${await sha256(utf8.encode(JSON.stringify(ordered)))}`;
}

async function checkBaseDigest({ modules, base }) {
  const bound = modules.filter((module) => module.base);
  const rows = bound.map(({ name, base: held }) => [name, held.dtype, held.shape, held.sha256]);
  need(base.digest === (await digestOfRows(rows)), "E210"); // SPEC 3.11
}

/** The digest of a module's new tensor where it is known, or null (SPEC 3.14). */
function knownResult({ base, dtype, encoding, result, sha256: own, shape }) {
  if (encoding !== "same") return { full: own, exact: result }[encoding] ?? null;
  return base.dtype === dtype && sameShape(base.shape, shape) ? base.sha256 : null;
}

async function checkResult({ features, modules, result }) {
  if (!features.length) return;
  const rows = modules.map((module) => [module.name, module.dtype, module.shape, knownResult(module)]);
  need(result === (rows.every((row) => row[3]) ? await digestOfRows(rows) : null), "E214");
}

function checkAssets({ assets }) {
  need(assets.every(({ path }) => ASSET.test(path) && !path.endsWith(".index.json")), "E211"); // SPEC 3.12
  need(unique(assets.map(({ path }) => path.toLowerCase())), "E211");
}

// ---- Step 8, the tensors: the whole header follows from the manifest and the sizes of the assets ----

/** The parts of a module's delta: component, begin and end in bytes (SPEC 4.2); and the size of it. */
function partsOf({ components, covered, dtype, encoding, size: bytes, tail }) {
  const parts = [];
  let size = 0;
  const put = (component, kind, shape) => {
    const end = size + Number(bytesOf(kind, shape));
    parts.push({ component, begin: size, end });
    size = Math.ceil(end / 64) * 64;
  };
  components.forEach(({ axis }, k) => {
    const width = covered.at(-1);
    const shapes = { row: covered.slice(0, -1), col: [...covered.slice(0, -2), width], scalar: [1] };
    put(k, "U8", [...covered.slice(0, -1), Math.ceil(width / 8)]);
    for (const part of AXES.get(axis)) put(k, "F16", shapes[part]);
  });
  if (encoding === "exact") {
    put("index", "U32", [Math.ceil(covered.reduce((product, dimension) => product * dimension, 1) / 65536)]);
    put("data", "U8", [bytes]);
  }
  if (tail) put(null, dtype, tail);
  return { parts, size };
}

/** The module's tensor; its parts are kept for later. */
function tensorsOf(module) {
  const { name, dtype, encoding, shape } = module;
  if (encoding === "full") return [{ name: `${name}.full`, dtype, shape }];
  const { parts, size } = partsOf(module);
  module.parts = parts;
  return size ? [{ name: `${name}.delta`, dtype: "U8", shape: [size] }] : [];
}

/** Hold the records to SPEC 4.1 and 4.2; every module and asset gets its `records`. */
function checkTensors(records, { modules, assets }) {
  let next = 0;
  let pads = 0;
  const take = (wanted) => {
    const end = next ? records[next - 1].end : 0;
    if (end % 64) matches({ name: `__pad__.${pads++}`, dtype: "U8", shape: [64 - (end % 64)] });
    return matches(wanted);
  };
  const matches = ({ name, dtype, shape }) => {
    const found = records[next++];
    need(found && found.name === name && found.dtype === dtype, "E212");
    need(shape ? sameShape(found.shape, shape) : found.shape.length === 1, "E212");
    return found;
  };
  for (const module of modules) module.records = tensorsOf(module).map(take);
  assets.forEach((asset, i) => (asset.records = [take({ name: `__asset__.${i}`, dtype: "U8" })]));
  need(next === records.length, "E212");
}

// ---- Steps 9 to 11: payload ----

async function checkPayload(delta) {
  for (const [items, code] of [[delta.manifest.modules, "E301"], [delta.manifest.assets, "E302"]]) {
    for (const { records, sha256: sum } of items) {
      if (!records.length) continue;
      need((await sha256(delta.data.subarray(records[0].begin, records.at(-1).end))) === sum, code); // SPEC 4.3, 4.4
    }
  }
  for (const record of delta.records) {
    if (record.name.startsWith("__pad__.")) need(delta.bytes(record).every((byte) => byte === 0), "E304"); // SPEC 4.5
  }
  for (const module of delta.manifest.modules) {
    checkGaps(delta, module);
    module.components.forEach((_, k) => checkComponent(delta, module, k));
    if (module.encoding !== "exact") continue;
    const [index, data] = delta.update(module);
    need(sound(index, data, module.covered.reduce((product, dimension) => product * dimension, 1), module.dtype), "E307"); // SPEC 5.7, 5.8
  }
}

function checkGaps(delta, module) {
  if (module.encoding === "full" || !module.records.length) return;
  const bytes = delta.bytes(module.records[0]);
  let end = 0;
  for (const part of [...module.parts, { begin: bytes.length }]) {
    need(bytes.subarray(end, part.begin).every((byte) => byte === 0), "E304"); // SPEC 4.5
    end = part.end;
  }
}

function checkComponent(delta, module, k) {
  const width = module.covered.at(-1);
  const stride = Math.ceil(width / 8);
  const mask = delta.mask(module, k);
  for (let at = stride - 1; width % 8 && at < mask.length; at += stride) need(mask[at] >> width % 8 === 0, "E303"); // SPEC 5.2
  for (const bits of delta.scales(module, k).flatMap((values) => [...values])) {
    need((bits & 0x7c00) !== 0x7c00, "E305"); // SPEC 5.4
    need((bits & 0x8000) === 0, "E306");
  }
}

/** Little-endian integers of 2 or 4 bytes, wherever they lie. */
function words(bytes, size) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const made = size === 2 ? new Uint16Array(bytes.length / 2) : new Uint32Array(bytes.length / 4);
  for (let i = 0; i < made.length; i++) made[i] = size === 2 ? view.getUint16(2 * i, true) : view.getUint32(4 * i, true);
  return made;
}

/** A file that has passed steps 1 to 11. */
class Delta {
  constructor({ records, data, manifest }) {
    this.records = records;
    this.data = data;
    this.manifestText = manifest;
  }

  bytes(record) {
    return this.data.subarray(record.begin, record.end);
  }

  /** The bytes of component k: its mask, then its scales; null: the tail. */
  component(module, k) {
    const bytes = this.bytes(module.records[0]);
    return module.parts.filter(({ component }) => component === k).map(({ begin, end }) => bytes.subarray(begin, end));
  }

  /** The index and the data of an `exact` module, as bytes. */
  update(module) {
    return [this.component(module, "index")[0], this.component(module, "data")[0]];
  }

  mask(module, k) {
    return this.component(module, k)[0];
  }

  /** F16 bit patterns, one Uint16Array for each of the scales. */
  scales(module, k) {
    return this.component(module, k).slice(1).map((bytes) => words(bytes, 2));
  }

  /** One byte, 0 or 1, for each weight, row-major (SPEC 5.1). */
  signs(module, k) {
    const width = module.covered.at(-1);
    const stride = Math.ceil(width / 8);
    const mask = this.mask(module, k);
    const made = new Uint8Array((mask.length / stride) * width);
    for (let i = 0; i < made.length; i++) {
      const j = i % width;
      made[i] = (mask[Math.floor(i / width) * stride + (j >> 3)] >> (j & 7)) & 1;
    }
    return made;
  }

  /** The bytes of `full` or of the tail, or null. */
  exact(module) {
    if (module.encoding === "full") return this.bytes(module.records[0]);
    return module.tail ? this.component(module, null)[0] : null;
  }
}

/** Read a file: steps 1 to 11 of SPEC 8. bytes: Uint8Array. Throws Rejection. */
export async function parse(bytes) {
  const delta = new Delta(readHeader(bytes));
  const manifest = (delta.manifest = readManifest(delta.manifestText));
  need(manifest.modules.length >= 1, "E208"); // SPEC 3.8
  checkNames(manifest);
  manifest.modules.forEach((module) => checkModule(module, manifest.features.length > 0));
  await checkBaseDigest(manifest);
  await checkResult(manifest);
  checkAssets(manifest);
  checkTensors(delta.records, manifest);
  await checkPayload(delta);
  delta.contentId = `sha256:${await sha256(utf8.encode(delta.manifestText))}`;
  return delta;
}

// ---- Apply: SPEC 6 and 7 ----

const bitsOf = new Uint32Array(1);
const floatOf = new Float32Array(bitsOf.buffer);
const asFloat = (bits) => ((bitsOf[0] = bits), floatOf[0]);

function fromF16(bits) {
  const magnitude = bits & 0x7fff;
  const sign = bits & 0x8000 ? -1 : 1;
  if (magnitude >= 0x7c00) return magnitude > 0x7c00 ? NaN : sign * Infinity;
  const exponent = magnitude >> 10;
  const fraction = magnitude & 0x3ff;
  return sign * (exponent ? (fraction + 1024) * 2 ** (exponent - 25) : fraction * 2 ** -24);
}

const widen = { BF16: (bits) => asFloat(bits << 16), F16: fromF16, F32: asFloat };

/** bits / 2^shift, nearest, ties to even. */
function halve(bits, shift) {
  const kept = Math.floor(bits / 2 ** shift);
  const rest = bits - kept * 2 ** shift;
  const half = 2 ** (shift - 1);
  return kept + (rest > half || (rest === half && kept % 2 === 1) ? 1 : 0);
}

const CANONICAL_NAN = { BF16: 0x7fc0, F16: 0x7e00, F32: 0x7fc00000 };

/** A binary32 number in dtype, rounded once (SPEC 6.1, 6.2). */
function narrow(value, dtype) {
  if (Number.isNaN(value)) return CANONICAL_NAN[dtype];
  floatOf[0] = value;
  const all = bitsOf[0];
  if (dtype === "F32") return all;
  const sign = all >>> 31 << 15;
  const bits = all & 0x7fffffff;
  if (dtype === "BF16") return sign | halve(bits, 16);
  if (bits >= 0x47800000) return sign | 0x7c00; // 65536 and above; 65520 carries into infinity below
  if (bits >= 0x38800000) return sign | (halve(bits, 13) - (112 << 10));
  const shift = 126 - (bits >> 23); // a subnormal F16 counts in 2^-24
  return sign | (shift > 24 ? 0 : halve((bits & 0x7fffff) | 0x800000, shift));
}

/** SPEC 5.3: a function from the flat index of a weight to the term of component k. */
function termsOf(delta, module, k) {
  const { axis, exponent } = module.components[k];
  const width = module.covered.at(-1);
  const height = module.covered.at(-2);
  const signs = delta.signs(module, k);
  const scales = delta.scales(module, k).map((values) => Array.from(values, fromF16));
  const parts = AXES.get(axis);
  return (index) => {
    const row = Math.floor(index / width);
    const at = { row, col: Math.floor(row / height) * width + (index % width), scalar: 0 };
    // Products of two F16 and powers of two are exact in binary32, and so in binary64.
    const value = parts.reduce((product, part, i) => product * scales[i][at[part]], 2 ** exponent);
    return signs[index] ? value : -value;
  };
}

function rebuild(delta, module, base) {
  const { dtype, covered } = module;
  const size = BITS.get(dtype) / 8;
  const total = covered.reduce((product, dimension) => product * dimension, 1);
  if (module.encoding === "same" && dtype === module.base.dtype) return base.subarray(0, Number(bytesOf(dtype, covered))); // SPEC 6.3
  if (module.encoding === "exact") {
    const weights = base.slice(0, total * size);
    need(applyBlocks(weights, ...delta.update(module), dtype), "E405"); // SPEC 6.6
    return weights;
  }
  const baseSize = BITS.get(module.base.dtype) / 8;
  const held = words(base.subarray(0, total * baseSize), baseSize);
  const terms = module.components.map((_, k) => termsOf(delta, module, k));
  const made = new DataView(new ArrayBuffer(total * size));
  for (let i = 0; i < total; i++) {
    let a = widen[module.base.dtype](held[i]);
    for (const term of terms) a = Math.fround(a + term(i));
    const bits = narrow(a, dtype);
    if (size === 2) made.setUint16(2 * i, bits, true);
    else made.setUint32(4 * i, bits, true);
  }
  return new Uint8Array(made.buffer);
}

async function checkBase({ modules }, base) {
  const bound = modules.filter((module) => module.base);
  const found = bound.filter(({ name }) => base.has(name));
  need(found.length || !bound.length, "E401"); // SPEC 7.1
  need(found.length === bound.length, "E402");
  for (const { name, base: wanted } of bound) {
    const { dtype, shape } = base.get(name);
    need(dtype === wanted.dtype && sameShape(shape, wanted.shape), "E403"); // SPEC 7.2
  }
  for (const { name, base: wanted } of bound) need((await sha256(base.get(name).data)) === wanted.sha256, "E404"); // SPEC 7.3
}

/** The fine-tuned checkpoint. base: Map name -> {dtype, shape, data: Uint8Array}. Returns the same kind of Map. */
export async function apply(delta, base) {
  const { modules, tied } = delta.manifest;
  await checkBase(delta.manifest, base);
  const made = new Map();
  for (const module of modules) {
    const exact = delta.exact(module) ?? new Uint8Array(0); // SPEC 6.4
    const covered = module.encoding === "full" ? new Uint8Array(0) : rebuild(delta, module, base.get(module.name).data);
    const data = new Uint8Array(covered.length + exact.length);
    data.set(covered);
    data.set(exact, covered.length);
    if (module.encoding === "exact") need((await sha256(data)) === module.result, "E405"); // SPEC 7.4
    made.set(module.name, { dtype: module.dtype, shape: module.shape, data });
  }
  for (const [name, alias] of tied) made.set(alias, made.get(name)); // SPEC 6.5
  return made;
}

/** A record of a base, whether the manifest names it or not. */
function baseRecord(record) {
  const fits = (value) => array(value) && value.every((item) => integer(item) && item >= 0);
  need(record instanceof Map, null);
  const [dtype, shape, offsets] = ["dtype", "shape", "data_offsets"].map((key) => record.get(key));
  need(string(dtype) && fits(shape) && shape.length <= 64 && fits(offsets) && offsets.length === 2, null);
  const [begin, end] = offsets;
  need(begin <= end && (!BITS.has(dtype) || BigInt(end - begin) === bytesOf(dtype, shape)), null);
  return { dtype, shape, begin, end };
}

/** A plain safetensors file as a Map name -> {dtype, shape, data}; one that SPEC 7.5 refuses has no phase and no code. */
export function readSafetensors(bytes) {
  need(bytes.length >= 8, null);
  const length = new DataView(bytes.buffer, bytes.byteOffset, 8).getBigUint64(0, true);
  need(length <= 100000000n && length + 8n <= bytes.length, null);
  const data = bytes.subarray(8 + Number(length));
  let source;
  try {
    source = text.decode(bytes.subarray(8, 8 + Number(length)));
  } catch {
    throw new Rejection(null);
  }
  const json = new Json(source, [null, null, null, null], { loose: true });
  need(json.wellFormed, null);
  json.value.delete("__metadata__");
  const records = [...json.value].map(([name, record]) => ({ name, ...baseRecord(record) }));
  let at = 0;
  for (const { begin, end } of records.toSorted((a, b) => a.begin - b.begin || a.end - b.end)) {
    need(begin === at, null);
    at = end;
  }
  need(at === data.length, null);
  return new Map(records.map(({ name, dtype, shape, begin, end }) => [name, { dtype, shape, data: data.subarray(begin, end) }]));
}

/** The parts of a safetensors file of these tensors. */
export function writeSafetensors(tensors) {
  const header = {};
  const parts = [];
  let end = 0;
  for (const [name, { dtype, shape, data }] of tensors) {
    header[name] = { dtype, shape, data_offsets: [end, end + data.length] };
    end += data.length;
    parts.push(data);
  }
  // A name that looks like a number would move to the front of an object; written one by one they stay in order.
  const entries = [...tensors.keys()].map((name) => `${JSON.stringify(name)}:${JSON.stringify(header[name])}`);
  const json = utf8.encode(`{${entries.join(",")}}`);
  const start = new Uint8Array(8);
  new DataView(start.buffer).setBigUint64(0, BigInt(json.length), true);
  return [start, json, ...parts];
}
