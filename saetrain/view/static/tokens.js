// Text with the activation of a feature under each token.

import { even, h, short, visible, whole } from "/static/dom.js";

const BEFORE = 22;
const AFTER = 10;
const LONGEST_WORD = 24; // characters that are kept on one line

// A token, behind its blank: a line that breaks there would leave a stripe of its colour.
function piece(text, value, most, here) {
  const [blank, rest] = split(text);
  const share = most > 0 ? Math.min(value / most, 1) : 0;
  const classes = `span.token${share > 0 ? ".on" : ""}${here ? ".here" : ""}`;
  const shown = rest.replace(/\n/g, "⏎\n");
  return [blank, h(classes, { "--a": share.toFixed(3), title: `${visible(text)}  ${value ? short(value) : "0 or not kept"}` }, shown)];
}

function split(text) {
  return /^ ./.test(text) ? [" ", text.slice(1)] : ["", text];
}

// One example: its value, where it is from, and the text around it, of which a click shows all.
export function example(found, most) {
  const where = found.name ?? (found.document === null ? null : `document ${whole(found.document)}`);
  const line = h("p.text");
  let wide = false;
  const fill = () => {
    const first = wide ? 0 : Math.max(found.at - BEFORE, 0);
    const end = wide ? found.tokens.length : Math.min(found.at + AFTER + 1, found.tokens.length);
    const cut = (yes) => (yes ? h("span.cut", { "aria-hidden": "true" }, "…") : null);
    line.replaceChildren(
      ...[
        cut(first > 0),
        ...found.tokens.slice(first, end).flatMap((text, i) => piece(text, found.acts[first + i], most, first + i === found.at)),
        cut(end < found.tokens.length),
      ].filter(Boolean),
    );
  };
  fill();
  const longer = found.tokens.length > found.at + AFTER + 1 || found.at > BEFORE;
  const toggle = h(
    "button.quiet.small",
    {
      type: "button",
      "aria-expanded": "false",
      "aria-label": `more of the text of row ${whole(found.row)}`,
      onclick: () => {
        wide = !wide;
        toggle.textContent = wide ? "less" : "more";
        toggle.setAttribute("aria-expanded", String(wide));
        toggle.setAttribute("aria-label", `${toggle.textContent} of the text of row ${whole(found.row)}`);
        fill();
      },
    },
    "more",
  );
  return h(
    "li.example",
    {},
    h("span.value", { title: "activation" }, even(found.value)),
    h("div", {}, found.tokens.length ? line : h("p.text.empty", {}, "no text: the store is not at hand, or has no tokens")),
    h("span.where", {}, where ? h("span.name", { title: where }, where.split("/").pop()) : null, h("span", {}, `${found.repeated ? "repeated · " : ""}row ${whole(found.row)}`, longer ? toggle : null)),
  );
}

export function examples(found, most) {
  if (!found.length) return h("p.empty", {}, "No examples of this kind.");
  return h("ol.examples", {}, found.map((one) => example(one, most)));
}

// Tokens of a pasted text; `pick` is called with the number of the one that is chosen.  A line breaks between words and
// not between the tokens of one, since a browser would break it beside each button.
export function chooser(tokens, acts, most, pick, chosen) {
  const line = h("p.text.paste");
  let [word, size] = [null, 0];
  tokens.forEach((text, i) => {
    const [blank, rest] = split(text);
    if (!word || blank || !/\S/.test(text) || size + text.length > LONGEST_WORD) {
      word = h("span.word");
      size = 0;
      line.append(blank, word);
    }
    size += text.length;
    word.append(
      h(
        `button.token${acts && acts[i] > 0 ? ".on" : ""}${i === chosen ? ".here" : ""}`,
        {
          type: "button",
          "--a": (acts && most > 0 ? Math.min(acts[i] / most, 1) : 0).toFixed(3),
          "aria-label": /\S/.test(text) ? null : visible(text),
          "aria-pressed": String(i === chosen),
          onclick: () => pick(i),
        },
        rest.replace(/\n/g, "⏎\n"),
      ),
    );
  });
  return line;
}

