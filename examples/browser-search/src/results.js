// The list of passages that a query found.

/**
 * @param {HTMLElement} list
 * @param {{passage: number, score: number, sentence: number|null}[]} hits the nearest first
 * @param {object[]} passages of passages.js
 * @param {number|null} opened the passage that is shown in the text
 */
export function showResults(list, hits, passages, opened) {
  const focused = list.querySelector("a:focus")?.dataset.rank;
  list.replaceChildren(...hits.map((hit, rank) => item(hit, rank, passages[hit.passage], hit.passage === opened)));
  list.querySelectorAll("a")[focused]?.focus({ preventScroll: true });
}

function item(hit, rank, passage, current) {
  const link = element("a", { className: "result", href: `#s-${hit.passage}-${hit.sentence ?? 0}` });
  link.dataset.rank = rank;
  if (current) link.setAttribute("aria-current", "true");
  const score = element("span", { className: "score", title: "Cosine of the question and the passage: 1 is the same" });
  score.style.setProperty("--share", Math.max(0, hit.score));
  score.append(element("span", { className: "hidden", textContent: "likeness " }), hit.score.toFixed(2));
  const top = element("span", { className: "result-top" });
  top.append(element("span", { className: "where", textContent: passage.headings.join(" › ") || `Passage ${hit.passage + 1}` }), score);
  link.append(top, snippet(hit.sentence, passage.sentences));
  const row = element("li", {});
  row.append(link);
  return row;
}

/** The best sentence, once it is known, marked, one before it, and all that follow; the style cuts off what is too long. */
function snippet(best, sentences) {
  const text = element("span", { className: "snippet" });
  const from = Math.max(0, (best ?? 0) - 1);
  if (from > 0) text.append("… ");
  sentences.slice(from).forEach((sentence, offset) => {
    if (offset) text.append(" ");
    text.append(from + offset === best ? element("mark", { textContent: sentence.text }) : sentence.text);
  });
  return text;
}

function element(name, properties) {
  return Object.assign(document.createElement(name), properties);
}
