/** The viewer: loads the index and connects filters, list, stage, details and address. */
import { addressOf, readAddress, writeAddress } from "./address.js";
import { Controls } from "./controls.js";
import { emptyDetails, fillDetails, fillName } from "./detail.js";
import { byId } from "./dom.js";
import { listenToKeys } from "./keyboard.js";
import { countText, ImageList } from "./list.js";
import { everything, matching, sorted } from "./query.js";
import { DetailFiles, loadTable } from "./records.js";
import { Stage } from "./stage.js";

const NARROW = matchMedia("(max-width: 760px)"); // list and image are shown in turn, as in viewer.css

class Viewer {
  /** @param {import("./records.js").Table} table */
  constructor(table) {
    this.table = table;
    this.details = new DetailFiles(table.about.perDetail);
    /** @type {number[]} */
    this.rows = [];
    this.chosen = -1; // record number, not position in the list
    this.list = new ImageList(table, (place) => this.choose(this.rows[place]), () => this.open(true));
    this.stage = new Stage(table, () => this.remember());
    this.controls = new Controls(table, () => this.filter());
    byId("previous").addEventListener("click", () => this.step(-1));
    byId("next").addEventListener("click", () => this.step(1));
    byId("back").addEventListener("click", () => this.open(false));
    byId("copy").addEventListener("click", () => this.copy());
    addEventListener("hashchange", () => this.follow());
    listenToKeys({
      step: (by) => this.step(by),
      setView: (view) => this.stage.setView(view),
      adjust: (by) => this.stage.adjust(by),
      lesion: () => byId("lesion-on").click(),
      leave: () => this.open(false),
      zoom: this.stage.zoom,
    });
  }

  /** Show the records that match the filters; the chosen record stays chosen if it matches, else the first is chosen. */
  filter() {
    const query = this.controls.query();
    const anyScore = matching(this.table, query, true);
    this.controls.range.paint(anyScore);
    this.rows = sorted(this.table, query.low === null && query.high === null ? anyScore : matching(this.table, query), query);
    byId("count").textContent = countText(this.rows.length, this.table.size);
    byId("nothing").hidden = this.rows.length > 0;
    this.list.show(this.rows, query.sort in { plan: 0, file: 0 } ? "" : query.sort);
    const place = this.rows.indexOf(this.chosen);
    if (place >= 0) this.list.choose(place);
    else if (this.rows.length) this.choose(this.rows[0]);
    this.remember();
  }

  /** Show a record. @param {number} n  record number */
  choose(n) {
    this.chosen = n;
    this.list.choose(this.rows.indexOf(n));
    fillName(this.table, n);
    this.stage.show(n, this.table.path[n]);
    emptyDetails("…");
    this.remember();
    this.details.get(n).then(
      (row) => {
        if (this.chosen !== n) return;
        this.stage.outline(row.lesion, row.lungs);
        this.stage.mark(row.sides, row.bar);
        fillDetails(row);
      },
      (error) => this.chosen === n && emptyDetails(String(error.message)),
    );
  }

  /** Move in the list. @param {number} by */
  step(by) {
    const place = this.rows.indexOf(this.chosen) + by;
    if (place < 0 || place >= this.rows.length) return;
    this.choose(this.rows[place]);
    byId("viewer").scrollIntoView({ block: "nearest" });
  }

  /** On a narrow screen, show the image or the list. @param {boolean} image */
  open(image) {
    if (!NARROW.matches) return;
    byId("viewer").classList.toggle("one", image);
    byId(image ? "detail" : "list").focus();
    if (image) byId("viewer").scrollIntoView({ block: "start" });
    else this.list.choose(this.rows.indexOf(this.chosen));
  }

  /** Write the state into the address. */
  remember() {
    if (!this.started) return;
    writeAddress(addressOf(this.table.id[this.chosen] ?? "", this.controls.query(), this.stage.view.key));
  }

  /** Apply the state in the address. Returns whether it names a record. */
  follow() {
    const state = readAddress();
    if (!state) return false;
    const { record } = state;
    const n = this.table.place.get(record) ?? -1;
    this.showError(record && n < 0 ? `This page has no record ${record}: the page may show a sample only.` : "");
    this.started = false;
    this.controls.set(state.query);
    if (n >= 0) this.chosen = n;
    if (n >= 0 && !matching(this.table, this.controls.query()).includes(n)) this.controls.set(everything());
    this.filter();
    if (n >= 0) this.choose(n);
    if (state.view) this.stage.setView(state.view);
    this.started = true;
    if (n >= 0) {
      if (NARROW.matches) this.open(true);
      byId("viewer").scrollIntoView({ block: "start" });
    }
    return n >= 0;
  }

  start() {
    byId("viewer").hidden = false;
    this.follow() || this.filter();
    this.started = true;
  }

  async copy() {
    this.remember();
    const button = byId("copy");
    try {
      await navigator.clipboard.writeText(location.href);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Copy it from the address bar";
    }
    setTimeout(() => (button.textContent = "Copy link"), 2000);
  }

  /** @param {string} text */
  showError(text) {
    byId("trouble").textContent = text;
    byId("trouble").hidden = !text;
  }
}

const section = document.getElementById("images");
if (section) {
  loadTable(Number(section.dataset.index)).then(
    (table) => new Viewer(table).start(),
    (error) => {
      byId("trouble").textContent = `The images of this page cannot be loaded: ${error.message}. Keep all files of the report folder together.`;
      byId("trouble").hidden = false;
    },
  );
}
