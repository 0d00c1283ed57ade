// Fetches files of the model, tells how far it is, and inflates what the browser did not.

/** Says in plain words why a file did not arrive. */
export class DownloadError extends Error {}

/** What `npm run model` wrote: the files and their sizes. */
export async function readManifest(url) {
  const text = await (await request(url)).text();
  // Some servers answer a missing file with the page itself.
  if (text.startsWith("<")) throw new DownloadError("There is no model here yet. Build one: npm run model -- FOLDER.");
  return JSON.parse(text);
}

/**
 * A file is stored as gzip, which any host can serve and the page inflates. A host that keeps the brotli beside it sends that
 * with `Content-Encoding: br`, and the browser has inflated it before the page sees it.
 * @param {string} url
 * @param {{bytes: number, gzip: number}} file its sizes, by the manifest
 * @param {(loaded: number, total: number) => void} onProgress hears the bytes over the wire, after every piece
 * @returns {Promise<{bytes: Uint8Array, wire: number}>} what it holds, and the bytes it took
 */
export async function download(url, file, onProgress = () => {}) {
  const response = await request(url);
  const inflated = response.headers.get("Content-Encoding") === "br";
  const wire = Number(response.headers.get("Content-Length")) || file.gzip;
  let loaded = 0;
  const counted = response.body.pipeThrough(
    new TransformStream({
      transform(piece, controller) {
        loaded += piece.length;
        onProgress(inflated ? (loaded * wire) / file.bytes : loaded, wire);
        controller.enqueue(piece);
      },
    }),
  );
  try {
    return { bytes: await collect(inflated ? counted : counted.pipeThrough(new DecompressionStream("gzip")), file.bytes, url), wire };
  } catch (error) {
    if (error instanceof DownloadError) throw error;
    throw new DownloadError(`${url} is damaged or broke off after ${loaded} bytes. Load the page again.`, { cause: error });
  }
}

async function request(url) {
  let response;
  try {
    response = await fetch(url);
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    throw new DownloadError("The model could not be downloaded: there is no connection to the server.");
  }
  if (!response.ok) throw new DownloadError(`The model could not be downloaded: the server answered ${response.status} for ${url}.`);
  return response;
}

/** Writes into one array of the size that the manifest gives, so that a large file is never held twice. */
async function collect(stream, size, url) {
  const bytes = new Uint8Array(size);
  let filled = 0;
  for (const reader = stream.getReader(); ; ) {
    const { value, done } = await reader.read();
    if (done) break;
    if (filled + value.length > size) throw new DownloadError(`${url} is longer than the ${size} bytes of the manifest. Build the model again.`);
    bytes.set(value, filled);
    filled += value.length;
  }
  if (filled !== size) throw new DownloadError(`${url} broke off after ${filled} of ${size} bytes. Load the page again.`);
  return bytes;
}
