// The metrics of the run that trained the dictionary.

import { get } from "/static/api.js";
import { curve } from "/static/charts.js";
import { h, section, short } from "/static/dom.js";

const THEMES = {
  "On held-out rows": ["eval_fvu", "eval_fvu_median", "eval_l0", "eval_dead", "eval_dense"],
  Training: ["loss", "fvu", "l0", "dead", "reconstruction", "sparsity", "aux", "lr"],
  Weights: ["gradient_norm.all", "update_norm.W_enc", "update_norm.W_dec", "decoder_cosine_mean", "encoder_cosine", "decoder_norm", "threshold"],
  Machine: ["tokens_per_s", "mfu", "loader_wait", "document_entropy"],
};

export async function run(main, { facts }) {
  main.append(h("h1", {}, "Run"));
  if (!facts.run) {
    main.append(h("p.empty", {}, "The run is not at hand: start the page with ", h("code", {}, "--run RUN"), "."));
    return;
  }
  const { run: folder, lines } = await get("metrics");
  main.append(h("p.note", {}, folder));
  for (const [theme, names] of Object.entries(THEMES)) {
    const drawn = names
      .map((name) => [name, lines.filter((line) => line[name] !== undefined && line[name] !== null)])
      .filter(([, held]) => held.length > 1)
      .map(([name, held]) => {
        const points = held.map((line) => (line[`${name}_low`] === undefined ? [line.step, line[name]] : [line.step, line[name], line[`${name}_low`], line[`${name}_high`]]));
        return section(`${name.replaceAll("_", " ")}: ${short(held[held.length - 1][name])}`, curve({ points, title: name }));
      });
    if (drawn.length) main.append(h("h2", {}, theme), h("div.grid", {}, drawn));
  }
}
