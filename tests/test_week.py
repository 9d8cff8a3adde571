"""A researcher's week, as commands: collect, filter, split, shuffle, verify, grow, trace, load, train, export, and read
the result with numpy alone.  Between the steps, commands that are refused leave every file as it is."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import actshuffle
import saetrain
from actshuffle.cli.app import main as actshuffle_main
from saetrain.cli.app import command_line as saetrain_main
from support.causal import WORDS, saved

LAYER = "layer_2"
FIT = "--field layer_2 --k 8 --d-sae 64 --batch-size 128 --steps 8 --eval-every 8 --no-report --device cpu"
pytestmark = pytest.mark.filterwarnings("ignore")


def snapshot() -> dict[str, tuple[int, bytes]]:
    """Every file and folder here, with its time of change and its bytes."""
    found = sorted(Path().rglob("*"))
    return {str(p): (p.stat().st_mtime_ns, b"" if p.is_dir() else p.read_bytes()) for p in found}


def invoke(command: str) -> Any:
    program, *arguments = command.split()
    main: Any = {"actshuffle": actshuffle_main, "saetrain": saetrain_main}[program]
    return CliRunner().invoke(main, arguments, prog_name=program)


def done(command: str) -> str:
    """Run a command that must succeed."""
    found = invoke(command)
    assert found.exit_code == 0, f"{command}\n{found.output}"
    return str(found.stdout)


def refused(command: str, said: str) -> None:
    """Run a command that must be refused, say why, and change nothing."""
    before = snapshot()
    found = invoke(command)
    assert found.exit_code == 2, f"{command}\n{found.output}"
    assert said in found.output, found.output
    after = snapshot()
    changed = {key for key in {*before, *after} if before.get(key) != after.get(key)}
    held = {key for key in before if key.endswith("/.lock")}  # of a run: says who looked at it last
    assert changed - held == set(), command


@pytest.fixture(scope="module")
def week(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("week")
    saved(home / "model")
    dice = random.Random(3)
    for day, documents in (("monday", 12), ("tuesday", 7)):
        for folder in (home / day, home / "both"):
            folder.mkdir(exist_ok=True)
        for number in range(documents):
            text = " ".join(dice.choice(WORDS) for _ in range(dice.randrange(60, 150)))
            for folder in (home / day, home / "both"):
                (folder / f"{day}{number:02}.txt").write_text(text)
    program = sys.argv[0]
    with contextlib.chdir(home):
        yield home
    sys.argv[0] = program


def test_1_monday_is_collected_and_cleaned(week: Path) -> None:
    refused("actshuffle collect --model absent --layers 2 --text monday --out acts", "absent")
    refused("actshuffle collect --model model --layers 9 --text monday --out acts", "9")
    collect = "actshuffle collect --model model --layers 1,2 --text monday --prefix <s> --drop-norm 0 --out acts"
    done(collect)
    assert "already finished" in done(collect)
    refused(f"{collect} --context 8", "acts is finished")
    refused("actshuffle filter acts clean --drop-norm 0.5", "drop-norm")
    done("actshuffle filter acts clean --skip-first 2 --drop-norm 10 --workers 0")
    clean, acts = actshuffle.open_dataset("clean"), actshuffle.open_dataset("acts")
    kept = np.flatnonzero(acts.read("window_position", 0, acts.rows) >= 2)
    norms = np.linalg.norm(acts.read(LAYER, 0, acts.rows)[kept], axis=1)
    assert clean.rows == len(kept) - np.count_nonzero(norms > 10 * np.median(norms))


def test_2_documents_are_held_out_and_the_rest_is_shuffled(week: Path) -> None:
    refused("actshuffle split clean train=0.7 val=rest", "is not shuffled")
    refused("actshuffle split clean train=500 val=rest --by document", "fractions")
    done("actshuffle split clean train=0.7 val=rest --by document")
    refused("actshuffle run train train.zarr --memory 1KB", "memory")
    for part in ("train", "val"):
        done(f"actshuffle run {part} {part}.zarr --seed 5 --workers 0")
        assert "verified" in done(f"actshuffle verify {part} {part}.zarr")
    refused("actshuffle run train train.zarr --seed 6 --workers 0", "train.zarr is finished")
    refused("actshuffle verify train.zarr train.zarr", "is given twice")


def test_3_tuesday_joins_the_same_parts(week: Path) -> None:
    done("actshuffle collect --model model --layers 1,2 --text tuesday --prefix <s> --drop-norm 0 --out acts2")
    done("actshuffle filter acts2 clean2 --skip-first 2 --drop-norm 10 --workers 0")
    done("actshuffle split clean2 train2=0.7 val2=rest --by document")
    refused("actshuffle append train.zarr model", "model")
    refused("actshuffle append train.zarr train", "already")
    for part in ("train", "val"):
        done(f"actshuffle append {part}.zarr {part}2 --workers 0")
        refused(f"actshuffle verify {part} {part}.zarr", "join the sources")
        done(f"actshuffle concat {part} {part}2 --out all-{part}")
        assert "verified" in done(f"actshuffle verify all-{part} {part}.zarr")
    assert "already finished" in done("actshuffle append train.zarr train2 --workers 0")
    names = [
        {
            o.document_name
            for o in actshuffle.came_from(f"{part}.zarr", range(0, actshuffle.open_dataset(f"{part}.zarr").rows, 7))
        }
        for part in ("train", "val")
    ]
    assert names[0]
    assert names[1]
    assert not names[0] & names[1]


def test_4_figures_by_document_are_those_of_collecting_all_at_once(week: Path) -> None:
    done("actshuffle run acts grown.zarr --seed 5 --workers 0")
    done("actshuffle append grown.zarr acts2 --workers 0")
    texts = "--text monday --text tuesday"
    done(f"actshuffle collect --model model --layers 1,2 {texts} --prefix <s> --drop-norm 0 --out whole")
    done("actshuffle run whole whole.zarr --seed 5 --workers 0")
    grown, whole = (actshuffle.open_dataset(name) for name in ("grown.zarr", "whole.zarr"))
    assert grown.rows == whole.rows
    for name in whole.fields:
        np.testing.assert_array_equal(grown.read(name, 0, grown.rows), whole.read(name, 0, whole.rows))
    called = [[actshuffle.document_name(store.attributes, d) for d in range(19)] for store in (grown, whole)]
    assert called[0] == called[1]
    scores = [actshuffle.quality(actshuffle.Loader(s.path, 200)).as_dict() for s in (grown, whole)]
    assert scores[0]["measures"] == scores[1]["measures"] != []


def test_5_rows_are_traced_to_their_text(week: Path) -> None:
    texts = {p.name: p.read_text() for day in ("monday", "tuesday") for p in Path(day).iterdir()}
    traced = json.loads(done("actshuffle came-from train.zarr 0 9 31 --context 2 --json"))["rows"]
    for origin in traced:
        words = texts[Path(origin["document_name"]).name].split()
        position, at = origin["position"], origin["at"]
        assert "".join(origin["text"]).split() == words[position - at : position - at + len(origin["text"])]
        assert done(f"actshuffle where-is train.zarr {origin['source_row']}").split()[-1] == f"{origin['row']:,}"
    refused("actshuffle came-from train.zarr 99999", "99,999")


def test_6_batches_go_on_where_they_stopped(week: Path) -> None:
    from torch.utils.data import DataLoader

    refused("actshuffle quality clean --buffer-rows -1", "buffer-rows")
    plain = [batch[LAYER] for batch in actshuffle.Loader("train.zarr", 64, as_torch=True)]
    batches = [b[LAYER].clone() for b in DataLoader(actshuffle.Loader("train.zarr", 64).torch(), batch_size=None)]
    assert all(torch.equal(a, b) for a, b in zip(plain, batches, strict=True))
    first = actshuffle.Loader("train.zarr", 64)
    stopped = iter(first)
    next(stopped), next(stopped)
    second = actshuffle.Loader("train.zarr", 64, as_torch=True)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert all(torch.equal(a, b[LAYER]) for a, b in zip(plain[2:], second, strict=True))


def test_7_dictionaries_are_trained_compared_and_exported(week: Path) -> None:
    refused(f"saetrain fit clean {FIT} --out run", "not shuffled")
    refused(f"saetrain fit train.zarr {FIT} --lr nan --out run", "lr")
    fit = f"saetrain fit train.zarr {FIT} --heldout val.zarr --out run"
    done(fit)
    before = snapshot()
    done(fit)  # nothing is left to do
    assert [
        name for name, found in snapshot().items() if before.get(name) != found and name.endswith("safetensors")
    ] == []
    refused(f"{fit} --seed 9", "seed")
    done(f"saetrain sweep train.zarr {FIT.replace('--k 8', '--k 4,8')} --out sweep")
    done("saetrain report run sweep --out report")
    assert (week / "report/report.html").stat().st_size > 1000
    refused("saetrain export run out --format other", "other")
    done("saetrain export run out --format saelens")


def test_8_the_export_is_read_with_numpy_alone(week: Path) -> None:
    data = (week / "out/sae_weights.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    weights = {
        name: np.frombuffer(data[8 + size :][slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }
    settings = json.loads((week / "out/cfg.json").read_text())
    store = actshuffle.open_dataset("val.zarr")
    rows = store.read(LAYER, 0, 40)
    centred = rows - weights["b_dec"] * bool(settings["apply_b_dec_to_input"])
    active = np.maximum(centred @ weights["W_enc"] + weights["b_enc"], 0)
    active[active < np.sort(active, axis=1)[:, -8:-7]] = 0
    rebuilt = active @ weights["W_dec"] + weights["b_dec"]
    sae = saetrain.load("run")
    ours = sae.decode(sae.encode(torch.from_numpy(rows))).numpy()
    np.testing.assert_allclose(rebuilt, ours, rtol=1e-3, atol=1e-4)


def test_control_a_refusal_that_writes_is_seen(week: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from actshuffle.loading import dataset

    was = dataset.open_dataset

    def writes(*args: Any, **options: Any) -> Any:
        Path("left-behind").mkdir(exist_ok=True)
        return was(*args, **options)

    monkeypatch.setattr("actshuffle.loading.trace.open_dataset", writes)
    with pytest.raises(AssertionError, match="came-from"):
        refused("actshuffle came-from train.zarr 99999", "99,999")
