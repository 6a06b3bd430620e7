/** The score range: two handles over the histogram of the records that match the other filters. */
import { byId, make, makeSvg, written } from "./dom.js";
import { extent, histogram } from "./query.js";

const STEPS = 1000; // positions of a handle
const BARS = 40;

export class ScoreRange {
  /**
   * @param {import("./records.js").Table} table
   * @param {() => void} onChange
   */
  constructor(table, onChange) {
    this.table = table;
    this.measure = /** @type {HTMLSelectElement} */ (byId("measure"));
    this.lowest = /** @type {HTMLInputElement} */ (byId("low"));
    this.highest = /** @type {HTMLInputElement} */ (byId("high"));
    /** @type {[number, number]} */
    this.ends = [0, 1];
    for (const { key, title } of table.about.measures) this.measure.append(make("option", { value: key }, title));
    this.measure.addEventListener("change", () => {
      this.use(this.measure.value);
      onChange();
    });
    for (const handle of [this.lowest, this.highest]) {
      handle.addEventListener("input", () => {
        this.keepOrder(handle);
        this.showBounds();
        onChange();
      });
    }
    this.use(this.measure.value);
  }

  /** Select a measure with its full range. @param {string} key */
  use(key) {
    const scores = this.table.scores.get(key);
    this.measure.value = scores ? key : (this.table.about.measures[0]?.key ?? "");
    this.scores = this.table.scores.get(this.measure.value) ?? new Float64Array();
    this.ends = extent(this.scores);
    this.lowest.value = "0";
    this.highest.value = String(STEPS);
    this.showBounds();
  }

  /** Stop the moved handle at the other one. @param {HTMLInputElement} moved */
  keepOrder(moved) {
    const [low, high] = [Number(this.lowest.value), Number(this.highest.value)];
    if (low <= high) return;
    if (moved === this.lowest) this.lowest.value = String(high);
    else this.highest.value = String(low);
  }

  /** Place the handles. @param {number|null} low @param {number|null} high */
  set(low, high) {
    const [first, last] = this.ends;
    const step = (/** @type {number} */ value) => String(Math.round(((value - first) / (last - first || 1)) * STEPS));
    if (low !== null) this.lowest.value = step(low);
    if (high !== null) this.highest.value = step(high);
    this.showBounds();
  }

  /** The selected range; null where a handle is at its end. @returns {[number|null, number|null]} */
  get() {
    const [first, last] = this.ends;
    const value = (/** @type {HTMLInputElement} */ handle) => first + ((last - first) * Number(handle.value)) / STEPS;
    const [low, high] = [Number(this.lowest.value), Number(this.highest.value)];
    return [low > 0 ? value(this.lowest) : null, high < STEPS ? value(this.highest) : null];
  }

  /** Write the bounds as text. */
  showBounds() {
    const digits = this.table.about.measures.find(({ key }) => key === this.measure.value)?.digits ?? 3;
    const [low, high] = this.get();
    const [from, to] = [written(low ?? this.ends[0], digits), written(high ?? this.ends[1], digits)];
    byId("bounds").textContent = `${from} to ${to}`;
    this.lowest.setAttribute("aria-valuetext", from);
    this.highest.setAttribute("aria-valuetext", to);
  }

  /** Draw the histogram of these records. @param {number[]} rows */
  paint(rows) {
    const counts = histogram(this.scores, rows, this.ends, BARS);
    const highest = Math.max(1, ...counts);
    const width = 160 / BARS;
    const [low, high] = [Number(this.lowest.value), Number(this.highest.value)];
    const bars = counts.map((count, n) => {
      const height = count ? Math.max(1.5, 26 * Math.sqrt(count / highest)) : 0;
      const middle = ((n + 0.5) / BARS) * STEPS;
      return makeSvg("rect", {
        x: String(n * width), y: String(26 - height), width: String(width - 0.6), height: String(height),
        class: middle >= low && middle <= high ? "in" : "out",
      });
    });
    byId("histogram").replaceChildren(...bars);
  }
}
