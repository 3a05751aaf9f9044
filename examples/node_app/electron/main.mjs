// Electron's main process. Not run in Electron by this project's tests, which have none, but with a stand-in for it.
//
// npm install --no-save electron && npx electron electron/main.mjs

import { app, BrowserWindow, ipcMain } from "electron";
import path from "node:path";
import { fileURLToPath } from "node:url";

import { Helper } from "../helper.mjs";

const here = path.dirname(fileURLToPath(import.meta.url));
// In a packaged app the Python that mixtral-mlx is installed in lies in Resources; see docs/EMBEDDING.md.
const command = app.isPackaged
  ? [path.join(process.resourcesPath, "python", "bin", "python3"), "-I", "-B", "-m", "mixtral_mlx", "helper"]
  : [process.env.MIXTRAL_MLX ?? "mixtral-mlx", "helper"];
const helper = new Helper({ command });
const answers = new Map(); // id of the page's -> what stops it
let window = null;

app.whenReady().then(async () => {
  window = new BrowserWindow({
    webPreferences: { preload: path.join(here, "preload.cjs"), contextIsolation: true, sandbox: true },
  });
  helper.on("state", (state) => send("state", state));
  helper.on("model", ({ type, state }) => send("state", type === "ready" ? "ready" : state));
  helper.on("refused", failed);
  helper.on("log", (line) => console.error(line));
  await window.loadFile(path.join(here, "index.html"));
  await begin();
});

ipcMain.on("begin", begin);
ipcMain.on("chat", async (_, id, messages) => {
  const stop = new AbortController();
  answers.set(id, stop);
  try {
    for await (const message of helper.chat({ messages }, { signal: stop.signal })) {
      send("message", { ...message, id });
    }
  } catch ({ code, message, hint, retryable }) {
    send("message", { type: "error", id, code, message, hint, retryable });
  } finally {
    answers.delete(id);
  }
});
ipcMain.on("stop", (_, id) => answers.get(id)?.abort());

async function begin() {
  try {
    await helper.start();
    await helper.load(process.env.MODEL ?? "demo", { onProgress: (message) => send("message", message) });
    send("state", "ready");
  } catch (error) {
    failed(error);
  }
}

function failed({ message, hint = "" }) {
  send("state", "failed", `${message} ${hint}`.trim());
}

// A window that has been closed takes nothing more, while answers still come.
function send(channel, ...what) {
  if (!window.isDestroyed()) window.webContents.send(channel, ...what);
}

app.on("window-all-closed", () => app.quit());
let stopped = false;
app.on("before-quit", (event) => {
  if (stopped) return;
  event.preventDefault(); // Not before the helper is gone; it takes three seconds at most.
  helper.stop().finally(() => {
    stopped = true;
    app.quit();
  });
});
