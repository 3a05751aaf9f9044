// A child process that answers: started, spoken to in JSON lines, started again when it dies.
//
// Knows the protocol (mixtral_mlx/helper/schema.json) and nothing of windows. Uses only what Node brings.

import { spawn } from "node:child_process";
import { EventEmitter } from "node:events";

const PROTOCOL = 1;
const ENDS = new Set(["ready", "done", "ok", "stats", "error"]);
// What nobody asked for is emitted under these names; types that are not here may come with a newer helper.
const UNASKED = new Map([["loading", "loading"], ["ready", "model"], ["state", "model"], ["error", "refused"]]);
const STOP_WITHIN_MS = 4000; // The helper promises three seconds.
const STEADY_MS = 60_000; // Who has lived so long starts anew with the shortest wait.

/** What went wrong: `code` is stable, `retryable` says whether the same may succeed later. */
export class HelperError extends Error {
  constructor({ message, code, hint = "", retryable = false }) {
    super(message);
    this.name = "HelperError";
    Object.assign(this, { code, hint, retryable });
  }
}

/** Waits before a restart double from half a second to half a minute. */
export const backoff = (failures) => Math.min(500 * 2 ** (failures - 1), 30_000);

/** Cuts a stream of bytes into lines, wherever the chunks end; they become characters only when they are whole. */
export class Lines {
  #begun = "";

  add(chunk) {
    const lines = (this.#begun + chunk.toString("latin1")).split("\n");
    this.#begun = lines.pop();
    return lines.filter(Boolean).map((line) => Buffer.from(line, "latin1").toString("utf8"));
  }
}

/**
 * The helper and who watches it. Emits `state` ("starting", "running", "waiting", "stopped", "failed") and `log` with
 * lines of its stderr, and of its stdout if they are no messages; with what nobody asked for `loading`, `model` (ready, or
 * let go of) and `refused` (a line, or after a restart the model or the helper itself).
 */
export class Helper extends EventEmitter {
  #options;
  #child = null;
  #pending = new Map(); // id -> the queue of who waits for its messages
  #lastId = 0;
  #failures = 0;
  #restart = null;
  #lastLoad = null;
  #stopping = false;

  constructor({ command = ["mixtral-mlx", "helper"], args = [], env = process.env, wait = backoff } = {}) {
    super();
    this.#options = { command, args, env, wait };
    this.state = "stopped";
    this.hello = null;
  }

  get pid() {
    return this.#child?.pid;
  }

  /** Start it, if it does not run; resolves with its first line. Rejects where it cannot even start. */
  async start() {
    if (this.state === "running") return this.hello;
    this.#stopping = false;
    clearTimeout(this.#restart);
    return new Promise((resolve, reject) => this.#spawn({ resolve, reject }));
  }

  /** Bring a model into memory, also again after a restart. `onProgress` gets messages with bytes done and in all. */
  async load(model, { onProgress, ...options } = {}) {
    this.#lastLoad = { type: "load", model, ...options };
    return this.#last(this.#ask(this.#lastLoad), onProgress);
  }

  /** Answer a chat-completions body: an iterator over messages, the last `done`. To leave it early cancels. */
  async *chat(body, { signal } = {}) {
    const asked = this.#ask({ type: "chat", body });
    const cancel = () => this.#send({ type: "cancel", id: this.#newId(), request: asked.id });
    if (signal?.aborted) cancel();
    signal?.addEventListener("abort", cancel);
    let ended = false;
    try {
      for (;;) {
        const message = await asked.next();
        ended = ENDS.has(message.type);
        if (message.type === "error") throw new HelperError(message);
        yield message;
        if (ended) return;
      }
    } finally {
      signal?.removeEventListener("abort", cancel);
      if (!ended) cancel();
      this.#forget(asked, ended);
    }
  }

  stats() {
    return this.#last(this.#ask({ type: "stats" }));
  }

  unload() {
    this.#lastLoad = null;
    return this.#last(this.#ask({ type: "unload" }));
  }

  /** Tell it how short memory is, as macOS counts: 1, 2 or 4. */
  memoryPressure(level) {
    return this.#last(this.#ask({ type: "memory_pressure", level }));
  }

  /** End it for good; resolves once the process is gone. */
  async stop() {
    this.#stopping = true;
    clearTimeout(this.#restart);
    const child = this.#child;
    if (child) {
      const gone = new Promise((resolve) => child.once("close", resolve));
      this.#send({ type: "shutdown", id: this.#newId() });
      child.stdin.end();
      const late = setTimeout(() => child.kill("SIGKILL"), STOP_WITHIN_MS);
      await gone;
      clearTimeout(late);
    }
    this.#be("stopped");
  }

  // The process.

  #spawn(first) {
    this.#be("starting");
    const { command, args, env } = this.#options;
    const [program, ...before] = command;
    const began = Date.now();
    const child = spawn(program, [...before, ...args, "--parent-pid", String(process.pid)], {
      env,
      stdio: ["pipe", "pipe", "pipe"],
    });
    this.#child = child;
    const lines = new Lines();
    const log = new Lines();
    child.stdout.on("data", (chunk) => {
      for (const line of lines.add(chunk)) this.#hear(line, first);
    });
    // Who does not read a child's stderr stops the child, sooner or later.
    child.stderr.on("data", (chunk) => log.add(chunk).forEach((line) => this.emit("log", line)));
    child.stdin.on("error", () => {}); // It has gone; `close` says so too.
    child.on("error", (error) => {
      if (child.pid === undefined) this.#ended({ child, began, first, error });
    });
    child.on("close", (code, signal) => this.#ended({ child, began, first, code, signal }));
  }

  #hear(line, first) {
    const message = asMessage(line);
    if (message) this.#take(message, first);
    else this.emit("log", line); // Something between us and the helper has printed it, a wrapper say.
  }

  #take(message, first) {
    if (message.type === "hello") return this.#greeted(message, first);
    const asked = this.#pending.get(message.id);
    if (asked) return asked.put(message);
    const name = UNASKED.get(message.type);
    if (message.id === undefined && name) this.emit(name, message);
  }

  #greeted(message, first) {
    if (message.protocol !== PROTOCOL) return this.#giveUp(message.protocol, first);
    this.hello = message;
    this.#be("running");
    first?.resolve(message);
    if (!first && this.#lastLoad) {
      this.#last(this.#ask(this.#lastLoad)).then(
        (ready) => this.emit("model", ready),
        (error) => this.emit("refused", error),
      );
    }
  }

