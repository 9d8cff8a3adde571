"""The same rows in each peer's format, and the row numbers of a peer's output.

A table has a column ``row``, the number, and ``data``, the row's bytes; nothing is compressed, since
rows are random bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def blocks(source: Path) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """Chunks of the Zarr source: first row, and rows as uint64 words, number first."""
    import zarr

    array = zarr.open_array(source, mode="r")
    step = array.chunks[0]
    for start in range(0, array.shape[0], step):
        yield start, np.asarray(array[start : start + step])


def write(kind: str, source: Path, target: Path) -> None:
    """The Zarr source as another format."""
    {"parquet": _parquet, "arrow": _arrow, "mds": _mds, "h5ad": _h5ad}[kind](source, target)


def read_order(kind: str, target: Path) -> NDArray[np.int64]:
    """Row numbers in the order in which a peer wrote them."""
    reader = {
        "zarr": _zarr_order,
        "parquet": _parquet_order,
        "arrow": _arrow_order,
        "rows": _rows_order,
        "annbatch": _annbatch_order,
    }[kind]
    return reader(target).astype(np.int64)


def _table(words: NDArray[np.uint64]) -> Any:
    import pyarrow as pa

    width = words.shape[1] * 8
    data = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(words), [None, pa.py_buffer(np.ascontiguousarray(words))]
    )
    # Engines without a type of fixed width take plain bytes.
    return pa.table({"row": words[:, 0].astype(np.int64), "data": data.cast(pa.large_binary())})


def _parquet(source: Path, target: Path) -> None:
    import pyarrow.parquet as pq

    target.mkdir(parents=True)
    for number, (_, words) in enumerate(blocks(source)):
        pq.write_table(
            _table(words),
            target / f"part-{number:06}.parquet",
            compression="none",
            use_dictionary=False,
            write_statistics=False,
        )


def _arrow(source: Path, target: Path) -> None:
    import pyarrow as pa
    from datasets import Dataset

    target.mkdir(parents=True)
    file = target / "rows.arrow"
    writer = None
    with file.open("wb") as out:
        for _, words in blocks(source):
            table = _table(words)
            writer = writer or pa.ipc.new_stream(out, table.schema)
            writer.write_table(table, max_chunksize=1000)
        if writer:
            writer.close()
    assert len(Dataset.from_file(str(file)))


def _mds(source: Path, target: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(target), columns={"row": "int", "data": "bytes"}, size_limit=1 << 25) as out:
        for _, words in blocks(source):
            for row in words:
                out.write({"row": int(row[0]), "data": row.tobytes()})


def _h5ad(source: Path, target: Path) -> None:
    import anndata
    import pandas as pd
    import zarr

    words = np.asarray(zarr.open_array(source, mode="r")[:])
    target.mkdir(parents=True)
    table = anndata.AnnData(
        X=words.view(np.float32), obs=pd.DataFrame({"row": words[:, 0].astype(np.int64)}, index=words[:, 0].astype(str))
    )
    table.write_h5ad(target / "rows.h5ad")


def _zarr_order(target: Path) -> NDArray[Any]:
    import zarr

    node = zarr.open(target, mode="r")
    if isinstance(node, zarr.Group):
        node = node["data"]
    assert isinstance(node, zarr.Array)
    step = node.chunks[0]
    return np.concatenate([np.asarray(node[a : a + step])[:, 0].copy() for a in range(0, node.shape[0], step)])


def _parquet_order(target: Path) -> NDArray[Any]:
    import pyarrow.parquet as pq

    files = sorted(target.glob("*.parquet"))
    return np.concatenate([pq.read_table(f, columns=["row"])["row"].to_numpy() for f in files])


def _arrow_order(target: Path) -> NDArray[Any]:
    from datasets import Dataset

    found = []
    for file in sorted(target.glob("*.arrow")):
        data = Dataset.from_file(str(file)).data.column("row")
        found += [chunk.to_numpy() for chunk in data.chunks]
    return np.concatenate(found)


def _rows_order(target: Path) -> NDArray[Any]:
    width = int((target / "row_bytes").read_text())
    return np.memmap(target / "rows", np.uint64, "r").reshape(-1, width // 8)[:, 0].copy()


def _annbatch_order(target: Path) -> NDArray[Any]:
    from annbatch import DatasetCollection

    found: NDArray[Any] = DatasetCollection(str(target), mode="r").obs(["row"])["row"].to_numpy()
    return found
