// Cuts a document into passages: short runs of whole sentences that share a heading. One passage is one row of the index.

/** Words of a passage: enough to say one thing, and less than the 128 positions that the model was trained on. */
const TARGET_WORDS = 70;
const MOST_WORDS = 100;

/** Sentences do not end after these, though a full stop follows. */
const ABBREVIATION = /(?:^|\s|\()(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|cf|Fig|Nos?|approx)\.$/i;

const segmenter = new Intl.Segmenter("en", { granularity: "sentence" });

export const countWords = (text) => (text.match(/\S+/g) ?? []).length;

/** The sentences of a paragraph, in order; nothing but white space is lost. */
export function sentencesOf(paragraph) {
  const sentences = [];
  for (const { segment } of segmenter.segment(paragraph)) {
    const text = segment.trim();
    if (!text) continue;
    const last = sentences.length - 1;
    const continues = last >= 0 && (ABBREVIATION.test(sentences[last]) || !/[\p{L}\p{N}]/u.test(text));
    if (continues) sentences[last] += ` ${text}`;
    else sentences.push(text);
  }
  return sentences.flatMap(cutLongSentence);
}

/** Tables and lists without full stops come as one endless sentence, which the model could not read to its end. */
function cutLongSentence(sentence) {
  if (countWords(sentence) <= MOST_WORDS) return [sentence];
  const words = sentence.split(/\s+/);
  const pieces = [];
  for (let start = 0; start < words.length; start += TARGET_WORDS) pieces.push(words.slice(start, start + TARGET_WORDS).join(" "));
  return pieces;
}

/**
 * @param {{kind: "heading"|"text", level?: number, text: string}[]} blocks a document, as documents.js reads it
 * @returns {{id: number, headings: string[], sentences: {text: string, block: number}[]}[]}
 *   `block` is the place of the sentence's paragraph among the blocks.
 */
export function splitPassages(blocks) {
  const passages = [];
  const headings = [];
  let open = null;
  let words = 0;

  const add = (sentence, block) => {
    const length = countWords(sentence);
    if (open && words + length > MOST_WORDS) open = null;
    if (!open) {
      open = { id: passages.length, headings: headings.map((heading) => heading.text), sentences: [] };
      passages.push(open);
      words = 0;
    }
    open.sentences.push({ text: sentence, block });
    words += length;
  };

  blocks.forEach((block, place) => {
    if (block.kind === "heading") {
      while (headings.length && headings.at(-1).level >= block.level) headings.pop();
      headings.push(block);
      open = null;
      return;
    }
    // A paragraph starts a passage, unless what is open is still short, as the items of a list are.
    if (open && words >= TARGET_WORDS / 2) open = null;
    for (const sentence of sentencesOf(block.text)) add(sentence, place);
  });
  return passages;
}
