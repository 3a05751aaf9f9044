// What the page tells and asks beside the messages: a note above them, an offer to take something back, the key.

import { hasKey, useKey } from "./api.js";
import { byId } from "./dom.js";

const UNDO_MS = 12_000;

let shown = "";

/** A note that stays until it is closed, or what it is about is over; `act` is what its button does. */
export function notice(about, message, hint, action, act) {
  shown = about;
  byId("notice-message").textContent = message;
  byId("notice-hint").textContent = hint;
  byId("notice-action").textContent = action;
  byId("notice-action").onclick = act;
  byId("notice").hidden = false;
}

/** Close the note if it is about that; without, whatever it is about. */
export function hideNotice(about = shown) {
  if (about !== shown) return;
  byId("notice").hidden = true;
  shown = "";
}

let undoTimer = 0;

/** Say what was done, and for a while offer to take it back; `undo` null: only say it. */
export function offerUndo(text, undo) {
  clearTimeout(undoTimer);
  byId("toast").hidden = false;
  byId("toast-text").textContent = text;
  byId("toast-action").hidden = !undo;
  byId("toast-action").onclick = () => {
    byId("toast").hidden = true;
    undo();
  };
  const hide = () => {
    // Not from under the finger of somebody who is about to press it.
    if (byId("toast").matches(":hover, :focus-within")) undoTimer = setTimeout(hide, 2000);
    else byId("toast").hidden = true;
  };
  undoTimer = setTimeout(hide, UNDO_MS);
}

let askingForKey = null;

/** Ask for the key, once however often this is called; whether one was given. */
export function askForKey() {
  askingForKey ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    byId("key-text").textContent = hasKey()
      ? "The key was not accepted. Enter the one that the server was started with; it is kept until this tab is closed."
      : "Enter the API key that the server was started with. It is kept until this tab is closed.";
    byId("key").value = "";
    dialog.returnValue = "";
    dialog.onclose = () => {
      askingForKey = null;
      const given = dialog.returnValue === "given";
      if (given) useKey(byId("key").value.trim());
      byId("key").value = "";
      resolve(given);
    };
    dialog.showModal();
    byId("key").focus();
  });
  return askingForKey;
}
