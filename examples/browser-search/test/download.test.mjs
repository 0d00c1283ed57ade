import assert from "node:assert/strict";
import { createServer } from "node:http";
import { after, before, test } from "node:test";
import { brotliCompressSync, gzipSync } from "node:zlib";
import { download, DownloadError, readManifest } from "../src/download.js";

const content = new Uint8Array(300_000).map((_, place) => (place * 7) % 251);
const packed = gzipSync(content);
const brotli = brotliCompressSync(content);
const sizes = { bytes: content.length, gzip: packed.length };
let server;
let base;

before(async () => {
  server = createServer((request, response) => {
    const pages = {
      "/gzip": () => response.end(packed),
      "/brotli": () => response.writeHead(200, { "Content-Encoding": "br", "Content-Length": brotli.length }).end(brotli),
      "/broken": () => response.end(packed.subarray(0, 100)),
      "/short": () => response.end(gzipSync(content.subarray(0, 1000))),
      "/other": () => response.end(content),
      "/page": () => response.end("<!doctype html>"),
    };
    (pages[request.url] ?? (() => response.writeHead(404).end()))();
  });
  await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
  base = `http://127.0.0.1:${server.address().port}`;
});
after(() => server.close());

for (const way of ["gzip", "brotli"]) {
  test(`${way} arrives as it was, and the bytes over the wire are counted`, async () => {
    let told;
    const { bytes, wire } = await download(`${base}/${way}`, sizes, (loaded, total) => (told = [loaded, total]));
    assert.deepEqual(bytes, content);
    assert.equal(wire, way === "gzip" ? packed.length : brotli.length);
    assert.deepEqual(told, [wire, wire]);
  });
}

test("a file that breaks off, is too long or is missing is refused with the reason", async () => {
  const refused = (pattern) => (error) => error instanceof DownloadError && pattern.test(error.message);
  await assert.rejects(download(`${base}/broken`, sizes), refused(/broke off after 100 bytes/));
  await assert.rejects(download(`${base}/other`, sizes), refused(/is damaged/));
  await assert.rejects(download(`${base}/short`, sizes), refused(/broke off after 1000 of 300000 bytes/));
  await assert.rejects(download(`${base}/gzip`, { ...sizes, bytes: 10 }), refused(/longer than the 10 bytes/));
  await assert.rejects(download(`${base}/nothing`, sizes), refused(/answered 404/));
  await assert.rejects(readManifest(`${base}/page`), refused(/no model here yet/));
  await assert.rejects(readManifest(`${base}/nothing`), refused(/answered 404/));
});
