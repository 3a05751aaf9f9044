// The page as a whole: which conversation is open, the reply under way, and what each button and key does.

import * as api from "./api.js";
import { announce, byId, element, oncePerFrame, shownBytes, shownCount, shownSeconds, shownSpeed } from "./dom.js";
import { ExpertsView } from "./experts.js";
import { asJson, asMarkdown, download, fileName, fromJson } from "./files.js";
import { askForKey, hideNotice, notice, offerUndo } from "./notices.js";
import { closeOverlays, cover, setUpPanels } from "./panels.js";
import { SettingsForm } from "./settings.js";
import * as store from "./store.js";
import { conversationRow, NEEDS_KEY, Thread } from "./thread.js";

const SAVE_EVERY_MS = 2000;
const STATS_EVERY_MS = 3000;
const LOADING_EVERY_MS = 1000;
const ANNOUNCED = 1500;

let conversations = store.all();
const notKept = new Set(); // Those with something that the storage had no room for.
let current = conversations[0] ?? store.fresh();
let reply = null; // {conversation, message, controller, begun, first, last, pieces, progress, savedAt}
let model = null;

const thread = new Thread(byId("thread"), { edit, again, askKey: async (message) => (await askForKey()) && again(message) });
const settings = new SettingsForm(() => settingsChanged());
const experts = new ExpertsView();
const redraw = oncePerFrame(drawReply);

// Conversations.

function open(conversation) {
  current = conversation;
  draw();
  settings.show(current);
  scrollToEnd();
}

function startNew() {
  closeOverlays();
  open(current.messages.length || current.title ? store.fresh() : current);
  byId("message").focus();
}

function draw() {
  byId("title").textContent = current.title || "New conversation";
  document.title = current.title ? `${current.title} · Mixtral` : "Mixtral";
  byId("welcome").hidden = current.messages.length > 0;
  byId("more").disabled = current.messages.length === 0;
  thread.show(current.messages, reply);
  drawList();
  drawComposer();
}

function drawList() {
  const rows = conversations.map((conversation) =>
    conversationRow(conversation, {
      isCurrent: conversation.id === current.id,
      isLive: conversation === reply?.conversation,
      open: () => {
        closeOverlays();
        open(conversation);
        focusMessage();
      },
      remove: () => remove(conversation),
    }),
  );
  const list = byId("conversations");
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  const id = focused?.closest("li").dataset.id;
  list.replaceChildren(...rows);
  // Rows move when another tab keeps something; the focus goes with its own.
  rows.find((row) => row.dataset.id === id)?.querySelector(`.${focused?.classList[0]}`)?.focus();
  byId("export-all").disabled = conversations.length === 0;
}

function keep(conversation) {
  insert(conversation);
  try {
    store.save(conversation);
    notKept.delete(conversation);
    hideNotice("storage");
  } catch (error) {
    notKept.add(conversation);
    notice("storage", error.message, error.hint, "Export all", exportAll);
  }
}

function insert(conversation) {
  conversations = [conversation, ...conversations.filter(({ id }) => id !== conversation.id)].sort(store.latestFirst);
}

function remove(conversation) {
  if (reply?.conversation === conversation) stop();
  store.remove(conversation.id);
  drop(conversation);
  hideNotice("storage");
  focusMessage();
  offerUndo(`Deleted “${conversation.title}”.`, () => {
    // Another tab, where a reply ran, may have brought its own back.
    if (conversations.some(({ id }) => id === conversation.id)) conversation.id = store.identifier();
    keep(conversation);
    open(conversation);
    focusMessage();
  });
}

function drop(conversation) {
  conversations = conversations.filter((other) => other !== conversation);
  if (conversation === current) open(conversations[0] ?? store.fresh());
  else drawList();
}

function settingsChanged() {
  try {
    store.keepDefaults(current);
  } catch {
    // A new conversation then begins without.
  }
  if (current.messages.length) keep(current);
}

// Asking and answering.

function send(text) {
  if (reply || !text.trim()) return;
  if (!current.title) current.title = titleOf(text);
  current.messages.push({ role: "user", content: text });
  byId("message").value = "";
  fitMessage();
  answer(current);
}

const titleOf = (text) => [...text.trim().split("\n")[0].replace(/\s+/g, " ")].slice(0, 60).join("");

function edit(message, text) {
  replaceFrom(message, "Edited. What followed was replaced.", () => [{ role: "user", content: text }]);
}

function again(message) {
  replaceFrom(message, message.content ? "The earlier reply was replaced." : "", () => []);
}

