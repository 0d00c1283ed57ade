// Reads what a visitor drops in: plain text, Markdown or HTML, as headings and paragraphs.

export const MOST_BYTES = 4 * 1024 * 1024;

/** Says in plain words why a document cannot be read. */
export class DocumentError extends Error {}

const megabytes = (bytes) => `${(bytes / 1024 / 1024).toFixed(1)} MB`;

/** @returns {Promise<{title: string, blocks: object[]}>} */
export async function readFile(file) {
  if (file.size === 0) throw new DocumentError(`“${file.name}” is empty.`);
  if (file.size > MOST_BYTES) {
    throw new DocumentError(
      `“${file.name}” has ${megabytes(file.size)}; this page reads documents of up to ${megabytes(MOST_BYTES)}. Drop in a part of it.`,
    );
  }
  return readDocument(file.name, decodeText(new Uint8Array(await file.arrayBuffer()), file.name));
}

/** Text as UTF-8 or, with a byte order mark, UTF-16. Programs save text in other encodings too, but those cannot be told apart. */
export function decodeText(bytes, name) {
  const utf16 = (bytes[0] === 0xff && bytes[1] === 0xfe && "utf-16le") || (bytes[0] === 0xfe && bytes[1] === 0xff && "utf-16be");
  if (!utf16 && bytes.includes(0)) {
    throw new DocumentError(`“${name}” is not text. Drop in a .txt, .md or .html file, or paste the text.`);
  }
  try {
    return new TextDecoder(utf16 || "utf-8", { fatal: true }).decode(bytes);
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    throw new DocumentError(`“${name}” is not text in UTF-8. Save it as UTF-8 or paste the text.`);
  }
}

export function readDocument(name, text) {
  const extension = name.toLowerCase().match(/\.([a-z]+)$/)?.[1];
  let blocks;
  if (extension === "html" || extension === "htm") blocks = readHtml(text);
  else if (extension === "md" || extension === "markdown") blocks = readMarkdown(text);
  else blocks = readPlain(text);
  if (!blocks.some((block) => block.kind === "text")) throw new DocumentError(`“${name}” has no sentences to search.`);
  const first = blocks[0];
  const isTitle = first.kind === "heading" && first.level === 1 && !blocks.slice(1).some((b) => b.kind === "heading" && b.level === 1);
  return isTitle ? { title: first.text, blocks: blocks.slice(1) } : { title: name, blocks };
}

const oneLine = (text) => text.replace(/\s+/g, " ").trim();

/** Paragraphs are set apart by empty lines; in a text without any, each line is one. */
export function readPlain(text) {
  const lines = text.replace(/\r\n?/g, "\n").trim();
  const separator = /\n[ \t]*\n/.test(lines) ? /\n[ \t]*\n+/ : /\n/;
  return lines
    .split(separator)
    .map(oneLine)
    .filter(Boolean)
    .map((paragraph) => ({ kind: "text", text: paragraph }));
}

export function readMarkdown(text) {
  const blocks = [];
  let paragraph = [];
  let fence = null;
  const close = () => {
    const joined = oneLine(paragraph.join(" "));
    if (joined) blocks.push({ kind: "text", text: joined });
    paragraph = [];
  };
  const lines = text
    .replace(/\r\n?/g, "\n")
    .replace(/^---\n[\s\S]*?\n---\n/, "") // front matter
    .replace(/<!--[\s\S]*?-->/g, "")
    .split("\n");
  for (const line of lines) {
    const marker = line.match(/^\s{0,3}(```|~~~)/)?.[1];
    if (marker && (!fence || fence === marker)) {
      close();
      fence = fence ? null : marker;
      continue;
    }
    const heading = !fence && line.match(/^(#{1,6})\s+(.+?)\s*#*$/);
    const underline = !fence && paragraph.length === 1 && line.match(/^(=+|-+)\s*$/);
    if (heading) {
      close();
      blocks.push({ kind: "heading", level: heading[1].length, text: withoutMarks(heading[2]) });
    } else if (underline) {
      blocks.push({ kind: "heading", level: underline[1][0] === "=" ? 1 : 2, text: oneLine(paragraph[0]) });
      paragraph = [];
    } else if (!line.trim() || /^\s*([-*_]\s*){3,}$/.test(line) || /^\s*\|?[\s:|-]+\|[\s:|-]*$/.test(line)) {
      close();
    } else if (fence) {
      paragraph.push(line);
    } else {
      const item = line.match(/^\s*(?:[-*+]|\d+[.)])\s+(.*)$/);
      const row = line.match(/^\s*\|(.*)\|\s*$/);
      if (item || row) close();
      paragraph.push(withoutMarks(item ? item[1] : row ? row[1].replaceAll("|", " · ") : line.replace(/^\s*>\s?/, "")));
    }
  }
  close();
  return blocks;
}

/** Emphasis, code, links and pictures of Markdown, as the words a reader sees. */
function withoutMarks(text) {
  return text
    .replace(/!?\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])/g, "$1")
    .replace(/(\*\*|__)(.+?)\1/g, "$2")
    .replace(/(?<![\w*])[*_](?=\S)(.+?)(?<=\S)[*_](?![\w*])/g, "$1")
    .replace(/`+([^`]+)`+/g, "$1")
    .replace(/<\/?[a-z][^>]*>/gi, "");
}

const UNREAD = "script, style, noscript, template, svg, nav, iframe, object, form, [hidden]";
const BLOCK = new Set(
  "ADDRESS ARTICLE ASIDE BLOCKQUOTE BODY CAPTION DD DIV DL DT FIGCAPTION FIGURE FOOTER HEADER HR HTML LI MAIN OL P PRE SECTION TABLE TBODY TD TFOOT TH THEAD TR UL"
    .split(" "),
);

/** The words of a page. The parser runs no script of it and loads nothing. */
export function readHtml(text) {
  const page = new DOMParser().parseFromString(text, "text/html");
  page.querySelectorAll(UNREAD).forEach((element) => element.remove());
  const blocks = [];
  let words = "";
  const close = () => {
    const joined = oneLine(words);
    if (joined) blocks.push({ kind: "text", text: joined });
    words = "";
  };
  const walk = (node) => {
    if (node.nodeType === Node.TEXT_NODE) {
      words += node.data;
    } else if (/^H[1-6]$/.test(node.nodeName)) {
      close();
      const heading = oneLine(node.textContent);
      if (heading) blocks.push({ kind: "heading", level: Number(node.nodeName[1]), text: heading });
    } else if (node.nodeName === "BR") {
      words += " ";
    } else {
      const apart = BLOCK.has(node.nodeName);
      if (apart) close();
      node.childNodes.forEach(walk);
      if (apart) close();
    }
  };
  walk(page.body);
  const title = oneLine(page.title);
  const named = blocks.some((block) => block.kind === "heading" && block.level === 1);
  return title && !named ? [{ kind: "heading", level: 1, text: title }, ...blocks] : blocks;
}
