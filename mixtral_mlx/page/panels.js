// Panels: beside the messages where there is room, over them where there is not. A panel hears of being opened and
// closed by the event `panel`.

import { byId } from "./dom.js";

const NARROW = matchMedia("(max-width: 1099px)");
const VERY_NARROW = matchMedia("(max-width: 759px)");
const panels = { sidebar: "show-sidebar", settings: "show-settings", experts: "show-experts" };
const isOver = (name) => (name === "sidebar" ? VERY_NARROW : NARROW).matches;

/** Open or close one; what opens gets the focus, and what it was opened with gets it back. */
function toggle(name, isOpen = byId(name).hidden) {
  if (isOpen) {
    for (const other of Object.keys(panels)) {
      const shareAPlace = name !== "sidebar" && other !== "sidebar";
      if (other !== name && (shareAPlace || isOver(other))) close(other);
    }
  }
  byId(name).hidden = !isOpen;
  byId(panels[name]).setAttribute("aria-expanded", String(isOpen));
  if (name === "sidebar") byId("show-sidebar").hidden = isOpen && !isOver("sidebar");
  byId(name).dispatchEvent(new CustomEvent("panel", { detail: isOpen }));
  cover();
  const opener = byId(panels[name]);
  if (isOpen) byId(name).querySelector("button, input, textarea")?.focus();
  else (opener.hidden ? byId("message") : opener).focus();
}

function close(name) {
  byId(name).hidden = true;
  byId(panels[name]).setAttribute("aria-expanded", "false");
  byId(name).dispatchEvent(new CustomEvent("panel", { detail: false }));
}

/** Keeps what a panel lies over from being used; its name, if there is one. */
export function cover() {
  const over = Object.keys(panels).find((name) => !byId(name).hidden && isOver(name));
  byId("shade").hidden = !over;
  byId("main").inert = Boolean(over);
  byId("sidebar").inert = Boolean(over && over !== "sidebar");
  return over;
}

/** Close the panel that lies over the messages. */
export function closeOverlays() {
  const over = cover();
  if (over) toggle(over, false);
}

function arrange() {
  const isOpen = !VERY_NARROW.matches;
  byId("sidebar").hidden = !isOpen;
  byId("show-sidebar").hidden = isOpen;
  byId("show-sidebar").setAttribute("aria-expanded", String(isOpen));
  cover();
}

/** Lay them out for this window, and for what becomes of it. */
export function setUpPanels() {
  for (const [name, opener] of Object.entries(panels)) byId(opener).addEventListener("click", () => toggle(name));
  byId("hide-sidebar").addEventListener("click", () => toggle("sidebar", false));
  byId("shade").addEventListener("click", closeOverlays);
  for (const button of document.querySelectorAll("[data-close]")) {
    button.addEventListener("click", () => toggle(button.closest(".panel").id, false));
  }
  NARROW.addEventListener("change", cover);
  VERY_NARROW.addEventListener("change", arrange);
  arrange();
}
