// Markdown that a model wrote, as DOM nodes, while it is still being written.
//
// Known are paragraphs, headings, lists, quotes, tables, rules, fenced code, bold, italic, struck out, code and links.
// Everything else, HTML above all, is text. Nodes are made one by one and text is put into them; no markup is parsed,
// so nothing a model writes can run, load or ask for anything. Each pass goes over the text once, and nesting ends at
// a depth, so neither can be made slow or deep.

import { copyButton, element } from "./dom.js";

const DEEPEST = 12;

/** Text of a reply in `container`; what no longer changes is left alone when more comes. */
export class Markdown {
  constructor(container) {
    this.container = container;
    this.sources = [];
  }

  show(text) {
    const lines = text.replace(/\r\n?/g, "\n").split("\n");
    const blocks = parse(lines, 0);
    const sources = blocks.map((block) => lines.slice(block.from, block.to).join("\n"));
    let same = 0;
    while (same < sources.length && sources[same] === this.sources[same]) same++;
    while (this.container.childNodes.length > same) this.container.lastChild.remove();
    this.container.append(...blocks.slice(same).map(draw));
    this.sources = sources;
  }
}

// Blocks: lines → [{kind, from, to, …}], a block being the lines from `from` up to, not with, `to`.

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,9})([-*+]|\d{1,9}[.)])( {1,4}|\t|$)/;
const DIVIDER = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

function parse(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at++;
      continue;
    }
    const block = blockAt(lines, at, depth);
    blocks.push(block);
    at = block.to;
  }
  return blocks;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return fenced(lines, at);
  if (HEADING.test(line)) return heading(line, at);
  if (isRule(line)) return { kind: "rule", from: at, to: at + 1 };
  if (isTable(lines, at)) return table(lines, at);
  if (depth < DEEPEST) {
    if (QUOTE.test(line)) return quote(lines, at, depth);
    if (ITEM.test(line)) return list(lines, at, depth);
  }
  return paragraph(lines, at, depth);
}

const isBlank = (line) => !/\S/.test(line);

// Long lines are no rules, and need not be looked at as such.
const isRule = (line) => line.length < 200 && RULE.test(line);

function fenced(lines, from) {
  const [, fence, language] = FENCE.exec(lines[from]);
  const indent = lines[from].search(/\S/);
  const ends = (line) => {
    const text = line.trim();
    return text.length >= fence.length && text === fence[0].repeat(text.length) && line.search(/\S/) < 4;
  };
  let to = from + 1;
  while (to < lines.length && !ends(lines[to])) to++;
  const code = lines.slice(from + 1, to).map((line) => line.slice(Math.min(indent, Math.max(line.search(/\S|$/), 0))));
  return { kind: "code", from, to: Math.min(to + 1, lines.length), language, code: code.join("\n") };
}

function heading(line, from) {
  const [before, marks] = HEADING.exec(line);
  const text = line.slice(before.length).trim();
  const kept = text.length - (/(?:^|[ \t])#{1,20}$/.exec(text.slice(-21))?.[0].length ?? 0);
  return { kind: "heading", from, to: from + 1, level: marks.length, text: text.slice(0, kept) };
}

function quote(lines, from, depth) {
  let to = from;
  while (to < lines.length && QUOTE.test(lines[to])) to++;
  const inner = lines.slice(from, to).map((line) => line.replace(QUOTE, ""));
  return { kind: "quote", from, to, blocks: parse(inner, depth + 1) };
}

function list(lines, from, depth) {
  const first = marker(lines[from]);
  const items = [];
  let loose = false;
  let at = from;
  while (at < lines.length) {
    const found = marker(lines[at]);
    if (!found || found.kind !== first.kind || found.indent > first.indent + 1 || isRule(lines[at])) break;
    const [inner, to] = itemLines(lines, at, found);
    const blocks = parse(inner, depth + 1);
    items.push(blocks);
    let next = to;
    while (next < lines.length && isBlank(lines[next])) next++;
    const goesOn = next < lines.length && marker(lines[next])?.kind === first.kind;
    loose ||= blocks.some((block, place) => place && isBlank(inner[block.from - 1])) || (goesOn && next > to);
    at = goesOn ? next : to;
    if (!goesOn) break;
  }
  return { kind: "list", from, to: at, ordered: first.start !== null, start: first.start, loose, items };
}

function marker(line) {
  const found = ITEM.exec(line);
  if (!found) return null;
  const [all, indent, mark, space] = found;
  return {
    indent: indent.length,
    width: space ? all.length : all.length + 1,
    kind: mark.at(-1),
    start: mark.length > 1 ? Number(mark.slice(0, -1)) : null,
  };
}

// Models indent what belongs to an item by two, three or four columns, whatever the marker's width.
function itemLines(lines, from, { indent, width }) {
  const inner = [lines[from].slice(width)];
  let fence = FENCE.test(inner[0]);
  let to = from + 1;
  for (; to < lines.length; to++) {
    const line = lines[to].replace(/^\t+/, (tabs) => "    ".repeat(Math.min(tabs.length, 40)));
    const column = line.search(/\S/);
    const after = isBlank(lines[to - 1]);
    if (column < 0) {
      inner.push("");
      continue;
    }
    const belongs = column >= Math.min(width, indent + 2);
    if (!belongs && (fence || after || startsBlock(line))) break;
    const text = line.slice(Math.min(column, width));
    if (FENCE.test(text)) fence = !fence;
    inner.push(text);
  }
  while (to > from + 1 && isBlank(lines[to - 1])) {
    to--;
    inner.pop();
  }
  return [inner, to];
}

const startsBlock = (line) =>
  FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || ITEM.test(line) || isRule(line);

function isTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || lines[at + 1].length > 2000) return false;
  return DIVIDER.test(lines[at + 1]) && cells(lines[at]).length === cells(lines[at + 1]).length;
}

