#!/usr/bin/env node
// Protocol v1 around pxd.js: node adapter.js caps | decode | apply | serve
import { createHash, webcrypto } from "node:crypto";
import { readFileSync, renameSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { Rejection, apply, parse, readSafetensors, writeSafetensors } from "./pxd.js";

globalThis.crypto ??= webcrypto;

const CAPS = {
  protocol: 1, implementation: "pxd.js", version: "1.0", spec: ["1.0"], features: ["exact"], operations: ["decode", "apply", "dump", "serve"],
};
const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");
const joined = (arrays) => Buffer.concat(arrays.map((held) => Buffer.from(held.buffer, held.byteOffset, held.byteLength)));

function load(path) {
  const about = statSync(path, { bigint: true });
  if (!about.isFile()) throw new Rejection("E101"); // SPEC 2.1
  if (about.size >= 1n << 53n) throw new Rejection("E102");
  return parse(readFileSync(path));
}

function describe(delta, module, index, folder) {
  const save = (word, bytes) => {
    if (folder) writeFileSync(join(folder, `${index}.${word}`), bytes);
    return sha256(bytes);
  };
  const components = module.components.map(({ axis, exponent }, k) => ({
    axis, exponent, signs_sha256: save(`${k}.signs`, delta.signs(module, k)), scales_sha256: save(`${k}.scales`, joined(delta.scales(module, k))),
  }));
  const exact = delta.exact(module);
  const { name, dtype, shape, encoding } = module;
  const said = { name, dtype, shape, encoding, components, exact_sha256: exact && save("exact", exact) };
  if (encoding !== "exact") return said;
  const [blocks, data] = delta.update(module);
  return { ...said, index_sha256: sha256(blocks), data_sha256: sha256(data), result_sha256: module.result };
}

async function decode(path, folder) {
  const delta = await load(path);
  const { modules, tied, dropped, assets, metadata, previous, result } = delta.manifest;
  return {
    ok: true, content_id: delta.contentId, modules: modules.map((module, i) => describe(delta, module, i, folder)), tied, dropped,
    assets: assets.map(({ path: name, sha256: sum, records: [record] }) => ({ path: name, size: record.end - record.begin, sha256: sum })),
    metadata: Object.fromEntries(metadata), previous, result,
  };
}

async function run(path, base, out) {
  const delta = await load(path);
  if (!statSync(base, { throwIfNoEntry: false })?.isFile()) throw new Rejection(null); // SPEC 7.5
  const tensors = await apply(delta, readSafetensors(readFileSync(base)));
  writeFileSync(`${out}.part`, joined(writeSafetensors(tensors)));
  renameSync(`${out}.part`, out);
  return { ok: true };
}

async function answer(argv) {
  const [operation, file, first, one, second, two] = argv;
  try {
    if (operation === "caps" && argv.length === 1) return [0, CAPS];
    if (operation === "decode" && argv.length === 2) return [0, await decode(file)];
    if (operation === "decode" && argv.length === 4 && first === "--dump") return [0, await decode(file, one)];
    if (operation === "apply" && argv.length === 6 && first === "--base" && second === "--out") return [0, await run(file, one, two)];
    return [77, { ok: false }];
  } catch (error) {
    if (!(error instanceof Rejection)) throw error;
    return [1, { ok: false, phase: error.phase, code: error.code }];
  }
}

async function serve() {
  for await (const line of createInterface({ input: process.stdin })) {
    const { id, argv } = JSON.parse(line);
    const [exit, result] = await answer(argv).catch((error) => [70, { error: String(error) }]);
    process.stdout.write(`${JSON.stringify({ id, exit, result })}\n`);
  }
}

const argv = process.argv.slice(2);
if (argv[0] === "serve") {
  await serve();
} else {
  const [exit, result] = await answer(argv);
  process.stdout.write(`${JSON.stringify(result)}\n`);
  process.exitCode = exit;
}
