/**
 * The records beside the page. The index is held as columns, since twenty thousand objects would be slow to sort;
 * details come in files of some hundred records, when one of them is looked at.
 */
import { fileName, plain } from "./dom.js";

/** @typedef {{key: string, title: string, digits: number, better: string}} Measure */
/** @typedef {{try: string, status: string, error: string|null}} Attempt */
/** @typedef {Record<string, any> & {attempts: Attempt[]}} Details */
/**
 * @typedef {object} Table
 * @property {number} size
 * @property {{labels: string[], statuses: string[], measures: Measure[], limit: number, side: number,
 *   extension: string, total: number, perDetail: number}} about
 * @property {string[]} id
 * @property {number[]} label  place in about.labels
 * @property {number[]} status  place in about.statuses
 * @property {string[]} path
 * @property {string[]} key  names the pictures; empty when there are none
 * @property {number[]} truth  1: the strip has the ground-truth counterfactual
 * @property {number[]} retried
 * @property {string[]} note
 * @property {string[]} hay  what the search looks through, in lower case
 * @property {Map<string, Float64Array>} scores
 * @property {Map<string, number>} place  of a record id
 */

const COLUMNS = ["id", "label", "status", "path", "key", "truth", "retried", "note"];

/**
 * Run a file of records and take what it hands to its own script element.
 * @param {string} url
 * @returns {Promise<any>}
 */
function load(url) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.addEventListener("records", (event) => resolve(/** @type {CustomEvent} */ (event).detail), { once: true });
    script.addEventListener("load", () => {
      script.remove();
      reject(new Error(`${url} holds no records`)); // too late to matter when it did
    });
    script.addEventListener("error", () => {
      script.remove();
      reject(new Error(`${url} cannot be read`));
    });
    script.src = url;
    document.head.append(script);
  });
}

/** @param {number} files @returns {Promise<Table>} */
export async function loadTable(files) {
  const names = Array.from({ length: files }, (_, n) => `data/index-${String(n).padStart(3, "0")}.js`);
  const chunks = await Promise.all(names.map(load));
  const { about } = chunks[0];
  const table = { about, size: 0, scores: new Map(), place: new Map(), hay: [] };
  for (const name of COLUMNS) table[name] = chunks.flatMap((chunk) => chunk[name]);
  table.size = table.id.length;
  for (const { key } of about.measures) {
    const values = chunks.flatMap((chunk) => chunk.scores[key]);
    table.scores.set(key, Float64Array.from(values, (value) => (value === null ? NaN : value)));
  }
  for (let n = 0; n < table.size; n++) {
    table.place.set(table.id[n], n);
    const label = about.labels[table.label[n]];
    const said = [table.path[n], table.id[n], label, plain(label), about.statuses[table.status[n]], table.note[n]];
    table.hay.push(said.join("\n").toLowerCase());
  }
  return /** @type {Table} */ (table);
}

/** Reads details, each file once. */
export class DetailFiles {
  /** @param {number} perFile */
  constructor(perFile) {
    this.perFile = perFile;
    /** @type {Map<number, Promise<Details[]>>} */
    this.files = new Map();
  }

  /** @param {number} n @returns {Promise<Details>} */
  async get(n) {
    const number = Math.floor(n / this.perFile);
    let file = this.files.get(number);
    if (!file) {
      file = load(`data/details-${String(number).padStart(4, "0")}.js`);
      file.catch(() => this.files.delete(number));
      this.files.set(number, file);
    }
    return (await file)[n % this.perFile];
  }
}

/** Where the pictures of a record are; null when it has none. @param {Table} table @param {number} n */
export function pictures(table, n) {
  if (!table.key[n]) return null;
  const stem = `images/${table.id[n]}-${table.key[n]}`;
  return { strip: `${stem}.${table.about.extension}`, map: `${stem}-map.png`, truth: table.truth[n] === 1 };
}

/** A record in a few words. @param {Table} table @param {number} n */
export function named(table, n) {
  return `${plain(table.about.labels[table.label[n]])}, ${fileName(table.path[n])}`;
}
