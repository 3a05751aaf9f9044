// What the page may do: begin, ask, stop, and hear. Not run in this project's tests.
const { contextBridge, ipcRenderer } = require("electron");

contextBridge.exposeInMainWorld("mixtral", {
  begin: () => ipcRenderer.send("begin"),
  chat: (id, messages) => ipcRenderer.send("chat", id, messages),
  stop: (id) => ipcRenderer.send("stop", id),
  onMessage: (heard) => ipcRenderer.on("message", (_, message) => heard(message)),
  onState: (heard) => ipcRenderer.on("state", (_, state, why) => heard(state, why)),
});
