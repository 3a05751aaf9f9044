// A live picture of which experts answer: a table of layers × experts, warmer where more tokens went. What is counted
// is what passed while somebody looked.

import { get, ServerError } from "./api.js";
import { byId, element, shownCount } from "./dom.js";

const EVERY_MS = 400;

/** Polls /routing while it is open and a reply comes; hides itself where the server has no such thing. */
export class ExpertsView {
  constructor() {
    this.isOpen = this.isLive = this.isAsking = false;
    this.before = this.latest = null;
    for (const choice of document.querySelectorAll("input[name=span]")) {
      choice.addEventListener("change", () => this.draw());
    }
    byId("experts-table").addEventListener("pointerover", ({ target }) => this.name(target.closest("td")));
    byId("experts-table").addEventListener("pointerleave", () => this.name(null));
  }

  /** Whether the server counts at all; asked once. */
  async isThere() {
    try {
      this.latest = await routing();
      return true;
    } catch (error) {
      return !(error instanceof ServerError && [404, 405, 501].includes(error.status));
    }
  }

  open(isOpen) {
    this.isOpen = isOpen;
    if (isOpen) this.begin(this.isLive);
  }

  /** A reply begins: what was counted until now is left out of “This reply”. The server counts while it is asked. */
  async begin(isLive = true) {
    this.isLive = isLive;
    if (!this.isOpen) return;
    try {
      this.before = this.latest = await routing();
    } catch {
      // ask() says why.
    }
    this.ask();
  }

  end() {
    this.isLive = false;
    this.ask();
  }

  async ask() {
    if (!this.isOpen || this.isAsking) return;
    this.isAsking = true;
    const wasLive = this.isLive;
    try {
      this.latest = await routing();
      this.draw();
    } catch (error) {
      byId("experts-summary").textContent = error.message;
    }
    this.isAsking = false;
    clearTimeout(this.next);
    if (this.isLive) this.next = setTimeout(() => this.ask(), EVERY_MS);
    else if (wasLive) this.ask();
  }

  draw() {
    if (!this.latest) return;
    const { layers, experts, last } = this.latest;
    const counts = this.counted();
    if (this.shape !== `${layers}×${experts}`) this.build(layers, experts);
    const chosen = this.isLive ? last : [];
    counts.forEach((row, layer) => {
      const total = row.reduce((sum, count) => sum + count, 0);
      row.forEach((count, expert) => {
        const cell = this.cells[layer][expert];
        const share = total ? count / total : 0;
        cell.style.setProperty("--heat", heat(share, experts).toFixed(3));
        cell.classList.toggle("chosen", Boolean(chosen[layer]?.includes(expert)));
        cell.firstChild.textContent = total ? percent(share) : "–";
      });
    });
    this.summarize(counts);
  }

  counted() {
    const { counts } = this.latest;
    const onlyThis = document.querySelector("input[name=span]:checked").value === "reply";
    const before = this.before?.counts;
    if (!onlyThis || !before) return counts;
    const since = counts.map((row, layer) => row.map((count, expert) => count - (before[layer]?.[expert] ?? 0)));
    // Fewer than before: the server was started anew.
    return since.flat().some((count) => count < 0) ? counts : since;
  }

  build(layers, experts) {
    this.shape = `${layers}×${experts}`;
    const numbers = (count) => [...Array(count).keys()];
    const head = element("tr", {}, element("td", { class: "corner" }), ...numbers(experts).map((e) => element("th", { scope: "col" }, `${e + 1}`)));
    this.cells = numbers(layers).map((layer) =>
      numbers(experts).map((expert) =>
        element("td", { dataset: { layer: layer + 1, expert: expert + 1 } }, element("span", { class: "unseen" }, "–")),
      ),
    );
    const rows = this.cells.map((cells, layer) => element("tr", {}, element("th", { scope: "row" }, `${layer + 1}`), ...cells));
    byId("experts-table").style.setProperty("--layers", layers);
    byId("experts-table").replaceChildren(
      element("caption", { class: "unseen" }, "Share of the tokens that each expert got, by layer"),
      element("thead", {}, head),
      element("tbody", {}, ...rows),
    );
  }

  summarize(counts) {
    const busiest = { share: 0 };
    let evenness = 0;
    counts.forEach((row, layer) => {
      const total = row.reduce((sum, count) => sum + count, 0);
      if (!total) return;
      row.forEach((count, expert) => {
        if (count / total > busiest.share) Object.assign(busiest, { share: count / total, layer, expert });
      });
      evenness += entropy(row.map((count) => count / total)) / Math.log(row.length) / counts.length;
    });
    const chosen = this.latest.last?.[0]?.length || 2;
    const tokens = Math.round((counts[0] ?? []).reduce((sum, count) => sum + count, 0) / chosen);
    byId("experts-summary").textContent = busiest.share
      ? `${shownCount(tokens)} tokens. Busiest: expert ${busiest.expert + 1} of layer ${busiest.layer + 1}, ` +
        `${percent(busiest.share)}. Evenness ${percent(evenness)}.`
      : "Nothing was counted yet. Ask something.";
  }

  // The cell under the pointer takes the place of the summary.
  name(cell) {
    const { layer, expert } = cell?.dataset ?? {};
    if (layer) byId("experts-summary").textContent = `Layer ${layer}, expert ${expert}: ${cell.textContent} of the tokens’ choices`;
    else if (this.latest) this.summarize(this.counted());
  }
}

const routing = () => get("routing");

const percent = (share) => `${Math.round(100 * share)}\u00a0%`;

// 0 is nothing, 1 three times an even share and more.
const heat = (share, experts) => Math.min(1, (share * experts) / 3);

const entropy = (shares) => -shares.reduce((sum, share) => sum + (share > 0 ? share * Math.log(share) : 0), 0);
