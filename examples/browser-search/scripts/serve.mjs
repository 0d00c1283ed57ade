// Serves dist/ as a host should: compressed, kept for ever where the name changes with the content, and isolated so that the
// model may use several threads. npm start, or PORT=8080 npm start.

import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, normalize, resolve, sep } from "node:path";
import { HEADERS } from "./headers.mjs";

export const DIST = resolve(import.meta.dirname, "..", "dist");
const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript",
  ".mjs": "text/javascript",
  ".css": "text/css",
  ".wasm": "application/wasm",
  ".json": "application/json",
  ".bin": "application/octet-stream",
};

const size = async (path) => (await stat(path).catch(() => null))?.size;

async function answer(folder, headers, request, response) {
  let path;
  try {
    path = normalize(join(folder, decodeURIComponent(new URL(request.url, "http://localhost").pathname)));
  } catch (error) {
    if (!(error instanceof URIError)) throw error;
    return response.writeHead(400).end();
  }
  if (path === folder + sep) path = join(folder, "index.html");
  if (!path.startsWith(folder + sep) || !(extname(path) in TYPES) || (await size(path)) === undefined) return response.writeHead(404).end("Not found");
  const packed = /\bbr\b/.test(request.headers["accept-encoding"] ?? "") && (await size(`${path}.br`));
  const hashed = /-[\w-]{8,}\.[\w.]+$/.test(path);
  const sent = {
    ...headers,
    "Content-Type": TYPES[extname(path)],
    "Content-Length": packed || (await size(path)),
    "Cache-Control": hashed ? "public, max-age=31536000, immutable" : "no-cache",
    Vary: "Accept-Encoding",
    ...(packed && { "Content-Encoding": "br" }),
  };
  for (const [name, value] of Object.entries(sent)) response.setHeader(name, value);
  return createReadStream(packed ? `${path}.br` : path).pipe(response);
}

/**
 * @param {string} folder the built page
 * @param {number} port 0 for a free one
 * @param {object} headers sent with every file
 * @returns {Promise<import("node:http").Server>} a server that listens
 */
export function serve(folder, port, headers = HEADERS) {
  return new Promise((listening, fail) => {
    const server = createServer((request, response) => answer(folder, headers, request, response).catch(fail));
    server.on("error", fail).listen(port, "127.0.0.1", () => listening(server));
  });
}

if (process.argv[1] === import.meta.filename) {
  const server = await serve(DIST, Number(process.env.PORT ?? 4173));
  console.log(`http://127.0.0.1:${server.address().port}/`);
}
