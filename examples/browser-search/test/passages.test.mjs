import assert from "node:assert/strict";
import { test } from "node:test";
import { countWords, sentencesOf, splitPassages } from "../src/passages.js";

const text = (words) => ({ kind: "text", text: words });
const heading = (level, words) => ({ kind: "heading", level, text: words });
const words = (count) => Array.from({ length: count }, (_, place) => `word${place}`).join(" ");

test("sentences keep every word, and abbreviations do not end them", () => {
  assert.deepEqual(sentencesOf("Ask Dr. Lund. She knows! Does she? Yes."), ["Ask Dr. Lund.", "She knows!", "Does she?", "Yes."]);
  assert.deepEqual(sentencesOf("Fruit, e.g. Cox apples, is kept cold."), ["Fruit, e.g. Cox apples, is kept cold."]);
});

test("a sentence without an end is cut, and no word of it is lost", () => {
  const pieces = sentencesOf(words(250));
  assert.ok(pieces.length > 2);
  assert.equal(pieces.join(" "), words(250));
});

test("passages hold whole sentences in order, none is too long, and none crosses a heading", () => {
  const blocks = [heading(1, "One"), text(`${words(60)}. ${words(30)}. ${words(50)}.`), heading(1, "Two"), text("Short."), text("Shorter.")];
  const passages = splitPassages(blocks);
  assert.deepEqual(passages.map((passage) => passage.headings), [["One"], ["One"], ["Two"]]);
  assert.deepEqual(passages.map((passage) => passage.id), [0, 1, 2]);
  for (const { sentences } of passages) assert.ok(countWords(sentences.map((sentence) => sentence.text).join(" ")) <= 100);
  assert.deepEqual(passages[2].sentences, [{ text: "Short.", block: 3 }, { text: "Shorter.", block: 4 }]);
});

test("headings are a path: a higher one ends those below it", () => {
  const blocks = [heading(1, "A"), heading(2, "B"), text("x."), heading(2, "C"), text("y."), heading(1, "D"), text("z.")];
  assert.deepEqual(splitPassages(blocks).map((passage) => passage.headings), [["A", "B"], ["A", "C"], ["D"]]);
});
