"""Writes tests/fixtures/half_done.tar.xz: one run of every kind, each killed half-way.

    python tests/make_half_done.py

Version 0.1.0 wrote it, with format 1, and it stays as it is while that format is read: test_half_done.py
resumes the runs in it.  Records of a run name absolute paths, and the identity of a job is a digest of them.  All
paths here lie below /proc/self/cwd, which is the current folder of whichever process asks, so that the records
name no machine and the runs resume from a copy in any folder.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import actshuffle
from actshuffle.testing import Faults, Killed, matching
from actshuffle.testing.stories import new_process

ARCHIVE = Path(__file__).parent / "fixtures" / "half_done.tar.xz"
HERE = Path("/proc/self/cwd")
MEMORY = Path("/dev/shm")
ROWS, CUT, SEED = 24, 14, 7  # the rows of a source, of its first part, and the seed of every order
PLAN: dict[str, Any] = {"block_bytes": 200, "run_bytes": 1, "chunk_rows": 4}
SHORT: dict[str, Any] = {**PLAN, "block_bytes": 120}
WORDS = ["[UNK]", "a", "b", "c", "d", "e", "f", "g"]


@dataclass(frozen=True)
class Case:
    """A run, the operation at which it is killed, and the rows that it writes.

    Attributes
    ----------
    start : begins or resumes the run whose output is ``NAME.zarr``; takes ``fsync`` and ``progress`` where they exist.
    stop : the first operation that matches is the one at which the run dies.
    found : tasks that a run which resumes finds done, in the level that it resumes.
    rows : numbers of the source rows that the output holds, in its order.
    """

    start: Callable[..., Any]
    stop: str
    found: int
    rows: Callable[[], Any]


def everything() -> Any:
    return actshuffle.order(ROWS, seed=SEED)


def shuffled(name: str, source: str = "all.zarr", **options: Any) -> Callable[..., Any]:
    """A shuffle of all rows."""

    def start(**watching: Any) -> Any:
        return actshuffle.shuffle(HERE / source, HERE / f"{name}.zarr", seed=SEED, **{**PLAN, **options}, **watching)

    return start


def sampled(**watching: Any) -> Any:
    return actshuffle.sample(HERE / "all.zarr", CUT, HERE / "sample.zarr", seed=SEED, **SHORT, **watching)


def cut(*, progress: Any = None, fsync: bool = True) -> Any:
    return actshuffle.split(HERE / "shuffled.zarr", {"cut.zarr": CUT}, folder=HERE, copy=True, progress=progress)


def imported(**watching: Any) -> Any:
    files = [HERE / "files" / f"{name}.npy" for name in ("x", "doc")]
    return actshuffle.import_store(files, HERE / "import.zarr", **SHORT, **watching)


def appended(name: str) -> Callable[..., Any]:
    def start(**watching: Any) -> Any:
        out = HERE / f"{name}.zarr"
        return actshuffle.append(HERE / "first_shuffled.zarr", HERE / "second.zarr", out, **SHORT, **watching)

    return start


def collected(**watching: Any) -> Any:
    model, text, out = str(HERE / "model"), [HERE / "text"], HERE / "collect.zarr"
    return actshuffle.collect(model, text, out, layers=[1], context=4, block_bytes=100, chunk_rows=4, **watching)


LEAF_1, LEAF_2 = "put _actshuffle/receipts/1.json", "put _actshuffle/receipts/2.json"
CODED: dict[str, Any] = {"codec": "crc32c", "chunks_per_shard": 2}
CASES = {
    "level_1": Case(shuffled("level_1", levels=2), "put level1/receipts/2.json", 2, everything),
    "level_2": Case(shuffled("level_2", levels=2), LEAF_1, 1, everything),
    "level_2_of_3": Case(shuffled("level_2_of_3", levels=3, **CODED), "put level2/receipts/2.json", 2, everything),
    "spill_memory": Case(
        shuffled("spill_memory", levels=2, spill_memory=600), "put level1/receipts/2.json", 2, everything
    ),
    "gather": Case(shuffled("gather", gather=True), LEAF_1, 1, everything),
    "concat": Case(shuffled("concat", "both", levels=2, codec="zstd", source_row=False), LEAF_1, 1, everything),
    "sample": Case(sampled, LEAF_1, 1, lambda: everything()[:CUT]),
    "cut": Case(cut, "put _actshuffle/digests/zarr.json", 0, lambda: everything()[:CUT]),
    "import": Case(imported, LEAF_2, 2, lambda: np.arange(ROWS)),
    "append_sorting": Case(appended("append_sorting"), LEAF_1, 1, everything),
    "append_merging": Case(appended("append_merging"), LEAF_2, 2, everything),
    "collect": Case(collected, LEAF_1, 1, lambda: np.arange(ROWS)),
}


# --- Sources --------------------------------------------------------------------------------------------------


def values() -> dict[str, Any]:
    """Two fields of the source rows."""
    return {"x": np.random.default_rng(SEED).random((ROWS, 3), "f4"), "doc": np.arange(ROWS, dtype="<i2") // 5}


def write_store(path: Path, start: int, stop: int) -> None:
    """Some of the source rows as a plain Zarr group."""
    group = zarr.create_group(path, attributes={"model": "tiny"})
    for name, data in values().items():
        array = data[start:stop]
        group.create_array(name, data=array, chunks=(9, *data.shape[1:]), compressors=None)


def write_model(folder: Path) -> None:
    """A small model whose tokenizer has one word per token."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    torch.manual_seed(SEED)
    GPT2Model(GPT2Config(vocab_size=len(WORDS), n_embd=2, n_layer=1, n_head=1, n_positions=8)).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained(folder)