  #giveUp(protocol, first) {
    this.#stopping = true;
    this.#child.kill("SIGTERM");
    const error = new HelperError({
      code: "protocol",
      message: `The helper speaks protocol ${protocol}, not ${PROTOCOL}.`,
      hint: "Let the app and mixtral-mlx be of versions that belong together.",
    });
    this.#be("failed");
    if (first) first.reject(error);
    else this.emit("refused", error);
  }

  #ended({ child, began, first, code, signal, error }) {
    if (this.#child !== child) return;
    this.#child = null;
    const how = error ? error.message : signal ? `by ${signal}` : `with exit code ${code}`;
    const gone = new HelperError({ code: "helper_gone", message: `The helper has ended ${how}.`, retryable: true });
    for (const asked of this.#pending.values()) asked.put({ type: "error", ...gone, message: gone.message });
    this.#pending.clear();
    if (this.state === "starting" && first) first.reject(gone);
    if (this.#stopping) return;
    if (error || code === 2 || (this.state === "starting" && first)) {
      // It cannot start, or was called wrongly: the next time would be no better.
      return this.#be("failed");
    }
    this.#failures = Date.now() - began > STEADY_MS ? 1 : this.#failures + 1;
    this.#be("waiting");
    this.#restart = setTimeout(() => this.#spawn(null), this.#options.wait(this.#failures));
  }

  #be(state) {
    if (this.state === state) return;
    this.state = state;
    this.emit("state", state);
  }

  // Requests.

  #newId() {
    return String(++this.#lastId);
  }

  #ask(message) {
    const asked = new Asked(this.#newId());
    this.#pending.set(asked.id, asked);
    if (!this.#send({ ...message, id: asked.id })) {
      this.#pending.delete(asked.id);
      asked.put({ type: "error", code: "helper_gone", message: "The helper is not running.", retryable: true });
    }
    return asked;
  }

  #send(message) {
    const stdin = this.#child?.stdin;
    if (!stdin?.writable || this.state === "stopped" || this.state === "failed") return false;
    stdin.write(JSON.stringify(message) + "\n");
    return true;
  }

  async #last(asked, onProgress = () => {}) {
    try {
      for (;;) {
        const message = await asked.next();
        if (message.type === "error") throw new HelperError(message);
        if (ENDS.has(message.type)) return message;
        onProgress(message);
      }
    } finally {
      this.#pending.delete(asked.id);
    }
  }

  /** Take no more of a request's messages, but keep its id until the helper has ended it. */
  #forget(asked, ended) {
    if (ended) this.#pending.delete(asked.id);
    else if (this.#pending.has(asked.id)) asked.drain(() => this.#pending.delete(asked.id));
  }
}

/** The message that a line is; null if it is none. */
function asMessage(line) {
  try {
    const message = JSON.parse(line);
    return typeof message?.type === "string" ? message : null;
  } catch {
    return null;
  }
}

/** The messages that come for one request. */
class Asked {
  #messages = [];
  #wake = null;
  #onEnd = null;

  constructor(id) {
    this.id = id;
  }

  put(message) {
    if (this.#onEnd) {
      if (ENDS.has(message.type)) this.#onEnd();
      return;
    }
    this.#messages.push(message);
    this.#wake?.();
  }

  async next() {
    while (!this.#messages.length) await new Promise((resolve) => (this.#wake = resolve));
    return this.#messages.shift();
  }

  drain(onEnd) {
    this.#onEnd = onEnd;
    if (this.#messages.some((message) => ENDS.has(message.type))) onEnd();
    this.#messages = [];
  }
}
