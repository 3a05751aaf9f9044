// Stands in for Electron, so that electron/main.mjs runs without: what the page would be sent is written to stdout, what
// it sends is read from stdin, one JSON array a line. ["close"] closes the window, as its owner does.

import { EventEmitter } from "node:events";
import { createInterface } from "node:readline";

const tell = (...what) => process.stdout.write(JSON.stringify(what) + "\n");

process.resourcesPath = process.env.RESOURCES;

export const ipcMain = new EventEmitter();

export const app = Object.assign(new EventEmitter(), {
  isPackaged: "RESOURCES" in process.env,
  whenReady: async () => {},
  quit() {
    let goesOn = true;
    app.emit("before-quit", { preventDefault: () => (goesOn = false) });
    if (goesOn) process.exit();
  },
});

export class BrowserWindow {
  #isDestroyed = false;

  constructor() {
    createInterface({ input: process.stdin }).on("line", (line) => {
      const [channel, ...what] = JSON.parse(line);
      if (channel === "close") this.#close();
      else ipcMain.emit(channel, { sender: this.webContents }, ...what);
    });
  }

  webContents = {
    send: (...what) => {
      if (!this.#isDestroyed) return tell(...what);
      console.error("Error: something was sent to a window that has been closed"); // Whoever catches what follows.
      throw new TypeError("Object has been destroyed");
    },
  };

  isDestroyed = () => this.#isDestroyed;

  loadFile = async () => {};

  #close() {
    this.#isDestroyed = true;
    app.emit("window-all-closed");
  }
}
