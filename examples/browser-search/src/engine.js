// The page's side of the worker: sends it work and tells what comes back, as events with the worker's messages in `detail`.

export class Engine extends EventTarget {
  #worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  #document = 0;
  #asked = null;

  constructor() {
    super();
    this.#worker.onmessage = ({ data }) => this.#hear(data);
    this.#worker.onerror = (event) => this.#hear({ type: "failed", message: `The engine stopped: ${event.message ?? "its script could not be loaded"}.` });
  }

  load(manifest) {
    this.#worker.postMessage({ type: "load", manifest });
  }

  /** @param {{heading: string, sentences: string[]}[]} passages */
  index(passages) {
    this.#document++;
    this.#asked = null;
    this.#worker.postMessage({ type: "index", document: this.#document, passages });
  }

  search(query, most) {
    this.#asked = { query, most, at: performance.now() };
    this.#send();
  }

  /** Asks again what was asked last, of an index that has grown. */
  repeat() {
    if (this.#asked) this.#send();
  }

  #send() {
    const { query, most } = this.#asked;
    this.#worker.postMessage({ type: "search", document: this.#document, query, most });
  }

  #hear({ type, ...detail }) {
    if ("document" in detail && detail.document !== this.#document) return; // an answer about the document before
    if (type === "results" && detail.query === this.#asked?.query) {
      if (detail.milliseconds) {
        const start = this.#asked.at;
        this.#asked.waited = performance.now() - start;
        performance.measure("query", { start, detail: { query: detail.query, ...detail.milliseconds } });
      }
      detail.waited = this.#asked.waited;
    }
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
