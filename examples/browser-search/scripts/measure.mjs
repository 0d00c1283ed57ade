// npm run measure [-- DIST]: what a visitor of the built page downloads and waits for, in the installed Chromium over loopback,
// with threads (as npm start serves it) and without (as a host that sends no COOP and COEP does). Prints JSON and leaves
// screenshots in test/output.

import { mkdir } from "node:fs/promises";
import { availableParallelism, loadavg } from "node:os";
import { join, resolve } from "node:path";
import { PHONE, startChromium, waitUntilRead, WIDE } from "./chromium.mjs";
import { HEADERS } from "./headers.mjs";
import { DIST, serve } from "./serve.mjs";

const QUERIES = ["who do I call when someone breaks a leg", "can I bring my dog", "is it safe to go swimming", "I have a peanut allergy", "where can I wash my clothes", "video chat with my family"];
const dist = resolve(process.argv[2] ?? DIST);
const pictures = resolve(import.meta.dirname, "..", "test", "output");
await mkdir(pictures, { recursive: true });

const quantile = (values, share) => [...values].sort((one, other) => one - other)[Math.floor((values.length - 1) * share)];
const spread = (values) => ({ median: round(quantile(values, 0.5)), p90: round(quantile(values, 0.9)) });
const round = (value) => Math.round(value * 10) / 10;

async function visit(browser, headers) {
  const server = await serve(dist, 0, headers);
  const sent = {};
  server.prependListener("request", (request, response) => {
    response.on("finish", () => (sent[request.url.replace(/-[\w-]{8,}(?=\.)/, "")] = response.getHeader("Content-Length") ?? 0));
  });
  const context = await browser.newContext(WIDE);
  const page = await context.newPage();
  page.setDefaultTimeout(0);
  const started = performance.now();
  await page.goto(`http://127.0.0.1:${server.address().port}/`);
  await page.waitForFunction(() => document.getElementById("engine").dataset.state === "ready");
  const ready = performance.now() - started;
  const bytes = { ...sent };
  await page.getByRole("button", { name: "Try the sample" }).click();
  await waitUntilRead(page);
  const passages = await page.locator("#status").textContent();
  const passage = await page.locator("#fact-passage").textContent();
  for (const query of QUERIES) {
    await page.getByRole("searchbox").fill("");
    await page.getByRole("searchbox").pressSequentially(query, { delay: 90 });
    await page.waitForFunction((asked) => performance.getEntriesByName("query").at(-1)?.detail.query === asked, query);
    await page.waitForFunction(() => document.querySelector("#results mark"));
  }
  const queries = await page.evaluate(() => performance.getEntriesByName("query").map(({ duration, detail }) => ({ duration, ...detail })));
  const memory = headers === HEADERS ? (await page.evaluate(() => performance.measureUserAgentSpecificMemory())).bytes : undefined;
  await context.close();
  server.close();
  return {
    bytes,
    total: Object.values(bytes).reduce((sum, value) => sum + value, 0),
    readyMilliseconds: round(ready),
    passages,
    passage,
    queries: queries.length,
    encodeMilliseconds: spread(queries.map((query) => query.encode)),
    rankMilliseconds: spread(queries.map((query) => query.rank)),
    keyToResultMilliseconds: spread(queries.map((query) => query.duration)),
    memory,
  };
}

async function photograph(browser, name, options) {
  const server = await serve(dist, 0);
  const context = await browser.newContext(options);
  const page = await context.newPage();
  page.setDefaultTimeout(0);
  const shoot = (view) => page.screenshot({ path: join(pictures, `${name}-${view}.png`) });
  await page.goto(`http://127.0.0.1:${server.address().port}/`);
  await page.waitForFunction(() => document.getElementById("engine").dataset.state === "ready");
  await shoot("start");
  await page.getByRole("button", { name: "Try the sample" }).click();
  await waitUntilRead(page);
  await shoot("ideas");
  await page.getByRole("searchbox").fill(QUERIES[0]);
  await page.waitForFunction(() => document.querySelector("#results li") && !document.querySelector("#results li:not(:has(mark))"));
  await shoot("results");
  if (options.isMobile) {
    await page.locator("#results a").first().tap();
    await page.waitForTimeout(1000); // until it has scrolled
    await shoot("text");
  }
  await context.close();
  server.close();
}

const browser = await startChromium();
try {
  const load = loadavg()[0];
  const measured = { chromium: browser.version(), cores: availableParallelism(), load, threads: await visit(browser, HEADERS), oneThread: await visit(browser, {}) };
  console.log(JSON.stringify(measured, null, 2));
  for (const [name, options] of Object.entries({ wide: WIDE, phone: PHONE })) {
    await photograph(browser, name, options);
    await photograph(browser, `${name}-dark`, { ...options, colorScheme: "dark" });
  }
} finally {
  await browser.close();
}
