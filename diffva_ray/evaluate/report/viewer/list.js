/**
 * The list of images. Only the rows in sight exist as elements. The list is one listbox that names its selected row in
 * aria-activedescendant, so the focus stays on the list while rows are added and removed.
 */
import { byId, counted, fileName, make, plain, written } from "./dom.js";
import { panelFiles } from "./records.js";

/** @typedef {import("./records.js").Table} Table */

const ROW = 76; // height in pixels, as in viewer.css
const SPARE = 6; // extra rows above and below those in sight

export class ImageList {
  /**
   * @param {Table} table
   * @param {(place: number) => void} onChoose
   * @param {() => void} onOpen  a row was clicked, or Enter pressed
   */
  constructor(table, onChoose, onOpen) {
    this.table = table;
    this.onChoose = onChoose;
    this.onOpen = onOpen;
    this.box = byId("list");
    this.runway = byId("runway");
    /** @type {number[]} */
    this.rows = [];
    this.chosen = -1;
    this.measure = "";
    /** @type {Map<number, HTMLElement>} */
    this.drawn = new Map();
    this.box.addEventListener("scroll", () => this.paint(), { passive: true });
    this.box.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.paint()).observe(this.box);
  }

  /** @param {number[]} rows  record numbers, in order @param {string} measure  the score shown beside SSIM */
  show(rows, measure) {
    this.rows = rows;
    this.measure = measure;
    for (const row of this.drawn.values()) row.remove();
    this.drawn.clear();
    this.runway.style.height = `${rows.length * ROW}px`;
    this.box.hidden = rows.length === 0;
    this.paint();
  }

  /** @param {number} place  in the list; -1: none */
  choose(place) {
    this.drawn.get(this.chosen)?.setAttribute("aria-selected", "false");
    this.chosen = place;
    if (place < 0) {
      this.box.removeAttribute("aria-activedescendant");
      return;
    }
    const [top, height] = [place * ROW, this.box.clientHeight];
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top + ROW > this.box.scrollTop + height) this.box.scrollTop = top + ROW - height;
    this.paint();
    this.drawn.get(place)?.setAttribute("aria-selected", "true");
    if (this.drawn.has(place)) this.box.setAttribute("aria-activedescendant", `row-${place}`);
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    if (event.key === "Enter") this.onOpen();
    const page = Math.max(1, Math.floor(this.box.clientHeight / ROW) - 1);
    const last = this.rows.length - 1;
    /** @type {Record<string, number>} */
    const places = {
      ArrowDown: this.chosen + 1, ArrowUp: this.chosen - 1, PageDown: this.chosen + page, PageUp: this.chosen - page,
      Home: 0, End: last,
    };
    if (!(event.key in places) || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey || last < 0) return;
    event.preventDefault();
    this.onChoose(Math.min(last, Math.max(0, places[event.key])));
  }

  /** Create the rows in sight and remove the others. */
  paint() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW) - SPARE);
    const after = Math.min(this.rows.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / ROW) + SPARE);
    for (const [place, row] of this.drawn) {
      if (place < first || place >= after) {
        row.remove();
        this.drawn.delete(place);
      }
    }
    for (let place = first; place < after; place++) {
      if (this.drawn.has(place)) continue;
      const row = this.row(place);
      this.drawn.set(place, row);
      this.runway.append(row);
    }
  }

  /** @param {number} place */
  row(place) {
    const { table } = this;
    const n = this.rows[place];
    const status = table.about.statuses[table.status[n]];
    const row = make("div", {
      class: "row", id: `row-${place}`, role: "option", "aria-selected": String(place === this.chosen),
      "aria-setsize": String(this.rows.length), "aria-posinset": String(place + 1),
    });
    row.style.transform = `translateY(${place * ROW}px)`;
    row.append(this.thumb(n), this.words(n, status));
    row.addEventListener("click", () => {
      this.onChoose(place);
      this.onOpen();
    });
    return row;
  }

  /** Thumbnails: the image, and the map on the image. @param {number} n */
  thumb(n) {
    const files = panelFiles(this.table, n);
    const box = make("span", { class: "thumbs" });
    if (!files) {
      box.append(make("span", { class: "thumb none" }, "no image"));
      return box;
    }
    const image = { class: "strip first", src: files.strip, alt: "", decoding: "async" };
    box.append(
      make("span", { class: "thumb" }, make("img", image)),
      make("span", { class: "thumb" }, make("img", image), make("img", { class: "heat", src: files.map, alt: "", decoding: "async" })),
    );
    return box;
  }

  /** Class, badges, file name and scores. @param {number} n @param {string} status */
  words(n, status) {
    const { table } = this;
    const label = make("b", {}, plain(table.about.labels[table.label[n]]));
    const top = make("span", { class: "top" }, label);
    if (status !== "ok") top.append(make("span", { class: "badge bad" }, plain(status)));
    if (table.retried[n]) top.append(make("span", { class: "badge" }, "retried"));
    const words = make("span", { class: "words" }, top, make("span", { class: "file" }, fileName(table.path[n])));
    words.append(make("span", { class: "fine" }, this.fine(n)));
    return words;
  }

  /** The last line of a row: its scores, or the reason of its failure. @param {number} n */
  fine(n) {
    const { table } = this;
    const shown = table.about.measures.filter(({ key }) => key === this.measure || (key === "ssim" && this.measure === ""));
    const scores = shown.map(({ key, title, digits }) => `${title} ${written(table.scores.get(key)[n], digits)}`);
    const failed = table.about.statuses[table.status[n]] !== "ok";
    return [...(failed ? [] : scores), table.note[n]].filter(Boolean).join(" · ");
  }
}

/** Text of the count. @param {number} shown @param {number} all */
export function countText(shown, all) {
  const records = all === 1 ? "record" : "records";
  return shown === all ? `${counted(all)} ${records}` : `${counted(shown)} of ${counted(all)} ${records}`;
}
