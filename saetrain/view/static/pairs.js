// Interactions: the product of two dictionaries, one row or column at a time.

import { get } from "/static/api.js";
import { bars } from "/static/charts.js";
import { chip, even, h, link, percent, section, short, tile, whole } from "/static/dom.js";

const ORDERS = { number: "number", kept: "kept share", energy: "energy", sum: "sum" };
const OTHER = { rows: "columns", columns: "rows" };
const one = (half) => half.slice(0, -1);
const tokensOf = (item) => item.tokens.map(chip);

function address(product, half, more = {}) {
  return `/interactions?${new URLSearchParams({ product, half, ...more })}`;
}

// The number of a latent: a line of the product, and a feature's page where the page is about its dictionary.
function name(facts, product, half, item) {
  const own = facts.interactions[product].here.includes(half);
  return h(
    "span.who",
    {},
    link(address(product, half, { line: item.id }), h("span.number", {}, whole(item.id))),
    " ",
    own ? link(`/feature/${item.id}`, h("span.small.chip", { "aria-label": `Feature ${item.id}` }, "feature")) : null,
  );
}

// Entries as bars to the right (positive) or left (negative) of a middle line.
function entries(facts, product, half, list, most) {
  return h(
    "ul.near.entries",
    {},
    list.map((item) =>
      h(
        "li",
        {},
        name(facts, product, half, item),
        h("span.tokens", {}, tokensOf(item)),
        h("span.signed", { "--a": (Math.abs(item.value) / most).toFixed(3), "--s": item.value < 0 ? 1 : 0, "aria-hidden": "true" }),
        h("span.value", {}, even(item.value)),
      ),
    ),
  );
}

export async function interactions(main, { facts, query, go }) {
  main.append(h("h1", {}, "Interactions"));
  if (!facts.interactions.length) {
    main.append(h("p.empty", {}, "This needs a product: start the page with ", h("code", {}, "--interactions OUT"), ", a result of ", h("code", {}, "saetrain interactions"), "."));
    return;
  }
  const product = Math.min(Number(query.get("product") ?? 0) || 0, facts.interactions.length - 1);
  const about = facts.interactions[product];
  const half = query.get("half") === "columns" ? "columns" : "rows";
  const sides = h(
    "div.tabs",
    { role: "tablist", "aria-label": "Rows or columns" },
    ["rows", "columns"].map((which) =>
      h("button", { type: "button", role: "tab", "aria-selected": String(which === half), onclick: () => go(address(product, which)) }, `${whole(about.halves[which].count)} ${which}: ${about.halves[which].part} of ${about.halves[which].of.split("/").slice(-3).join("/")}`),
    ),
  );
  const choice =
    facts.interactions.length > 1
      ? h("label", {}, "Product ", h("select", { onchange: (event) => go(address(event.target.value, half)) }, facts.interactions.map((found, i) => h("option", { value: i, selected: i === product }, `${found.name} (${found.product})`))))
      : h("span", {}, about.name);
  main.append(
    h("p.summary", {}, choice, ` · ${about.product} product, the ${whole(about.k)} largest`, " entries of each row and column kept: ", h("b", {}, percent(about.halves.rows.kept)), " of the rows’ energy and ", h("b", {}, percent(about.halves.columns.kept)), " of the columns’."),
    sides,
  );
  if (query.has("line")) await line(main, { facts, product, half, about, number: query.get("line"), go });
  else await list(main, { facts, product, half, query, go });
}

