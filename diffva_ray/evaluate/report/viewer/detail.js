/** All known facts of one record, beside its panels. */
import { byId, make, plain, written } from "./dom.js";
import { named } from "./records.js";

/** @typedef {import("./records.js").Details} Details */
/** @typedef {[title: string, value: (row: Details) => any]} Fact */

/** @param {string} key @param {number} digits @returns {(row: Details) => string|null} */
const score = (key, digits) => (row) => (row[key] === null ? null : written(row[key], digits));
/** @param {string} key @returns {(row: Details) => any} */
const column = (key) => (row) => row[key];

/** @type {[heading: string, facts: Fact[]][]} */
const GROUPS = [
  ["Scores", [
    ["AUROC of the map", score("auroc", 3)],
    ["Dice, best τ", score("dice_best", 3)],
    ["judge: healthy", (row) => row.judge_image === null ? null
      : `${written(row.judge_image, 3)} → ${written(row.judge_counterfactual, 3)}`],
    ["SSIM", score("ssim", 4)],
    ["MS-SSIM", score("ms_ssim", 4)],
    ["MS-SSIM scales", (row) => row.ms_ssim === null ? null : String(row.ms_ssim_scales)],
    ["PSNR", (row) => row.psnr === null ? null : `${written(row.psnr, 2)} dB`],
    ["mean |difference|", score("l1", 4)],
    ["map energy", score("attribution_energy", 5)],
    ["share in lungs", score("attribution_energy_lung_fraction", 3)],
  ]],
  ["Generation", [
    ["prompt", column("prompt")],
    ["source prompt", column("source_prompt")],
    ["method", column("method")],
    ["scheduler", column("scheduler")],
    ["strength", column("strength")],
    ["guidance", column("guidance_scale")],
    ["steps", column("num_inference_steps")],
    ["kind of map", column("attribution_kind")],
    ["seed", column("seed")],
    ["sample", column("sample")],
  ]],
  ["Files", [
    ["image", column("image_path")],
    ["image size", (row) => row.width === null ? null : `${row.width} × ${row.height} px`],
    ["view", column("view")],
    ["pixel spacing, mm", column("spacing")],
    ["counterfactual", column("counterfactual_path")],
    ["attribution map", column("attribution_path")],
    ["reconstruction", column("reconstruction_path")],
    ["lung mask", column("lung_mask_path")],
    ["lesion mask", column("lesion_mask_path")],
    ["ground truth", column("ground_truth_path")],
  ]],
  ["Identity", [
    ["record", column("record_id")],
    ["status", column("status")],
    ["model digest", column("model_digest")],
  ]],
  ["SHA-256", [
    ["image", column("image_sha256")],
    ["counterfactual", column("counterfactual_sha256")],
    ["attribution map", column("attribution_sha256")],
    ["reconstruction", column("reconstruction_sha256")],
  ]],
];

/** The facts of a record under headings, without unknown ones. @param {Details} row */
function facts(row) {
  return GROUPS.map(([heading, entries]) => {
    const list = make("dl");
    for (const [title, value] of entries) {
      const text = String(value(row) ?? "");
      if (text) list.append(make("dt", {}, title), make("dd", {}, text));
    }
    return list.childElementCount ? make("section", {}, make("h4", {}, heading), list) : "";
  });
}

/** The reason of a missing counterfactual, and all attempts of a retried record. @param {Details} row */
function reasons(row) {
  const parts = [];
  if (row.status !== "ok") {
    parts.push(make("p", {}, make("b", {}, plain(row.status)), ` ${row.error || "no reason was recorded"}`));
  }
  if (row.attempts.length > 1) {
    const items = row.attempts.map((attempt) => {
      const why = attempt.error ? `: ${attempt.error}` : "";
      return make("li", {}, make("b", {}, attempt.try), ` ${plain(attempt.status)}${why}`);
    });
    parts.push(make("p", {}, "Attempts:"), make("ol", {}, ...items));
  }
  return parts;
}

/**
 * Fill in the names, which are in the index.
 * @param {import("./records.js").Table} table @param {number} n
 */
export function fillName(table, n) {
  byId("image-name").textContent = named(table, n);
  byId("image-path").textContent = table.path[n];
  byId("image-path").title = table.path[n];
}

/** Fill in the details, once loaded. @param {Details} row */
export function fillDetails(row) {
  const parts = reasons(row);
  byId("why").hidden = parts.length === 0;
  byId("why").classList.toggle("fixed", row.status === "ok");
  byId("why").replaceChildren(...parts);
  byId("data").replaceChildren(...facts(row));
}

/** Replace the details while they load, or when they cannot be loaded. @param {string} text */
export function emptyDetails(text) {
  byId("why").hidden = true;
  byId("data").replaceChildren(make("p", { class: "wait" }, text));
}
