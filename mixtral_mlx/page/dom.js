// Small helpers for building the page. Text goes in as text nodes only; nothing here, or anywhere else, parses HTML.

/** An element with properties (`class`, `dataset`, `aria-…` and other attributes, `on…` listeners) and children. */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  // Before the attributes: with dir="auto" a browser would look at all text again for each child.
  node.append(...children.filter((child) => child !== null && child !== undefined));
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "dataset") Object.assign(node.dataset, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  return node;
}

/** One of the drawings in index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, onclick, properties = {}) {
  return element(
    "button",
    { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...properties },
    icon(name),
  );
}

export const byId = (id) => document.getElementById(id);

/** Puts text on the clipboard; false where the browser does not allow it. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelecting(text);
  }
}

// Pages from another machine without TLS have no clipboard API.
function copyBySelecting(text) {
  const before = document.activeElement;
  const area = element("textarea", { class: "unseen", "aria-hidden": "true", tabindex: "-1" });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus();
  return done;
}

/** A button that copies what `text()` gives and says so for a moment. */
export function copyButton(label, text, properties = {}) {
  const button = iconButton("copy", label, async () => {
    const done = await copy(text());
    button.replaceChildren(icon(done ? "check" : "copy"));
    announce(done ? "Copied." : "The browser did not allow copying.");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  }, properties);
  return button;
}

/** Tells people who use a screen reader. */
export function announce(text) {
  byId("announcer").textContent = text;
}

/** A function that runs `work` once before the next frame, however often it is called. */
export function oncePerFrame(work) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    // Hidden pages get no frames; their text still has to grow.
    const next = document.hidden ? (then) => setTimeout(then, 200) : requestAnimationFrame;
    next(() => {
      waiting = false;
      work();
    });
  };
}

const UNITS = [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]];

/** Bytes as people read them: `10.9 MB`, `26.3 GB`. */
export function shownBytes(count) {
  const [unit, size] = UNITS.find(([, size]) => count >= size) ?? UNITS[2];
  return `${(count / size).toFixed(1)} ${unit}`;
}

export const shownCount = (count) => count.toLocaleString("en");

export const shownSeconds = (seconds) => (seconds < 10 ? `${seconds.toFixed(2)} s` : `${seconds.toFixed(1)} s`);

export const shownSpeed = (speed) => (speed < 100 ? speed.toFixed(1) : speed.toFixed(0));