function table(lines, from) {
  let to = from + 2;
  while (to < lines.length && lines[to].includes("|") && !isBlank(lines[to])) to++;
  const sides = cells(lines[from + 1]).map((cell) => (cell.endsWith(":") ? (cell[0] === ":" ? "center" : "end") : ""));
  return { kind: "table", from, to, sides, head: cells(lines[from]), rows: lines.slice(from + 2, to).map(cells) };
}

function cells(line) {
  const text = line.trim().replace(/^\|/, "").replace(/([^\\]|^)\|$/, "$1");
  return text.split(/(?<!\\)\|/).slice(0, 100).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function paragraph(lines, from, depth) {
  let to = from + 1;
  const interrupts = (at) =>
    FENCE.test(lines[at]) || HEADING.test(lines[at]) || isRule(lines[at]) || isTable(lines, at) ||
    (depth < DEEPEST && (QUOTE.test(lines[at]) || ITEM.test(lines[at])));
  while (to < lines.length && !isBlank(lines[to]) && !interrupts(to)) to++;
  return { kind: "paragraph", from, to, text: lines.slice(from, to).map((line) => line.trim()).join("\n") };
}

// Drawing blocks.

function draw(block) {
  return DRAWINGS[block.kind](block);
}

const DRAWINGS = {
  paragraph: ({ text }) => element("p", { dir: "auto" }, ...inline(text)),
  // The page's own headings are h1 and h2.
  heading: ({ level, text }) => element(`h${Math.min(level + 2, 6)}`, { dir: "auto" }, ...inline(text)),
  rule: () => element("hr"),
  quote: ({ blocks }) => element("blockquote", { dir: "auto" }, ...blocks.map(draw)),
  list: ({ ordered, start, loose, items }) =>
    element(
      ordered ? "ol" : "ul",
      { dir: "auto", start: ordered && start !== 1 ? start : null },
      ...items.map((blocks) => element("li", {}, ...drawItem(blocks, loose))),
    ),
  table: drawTable,
  code: drawCode,
};

function drawItem(blocks, loose) {
  return blocks.flatMap((block) => (block.kind === "paragraph" && !loose ? inline(block.text) : [draw(block)]));
}

function drawTable({ sides, head, rows }) {
  const cell = (name) => (text, column) =>
    element(name, { class: sides[column] || null, dir: "auto" }, ...inline(text ?? ""));
  const row = (name, texts) => element("tr", {}, ...sides.map((_, column) => cell(name)(texts[column], column)));
  return element(
    "div",
    { class: "table", tabindex: "0", role: "group", "aria-label": "Table" },
    element("table", {}, element("thead", {}, row("th", head)), element("tbody", {}, ...rows.map((r) => row("td", r)))),
  );
}

function drawCode({ language, code }) {
  const name = [...language].slice(0, 30).join("");
  return element(
    "div",
    { class: "code" },
    element("div", { class: "code-bar" }, element("span", {}, ...visible(name || "text")), copyButton("Copy code", () => code)),
    element(
      "pre",
      { tabindex: "0", role: "group", "aria-label": name ? `Code, ${name}` : "Code", dir: "ltr" },
      element("code", {}, ...visible(code)),
    ),
  );
}

// Inside a line: text → nodes.

const PLAIN = /[^\\`*_~[!<h\n]+/y;
const LINK =
  /(!?)\[((?:\\.|[^[\]\\]){0,2000})\]\([ \n]?(?:<([^<>\n]{0,2000})>|((?:[^\s()<>]|\([^\s()<>]{0,500}\)){0,2000}))(?:[ \n]+(?:"[^"]{0,500}"|'[^']{0,500}'))?[ \n]?\)/y;
const ADDRESS_IN_ANGLES = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y;
const BARE_ADDRESS = /https?:\/\/[^\s<>"`*\\]{1,2000}/y;
const ESCAPABLE = /[!-/:-@[-`{-~]/;

/** Nodes for a text, `links` false inside of one. */
function inline(text, links = true) {
  return build(emphasized(tokens(text, links)));
}

// → [{text} | {node} | {mark, count, opens, closes}]
function tokens(text, links) {
  const found = [];
  const closing = backticks(text);
  const add = (piece) => (found.at(-1)?.text !== undefined ? (found.at(-1).text += piece) : found.push({ text: piece }));
  const matchAt = (pattern, at) => ((pattern.lastIndex = at), pattern.exec(text));
  let at = 0;
  while (at < text.length) {
    const character = text[at];
    let match;
    if ((match = matchAt(PLAIN, at))) {
      add(match[0]);
      at += match[0].length;
    } else if (character === "\n") {
      found.push({ node: () => element("br") });
      at++;
    } else if (character === "\\" && ESCAPABLE.test(text[at + 1] ?? "")) {
      add(text[at + 1]);
      at += 2;
    } else if (character === "`") {
      const end = closing(at);
      if (end) {
        const code = text.slice(end.from, end.to);
        found.push({ node: () => element("code", {}, ...visible(trimmed(code))) });
        at = end.after;
      } else {
        const run = runAt(text, at);
        add(run);
        at += run.length;
      }
    } else if ("*_~".includes(character)) {
      const run = runAt(text, at);
      found.push(delimiter(run, text[at - 1], text[at + run.length]));
      at += run.length;
    } else if (links && (match = matchAt(LINK, at))) {
      const [all, image, label, angled, plain] = match;
      const node = link(label || (image ? "image" : ""), angled ?? plain);
      if (node) found.push({ node });
      else add(all);
      at += all.length;
    } else if (links && (match = matchAt(ADDRESS_IN_ANGLES, at))) {
      const address = match[1];
      found.push({ node: link(address, address, true) ?? (() => document.createTextNode(address)) });
      at += match[0].length;
    } else if (links && !/\w/.test(text[at - 1] ?? "") && (match = matchAt(BARE_ADDRESS, at))) {
      const address = withoutEnd(match[0]);
      const node = link(address, address, true);
      if (node) found.push({ node });
      else add(address);
      at += address.length;
    } else {
      add(character);
      at++;
    }
  }
  return found;
}

