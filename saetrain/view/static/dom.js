// Elements and numbers.  Everything that is data becomes a text node, never HTML.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "rect", "line", "path", "text", "g", "title", "circle"]);

// h("a.quiet", {href: "/"}, "text", [more]): an element with classes, attributes, listeners (on...) and children.
export function h(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = SVG_TAGS.has(name) ? document.createElementNS(SVG, name) : document.createElement(name);
  if (classes.length) element.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) element.style.setProperty(key, value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function link(href, ...children) {
  return h("a", { href, "data-link": true }, ...children);
}

export function section(title, ...children) {
  return h("section.card", {}, h("h2", {}, title), ...children);
}

export function tile(value, name, href = null) {
  const inside = [h("b", {}, value), h("span", {}, name)];
  return h("div.tile", {}, href ? link(href, ...inside) : inside);
}

export const whole = (n) => (n === null || n === undefined ? "–" : n.toLocaleString("en-US"));

export function short(x, digits = 3) {
  if (x === null || x === undefined) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text = size >= 1e5 || size < 1e-3 ? x.toExponential(digits - 1).replace("e+", "e") : Number(x.toPrecision(digits)).toLocaleString("en-US", { maximumSignificantDigits: digits });
  return text.replaceAll("-", "−");
}

// The same with all its digits, so that the numbers of a column are as long as they are exact.
export function even(x, digits = 3) {
  const size = Math.abs(x);
  if (x === null || x === undefined || x === 0 || size >= 1e5 || size < 1e-3) return short(x, digits);
  return x.toLocaleString("en-US", { minimumSignificantDigits: digits, maximumSignificantDigits: digits }).replaceAll("-", "−");
}

export function percent(x) {
  if (x === null || x === undefined) return "–";
  if (x === 0) return "0%";
  if (x < 1e-9) return short(x);
  return `${(100 * x).toLocaleString("en-US", { minimumSignificantDigits: 3, maximumSignificantDigits: 3 })}%`;
}

export function power(x) {
  const digits = String(Math.round(Math.log10(x)));
  const raised = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  return `10${[...digits].map((c) => raised[c]).join("")}`;
}

// A token as people read it: blanks and line ends are visible.
export function visible(text) {
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ /, "␣") || "∅";
}

// A token in a box; the blank before a word is there, but does not shout.
export function chip(text) {
  const shown = visible(text);
  return h("code.chip", {}, shown.startsWith("␣") ? [h("span.blank", {}, "␣"), shown.slice(1)] : shown);
}

export function featureLink(id, label, before = "") {
  return link(`/feature/${id}`, h("span.number", {}, before, whole(id)), label ? h("span.label", {}, label) : null);
}
