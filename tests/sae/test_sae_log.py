"""Trackers beside metrics.jsonl: TensorBoard's files, Weights & Biases offline, and libraries that are not there."""

from __future__ import annotations

import importlib
import json
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
    for at, line in ((0, LINE), (3, LINE | {"step": 6, "loss": 0.25})):  # the run begins, and is resumed
        written = Log(tmp_path, at, "wandb", {"k": 4})
        assert written.trackers[0].run.config["k"] == 4  # type: ignore[attr-defined]
        written.write(line)
        written.close()
    importlib.import_module("wandb").teardown()  # only then is all on the disk
    found = {path: history(path) for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")}
    assert len({path.name for path in found}) == 1, "one id for both"
    numbers = {3: {"loss": 0.5, "gradient_norm/all": 2.0}, 6: {"loss": 0.25, "gradient_norm/all": 2.0}}
    assert {step: values for held in found.values() for step, values in held.items()} == numbers
    assert [line["step"] for line in read_log(tmp_path)] == [3, 6]


def history(path: Path) -> dict[int, dict[str, float]]:
    """The numbers of each step in an offline run: a log as LevelDB's, whose parts of records never cross 32 KiB."""
    records = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, at, whole = path.read_bytes(), 7, b""
    found: dict[int, dict[str, float]] = {}
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            record = records.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                step = int(json.loads(items["_step"]))
                found[step] = {name: json.loads(text) for name, text in items.items() if not name.startswith("_")}
    return found


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