async function list(main, { facts, product, half, query, go }) {
  const order = query.get("order") ?? "number";
  const falling = query.get("falling") === "1";
  const set = (more) => go(address(product, half, { order, ...(falling ? { falling: 1 } : {}), ...more }));
  const rows = h("tbody");
  const more = h("button", { type: "button", onclick: () => load() }, "Show more");
  const shape = h("div.shape");
  main.append(
    shape,
    h(
      "section.card",
      {},
      h(
        "div.bar",
        {},
        h("h2", {}, `All ${half}`),
        h("span.grow"),
        h("span.labelled", {}, h("label", { for: "order" }, "Order by"), h("select", { id: "order", onchange: (event) => set({ order: event.target.value }) }, Object.entries(ORDERS).map(([value, text]) => h("option", { value, selected: value === order }, text))), h("button.quiet", { type: "button", "aria-pressed": String(falling), onclick: () => go(address(product, half, { order, ...(falling ? {} : { falling: 1 }) })) }, falling ? "↓ falling" : "↑ rising")),
      ),
      h("table.list", {}, h("thead", {}, h("tr", {}, h("th", {}, "Latent"), h("th", {}, "Tokens it is most often active on"), h("th.right", {}, "Kept"), h("th.right", {}, "Energy"), h("th.right.wide", {}, "Sum"))), rows),
      more,
    ),
  );
  let start = 0;
  async function load() {
    const part = await get(`interactions/${product}/${half}`, { order, falling: falling ? 1 : 0, start });
    if (part.histogram) shape.replaceChildren(h("div.grid", {}, section("Share of the energy that is kept", bars({ ...part.histogram, title: "Share of the energy that is kept", width: 280, height: 64 }))));
    for (const item of part.items) {
      rows.append(h("tr", {}, h("td", {}, name(facts, product, half, item)), h("td", {}, tokensOf(item)), h("td.right", {}, percent(item.kept)), h("td.right", {}, even(item.energy)), h("td.right.wide", {}, even(item.sum))));
    }
    start += part.items.length;
    more.hidden = start >= part.total;
  }
  await load();
}

async function line(main, { facts, product, half, about, number, go }) {
  const found = await get(`interactions/${product}/${half}/${number}`);
  const other = OTHER[half];
  const most = Math.max(...[...found.top, ...found.bottom].map((item) => Math.abs(item.value)), 1e-30);
  const last = about.halves[half].count - 1;
  const step = (to, sign, title) => h("button.quiet", { type: "button", disabled: to < 0 || to > last, "aria-label": title, onclick: () => go(address(product, half, { line: to })) }, sign);
  main.append(
    h("div.heading", {}, step(found.id - 1, "‹", `Previous ${one(half)}`), h("h2.big", {}, `${half === "rows" ? "Row" : "Column"} ${whole(found.id)}`), step(found.id + 1, "›", `Next ${one(half)}`), h("span.tokens", {}, tokensOf(found)), about.here.includes(half) ? link(`/feature/${found.id}`, h("span.button", {}, "Feature")) : null),
    h(
      "div.tiles",
      {},
      tile(percent(found.kept), "of its energy kept"),
      tile(short(found.energy), "energy of all entries"),
      tile(short(found.sum), "sum of all entries"),
      found.over.map(([threshold, count]) => tile(whole(count), `above ${short(threshold)} in size`)),
      tile(`${short(found.rest.mean)} ± ${short(found.rest.std)}`, `the other ${whole(found.rest.count)} entries`),
    ),
    h(
      "div.halves",
      {},
      section(`Largest ${other}`, entries(facts, product, other, found.top, most)),
      found.bottom.length ? section(`Smallest ${other}`, entries(facts, product, other, found.bottom, most)) : null,
    ),
  );
}

// For a feature's page: the largest entries of its row or column in each product about its dictionary.
export async function related(facts, id) {
  const parts = [];
  for (const [product, about] of facts.interactions.entries()) {
    for (const half of about.here) {
      const found = await get(`interactions/${product}/${half}/${id}`).catch(() => null);
      if (!found) continue;
      const list = [...found.top.slice(0, 4), ...found.bottom.slice(0, 2)];
      const most = Math.max(...list.map((item) => Math.abs(item.value)), 1e-30);
      parts.push(
        section(
          `Interactions: ${about.name}, as a ${one(half)}`,
          entries(facts, product, OTHER[half], list, most),
          h("p.note", {}, link(address(product, half, { line: id }), `All that is kept of its ${one(half)}`), `: ${percent(found.kept)} of its energy. ${about.product} product.`),
        ),
      );
    }
  }
  return parts;
}
