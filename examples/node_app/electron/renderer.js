// The page. Model text goes into the page as text only. Tried in a browser by this project's tests.
const $ = (id) => document.getElementById(id);
const messages = [];
let answer = null; // { id, line } of the one that is being written
let count = 0;
let canAsk = false;

const line = (who, text) => {
  const made = document.createElement("p");
  made.textContent = `${who}: ${text}`;
  $("conversation").append(made);
  return made;
};
const enable = () => {
  $("send").disabled = !canAsk || answer !== null;
  $("stop").disabled = answer === null;
};

window.mixtral.onState((state, why) => {
  $("state").textContent = why ? `${state}: ${why}` : state;
  $("begin").hidden = state !== "failed";
  canAsk = state === "ready" || state === "unloaded"; // To ask brings back a model that was let go of.
  enable();
});
window.mixtral.onMessage((message) => {
  if (message.type === "loading") {
    $("state").textContent = `${message.phase} ${Math.round((100 * message.done_bytes) / message.total_bytes)} %`;
  }
  if (!answer || message.id !== answer.id) return;
  if (message.type === "text") {
    answer.text += message.text;
    answer.line.textContent += message.text;
  }
  if (message.type === "error") answer.line.textContent += ` [${message.message}]`;
  if (message.type === "done" || message.type === "error") {
    if (answer.text) messages.push({ role: "assistant", content: answer.text });
    else messages.pop(); // A question without an answer is not part of the conversation.
    answer = null;
    enable();
  }
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = $("question").value.trim();
  if (!content || answer) return;
  $("question").value = "";
  messages.push({ role: "user", content });
  line("You", content);
  answer = { id: ++count, line: line("Mixtral", ""), text: "" };
  enable();
  window.mixtral.chat(answer.id, messages);
});
$("begin").addEventListener("click", () => window.mixtral.begin());
$("stop").addEventListener("click", () => answer && window.mixtral.stop(answer.id));
