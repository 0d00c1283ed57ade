// Drives the built page in Chromium. Skipped where there is no Chromium, or no page with a model: npm run model, npm run build.

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { after, afterEach, before, beforeEach, suite, test } from "node:test";
import { findChromium, PHONE, startChromium, waitUntilRead, WIDE } from "../scripts/chromium.mjs";
import { DIST, serve } from "../scripts/serve.mjs";

const dist = process.env.DIST ?? DIST;
const skip =
  (!findChromium() && "there is no Chromium; name one with CHROMIUM=/path") ||
  (!existsSync(join(dist, "model", "manifest.json")) && `${dist} has no page with a model: npm run model -- FOLDER && npm run build`);

suite("the page", { skip }, () => {
  let server, browser, base, page, requests, complaints;

  before(async () => {
    server = await serve(dist, 0);
    base = `http://127.0.0.1:${server.address().port}/`;
    browser = await startChromium();
  });
  after(async () => {
    await browser?.close();
    server?.close();
  });

  async function open(options = WIDE, prepare = () => {}) {
    const context = await browser.newContext(options);
    page = await context.newPage();
    page.setDefaultTimeout(0);
    requests = [];
    complaints = [];
    context.on("request", (request) => requests.push(request.url()));
    page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
    page.on("pageerror", (error) => complaints.push(error.message));
    await prepare(page);
    await page.goto(base);
  }
  async function openSample(options) {
    await open(options);
    await page.getByRole("button", { name: "Try the sample" }).click();
    await waitUntilRead(page);
  }
  const drop = (name, content) => page.locator("#file").setInputFiles({ name, mimeType: "text/plain", buffer: Buffer.from(content) });
  const alert = () => page.getByRole("alert").filter({ visible: true }).locator("p").textContent();
  const first = () => page.locator("#results li").first();
  const answered = (query) => page.waitForFunction((asked) => performance.getEntriesByName("query").at(-1)?.detail.query === asked, query);
  const marked = () => first().locator("mark").textContent();

  beforeEach(() => (page = null));
  afterEach(() => page?.context().close());

  test("finds by meaning as the visitor types, marks the sentence and says what it took", async () => {
    await openSample();
    await page.getByRole("searchbox").pressSequentially("someone has broken a leg");
    await answered("someone has broken a leg");
    assert.match(await first().textContent(), /When somebody is hurt/);
    assert.ok((await marked()).length > 10);
    assert.match(await page.locator("#status").textContent(), /\d+ ms from key to result/);
    assert.match(await page.locator("#fact-query").textContent(), /\d ms/);
    assert.match(await page.locator("#fact-wire").textContent(), /\d MB/);
    assert.equal(await page.locator("#text .best").textContent(), await marked());
    assert.deepEqual(complaints, []);
  });

  test("sends nothing anywhere once the model is here, and gets all from its own server", async () => {
    await openSample();
    assert.ok(requests.length >= 6);
    assert.deepEqual(requests.filter((url) => !url.startsWith(base) && !url.startsWith("data:")), []);
    const before = requests.length;
    await page.getByRole("searchbox").fill("can I bring my dog");
    await answered("can I bring my dog");
    assert.match(await first().textContent(), /Dogs, cats/);
    assert.equal(requests.length, before);
    const escaped = await page.evaluate(() => fetch("https://example.org/").then(() => "sent", () => "held back"));
    assert.equal(escaped, "held back");
  });

  test("the newest query is answered, also while a long document is still being read", async () => {
    await open();
    const chapter = (number) => `# Chapter ${number}\n\nIn the ${number}th year the town built one more bridge of stone over the river, and paid for it in salt.\n`;
    await drop("long.md", Array.from({ length: 200 }, (_, place) => chapter(place + 1)).join("\n") + "\n# Cats\n\nThe kitten sleeps on the piano.\n");
    await page.getByRole("searchbox").pressSequentially("who crossed the water by walking on stones");
    await answered("who crossed the water by walking on stones");
    assert.match(await first().textContent(), /bridge of stone/);
    await page.getByRole("searchbox").fill("a young pet naps on an instrument");
    await page.waitForFunction(() => /kitten/.test(document.querySelector("#results li")?.textContent ?? ""));
    assert.match(await first().textContent(), /Cats/);
  });

  test("reads HTML without running it", async () => {
    await open();
    await drop("page.html", "<title>Care</title><script>document.title='run'</script><img src=x onerror=\"document.title='run'\"><h2>Plants</h2><p>Ferns like <b>shade</b>.</p><ul><li>Cacti need sun.</li></ul>");
    await waitUntilRead(page);
    assert.equal(await page.locator("#paper-title").textContent(), "Care");
    assert.deepEqual(await page.locator("#text > *").allTextContents(), ["Plants", "Ferns like shade.", "Cacti need sun."]);
    assert.match(await page.title(), /^Gist/);
  });

  test("takes pasted text, and another document after it", async () => {
    await open();
    await page.getByRole("button", { name: "Paste text" }).click();
    await page.getByLabel("Text to search").fill("The ferry is late.\nSoup is served at noon.");
    await page.getByRole("button", { name: "Search this text" }).click();
    await page.getByRole("searchbox").fill("when do we eat");
    await page.waitForFunction(() => /Soup/.test(document.querySelector("#results li mark")?.textContent ?? ""));
    await page.getByRole("button", { name: "Another document" }).click();
    await drop("other.txt", "Bees dance to tell the way.");
    await page.getByRole("searchbox").fill("insects talk");
    await page.waitForFunction(() => /Bees/.test(document.querySelector("#results li mark")?.textContent ?? ""));
    assert.equal(await page.locator("#results li").count(), 1);
  });

  test("says in plain words which files it cannot read, and takes the next one", async () => {
    await open();
    await drop("photo.png", Uint8Array.of(137, 80, 78, 71, 0, 0));
    assert.match(await alert(), /“photo.png” is not text/);
    await drop("huge.txt", "x".repeat(5 * 1024 * 1024));
    assert.match(await alert(), /“huge.txt” has 5.0 MB/);
    await drop("good.txt", "All is well.");
    assert.ok(await page.locator("#alert").isHidden());
    assert.equal(await page.locator("#text").textContent(), "All is well.");
  });

  test("works by keyboard alone", async () => {
    await openSample();
    await page.locator("#paper").focus();
    await page.keyboard.press("/");
    await page.keyboard.type("where do I wash my clothes");
    await answered("where do I wash my clothes");
    await page.keyboard.press("ArrowDown");
    await page.keyboard.press("ArrowDown");
    await page.keyboard.press("Enter");
    const opened = page.locator("#text .here");
    await opened.waitFor();
    assert.equal(await page.evaluate(() => document.activeElement.dataset.rank), "1");
    await page.waitForFunction(() => {
      const { top, bottom } = document.querySelector("#text .here").getBoundingClientRect();
      return top > 50 && bottom < innerHeight;
    });
    await page.keyboard.press("Escape");
    assert.equal(await page.evaluate(() => document.activeElement.id), "query");
    await page.keyboard.press("ArrowDown");
    await page.keyboard.press("ArrowUp");
    assert.equal(await page.evaluate(() => document.activeElement.id), "query");
  });

  test("fits a phone: nothing is wider than the screen, a result opens in the text, and Back leads to the results", async () => {
    const overflow = () => page.evaluate(() => [...document.querySelectorAll("body *")].filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5 && !e.closest(".hidden")).map((e) => e.id || e.className));
    await openSample(PHONE);
    assert.deepEqual(await overflow(), []);
    await page.getByRole("searchbox").fill("is it safe to go swimming");
    await answered("is it safe to go swimming");
    assert.deepEqual(await overflow(), []);
    await page.locator("#results a").first().tap();
    assert.ok(await page.locator("#results").isHidden());
    assert.deepEqual(await overflow(), []);
    await page.waitForFunction(() => {
      const { top, bottom } = document.querySelector("#text .here").getBoundingClientRect();
      return top > 50 && bottom < innerHeight;
    });
    await page.goBack();
    assert.ok(await page.locator("#results").isVisible());
    assert.equal(await page.getByRole("searchbox").inputValue(), "is it safe to go swimming");
    await page.locator("#results a").first().tap();
    await page.getByRole("button", { name: "Results" }).tap();
    assert.ok(await page.locator("#results").isVisible());
  });

  test("says what is missing: WebAssembly, the model, the rest of the model", async () => {
    await open(WIDE, (page) => page.addInitScript(() => delete globalThis.WebAssembly));
    assert.match(await alert(), /does not run WebAssembly/);
    await page.context().close();
    await open(WIDE, (page) => page.context().route("**/manifest.json", (route) => route.fulfill({ status: 404 })));
    await page.locator("#alert").waitFor();
    assert.match(await alert(), /the server answered 404/);
    await page.context().close();
    await open(WIDE, (page) => page.context().route("**/model-*", (route) => route.fulfill({ body: "short" })));
    await page.locator("#alert").waitFor();
    assert.match(await alert(), /damaged or broke off after 5 bytes/);
    assert.equal(await page.locator("#engine-text").textContent(), "Not running");
  });
});
