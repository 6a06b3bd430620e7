/** Everything that is known of one image, beside its pictures. */
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
    ["MS-SSIM", (row) => row.ms_ssim === null ? null : written(row.ms_ssim, 4)],
    ["its scales", (row) => row.ms_ssim === null ? null : String(row.ms_ssim_scales)],
    ["PSNR", (row) => row.psnr === null ? null : `${written(row.psnr, 2)} dB`],
    ["mean |difference|", score("l1", 4)],
    ["map energy", score("attribution_energy", 5)],
    ["of it in lungs", score("attribution_energy_lung_fraction", 3)],
  ]],
  ["How it was made", [
    ["prompt", column("prompt")],
    ["taken to show", (row) => row.source_prompt || null],
    ["method", column("method")],
    ["scheduler", column("scheduler")],
    ["strength", column("strength")],
    ["guidance", column("guidance_scale")],
    ["steps", column("num_inference_steps")],
    ["attribution map", column("attribution_kind")],
    ["seed", column("seed")],
    ["sample", column("sample")],
  ]],
  ["Files", [
    ["image", column("image_path")],
    ["its size", (row) => row.width === null ? null : `${row.width} × ${row.height} px`],
    ["counterfactual", column("counterfactual_path")],
    ["map", column("attribution_path")],
    ["reconstruction", column("reconstruction_path")],
    ["lung mask", column("lung_mask_path")],
    ["lesion mask", column("lesion_mask_path")],
    ["ground-truth counterfactual", column("ground_truth_path")],
  ]],
  ["Identity", [
    ["record", column("record_id")],
    ["status", column("status")],
    ["model digest", column("model_digest")],
    ["sha256 of image", column("image_sha256")],
    ["of the counterfactual’s pixels", column("counterfactual_sha256")],
    ["of the map", column("attribution_sha256")],
    ["of the reconstruction", column("reconstruction_sha256")],
  ]],
];

/** The facts of a record under headings; what is not known is left out. @param {Details} row */
function facts(row) {
  return GROUPS.map(([heading, entries]) => {
    const list = make("dl");
    for (const [title, value] of entries) {
      const said = value(row);
      if (said !== null && said !== undefined && said !== "") {
        list.append(make("dt", {}, title), make("dd", {}, String(said)));
      }
    }
    return list.childElementCount ? make("section", {}, make("h4", {}, heading), list) : "";
  });
}

/** Why there is no counterfactual, and how often it was tried. @param {Details} row */
function reasons(row) {
  const said = [];
  if (row.status !== "ok") {
    said.push(make("p", { class: "reason-now" }, make("b", {}, plain(row.status)), ` ${row.error || "no reason was recorded"}`));
  }
  if (row.attempts.length > 1) {
    const list = make("ol", { class: "tries" });
    for (const one of row.attempts) {
      const why = one.error ? `: ${one.error}` : "";
      list.append(make("li", {}, make("b", {}, one.try), ` ${plain(one.status)}${why}`));
    }
    said.push(make("p", {}, "Tried more than once:"), list);
  }
  return said;
}

/**
 * Fill the panel: names at once, the rest when its file is there.
 * @param {import("./records.js").Table} table @param {number} n
 */
export function fillName(table, n) {
  byId("image-name").textContent = named(table, n);
  byId("image-path").textContent = table.path[n];
  byId("image-path").title = table.path[n];
}

/** @param {Details} row */
export function fillDetails(row) {
  const said = reasons(row);
  byId("why").hidden = said.length === 0;
  byId("why").classList.toggle("mended", row.status === "ok");
  byId("why").replaceChildren(...said);
  byId("data").replaceChildren(...facts(row));
}

/** While a record's details are not there yet, or cannot be had. @param {string} text */
export function emptyDetails(text) {
  byId("why").hidden = true;
  byId("data").replaceChildren(make("p", { class: "wait" }, text));
}

