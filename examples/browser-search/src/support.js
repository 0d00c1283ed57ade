// What the page needs of a browser.

/** The smallest module with a vector instruction; browsers without them call it invalid. */
const SIMD = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];

/** @returns {string|null} what is missing, in plain words */
export function whatIsMissing({ WebAssembly, DecompressionStream, Worker }) {
  if (!WebAssembly) return "This browser does not run WebAssembly, or it is switched off. The model needs it: try a current Firefox, Chrome, Edge or Safari.";
  if (!WebAssembly.validate(Uint8Array.from(SIMD))) return "The WebAssembly of this browser has no vector instructions. The model needs them: update the browser.";
  if (!DecompressionStream || !Worker) return "This browser is too old to unpack the model. Update it, or try a current Firefox, Chrome, Edge or Safari.";
  return null;
}
