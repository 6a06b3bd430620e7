/** The filter bar: converts its fields to a query and back. */
import { byId, make, plain } from "./dom.js";
import { everything } from "./query.js";
import { ScoreRange } from "./score.js";

/** @typedef {import("./query.js").Query} Query */

export class Controls {
  /** @param {import("./records.js").Table} table @param {() => void} onChange */
  constructor(table, onChange) {
    this.table = table;
    this.text = /** @type {HTMLInputElement} */ (byId("text"));
    this.label = /** @type {HTMLSelectElement} */ (byId("label"));
    this.status = /** @type {HTMLSelectElement} */ (byId("status"));
    this.sort = /** @type {HTMLSelectElement} */ (byId("sort"));
    this.turn = byId("turn");
    this.down = false;
    this.range = new ScoreRange(table, onChange);
    this.fill();
    for (const field of [this.label, this.status, this.sort]) field.addEventListener("change", onChange);
    this.text.addEventListener("input", onChange);
    this.turn.addEventListener("click", () => {
      this.setDirection(!this.down);
      onChange();
    });
    byId("bar").addEventListener("submit", (event) => event.preventDefault());
    for (const id of ["reset", "nothing-reset"]) {
      byId(id).addEventListener("click", () => {
        this.set(everything());
        onChange();
        this.text.focus();
      });
    }
  }

  /** Add the options of the selects. */
  fill() {
    const { labels, statuses, measures } = this.table.about;
    const option = (/** @type {string} */ value, /** @type {string} */ text) => make("option", { value }, text);
    this.label.append(option("", "all"), ...labels.map((label) => option(label, plain(label))));
    this.status.append(option("", "all"), ...statuses.map((status) => option(status, plain(status))));
    if (statuses.some((status) => status !== "ok")) this.status.append(option("quarantined", "any quarantined"));
    if (this.table.retried.includes(1)) this.status.append(option("retried", "retried"));
    this.sort.append(option("plan", "order of the run"), option("file", "file name"), ...measures.map((m) => option(m.key, m.title)));
  }

  /** @param {boolean} down */
  setDirection(down) {
    this.down = down;
    this.turn.textContent = down ? "↓" : "↑";
    this.turn.setAttribute("aria-label", `Direction: ${down ? "high to low" : "low to high"}`);
  }

  /** @returns {Query} */
  query() {
    const [low, high] = this.range.get();
    return {
      text: this.text.value, label: this.label.value, status: this.status.value, measure: this.range.measure.value,
      low, high, sort: this.sort.value, down: this.down,
    };
  }

  /** @param {Query} query */
  set(query) {
    this.text.value = query.text;
    this.label.value = query.label;
    this.status.value = query.status;
    this.sort.value = query.sort;
    for (const field of [this.label, this.status, this.sort]) if (field.selectedIndex < 0) field.selectedIndex = 0;
    this.setDirection(query.down);
    this.range.use(query.measure);
    this.range.set(query.low, query.high);
  }
}
