import assert from "node:assert/strict";
import { test } from "node:test";
import { decodeText, DocumentError, MOST_BYTES, readDocument, readFile, readMarkdown, readPlain } from "../src/documents.js";

const bytes = (text) => new TextEncoder().encode(text);
const texts = (blocks) => blocks.map((block) => block.text);

test("plain text: lines that were wrapped are joined, and without empty lines each is a paragraph", () => {
  assert.deepEqual(texts(readPlain("One\r\ntwo.\r\n\r\nThree.")), ["One two.", "Three."]);
  assert.deepEqual(texts(readPlain("One.\nTwo.")), ["One.", "Two."]);
});

test("Markdown: headings, lists, tables, quotes, code and links become the words a reader sees", () => {
  const blocks = readMarkdown(
    ["---", "layout: page", "---", "# Title #", "Under", "-----", "Some **bold** and [a link](http://x.y), `code`,", "snake_case_name stays.", "", "- first", "- *second*", "", "| a | b |", "|---|---|", "| 1 | 2 |", "", "> quoted", "```", "# not a heading", "```"].join("\n"),
  );
  assert.deepEqual(blocks.slice(0, 2), [
    { kind: "heading", level: 1, text: "Title" },
    { kind: "heading", level: 2, text: "Under" },
  ]);
  assert.deepEqual(texts(blocks.slice(2)), ["Some bold and a link, code, snake_case_name stays.", "first", "second", "a · b", "1 · 2", "quoted", "# not a heading"]);
});

test("a lone first heading is the title; otherwise it is the name of the file", () => {
  assert.equal(readDocument("a.md", "# Tea\n\nHot.").title, "Tea");
  assert.equal(readDocument("a.md", "# Tea\n\nHot.\n\n# Coffee\n\nHot, too.").title, "a.md");
  assert.equal(readDocument("a.txt", "Hot.").title, "a.txt");
});

test("text is UTF-8, or UTF-16 with a mark; all else is refused with the reason", () => {
  assert.equal(decodeText(bytes("naïve"), "a.txt"), "naïve");
  assert.equal(decodeText(Uint8Array.of(0xff, 0xfe, 0x41, 0, 0x42, 0), "a.txt"), "AB");
  assert.throws(() => decodeText(Uint8Array.of(80, 75, 3, 4, 0, 0), "a.docx"), (error) => error instanceof DocumentError && /“a.docx” is not text/.test(error.message));
  assert.throws(() => decodeText(Uint8Array.of(0x63, 0xe9, 0x65), "a.txt"), (error) => error instanceof DocumentError && /UTF-8/.test(error.message));
});

test("empty and large files, and files without a sentence, are refused with the reason", async () => {
  const refused = (pattern) => (error) => error instanceof DocumentError && pattern.test(error.message);
  await assert.rejects(readFile(new File([], "a.txt")), refused(/“a.txt” is empty/));
  await assert.rejects(readFile(new File([new Uint8Array(MOST_BYTES + 1)], "a.txt")), refused(/4.0 MB/));
  await assert.rejects(readFile(new File(["  \n\n "], "a.txt")), refused(/no sentences/));
  await assert.rejects(readFile(new File(["# Only\n## Headings"], "a.md")), refused(/no sentences/));
});
