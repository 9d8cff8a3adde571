"""The JSON of one feature that attribution-graph pages read: ``features/SCAN/INDEX.json``, circuit-tracer's model.

A dead latent has no file, which such a page expects.
"""

from __future__ import annotations

from typing import Any

from saetrain.sharing.sheet import Sheet, short


def page(sheet: Sheet, scan: str) -> dict[str, Any]:
    """The content of the file of a live latent."""
    found = sheet.feature
    _, counts = sheet.bars
    groups = [("Top Activations", "top")]
    groups += [(f"Subsample Interval {i}", kind) for i, (kind, _, _) in enumerate(sheet.intervals)]
    seen: set[tuple[int, ...]] = set()
    return {
        "index": found.index,
        "transcoder_id": scan,
        "examples_quantiles": [
            {"quantile_name": name, "examples": [_example(shown, seen) for shown in sheet.examples(kind)]}
            for name, kind in groups
        ],
        "top_logits": sheet.logits("top")[0],
        "bottom_logits": sheet.logits("bottom")[0],
        "act_min": short(found.min),
        "act_max": short(found.max),
        "quantile_values": sheet.percentiles,
        "histogram": [float(count) for count in counts],
        "activation_frequency": short(found.density.value),
    }


def _example(shown: Any, seen: set[tuple[int, ...]]) -> dict[str, Any]:
    repeated = bool(shown.around) and shown.around in seen
    seen.add(shown.around)
    return {
        "tokens": shown.tokens,
        "tokens_acts_list": shown.values,
        "train_token_ind": shown.at,
        "is_repeated_datapoint": repeated,
    }
