"""Peers that shuffle while they load, or that write stores for a loader."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.peers import Work


def mosaic(work: Work) -> None:
    """One epoch of a shuffled stream, written in the order of arrival."""
    from streaming import StreamingDataset

    target = Path(work.target)
    target.mkdir(parents=True)
    (target / "row_bytes").write_text(str(work.row_bytes))
    data = StreamingDataset(local=work.source, shuffle=True, shuffle_seed=work.seed, batch_size=1, shuffle_algo="py1e")
    with (target / "rows").open("wb", buffering=1 << 22) as out:
        for sample in data:
            out.write(sample["data"])


def annbatch(work: Work) -> None:
    from annbatch import DatasetCollection

    settings = {} if work.memory is None else {"dataset_size": max(1000, work.memory // work.row_bytes // 2)}
    DatasetCollection(work.target).add_adatas(
        [Path(work.source, "rows.h5ad")],
        n_obs_per_chunk=min(64, work.rows),
        rng=np.random.default_rng(work.seed),
        zarr_compressor=(),
        **settings,
    )
