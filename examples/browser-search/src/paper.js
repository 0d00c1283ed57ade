// The document itself, with the sentences that were found marked, and a strip that shows where in it they are.

export class Paper {
  #text;
  #strip;
  #passages = [];
  #scores = [];

  /** @param {HTMLElement} text @param {HTMLCanvasElement} strip */
  constructor(text, strip) {
    this.#text = text;
    this.#strip = strip;
    new ResizeObserver(() => this.#draw()).observe(strip);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
    strip.addEventListener("click", (event) => {
      const place = event.offsetY / strip.clientHeight;
      this.goTo(Math.min(this.#passages.length - 1, Math.floor(place * this.#passages.length)), 0);
    });
  }

  show(blocks, passages) {
    const spans = blocks.map(() => []);
    for (const passage of passages) {
      passage.sentences.forEach(({ text, block }, place) => {
        const span = document.createElement("span");
        span.id = `s-${passage.id}-${place}`;
        span.textContent = text;
        spans[block].push(span);
      });
    }
    const elements = blocks.map((block, place) => {
      const element = document.createElement(block.kind === "heading" ? `h${Math.min(6, Math.max(3, block.level + 1))}` : "p");
      if (block.kind === "heading") element.textContent = block.text;
      else spans[place].forEach((span, nth) => element.append(nth ? " " : "", span));
      return element;
    });
    this.#text.replaceChildren(...elements);
    this.#passages = passages;
    this.clear();
  }

  clear() {
    for (const marked of this.#text.querySelectorAll(".found, .here")) marked.classList.remove("found", "best", "here");
    this.#scores = [];
    this.#draw();
  }

  mark(hits, scores) {
    this.clear();
    hits.forEach(({ passage, sentence }, rank) => {
      if (sentence === null) return;
      this.#span(passage, sentence).classList.add(...(rank === 0 ? ["found", "best"] : ["found"]));
    });
    this.#scores = scores;
    this.#draw();
  }

  /** Makes a sentence the one that is looked at. */
  choose(passage, sentence) {
    this.#text.querySelector(".here")?.classList.remove("here");
    const span = this.#span(passage, sentence ?? 0);
    span.classList.add("here");
    return span;
  }

  goTo(passage, sentence) {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.choose(passage, sentence).scrollIntoView({ block: "center", behavior: still ? "instant" : "smooth" });
  }

  /** Brings a sentence into sight as the visitor types: at once, for a moving page cannot be read. */
  bring(passage, sentence) {
    const span = this.#span(passage, sentence ?? 0);
    const pane = this.#text.parentElement;
    pane.scrollTop += span.getBoundingClientRect().top - pane.getBoundingClientRect().top - pane.clientHeight * 0.3;
  }

  top() {
    this.#text.parentElement.scrollTop = 0;
  }

  #span(passage, sentence) {
    return document.getElementById(`s-${passage}-${sentence}`);
  }

  /** A band a passage, the darker the nearer. The lower half of the scores is left white: it is noise. */
  #draw() {
    const scale = devicePixelRatio;
    const canvas = this.#strip;
    canvas.width = canvas.clientWidth * scale;
    canvas.height = canvas.clientHeight * scale;
    const context = canvas.getContext("2d");
    context.fillStyle = getComputedStyle(canvas).color;
    const height = canvas.height / this.#passages.length;
    const most = Math.max(0.3, ...this.#scores);
    this.#scores.forEach((score, place) => {
      const share = (score / most - 0.5) * 2;
      if (share <= 0) return;
      context.globalAlpha = share ** 2;
      context.fillRect(0, place * height, canvas.width, Math.max(scale, height - scale));
    });
  }
}
