// The engine: holds the model and the index, away from the thread that draws, so that typing never waits.
//
// It is told {type: "load", manifest}, {type: "index", document, passages} and {type: "search", document, query, most}; it tells
// "downloading", "ready", "indexed", "results" and "failed".

import * as ort from "onnxruntime-web/wasm";
import glue from "onnxruntime-web/ort-wasm-simd-threaded.mjs?url";
import runtime from "onnxruntime-web/ort-wasm-simd-threaded.wasm?url";
import { download, readManifest } from "./download.js";
import { Encoder } from "./encoder.js";
import { rank } from "./ranking.js";

let encoder = null;
let index = newIndex(null, []);
let asked = null; // the newest query; older ones that were not begun are never answered
let lastQuery = { text: null, vector: null };
let working = false;

onmessage = ({ data: message }) => {
  if (message.type === "load") load(message.manifest).catch(failed);
  else if (message.type === "index") {
    index = newIndex(message.document, message.passages);
    asked = null;
    work();
  } else if (message.type === "search") {
    asked = message;
    work();
  }
};

function failed(error) {
  postMessage({ type: "failed", message: error.message });
}

async function load(manifestUrl) {
  const manifest = await readManifest(manifestUrl);
  const files = [manifest.model, manifest.tokenizer];
  const progress = files.map((file) => ({ loaded: 0, total: file.gzip }));
  const sum = (key) => progress.reduce((all, one) => all + one[key], 0);
  const started = performance.now();
  const [model, tokenizer] = await Promise.all(
    files.map((file, place) =>
      download(new URL(file.path, manifestUrl).href, file, (loaded, total) => {
        progress[place] = { loaded, total };
        postMessage({ type: "downloading", loaded: sum("loaded"), total: sum("total") });
      }),
    ),
  );
  const downloaded = performance.now();

  // Threads need memory that is shared, which browsers give only to pages served with COOP and COEP. They wait for each other
  // at every product, so that one whose core is taken by other work holds up all: half of the cores are left to that.
  const threads = self.crossOriginIsolated ? Math.min(4, Math.ceil((navigator.hardwareConcurrency ?? 1) / 2)) : 1;
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = { mjs: new URL(glue, import.meta.url).href, wasm: new URL(runtime, import.meta.url).href };
  const session = await ort.InferenceSession.create(model.bytes, { executionProviders: ["wasm"] });
  encoder = new Encoder(ort, session, JSON.parse(new TextDecoder().decode(tokenizer.bytes)), manifest.positions);
  await encoder.encode("warm up");
  postMessage({
    type: "ready",
    wire: model.wire + tokenizer.wire,
    bytes: model.bytes.length,
    threads,
    milliseconds: { download: downloaded - started, start: performance.now() - downloaded },
  });
  work();
}

function newIndex(document, passages) {
  return { document, passages, rows: [], busy: 0, told: 0, shown: [], most: 0 };
}

/**
 * One thing at a time, the most urgent first: the newest query; the sentences of the passages it found, of which the nearest
 * is marked; passages not yet read; all other sentences.
 */
async function work() {
  if (working || !encoder) return;
  working = true;
  try {
    while (true) {
      const unmarked = index.shown.find((passage) => !index.rows[passage].sentences);
      const unread = index.rows.length < index.passages.length;
      const rest = unread ? -1 : index.rows.findIndex((row) => !row.sentences);
      if (asked) await answer();
      else if (unmarked !== undefined) await readSentence(index, unmarked);
      else if (unread) await readPassage(index);
      else if (rest >= 0) await readSentence(index, rest);
      else break;
      await newMessages();
    }
  } catch (error) {
    failed(error);
  } finally {
    working = false;
  }
}

async function readPassage(current) {
  const started = performance.now();
  const { heading, sentences } = current.passages[current.rows.length];
  const vector = await encoder.encode([heading, ...sentences].join(" "));
  current.busy += performance.now() - started;
  current.rows.push({ vector, sentences: null, begun: [] });
  const [done, total] = [current.rows.length, current.passages.length];
  if (done < total && performance.now() - current.told < 100) return;
  current.told = performance.now();
  postMessage({ type: "indexed", document: current.document, done, total, milliseconds: current.busy });
}

/** Reads one more sentence, so that a query waits for no more than that. */
async function readSentence(current, passage) {
  const row = current.rows[passage];
  const { sentences } = current.passages[passage];
  row.begun.push(await encoder.encode(sentences[row.begun.length]));
  if (row.begun.length < sentences.length) return;
  row.sentences = row.begun;
  const marked = current.shown.includes(passage) && current.shown.every((other) => current.rows[other].sentences);
  if (marked && !asked) tell(current, rank(lastQuery.vector, current.rows, current.most), null);
}

async function answer() {
  const { query, most } = asked;
  asked = null;
  const current = index;
  const started = performance.now();
  const known = query === lastQuery.text;
  if (!known) lastQuery = { text: query, vector: await encoder.encode(query) };
  const encoded = performance.now();
  const found = rank(lastQuery.vector, current.rows, most);
  current.most = most;
  current.shown = found.hits.map((hit) => hit.passage);
  tell(current, found, known ? null : { encode: encoded - started, rank: performance.now() - encoded });
}

function tell({ document, rows }, { hits, scores }, milliseconds) {
  postMessage({ type: "results", document, query: lastQuery.text, hits, scores, indexed: rows.length, milliseconds });
}

/** Lets messages that arrived meanwhile be heard; a timer would wait for 4 ms each time. */
function newMessages() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}
