/** The page's address: `#record=<id>` with filters, order and view, so that a link opens what its sender saw. */
import { everything } from "./query.js";

/** @typedef {import("./query.js").Query} Query */

/** The state in the address; null when the address names another part of the page. @returns {{record: string, query: Query, view: string}|null} */
export function readAddress() {
  const text = location.hash.slice(1);
  if (!text.includes("=")) return null;
  const params = new URLSearchParams(text);
  const number = (/** @type {string|null} */ value) => (value === null || value === "" || Number.isNaN(Number(value)) ? null : Number(value));
  const sort = params.get("sort") ?? "plan";
  return {
    record: params.get("record") ?? "",
    view: params.get("view") ?? "",
    query: {
      ...everything(), text: params.get("q") ?? "", label: params.get("class") ?? "", status: params.get("status") ?? "",
      measure: params.get("score") ?? "", low: number(params.get("from")), high: number(params.get("to")),
      sort: sort.replace(/^-/, ""), down: sort.startsWith("-"),
    },
  };
}

/** The address of a state. @param {string} record @param {Query} query @param {string} view */
export function addressOf(record, query, view) {
  const params = new URLSearchParams();
  if (record) params.set("record", record);
  if (query.text) params.set("q", query.text);
  if (query.label) params.set("class", query.label);
  if (query.status) params.set("status", query.status);
  if (query.low !== null || query.high !== null) params.set("score", query.measure);
  if (query.low !== null) params.set("from", String(Number(query.low.toPrecision(5))));
  if (query.high !== null) params.set("to", String(Number(query.high.toPrecision(5))));
  if (query.sort !== "plan" || query.down) params.set("sort", `${query.down ? "-" : ""}${query.sort}`);
  if (view && view !== "both") params.set("view", view);
  return `#${params}`;
}

/** Replace the address without a new entry in the history. @param {string} address */
export function writeAddress(address) {
  if (location.hash !== address) history.replaceState(null, "", address);
}