def set_times(folder: Path) -> None:
    """Set the modification times of plain files, which imports and collections record, as a checkout changes them."""
    for path in (*folder.glob("files/*"), *folder.glob("text/*")):
        os.utime(path, (1_700_000_000, 1_700_000_000))


def write_sources(folder: Path) -> None:
    """Write the stores and files that the runs read, all but the model, into the current folder."""
    for name, start, stop in (("all", 0, ROWS), ("first", 0, CUT), ("second", CUT, ROWS)):
        write_store(folder / f"{name}.zarr", start, stop)
    (folder / "files").mkdir()
    (folder / "text").mkdir()
    for name, data in values().items():
        np.save(folder / "files" / f"{name}.npy", data)
    (folder / "text" / "words.txt").write_text(" ".join(WORDS[1 + n % 7] for n in range(ROWS)))
    set_times(folder)
    actshuffle.concat([HERE / "first.zarr", HERE / "second.zarr"], HERE / "both", renumber=False)
    for source, output in (("all", "shuffled"), ("first", "first_shuffled")):
        actshuffle.shuffle(HERE / f"{source}.zarr", HERE / f"{output}.zarr", seed=SEED, **PLAN)


# --- Stopped runs ---------------------------------------------------------------------------------------------


def stop(case: Case, **options: Any) -> None:
    """Begin a run and kill it; this process then continues as a new one would."""
    with Faults(matching(case.stop, "kill")) as faults, suppress(Killed):
        case.start(fsync=False, **options)
    assert faults.dead, f"no operation matched {case.stop!r}"
    new_process()


def pack(folder: Path) -> None:
    """Pack the files of a folder as the fixture, without any trace of their owner."""
    with tarfile.open(ARCHIVE, "w:xz") as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = tarfile.TarInfo(str(path.relative_to(folder)))
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                archive.addfile(entry, file)


def packed() -> dict[str, bytes]:
    """The fixture's files by path."""
    with tarfile.open(ARCHIVE) as archive:
        return {entry.name: file.read() for entry in archive.getmembers() if (file := archive.extractfile(entry))}


def unpack(folder: Path) -> None:
    """Unpack the fixture's files into a folder."""
    for key, data in packed().items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    set_times(folder)


def main() -> None:
    before = set(MEMORY.glob("actshuffle-*"))
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        write_sources(Path(name))
        write_model(Path(name, "model"))
        for case in CASES.values():
            stop(case)
        for kept in set(MEMORY.glob("actshuffle-*")) - before:  # its name has the user's number in it
            shutil.copytree(kept, Path(name, "memory", kept.name.rsplit("-", 1)[1]))
            shutil.rmtree(kept)
        pack(Path(name))
    sys.stdout.write(f"{ARCHIVE}: {ARCHIVE.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
