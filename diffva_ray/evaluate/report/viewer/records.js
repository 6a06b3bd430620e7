/**
 * Load the record files beside the page. The index is kept as columns, because sorting 20 000 objects would be slow;
 * a file of details is loaded when one of its records is viewed.
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
 * @property {number[]} label  position in about.labels
 * @property {number[]} status  position in about.statuses
 * @property {string[]} path
 * @property {string[]} key  part of the panel file names; empty without panels
 * @property {number[]} truth  1: the strip has the ground-truth counterfactual
 * @property {number[]} retried
 * @property {string[]} note
 * @property {string[]} searchText  in lower case
 * @property {Map<string, Float64Array>} scores
 * @property {Map<string, number>} place  record number by id
 */

const COLUMNS = ["id", "label", "status", "path", "key", "truth", "retried", "note"];

/**
 * Run a file of records and return the value that it passes to its script element.
 * @param {string} url
 * @returns {Promise<any>}
 */
function load(url) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.addEventListener("records", (event) => resolve(/** @type {CustomEvent} */ (event).detail), { once: true });
    script.addEventListener("load", () => {
      script.remove();
      reject(new Error(`${url} holds no records`)); // ignored if the records have arrived
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
  const table = { about, size: 0, scores: new Map(), place: new Map(), searchText: [] };
  for (const name of COLUMNS) table[name] = chunks.flatMap((chunk) => chunk[name]);
  table.size = table.id.length;
  for (const { key } of about.measures) {
    const values = chunks.flatMap((chunk) => chunk.scores[key]);
    table.scores.set(key, Float64Array.from(values, (value) => (value === null ? NaN : value)));
  }
  for (let n = 0; n < table.size; n++) {
    table.place.set(table.id[n], n);
    const label = about.labels[table.label[n]];
    const texts = [table.path[n], table.id[n], label, plain(label), about.statuses[table.status[n]], table.note[n]];
    table.searchText.push(texts.join("\n").toLowerCase());
  }
  return /** @type {Table} */ (table);
}

/** Loads details; each file is loaded once. */
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

/** Panel files of a record; null without panels. @param {Table} table @param {number} n */
export function panelFiles(table, n) {
  if (!table.key[n]) return null;
  const stem = `images/${table.id[n]}-${table.key[n]}`;
  return { strip: `${stem}.${table.about.extension}`, map: `${stem}-map.png`, truth: table.truth[n] === 1 };
}

/** Class and file name of a record. @param {Table} table @param {number} n */
export function named(table, n) {
  return `${plain(table.about.labels[table.label[n]])}, ${fileName(table.path[n])}`;
}