// Drops `message` and what follows, which can be undone, and asks again.
function replaceFrom(message, said, replacement) {
  if (reply) stop();
  const conversation = current;
  const before = conversation.messages;
  const place = before.indexOf(message);
  if (place < 0) return; // It went while a key was asked for.
  const after = (conversation.messages = [...before.slice(0, place), ...replacement()]);
  answer(conversation);
  focusMessage();
  if (!said) return;
  offerUndo(said, () => {
    if (reply?.conversation === conversation) stop();
    if (conversation.messages !== after) return openCopy(conversation, before); // Another tab has gone on since.
    conversation.messages = before;
    keep(conversation);
    if (conversation === current) draw();
    focusMessage();
  });
}

function openCopy(conversation, messages) {
  const copy = store.adopted({ ...conversation, messages });
  keep(copy);
  open(copy);
  focusMessage();
}

async function answer(conversation) {
  const message = { role: "assistant", content: "" };
  const mine = { conversation, message, controller: new AbortController(), begun: performance.now(), pieces: 0, savedAt: 0 };
  const body = bodyFor(conversation);
  conversation.messages.push(message);
  reply = mine;
  conversation.updated = Date.now();
  keep(conversation);
  draw();
  scrollToEnd();
  announce("Mixtral is answering.");
  watchMemory();
  try {
    await experts.begin();
    for await (const part of api.reply(body, mine.controller.signal)) take(mine, part);
  } catch (error) {
    fail(mine, error);
  }
  finish(mine);
}

function bodyFor({ system, sampling, messages }) {
  // Half a character, which a model may end with, is no text that a server takes.
  const said = ({ role, content }) => ({ role, content: content.toWellFormed() });
  const all = [{ role: "system", content: system.trim() && system }, ...messages];
  return {
    model: model ?? "default",
    messages: all.filter(({ content }) => content).map(said),
    ...sampling,
  };
}

function take(mine, part) {
  if (mine.message.stopped) return;
  const now = performance.now();
  if (part.progress) mine.progress = part.progress;
  if (part.text) {
    mine.first ??= now;
    mine.last = now;
    mine.pieces++;
    mine.message.content += part.text;
  }
  if (part.finish) mine.message.finish = part.finish;
  if (part.usage) mine.message.stats = statsOf(mine, part);
  if (now - mine.savedAt > SAVE_EVERY_MS) {
    mine.savedAt = now;
    keep(mine.conversation);
  }
  redraw();
}

// The server's own clock where it sends it, else ours, to which each piece of text is a token.
function statsOf(mine, { usage = {}, timings = {} } = {}) {
  const tokens = usage.completion_tokens ?? mine.pieces;
  const seconds = (mine.last - mine.first) / 1000;
  const measured = tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : undefined;
  const stats = {
    tokens,
    promptTokens: usage.prompt_tokens,
    cachedTokens: usage.prompt_tokens_details?.cached_tokens,
    firstTokenSeconds: timings.first_token_s ?? (mine.first && (mine.first - mine.begun) / 1000),
    tokensPerSecond: timings.generation_tps ?? measured,
    promptTokensPerSecond: timings.prompt_tps,
  };
  return Object.fromEntries(Object.entries(stats).filter(([, value]) => Number.isFinite(value)));
}

function stop() {
  if (!reply) return;
  const mine = reply;
  mine.message.stopped = true;
  mine.controller.abort();
  finish(mine);
}

function fail(mine, error) {
  if (mine.message.stopped || error.name === "AbortError") return;
  const known = error instanceof api.ServerError;
  if (!known) console.error(error);
  mine.message.error = {
    message: known ? error.message : "The page made a mistake.",
    hint: known ? error.hint : "Reload it. If it happens again, please report it.",
    code: error.status === 401 ? NEEDS_KEY : (error.code ?? ""),
  };
}

function finish(mine) {
  if (reply !== mine) return;
  reply = null;
  mine.message.stats ??= mine.pieces ? statsOf(mine) : undefined;
  keep(mine.conversation);
  const isAtEnd = atEnd();
  draw();
  if (isAtEnd) scrollToEnd();
  experts.end();
  watchMemory();
  announce(spoken(mine.message));
  if (mine.message.error?.code === NEEDS_KEY) askForKey().then((given) => given && again(mine.message));
}

function spoken({ content, error, stopped }) {
  if (error) return `${error.message} ${error.hint}`;
  const text = content.length > ANNOUNCED ? `${content.slice(0, ANNOUNCED)} … The rest is in the messages.` : content;
  return stopped ? `Stopped. ${text}` : `Mixtral said: ${text}`;
}

function drawReply() {
  if (!reply) return;
  const isAtEnd = atEnd();
  if (reply.conversation === current) thread.update(reply);
  if (isAtEnd) scrollToEnd();
  drawComposer();
}

// The field for messages, and the line below it.

// On a telephone the focus would bring up the keyboard over what is to be read.
function focusMessage() {
  (matchMedia("(pointer: coarse)").matches ? scroller : byId("message")).focus({ preventScroll: true });
}

