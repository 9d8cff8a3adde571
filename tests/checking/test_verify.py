"""Each checker has its negative control: break a finished store in one place, and verify names the place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

import actshuffle
from actshuffle.checking import fullcheck, pair
from actshuffle.errors import IncompleteStoreError, RequestError, SourceError
from actshuffle.executors import Serial, Threads
from actshuffle.ordering.keys import order
from actshuffle.ordering.mixing import report as score
from actshuffle.testing import Faults, Killed, matching, run
from actshuffle.testing.stories import Dice, choose_plan, choose_store
from support.processes import PHASES, PLAN, SEED, assert_exact, source
from support.stores import group, values

ROWS = 120
OUTPUTS = {
    "none": {},
    "crc32c": {"codec": "crc32c"},
    "zstd": {"codec": "zstd"},
    "sharded": {"chunks_per_shard": 2},
    "sharded_crc32c": {"chunks_per_shard": 2, "codec": "crc32c"},
}
FIELDS = ["x", "doc", "source_row"]


@pytest.fixture(scope="session")
def src(tmp_path_factory):
    return source(tmp_path_factory.mktemp("source") / "src.zarr", ROWS)


@pytest.fixture(scope="session")
def outputs(src, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    for name, settings in OUTPUTS.items():
        plan = PLAN | ({"block_bytes": 700} if "sharded" in name else {}) | settings
        run(src, folder / name, SEED, **plan)
        assert_exact(src, folder / name)
    return folder


@pytest.fixture
def store(outputs, tmp_path):
    """``store(codec)``: a copy of a finished output, to be broken."""

    def copy(codec="none"):
        return Path(shutil.copytree(outputs / codec, tmp_path / codec))

    return copy


def complaints(src, dst, **how):
    report = actshuffle.verify(src, dst, **how)
    assert report.ok == (not report.problems)
    return {problem.where: problem for problem in report.problems}


def objects_of(store, field):
    """An array's chunk files in order."""
    found = [p for p in (store / field).iterdir() if p.name.startswith("c.")]
    return sorted(found, key=lambda p: int(p.name.split(".")[1]))


def key_of(store, path):
    return str(path.relative_to(store))


def rewrite(store, field, change):
    """Change an array's rows by zarr, so that the store stays well-formed."""
    with zarr.config.set({"array.write_empty_chunks": True}):
        array = zarr.open_array(store / field, mode="r+")
        rows = array[...]
        array[...] = change(rows)


