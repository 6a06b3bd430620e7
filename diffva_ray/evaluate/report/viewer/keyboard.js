/** Shortcuts that work anywhere on the page, except while typing or when switched off in the help dialog. */
import { byId } from "./dom.js";

/** Whether the focused element takes text or keys itself. @param {EventTarget|null} target */
function typing(target) {
  const element = /** @type {HTMLElement} */ (target);
  return element.matches?.("input:not([type=checkbox], [type=radio], [type=range]), select, textarea") ?? false;
}

/**
 * @param {{step: (by: number) => void, setView: (view: number) => void, adjust: (by: number) => void,
 *   lesion: () => void, leave: () => void, zoom: import("./zoom.js").Zoom}} actions
 */
export function listenToKeys(actions) {
  const help = /** @type {HTMLDialogElement} */ (byId("help"));
  const on = /** @type {HTMLInputElement} */ (byId("keys-on"));
  const search = /** @type {HTMLInputElement} */ (byId("text"));
  byId("help-open").addEventListener("click", () => help.showModal());
  byId("help-close").addEventListener("click", () => help.close());
  /** @type {Record<string, () => void>} */
  const keys = {
    j: () => actions.step(1), k: () => actions.step(-1), "[": () => actions.adjust(-10), "]": () => actions.adjust(10),
    "+": () => actions.zoom.by(1.5), "=": () => actions.zoom.by(1.5), "-": () => actions.zoom.by(1 / 1.5), "0": () => actions.zoom.whole(),
    l: actions.lesion, "?": () => help.showModal(), "/": () => search.focus(),
  };
  /** @type {Record<string, () => void>} */
  const shifted = {
    ArrowLeft: () => actions.zoom.panBy(-1, 0), ArrowRight: () => actions.zoom.panBy(1, 0),
    ArrowUp: () => actions.zoom.panBy(0, -1), ArrowDown: () => actions.zoom.panBy(0, 1),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || help.open) return;
    if (event.key === "Escape") {
      if (document.activeElement !== search) {
        actions.leave();
        return;
      }
      event.preventDefault(); // keep the browser from clearing the field
      byId("list").focus();
      return;
    }
    if (!on.checked || typing(event.target)) return;
    const pan = event.shiftKey && actions.zoom.scale > 1 ? shifted[event.key] : null;
    const view = /^[1-6]$/.test(event.key) ? () => actions.setView(Number(event.key)) : null;
    const act = keys[event.key] ?? pan ?? view;
    if (!act) return;
    event.preventDefault();
    act();
  });
}
