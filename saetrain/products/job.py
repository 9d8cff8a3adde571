"""The job of `saetrain interactions`: products of panels, joined tables, energies, and a finished Zarr store.

::

    gram     chunk of rows        the Gram matrix and the sum of a chunk of A, or of B
    total    a side               ... of all its chunks, in order
    panel    panel of A x of B    the k best of these rows and of these columns
    merge    chunk of the store   joined tables, energies and sums of 16,384 rows, or columns: chunks of the arrays
    publish                       zarr.json of every array and of the group; scratch goes
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actshuffle.executors import check_memory
from actshuffle.jobs import FolderJob, FolderTask, Outcome, Step, run_in_folder
from actshuffle.units import counted
from saetrain.errors import ConfigError
from saetrain.products import scratch
from saetrain.products.energy import Gram, gram
from saetrain.products.layout import HALVES, arrays_of, attributes, described
from saetrain.products.matrices import open_side, read_matrix
from saetrain.products.productplan import ProductPlan, as_plan, make_plan
from saetrain.products.tiles import COLUMNS, Kept, add_tile
from saetrain.products.zarrays import group_metadata

NAME = "interactions"
PRODUCTS = ("encoder-decoder", "decoder-encoder", "decoder-decoder", "encoder-encoder")


def interactions(
    a: str | Path,
    b: str | Path,
    out: str | Path,
    *,
    product: str = "encoder-decoder",
    through: str | Path | None = None,
    cosine: bool = False,
    k: int = 32,
    smallest: bool = True,
    thresholds: Sequence[float] = (),
    drop_same: bool = False,
    memory: int = 1 << 30,
    panel: int | None = None,
    device: str = "cpu",
    **how: Any,
) -> Outcome:
    """Write the largest entries of w = A M B^T to the store `out`, and what share of every row and column they hold.

    The same call resumes a job that was stopped.  Read the result with `open_interactions`.

    Parameters
    ----------
    a, b : runs, checkpoints, folders of SAELens or sparsify, or files .npy or .safetensors of one matrix [rows, width].
    product : which rows of a and b meet; "encoder-decoder" gives the direct path from the decoder rows of b, of an
        earlier layer, into the encoder rows of a.
    through : a file with the matrix M [width of a, width of b] between them, as an attention head's output-value map.
    cosine : divide rows by their norms first (after M for those of b, if there is one).
    k : entries kept of each row and each column.
    smallest : keep the k smallest too.
    thresholds : count entries w with abs(w) above each.
    drop_same : leave out w_ii, for the product of a dictionary with itself.
    memory : bytes that one task may use.
    panel : rows of a task, a multiple of 1024; by default as many as fit the memory, at most 65,536.
    device : where matrices are multiplied; arrays have the same bits for any panel, executor and number of workers of
        one kind of device.
    how : `executor`, `progress`, `overwrite`, `fsync`, `storage_options` of `actshuffle.jobs.run_in_folder`.

    Raises
    ------
    ConfigError : the shapes do not fit, or the task does not fit the memory; nothing is written.
    DataError : a matrix is unreadable, or holds a number that is not finite.
    """
    given: dict[str, Any] = {"product": product, "through": through, "cosine": cosine, "k": k, "smallest": smallest}
    given |= {"thresholds": thresholds, "drop_same": drop_same, "memory": memory, "panel": panel, "device": device}
    check_memory(how.get("executor"), memory)
    return run_plan(plan_interactions(a, b, **given), product, out, **how)


def run_plan(plan: ProductPlan, product: str, out: str | Path, **how: Any) -> Outcome:
    """Run the job of a plan."""
    check_room(plan, out)
    steps = [
        Step("gram", write_gram, sum(plan.grams), scratch.is_there),
        Step("total", write_total, 2, scratch.is_there),
        Step("panel", write_panel, plan.panels[0] * plan.panels[1], scratch.is_there),
        Step("merge", write_merged, sum(plan.chunks), scratch.is_there),
    ]
    return run_in_folder(NAME, out, plan.settings() | {"product": product}, steps, publish=publish, **how)


def plan_interactions(
    a: str | Path,
    b: str | Path,
    *,
    product: str = "encoder-decoder",
    through: str | Path | None = None,
    cosine: bool = False,
    **settings: Any,
) -> ProductPlan:
    """The plan of `interactions`; reads the sides' headers and digests, and writes nothing."""
    if product not in PRODUCTS:
        raise ConfigError(f"product must be one of {', '.join(PRODUCTS)}, got {product!r}")
    left, right = (open_side(path, part, cosine) for path, part in zip((a, b), product.split("-"), strict=True))
    between = None if through is None else open_side(through)
    if between is not None and between.part != "matrix":
        raise ConfigError(f"through must name a .npy or .safetensors file, got {through}")
    if settings.get("thresholds") is not None:
        settings["thresholds"] = tuple(float(t) for t in settings["thresholds"])
    return make_plan(left, right, through=between, **settings)


