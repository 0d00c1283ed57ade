import { defineConfig } from "vite";
import { HEADERS, POLICY } from "./scripts/headers.mjs";

/** The policy is part of the built page, so that it holds on any host; the development server injects styles, which it forbids. */
const policy = {
  name: "content-security-policy",
  apply: "build",
  transformIndexHtml: () => [{ tag: "meta", attrs: { "http-equiv": "Content-Security-Policy", content: POLICY }, injectTo: "head-prepend" }],
};

export default defineConfig({
  base: "./",
  plugins: [policy],
  resolve: { conditions: ["onnxruntime-web-use-extern-wasm"] },
  worker: { format: "es" },
  build: { target: "es2022", assetsInlineLimit: 0 },
  server: { headers: HEADERS },
});
