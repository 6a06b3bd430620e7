/** Find and create elements. Text is always set as text, so no value can become markup. */

/**
 * The element of the page with this id.
 * @template {Element} [T=HTMLElement]
 * @param {string} id
 * @returns {T}
 */
export function byId(id) {
  const element = document.getElementById(id);
  if (!element) throw new Error(`the page has no #${id}`);
  return /** @type {any} */ (element);
}

/**
 * A new element.
 * @param {string} tag
 * @param {Record<string, string>} attributes
 * @param {...(Node|string)} children
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/**
 * A new SVG element.
 * @param {string} tag
 * @param {Record<string, string>} attributes
 */
export function makeSvg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** A class or column name with spaces. @param {string} name */
export const plain = (name) => name.replaceAll("_", " ");

/** The last part of a path. @param {string} path */
export const fileName = (path) => path.slice(path.lastIndexOf("/") + 1);

/** An integer with narrow spaces: 12 345. @param {number} value */
export const counted = (value) => String(value).replace(/\B(?=(\d{3})+$)/g, "\u202f");

/** A score with a minus sign (U+2212); a dash for a missing value. @param {number|null} value @param {number} digits */
export function written(value, digits) {
  if (value === null || !Number.isFinite(value)) return "–";
  return value.toFixed(digits).replace("-", "−");
}
