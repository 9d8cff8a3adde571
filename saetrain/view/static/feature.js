// One feature, and several side by side.

import { get, send } from "/static/api.js";
import { bars } from "/static/charts.js";
import { chip, even, featureLink, h, link, percent, section, short, visible, whole } from "/static/dom.js";
import { listQuery } from "/static/overview.js";
import { related } from "/static/pairs.js";
import { examples } from "/static/tokens.js";

const GROUPS = {
  top: { title: "Largest", kinds: ["top"], about: "The largest activations, at most one of each window of a document." },
  strength: { title: "By strength", prefix: "interval", about: "Uniform samples of each fifth of the range from 0 to the largest activation." },
  rank: { title: "By rank", prefix: "part", about: "Uniform samples of each fifth of the activations, in order of strength." },
  random: { title: "Random", kinds: ["random"], about: "A uniform sample of all rows on which it is active." },
  quiet: { title: "Not active", kinds: ["quiet", "hard"], about: "Rows on which it is not active." },
};

function summary(f) {
  const { value, low, high } = f.density;
  return h(
    "p.summary",
    {},
    "Active on ",
    h("b", {}, percent(value)),
    low === null ? null : ` (95%: ${percent(low)} to ${percent(high)})`,
    ` of rows: ${whole(f.count)} in ${whole(f.documents)} documents · largest activation `,
    h("b", {}, short(f.max)),
    ` · mean ${short(f.mean)}, standard deviation ${short(f.std)}`,
    f.loss && ` · effect on the loss ${short(f.loss.value)}${f.loss.low === null ? "" : ` (95%: ${short(f.loss.low)} to ${short(f.loss.high)})`} nats a row`,
  );
}

function labelForm(f, tell) {
  const input = h("input", { id: "label", value: f.label, maxlength: 500, placeholder: "Add a label", "aria-label": `Label of feature ${f.id}`, autocomplete: "off" });
  const save = async () => {
    if (input.value.trim() === f.label) return;
    try {
      const saved = await send(`label/${f.id}`, { label: input.value }, "PUT");
      f.label = saved.label;
      input.value = saved.label;
      tell(saved.label ? "Label saved" : "Label removed");
    } catch (error) {
      tell(`The label was not saved: ${error.message}`);
    }
  };
  return h(
    "form.labelling",
    {
      onsubmit: (event) => {
        event.preventDefault();
        save();
        input.blur();
      },
    },
    input,
    h("button", { type: "submit" }, "Save"),
  );
}

function histogram(f, height = 110, width = 360) {
  const last = f.histogram.counts.findLastIndex((n) => n > 0);
  const first = f.histogram.counts.findIndex((n) => n > 0);
  if (last < 0) return h("p.empty", {}, "Never active.");
  const [edges, counts] = [f.histogram.edges.slice(first, last + 2), f.histogram.counts.slice(first, last + 1)];
  if (edges[0] <= 0) {
    edges.shift();
    counts.shift();
  }
  const marks = [0.2, 0.4, 0.6, 0.8].map((share) => share * f.max);
  return bars({ edges, counts, log: true, title: `Activations of feature ${f.id}`, height, width, marks });
}

function tokenTable(f) {
  if (!f.tokens.length) return h("p.empty", {}, "The store has no tokens.");
  return h(
    "table",
    {},
    h("thead", {}, h("tr", {}, h("th", {}, "Token"), h("th.right", {}, "Rows"), h("th.right", {}, "Share"), h("th.right", {}, "Mean"))),
    h(
      "tbody",
      {},
      f.tokens.map((t) => {
        const shown = visible(t.text ?? String(t.id));
        const cell = t.text ? link(`/search?q=${encodeURIComponent(t.text.trim())}`, h("code", {}, shown)) : h("code", {}, shown);
        return h("tr", {}, h("td", {}, cell), h("td.right", {}, whole(t.times)), h("td.right", {}, percent(t.times / f.count)), h("td.right", {}, even(t.mean)));
      }),
    ),
  );
}

