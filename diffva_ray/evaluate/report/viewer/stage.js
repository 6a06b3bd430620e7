/** The stage: panels of one record in several views, divider, map overlay, outlines of lesion and lungs. */
import { byId, make } from "./dom.js";
import { panelFiles } from "./records.js";
import { Zoom } from "./zoom.js";

/**
 * One view: the panel left of the divider (or on the whole stage), the panel right of it, and whether the map is on top.
 * `needs` names a panel without which the view is not available.
 * @typedef {{key: string, name: string, left: string, right: string, heat: boolean, needs: string}} View
 */
/** @type {View[]} */
const VIEWS = [
  { key: "both", name: "Before / after", left: "image", right: "counterfactual", heat: false, needs: "" },
  { key: "over", name: "Map on image", left: "image", right: "", heat: true, needs: "" },
  { key: "image", name: "Image", left: "image", right: "", heat: false, needs: "" },
  { key: "counterfactual", name: "Counterfactual", left: "counterfactual", right: "", heat: false, needs: "" },
  { key: "map", name: "Map", left: "", right: "", heat: true, needs: "" },
  { key: "true", name: "Ground truth", left: "counterfactual", right: "truth", heat: false, needs: "truth" },
];
const TAGS = { image: "image", counterfactual: "healthy counterfactual", truth: "ground-truth counterfactual", "": "" };

export class Stage {
  /** @param {import("./records.js").Table} table @param {() => void} onView */
  constructor(table, onView) {
    this.table = table;
    this.onView = onView;
    this.view = VIEWS[0];
    this.truth = false;
    this.stage = byId("stage");
    this.divider = /** @type {HTMLInputElement} */ (byId("divider"));
    this.opacity = /** @type {HTMLInputElement} */ (byId("opacity"));
    this.range = /** @type {HTMLInputElement} */ (byId("window"));
    this.level = /** @type {HTMLInputElement} */ (byId("level"));
    this.lesionOn = /** @type {HTMLInputElement} */ (byId("lesion-on"));
    this.lungsOn = /** @type {HTMLInputElement} */ (byId("lungs-on"));
    const side = table.about.side;
    byId("outlines").setAttribute("viewBox", `0 0 ${side} ${side}`);
    for (const view of VIEWS) {
      const radio = make("input", { type: "radio", name: "view", value: view.key });
      radio.addEventListener("change", () => this.setView(view.key));
      byId("views").append(make("label", { class: "view" }, radio, make("span", {}, view.name)));
    }
    for (const knob of [this.divider, this.opacity, this.range, this.level]) knob.addEventListener("input", () => this.paint());
    for (const box of [this.lesionOn, this.lungsOn]) box.addEventListener("change", () => this.paint());
    byId("greys-reset").addEventListener("click", () => {
      [this.range.value, this.level.value] = [this.range.defaultValue, this.level.defaultValue];
      this.paint();
    });
    this.zoom = new Zoom(this.stage, this.divider, () => this.zoom && this.paint());
    this.setView(this.view.key);
  }

  /** Show the panels of a record; false without panels. @param {number} n @param {string} name */
  show(n, name) {
    const files = panelFiles(this.table, n);
    this.truth = files?.truth ?? false;
    this.name = name;
    byId("show").hidden = !files;
    this.outline("", "");
    this.mark(false, null);
    this.zoom.whole();
    if (!files) return false;
    for (const id of ["image", "counterfactual", "truth"]) {
      const panel = byId(id);
      if (id !== "truth" || this.truth) panel.setAttribute("src", files.strip);
      else panel.removeAttribute("src");
    }
    byId("counterfactual").className = `strip ${this.truth ? "middle" : "last"}`;
    byId("heat").setAttribute("src", files.map);
    if (this.view.needs && !this.truth) this.setView("both");
    this.paint();
    return true;
  }

  /** Set the outlines, as SVG paths. @param {string} lesion @param {string} lungs */
  outline(lesion, lungs) {
    for (const id of ["lesion", "lesion-halo"]) byId(id).setAttribute("d", lesion);
    byId("lungs").setAttribute("d", lungs);
    byId("lesion-knob").hidden = !lesion;
    byId("lungs-knob").hidden = !lungs;
  }

