"""Neuronpedia's bulk import: tables as lines of JSON, those of latents and activations compressed, batch by batch.

::

    MODEL/SOURCE/release.jsonl model.jsonl sourceset.jsonl source.jsonl
                 features/batch-N.jsonl.gz    activations/batch-N.jsonl.gz

The importer takes the columns of a table from the first line of each file, so that all lines have the same keys, and
fills absent columns with defaults; those that only a server can know (createdAt, owners) are absent.  `layer` is the
source.  Nearest features by decoder cosine fill topkCosSimIndices and topkCosSimValues.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from saetrain.sharing.dashboards import Row, activations, common
from saetrain.sharing.naming import Names, window_of
from saetrain.sharing.sheet import Sheet, short, shorts

STRENGTH = 10  # for steering, where no vector says more


def lines(rows: Iterable[dict[str, Any]]) -> bytes:
    """Lines of JSON; the zero character, which the database does not hold, is left out of texts."""
    return "".join(json.dumps(row).replace("\\u0000", "") + "\n" for row in rows).encode()


def packed(rows: Iterable[dict[str, Any]]) -> bytes:
    """The same, compressed; the same rows give the same bytes."""
    return gzip.compress(lines(rows), mtime=0)


def tables(names: Names, facts: dict[str, Any], width: int) -> dict[str, dict[str, Any]]:
    """The one line of each small table, by its file."""
    creator = {"creatorName": names.creator, "creatorId": names.creator}
    release: dict[str, Any] = {
        "name": names.set,
        "description": names.set,
        **creator,
        "visibility": "PUBLIC",
        "isNewUi": True,
        "featured": False,
        "descriptionShort": names.set,
        "urls": [],
        "creatorEmail": None,
        "creatorNameShort": names.creator,
        "defaultSourceSetName": names.set,
        "defaultSourceId": names.source,
        "defaultUmapSourceIds": [],
    }
    model = {
        "id": names.model,
        "instruct": False,
        "creatorId": names.creator,
        "displayNameShort": names.model,
        "displayName": names.model,
        "tlensId": None,
        "dimension": width,
        "visibility": "PUBLIC",
        "defaultSourceSetName": names.set,
        "defaultSourceId": names.source,
        "inferenceEnabled": False,
        "layers": names.layer + 1,
        "neuronsPerLayer": 0,
        "owner": names.creator,
        "website": None,
    }
    sourceset = {
        "modelId": names.model,
        "name": names.set,
        "creatorId": names.creator,
        "hasDashboards": True,
        "visibility": "PRIVATE",
        "description": names.set,
        "type": "SAE",
        "creatorName": names.creator,
        "urls": [],
        "creatorEmail": None,
        "releaseName": names.set,
        "defaultOfModelId": None,
        "defaultRange": 1,
        "defaultShowBreaks": True,
        "showDfa": False,
        "showCorrelated": False,
        "showHeadAttribution": False,
        "showUmap": False,
    }
    source = {
        "id": names.source,
        "modelId": names.model,
        "setName": names.set,
        "creatorId": names.creator,
        "hasDashboards": True,
        "inferenceEnabled": False,
        "inferenceHosts": [],
        "saelensConfig": None,
        "saelensRelease": None,
        "saelensSaeId": None,
        "hfRepoId": None,
        "hfFolderId": None,
        "visibility": "PRIVATE",
        "defaultOfModelId": None,
        "hasUmap": False,
        "hasUmapLogSparsity": False,
        "hasUmapClusters": False,
        "num_prompts": facts["documents"],
        "num_tokens_in_prompt": window_of(facts),
        "dataset": names.dataset,
        "notes": None,
    }
    return {"release.jsonl": release, "model.jsonl": model, "sourceset.jsonl": sourceset, "source.jsonl": source}


def neuron(sheet: Sheet, row: Row, names: Names) -> dict[str, Any]:
    """The line of a latent, live or dead."""
    found = sheet.feature
    if found.is_dead:
        shared: dict[str, Any] = {name: [] for name in _COMMON} | {"frac_nonzero": 0.0}
        near: list[Any] = []
    else:
        shared, near = common(sheet, row), found.neighbours or []
    return {
        "modelId": names.model,
        "layer": names.source,
        "index": str(found.index),
        "creatorId": names.creator,
        "maxActApprox": 0.0 if found.is_dead else short(found.max),
        "hasVector": False,
        "vectorLabel": None,
        "vectorDefaultSteerStrength": STRENGTH,
        "hookName": names.hook_name,
        "topkCosSimIndices": [n.latent for n in near],
        "topkCosSimValues": shorts(n.cosine for n in near),
        "sourceSetName": names.set,
        **shared,
    }


_COMMON = [
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "correlated_features_indices",
    "correlated_features_l1",
    "correlated_features_pearson",
    "decoder_weights_dist",
    "vector",
    "neg_str",
    "neg_values",
    "pos_str",
    "pos_values",
    "freq_hist_data_bar_values",
    "freq_hist_data_bar_heights",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
]


def _identity(names: Names, latent: int, number: int) -> str:
    """25 characters that are the same in every run."""
    return "c" + hashlib.sha256(f"{names.model} {names.source} {latent} {number}".encode()).hexdigest()[:24]


def activation_lines(sheet: Sheet, names: Names) -> list[dict[str, Any]]:
    """The lines of a latent's examples."""
    found, rows = sheet.feature, []
    for number, (shown, row) in enumerate([] if found.is_dead else activations(sheet)):
        values = shown["values"]
        most = int(np.argmax(values))
        rows.append(
            {
                "id": _identity(names, found.index, number),
                "tokens": shown["tokens"],
                "index": str(found.index),
                "layer": names.source,
                "modelId": names.model,
                "maxValue": values[most],
                "maxValueTokenIndex": most,
                "minValue": min(values),
                "values": values,
                "creatorId": names.creator,
                "dataSource": names.dataset,
                "dataIndex": str(row),
                "dfaValues": [],
                "dfaTargetIndex": None,
                "dfaMaxValue": None,
                "lossValues": [],
                "logitContributions": None,
                "binMin": shown["bin_min"],
                "binMax": shown["bin_max"],
                "binContains": shown["bin_contains"],
                "qualifyingTokenIndex": shown["qualifying_token_index"],
                "zIndices": [],
                "zValues": [],
            }
        )
    return rows
