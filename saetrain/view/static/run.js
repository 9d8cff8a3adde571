// The metrics of the run that trained the dictionary.

import { get } from "/static/api.js";
import { curve } from "/static/charts.js";
import { even, h, percent, section, short, tile, whole } from "/static/dom.js";

// What the model loses through the dictionary, where it was evaluated.
function evaluated(found) {
  const interval = ({ value, low, high }) => [h("b", {}, even(value, 4)), h("small", {}, ` ${even(low, 4)} to ${even(high, 4)}`)];
  const rows = [
    ["Loss recovered, from zero", found.loss_recovered.zero],
    ["Loss recovered, from the mean row", found.loss_recovered.mean],
    ["KL recovered, from zero", found.kl_recovered.zero],
    ["Cross entropy, clean", found.ce.clean],
    ["Cross entropy, through the dictionary", found.ce.sae],
    ["Cross entropy, layer set to zero", found.ce.zero],
    ["Cross entropy, layer set to its mean row", found.ce.mean],
    ["KL to the clean model", found.kl.sae],
    ["FVU on these rows", found.fvu],
  ];
  return section(
    "The model through the dictionary",
    h("table", {}, h("tbody", {}, rows.map(([name, value]) => h("tr", {}, h("td", {}, name), h("td.right", {}, interval(value)))))),
    h("p.note", {}, `${found.model}, layer ${found.layer}${found.step === null ? "" : `, step ${whole(found.step)}`}: ${whole(found.tokens)} predictions in ${whole(found.documents)} documents of ${found.text.join(", ")}. In nats, with 95% intervals over documents.`),
  );
}

export async function run(main, { facts }) {
  main.append(h("h1", {}, "Run"));
  if (!facts.run) {
    main.append(h("p.empty", {}, "The run is not at hand: start the page with ", h("code", {}, "--run RUN"), "."));
    return;
  }
  const { run: folder, last, when, themes, evaluation } = await get("metrics");
  main.append(
    h("p.summary", {}, folder, when && ` · trained ${when.span} · ${when.length} of training`),
    h(
      "div.tiles",
      {},
      tile(whole(last.step), "steps"),
      tile(whole(last.tokens), "training tokens"),
      tile(ranged(last, "eval_fvu", short), "FVU, held-out rows"),
      tile(ranged(last, "eval_l0", short), "active features a row"),
      last.eval_dead === undefined ? null : tile(percent(last.eval_dead), "dead, on held-out rows"),
      evaluation ? tile(short(evaluation.loss_recovered.zero.value, 4), "loss recovered") : null,
    ),
  );
  if (evaluation) main.append(h("div.half", {}, evaluated(evaluation)));
  for (const { theme, panels, constant } of themes) {
    const drawn = panels.map((panel) => h("section.card", {}, h("h3.split", {}, panel.title, panel.x === "step" ? h("b", {}, typeof panel.end === "number" ? short(panel.end) : panel.end) : null), curve(panel)));
    main.append(h("h2.theme", {}, theme), h("div.grid.curves", {}, drawn), constant.length ? h("p.note", {}, `Constant, and not drawn: ${constant.map((one) => `${one.title} ${short(one.value)}`).join("; ")}.`) : "");
  }
}

function ranged(last, name, show) {
  const [low, high] = [last[`${name}_low`], last[`${name}_high`]];
  return low === undefined || low === high ? show(last[name]) : [show(last[name]), h("small", {}, ` ± ${short((high - low) / 2, 2)}`)];
}
