// The messages of a conversation on the page, and what can be done with each of them.

import { copyButton, element, icon, iconButton, shownCount, shownSeconds, shownSpeed } from "./dom.js";
import { Markdown } from "./markdown.js";

/** The code of an error that a key would mend. */
export const NEEDS_KEY = "unauthorized";

/** Shows one conversation. `actions`: edit(message, text), again(message), askKey(). */
export class Thread {
  constructor(container, actions) {
    this.container = container;
    this.actions = actions;
    this.views = new Map();
  }

  /** Show `messages`, those already shown where they are. */
  show(messages, live) {
    for (const [message, view] of this.views) {
      if (!messages.includes(message)) {
        view.node.remove();
        this.views.delete(message);
      }
    }
    messages.forEach((message, place) => {
      if (!this.views.has(message)) this.views.set(message, new MessageView(message, this.actions));
      const { node } = this.views.get(message);
      // What is moved loses the focus, so only what is elsewhere is.
      const there = this.container.children[place] ?? null;
      if (there !== node) this.container.insertBefore(node, there);
    });
    for (const [message, view] of this.views) view.update(message === live?.message ? live : null);
  }

  update(live) {
    this.views.get(live.message)?.update(live);
  }

  edit(message) {
    this.views.get(message)?.edit();
  }
}

class MessageView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.isUser = message.role === "user";
    this.body = element("div", { class: "body", dir: "auto" });
    this.below = element("div", { class: "below" });
    this.foot = element("div", { class: "foot" });
    this.node = element(
      "article",
      { class: `message ${message.role}`, "aria-label": this.isUser ? "You" : "Mixtral" },
      this.body, this.below, this.foot,
    );
    this.markdown = this.isUser ? null : new Markdown(this.body);
  }

  /** Show the message as it is now, `live` being the reply under way if it is this one. */
  update(live) {
    const state = live ? null : JSON.stringify(this.message);
    if (state && state === this.state) return;
    this.state = state;
    const { content } = this.message;
    if (this.isUser) this.body.textContent = content;
    else if (this.shown !== content) this.markdown.show(content);
    this.body.hidden = content === "";
    this.shown = content;
    this.node.classList.toggle("live", Boolean(live));
    this.node.setAttribute("aria-busy", String(Boolean(live)));
    if (live) {
      this.below.replaceChildren(...(content ? [] : [waiting(live)]));
      this.foot.replaceChildren();
    } else {
      this.below.replaceChildren(...this.notes());
      this.foot.replaceChildren(...this.tools());
    }
  }

  notes() {
    const { error, stopped, finish, content } = this.message;
    if (error) return [this.problem(error)];
    if (stopped) return [note(content ? "Stopped." : "Stopped before the first word.")];
    if (finish === "length") return [note("The reply reached the most tokens it may have. Raise “Max tokens” in the settings for longer ones.")];
    if (this.isUser) return [];
    if (!finish) return [note("The reply was broken off.")];
    return content ? [] : [note("The model answered with nothing.")];
  }

  problem({ message, hint, code }) {
    const askKey = code === NEEDS_KEY;
    return element(
      "div",
      { class: "problem" },
      element("p", {}, element("strong", {}, message), hint ? ` ${hint}` : null),
      element(
        "div",
        { class: "row" },
        askKey ? element("button", { type: "button", class: "primary", onclick: () => this.actions.askKey(this.message) }, "Enter the key") : null,
        element("button", { type: "button", class: askKey ? "quiet" : "primary", onclick: () => this.actions.again(this.message) }, "Try again"),
      ),
    );
  }

  tools() {
    const tools = [];
    if (this.message.content) tools.push(copyButton(this.isUser ? "Copy your message" : "Copy the reply", () => this.message.content));
    if (this.isUser) tools.push(iconButton("edit", "Edit and continue from here", () => this.edit()));
    else tools.push(iconButton("again", "Answer again", () => this.actions.again(this.message)));
    const { stats } = this.message;
    const numbers = stats ? element("p", { class: "numbers", title: details(stats) }, ...figures(stats)) : null;
    return [element("div", { class: "tools" }, ...tools), numbers].filter(Boolean);
  }

  edit() {
    const area = element("textarea", { "aria-label": "Edit your message", rows: 3 });
    area.value = this.message.content;
    const done = () => {
      form.replaceWith(this.body);
      this.foot.hidden = false;
      this.foot.querySelector("button:last-of-type")?.focus();
    };
    const send = () => {
      const text = area.value;
      if (!text.trim()) return area.focus();
      done();
      return this.actions.edit(this.message, text);
    };
    const form = element(
      "form",
      { class: "edit", onsubmit: (event) => (event.preventDefault(), send()) },
      area,
      element(
        "div",
        { class: "row end" },
        element("span", { class: "help" }, "What follows is answered anew."),
        element("button", { type: "button", class: "quiet", onclick: done }, "Cancel"),
        element("button", { type: "submit", class: "primary" }, "Send"),
      ),
    );
    area.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        done();
      } else if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        send();
      }
    });
    this.body.replaceWith(form);
    this.foot.hidden = true;
    area.focus();
  }
}

const note = (text) => element("p", { class: "note" }, text);

function waiting({ progress }) {
  const dots = element("span", { class: "dots", "aria-hidden": "true" }, element("i"), element("i"), element("i"));
  if (!progress || progress.done >= progress.total) return element("p", { class: "waiting" }, dots, element("span", { class: "unseen" }, "Waiting for the reply"));
  const cached = progress.cached ? `, ${shownCount(progress.cached)} of them known` : "";
  return element(
    "div",
    { class: "waiting" },
    element("progress", { max: progress.total, value: progress.done, "aria-label": "Reading the prompt" }),
    element("span", {}, `Reading ${shownCount(progress.done)} of ${shownCount(progress.total)} tokens${cached}`),
  );
}

function figures({ tokensPerSecond, firstTokenSeconds, tokens }) {
  const parts = [];
  if (tokensPerSecond) parts.push(`${shownSpeed(tokensPerSecond)} tokens/s`);
  if (firstTokenSeconds !== undefined) parts.push(`first after ${shownSeconds(firstTokenSeconds)}`);
  if (tokens) parts.push(`${shownCount(tokens)} ${tokens === 1 ? "token" : "tokens"}`);
  return parts.map((part) => element("span", {}, part));
}

function details({ promptTokens, cachedTokens, promptTokensPerSecond }) {
  if (promptTokens === undefined) return null;
  const cached = cachedTokens ? `, ${shownCount(cachedTokens)} of them known from before` : "";
  const speed = promptTokensPerSecond ? `, ${shownSpeed(promptTokensPerSecond)} a second` : "";
  return `The prompt had ${shownCount(promptTokens)} tokens${cached}${speed}.`;
}

/** What a row in the list of conversations looks like. */
export function conversationRow(conversation, { isCurrent, isLive, open, remove }) {
  const title = conversation.title || "New conversation";
  return element(
    "li",
    { class: isLive ? "live" : null, dataset: { id: conversation.id } },
    element("button", { type: "button", class: "open", title, "aria-current": isCurrent ? "true" : null, onclick: open },
      element("bdi", {}, title), isLive ? element("span", { class: "unseen" }, ", answering") : null),
    element("button", { type: "button", class: "icon-button", "aria-label": `Delete ${title}`, title: "Delete", onclick: remove }, icon("delete")),
  );
}
