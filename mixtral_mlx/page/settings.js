// The settings of a conversation as a form: what each may be, what is wrong with it, and what is sent to the server.

import { byId, element } from "./dom.js";

// An empty field leaves the choice to the server.
const FIELDS = [
  { name: "temperature", label: "Temperature", low: 0, high: 2, step: 0.1, help: "0 takes the likeliest token, more is bolder" },
  { name: "top_p", label: "Top p", low: 0, high: 1, step: 0.05, help: "among the likeliest that make up this share" },
  { name: "top_k", label: "Top k", low: 0, high: 1 << 20, step: 1, whole: true, help: "among this many of the likeliest, 0 for all" },
  { name: "min_p", label: "Min p", low: 0, high: 1, step: 0.05, help: "nothing below this × the likeliest" },
  { name: "seed", label: "Seed", low: 0, high: Number.MAX_SAFE_INTEGER, step: 1, whole: true, help: "same seed, same text" },
  { name: "max_tokens", label: "Max tokens", low: 1, high: 2 ** 31, step: 1, whole: true, help: "stop after this many tokens" },
];
const MOST_STOPS = 4;

/** The form for a conversation's settings; calls `changed()` when one was changed to something valid. */
export class SettingsForm {
  constructor(changed) {
    this.changed = changed;
    byId("sampling").append(...FIELDS.map((field) => this.row(field)));
    for (const { name } of FIELDS) byId(`set-${name}`).addEventListener("input", () => this.read());
    byId("set-stop").addEventListener("input", () => this.read());
    byId("set-system").addEventListener("input", () => this.read());
    byId("reset-sampling").addEventListener("click", () => this.reset());
    this.setUpTheme();
  }

  row({ name, label, help, low, high, step }) {
    return element(
      "div",
      { class: "field" },
      element("label", { for: `set-${name}` }, label),
      element("input", {
        id: `set-${name}`, type: "number", inputmode: "decimal", min: low, max: high, step,
        placeholder: "default", autocomplete: "off", "aria-describedby": `help-${name}`,
      }),
      element("p", { class: "help", id: `help-${name}` }, help),
    );
  }

  /** Show those of `conversation`, which is changed as they are. */
  show(conversation) {
    this.conversation = conversation;
    for (const { name } of FIELDS) byId(`set-${name}`).value = conversation.sampling[name] ?? "";
    byId("set-stop").value = (conversation.sampling.stop ?? []).map?.(escaped).join("\n") ?? "";
    byId("set-system").value = conversation.system;
    this.check();
  }

  read() {
    const sampling = {};
    for (const field of FIELDS) {
      const input = byId(`set-${field.name}`);
      if (input.value !== "" && !problem(field, input)) sampling[field.name] = Number(input.value);
    }
    const stop = stops();
    if (stop.length && stop.length <= MOST_STOPS) sampling.stop = stop;
    Object.assign(this.conversation, { sampling, system: byId("set-system").value });
    if (this.check()) this.changed();
  }

  // What is wrong is said below the field; true when nothing is.
  check() {
    const problems = FIELDS.map((field) => {
      const input = byId(`set-${field.name}`);
      return say(input, byId(`help-${field.name}`), problem(field, input), field.help);
    });
    const many = stops().length > MOST_STOPS ? `at most ${MOST_STOPS} stop texts, one a line` : "";
    problems.push(say(byId("set-stop"), byId("help-stop"), many, "one a line; \\n is a new line"));
    return !problems.some(Boolean);
  }

  reset() {
    for (const { name } of FIELDS) byId(`set-${name}`).value = "";
    byId("set-stop").value = "";
    this.read();
    byId("set-temperature").focus();
  }

  setUpTheme() {
    const chosen = document.documentElement.dataset.theme ?? "auto";
    for (const choice of document.querySelectorAll("input[name=theme]")) {
      choice.checked = choice.value === chosen;
      choice.addEventListener("change", () => useTheme(choice.value));
    }
  }
}

function problem({ low, high, whole }, input) {
  if (input.value === "" && !input.validity.badInput) return "";
  const value = Number(input.value);
  const fits = !input.validity.badInput && value >= low && value <= high && (!whole || Number.isInteger(value));
  return fits ? "" : `expected ${whole ? "a whole number" : "a number"} from ${low} to ${high}`;
}

function say(input, help, wrong, otherwise) {
  help.textContent = wrong || otherwise;
  help.classList.toggle("wrong", Boolean(wrong));
  input.setAttribute("aria-invalid", String(Boolean(wrong)));
  return wrong;
}

const stops = () => byId("set-stop").value.split("\n").filter(Boolean).map(unescaped);
const ESCAPES = { n: "\n", t: "\t", "\\": "\\" };
const unescaped = (text) => text.replace(/\\([nt\\])/g, (_, letter) => ESCAPES[letter]);
const escaped = (text) => String(text).replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll("\t", "\\t");

function useTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("mixtral-mlx/theme", theme);
  } catch {
    // Then it holds until the page is closed.
  }
}
