"""Interactions of trained dictionaries, of every variant and of other tools' folders, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import saetrain
from saetrain import cli
from saetrain.exchange import folders as exchange
from saetrain.products.matrices import open_side
from support.sae import ARCHS, MemorySource, Planted, one_rank, small


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, planted = tmp_path_factory.mktemp("runs"), Planted.make(2048, 16, 24)
    with one_rank() as mesh:
        source = MemorySource(planted.rows, planted.documents)
        saetrain.fit(source, {folder / arch: small(arch, steps=4) for arch in ARCHS}, mesh)
    exchange.export(folder / "topk", folder / "topk.saelens")
    exchange.export(folder / "topk", folder / "topk.sparsify", "sparsify")
    return folder


@pytest.mark.parametrize("name", [*ARCHS, "topk.saelens", "topk.sparsify"])
def test_sides_are_the_rows_of_the_dictionary(runs: Path, name: str) -> None:
    sae = saetrain.load(runs / name)
    for part, rows in (("encoder", sae.W_enc), ("decoder", sae.W_dec)):
        side = open_side(runs / name, part)
        assert (side.rows, side.width) == tuple(rows.shape)
        assert torch.equal(side.tile(0), rows.float())
        unit = open_side(runs / name, part, unit=True).tile(0)
        assert torch.allclose(unit.norm(dim=1), torch.ones(len(unit)), atol=1e-6)


def test_the_command_multiplies_and_prints(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["interactions", str(runs / "relu"), str(runs / "topk"), str(tmp_path / "out"), "--k", "5"]
    assert cli.main([*arguments, "--plan"]) == 0
    told = capsys.readouterr().out
    assert "64 x 64 of width 16" in told
    assert {line.split()[0] for line in told.splitlines()} >= {"tasks", "memory", "read", "scratch", "store", "time"}
    assert not (tmp_path / "out").exists()
    assert cli.main([*arguments, "--over", "0.5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    a, b = saetrain.load(runs / "relu").W_enc.double().numpy(), saetrain.load(runs / "topk").W_dec.double().numpy()
    w, found = a @ b.T, saetrain.open_interactions(tmp_path / "out")
    assert np.allclose(found.columns[7].top_value, -np.sort(-w[:, 7])[:5], atol=1e-5)
    assert found.rows[3].over == {0.5: int((abs(w[3]) > 0.5).sum())}
    assert told["kept"] == found.kept
    assert cli.main([*arguments, "--over", "0.5"]) == 0
    assert "already finished" in capsys.readouterr().out


def test_the_command_finds_neighbours(runs: Path, tmp_path: Path) -> None:
    run, out = str(runs / "batchtopk"), tmp_path / "out"
    assert (
        cli.main(["interactions", run, run, str(out), "--product", "decoder-decoder", "--cosine", "--drop-same"]) == 0
    )
    rows = saetrain.load(run).W_dec.double()
    cosine = (rows @ rows.T / rows.norm(dim=1) / rows.norm(dim=1)[:, None]).fill_diagonal_(-2)
    found = saetrain.open_interactions(out)
    for number in (0, 31, 63):
        assert np.allclose(found.rows[number].top_value[0], cosine[number].max(), atol=1e-6)
        assert number not in found.rows[number].top_index
    assert np.array_equal(found.rows.arrays["kept"][:], found.columns.arrays["kept"][:])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--memory", "1kB"], "memory allows 1,000"),
        (["--memory", "some"], "must be a size from 1 byte"),
        (["--workers", "2", "--scheduler", "tcp://127.0.0.1:1"], "not both"),
        (["--product", "x"], "is not one of"),
        (["--through", "no.npy"], "no.npy is not a readable .npy file"),
    ],
)
def test_bad_options_are_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    run = str(runs / "topk")
    assert cli.main(["interactions", run, run, str(tmp_path / "out"), *options]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_dictionary_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["interactions", str(tmp_path / "none"), str(runs / "topk"), str(tmp_path / "out")]) == 2
    assert "no checkpoint in" in capsys.readouterr().err
