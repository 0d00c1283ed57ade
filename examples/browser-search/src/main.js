// The page: takes a document, asks the worker as the visitor types, and shows what it answers.

import "./style.css";
import { DocumentError, readDocument, readFile } from "./documents.js";
import { Engine } from "./engine.js";
import { splitPassages } from "./passages.js";
import { Paper } from "./paper.js";
import { showResults } from "./results.js";
import sample from "./sample.md?raw";
import { whatIsMissing } from "./support.js";

const MOST_RESULTS = 8;
/** Below this cosine the nearest passage has, as a rule, nothing to do with the question. */
const WEAK = 0.25;
const SAMPLE_IDEAS = ["water is leaking from the ceiling", "can I bring my dog", "who do I call in an emergency", "is it ok to go swimming", "I have a peanut allergy", "video chat with my family"];

const $ = (id) => document.getElementById(id);
const paper = new Paper($("text"), $("strip"));
const engine = new Engine();
const wide = matchMedia("(min-width: 900px)");

let current = null; // {passages, title}
let hits = [];
let opened = null; // the passage that the visitor chose among them
const queryTimes = [];

// ---- The document

async function open(read) {
  hideAlert();
  try {
    const { title, blocks } = await read();
    const passages = splitPassages(blocks);
    current = { title, passages };
    paper.show(blocks, passages);
    $("paper-title").textContent = title;
    setView("results");
    $("query").value = "";
    opened = null;
    showHits([]);
    paper.top();
    engine.index(passages.map(({ headings, sentences }) => ({ heading: headings.at(-1) ?? "", sentences: sentences.map((s) => s.text) })));
    status("");
    if (wide.matches) $("query").focus();
  } catch (error) {
    if (!(error instanceof DocumentError)) throw error;
    showAlert(error.message);
  }
}

function openFile(file) {
  showIdeas([]);
  open(() => readFile(file));
}

function showIdeas(ideas) {
  const buttons = ideas.map((idea) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = idea;
    button.addEventListener("click", () => {
      $("query").value = idea;
      ask();
    });
    return button;
  });
  $("ideas").replaceChildren(...buttons);
}

$("file").addEventListener("change", ({ target }) => {
  if (target.files.length) openFile(target.files[0]);
  target.value = "";
});
$("sample").addEventListener("click", () => {
  showIdeas(SAMPLE_IDEAS);
  open(() => readDocument("sample.md", sample));
});
$("paste-open").addEventListener("click", ({ currentTarget }) => {
  $("paste").hidden = !$("paste").hidden;
  currentTarget.setAttribute("aria-expanded", String(!$("paste").hidden));
  if (!$("paste").hidden) $("paste-text").focus();
});
$("paste").addEventListener("submit", (event) => {
  event.preventDefault();
  showIdeas([]);
  open(() => readDocument("Pasted text", $("paste-text").value));
});
$("another").addEventListener("click", () => setView("start"));

addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  const [file] = event.dataTransfer.files;
  const text = event.dataTransfer.getData("text/plain");
  if (file) openFile(file);
  else if (text) open(() => readDocument("Dropped text", text));
});

// ---- The question

function ask() {
  opened = null;
  const query = $("query").value.trim();
  if (!query) {
    showHits([]);
    paper.clear();
    status("");
    return;
  }
  engine.search(query, MOST_RESULTS);
}

function showHits(found) {
  hits = found;
  showResults($("results"), hits, current.passages, opened);
  $("ideas").hidden = hits.length > 0 || $("query").value.trim() !== "" || !$("ideas").childElementCount;
}

$("query").addEventListener("input", ask);
$("query-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (wide.matches) $("results").querySelector("a")?.focus();
  else $("query").blur();
});
$("results").addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link) return;
  event.preventDefault();
  const hit = hits[Number(link.dataset.rank)];
  opened = hit.passage;
  showHits(hits);
  if (!wide.matches) {
    history.pushState({ view: "paper" }, "");
    setView("paper");
  }
  paper.goTo(hit.passage, hit.sentence);
});
$("back").addEventListener("click", () => history.back());
addEventListener("popstate", () => {
  if (document.body.dataset.view === "paper") setView("results");
});

