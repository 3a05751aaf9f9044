// Conversations in the browser's local storage, one entry each. Draws nothing.
//
// A conversation: {id, title, created, updated, system, sampling, messages}. A message: {role, content} and for replies
// also stats, stopped, error, finish. Times are milliseconds.
//
// Several tabs share the storage. What one keeps the others take over, entry by entry; page.js says what becomes of a
// conversation in which two of them go on at once.

const PREFIX = "mixtral-mlx/conversation/";
const DEFAULTS = "mixtral-mlx/defaults";

/** Storage that is full or not there. What was to be kept is still on the page. */
export class NotKept extends Error {
  constructor(isFull) {
    super(isFull ? "This browser’s storage for the page is full." : "This browser keeps nothing for the page.");
    this.hint = isFull
      ? "The newest messages are lost when the page is closed. Export what you need, then delete old conversations."
      : "Conversations are lost when the page is closed: export what you need, or allow the page to store data.";
    this.isFull = isFull;
  }
}

/** All conversations, the latest first. Entries that are no conversations are left alone. */
export function all() {
  const found = [];
  try {
    for (let place = 0; place < localStorage.length; place++) {
      const name = localStorage.key(place);
      if (name.startsWith(PREFIX)) found.push(read(name));
    }
  } catch {
    return [];
  }
  return found.filter(Boolean).sort(latestFirst);
}

export const latestFirst = (one, other) => other.updated - one.updated;

function read(name) {
  try {
    const conversation = checked(JSON.parse(localStorage.getItem(name)));
    return { ...conversation, id: name.slice(PREFIX.length) };
  } catch {
    return null;
  }
}

/** A conversation as it is kept now, perhaps by another tab; null where there is none. */
export const load = (id) => read(PREFIX + id);

/** The id of the conversation that an entry of the storage is; null if it is none. */
export const idOf = (name) => (name.startsWith(PREFIX) ? name.slice(PREFIX.length) : null);

/** Make `here` what another tab kept. Messages that are the same stay the same objects: the page knows them by that. */
export function takeOver(here, there) {
  const isSame = (message, place) => JSON.stringify(message) === JSON.stringify(here.messages[place]);
  const messages = there.messages.map((message, place) => (isSame(message, place) ? here.messages[place] : message));
  const isAsBefore = messages.length === here.messages.length && messages.every((message, place) => message === here.messages[place]);
  Object.assign(here, there, { messages: isAsBefore ? here.messages : messages });
}

/** Whether `messages` say nothing that `others` do not; the last of these may have grown since. */
export function isBeginning(messages, others) {
  return messages.every(({ role, content }, place) => {
    const other = others[place];
    if (role !== other?.role) return false;
    return other === others.at(-1) ? other.content.startsWith(content) : other.content === content;
  });
}

/** Keep a conversation as it is now, or throw `NotKept`. */
export function save(conversation) {
  write(PREFIX + conversation.id, conversation);
}

export function remove(id) {
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // Then it was never kept.
  }
}

function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch (error) {
    throw new NotKept(error.name === "QuotaExceededError");
  }
}

/** A conversation without messages, with the system prompt and settings of the one before. */
export function fresh() {
  const { system, sampling } = defaults();
  const now = Date.now();
  return { id: identifier(), title: "", created: now, updated: now, system, sampling, messages: [] };
}

// crypto.randomUUID is missing where a page came without TLS from another machine.
export function identifier() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function defaults() {
  try {
    const { system, sampling } = JSON.parse(localStorage.getItem(DEFAULTS)) ?? {};
    return { system: textOr(system, ""), sampling: objectOr(sampling) };
  } catch {
    return { system: "", sampling: {} };
  }
}

/** What the next new conversation begins with. */
export function keepDefaults({ system, sampling }) {
  write(DEFAULTS, { system, sampling });
}

/** A conversation from outside with a new id; throws an error that says what is wrong with it. */
export function adopted(value) {
  return { ...checked(value), id: identifier() };
}

function checked(value) {
  if (!isObject(value)) throw new Error("is no conversation but " + kindOf(value));
  if (!Array.isArray(value.messages)) throw new Error("has no list of messages");
  const now = Date.now();
  return {
    id: textOr(value.id, ""),
    title: textOr(value.title, "").slice(0, 200),
    created: numberOr(value.created, now),
    updated: numberOr(value.updated, now),
    system: textOr(value.system, ""),
    sampling: objectOr(value.sampling),
    messages: value.messages.map(checkedMessage),
  };
}

function checkedMessage(value, place) {
  const role = value?.role;
  if (role !== "user" && role !== "assistant") {
    throw new Error(`has a message ${place + 1} whose role is ${kindOf(role)}, expected "user" or "assistant"`);
  }
  if (typeof value.content !== "string") throw new Error(`has a message ${place + 1} whose content is no text`);
  const message = { role, content: value.content };
  if (value.stopped === true) message.stopped = true;
  if (typeof value.finish === "string") message.finish = value.finish;
  if (isObject(value.stats)) message.stats = numbersOf(value.stats);
  if (isObject(value.error)) {
    message.error = { message: textOr(value.error.message, "It failed."), hint: textOr(value.error.hint, ""), code: textOr(value.error.code, "") };
  }
  return message;
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const textOr = (value, otherwise) => (typeof value === "string" ? value : otherwise);
const numberOr = (value, otherwise) => (Number.isFinite(value) ? value : otherwise);
const objectOr = (value) => (isObject(value) ? value : {});
const numbersOf = (value) => Object.fromEntries(Object.entries(value).filter(([, one]) => Number.isFinite(one)));
const kindOf = (value) => (value === undefined ? "missing" : JSON.stringify(value)?.slice(0, 40));
