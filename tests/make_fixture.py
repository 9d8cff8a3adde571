"""Writes tests/fixtures/formatN, stores in this version's format, which every later version must open.

    python tests/make_fixture.py

Run it once per format, and never again for one that was released: test_format.py reads what it wrote.
The half-done run lives in fsspec's memory filesystem, so that no machine's paths are in its records.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import fsspec
import zarr

import actshuffle
from actshuffle.arrays.names import FORMAT
from actshuffle.testing import Faults, Killed, matching
from support.stores import array, values

FOLDER = Path(__file__).parent / "fixtures" / f"format{FORMAT}"
URL = "memory://actshuffle-fixture"
SEED, ROWS = 7, 24
PLAN = {"levels": 3, "block_bytes": 160, "run_bytes": 1, "chunk_rows": 4}
STOP = "put _actshuffle/receipts/2.json"


def write_source(path: Path) -> None:
    """Two arrays of 24 rows: few bytes, and every kind of attribute and array that a group may hold."""
    zarr.create_group(path, attributes={"model": "tiny", "layer": 3})
    array(path, values(ROWS, (3,), "<f4"), "x", chunks=(9, 3), attributes={"unit": "nats"})
    array(path, values(ROWS, (), "<i2"), "doc", chunks=(9,), dimension_names=["row"])


def upload(folder: Path, url: str) -> None:
    """Copy a folder into the memory filesystem."""
    files = fsspec.filesystem("memory")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files.pipe(f"{url}/{path.relative_to(folder)}", path.read_bytes())


def download(url: str, folder: Path) -> None:
    """Every file under a URL of the memory filesystem."""
    files = fsspec.filesystem("memory")
    for name in files.find(url):
        path = folder / name.split("/", 2)[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files.cat(name))


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    write_source(FOLDER / "src")
    upload(FOLDER / "src", f"{URL}/src")
    settings = {"seed": SEED, **PLAN}
    actshuffle.shuffle(f"{URL}/src", f"{URL}/finished", **settings)
    with Faults(matching(STOP, "kill")), suppress(Killed):
        actshuffle.shuffle(f"{URL}/src", f"{URL}/half_done", **settings)
    download(URL, FOLDER)
    size = sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file())
    print(f"{FOLDER}: {sum(p.is_file() for p in FOLDER.rglob('*'))} files, {size:,} bytes")


if __name__ == "__main__":
    main()
