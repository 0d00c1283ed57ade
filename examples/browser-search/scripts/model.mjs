// npm run model -- FOLDER [OUT]: takes a folder that `hpr export MODEL --to onnx -o FOLDER` wrote and puts what the page
// downloads into OUT (public/model): the model and its tokenizer as gzip, and a manifest of their sizes.

import { createHash } from "node:crypto";
import { mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { join, resolve } from "node:path";
import { constants, gzipSync } from "node:zlib";
import * as ort from "onnxruntime-web";

/** Sentence encoders were trained on no more, whatever their tables hold. */
const MOST_POSITIONS = 256;
const INPUTS = ["attention_mask", "input_ids", "token_type_ids"];
const MODEL = "onnx/model_quantized.onnx";
const PUBLIC = resolve(import.meta.dirname, "..", "public", "model");

function stop(message) {
  console.error(message);
  process.exit(2);
}

async function read(folder, name) {
  try {
    return await readFile(join(folder, name));
  } catch (error) {
    if (error.code !== "ENOENT") throw error;
    return stop(`${join(folder, name)} does not exist. Write the folder with: hpr export MODEL --to onnx -o ${folder}`);
  }
}

/** Runs two tokens through the runtime of the page: a model with an operator it lacks is refused here, not in a visitor's tab. */
async function check(model) {
  const session = await ort.InferenceSession.create(model);
  const names = [...session.inputNames].sort();
  if (names.join() !== INPUTS.join()) stop(`The model reads ${names.join(", ")}; the page gives ${INPUTS.join(", ")}.`);
  const two = (value) => new ort.Tensor("int64", BigInt64Array.from([value, value]), [1, 2]);
  const { last_hidden_state: states } = await session.run({ input_ids: two(101n), attention_mask: two(1n), token_type_ids: two(0n) });
  if (states?.dims.length !== 3) stop(`The model gives ${session.outputNames.join(", ")}; the page reads last_hidden_state.`);
}

/** Planned integers have short runs of zeros and repeat only by chance, so that looking for what repeats costs 5 to 10 %. */
function gzipped(bytes) {
  const { Z_DEFAULT_STRATEGY, Z_RLE } = constants;
  const packed = [Z_DEFAULT_STRATEGY, Z_RLE].map((strategy) => gzipSync(bytes, { level: 9, memLevel: 9, strategy }));
  return packed.reduce((least, other) => (other.length < least.length ? other : least));
}

async function main([folder, out = PUBLIC]) {
  if (!folder) stop("Name the exported folder: npm run model -- FOLDER");
  const model = await read(folder, MODEL);
  const tokenizer = await read(folder, "tokenizer.json");
  const config = JSON.parse(await read(folder, "config.json"));
  await check(model);

  await rm(out, { recursive: true, force: true });
  await mkdir(out, { recursive: true });
  const pack = async (bytes, stem) => {
    const packed = gzipped(bytes);
    // The name changes with the content, so that browsers may keep it for ever.
    const path = `${stem}-${createHash("sha256").update(bytes).digest("hex").slice(0, 10)}.bin`;
    await writeFile(join(out, path), packed);
    console.log(`${path}: ${bytes.length.toLocaleString("en")} bytes, ${packed.length.toLocaleString("en")} as gzip`);
    return { path, bytes: bytes.length, gzip: packed.length };
  };
  const manifest = {
    positions: Math.min(MOST_POSITIONS, config.max_position_embeddings),
    model: await pack(model, "model"),
    tokenizer: await pack(tokenizer, "tokenizer"),
  };
  await writeFile(join(out, "manifest.json"), `${JSON.stringify(manifest, null, 2)}\n`);
}

await main(process.argv.slice(2));
