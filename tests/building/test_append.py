"""A grown store equals a shuffle of all rows from scratch, at one read and one write of the old rows."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from actshuffle import shuffle, verify
from actshuffle.building.growth import Appended, append
from actshuffle.building.joining import concat
from actshuffle.building.splitting import head
from actshuffle.cli.app import main
from actshuffle.errors import ConservationError, DestinationExistsError, RequestError, ResumeMismatchError, SourceError
from actshuffle.executors import Dask
from actshuffle.loading.dataset import open_dataset
from actshuffle.loading.trace import came_from, where_is
from actshuffle.ordering.keys import Keys
from actshuffle.storage.files import LocalObjects
from support.executors import Stops
from support.oracle import assert_is_oracle
from support.runs import run
from support.stores import act_and_token, array, files, group, values

N = 120
FIELDS = act_and_token(N)
SHAPE: dict[str, Any] = {"block_bytes": 24 * 30, "run_bytes": 1, "chunk_rows": 4}


def part(path: Path, start: int, stop: int, **settings: Any) -> Path:
    group(path, {name: data[start:stop] for name, data in FIELDS.items()}, **settings)
    return path


def old_and_new(folder: Path, cut: int, seed: int = 5) -> tuple[Path, Path]:
    """The first rows, shuffled, and the others in source order."""
    run(part(folder / "old.zarr", 0, cut), folder / "dst.zarr", seed=seed, **SHAPE)
    return folder / "dst.zarr", part(folder / "new.zarr", cut, N)


def grow(dst: Path, new: Path, out: Path | None = None, **options: Any) -> Appended:
    return append(dst, new, out, fsync=False, **{**SHAPE, **options})


def assert_whole(path: Path, seed: int = 5, **key_bits: int) -> None:
    """All rows, in the order of the keys."""
    found, order = zarr.open_group(path, mode="r"), Keys(seed, **key_bits).order(N)
    np.testing.assert_array_equal(found["source_row"][:], order)
    for name, data in FIELDS.items():
        np.testing.assert_array_equal(found[name][:].view("u1"), data[order].view("u1"))


@pytest.mark.parametrize("trial", [*range(20), *(pytest.param(n, marks=pytest.mark.soak) for n in range(20, 50))])
def test_any_split_gives_what_a_shuffle_of_all_rows_gives(tmp_path: Path, trial: int) -> None:
    dice = random.Random(trial)
    cut, seed = dice.randrange(1, N), dice.randrange(1 << 40)
    act, order = FIELDS["act"], Keys(seed).order(N)
    old, new, dst, out = (tmp_path / f"{name}.zarr" for name in ("old", "new", "dst", "grown"))
    array(old, act[:cut])
    array(new, act[cut:])
    run(old, dst, seed=seed, **SHAPE)
    shape = {"block_bytes": 20 * dice.randrange(8, 2 * N), "chunk_rows": dice.randrange(1, 8)}
    grow(dst, new, out, **shape)
    found = zarr.open_group(out, mode="r")
    np.testing.assert_array_equal(found["source_row"][:], order)
    np.testing.assert_array_equal(found["data"][:].view("u1"), act[order].view("u1"))


@pytest.mark.parametrize("cut", [1, 50, 119])
def test_every_file_is_that_of_a_shuffle_from_scratch(tmp_path: Path, cut: int) -> None:
    dst, new = old_and_new(tmp_path, cut)
    grow(dst, new, tmp_path / "grown.zarr")
    assert_whole(tmp_path / "grown.zarr")
    concat([tmp_path / "old.zarr", new], tmp_path / "both")
    run(tmp_path / "both", tmp_path / "scratch.zarr", **SHAPE)
    assert files(tmp_path / "grown.zarr") == files(tmp_path / "scratch.zarr")
    assert verify(tmp_path / "both", tmp_path / "grown.zarr").notes == ()


def test_reads_and_writes_the_old_data_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n, added, width = 60_000, 6_000, 256
    rows = values(n + added, (width,), "u1")
    array(tmp_path / "old.zarr", rows[:n], chunks=(1000, width))
    array(tmp_path / "new.zarr", rows[n:], chunks=(1000, width))
    shape = {"block_bytes": 2_000_000, "chunk_rows": 1000}
    shuffle(tmp_path / "old.zarr", tmp_path / "dst.zarr", seed=5, fsync=False, **shape)
    read, written = Counter[str](), Counter[str]()
    was_read, was_written = LocalObjects._read, LocalObjects.writer

    def counting_read(self: LocalObjects, key: str, extents: Any, file: Any) -> None:
        extents = list(extents)
        read[self.root.name] += sum(len(v) for e in extents for v in e.views)
        was_read(self, key, extents, file)

    def counting_write(self: LocalObjects, key: str, size: int) -> Any:
        written[self.root.name] += size
        return was_written(self, key, size)

    monkeypatch.setattr(LocalObjects, "_read", counting_read)
    monkeypatch.setattr(LocalObjects, "writer", counting_write)
    append(tmp_path / "dst.zarr", tmp_path / "new.zarr", tmp_path / "grown.zarr", fsync=False, **shape)
    old, new, all_rows = (k * (width + 8) for k in (n, added, n + added))
    assert old <= read["dst.zarr"] < 1.01 * old
    assert all_rows <= written["grown.zarr"] < 1.02 * all_rows + 20_000
    assert read["grown.zarr.new-sorted"] < 1.1 * new
    assert sum(read.values()) + sum(written.values()) < 2 * all_rows + 8 * new + 50_000
    assert read["dst.zarr"] + written["grown.zarr"] < 2.03 * all_rows


@pytest.mark.parametrize(
    "settings",
    [
        {"codec": "zstd"},
        {"codec": "crc32c", "chunks_per_shard": 3},
        {"chunks_per_shard": 2},
        {"key_bits": (3, 2)},
        {"key_bits": (2, 1)},
    ],
)
def test_codecs_shards_and_ties(tmp_path: Path, settings: dict[str, Any]) -> None:
    run(part(tmp_path / "old.zarr", 0, 70), dst := tmp_path / "dst.zarr", **{**SHAPE, **settings})
    new = part(tmp_path / "new.zarr", 70, N, compressors="auto")
    append(dst, new, fsync=False, block_bytes=24 * 40, run_bytes=1)
    bits = dict(zip(("hi_bits", "lo_bits"), settings.get("key_bits", (64, 64)), strict=True))
    assert_whole(dst, **bits)
    group(tmp_path / "all.zarr", FIELDS)
    assert_is_oracle(tmp_path / "all.zarr", dst, **bits)
    assert zarr.open_group(dst, mode="r")["act"].chunks == (4, 5)


def test_kinds_of_values(sources: Callable[[str, int], Path], tmp_path: Path) -> None:
    for kind in ("mixed_group", "bfloat16", "deep_rows", "big_endian_v3"):
        old, dst = sources(kind, 150), tmp_path / f"{kind}.zarr"
        run(old, dst, chunk_rows=16)
        append(dst, sources(kind, 40), tmp_path / f"{kind}.grown", fsync=False)
        both = concat([old, sources(kind, 40)], tmp_path / f"{kind}.both")
        assert_is_like(both.path, tmp_path / f"{kind}.grown")


def assert_is_like(source: str, dst: Path) -> None:
    report = verify(source, dst)
    assert report.ok, report
    assert not report.notes


# --- In place -------------------------------------------------------------------------------------


def test_in_place_and_again_and_again(tmp_path: Path) -> None:
    dst, _ = old_and_new(tmp_path, 30)
    for number, (a, b) in enumerate([(30, 31), (31, 90), (90, N)]):
        done = grow(dst, part(tmp_path / f"{number}.zarr", a, b))
        assert (done.rows, done.added) == (b, b - a)
    assert_whole(dst)
    assert sorted(p.name for p in tmp_path.iterdir() if "dst" in p.name) == ["dst.zarr"]
    parts = ["old", "0", "1", "2"]
    both = concat([tmp_path / f"{name}.zarr" for name in parts], tmp_path / "all")
    assert_is_like(both.path, dst)
    row = int(where_is(dst, [60])[0])
    origin = came_from(dst, [row])[0]
    assert (origin.source, origin.row_in_source) == (str(tmp_path / "1.zarr"), 29)
    assert origin.token == FIELDS["token"][60]


def test_rows_that_are_there_already(tmp_path: Path) -> None:
    dst, new = old_and_new(tmp_path, 100)
    grow(dst, new)
    with pytest.raises(RequestError, match="again=True"):
        grow(dst, tmp_path / "old.zarr")
    grow(dst, new, again=True)
    assert open_dataset(dst).rows == N + 20


def stamps(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in (folder, *folder.rglob("*"))}


def test_the_same_append_again_is_already_finished(tmp_path: Path) -> None:
    dst, new = old_and_new(tmp_path, 60)
    first = part(tmp_path / "first.zarr", 0, 7)
    grow(dst, new, tmp_path / "grown.zarr")
    grow(dst, first)
    grow(dst, new)
    before = stamps(dst), stamps(tmp_path / "grown.zarr"), {*tmp_path.iterdir()}
    for source, rows in ((new, 60), (first, 7)):  # the last one, and one before it
        done = append(dst, source)
        assert (done.done_before, done.added, done.rows, done.seconds) == (True, rows, N + 7, 0.0)
    shown = CliRunner().invoke(main, ["append", str(dst), str(new), "--chunk-rows", "4", "--workers", "0"])
    assert (shown.exit_code, shown.stdout) == (0, f"{dst}: already finished, 60 rows appended before, 127 in all\n")
    assert (stamps(dst), stamps(tmp_path / "grown.zarr"), {*tmp_path.iterdir()}) == before


def test_the_same_append_to_another_place_again(tmp_path: Path) -> None:
    dst, new = old_and_new(tmp_path, 60)
    both = Path(concat([new, part(tmp_path / "more.zarr", 0, 9)], tmp_path / "both").path)
    for source, out in ((new, tmp_path / "grown.zarr"), (both, tmp_path / "grown-more.zarr")):
        assert not grow(dst, source, out).done_before
        before = stamps(out), {*tmp_path.iterdir()}
        assert grow(dst, source, out).done_before
        for other, options in ((first := tmp_path / "more.zarr", {}), (source, {"chunk_rows": 9})):
            with pytest.raises(DestinationExistsError, match="other rows or other chunks"):
                grow(dst, other, out, **options)
        assert (stamps(out), {*tmp_path.iterdir()}) == before
    assert not grow(dst, first, tmp_path / "grown.zarr", overwrite=True).done_before


def test_another_append_of_a_source_is_not_taken_for_the_same(tmp_path: Path) -> None:
    dst, new = old_and_new(tmp_path, 60)
    grow(dst, new)
    before = stamps(dst), {*tmp_path.iterdir()}
    with pytest.raises(RequestError, match=r"with other chunk_rows; give again=True"):
        grow(dst, new, chunk_rows=7)
    shutil.rmtree(new)
    part(new, 60, 100)
    with pytest.raises(RequestError, match=r"new.zarr is in .* already, and has changed since .*again=True"):
        grow(dst, new)
    assert (stamps(dst), {*tmp_path.iterdir()}) == before


def test_stopped_anywhere_it_resumes_and_the_old_store_stays(tmp_path: Path) -> None:
    dst, new = old_and_new(tmp_path, 60)
    before, stops = files(dst), 0
    while True:
        try:
            grow(dst, new, executor=Stops(2))
            break
        except KeyboardInterrupt:
            stops += 1
            assert files(dst) == before
            assert verify(tmp_path / "old.zarr", dst).ok
    assert stops >= 4
    assert_whole(dst)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst.zarr", "new.zarr", "old.zarr"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_stopped_at_the_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    from actshuffle.building import growth as module

    dst, new = old_and_new(tmp_path, 60)
    real = module.exchange

    def stops(*places: Any) -> None:
        if moment == "after":
            real(*places)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "exchange", stops)
    with pytest.raises(KeyboardInterrupt):
        grow(dst, new)
    monkeypatch.setattr(module, "exchange", real)
    assert grow(dst, new).done_before == (moment == "after")
    assert_whole(dst)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst.zarr", "new.zarr", "old.zarr"]


def test_a_finished_append_of_other_rows_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actshuffle.building import growth as module

    dst, new = old_and_new(tmp_path, 60)
    other = part(tmp_path / "other.zarr", 60, 90)
    with monkeypatch.context() as patch:
        patch.setattr(module, "exchange", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            grow(dst, other)
    with pytest.raises(DestinationExistsError):
        grow(dst, new)
    grow(dst, new, overwrite=True)
    assert_whole(dst)


def test_where_the_system_cannot_exchange_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    dst, new = old_and_new(tmp_path, 60)
    grow(dst, new)
    assert_whole(dst)


def test_on_a_cluster(tmp_path: Path, cluster: Callable[[int], Dask]) -> None:
    dst, new = old_and_new(tmp_path, 60)
    grow(dst, new, executor=cluster(2))
    assert_whole(dst)


# --- Refusals -------------------------------------------------------------------------------------


def test_bad_requests(tmp_path: Path) -> None:
    dst, new = old_and_new(tmp_path, 60)
    group(tmp_path / "wide.zarr", {"act": values(9, (6,)), "token": values(9, (), "<i4")})
    group(tmp_path / "bare.zarr", {"act": values(9, (5,))})
    with pytest.raises(SourceError, match="shape \\(6,\\)"):
        grow(dst, tmp_path / "wide.zarr")
    with pytest.raises(RequestError, match="no array named 'token'"):
        grow(dst, tmp_path / "bare.zarr")
    with pytest.raises(SourceError, match="no such source"):
        grow(dst, tmp_path / "absent.zarr")
    with pytest.raises(DestinationExistsError):
        grow(dst, new, tmp_path / "wide.zarr")
    head(dst, 20, tmp_path / "view.zarr")
    head(dst, 20, tmp_path / "copy.zarr", copy=True)
    for piece in ("view", "copy"):
        with pytest.raises(RequestError, match="not the whole of a shuffle"):
            grow(tmp_path / f"{piece}.zarr", new)
    run(tmp_path / "old.zarr", tmp_path / "bare-order.zarr", source_row=False)
    with pytest.raises(RequestError, match="without source_row"):
        grow(tmp_path / "bare-order.zarr", new)
    with pytest.raises(RequestError, match="give another place"):
        grow("memory://dst.zarr", new)  # type: ignore[arg-type]


def test_other_rows_than_those_it_began_with(tmp_path: Path) -> None:
    dst, new = old_and_new(tmp_path, 60)
    with pytest.raises(KeyboardInterrupt):
        grow(dst, new, executor=Stops(6))
    with pytest.raises(ResumeMismatchError):
        grow(dst, part(tmp_path / "other.zarr", 60, 90))
    grow(dst, new)
    assert_whole(dst)


def test_an_old_store_that_was_damaged_since_is_noticed(tmp_path: Path) -> None:
    dst, new = old_and_new(tmp_path, 60)
    chunk = dst / "act/c.3.0"
    data = bytearray(chunk.read_bytes())
    data[17] ^= 4
    chunk.write_bytes(data)
    with pytest.raises(ConservationError, match="rows of act"):
        grow(dst, new)
    assert open_dataset(dst).rows == 60
