// The metrics of the run that trained the dictionary.

import { get } from "/static/api.js";
import { curve } from "/static/charts.js";
import { h, section, short, tile, whole } from "/static/dom.js";

const THEMES = {
  "On held-out rows": ["eval_fvu", "eval_fvu_median", "eval_l0", "eval_dead", "eval_dense"],
  Training: ["loss", "fvu", "l0", "dead", "reconstruction", "sparsity", "aux", "lr"],
  Weights: ["gradient_norm.all", "update_norm.W_enc", "update_norm.W_dec", "decoder_cosine_mean", "encoder_cosine", "decoder_norm", "threshold"],
  Machine: ["tokens_per_s", "mfu", "loader_wait", "document_entropy"],
};

const NAMES = {
  eval_fvu: "FVU, held-out rows",
  eval_fvu_median: "FVU of the median held-out row",
  eval_l0: "Active features a row (L0), held-out rows",
  eval_dead: "Dead features, share, held-out rows",
  eval_dense: "Dense features, share, held-out rows",
  loss: "Loss",
  fvu: "FVU of the batch",
  l0: "Active features a row (L0)",
  dead: "Dead features, share",
  reconstruction: "Loss: reconstruction",
  sparsity: "Loss: sparsity",
  aux: "Loss: dead features (AuxK)",
  lr: "Learning rate",
  "gradient_norm.all": "Gradient norm",
  "update_norm.W_enc": "Update norm, encoder",
  "update_norm.W_dec": "Update norm, decoder",
  decoder_cosine_mean: "Largest cosine of decoder rows, mean",
  encoder_cosine: "Cosine of encoder and decoder rows",
  decoder_norm: "Norm of decoder rows, mean",
  threshold: "Activation threshold, mean",
  tokens_per_s: "Tokens a second",
  mfu: "Share of the machine’s matrix speed (MFU)",
  loader_wait: "Share of time waiting for rows",
  document_entropy: "Document entropy of batches",
};

// What the model loses through the dictionary, where it was evaluated.
function evaluated(found) {
  const interval = ({ value, low, high }) => [h("b", {}, short(value, 4)), h("small", {}, ` ${short(low, 4)} to ${short(high, 4)}`)];
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
  const { run: folder, lines, evaluation } = await get("metrics");
  main.append(h("p.note", {}, folder));
  const last = Object.assign({}, ...lines);
  main.append(
    h(
      "div.tiles",
      {},
      tile(whole(last.step), "steps"),
      tile(whole(last.tokens), "training tokens"),
      tile(short(last.eval_fvu), "FVU, held-out rows"),
      tile(short(last.eval_l0), "active features a row"),
      evaluation ? tile(short(evaluation.loss_recovered.zero.value, 4), "loss recovered") : null,
    ),
  );
  if (evaluation) main.append(h("div.half", {}, evaluated(evaluation)));
  for (const [theme, names] of Object.entries(THEMES)) {
    const drawn = names
      .map((name) => [name, lines.filter((line) => line[name] !== undefined && line[name] !== null), lines.findLast((line) => name in line)])
      .filter(([, held]) => held.length > 1)
      .map(([name, held, last]) => {
        const points = held.map((line) => (line[`${name}_low`] === undefined ? [line.step, line[name]] : [line.step, line[name], line[`${name}_low`], line[`${name}_high`]]));
        return h("section.card", {}, h("h2.split", {}, NAMES[name] ?? name, h("b", {}, last[name] === null ? "left out" : short(last[name]))), curve({ points, title: NAMES[name] ?? name }));
      });
    if (drawn.length) main.append(h("h2", {}, theme), h("div.grid", {}, drawn));
  }
}