// One space on either side only keeps backticks inside apart.
const trimmed = (code) => (code[0] === " " && code.at(-1) === " " && code.trim() ? code.slice(1, -1) : code);

function runAt(text, at) {
  let end = at;
  while (text[end] === text[at]) end++;
  return text.slice(at, end);
}

// For the run of backticks at a place, where the next one of its length is: one pass over the text, however many.
function backticks(text) {
  const runs = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!runs.has(run.length)) runs.set(run.length, { places: [], next: 0 });
    runs.get(run.length).places.push(index);
  }
  return (at) => {
    const length = runAt(text, at).length;
    const same = runs.get(length);
    if (!same) return null;
    while (same.next < same.places.length && same.places[same.next] <= at) same.next++;
    const place = same.places[same.next];
    return place === undefined ? null : { from: at + length, to: place, after: place + length };
  };
}

const isSpace = (character) => character === undefined || /\s/.test(character);
const isPunctuation = (character) => character !== undefined && /[\p{P}\p{S}]/u.test(character);

function delimiter(run, before, after) {
  const opens = !isSpace(after) && (!isPunctuation(after) || isSpace(before) || isPunctuation(before));
  const closes = !isSpace(before) && (!isPunctuation(before) || isSpace(after) || isPunctuation(after));
  const inWord = run[0] === "_" && opens && closes;
  return {
    mark: run[0],
    count: run.length,
    opens: opens && (!inWord || isPunctuation(before)),
    closes: closes && (!inWord || isPunctuation(after)),
    begun: [],
    ended: [],
  };
}