function drawComposer() {
  const wasOn = document.activeElement;
  byId("send").hidden = Boolean(reply);
  byId("stop").hidden = !reply;
  byId("send").disabled = !byId("message").value.trim();
  byId("live").textContent = reply ? progressOf(reply) : "";
  byId("to-end").hidden = atEnd();
  if (wasOn === byId("stop") && !reply) focusMessage();
}

function progressOf({ first, last, pieces, begun, progress }) {
  if (!first) return progress && progress.done < progress.total ? `reading ${shownCount(progress.done)}/${shownCount(progress.total)}` : "waiting";
  const speed = pieces > 1 && last > first ? `${shownSpeed((pieces - 1) / ((last - first) / 1000))} tokens/s · ` : "";
  return `${speed}first after ${shownSeconds((first - begun) / 1000)}`;
}

function fitMessage() {
  const field = byId("message");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  byId("send").disabled = !field.value.trim();
}

const scroller = byId("scroller");
const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
function scrollToEnd() {
  scroller.scrollTop = scroller.scrollHeight;
  byId("to-end").hidden = true;
}

function scrolled() {
  byId("to-end").hidden = atEnd();
  byId("main").classList.toggle("scrolled", scroller.scrollTop > 4);
}

// The server: which models, in what state, and how much memory.

async function connect() {
  try {
    await listModels();
    hideNotice("server");
  } catch (error) {
    return notConnected(error);
  }
  byId("show-experts").hidden = !(await experts.isThere());
  return watchMemory();
}

async function notConnected(error) {
  const enterKey = async () => {
    const given = await askForKey();
    if (given) await connect();
    return given;
  };
  if (error.code === "loading") {
    byId("model-name").textContent = error.message.split(/(?<=\.) /)[0];
    setTimeout(connect, LOADING_EVERY_MS);
  } else if (error.status !== 401) {
    notice("server", error.message, error.hint, "Try again", connect);
  } else if (!(await enterKey())) {
    notice("server", "This server asks for a key.", "Without it nothing can be answered.", "Enter the key", enterKey);
  }
}

async function listModels() {
  const { data } = await api.get("v1/models");
  const names = (Array.isArray(data) ? data : []).map(({ id }) => String(id));
  model = names.includes(model) ? model : (names[0] ?? null);
  byId("model-name").textContent = model ?? "";
  byId("set-model").replaceChildren(...names.map((name) => element("option", { value: name, selected: name === model }, name)));
  byId("model-field").hidden = names.length < 2;
}

let watching = false;
async function watchMemory() {
  if (watching) return;
  watching = true;
  try {
    drawServer(await api.get("stats"));
  } catch {
    // Replies say when the server is gone.
  }
  watching = false;
  if (reply) setTimeout(() => reply && watchMemory(), STATS_EVERY_MS);
}

function drawServer({ memory, requests, experts: streamed }) {
  const rows = [["Model", model]];
  if (memory) {
    byId("memory").textContent = `Memory ${shownBytes(memory.process_bytes)} of ${shownBytes(memory.budget_bytes)}`;
    byId("memory").title = "In use, of what the server may use";
    rows.push(["Memory in use", shownBytes(memory.process_bytes)], ["Memory it may use", shownBytes(memory.budget_bytes)], ["Weights", shownBytes(memory.weights_bytes)]);
    if (memory.kv_limit_bytes) rows.push(["For conversations, at most", shownBytes(memory.kv_limit_bytes)]);
    if (memory.prefix_bytes) rows.push(["Prompts kept", shownBytes(memory.prefix_bytes)]);
  }
  if (Number.isFinite(requests?.finished)) rows.push(["Requests answered", shownCount(requests.finished)]);
  if (streamed && streamed.hits + streamed.misses > 0) {
    rows.push(["Experts found in memory", `${Math.round((100 * streamed.hits) / (streamed.hits + streamed.misses))} %`]);
  }
  byId("server").replaceChildren(...rows.filter(([, value]) => value).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

// Files.

function exportAll() {
  download("conversations.json", "application/json", asJson(conversations));
}

async function importFile(file) {
  try {
    const imported = fromJson(await file.text());
    for (const conversation of imported) keep(conversation);
    if (imported.length) open(imported[0]);
    offerUndo(`Imported ${imported.length} ${imported.length === 1 ? "conversation" : "conversations"}.`, null);
  } catch (error) {
    notice("import", "The file could not be imported.", error.message, "Choose another", () => byId("file").click());
  }
}

// What each button and key does.

function connectButtons() {
  const on = (id, act) => byId(id).addEventListener("click", act);
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send(byId("message").value);
  });
  byId("message").addEventListener("input", fitMessage);
  byId("message").addEventListener("keydown", messageKey);
  on("stop", stop);
  on("to-end", scrollToEnd);
  on("new", startNew);
  on("new-in-sidebar", startNew);
  for (const button of byId("suggestions").querySelectorAll("button")) {
    button.addEventListener("click", () => send(button.textContent));
  }
  on("export-all", exportAll);
  on("import", () => byId("file").click());
  byId("file").addEventListener("change", ({ target }) => {
    if (target.files.length) importFile(target.files[0]);
    target.value = "";
  });
  fromMenu("rename", rename);
  fromMenu("export-markdown", () => download(fileName(current.title, "md"), "text/markdown", asMarkdown(current)));
  fromMenu("export-json", () => download(fileName(current.title, "json"), "application/json", asJson([current])));
  fromMenu("delete", () => remove(current));
  on("notice-close", () => hideNotice());
  byId("experts").addEventListener("panel", ({ detail }) => experts.open(detail));
  on("change-key", async () => (await askForKey()) && connect());
  on("key-cancel", () => byId("key-dialog").close(""));
  on("rename-cancel", () => byId("rename-dialog").close(""));
  byId("key-form").addEventListener("submit", (event) => submitDialog(event, "key-dialog", "given"));
  byId("rename-form").addEventListener("submit", (event) => submitDialog(event, "rename-dialog", "renamed"));
  byId("set-model").addEventListener("change", ({ target }) => {
    model = target.value;
    byId("model-name").textContent = model;
  });
  scroller.addEventListener("scroll", scrolled, { passive: true });
}

