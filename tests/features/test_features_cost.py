"""Plans that say how long a run takes, and runs without neighbours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import saetrain
from actshuffle.errors import RequestError
from benchmarks.sae.forecasting import fit
from saetrain.cli import main
from saetrain.errors import ConfigError, DataError
from saetrain.features.codes import grouped
from saetrain.features.forecast import QUANTITIES, quantities, read_units, seconds
from saetrain.features.pipeline import plan_features
from support.features import TINY, content, dictionary, store


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("case")
    return dictionary(folder / "d", "topk"), store(folder / "acts.zarr", 200)


def test_unit_costs_are_found_again(case):
    plan = plan_features(*case, **TINY)
    sizes = [(1 << 12, 1 << 10), (1 << 14, 1 << 10), (1 << 12, 1 << 13), (1 << 15, 1 << 12)]
    plans = [replace(plan, rows=n, latents=f, pair_rows=n // 2, chunk=max(f // 16, 256)) for n, f in sizes]
    known = {step: [10.0**-i for i in range(6, 6 + len(names))] for step, names in QUANTITIES.items()}
    measured = [(p, seconds(p, float(p.k * p.rows), known)) for p in plans]
    found = fit(measured)
    assert set(found) == set(measured[0][1])
    for step, units in found.items():
        assert units == pytest.approx(known[step], rel=1e-6), step
    noisy = [(p, {step: s * (2.0 if p is plans[0] else 1.0) for step, s in took.items()}) for p, took in measured]
    assert fit(noisy)["encode"] != pytest.approx(known["encode"], rel=1e-2)  # control


def test_quantities(case):
    plan = plan_features(*case, shards=5, **TINY)
    found = quantities(plan, 1000.0)
    assert found["products"] == 200 * 40 * 12
    assert found["offered"] == 5000  # the shards' candidates
    assert found["near"] == 40 * 40 * 12
    assert found["again"] == plan.chunks * 40 * 12
    without = quantities(replace(plan, near=0), 1000.0)
    assert without["near"] == without["again"] == 0


def test_a_plan_says_the_time(tmp_path, case, capsys):
    units = {step: [1e-3] * len(names) for step, names in QUANTITIES.items()}
    (tmp_path / "costs.json").write_text(json.dumps({"units": units}))
    words = ["features", *map(str, case), str(tmp_path / "out"), "--plan", "--costs", str(tmp_path / "costs.json")]
    assert main([*words, "--json"]) == 0
    one = json.loads(capsys.readouterr().out)["seconds"]
    assert main([*words, "--json", "--workers", "2"]) == 0
    two = json.loads(capsys.readouterr().out)["seconds"]
    assert one["product"] == pytest.approx((40 * 40 * 12 + 40 * 12) / 1000)  # one chunk
    assert sum(two.values()) == pytest.approx(sum(one.values()) / 2)
    assert main(words) == 0
    assert "time " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main([words[0], *words[1:4], *words[5:]]) == 2  # without --plan
    for text in ("{}", '{"units": {"encode": [1]}}', "no"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match="no unit costs"):
            read_units(tmp_path / "bad.json")


def test_a_part_of_a_block_holds_its_own_entries_alone():
    """Parts of all blocks are in memory together: with views of the wholes, it would grow with the rows."""
    n = 1000
    latent, row, value = np.arange(n) % 50, np.arange(n), np.ones(n, np.float32)
    whole = grouped(latent, row, value, value, 50)
    part = whole.part(10, 12)
    assert part.arrays[0][:].base is not None  # control: so is a view found out
    assert all(array.base is None for array in [part.counts, *part.arrays])
    due = [array[200:240] for array in whole.arrays]
    assert all(np.array_equal(found, expected) for found, expected in zip(part.arrays, due, strict=True))


def test_a_run_without_neighbours_has_all_else(tmp_path, case):
    settings: dict[str, Any] = {"fsync": False, **TINY}
    saetrain.build_features(*case, tmp_path / "with", **settings)
    saetrain.build_features(*case, tmp_path / "out", near=0, **settings)
    due, found = content(tmp_path / "with"), content(tmp_path / "out")
    assert {name for name in due if not name.startswith(("near", "hard", "zarr.json"))} == set(found) - {"zarr.json"}
    assert all(found[name] == due[name] for name in found if name != "zarr.json")
    features = saetrain.open_features(tmp_path / "out")
    assert features[5].neighbours is None
    assert features[5].top(1)[0].value == np.nanmax(features.array("stat/max")[5])
    with pytest.raises(RequestError, match="no examples of kind 'hard'"):
        features[5].examples("hard")
    with pytest.raises(ConfigError, match="near must be 0 or more"):
        saetrain.build_features(*case, tmp_path / "other", near=-1, **settings)