def object_of_row(store, field, row):
    array = zarr.open_array(store / field, mode="r")
    step = (array.shards or array.chunks)[0]
    return key_of(store, objects_of(store, field)[row // step])


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


# --- What is right raises no alarm --------------------------------------------------------------


@pytest.mark.parametrize("codec", OUTPUTS)
@pytest.mark.parametrize("quick", [False, True])
def test_clean_output(codec, quick, src, outputs):
    report = actshuffle.verify(src, outputs / codec, quick=quick)
    assert report.ok
    assert report.problems == ()
    assert report.notes == ()
    assert report.rows == ROWS
    assert 0 < report.checked <= ROWS
    assert report.quick == quick
    assert "verified" in str(report)
    assert json.loads(json.dumps(report.as_dict()))["ok"] is True


def _clean(seed, folder):
    dice = Dice(seed)
    store = choose_store(dice)
    plan = choose_plan(dice, store) | {"levels": "auto"}
    store.write(folder / "src.zarr")
    run(folder / "src.zarr", folder / "dst.zarr", seed, **plan)
    for quick in (False, True):
        report = actshuffle.verify(folder / "src.zarr", folder / "dst.zarr", quick=quick)
        assert report.ok, (seed, str(report))
        assert not report.notes, (seed, report.notes)


def test_clean_runs_raise_no_alarm(tmp_path):
    for seed in range(25):
        _clean(seed, tmp_path / str(seed))


@pytest.mark.soak
@pytest.mark.parametrize("block", range(20))
def test_clean_runs_raise_no_alarm_a_thousand_times(block, tmp_path):
    for seed in range(1000 + 50 * block, 1050 + 50 * block):
        _clean(seed, tmp_path / str(seed))
        shutil.rmtree(tmp_path / str(seed))


def test_clean_quick_check_of_many_rows_raises_no_alarm(tmp_path):
    group(tmp_path / "src.zarr", {"x": values(20_000, (2,))}, chunks=(5000, 2))
    run(tmp_path / "src.zarr", tmp_path / "dst.zarr", 3)
    for _ in range(6):
        report = actshuffle.verify(tmp_path / "src.zarr", tmp_path / "dst.zarr", quick=True)
        assert report.ok, str(report)
        assert 1000 < report.checked <= 4096


# --- Bits ---------------------------------------------------------------------------------------


def _flips(src, store, count, seed):
    """Flip random bits of all files one at a time; verify detects each one and names the file."""
    rng = np.random.default_rng(seed)
    paths = [p for p in sorted(store.rglob("*")) if p.is_file() and p.stat().st_size]
    weights = np.array([max(p.stat().st_size, 200) for p in paths], float)
    for number in rng.choice(len(paths), count, p=weights / weights.sum()):
        path = paths[number]
        before, bit = path.read_bytes(), int(rng.integers(8 * path.stat().st_size))
        flip(path, bit)
        yield path, bit
        path.write_bytes(before)


def _alarm(src, store, path):
    """The verdict on the store in its present state, and whether it names the damaged file."""
    key = key_of(store, path)
    try:
        report = actshuffle.verify(src, store)
    except actshuffle.errors.ActshuffleError as err:
        return str(err), key in str(err)
    text = str(report) + "".join(p.detail for p in report.problems)
    return ("" if report.ok else text), any(key == p.where or key in p.detail for p in report.problems)


@pytest.mark.parametrize("codec", ["none", "crc32c", "sharded_crc32c"])
def test_flipped_bits_anywhere_are_seen_and_named(codec, src, store):
    dst = store(codec)
    for path, bit in _flips(src, dst, 40, seed=len(codec)):
        said, named = _alarm(src, dst, path)
        assert said, f"bit {bit} of {path}"
        assert named, f"bit {bit} of {path}: {said}"
    assert_exact(src, dst)


def test_every_byte_of_the_marker_counts(src, store):
    """Its own checksum's name, and the Zarr metadata around it, among them."""
    dst = store()
    path = dst / "_actshuffle/zarr.json"
    whole = path.read_bytes()
    names = [
        b"node_type",
        b"sha256",
        b"zarr_format",
        b"attributes",
        b'"kind"',
        b'"fields"',
        b'"files"',
        b'"doc"',  # a field, which the source then does not have
        b'shuffle"',  # the kind
    ]
    for at in (whole.rindex(name) + 1 for name in names):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        said, named = _alarm(src, dst, path)
        assert said, whole[at : at + 10]
        assert named, said


@pytest.mark.parametrize("codec", ["zstd", "sharded"])
def test_flipped_bits_are_seen_or_do_no_harm(codec, src, store):
    """zstd without a checksum has bits that do not matter, and a shard may hold bytes that are never read."""
    dst = store(codec)
    harmless = 0
    for path, bit in _flips(src, dst, 40, seed=len(codec)):
        said, named = _alarm(src, dst, path)
        if said:
            assert named, f"bit {bit} of {path}: {said}"
        else:
            harmless += 1
            assert actshuffle.testing.differences(src, dst, SEED) == [], f"bit {bit} of {path}"
    assert harmless < 20


@pytest.mark.soak
@pytest.mark.parametrize("block", range(40))
def test_flipped_bits_ten_thousand(block, src, store):
    dst = store(["none", "crc32c", "sharded_crc32c", "none"][block % 4])
    for path, bit in _flips(src, dst, 250, seed=1000 + block):
        said, named = _alarm(src, dst, path)
        assert said, f"bit {bit} of {path}"
        assert named, f"bit {bit} of {path}: {said}"


@pytest.mark.parametrize("codec", OUTPUTS)
@pytest.mark.parametrize("field", ["x", "doc"])
def test_altered_row_is_located(codec, field, src, store):
    dst = store(codec)

    def alter(rows):
        rows.view(np.uint8).reshape(len(rows), -1)[77, 1] ^= 16
        return rows

    rewrite(dst, field, alter)
    found = complaints(src, dst)
    assert list(found) == [object_of_row(dst, field, 77)]
    assert "1 row differs from its source: 77" in found.popitem()[1].detail


def test_altered_row_of_source_row_is_located(src, store):
    dst = store()

    def alter(rows):
        rows[77] += 1
        return rows

    rewrite(dst, "source_row", alter)
    assert object_of_row(dst, "source_row", 77) in complaints(src, dst)


@pytest.mark.parametrize("value", [ROWS, 2**63, 2**64 - 1])
def test_source_row_out_of_range_is_located(value, src, store):
    dst = store()

    def alter(rows):
        rows[50] = value
        return rows

    rewrite(dst, "source_row", alter)
    assert object_of_row(dst, "source_row", 50) in complaints(src, dst)


@pytest.mark.parametrize("quick", [False, True])
def test_nan_of_another_kind_is_seen(quick, tmp_path):
    data = np.full((60, 2), np.nan, "<f4")
    group(tmp_path / "src.zarr", {"x": data})
    run(tmp_path / "src.zarr", tmp_path / "dst.zarr", 1)
    dst = tmp_path / "dst.zarr"

    def alter(rows):
        rows.view("<u4")[...] ^= 1
        return rows

    rewrite(dst, "x", alter)
    assert complaints(tmp_path / "src.zarr", dst, quick=quick)


def test_signs_that_cancel_are_seen(tmp_path):
    group(tmp_path / "src.zarr", {"x": values(64, (8,), "<f8")})
    run(tmp_path / "src.zarr", tmp_path / "dst.zarr", 1)

    def alter(rows):
        rows[10, 2] *= -1
        rows[10, 5] *= -1
        return rows

    rewrite(tmp_path / "dst.zarr", "x", alter)
    assert complaints(tmp_path / "src.zarr", tmp_path / "dst.zarr")


def test_padding_that_is_not_zero_is_seen(src, store):
    dst = store()
    last = objects_of(dst, "x")[-1]
    assert ROWS % 7 == 1
    flip(last, 8 * (last.stat().st_size - 1))
    assert "zeros" in complaints(src, dst)[key_of(dst, last)].detail


# --- Rows that move, vanish or come twice -------------------------------------------------------


def swapped(rows):
    rows[[30, 90]] = rows[[90, 30]]
    return rows


def dropped(rows):
    rows[40:-1] = rows[41:].copy()
    return rows


def duplicated(rows):
    rows[41:] = rows[40:-1].copy()
    return rows


def rotated(rows):
    return np.roll(rows, 1, axis=0)


def reversed_(rows):
    return rows[::-1].copy()


def sorted_back(rows):
    back = np.empty_like(rows)
    back[order(ROWS, SEED)] = rows
    return back


CHANGES = [swapped, dropped, duplicated, rotated, reversed_, sorted_back]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_rows_moved_in_one_field(change, field, codec, src, store):
    dst = store(codec)
    rewrite(dst, field, change)
    found = complaints(src, dst)
    assert found
    assert all(where.startswith((field, "x", "doc")) for where in found), found
    assert any(where.startswith(field) for where in found) or field == "source_row"


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("quick", [False, True])
def test_rows_moved_in_all_fields_alike(change, quick, src, store):
    """Rows and their numbers agree, but the order is not that of the seed, or rows are missing."""
    dst = store()
    for field in FIELDS:
        rewrite(dst, field, change)
    if quick and change is dropped:
        pytest.skip("one row in 120: that is what the full check is for")
    if quick:  # looks at some rows only: look often enough
        assert any(complaints(src, dst, quick=True) for _ in range(500))
    else:
        assert any(where.startswith("source_row") for where in complaints(src, dst))


@pytest.mark.parametrize("change", CHANGES)
def test_rows_moved_without_source_row(change, src, tmp_path):
    dst = tmp_path / "dst.zarr"
    run(src, dst, SEED, **PLAN, source_row=False)
    assert not complaints(src, dst)
    rewrite(dst, "doc", change)
    assert any(where.startswith("doc") for where in complaints(src, dst))


@pytest.mark.parametrize("codec", OUTPUTS)
@pytest.mark.parametrize("field", FIELDS)
def test_swapped_pair_of_objects_is_located(codec, field, src, store):
    dst = store(codec)
    one, other = objects_of(dst, field)[1:3]
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    found = set(complaints(src, dst))
    if field == "source_row":
        assert any(where.startswith("source_row") for where in found)
    else:
        assert found == {key_of(dst, one), key_of(dst, other)}


@pytest.mark.parametrize("codec", ["none", "sharded"])
def test_swapped_pair_of_objects_in_all_fields_is_located(codec, src, store):
    dst = store(codec)
    for field in FIELDS:
        one, other = objects_of(dst, field)[1:3]
        if (data := one.read_bytes()) and one.stat().st_size == other.stat().st_size:
            one.write_bytes(other.read_bytes())
            other.write_bytes(data)
    assert complaints(src, dst)


def test_object_of_another_run_is_located(src, store, tmp_path):
    """A stale object, valid in itself: the same source under another seed."""
    dst = store()
    run(src, tmp_path / "other.zarr", SEED + 1, **PLAN)
    shutil.copy(tmp_path / "other.zarr/x/c.4.0", dst / "x/c.4.0")
    assert set(complaints(src, dst)) == {"x/c.4.0"}


# --- Objects that are absent or cut -------------------------------------------------------------


@pytest.mark.parametrize("codec", OUTPUTS)
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("quick", [False, True])
def test_missing_object_is_named(codec, field, quick, src, store):
    dst = store(codec)
    gone = objects_of(dst, field)[2]
    gone.unlink()
    found = complaints(src, dst, quick=quick)
    assert found[key_of(dst, gone)].kind == "missing"


@pytest.mark.parametrize("codec", OUTPUTS)
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("left", [0.0, 0.5, 0.99])
def test_truncated_object_is_named(codec, field, left, src, store):
    dst = store(codec)
    path = objects_of(dst, field)[2]
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    said, named = _alarm(src, dst, path)
    assert said
    assert named or "output rows" in said, said


@pytest.mark.parametrize(
    "name",
    [
        "zarr.json",
        "x/zarr.json",
        "source_row/zarr.json",
        "_actshuffle/digests/x/zarr.json",
        "_actshuffle/digests/doc/c.0.0",
        "_actshuffle/digests/zarr.json",
    ],
)
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_damaged_metadata_is_named(name, damage, src, store):
    dst = store()
    path = dst / name
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        flip(path, 8 * (path.stat().st_size // 2))
    assert name in complaints(src, dst)


def test_metadata_that_promises_endless_objects_is_named(src, store):
    dst = store()
    path = dst / "x/zarr.json"
    document = json.loads(path.read_text())
    document["shape"] = [ROWS, 2**60]
    path.write_text(json.dumps(document))
    report = actshuffle.verify(src, dst)
    assert report.problems[0].where == "x/zarr.json"
    assert 1000 < len(report.problems) < 1010
    assert "1,000" in report.notes[0]


def test_changed_attributes_are_named(src, store):
    dst = store()
    zarr.open_array(dst / "x", mode="r+").attrs["unit"] = "bananas"
    assert set(complaints(src, dst)) == {"x/zarr.json"}


def test_damaged_digests_do_not_hide_damaged_rows(src, store):
    dst = store()
    flip(dst / "_actshuffle/digests/x/c.0.0", 100)
    flip(dst / "x/c.3.0", 100)
    found = complaints(src, dst)
    assert {"_actshuffle/digests/x/c.0.0", "x/c.3.0"} <= set(found)


def _campaign(src, dst, rng, count, harm):
    files = [p for field in FIELDS for p in objects_of(dst, field)]
    for _ in range(count):
        path = files[rng.integers(len(files))]
        saved = {p: p.read_bytes() for p in files}
        harm(rng, files, path)
        changed = [p for p in files if not p.exists() or p.read_bytes() != saved[p]]
        assert changed, path
        said, _ = _alarm(src, dst, changed[0])
        assert said, changed
        assert any(key_of(dst, p) in said for p in changed), (changed, said)
        for p, data in saved.items():
            p.write_bytes(data)


def truncate(rng, files, path):
    path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])


def delete(rng, files, path):
    path.unlink()


def swap(rng, files, path):
    data = path.read_bytes()
    unlike = [p for p in files if p.read_bytes() != data]
    other = unlike[rng.integers(len(unlike))]
    others = other.read_bytes()
    path.write_bytes(others)
    other.write_bytes(data)


@pytest.mark.soak
@pytest.mark.parametrize("codec", OUTPUTS)
@pytest.mark.parametrize("harm", [truncate, delete, swap])
def test_truncated_deleted_swapped_a_thousand_each(codec, harm, src, store):
    _campaign(src, store(codec), np.random.default_rng(7), 200, harm)


@pytest.mark.parametrize("harm", [truncate, delete, swap])
def test_truncated_deleted_swapped_some(harm, src, store):
    _campaign(src, store("none"), np.random.default_rng(8), 20, harm)


# --- The quick check ----------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["none", "zstd", "sharded_crc32c"])
@pytest.mark.parametrize("field", FIELDS)
def test_quick_finds_what_is_wrong_with_many_rows(codec, field, src, store):
    dst = store(codec)

    def alter(rows):
        rows.view(np.uint8).reshape(len(rows), -1)[::4, 0] ^= 1
        return rows

    rewrite(dst, field, alter)
    assert complaints(src, dst, quick=True)


def test_quick_names_the_object(src, store):
    dst = store()
    data = bytearray((dst / "x/c.9.0").read_bytes())
    (dst / "x/c.9.0").write_bytes(bytes(b ^ 255 for b in data[:112]))
    found = {}
    for _ in range(30):
        found |= complaints(src, dst, quick=True)
    assert set(found) == {"x/c.9.0"}


def test_quick_sees_rows_that_are_not_where_their_rank_says(tmp_path):
    """Keys ascend and rows are genuine, but they are a sample: the first half is twice as dense."""
    group(tmp_path / "src.zarr", {"x": values(4000)}, chunks=(500,))
    run(tmp_path / "src.zarr", tmp_path / "dst.zarr", 1)
    correct = order(4000, 1)
    chosen = np.sort(np.random.default_rng(0).integers(0, 2000, 4000))
    dst = tmp_path / "dst.zarr"
    data = zarr.open_array(tmp_path / "src.zarr/x", mode="r")[...]
    rewrite(dst, "x", lambda rows: data[correct[chosen]])
    rewrite(dst, "source_row", lambda rows: correct[chosen].astype("u8"))
    assert complaints(tmp_path / "src.zarr", dst, quick=True)
    assert complaints(tmp_path / "src.zarr", dst)


# --- Not what it is said to be of ---------------------------------------------------------------


def test_wrong_source_same_shape(src, outputs, tmp_path):
    group(tmp_path / "other", {"x": values(ROWS, (4,), seed=8), "doc": values(ROWS, (), "<i4", seed=9)})
    report = actshuffle.verify(tmp_path / "other", outputs / "none")
    assert not report.ok
    assert any("has the source changed" in p.detail for p in report.problems)


@pytest.mark.parametrize("rows", [ROWS - 1, ROWS + 1])
def test_wrong_source_other_length(rows, outputs, tmp_path):
    found = complaints(source(tmp_path / "other", rows), outputs / "none")
    assert {"x", "doc"} <= set(found)
    report = actshuffle.verify(tmp_path / "other", outputs / "none")
    assert "not those of the run" in report.notes[0]


def test_wrong_source_other_dtype(outputs, tmp_path):
    group(tmp_path / "other", {"x": values(ROWS, (4,), "<i4"), "doc": values(ROWS, (), "<i4")})
    assert "dtype" in complaints(tmp_path / "other", outputs / "none")["x"].detail


def test_wrong_source_without_the_fields(outputs, tmp_path):
    group(tmp_path / "other", {"x": values(ROWS, (4,))})
    with pytest.raises(RequestError, match="doc"):
        actshuffle.verify(tmp_path / "other", outputs / "none")


def test_source_changed_since(src, outputs, tmp_path):
    copy = Path(shutil.copytree(src, tmp_path / "src"))
    flip(copy / "x/c/5/0", 77)
    report = actshuffle.verify(copy, outputs / "none")
    assert any("has the source changed" in p.detail for p in report.problems)


def test_source_damaged_since(src, outputs, tmp_path):
    copy = Path(shutil.copytree(src, tmp_path / "src"))
    (copy / "x/c/5/0").unlink()
    with pytest.raises(SourceError, match="x/c/5/0"):
        actshuffle.verify(copy, outputs / "none")


def test_another_seed_in_the_marker(src, store):
    dst = store()
    marker = dst / "_actshuffle/zarr.json"
    body = json.loads(marker.read_text())
    body["attributes"]["actshuffle"]["seed"] += 1
    marker.write_text(json.dumps(body))
    found = complaints(src, dst)
    assert "_actshuffle/zarr.json" in found
    assert any(p.kind == "order" for p in found.values())


# --- Nothing to verify --------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["split", "leaf", "publish", "marker"])
@pytest.mark.parametrize("quick", [False, True])
def test_unfinished_store_is_refused(phase, quick, src, tmp_path):
    dst = tmp_path / "dst.zarr"
    with Faults(matching(PHASES[phase], "kill")), pytest.raises(Killed):
        run(src, dst, SEED, **PLAN)
    with pytest.raises(IncompleteStoreError, match="marker"):
        actshuffle.verify(src, dst, quick=quick)


def test_store_of_somebody_else_is_refused(src, tmp_path):
    with pytest.raises(IncompleteStoreError):
        actshuffle.verify(src, src)
    with pytest.raises(IncompleteStoreError, match=r"no such store: .*nowhere"):
        actshuffle.verify(src, tmp_path / "nowhere")


def test_marker_alone_is_not_believed(src, store):
    dst = store()
    for field in FIELDS:
        shutil.rmtree(dst / field)
    report = actshuffle.verify(src, dst)
    assert not report.ok


# --- Threads and pieces ---------------------------------------------------------------------------


def damaged_everywhere(store):
    """Rows out of order at many places, rows that never were, bytes that changed, and objects that cannot be read."""

    def swap(rows):
        rows = rows.copy()
        rows[1:-1:2], rows[2::2] = rows[2::2].copy(), rows[1:-1:2].copy()
        rows[ROWS // 2 :] = ROWS  # which the source does not have
        return rows

    rewrite(store, "source_row", swap)
    rewrite(store, "x", lambda rows: np.roll(rows, 1, axis=0))
    flip(objects_of(store, "doc")[2], 40)


@pytest.mark.parametrize("codec", ["none", "crc32c", "sharded"])
@pytest.mark.parametrize("damage", [None, damaged_everywhere])
def test_report_is_the_same_however_the_work_is_divided(damage, codec, src, store, monkeypatch):
    broken = store(codec)
    if damage:
        damage(broken)
    monkeypatch.setattr(pair, "SLICE_BYTES", 200)  # a few rows
    for task, shown in ((1000, 1000), (1 << 30, 4)):
        monkeypatch.setattr(fullcheck, "TASK_BYTES", task)
        monkeypatch.setattr(fullcheck, "SHOWN", shown)
        monkeypatch.setattr(fullcheck, "PARTS", 0.001)  # a family is one task
        whole = actshuffle.verify(src, broken, executor=Serial())
        assert whole.ok == (damage is None)
        monkeypatch.setattr(fullcheck, "PARTS", 4)
        report = actshuffle.verify(src, broken, executor=Threads(3))
        assert report.problems == whole.problems
        assert (report.rows, report.checked, report.nbytes) == (whole.rows, whole.checked, whole.nbytes)


@pytest.mark.parametrize("quick", [False, True])
def test_mixing_beside_the_check_is_that_of_the_rows(quick, src, outputs, store):
    report = actshuffle.verify(src, outputs / "none", mixing=True, quick=quick)
    rows = zarr.open_array(outputs / "none" / "source_row", mode="r")[...]
    chunks = [zarr.open_array(path, mode="r").chunks[0] for path in (src / "x", outputs / "none" / "x")]
    assert report.mixing == score(rows, src_chunk_rows=chunks[0], dst_chunk_rows=chunks[1])
    broken = store("none")
    rewrite(broken, "source_row", lambda rows: np.roll(rows, 1))
    report = actshuffle.verify(src, broken, mixing=True)
    assert report.mixing is None
    assert not report.ok
