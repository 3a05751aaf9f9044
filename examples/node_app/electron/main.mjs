// Electron's main process. Not run in this project's tests, which have no Electron; what it calls (../helper.mjs) is.
//
// npm install --no-save electron && npx electron electron/main.mjs

import { app, BrowserWindow, ipcMain } from "electron";
import path from "node:path";
import { fileURLToPath } from "node:url";

import { Helper } from "../helper.mjs";

const here = path.dirname(fileURLToPath(import.meta.url));
// In a packaged app the Python that mixtral-mlx is installed in lies in Resources; see docs/EMBEDDING.md.
const command = app.isPackaged
  ? [path.join(process.resourcesPath, "python", "bin", "python3"), "-I", "-m", "mixtral_mlx", "helper"]
  : [process.env.MIXTRAL_MLX ?? "mixtral-mlx", "helper"];
const helper = new Helper({ command });
const answers = new Map(); // id of the page's -> what stops it

app.whenReady().then(async () => {
  const window = new BrowserWindow({
    webPreferences: { preload: path.join(here, "preload.cjs"), contextIsolation: true, sandbox: true },
  });
  helper.on("state", (state) => window.webContents.send("state", state));
  helper.on("model", ({ type, state }) => window.webContents.send("state", type === "ready" ? "ready" : state));
  helper.on("log", (line) => console.error(line));
  await window.loadFile(path.join(here, "index.html"));
  await helper.start();
  await helper.load(process.env.MODEL ?? "demo", {
    onProgress: (message) => window.webContents.send("message", message),
  });
  window.webContents.send("state", "ready");
});

ipcMain.on("chat", async (event, id, messages) => {
  const stop = new AbortController();
  answers.set(id, stop);
  try {
    for await (const message of helper.chat({ messages }, { signal: stop.signal })) {
      event.sender.send("message", { ...message, id });
    }
  } catch ({ code, message, hint, retryable }) {
    event.sender.send("message", { type: "error", id, code, message, hint, retryable });
  } finally {
    answers.delete(id);
  }
});
ipcMain.on("stop", (_, id) => answers.get(id)?.abort());

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
