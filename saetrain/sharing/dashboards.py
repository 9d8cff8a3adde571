"""SAEDashboard's batch files, which Neuronpedia imports too: ``batch-N.json``, 128 latents each.

Keys are those of `sae_dashboard.neuronpedia.neuronpedia_dashboard` 0.8.  Floats have four significant digits.  A dead
latent is not in its batch; ``skipped_indexes.json`` lists it.  Correlated neurons and features are left empty.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saetrain.sharing.naming import Names, window_of
from saetrain.sharing.sheet import Sheet, short, shorts

EMPTY = [
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "correlated_features_indices",
    "correlated_features_l1",
    "correlated_features_pearson",
    "decoder_weights_dist",
    "vector",
]
ALIGNED = 3
Row = NDArray[np.float32] | None  # a decoder row [d], or None where the dictionary is not at hand


def batch(sheets: list[tuple[Sheet, Row]], names: Names) -> dict[str, Any]:
    """The content of a batch file, of live latents and their decoder rows."""
    found = {"model_id": names.model, "layer": names.layer, "sae_set": names.set}
    features = [feature(sheet, row, names) for sheet, row in sheets]
    return found | {"sae_id_suffix": names.suffix or None, "features": features}


def feature(sheet: Sheet, row: Row, names: Names) -> dict[str, Any]:
    found = sheet.feature
    return {
        "feature_index": found.index,
        **common(sheet, row),
        "n_prompts_total": found.features.facts["documents"],
        "n_tokens_in_prompt": window_of(found.features.facts),
        "dataset": names.dataset,
        "activations": [activation for activation, _ in activations(sheet)],
    }


def common(sheet: Sheet, row: Row) -> dict[str, Any]:
    """The keys that batch files and Neuronpedia's table share."""
    found = sheet.feature
    (neg_str, neg_values), (pos_str, pos_values) = sheet.logits("bottom"), sheet.logits("top")
    edges, counts = sheet.bars
    centres, heights = sheet.logit_bars()
    row = np.zeros(0, np.float32) if row is None else row
    aligned = np.argsort(-row, kind="stable")[:ALIGNED]
    return {
        "neuron_alignment_indices": aligned.tolist(),
        "neuron_alignment_values": shorts(row[aligned]),
        "neuron_alignment_l1": shorts(abs(row[aligned]) / max(float(abs(row).sum()), 1e-30)),
        **{name: [] for name in EMPTY},
        "neg_str": neg_str,
        "neg_values": neg_values,
        "pos_str": pos_str,
        "pos_values": pos_values,
        "frac_nonzero": short(found.density.value),
        "freq_hist_data_bar_values": shorts((edges[1:] + edges[:-1]) / 2),
        "freq_hist_data_bar_heights": counts.tolist(),
        "logits_hist_data_bar_heights": heights,
        "logits_hist_data_bar_values": centres,
    }


def activations(sheet: Sheet) -> list[tuple[dict[str, Any], int]]:
    """Groups of examples, and the row of each: the top ones, and those of each interval, the highest interval first."""
    found = sheet.feature
    groups = [("top", -1.0, short(found.max), -1.0)]
    for kind, low, high in sheet.intervals:
        inside = sheet.below(high) - sheet.below(low)
        groups.append((kind, short(low), short(high), short(inside / found.features.rows)))
    return [
        (
            {
                "bin_min": low,
                "bin_max": high,
                "bin_contains": contains,
                "tokens": shown.tokens,
                "values": shown.values,
                "qualifying_token_index": shown.at,
            },
            shown.row,
        )
        for kind, low, high, contains in groups
        for shown in sheet.examples(kind)
    ]


def skipped(dead: list[int], names: Names) -> dict[str, Any]:
    """The content of skipped_indexes.json."""
    found = {"model_id": names.model, "layer": str(names.layer), "sae_set": names.set, "log_sparsity": 0}
    return found | {"skipped_indexes": dead}
