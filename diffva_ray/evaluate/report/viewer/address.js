/** The page's address: `#record=<id>` and what else is chosen, so that a link opens what its sender saw. */
import { everything } from "./query.js";

/** @typedef {import("./query.js").Query} Query */

/** What the address asks for; null when it is of another part of the page. @returns {{record: string, query: Query, view: string}|null} */
export function readAddress() {
  const text = location.hash.slice(1);
  if (!text.includes("=")) return null;
  const asked = new URLSearchParams(text);
  const number = (/** @type {string|null} */ value) => (value === null || value === "" || Number.isNaN(Number(value)) ? null : Number(value));
  const sort = asked.get("sort") ?? "plan";
  return {
    record: asked.get("record") ?? "",
    view: asked.get("view") ?? "",
    query: {
      ...everything(), text: asked.get("q") ?? "", label: asked.get("class") ?? "", status: asked.get("status") ?? "",
      measure: asked.get("score") ?? "", low: number(asked.get("from")), high: number(asked.get("to")),
      sort: sort.replace(/^-/, ""), down: sort.startsWith("-"),
    },
  };
}

/** @param {string} record @param {Query} query @param {string} view */
export function addressOf(record, query, view) {
  const asked = new URLSearchParams();
  if (record) asked.set("record", record);
  if (query.text) asked.set("q", query.text);
  if (query.label) asked.set("class", query.label);
  if (query.status) asked.set("status", query.status);
  if (query.low !== null || query.high !== null) asked.set("score", query.measure);
  if (query.low !== null) asked.set("from", String(Number(query.low.toPrecision(5))));
  if (query.high !== null) asked.set("to", String(Number(query.high.toPrecision(5))));
  if (query.sort !== "plan" || query.down) asked.set("sort", `${query.down ? "-" : ""}${query.sort}`);
  if (view && view !== "both") asked.set("view", view);
  return `#${asked}`;
}

/** Put it into the address bar, without an entry in the history for every row looked at. @param {string} address */
export function writeAddress(address) {
  if (location.hash !== address) history.replaceState(null, "", address);
}
