"""Reading one latent of a million: a few small range reads, and few milliseconds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import saetrain
from actshuffle.jobs import FolderJob, run_in_folder
from actshuffle.testing import Faults
from saetrain.describing.slots import Slots
from saetrain.features import layout

LATENTS, CHUNK, SHOWN = 1_000_000, 16_384, 777_777
ARRAYS = layout.columns(Slots(), 10**9, True)


def publish(job: FolderJob) -> dict[str, object]:
    """A result of a million latents, with the bytes of one chunk; other chunks are holes in files."""
    number = SHOWN // CHUNK
    arrays = layout.empty(ARRAYS, CHUNK)
    for name, array in arrays.items():
        array[SHOWN % CHUNK] = 7 if name != "stat/max" else 8.5
    layout.put_chunk(job, arrays, number, CHUNK)
    facts = {
        "rows": 10**9,
        "latents": LATENTS,
        "alive": LATENTS,
        "kinds": [[kind, *ends] for kind, ends in Slots().kinds().items()],
        "quantiles": list(layout.QUANTILES),
        "store": "nowhere",
        "identity": "",
        "before": 48,
        "after": 24,
        "document": None,
        "token": None,
    }
    for key, data in layout.metadata(ARRAYS, LATENTS, CHUNK, {"features": facts}):
        job.objects.put(key, data)
    return facts


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("million") / "out"
    run_in_folder("features", out, {}, [], publish=publish, fsync=False)
    return out


def everything(f: Any) -> None:
    for name in ARRAYS:
        f.array(name)
    for kind in f.features.kinds:
        f.examples(kind)


def test_one_latent_of_a_million_is_few_small_reads(million):
    features = saetrain.open_features(million)
    everything(features[SHOWN - 1])  # opens the groups
    with Faults() as faults:
        fresh = saetrain.open_features(million)
        everything(fresh[SHOWN])
    reads = [op for op, _ in faults.log if op.name == "read"]
    assert len(reads) == len(ARRAYS)
    assert fresh[SHOWN].max == 8.5
    assert fresh[SHOWN].count == 7


def test_one_latent_of_a_million_takes_few_milliseconds(million):
    features, spent = saetrain.open_features(million), []
    everything(features[SHOWN])
    for latent in range(SHOWN - 20, SHOWN):
        started = time.process_time()  # of work: a busy machine makes us wait besides
        everything(features[latent])
        spent.append(time.process_time() - started)
    assert min(spent) < 0.03


def test_a_column_of_all_latents_is_one_array(million):
    features = saetrain.open_features(million)
    found = features.array("stat/max", SHOWN - 2, SHOWN + 1)
    assert np.isnan(found[:2]).all()
    assert found[2] == 8.5
    assert len(features) == LATENTS