addEventListener("keydown", (event) => {
  if (document.body.dataset.view === "start" || event.ctrlKey || event.metaKey || event.altKey) return;
  const links = [...$("results").querySelectorAll("a")];
  const at = links.indexOf(document.activeElement);
  const typing = document.activeElement === $("query");
  if (event.key === "/" && !typing) $("query").focus();
  else if (event.key === "Escape" && document.body.dataset.view === "paper") history.back();
  else if (event.key === "Escape" && !typing) $("query").focus();
  else if (event.key === "ArrowDown" && (typing || at >= 0)) links[Math.min(at + 1, links.length - 1)]?.focus();
  else if (event.key === "ArrowUp" && at >= 0) (links[at - 1] ?? $("query")).focus();
  else return;
  event.preventDefault();
});

// ---- What the engine says

engine.addEventListener("downloading", ({ detail: { loaded, total } }) => {
  const arrived = loaded >= total;
  engineStatus("loading", arrived ? "Starting the model" : `Model arriving: ${megabytes(loaded)} of ${megabytes(total)}`);
  $("engine-progress").value = loaded / total;
});
engine.addEventListener("ready", ({ detail }) => {
  engineStatus("ready", "Ready, in this tab");
  $("fact-wire").textContent = megabytes(detail.wire);
  $("fact-memory").textContent = megabytes(detail.bytes);
});
engine.addEventListener("indexed", ({ detail: { done, total, milliseconds } }) => {
  $("index-progress").value = done / total;
  document.body.classList.toggle("indexing", done < total);
  $("fact-passage").textContent = `${(milliseconds / done).toFixed(0)} ms`;
  if ($("query").value.trim()) engine.repeat();
  else status(done < total ? `Reading: ${done} of ${total} passages` : `${total} passages read in ${seconds(milliseconds)}`);
});
engine.addEventListener("results", ({ detail: { query, hits: found, scores, indexed, milliseconds, waited } }) => {
  if (query !== $("query").value.trim()) return;
  showHits(found);
  paper.mark(found, scores);
  const chosen = found.find((hit) => hit.passage === opened);
  if (chosen) paper.choose(chosen.passage, chosen.sentence);
  else if (wide.matches && found.length) paper.bring(found[0].passage, found[0].sentence);
  if (milliseconds) {
    queryTimes.push(milliseconds.encode + milliseconds.rank);
    $("fact-query").textContent = `${median(queryTimes).toFixed(1)} ms`;
  }
  const total = current.passages.length;
  const searched = indexed < total ? `${indexed} of ${total} passages so far` : `${total} passages`;
  const weak = found.length && found[0].score < WEAK ? "Nothing here is close; these come nearest. " : "";
  status(`${weak}${searched}${waited ? `, ${waited.toFixed(0)} ms from key to result` : ""}`);
});
engine.addEventListener("failed", ({ detail: { message } }) => {
  engineStatus("failed", "Not running");
  showAlert(message);
});

/** What failed stays failed, though other files may still be arriving. */
function engineStatus(state, text) {
  if ($("engine").dataset.state === "failed") return;
  $("engine").dataset.state = state;
  if ($("engine-text").textContent !== text) $("engine-text").textContent = text;
  $("engine-progress").hidden = state !== "loading";
}

// ---- Small things

function setView(view) {
  document.body.dataset.view = view;
  $("start").hidden = view !== "start";
  $("search").hidden = view === "start";
  if (view === "paper") $("paper").focus({ preventScroll: true });
}

function status(text) {
  $("status").textContent = text;
}

function showAlert(text) {
  $("alert-text").textContent = text;
  $("alert").hidden = false;
}

function hideAlert() {
  $("alert").hidden = true;
}

$("alert-close").addEventListener("click", hideAlert);

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
const seconds = (milliseconds) => `${(milliseconds / 1000).toFixed(1)} s`;
const median = (values) => [...values].sort((one, other) => one - other)[values.length >> 1];

const missing = whatIsMissing(globalThis);
if (missing) {
  engineStatus("failed", "Not running");
  showAlert(missing);
} else {
  engineStatus("loading", "Fetching the model");
  engine.load(new URL("model/manifest.json", document.baseURI).href);
}
