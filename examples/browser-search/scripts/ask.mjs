// node scripts/ask.mjs DIST DOCUMENT QUERY...: opens a document in the built page and asks it; prints a JSON line for each
// query: the passages that the page shows with their scores.

import { findChromium, startChromium } from "./chromium.mjs";
import { serve } from "./serve.mjs";

const [dist, document, ...queries] = process.argv.slice(2);
if (!queries.length || !findChromium()) {
  console.error(queries.length ? "There is no Chromium; name one with CHROMIUM=/path." : "node scripts/ask.mjs DIST DOCUMENT QUERY...");
  process.exit(2);
}
const server = await serve(dist, 0);
const browser = await startChromium();
try {
  const page = await browser.newPage();
  page.setDefaultTimeout(0);
  await page.goto(`http://127.0.0.1:${server.address().port}/`);
  await page.locator("#file").setInputFiles(document);
  await page.waitForFunction(() => / read in /.test(globalThis.document.getElementById("status").textContent));
  for (const query of queries) {
    await page.getByRole("searchbox").fill(query);
    await page.waitForFunction((asked) => performance.getEntriesByName("query").at(-1)?.detail.query === asked, query);
    const hits = await page.locator("#results a").evaluateAll((links) =>
      links.map((link) => ({ passage: Number(link.hash.split("-")[1]), score: Number(link.querySelector(".score").textContent.match(/[-\d.]+$/)[0]) })),
    );
    console.log(JSON.stringify({ query, hits }));
  }
} finally {
  await browser.close();
  server.close();
}