// Pairs the marks: each closes the nearest one of its kind, and what was opened in between stays text.
function emphasized(found) {
  const open = { "*": [], _: [], "~": [] };
  found.forEach((token, place) => {
    if (!token.mark) return;
    const same = open[token.mark];
    while (token.closes && token.count && same.length) {
      const opener = found[same.at(-1)];
      const used = token.mark === "~" ? 2 : Math.min(opener.count, token.count, 2);
      if (opener.count < used || token.count < used) break;
      for (const stack of Object.values(open)) {
        while (stack.length && stack.at(-1) > same.at(-1) && stack !== same) stack.pop();
      }
      const tag = token.mark === "~" ? "s" : used === 2 ? "strong" : "em";
      const pair = { tag, mark: token.mark.repeat(used) };
      opener.begun.unshift(pair);
      token.ended.push(pair);
      opener.count -= used;
      token.count -= used;
      if (!opener.count) same.pop();
    }
    if (token.opens && token.count) same.push(place);
  });
  return found;
}

function build(found) {
  const top = document.createDocumentFragment();
  const within = [top];
  let text = "";
  let tooDeep = 0;
  const add = (node) => {
    within.at(-1).append(...visible(text));
    if (node) within.at(-1).append(node);
    text = "";
  };
  const end = ({ mark }) => {
    if (tooDeep) {
      tooDeep--;
      text += mark;
    } else {
      add();
      within.pop();
    }
  };
  const begin = ({ tag, mark }) => {
    if (tooDeep || within.length > DEEPEST) {
      tooDeep++;
      text += mark;
    } else {
      const node = element(tag);
      add(node);
      within.push(node);
    }
  };
  for (const token of found) {
    if (token.text !== undefined) text += token.text;
    else if (token.node) add(token.node());
    else {
      token.ended.forEach(end);
      text += token.mark.repeat(token.count);
      token.begun.forEach(begin);
    }
  }
  add();
  return [...top.childNodes];
}

// Links lead to the web or to mail, and say where to.

function link(label, address, isAddress = false) {
  const target = safeTarget(address);
  if (!target) return null;
  const where = target.protocol === "mailto:" ? target.pathname : target.host;
  return () => {
    const inside = isAddress ? visible(label) : inline(label.replaceAll("\n", " "), false);
    const anchor = element("a", { href: target.href, rel: "noopener noreferrer nofollow", target: "_blank", title: target.href }, ...inside);
    if (isAddress && !target.username && address.includes(target.host)) return anchor;
    return element("span", { class: "link" }, anchor, element("span", { class: "target", dir: "ltr" }, ` (${where})`));
  };
}

function safeTarget(address) {
  if (!/^(?:https?:\/\/|mailto:)/i.test(address)) return null;
  try {
    const target = new URL(address);
    return ["http:", "https:", "mailto:"].includes(target.protocol) ? target : null;
  } catch {
    return null;
  }
}

// A full stop or a closing bracket after an address belongs to the sentence.
function withoutEnd(address) {
  let end = address.length;
  for (;;) {
    const last = address[end - 1];
    const unmatched = last === ")" && !address.slice(0, end).includes("(");
    if (!unmatched && !".,;:!?'_~]".includes(last)) return address.slice(0, end);
    end--;
  }
}

// Characters that would show text in another order than it has, or do not show, are named instead.

const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;

function visible(text) {
  const nodes = [];
  let from = 0;
  for (const { 0: character, index } of text.matchAll(HIDDEN)) {
    if (index > from) nodes.push(document.createTextNode(text.slice(from, index)));
    const name = `U+${character.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
    nodes.push(element("span", { class: "hidden-character", title: "An invisible control character" }, name));
    from = index + 1;
  }
  if (from < text.length) nodes.push(document.createTextNode(text.slice(from)));
  return nodes;
}
