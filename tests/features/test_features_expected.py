"""Expected attributions equal the means over dense activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actshuffle
import saetrain
from actshuffle.errors import RequestError
from saetrain.errors import DataError
from support.features import TINY, dense, dictionary, store

ROWS = 300


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("built")
    acts, found = store(folder / "acts.zarr", ROWS), {}
    rows = actshuffle.open_dataset(acts).read("x", 0, ROWS)
    for name, kind, seed in (("a", "topk", 5), ("b", "jumprelu", 6)):
        where = dictionary(folder / name, kind, seed=seed)
        saetrain.build_features(where, acts, folder / f"{name}.out", keep_codes=True, fsync=False, **TINY)
        found[name] = saetrain.open_features(folder / f"{name}.out")
        found[f"{name} dense"] = dense(where, rows).astype(np.float64)
    saetrain.interactions(folder / "a", folder / "b", folder / "w", k=4, fsync=False)
    return found | {"w": saetrain.open_interactions(folder / "w"), "folder": folder}


def due(built: dict[str, Any], i: int, j: int, weight: float) -> float:
    active = built["a dense"][:, i] > 0
    return float(built["b dense"][active, j].mean() * weight) if active.any() else 0.0


def test_equals_the_mean_over_dense_activations(built):
    seen = 0
    for i in range(len(built["a"])):
        line = built["w"].rows[i]
        found = saetrain.expected_attribution(line, built["a"], built["b"])
        assert set(found.latent) == {*line.top_index, *line.bottom_index}
        assert (np.diff(found.value) <= 0).all()
        for j, weight, together, value in zip(*found, strict=True):
            assert value == pytest.approx(due(built, i, j, weight), rel=1e-6, abs=1e-12)
            both = (built["a dense"][:, i] > 0) & (built["b dense"][:, j] > 0)
            assert together == both.sum()
            seen += bool(together)
    assert seen > 50


def test_control_means_over_all_rows_are_others(built):
    found = saetrain.expected_attribution(built["w"].rows[1], built["a"], built["b"])
    everywhere = [built["b dense"][:, j].mean() * weight for j, weight in zip(found.latent, found.weight, strict=True)]
    assert not np.allclose(found.value, everywhere, rtol=1e-2)


def test_other_stores_and_results_without_codes_are_refused(built, tmp_path):
    other = store(tmp_path / "acts.zarr", 60, seed=9)
    saetrain.build_features(built["folder"] / "b", other, tmp_path / "out", fsync=False, **TINY)
    line, a = built["w"].rows[1], built["a"]
    with pytest.raises(DataError, match="describe other stores"):
        saetrain.expected_attribution(line, a, saetrain.open_features(tmp_path / "out"))
    saetrain.build_features(
        built["folder"] / "b", built["folder"] / "acts.zarr", tmp_path / "plain", fsync=False, **TINY
    )
    with pytest.raises(RequestError, match="keeps no codes"):
        saetrain.expected_attribution(line, a, saetrain.open_features(tmp_path / "plain"))
    few: Path = dictionary(tmp_path / "few", "standard", latents=6)
    saetrain.build_features(few, built["folder"] / "acts.zarr", tmp_path / "six", keep_codes=True, fsync=False, **TINY)
    with pytest.raises(DataError, match="is none of 40 latents by 6"):
        saetrain.expected_attribution(line, a, saetrain.open_features(tmp_path / "six"))
