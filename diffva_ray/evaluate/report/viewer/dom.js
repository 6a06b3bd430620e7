/** Elements by id and elements made new. Text is only ever set as text, so no value can become markup. */

/**
 * The element of the page with this id.
 * @template {Element} [T=HTMLElement]
 * @param {string} id
 * @returns {T}
 */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no #${id}`);
  return /** @type {any} */ (found);
}

/**
 * A new element.
 * @param {string} tag
 * @param {Record<string, string>} attributes
 * @param {...(Node|string)} children
 */
export function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/**
 * A new element of a drawing.
 * @param {string} tag
 * @param {Record<string, string>} attributes
 */
export function draw(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** A class or column name for people. @param {string} name */
export const plain = (name) => name.replaceAll("_", " ");

/** A file's own name. @param {string} path */
export const fileName = (path) => path.slice(path.lastIndexOf("/") + 1);

/** 12 345, as the page writes it. @param {number} value */
export const counted = (value) => String(value).replace(/\B(?=(\d{3})+$)/g, "\u202f");

/** A score with a true minus sign; a dash where there is none. @param {number|null} value @param {number} digits */
export function written(value, digits) {
  if (value === null || !Number.isFinite(value)) return "–";
  return value.toFixed(digits).replace("-", "−");
}
