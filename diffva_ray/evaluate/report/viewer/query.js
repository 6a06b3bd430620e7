/** Select and sort records: functions of the table and a query, without side effects. */

/** @typedef {import("./records.js").Table} Table */
/**
 * @typedef {object} Query
 * @property {string} text
 * @property {string} label  empty: all
 * @property {string} status  empty: all; "quarantined", "retried", or a status
 * @property {string} measure  of the score range
 * @property {number|null} low
 * @property {number|null} high
 * @property {string} sort  "plan", "file" or a measure
 * @property {boolean} down  high to low
 */

/** The query that all records match. @returns {Query} */
export function everything() {
  return { text: "", label: "", status: "", measure: "", low: null, high: null, sort: "plan", down: false };
}

/** @param {Table} table @param {string} status @returns {(n: number) => boolean} */
function statusTest(table, status) {
  const ok = table.about.statuses.indexOf("ok");
  if (status === "quarantined") return (n) => table.status[n] !== ok;
  if (status === "retried") return (n) => table.retried[n] === 1;
  const wanted = table.about.statuses.indexOf(status);
  return (n) => table.status[n] === wanted;
}

/**
 * The records that match a query; `anyScore` ignores its score range.
 * @param {Table} table @param {Query} query @param {boolean} anyScore
 * @returns {number[]}
 */
export function matching(table, query, anyScore = false) {
  const words = query.text.toLowerCase().split(/\s+/).filter(Boolean);
  const label = table.about.labels.indexOf(query.label);
  /** @type {((n: number) => boolean)[]} */
  const tests = [];
  if (query.label) tests.push((n) => table.label[n] === label);
  if (query.status) tests.push(statusTest(table, query.status));
  const scores = table.scores.get(query.measure);
  const { low, high } = query;
  if (scores && !anyScore && (low !== null || high !== null)) {
    tests.push((n) => (low === null ? !Number.isNaN(scores[n]) : scores[n] >= low) && !(high !== null && !(scores[n] <= high)));
  }
  if (words.length) tests.push((n) => words.every((word) => table.searchText[n].includes(word)));
  return Array.from({ length: table.size }, (_, n) => n).filter((n) => tests.every((test) => test(n)));
}

/**
 * The records in the order of the query; those without the score come last, ties keep the order of the run.
 * @param {Table} table @param {number[]} rows @param {Query} query
 */
export function sorted(table, rows, query) {
  const sign = query.down ? -1 : 1;
  if (query.sort === "file") {
    const { compare } = new Intl.Collator("en", { numeric: true });
    return rows.sort((a, b) => sign * compare(table.path[a], table.path[b]) || a - b);
  }
  const scores = table.scores.get(query.sort);
  if (!scores) return query.down ? rows.reverse() : rows;
  return rows.sort((a, b) => {
    const [x, y] = [scores[a], scores[b]];
    if (Number.isNaN(x) || Number.isNaN(y)) return Number(Number.isNaN(x)) - Number(Number.isNaN(y)) || a - b;
    return sign * (x - y) || a - b;
  });
}

/** Lowest and highest score. @param {Float64Array} scores @returns {[number, number]} */
export function extent(scores) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of scores) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : [0, 1];
}

/**
 * Histogram of the scores of `rows` with `bins` equal bins over the range.
 * @param {Float64Array} scores @param {number[]} rows @param {[number, number]} range @param {number} bins
 */
export function histogram(scores, rows, [low, high], bins) {
  const counts = new Array(bins).fill(0);
  const scale = bins / (high - low || 1);
  for (const n of rows) {
    if (!Number.isNaN(scores[n])) counts[Math.min(bins - 1, Math.floor((scores[n] - low) * scale))]++;
  }
  return counts;
}
