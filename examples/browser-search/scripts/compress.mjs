// Writes file.br beside each file of dist/ (or the folder named) that gains from it, for servers that send such files.

import { readdir, readFile, writeFile } from "node:fs/promises";
import { extname, join, resolve } from "node:path";
import { brotliCompressSync, constants, gunzipSync } from "node:zlib";

const COMPRESSIBLE = new Set([".html", ".js", ".mjs", ".css", ".wasm", ".json", ".bin"]);
const dist = resolve(process.argv[2] ?? join(import.meta.dirname, "..", "dist"));

for (const entry of await readdir(dist, { recursive: true, withFileTypes: true })) {
  if (!entry.isFile() || !COMPRESSIBLE.has(extname(entry.name))) continue;
  const path = join(entry.parentPath, entry.name);
  const stored = await readFile(path);
  const bytes = extname(path) === ".bin" ? gunzipSync(stored) : stored; // the model: see src/download.js
  const packed = brotliCompressSync(bytes, { params: { [constants.BROTLI_PARAM_QUALITY]: 10, [constants.BROTLI_PARAM_LGWIN]: 24 } });
  if (packed.length < stored.length) await writeFile(`${path}.br`, packed);
}