function logitTable(title, tokens) {
  const most = Math.max(...tokens.map((t) => Math.abs(t.value)), 1e-9);
  return h(
    "div",
    {},
    h("h3", {}, title),
    h("ul.logits", {}, tokens.map((t) => h("li", { "--a": (Math.abs(t.value) / most).toFixed(3) }, h("code", {}, visible(t.text)), h("span", {}, even(t.value))))),
  );
}

const CHIPS = 3;

function other(n, ...values) {
  return h("li", {}, featureLink(n.id, n.label), h("span.tokens", {}, n.tokens.slice(0, CHIPS).map(chip)), values);
}

// The share of this feature's rows on which another is active, and how often chance would give it.
function together(f) {
  return h(
    "ul.near",
    {},
    h("li.heads", {}, h("span.right", {}, "of its rows"), h("span.right.times", {}, "× chance")),
    f.together.map((n) => {
      const [share, low, high] = n.share;
      const range = low === null ? "" : `95%: ${percent(low)} to ${percent(high)}`;
      return other(n, h("span.right", { title: range }, percent(share)), h("span.right.times", {}, `${short(n.count / n.expected, 2)}×`));
    }),
  );
}

function nearest(f) {
  return h("ul.near", {}, h("li.heads", {}, h("span.right", {}, "cosine")), f.neighbours.map((n) => other(n, h("span", {}, even(n.cosine)))));
}

// Below the examples: other features.
function beneath(f) {
  return h(
    "div.beneath",
    {},
    f.together && f.together.length ? section("Active together", together(f), h("p.note", {}, "Share of this feature’s rows, and how many times chance that is, on a uniform sample of rows.")) : null,
    f.neighbours && f.neighbours.length ? section("Nearest decoder rows", nearest(f)) : null,
  );
}

function side(f) {
  const edges = f.positions.map((_, i) => 2 ** i).concat(2 ** f.positions.length);
  const last = Math.max(f.positions.findLastIndex((n) => n > 0), 0);
  return h(
    "div.side",
    {},
    section("Activations", histogram(f), h("p.note", {}, "Rows by activation, logarithmic; lines cut the range into fifths.")),
    f.logits
      ? section("Tokens it promotes", h("div.two", {}, logitTable("More likely", f.logits.top), logitTable("Less likely", f.logits.bottom)), bars({ ...f.logits.histogram, title: "Logits of all tokens", height: 50 }), h("p.note", {}, "Decoder row times unembedding, without the scale of the final norm; below, the logits of the whole vocabulary."))
      : null,
    section("Tokens it is active on", tokenTable(f)),
    section("Place in the document", bars({ edges: edges.slice(0, last + 2), counts: f.positions.slice(0, last + 1), log: true, title: "Active rows by place in the document", height: 70 })),
    section(
      "Quantiles",
      h("table", {}, h("tbody", {}, f.quantiles.filter((_, i) => i % 2).map(([share, value]) => h("tr", {}, h("td", {}, `${Number((100 * share).toPrecision(6))}%`), h("td.right", {}, even(value)))))),
    ),
  );
}

