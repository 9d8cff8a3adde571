// All features: what there is, histograms whose bars filter, and the list of those that are left.

import { get } from "/static/api.js";
import { bars } from "/static/charts.js";
import { chip, even, featureLink, h, link, percent, section, short, tile, whole } from "/static/dom.js";

export const FILTERS = ["density", "max", "documents", "effect", "cosine"];
const FIRST = 20; // features that a search shows of each kind at first
const NAMES = { index: "number", density: "density", max: "largest activation", documents: "documents", effect: "size of the effect on the loss", cosine: "nearest cosine" };

export function listQuery(query) {
  const kept = [...FILTERS, "order", "falling", "labelled", "dead"].filter((name) => query.has(name));
  return new URLSearchParams(kept.map((name) => [name, query.get(name)]));
}

export function table(items, more = null) {
  return h(
    "table.list",
    {},
    h("thead", {}, h("tr", {}, h("th", {}, "Feature"), h("th", {}, "Tokens it is most often active on"), h("th.right.least", {}, "Density"), h("th.right", {}, more ? more.title : "Max"))),
    h(
      "tbody",
      {},
      items.map((item) =>
        h(
          "tr",
          {},
          h("td", {}, featureLink(item.id, item.label)),
          h("td.tokens", {}, item.tokens.map(chip)),
          h("td.right.least", {}, percent(item.density)),
          h("td.right", {}, more ? more.show(item) : even(item.max)),
        ),
      ),
    ),
  );
}

export async function overview(main, { facts, query, go }) {
  const found = await get("overview");
  const set = (name, value) => {
    const next = listQuery(query);
    if (value === null) next.delete(name);
    else next.set(name, value);
    go(`/?${next}`);
  };
  const histograms = found.histograms.map((one) => {
    const chosen = query.has(one.name) ? query.get(one.name).split(",").map(Number) : null;
    return section(one.title, bars({ ...one, width: 280, height: 84, chosen, choose: (bounds) => set(one.name, bounds && bounds.join(",")) }));
  });
  main.append(
    h("h1", {}, facts.name),
    h("p.summary", {}, `Dictionary ${facts.dictionary.split("/").slice(-3).join("/")}, on ${facts.field} of ${facts.store.split("/").pop()}. A bar is a filter.`),
    h(
      "div.tiles",
      {},
      tile(whole(found.latents), "features"),
      tile(whole(found.alive), "active somewhere"),
      tile(`${whole(found.latents - found.alive)} (${percent(1 - found.alive / found.latents)})`, "dead on these rows", "/?dead=1"),
      tile(whole(found.dense), "dense: on over 10% of rows", `/?density=0.1,2&order=density&falling=1`),
      tile(whole(found.labelled), "labelled", "/?labelled=1"),
      tile(whole(facts.rows), "rows"),
      tile(whole(facts.documents), "documents"),
    ),
    h("div.grid", {}, histograms),
  );
  const active = FILTERS.filter((name) => query.has(name));
  const order = h(
    "select",
    { id: "order", onchange: (event) => set("order", event.target.value) },
    ["index", ...facts.orders].map((name) => h("option", { value: name, selected: name === (query.get("order") ?? "index") }, NAMES[name])),
  );
  const falling = query.get("falling") === "1";
  const rows = h("div");
  const more = h("button", { type: "button", onclick: () => load() }, "Show more");
  const title = h("h2", {}, "Features");
  main.append(
    h(
      "section.card",
      {},
      h(
        "div.bar",
        {},
        title,
        active.map((name) => h("button.chip", { type: "button", onclick: () => set(name, null), "aria-label": `Remove the filter on ${NAMES[name]}` }, `${NAMES[name]} ${query.get(name).split(",").map((v) => short(Number(v))).join(" to ")}  ✕`)),
        ["labelled", "dead"].map((name) => (query.has(name) ? h("button.chip", { type: "button", onclick: () => set(name, null), "aria-label": `Show all, not the ${name} ones` }, `${name}  ✕`) : null)),
        query.has("labelled") && found.labelled ? h("a", { href: "/labels.json", download: "labels.json" }, "Download the labels") : null,
        h("span.grow"),
        h("span.labelled", {}, h("label", { for: "order" }, "Order by"), order, h("button.quiet", { type: "button", "aria-pressed": String(falling), onclick: () => set("falling", falling ? null : "1") }, falling ? "↓ falling" : "↑ rising")),
      ),
      rows,
      more,
    ),
  );
  let start = 0;
  async function load() {
    const part = await get("list", new URLSearchParams([...listQuery(query), ["start", start]]));
    title.textContent = `${whole(part.total)} feature${part.total === 1 ? "" : "s"}`;
    const made = table(part.items);
    if (start === 0) rows.append(made);
    else rows.querySelector("tbody").append(...made.querySelectorAll("tbody tr"));
    start += part.items.length;
    more.hidden = start >= part.total;
  }
  await load();
}

export async function searched(main, { facts, query }) {
  const text = query.get("q") ?? "";
  const found = await get("search", { q: text });
  const shares = { title: "Share of its rows", show: (item) => percent(item.weight) };
  const parts = [
    ["number", "By number", null],
    ["label", "By label", null],
    ["token", `Active on the token “${text}”`, shares],
    ["promoted", `Promote the token “${text}”`, { title: "Logit", show: (item) => even(item.weight) }],
  ].filter(([kind]) => found[kind].length);
  main.append(h("h1", {}, text ? `Search: ${text}` : "Search"));
  for (const [kind, title, more] of parts) {
    const all = h("button", { type: "button" }, `Show all ${whole(found[kind].length)}`);
    const made = section(`${title} · ${whole(found[kind].length)}`, table(found[kind].slice(0, FIRST), more), found[kind].length > FIRST ? all : null);
    all.addEventListener("click", () => {
      made.querySelector("table").replaceWith(table(found[kind], more));
      all.remove();
    });
    main.append(made);
  }
  if (!parts.length) main.append(h("p.empty", {}, "No feature has this number, label or token.", facts.model ? [" ", link(`/text?t=${encodeURIComponent(text)}`, "Read it as a text"), "."] : null));
}