def check_room(plan: ProductPlan, out: str | Path) -> None:
    """Refuse a job whose scratch and store do not fit the disk of `out`; a URL's room is not known."""
    folder = Path(out).absolute()
    if "://" in str(out):
        return
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    while not folder.exists():
        folder = folder.parent
    sizes, free = plan.sizes(), shutil.disk_usage(folder).free
    if (needed := sizes.scratch + sizes.store - there) > free:
        raise ConfigError(
            f"{out} needs {counted(sizes.scratch, 'byte')} of scratch and {sizes.store:,} of results, "
            f"{needed:,} more than "
            f"there are, and the disk has {free:,} free: larger panels (--memory, --panel) or a smaller --k need less"
        )


# --- Rows of the two sides ----------------------------------------------------------------------


class Sides:
    """Tiles of A, and of B after the map, on the plan's device."""

    def __init__(self, plan: ProductPlan) -> None:
        self.plan = plan
        self.between = None if plan.through is None else read_matrix(plan.through.path).T.contiguous().to(plan.device)
        # Cosines are of rows as they meet: B is normalised after the map.
        self.b = plan.b if self.between is None else replace(plan.b, unit=False)

    def tile(self, half: int, start: int) -> Tensor:
        """At most COLUMNS rows of A (half 0) or B (half 1)."""
        if half == 0:
            return self.plan.a.tile(start).to(self.plan.device)
        rows = self.b.tile(start).to(self.plan.device)
        if self.between is None:
            return rows
        mapped = rows.new_zeros(COLUMNS, rows.shape[1])
        mapped[: len(rows)] = rows
        rows = (mapped @ self.between)[: len(rows)]
        return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30) if self.plan.b.unit else rows

    def tiles(self, half: int, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        stop = min(stop, self.plan.shape[half])
        return ((at, self.tile(half, at)) for at in range(start, stop, COLUMNS))


# --- Tasks --------------------------------------------------------------------------------------


def write_gram(job: FolderJob, task: FolderTask) -> tuple[dict[str, Any], int]:
    """The Gram matrix of one chunk of A, or of B."""
    plan = plan_of(job)
    half, number = _split(task.number, plan.grams)
    start = number * plan.gram_rows
    tiles = (rows for _, rows in Sides(plan).tiles(half, start, start + plan.gram_rows))
    return _put_gram(job, f"gram/{HALVES[half]}/{number}", gram(tiles, plan.a.width, plan.device))


def write_total(job: FolderJob, task: FolderTask) -> tuple[dict[str, Any], int]:
    """The Gram matrix of A, or of B."""
    plan, name = plan_of(job), HALVES[task.number]
    found = scratch.get_gram(job, f"gram/{name}/0")
    for number in range(1, plan.grams[task.number]):
        found = found.plus(scratch.get_gram(job, f"gram/{name}/{number}"))
    return _put_gram(job, f"total/{name}", found)


def _put_gram(job: FolderJob, name: str, found: Gram) -> tuple[dict[str, Any], int]:
    key, size = scratch.put(job, name, {"matrix": found.matrix, "total": found.total})
    return {"keys": [key]}, size


def write_panel(job: FolderJob, task: FolderTask) -> tuple[dict[str, Any], int]:
    """Tables of the rows and columns of one pair of panels, cut at the chunks of the store."""
    plan = plan_of(job)
    sides, panels = Sides(plan), divmod(task.number, plan.panels[1])
    starts = [number * plan.panel for number in panels]
    stops = [min(start + plan.panel, size) for start, size in zip(starts, plan.shape, strict=True)]
    rows, columns = (
        Kept.empty(stops[half] - starts[half], plan.k_of(half), plan.smallest, len(plan.thresholds), plan.device)
        for half in (0, 1)
    )
    a = torch.empty(stops[0] - starts[0], plan.a.width, device=plan.device)
    for at, tile in sides.tiles(0, starts[0], stops[0]):
        a[at - starts[0] : at - starts[0] + len(tile)] = tile
    for at, b in sides.tiles(1, starts[1], stops[1]):
        add_tile(rows, a, starts[0], columns, b, at, at - starts[1], plan.thresholds, plan.drop_same)
    keys, nbytes = [], 0
    for half, kept in enumerate((rows, columns)):
        start, stop = starts[half], stops[half]
        for chunk in range(start // plan.chunk, (stop - 1) // plan.chunk + 1):
            mine = slice(max(chunk * plan.chunk - start, 0), min((chunk + 1) * plan.chunk, stop) - start)
            part = {name: tensor[mine] for name, tensor in scratch.tensors_of(kept).items()}
            key, size = scratch.put(job, _part(half, chunk, panels[half], panels[1 - half]), part)
            keys.append(key)
            nbytes += size
    return {"keys": keys}, nbytes


def _part(half: int, chunk: int, mine: int, other: int) -> str:
    """The tables of a chunk's rows (or columns) that lie in panel `mine`, over panel `other` of the other side."""
    return f"panel/{HALVES[half]}/{chunk}/{mine}-{other}"


def write_merged(job: FolderJob, task: FolderTask) -> tuple[dict[str, Any], int]:
    """One chunk of every array of the rows, or of the columns."""
    plan = plan_of(job)
    half, chunk = _split(task.number, plan.chunks)
    start, stop = chunk * plan.chunk, min((chunk + 1) * plan.chunk, plan.shape[half])
    kept = Kept.empty(stop - start, plan.k_of(half), plan.smallest, len(plan.thresholds))
    for mine in range(start // plan.panel, (stop - 1) // plan.panel + 1):
        at = max(mine * plan.panel, start) - start
        for other in range(plan.panels[1 - half]):  # ascending, as `Table.offer` asks
            scratch.join(kept, at, scratch.get(job, _part(half, chunk, mine, other)))
    sides, others = Sides(replace(plan, device="cpu")), scratch.get_gram(job, f"total/{HALVES[1 - half]}")
    whole = [_whole(sides, others, half, at, rows) for at, rows in sides.tiles(half, start, stop)]
    energy, total = (torch.cat(parts) for parts in zip(*whole, strict=True))
    values = described(kept, energy, total)
    keys, nbytes = [], 0
    for array in arrays_of(plan, half):
        key, data = array.encoded(chunk, values[array.name.partition("/")[2]])
        job.objects.put(key, data)
        keys.append(key)
        nbytes += len(data)
    held = float((values["kept"] * values["energy"]).sum())
    return {"keys": keys, "kept": held, "energy": float(energy.sum())}, nbytes


def _whole(sides: Sides, others: Gram, half: int, at: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Energy and sum of whole rows, or columns, of the product."""
    energy, total = others.whole(rows)
    if sides.plan.drop_same:
        same = (rows.double() * sides.tile(1 - half, at).double()).sum(1)
        energy, total = (energy - same.square()).clamp_min(0), total - same
    return energy, total


def publish(job: FolderJob) -> dict[str, Any]:
    """Make the arrays readable; returns the share of each side's energy that is kept."""
    plan, results = plan_of(job), list(job.results("merge"))
    shares = {}
    for half, name in enumerate(HALVES):
        mine = results[: plan.chunks[0]] if half == 0 else results[plan.chunks[0] :]
        energy = sum(result["energy"] for result in mine)
        shares[name] = sum(result["kept"] for result in mine) / energy if energy else 1.0
        for array in arrays_of(plan, half):
            job.objects.put(*array.metadata())
        for group in (name, f"{name}/top", *([f"{name}/bottom"] if plan.smallest else [])):
            job.objects.put(f"{group}/zarr.json", group_metadata({}))
    job.objects.put("zarr.json", group_metadata(attributes(plan, job.settings["product"])))
    job.objects.delete_prefix(scratch.SCRATCH)
    return {"rows": plan.shape[0], "columns": plan.shape[1], "kept": shares}


def plan_of(job: FolderJob) -> ProductPlan:
    return as_plan({name: value for name, value in job.settings.items() if name != "product"})


def _split(number: int, counts: tuple[int, int]) -> tuple[int, int]:
    """Task `number` of both sides' tasks in order: its side, and its number there."""
    return (0, number) if number < counts[0] else (1, number - counts[0])
