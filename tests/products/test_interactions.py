"""Interactions equal dense numpy, whatever the cut, the workers and the kills; the store says what it left out."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import saetrain
from actshuffle.errors import DestinationExistsError, ResumeMismatchError
from actshuffle.executors import Serial, Threads
from actshuffle.testing import Faults, Killed, Operation, matching
from saetrain.errors import ConfigError, DataError
from saetrain.products.energy import gram, tiles_of
from saetrain.products.job import Sides, plan_interactions, run_plan
from saetrain.products.productplan import ProductPlan, make_plan

N, M, D, K = 1500, 2100, 24, 9
THRESHOLDS = (20.0, 60.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Matrices of small whole numbers, whose products are exact in float32 and full of ties; and of real numbers."""
    folder, dice = tmp_path_factory.mktemp("matrices"), np.random.default_rng(7)
    shapes = {"a": (N, D), "b": (M, D), "wide": (M, 40), "through": (D, 40)}
    found = {}
    for name, shape in shapes.items():
        for kind, array in (
            ("whole", dice.integers(-3, 4, shape).astype(np.float32)),
            ("real", dice.standard_normal(shape).astype(np.float32)),
        ):
            found[f"{name} {kind}"] = folder / f"{name}-{kind}.npy"
            np.save(found[f"{name} {kind}"], array)
    return found


@pytest.fixture(scope="module")
def small(files, tmp_path_factory) -> tuple[Path, Path]:
    """The first rows: two panels of each side."""
    folder = tmp_path_factory.mktemp("small")
    for name in "ab":
        np.save(folder / f"{name}.npy", np.load(files[f"{name} real"])[: 900 + ord(name) * 2])
    return folder / "a.npy", folder / "b.npy"


def planned(a: Path, b: Path, **settings: Any) -> ProductPlan:
    given = {"k": K, "thresholds": THRESHOLDS, "panel": 1024} | settings
    chunk, gram_rows = given.pop("chunk", 1024), given.pop("gram_rows", 1024)
    return replace(plan_interactions(a, b, **given), chunk=chunk, gram_rows=gram_rows)


def run(a: Path, b: Path, out: Path, *, executor: Any = None, overwrite: bool = False, **settings: Any) -> Any:
    plan = planned(a, b, **settings)
    return run_plan(plan, "encoder-decoder", out, executor=executor, overwrite=overwrite, fsync=False)


def dense(a: Path, b: Path, through: Path | None = None) -> np.ndarray:
    left, right = (np.load(path).astype(np.float64) for path in (a, b))
    return (left if through is None else left @ np.load(through).astype(np.float64)) @ right.T


def faults(found: saetrain.Interactions, w: np.ndarray, drop_same: bool = False) -> list[str]:
    """Where a store differs from the dense product, whose entries are exact."""
    wrong = []
    for half, lines, matrix in ((0, found.rows, w), (1, found.columns, w.T)):
        shown = matrix.copy()
        if drop_same:
            np.fill_diagonal(shown, 0.0)
        arrays = {name: array[:] for name, array in lines.arrays.items()}
        keep = np.zeros(matrix.shape, bool)
        for name, sign in (("top", -1), ("bottom", 1)):
            key = sign * matrix
            if drop_same:
                np.fill_diagonal(key, np.inf)
            order = np.argsort(key, axis=1, kind="stable")[:, : found.about["k"]]
            value = np.take_along_axis(matrix, order, 1)
            if not np.array_equal(arrays[f"{name}/index"], order):
                wrong.append(f"{half} {name} index")
            if not np.array_equal(arrays[f"{name}/value"], value.astype(np.float32)):
                wrong.append(f"{half} {name} value")
            np.put_along_axis(keep, order, True, 1)
        energy = np.square(shown).sum(1)
        over = np.stack([(abs(shown) > t).sum(1) for t in found.about["thresholds"]], 1)
        if not np.array_equal(arrays["over"], over):
            wrong.append(f"{half} over")
        kept = np.where(energy > 0, np.square(shown * keep).sum(1) / np.where(energy > 0, energy, 1), 1)
        for name, due in (("energy", energy), ("sum", shown.sum(1)), ("kept", kept)):
            if not np.allclose(arrays[name], due, rtol=1e-12, atol=1e-9):
                wrong.append(f"{half} {name}")
    return wrong


