/** Pages served with these may share memory between threads. */
export const HEADERS = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };

/** The browser itself holds the page to its word: nothing comes from elsewhere, and nothing goes there. */
export const POLICY =
  "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:; style-src 'self'; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'";
