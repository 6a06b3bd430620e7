/** The pictures of one image: views of it, the before/after divider, the map over it, outlines of lesion and lungs. */
import { byId, make } from "./dom.js";
import { pictures } from "./records.js";
import { Zoom } from "./zoom.js";

/**
 * What a view shows: the right side of the divider (when it has one), whose picture fills the stage, the map.
 * @typedef {{key: string, name: string, left: string, right: string, heat: boolean, needs: string}} View
 */
/** @type {View[]} */
const VIEWS = [
  { key: "both", name: "Before / after", left: "image", right: "counterfactual", heat: false, needs: "" },
  { key: "over", name: "Map on image", left: "image", right: "", heat: true, needs: "" },
  { key: "image", name: "Image", left: "image", right: "", heat: false, needs: "" },
  { key: "counterfactual", name: "Counterfactual", left: "counterfactual", right: "", heat: false, needs: "" },
  { key: "map", name: "Map", left: "", right: "", heat: true, needs: "" },
  { key: "true", name: "Ground-truth counterfactual", left: "counterfactual", right: "truth", heat: false, needs: "truth" },
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
      radio.addEventListener("change", () => this.look(view.key));
      byId("views").append(make("label", { class: "view" }, radio, make("span", {}, view.name)));
    }
    for (const knob of [this.divider, this.opacity, this.range, this.level]) knob.addEventListener("input", () => this.paint());
    for (const box of [this.lesionOn, this.lungsOn]) box.addEventListener("change", () => this.paint());
    byId("greys-reset").addEventListener("click", () => {
      [this.range.value, this.level.value] = [this.range.defaultValue, this.level.defaultValue];
      this.paint();
    });
    this.zoom = new Zoom(this.stage, this.divider, () => this.zoom && this.paint());
    this.look(this.view.key);
  }

  /** Show a record's pictures; false when it has none. @param {number} n @param {string} name */
  show(n, name) {
    const files = pictures(this.table, n);
    this.truth = files?.truth ?? false;
    this.name = name;
    byId("show").hidden = !files;
    this.outline("", "");
    this.zoom.whole();
    if (!files) return false;
    for (const id of ["image", "counterfactual", "truth"]) {
      const picture = byId(id);
      if (id !== "truth" || this.truth) picture.setAttribute("src", files.strip);
      else picture.removeAttribute("src");
    }
    byId("counterfactual").className = `strip ${this.truth ? "middle" : "last"}`;
    byId("heat").setAttribute("src", files.map);
    if (this.view.needs && !this.truth) this.look("both");
    this.paint();
    return true;
  }

  /** Draw what is known of the image, as paths. @param {string} lesion @param {string} lungs */
  outline(lesion, lungs) {
    for (const id of ["lesion", "lesion-halo"]) byId(id).setAttribute("d", lesion);
    byId("lungs").setAttribute("d", lungs);
    byId("lesion-knob").hidden = !lesion;
    byId("lungs-knob").hidden = !lungs;
  }

  /** @param {string|number} which  a view's key, or its number from 1 */
  look(which) {
    const view = typeof which === "number" ? VIEWS[which - 1] : VIEWS.find(({ key }) => key === which);
    if (!view || (view.needs && !this.truth)) return;
    this.view = view;
    this.paint();
    this.onView();
  }

  /** Move the divider, or the map's opacity where there is none. @param {number} by */
  nudge(by) {
    const knob = this.view.right ? this.divider : this.opacity;
    knob.value = String(Number(knob.value) + by);
    this.paint();
  }

  /**
   * Window and level, as per cent of the image's greys: from level - window / 2 (black) to level + window / 2 (white).
   * Returns whether they change anything.
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

  /** Bring everything on the stage to what is chosen. */
  paint() {
    const { view, divider } = this;
    for (const radio of byId("views").querySelectorAll("input")) {
      radio.checked = radio.value === view.key;
      radio.parentElement.hidden = radio.value === "true" && !this.truth;
    }
    const at = Number(divider.value);
    const windowed = this.greys();
    for (const id of ["image", "counterfactual", "truth"]) {
      const picture = byId(id);
      picture.hidden = id !== view.left && id !== view.right;
      picture.classList.toggle("windowed", windowed);
      picture.style.clipPath = id === view.right ? `inset(0 0 0 ${100 * this.zoom.across(at / 100)}%)` : "none";
      picture.setAttribute("alt", `${TAGS[id]}: ${this.name ?? ""}`);
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
    byId("tag-left").textContent = view.key === "map" ? "image − counterfactual" : TAGS[view.left];
    byId("tag-right").textContent = TAGS[view.right];
    for (const id of ["lesion", "lesion-halo"]) byId(id).classList.toggle("off", !this.lesionOn.checked);
    byId("lungs").classList.toggle("off", !this.lungsOn.checked);
    this.stage.parentElement.querySelector(".legend").toggleAttribute("hidden", !view.heat);
  }
}
