// Conversations as files: out as Markdown or JSON, in from JSON.

import { element } from "./dom.js";
import { adopted } from "./store.js";

const FORMAT = "mixtral-mlx conversations";

export function asJson(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 2) + "\n";
}

export function asMarkdown({ title, system, messages, created }) {
  const names = { user: "You", assistant: "Mixtral" };
  const parts = [`# ${oneLine(title) || "Conversation"}`, new Date(created).toISOString().slice(0, 10)];
  if (system) parts.push(`## System prompt\n\n${system}`);
  parts.push(...messages.map(({ role, content }) => `## ${names[role]}\n\n${content}`));
  return parts.join("\n\n") + "\n";
}

/** Conversations with new ids from the text of a file; throws an error that says what was expected. */
export function fromJson(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON. Choose one that was exported here as JSON.");
  }
  if (value?.format !== FORMAT || !Array.isArray(value.conversations)) {
    throw new Error(`The file says no “format”: “${FORMAT}”. Choose one that was exported here as JSON.`);
  }
  if (value.version !== 1) {
    throw new Error(`The file is of version ${JSON.stringify(value.version)}, this page reads version 1. Reload the page for its newest version.`);
  }
  return value.conversations.map((one, place) => {
    try {
      return adopted(one);
    } catch (error) {
      throw new Error(`Conversation ${place + 1} of the file ${error.message}. Nothing was imported.`);
    }
  });
}

/** Hand a text to the browser as a download. */
export function download(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

export function fileName(title, extension) {
  const words = oneLine(title).normalize("NFC").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "");
  return `${[...words].slice(0, 50).join("") || "conversation"}.${extension}`;
}

const oneLine = (text) => text.replace(/\s+/g, " ").trim();