def contents(out: Path) -> dict[str, bytes]:
    """All objects but the marker, which names the cut."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "done.json"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


# --- The dense product --------------------------------------------------------------------------


def test_equals_the_dense_product_with_all_its_ties(files, tmp_path):
    a, b = files["a whole"], files["b whole"]
    run(a, b, tmp_path / "out")
    w, found = dense(a, b), saetrain.open_interactions(tmp_path / "out")
    ties = np.sort(w, axis=1)[:, -K - 1]
    assert (np.sort(w, axis=1)[:, -K] == ties).mean() > 0.3  # rows whose k-th place is tied
    assert faults(found, w) == []
    w[3, 17] += 1.0
    assert "0 energy" in faults(found, w)
    w[3, 17] += 1000.0
    assert {"0 top index", "0 top value", "1 top index", "0 over"} <= set(faults(found, w))


def test_a_map_between_and_a_dropped_diagonal(files, tmp_path):
    a, b, through = files["a whole"], files["wide whole"], files["through whole"]
    run(a, b, tmp_path / "map", through=through)
    assert faults(saetrain.open_interactions(tmp_path / "map"), dense(a, b, through)) == []
    run(a, a, tmp_path / "same", drop_same=True)
    found = saetrain.open_interactions(tmp_path / "same")
    assert faults(found, dense(a, a), drop_same=True) == []
    assert faults(found, dense(a, a)) != []
    assert not (found.rows.arrays["top/index"][:] == np.arange(N)[:, None]).any()


def test_real_numbers_are_within_the_stated_error(files, tmp_path):
    a, b = files["a real"], files["b real"]
    run(a, b, tmp_path / "out")
    w, found = dense(a, b), saetrain.open_interactions(tmp_path / "out")
    index, value = found.rows.arrays["top/index"][:].astype(int), found.rows.arrays["top/value"][:]
    size = np.linalg.norm(np.load(a), axis=1).max() * np.linalg.norm(np.load(b), axis=1).max()
    assert np.abs(np.take_along_axis(w, index, 1) - value).max() < D * 2.0**-24 * size
    assert np.abs(-np.sort(-w, axis=1)[:, :K] - value).max() < D * 2.0**-24 * size


def test_cosines(files, tmp_path):
    a, b = files["a real"], files["b real"]
    run(a, b, tmp_path / "out", cosine=True, thresholds=(0.5,))
    left, right = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.load(a), np.load(b)))
    w, found = left.astype(np.float64) @ right.T, saetrain.open_interactions(tmp_path / "out")
    assert np.allclose(found.columns.arrays["top/value"][:], -np.sort(-w.T, axis=1)[:, :K], atol=1e-6)
    run(files["a real"], files["wide real"], tmp_path / "map", cosine=True, through=files["through real"])
    right = np.load(files["wide real"]) @ np.load(files["through real"]).T
    w = left @ (right / np.linalg.norm(right, axis=1, keepdims=True)).T
    found = saetrain.open_interactions(tmp_path / "map")
    assert np.allclose(found.rows.arrays["bottom/value"][:], np.sort(w, axis=1)[:, :K], atol=1e-5)


def test_a_line_tells_what_is_left_out(files, tmp_path):
    a, b = files["a whole"], files["b whole"]
    run(a, b, tmp_path / "out")
    w, found = dense(a, b), saetrain.open_interactions(tmp_path / "out")
    line = found.rows[-1]
    rest = np.delete(w[-1], np.union1d(line.top_index, line.bottom_index).astype(int))
    assert line.number == N - 1
    assert np.allclose(line.rest, (len(rest), rest.mean(), rest.std()))
    assert line.over == {t: int((abs(w[-1]) > t).sum()) for t in THRESHOLDS}
    assert f"Interactions {N} x {M}" in repr(found)
    assert f"{found.kept['rows']:.1%} of the rows' energy" in repr(found)
    with pytest.raises(IndexError, match=f"rows {N} of {N}"):
        found.rows[N]


def test_fewer_columns_than_k(tmp_path):
    dice = np.random.default_rng(1)
    for name, rows in (("a", 40), ("b", 5)):
        np.save(tmp_path / f"{name}.npy", dice.integers(-3, 4, (rows, 6)).astype(np.float32))
    run(tmp_path / "a.npy", tmp_path / "b.npy", tmp_path / "out", k=9)
    found = saetrain.open_interactions(tmp_path / "out")
    assert found.rows.arrays["top/index"].shape == (40, 5)
    assert found.columns.arrays["top/index"].shape == (5, 9)
    assert np.array_equal(found.rows.arrays["kept"][:], np.ones(40))
    assert found.rows[0].rest == (0, 0.0, 0.0)


# --- The same bytes -----------------------------------------------------------------------------


def test_the_same_bytes_for_any_cut_and_executor(files, tmp_path, cluster):
    a, b = files["a real"], files["b real"]
    ways = [(1024, Serial()), (2048, Threads(3)), (1024, cluster(2)), (None, Serial())]
    kept = []
    for number, (panel, executor) in enumerate(ways):
        run(a, b, tmp_path / f"{number}", executor=executor, panel=panel)
        kept.append(contents(tmp_path / f"{number}"))
    assert len(kept[0]) == 8 * (2 + 3) + 16 + 7  # chunks of 8 arrays, and zarr.json of arrays and groups
    assert all(found == kept[0] for found in kept[1:])


def test_threads_of_the_library_do_not_change_a_bit(small, tmp_path):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            run(*small, tmp_path / f"{threads}")
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_products_are_in_float32_whatever_the_caller_allows(small, tmp_path):
    run(*small, tmp_path / "due")
    torch.set_float32_matmul_precision("medium")
    try:
        run(*small, tmp_path / "found")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert contents(tmp_path / "found") == contents(tmp_path / "due")


@pytest.mark.parametrize("width", [12, 24, 100])
def test_threads_of_the_library_do_not_change_a_gram_matrix(width):
    rows = torch.randn(1500, width, generator=torch.Generator().manual_seed(width))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(gram((rows[lo:hi] for lo, hi in tiles_of(0, len(rows))), width))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert torch.equal(found[0].matrix, found[1].matrix)
    assert torch.equal(found[0].total, found[1].total)


def test_control_another_order_of_sums_gives_other_bytes(files, tmp_path, monkeypatch):
    a, b = files["a real"], files["b real"]
    run(a, b, tmp_path / "due")
    tile = Sides.tile
    monkeypatch.setattr(Sides, "tile", lambda *given: tile(*given).flip(1))
    run(a, b, tmp_path / "out")
    due, out = contents(tmp_path / "due"), contents(tmp_path / "out")
    assert due.keys() == out.keys()
    assert due != out


# --- Kills --------------------------------------------------------------------------------------


class On:
    """A fault at one operation on a folder, by its number."""

    def __init__(self, folder: Path, number: int, kind: str) -> None:
        self.folder, self.number, self.kind, self.count = str(folder), number, kind, 0

    def __call__(self, operation: Operation) -> str | None:
        if operation.url != self.folder:
            return None
        self.count += 1
        return self.kind if self.count - 1 == self.number else None


def killed_and_resumed(a: Path, b: Path, folder: Path, kills: int, seed: int) -> None:
    dice, due = random.Random(seed), folder / "due"
    with Faults(counter := On(due, -1, "")):
        run(a, b, due, chunk=1024)
    whole = contents(due)
    for _ in range(kills):
        out, left = folder / "out", dice.randrange(1, 4)
        while left:
            try:
                with Faults(On(out, dice.randrange(counter.count), dice.choice(["kill", "late", "torn"]))):
                    run(a, b, out, chunk=1024)
                break
            except Killed:
                left -= 1
        run(a, b, out, chunk=1024)
        assert contents(out) == whole
        shutil.rmtree(out)


def test_killed_anywhere_then_resumed(small, tmp_path):
    killed_and_resumed(*small, tmp_path, kills=8, seed=5)


@pytest.mark.soak
def test_killed_a_hundred_times(small, tmp_path):
    killed_and_resumed(*small, tmp_path, kills=100, seed=6)


def test_damaged_scratch_is_named_and_made_anew(small, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Killed), Faults(matching("put rows/top/index/*", "kill")):
        run(*small, out)
    part = out / "scratch/panel/rows/0/0-1.npz"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(DataError, match=r"panel/rows/0/0-1.npz is damaged .* delete it"):
        run(*small, out)
    part.unlink()
    run(*small, out)
    run(*small, tmp_path / "due")
    assert contents(out) == contents(tmp_path / "due")


# --- Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"k": 0}, "k must be 1 or more, got 0"),
        ({"thresholds": (0.0,)}, "thresholds must be positive numbers, got 0.0"),
        ({"panel": 1000}, "panel must be a multiple of 1024 rows, got 1000"),
        ({"drop_same": True}, r"square product .* this is 1500 x 2100"),
        ({"memory": 1 << 20}, r"panels of 1,024 rows of width 24 with k 9 needs [\d,]+ bytes; memory allows 1,048,576"),
        ({"product": "decoder"}, "product must be one of"),
    ],
)
def test_bad_requests_are_refused(files, tmp_path, settings, text):
    with pytest.raises(ConfigError, match=text):
        saetrain.interactions(files["a real"], files["b real"], tmp_path / "out", **({"k": K} | settings))
    assert not (tmp_path / "out").exists()


def test_bad_matrices_are_refused(files, tmp_path):
    a, wide = files["a real"], files["wide real"]
    with pytest.raises(ConfigError, match=r"have width 24, rows of .* 40; a matrix \[24, 40\] \(through\)"):
        saetrain.interactions(a, wide, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"has shape \[2100, 40\]; between these sides it must be \[24, 40\]"):
        saetrain.interactions(a, wide, tmp_path / "out", through=wide)
    for name, array, text in (
        ("flat", np.zeros(3, np.float32), r"one matrix \[rows, width\]; its shape is \[3\]"),
        ("text", np.array([["x"]]), "must hold real numbers"),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(DataError, match=text):
            saetrain.interactions(tmp_path / f"{name}.npy", a, tmp_path / "out")
    (tmp_path / "torn.npy").write_bytes(a.read_bytes()[:50])
    with pytest.raises(DataError, match="not a readable"):
        saetrain.interactions(tmp_path / "torn.npy", a, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_not_finite_are_named(files, tmp_path):
    rows = np.load(files["a real"])
    rows[1200, 3] = np.nan
    np.save(tmp_path / "nan.npy", rows)
    with pytest.raises(DataError, match="nan\\.npy: row 1200 of the matrix holds a number that is not finite"):
        saetrain.interactions(tmp_path / "nan.npy", files["b real"], tmp_path / "out")
    with pytest.raises(DataError, match="not a finished store"):
        saetrain.open_interactions(tmp_path / "out")


def test_a_disk_that_is_too_small(files, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"bytes of scratch and .* the disk has 1,000 free"):
        saetrain.interactions(files["a real"], files["b real"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_requests_and_other_contents_are_refused(small, tmp_path):
    a, b = (shutil.copy(path, tmp_path) for path in small)
    run(a, b, tmp_path / "out")
    assert run(a, b, tmp_path / "out").already_finished
    with pytest.raises(DestinationExistsError, match="k was 9, now 4"):
        run(a, b, tmp_path / "out", k=4)
    np.save(a, np.load(a) + 1)  # the same file with other rows
    with pytest.raises(DestinationExistsError, match="digest"):
        run(a, b, tmp_path / "out")
    with pytest.raises(Killed), Faults(matching("put scratch/total/*", "kill")):
        run(a, b, tmp_path / "half")
    with pytest.raises(ResumeMismatchError, match="k was 9, now 4"):
        run(a, b, tmp_path / "half", k=4)


# --- The reader ---------------------------------------------------------------------------------


def test_chunks_that_are_missing_or_damaged_are_noticed(small, tmp_path):
    run(*small, tmp_path / "out")
    path = tmp_path / "out/rows/top/value/c/1/0"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    found = saetrain.open_interactions(tmp_path / "out")
    with pytest.raises(DataError, match="chunk with rows 1030 is damaged"):
        found.rows[1030]
    path.unlink()
    with pytest.raises(DataError, match="chunk with rows 1030 is missing"):
        found.rows[1030]
    assert found.rows[5].number == 5


# --- Memory and cost ----------------------------------------------------------------------------


def test_panels_fill_the_memory_and_cost_falls(files):
    a, b = files["a real"], files["b real"]
    least = plan_interactions(a, b, panel=1024).sizes().memory
    plans = [plan_interactions(a, b, memory=memory) for memory in (least, 1 << 40)]
    assert [plan.panel for plan in plans] == [1024, 3072]
    assert plans[0].sizes().memory == least < plans[1].sizes().memory
    with pytest.raises(ConfigError, match=f"memory allows {least - 1:,}"):
        plan_interactions(a, b, memory=least - 1)
    assert plans[0].sizes().scratch > plans[1].sizes().scratch
    assert plans[0].sizes().read > plans[1].sizes().read
    huge = replace(plans[0].a, rows=34_000_000, width=8192)
    whole = make_plan(huge, huge, memory=40 << 30)
    assert whole.sizes().operations > 2 * 34e6**2 * 8192
    assert whole.sizes().memory <= 40 << 30
    assert 0 < plans[0].seconds() < 60


def test_memory_is_within_the_model(tmp_path):
    """Peak memory of a job, above that of the same process after a small one."""
    dice = np.random.default_rng(2)
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", dice.standard_normal((4096, 256)).astype(np.float32))
    plan = plan_interactions(tmp_path / "a.npy", tmp_path / "b.npy", k=64)
    code = (
        "import json, sys; from dataclasses import replace; from pathlib import Path;"
        "from saetrain.products.job import run_plan; from saetrain.products.productplan import as_plan;"
        "plan = as_plan(json.loads(sys.argv[1])); small = replace(plan, **{s: replace(plan.a, rows=9) for s in 'ab'});"
        "run_plan(small, '', sys.argv[2] + '-small'); Path('/proc/self/clear_refs').write_text('5');"
        "kb = lambda name: int(Path('/proc/self/status').read_text().split(name)[1].split()[0]);"
        "before = kb('VmRSS:'); run_plan(plan, '', sys.argv[2]); print(kb('VmHWM:') - before)"
    )
    command = [sys.executable, "-c", code, json.dumps(plan.settings()), str(tmp_path / "out")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
    assert 0.3 * plan.sizes().memory < grown < plan.sizes().memory