export async function feature(main, { facts, id, query, go, tell, pin }) {
  const f = await get(`feature/${id}`);
  const context = listQuery(query);
  const tail = context.size ? `?${context}` : "";
  const beside = await get(`beside/${f.id}`, context);
  const step = (to, name, sign) => h("button.quiet", { type: "button", disabled: to === null, "aria-label": `${name} feature`, onclick: () => go(`/feature/${to}${tail}`) }, sign);
  main.append(
    h(
      "div.heading",
      {},
      step(beside.previous, "Previous", "‹"),
      h("h1", {}, `Feature ${whole(f.id)}`),
      step(beside.next, "Next", "›"),
      labelForm(f, tell),
      h("button", { type: "button", onclick: () => pin(f.id) }, "Compare"),
      facts.model && !f.dead ? link(`/steer?feature=${f.id}`, h("span.button", {}, "Steer")) : null,
    ),
  );
  if (f.dead) {
    main.append(h("p.empty", {}, `Dead: it is active on none of the ${whole(f.rows)} rows.`));
    return { previous: beside.previous, next: beside.next, tail };
  }
  const shown = h("div", { role: "tabpanel", "aria-label": "Examples" });
  const tabs = h("div.tabs", { role: "tablist", "aria-label": "Kinds of examples" });
  const available = Object.entries(GROUPS)
    .map(([name, group]) => [name, group, group.kinds ? group.kinds.filter((k) => facts.kinds.includes(k)) : facts.kinds.filter((k) => k.startsWith(`${group.prefix} `))])
    .filter(([, , kinds]) => kinds.length);
  const open = async (name) => {
    const [, group, kinds] = available.find(([one]) => one === name) ?? available[0];
    for (const tab of tabs.children) tab.setAttribute("aria-selected", String(tab.dataset.name === name));
    const found = name === "top" ? [{ kind: "top", examples: f.examples }] : await Promise.all(kinds.map((kind) => get(`examples/${f.id}/${kind}`)));
    const parts = (name === "strength" || name === "rank" ? found.reverse() : found).map((one) => {
      const number = Number(one.kind.split(" ")[1]);
      const range = name === "strength" ? `${short(((number - 1) / 5) * f.max)} to ${short((number / 5) * f.max)}` : name === "rank" ? `${20 * (number - 1)}% to ${20 * number}% of its activations` : null;
      return [range ? h("h3", {}, range) : found.length > 1 ? h("h3", {}, one.kind) : null, examples(one.examples, f.max)];
    });
    shown.replaceChildren(h("p.note", {}, group.about), ...parts.flat().filter(Boolean));
    if (name === "top") {
      const more = h("button", { type: "button" }, "Show all");
      more.addEventListener("click", async () => {
        const all = await get(`examples/${f.id}/top`);
        more.remove();
        shown.querySelector("ol").replaceWith(examples(all.examples, f.max));
      });
      shown.append(more);
    }
  };
  for (const [name, group] of available) tabs.append(h("button", { type: "button", role: "tab", "data-name": name, onclick: () => open(name) }, group.title));
  const below = beneath(f);
  main.append(summary(f), h("div.columns", {}, h("div.examples-side", {}, h("section.card", {}, tabs, shown), below), side(f)));
  await open("top");
  for (const part of await related(facts, f.id)) below.append(part);
  return { previous: beside.previous, next: beside.next, tail };
}

export async function compare(main, { query, go }) {
  const ids = query.get("ids") ?? "";
  const found = await get("compare", { ids });
  const most = Math.max(...found.features.map((f) => f.max ?? 0));
  main.append(
    h("h1", {}, "Compare"),
    h("p.note", {}, found.documents.length ? `Among the largest examples of all are ${found.documents.map((name) => String(name).split("/").pop()).join(", ")}.` : "No document is among the largest examples of all.", " Colours are on one scale."),
    h(
      "div.compared",
      { "--n": found.features.length },
      found.features.map((f) =>
        h(
          "section.card",
          {},
          h("h2", {}, featureLink(f.id, f.label, "Feature "), h("button.quiet.small", { type: "button", "aria-label": `Leave out feature ${f.id}`, onclick: () => go(`/compare?ids=${ids.split(",").filter((one) => one !== String(f.id)).join(",")}`) }, "✕")),
          f.dead ? h("p.empty", {}, "Dead.") : [summary(f), histogram(f, 80, found.features.length < 3 ? 560 : 360), tokenTable({ ...f, tokens: f.tokens.slice(0, 6) }), h("h3", {}, "Largest activations"), examples(f.examples.slice(0, 5), most)],
        ),
      ),
    ),
  );
}
