"""Other tools that shuffle.  Each peer is a plain function that runs in a separate process.

Only `driver` imports actshuffle at module level, so that a peer can run under another Python
(``--python annbatch /some/venv/bin/python``).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

IMPORTS = {"mosaicml-streaming": "streaming"}  # packages that are imported by another name


@dataclass(frozen=True)
class Work:
    """The work of a peer: write the rows of ``source`` to ``target`` in random order.

    ``memory`` is the total in bytes, or None for the peer's default; ``workers`` counts processes or threads.
    """

    source: str
    target: str
    rows: int
    row_bytes: int
    chunk_rows: int
    workers: int
    memory: int | None
    seed: int

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Peer:
    """One row of the table.

    ``source`` and ``target`` are formats (formats.py); sources other than Zarr are made before the clock
    starts.  ``exact`` is True if the peer's design makes every order equally likely, given ideal random bits;
    ``why`` gives the reason in a few words.
    """

    title: str
    module: str
    function: str
    packages: tuple[str, ...]
    exact: bool
    why: str
    source: str = "zarr"
    target: str = "zarr"


PEERS: dict[str, Peer] = {
    "actshuffle": Peer("actshuffle", "arrays", "ours", ("actshuffle", "zarr"), True, "order of 128-bit keys"),
    "actshuffle-levels": Peer(
        "actshuffle, two levels through the disk",
        "arrays",
        "ours_in_levels",
        ("actshuffle", "zarr"),
        True,
        "order of 128-bit keys",
    ),
    "actshuffle-memory": Peer(
        "actshuffle, its spill in memory",
        "arrays",
        "ours_in_memory",
        ("actshuffle", "zarr"),
        True,
        "order of 128-bit keys",
    ),
    "actshuffle-gather": Peer(
        "actshuffle, rows from the page cache",
        "arrays",
        "ours_gathered",
        ("actshuffle", "zarr"),
        True,
        "order of 128-bit keys",
    ),
    "command": Peer(
        "actshuffle run SRC DST", "", "", ("actshuffle", "zarr"), True, "order of 128-bit keys"
    ),  # no other option, and start-up included
    "copy": Peer("a copy, as the rows are", "arrays", "copied", ("actshuffle", "zarr"), False, "no shuffle"),
    "numpy": Peer("numpy, all in memory", "arrays", "in_memory", ("numpy", "zarr"), True, "a permutation"),
    "k-jobs": Peer("K jobs that each read everything", "arrays", "k_jobs", ("numpy", "zarr"), True, "a permutation"),
    "zarr": Peer("zarr fancy indexing", "arrays", "fancy_indexing", ("numpy", "zarr"), True, "a permutation"),
    "dask-take": Peer(
        "dask.array x[order]", "arrays", "dask_take", ("dask", "distributed", "zarr"), True, "a permutation"
    ),
    "dask-shuffle": Peer(
        "dask.array.shuffle", "arrays", "dask_shuffle", ("dask", "distributed", "zarr"), True, "a permutation"
    ),
    "ray": Peer(
        "Ray Data random_shuffle",
        "tables",
        "ray_data",
        ("ray", "pyarrow"),
        False,
        "equal slices of every block, one seed in all reducers",
        "parquet",
        "parquet",
    ),
    "huggingface": Peer(
        "Hugging Face shuffle + flatten_indices",
        "tables",
        "hugging_face",
        ("datasets", "pyarrow"),
        True,
        "a permutation",
        "arrow",
        "arrow",
    ),
    "duckdb": Peer(
        "DuckDB order by random()",
        "tables",
        "duck_db",
        ("duckdb",),
        True,
        "but for ties of random()",
        "parquet",
        "parquet",
    ),
    "polars": Peer(
        "Polars sample(shuffle=True)",
        "tables",
        "polars_sample",
        ("polars",),
        True,
        "a permutation",
        "parquet",
        "parquet",
    ),
    "spark": Peer(
        "Spark orderBy(rand())", "tables", "spark", ("pyspark",), True, "but for ties of rand()", "parquet", "parquet"
    ),
    "mosaicml": Peer(
        "MosaicML streaming, py1e",
        "loaders",
        "mosaic",
        ("mosaicml-streaming",),
        False,
        "within blocks of shards, while reading",
        "mds",
        "rows",
    ),
    "annbatch": Peer(
        "annbatch",
        "loaders",
        "annbatch",
        ("annbatch", "anndata"),
        False,
        "runs of 1,000 rows shuffled, then rows in memory",
        "h5ad",
        "annbatch",
    ),
}


def versions(name: str) -> dict[str, str]:
    """Versions of a peer's packages; actshuffle run from a checkout has none."""
    found = {}
    for package in PEERS[name].packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "of this checkout"
    return found
