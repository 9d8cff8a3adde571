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

export function percent(x) {
  if (x === null || x === undefined) return "–";
  if (x === 0) return "0%";
  return x >= 1e-4 ? `${Number((100 * x).toPrecision(3))}%` : `${short(x)}`;
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

export function featureLink(id, label) {
  return link(`/feature/${id}`, h("span.number", {}, whole(id)), label ? h("span.label", {}, label) : null);
}
