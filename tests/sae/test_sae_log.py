"""Trackers beside metrics.jsonl: TensorBoard's files, Weights & Biases offline, and libraries that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from saetrain.errors import ConfigError
from saetrain.training import log
from saetrain.training.log import Log, read_log
from saetrain.training.train import fit
from support.sae import MemorySource, Planted, one_rank, small

LINE = {"step": 3, "loss": 0.5, "gradient_norm.all": 2.0, "density": [1, 2], "diverged": "no"}


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = Log(tmp_path, 0, "tensorboard")
    written.write(LINE)
    written.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert {name: found.Scalars(name)[0].value for name in found.Tags()["scalars"]} == {
        "loss": 0.5,
        "gradient_norm/all": 2.0,
    }


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    written = Log(tmp_path, 0, "wandb", {"k": 4})
    assert written.trackers[0].run.config["k"] == 4  # type: ignore[attr-defined]
    written.write(LINE)
    assert dict(written.trackers[0].run.summary)["gradient_norm/all"] == 2.0  # type: ignore[attr-defined]
    written.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert read_log(tmp_path) == [LINE]


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Planted.make(256, 16, 24)
    monkeypatch.setattr(log, "find_spec", lambda name: None)
    with one_rank() as mesh, pytest.raises(ConfigError, match="log wandb needs the package wandb"):
        fit(MemorySource(data.rows, data.documents), {tmp_path / "run": small("topk", log="wandb")}, mesh)
    assert not (tmp_path / "run").exists()
    assert log.wanted("auto") == log.wanted("none") == []
    monkeypatch.setattr(log, "find_spec", lambda name: object())
    assert log.wanted("auto") == ["tensorboard"]
    assert log.wanted("wandb,tensorboard") == ["wandb", "tensorboard"]