function fromMenu(id, act) {
  byId(id).addEventListener("click", () => {
    byId("menu").hidePopover();
    act();
  });
}

function submitDialog(event, id, value) {
  event.preventDefault();
  byId(id).close(value);
}

function rename() {
  const dialog = byId("rename-dialog");
  byId("new-title").value = current.title;
  dialog.returnValue = "";
  dialog.onclose = () => {
    const title = byId("new-title").value.trim();
    if (dialog.returnValue === "renamed" && title) {
      current.title = title;
      keep(current);
      draw();
    }
    byId("more").focus();
  };
  dialog.showModal();
  byId("new-title").select();
}

function messageKey(event) {
  // The Enter that ends the composition of a character sends nothing.
  if (event.isComposing || event.keyCode === 229) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    send(event.target.value);
  } else if (event.key === "ArrowUp" && event.target.value === "" && !reply) {
    const last = current.messages.findLast(({ role }) => role === "user");
    if (last) {
      event.preventDefault();
      thread.edit(last);
    }
  }
}

function pageKey(event) {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (byId("menu").matches(":popover-open")) return;
    if (cover()) closeOverlays();
    else stop();
  } else if (event.key.toLowerCase() === "o" && event.shiftKey && (event.metaKey || event.ctrlKey)) {
    event.preventDefault();
    startNew();
  }
}

// Other tabs.

// What was said here is kept at once, so what another tab keeps takes its place. Not so where a reply is being written:
// what the other tab left of it goes on here, and where both went on, both are kept, as two conversations.
function storageChanged({ key }) {
  if (key === null) conversations.slice().forEach(({ id }) => changedElsewhere(id));
  else if (store.idOf(key) !== null) changedElsewhere(store.idOf(key));
}

function changedElsewhere(id) {
  const here = conversations.find((conversation) => conversation.id === id);
  const there = store.load(id);
  if (!there) return here && deletedElsewhere(here);
  if (!here) insert(there);
  else if (here !== reply?.conversation && !notKept.has(here)) store.takeOver(here, there);
  else if (!store.isBeginning(there.messages, here.messages)) part(here, there);
  else Object.assign(here, { title: there.title, system: there.system, sampling: there.sampling });
  conversations.sort(store.latestFirst);
  if (here !== current) return drawList();
  draw();
  if (!byId("settings").contains(document.activeElement)) settings.show(current);
}

// The other tab offers to bring it back, but knows only a part of a reply that is being written here.
function deletedElsewhere(conversation) {
  if (conversation === reply?.conversation) remove(conversation);
  else drop(conversation);
}

function part(here, there) {
  here.id = store.identifier();
  insert(there);
  keep(here);
  const openOther = () => {
    hideNotice("parted");
    open(there);
    focusMessage();
  };
  notice("parted", `“${here.title}” went on in another tab as well.`, "Both are kept, as two conversations.", "Open the other", openOther);
}

document.addEventListener("keydown", pageKey);
addEventListener("storage", storageChanged);
addEventListener("pagehide", () => reply && keep(reply.conversation));
const isHere = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
byId("where").textContent = isHere
  ? "Mixtral runs on this machine. What you write goes no further."
  : `Mixtral runs on ${location.hostname}. What you write goes there and no further.`;
if (/Mac|iPhone|iPad/.test(navigator.platform)) byId("new-keys").textContent = "⌘ ⇧ O";
connectButtons();
setUpPanels();
open(current);
connect();