  /**
   * Set the patient's sides, and a scale bar of 5 cm in the image.
   * @param {boolean} sides @param {number|null} bar  share of the image's width
   */
  mark(sides, bar) {
    for (const id of ["right-side", "left-side"]) byId(id).hidden = !sides;
    const side = this.table.about.side;
    const [start, end] = [side * (0.97 - (bar ?? 0)), side * 0.97];
    byId("scale").setAttribute("d", bar ? `M${start} ${side * 0.95}H${end}` : "");
    byId("scale").setAttribute("stroke-width", String(side / 120));
    byId("scale-length").setAttribute("font-size", String(side / 28));
    byId("scale-length").setAttribute("x", String((start + end) / 2));
    byId("scale-length").setAttribute("y", String(side * 0.935));
    byId("scale-length").classList.toggle("off", !bar);
  }

  /** Choose a view. @param {string|number} which  key of the view, or its number from 1 */
  setView(which) {
    const view = typeof which === "number" ? VIEWS[which - 1] : VIEWS.find(({ key }) => key === which);
    if (!view || (view.needs && !this.truth)) return;
    this.view = view;
    this.paint();
    this.onView();
  }

  /** Move the divider, or change the opacity of the map in views without a divider. @param {number} by */
  adjust(by) {
    const knob = this.view.right ? this.divider : this.opacity;
    knob.value = String(Number(knob.value) + by);
    this.paint();
  }

  /**
   * Apply window and level, in per cent of the grey range: level - window / 2 is black, level + window / 2 is white.
   * Returns whether they differ from the default.
   */
  greys() {
    const [width, centre] = [Number(this.range.value) / 100, Number(this.level.value) / 100];
    for (const channel of ["r", "g", "b"]) {
      byId(`greys-${channel}`).setAttribute("slope", String(1 / width));
      byId(`greys-${channel}`).setAttribute("intercept", String(0.5 - centre / width));
    }
    byId("window-value").textContent = `${this.range.value} %`;
    byId("level-value").textContent = `${this.level.value} %`;
    const changed = width !== 1 || centre !== 0.5;
    byId("greys-reset").disabled = !changed;
    return changed;
  }

  /** Update everything on the stage to the chosen view and controls. */
  paint() {
    const { view, divider } = this;
    for (const radio of byId("views").querySelectorAll("input")) {
      radio.checked = radio.value === view.key;
      radio.parentElement.hidden = radio.value === "true" && !this.truth;
    }
    const at = Number(divider.value);
    const windowed = this.greys();
    for (const id of ["image", "counterfactual", "truth"]) {
      const panel = byId(id);
      panel.hidden = id !== view.left && id !== view.right;
      panel.classList.toggle("windowed", windowed);
      panel.style.clipPath = id === view.right ? `inset(0 0 0 ${100 * this.zoom.toImage(at / 100)}%)` : "none";
      panel.setAttribute("alt", `${TAGS[id]}: ${this.name ?? ""}`);
    }
    const heat = byId("heat");
    heat.hidden = !view.heat;
    heat.style.opacity = view.left ? String(Number(this.opacity.value) / 100) : "1";
    heat.setAttribute("alt", `attribution map: ${this.name ?? ""}`);
    this.stage.classList.toggle("bare", !view.left);
    divider.hidden = !view.right;
    divider.setAttribute("aria-valuetext", `${Math.round(at)} per cent ${TAGS[view.left]}, the rest ${TAGS[view.right]}`);
    byId("line").hidden = !view.right;
    byId("line").style.left = `${at}%`;
    byId("opacity-knob").hidden = !(view.heat && view.left);
    byId("opacity-value").textContent = `${this.opacity.value} %`;
    const mapTag = view.left ? "attribution map on image" : "attribution map";
    byId("tag-left").textContent = view.heat ? mapTag : TAGS[view.left];
    byId("tag-right").textContent = TAGS[view.right];
    for (const id of ["lesion", "lesion-halo"]) byId(id).classList.toggle("off", !this.lesionOn.checked);
    byId("lungs").classList.toggle("off", !this.lungsOn.checked);
    this.stage.parentElement.querySelector(".legend").toggleAttribute("hidden", !view.heat);
  }
}
