/**
 * Zoom of the stage. Image, counterfactual, map and outlines are in one layer with one transform, so they stay registered;
 * the divider is not zoomed. Each newly chosen record starts at 100 %.
 */
import { byId } from "./dom.js";

const MAX_SCALE = 16;
const PIXEL_SCALE = 4; // from this scale pixels are drawn as squares, not smoothed
const STEP = 1.5; // factor of one key press or click
const PAN_STEP = 0.15; // fraction of the stage that one key press moves the image
const DIVIDER_REACH = 24; // pixels; a drag that starts nearer to the divider moves it, not the image

export class Zoom {
  /**
   * @param {HTMLElement} stage
   * @param {HTMLInputElement} divider
   * @param {() => void} onChange  the image moved below the divider
   */
  constructor(stage, divider, onChange) {
    this.stage = stage;
    this.divider = divider;
    this.onChange = onChange;
    this.layer = byId("layer");
    this.scale = 1;
    this.x = 0; // left and upper edge of the image, as fractions of the stage
    this.y = 0;
    /** @type {Map<number, {x: number, y: number}>} active pointers, as fractions of the stage */
    this.held = new Map();
    this.moves = ""; // "image" or "divider"
    byId("zoom-in").addEventListener("click", () => this.by(STEP));
    byId("zoom-out").addEventListener("click", () => this.by(1 / STEP));
    byId("zoom-whole").addEventListener("click", () => this.whole());
    stage.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    stage.addEventListener("dblclick", (event) => this.by(this.scale > 1 ? 1 / this.scale : 4, this.at(event)));
    stage.addEventListener("pointerdown", (event) => this.down(event));
    stage.addEventListener("pointermove", (event) => this.move(event));
    for (const end of ["pointerup", "pointercancel"]) {
      stage.addEventListener(end, (event) => this.held.delete(/** @type {PointerEvent} */ (event).pointerId));
    }
    this.paint();
  }

  /** A horizontal position on the stage as a position on the image, both in [0, 1]. @param {number} at */
  toImage(at) {
    return Math.min(1, Math.max(0, (at - this.x) / this.scale));
  }

  /** Show the whole image. */
  whole() {
    [this.scale, this.x, this.y] = [1, 0, 0];
    this.paint();
  }

  /** Magnify around a fixed point. @param {number} factor @param {{x: number, y: number}} around */
  by(factor, around = { x: 0.5, y: 0.5 }) {
    const scale = Math.min(MAX_SCALE, Math.max(1, this.scale * factor));
    const ratio = scale / this.scale;
    this.x = around.x - (around.x - this.x) * ratio;
    this.y = around.y - (around.y - this.y) * ratio;
    this.scale = scale;
    this.paint();
  }

  /** Move the image, in fractions of the stage; the whole image (scale 1) does not move. @param {number} x @param {number} y */
  pan(x, y) {
    this.x += x;
    this.y += y;
    this.paint();
  }

  /** Move the view in a direction, by keyboard. @param {number} right @param {number} down */
  panBy(right, down) {
    this.pan(-right * PAN_STEP, -down * PAN_STEP);
  }

  /** The wheel scrolls the page at scale 1 and zooms otherwise; with Ctrl it always zooms, like a pinch. @param {WheelEvent} event */
  wheel(event) {
    if (this.scale === 1 && !event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const turned = event.deltaY * (event.deltaMode === 1 ? 16 : 1);
    this.by(Math.exp(-Math.max(-100, Math.min(100, turned)) * (event.ctrlKey ? 0.01 : 0.003)), this.at(event));
  }

  /** Position of an event, as fractions of the stage. @param {MouseEvent} event */
  at(event) {
    const box = this.stage.getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  }

  /** Start a drag. @param {PointerEvent} event */
  down(event) {
    const place = this.at(event);
    this.held.set(event.pointerId, place);
    if (this.scale === 1 && this.held.size < 2) return; // the divider, which covers the stage, handles it
    const line = (place.x - Number(this.divider.value) / 100) * this.stage.clientWidth;
    this.moves = !this.divider.hidden && Math.abs(line) < DIVIDER_REACH && this.held.size < 2 ? "divider" : "image";
    this.stage.setPointerCapture(event.pointerId);
  }

  /** Drag with one pointer, pinch with two. @param {PointerEvent} event */
  move(event) {
    const before = this.held.get(event.pointerId);
    if (!before || (this.scale === 1 && this.held.size < 2)) return;
    const place = this.at(event);
    const others = [...this.held].filter(([id]) => id !== event.pointerId).map(([, other]) => other);
    this.held.set(event.pointerId, place);
    if (others.length) {
      const apart = (/** @type {{x: number, y: number}} */ one) => Math.hypot(one.x - others[0].x, one.y - others[0].y);
      this.by(apart(place) / Math.max(apart(before), 0.01), { x: (place.x + others[0].x) / 2, y: (place.y + others[0].y) / 2 });
      this.pan((place.x - before.x) / 2, (place.y - before.y) / 2);
    } else if (this.moves === "divider") {
      this.divider.value = String(place.x * 100);
      this.onChange();
    } else this.pan(place.x - before.x, place.y - before.y);
  }

  /** Keep the image on the stage and move the layer to its position. */
  paint() {
    this.x = Math.min(0, Math.max(1 - this.scale, this.x));
    this.y = Math.min(0, Math.max(1 - this.scale, this.y));
    this.layer.style.transform = this.scale === 1 ? "" : `translate(${this.x * 100}%, ${this.y * 100}%) scale(${this.scale})`;
    this.stage.classList.toggle("zoomed", this.scale > 1);
    this.layer.classList.toggle("pixels", this.scale >= PIXEL_SCALE);
    byId("zoom-value").textContent = `${Math.round(this.scale * 100)} %`;
    this.onChange();
  }
}
