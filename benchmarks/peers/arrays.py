"""Peers that read and write Zarr arrays, and actshuffle itself."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from benchmarks.peers import Work

K_JOB_BYTES = 256 << 20  # bytes of rows that one of the K jobs keeps, where no memory is given


def ours(work: Work, **way: Any) -> None:
    """The default, which chooses the way itself, or a way that is forced."""
    import actshuffle

    each = None if work.memory is None else work.memory // work.workers
    actshuffle.shuffle(work.source, work.target, seed=work.seed, workers=work.workers, memory=each, **way)


def ours_in_memory(work: Work) -> None:
    """As with numpy, the rows are in memory once, on top of the workers' memory."""
    ours(work, spill_memory=work.nbytes + work.nbytes // 8)  # keys and row numbers travel with them


def ours_in_levels(work: Work) -> None:
    """Two passes over the disk, as where nothing fits into memory."""
    ours(work, levels=2, spill_memory=0)


def ours_gathered(work: Work) -> None:
    """One pass, from the page cache, which has room for the source, as numpy's memory has."""
    ours(work, gather=True)


def copied(work: Work) -> None:
    """The same files, row by row as they were: our own copier, which the shuffle is measured against."""
    import shutil

    from benchmarks.copier import Copier
    from benchmarks.copier import Work as Copying
    from benchmarks.sources import chunk_keys

    source, target = Path(work.source), Path(work.target)
    keys = tuple(chunk_keys(source))
    with Copier(work.workers) as copier:
        copier.seconds(Copying("copy", source, target, keys, (source / keys[0]).stat().st_size, True, 2))
    shutil.copyfile(source / "zarr.json", target / "zarr.json")


def in_memory(work: Work) -> None:
    rows = np.asarray(zarr.open_array(work.source, mode="r")[:])
    np.random.default_rng(work.seed).shuffle(rows)
    _output(work)[:] = rows


def fancy_indexing(work: Work) -> None:
    source, target, order = zarr.open_array(work.source, mode="r"), _output(work), _order(work)
    for start in range(0, work.rows, work.chunk_rows):
        part = slice(start, min(start + work.chunk_rows, work.rows))
        target[part] = source.oindex[order[part]]


def k_jobs(work: Work) -> None:
    """Job j reads all rows, keeps those of its share of the output, and writes it."""
    keep = max(1, (work.memory or work.workers * K_JOB_BYTES) // work.workers // 2)
    jobs = max(work.workers, -(-work.nbytes // keep))
    _output(work)
    chunks = -(-work.rows // work.chunk_rows)
    edges = [min(j * chunks // jobs * work.chunk_rows, work.rows) for j in range(jobs)] + [work.rows]
    shares = [(a, b) for a, b in pairwise(edges) if a < b]
    with ProcessPoolExecutor(work.workers, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(partial(_one_job, work), shares):
            pass


def _one_job(work: Work, share: tuple[int, int]) -> None:
    start, stop = share
    place = np.empty(work.rows, np.int64)
    place[_order(work)] = np.arange(work.rows)
    source, target = zarr.open_array(work.source, mode="r"), zarr.open_array(work.target, mode="r+")
    kept = np.empty((stop - start, *source.shape[1:]), source.dtype)
    for first in range(0, work.rows, work.chunk_rows):
        to = place[first : first + work.chunk_rows]
        mine = np.flatnonzero((to >= start) & (to < stop))
        rows = np.asarray(source[first : first + work.chunk_rows])
        kept[to[mine] - start] = rows[mine]
    with zarr.config.set({"array.write_empty_chunks": True}):
        target[start:stop] = kept


def dask_take(work: Work) -> None:
    _dask(work, lambda x: x[_order(work)])


def dask_shuffle(work: Work) -> None:
    def shuffled(x: Any) -> Any:
        order, step = _order(work), work.chunk_rows
        return x.shuffle([order[a : a + step].tolist() for a in range(0, work.rows, step)], axis=0)

    _dask(work, shuffled)


def _dask(work: Work, shuffled: Any) -> None:
    import dask.array as da
    from distributed import Client, LocalCluster

    limit = "auto" if work.memory is None else work.memory // work.workers
    with (
        LocalCluster(
            n_workers=work.workers,
            threads_per_worker=1,
            memory_limit=limit,
            dashboard_address="127.0.0.1:0",
            local_directory=str(Path(work.target).parent),
        ) as cluster,
        Client(cluster),
    ):
        target = _output(work)
        y = shuffled(da.from_zarr(work.source)).rechunk((work.chunk_rows, -1))
        da.store(y, target, lock=False)


def _order(work: Work) -> Any:
    return np.random.default_rng(work.seed).permutation(work.rows)


def _output(work: Work) -> zarr.Array[Any]:
    width = work.row_bytes // 8
    return zarr.create_array(
        work.target,
        shape=(work.rows, width),
        dtype="<u8",
        chunks=(work.chunk_rows, width),
        compressors=None,
        config={"write_empty_chunks": True},
    )
