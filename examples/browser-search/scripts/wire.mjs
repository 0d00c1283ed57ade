// npm run wire -- FOLDER: ways to send the model of an exported folder, in bytes and in milliseconds until its bytes are whole
// again: what browsers inflate by themselves, and a decoder of asymmetric numeral systems (rANS), which the page would bring.

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { brotliCompressSync, brotliDecompressSync, constants, gunzipSync, gzipSync } from "node:zlib";

const BITS = 12; // of a probability
const LOW = 1 << 23; // states are at least this

/** Frequencies of the 256 bytes that sum to 2^BITS; none that occurs is 0. */
function frequencies(block) {
  const counts = new Uint32Array(256);
  for (const byte of block) counts[byte]++;
  const scaled = Uint16Array.from(counts, (count) => count && Math.max(1, Math.floor((count * (1 << BITS)) / block.length)));
  let most = scaled.indexOf(Math.max(...scaled));
  let missing = (1 << BITS) - scaled.reduce((sum, value) => sum + value, 0);
  while (missing < 0) {
    most = scaled.indexOf(Math.max(...scaled));
    scaled[most]--;
    missing++;
  }
  scaled[most] += missing;
  return scaled;
}

function starts(scaled) {
  const start = new Uint16Array(257);
  for (let byte = 0; byte < 256; byte++) start[byte + 1] = start[byte] + scaled[byte];
  return start;
}

/** A block as its table (a bit a byte value, then 2 bytes a value that occurs), its state and its bytes. */
function encodeBlock(block) {
  const scaled = frequencies(block);
  const start = starts(scaled);
  const out = [];
  let state = LOW;
  for (let place = block.length - 1; place >= 0; place--) {
    const frequency = scaled[block[place]];
    const limit = (LOW >>> BITS) * 256 * frequency;
    while (state >= limit) {
      out.push(state & 255);
      state >>>= 8;
    }
    state = Math.floor(state / frequency) * (1 << BITS) + (state % frequency) + start[block[place]];
  }
  return { scaled, state, bytes: Uint8Array.from(out.reverse()), length: block.length, wire: 32 + 2 * scaled.filter(Boolean).length + 8 + out.length };
}

function decodeBlock({ scaled, state, bytes, length }, out, at) {
  const start = starts(scaled);
  const symbols = new Uint8Array(1 << BITS);
  for (let byte = 0; byte < 256; byte++) symbols.fill(byte, start[byte], start[byte + 1]);
  let read = 0;
  for (let place = 0; place < length; place++) {
    const slot = state & ((1 << BITS) - 1);
    const byte = symbols[slot];
    out[at + place] = byte;
    state = scaled[byte] * (state >>> BITS) + slot - start[byte];
    while (state < LOW) state = ((state << 8) | bytes[read++]) >>> 0;
  }
}

function rans(bytes, size) {
  const blocks = [];
  for (let at = 0; at < bytes.length; at += size) blocks.push(encodeBlock(bytes.subarray(at, at + size)));
  return blocks;
}

function unrans(blocks, length) {
  const out = new Uint8Array(length);
  let at = 0;
  for (const block of blocks) {
    decodeBlock(block, out, at);
    at += block.length;
  }
  return out;
}

const [folder] = process.argv.slice(2);
const bytes = await readFile(join(folder, "onnx", "model_quantized.onnx"));

function report(way, wire, decode) {
  const times = [];
  for (let run = 0; run < 5; run++) {
    const started = performance.now();
    if (Buffer.compare(Buffer.from(decode()), bytes)) throw new Error(`${way} gives other bytes back`);
    times.push(performance.now() - started);
  }
  times.sort((one, other) => one - other);
  console.log(`${way.padEnd(34)}${wire.toLocaleString("en").padStart(12)} bytes ${times[2].toFixed(0).padStart(6)} ms`);
}

report("as it is", bytes.length, () => bytes);
for (const [name, strategy] of [["gzip -9", constants.Z_DEFAULT_STRATEGY], ["gzip, Huffman codes alone", constants.Z_HUFFMAN_ONLY], ["gzip, Huffman codes and runs", constants.Z_RLE]]) {
  const packed = gzipSync(bytes, { level: 9, memLevel: 9, strategy });
  report(name, packed.length, () => gunzipSync(packed));
}
const packed = brotliCompressSync(bytes, { params: { [constants.BROTLI_PARAM_LGWIN]: 24 } });
report("brotli 11", packed.length, () => brotliDecompressSync(packed));
for (const size of [1 << 14, 1 << 15, 1 << 16, 1 << 18]) {
  const blocks = rans(bytes, size);
  report(`rANS, a table each ${size / 1024} KB`, blocks.reduce((sum, block) => sum + block.wire, 0), () => unrans(blocks, bytes.length));
}
