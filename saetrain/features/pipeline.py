"""`build_features`: the plan, the steps, and the end of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from actshuffle import Dataset, open_dataset, watch
from actshuffle.errors import ConservationError, SourceError
from actshuffle.executors import Executor, check_memory
from actshuffle.jobs import FolderJob, Outcome, Step, read_done, run_in_folder
from actshuffle.progress import Progress
from actshuffle.units import counted
from saetrain.compute.devices import settled
from saetrain.config import Config
from saetrain.data import DOCUMENT_NAMES, GRADIENTS, Store
from saetrain.describing.slots import QUANTILES, Slots
from saetrain.errors import ConfigError, DataError
from saetrain.features import contrast, encode, layout, pairs, product, survey
from saetrain.features.blueprint import Plan
from saetrain.features.codes import MOST_BLOCK_ROWS
from saetrain.features.collate import collate_in
from saetrain.features.collate import is_there as is_collated
from saetrain.features.dictionary import Dictionary
from saetrain.features.forecast import active_entries, check, encode_memory, forecast, most_entries
from saetrain.features.keeping import keep_by_row, rows_are_there
from saetrain.features.pairs import PAIR_ENTRIES, PAIR_ROWS, PAIRS
from saetrain.products import scratch
from saetrain.products.lens import open_lens
from saetrain.settings import split_names

NAME = "features"
TOKEN_NAMES = ("token", "tokens", "token_id", "token_ids", "input_ids")
TILE_ROWS, TILE_LATENTS, GRANULE = 512, 1024, 256
GRANULE_ENTRIES = 1 << 20  # of a granule, expected: in 100 MB they are described, so a task reads few of them twice
BLOCK_ROWS = 16_384
MEMORY = 1 << 30
POOL = 4096
NEAR = 16


def plan_features(
    dictionary: str | Path,
    store: str | Path,
    *,
    field: str = "",
    incomplete: bool = False,
    seed: int = 0,
    shards: int = 0,
    block_rows: int = 0,
    slots: Slots = Slots(),  # noqa: B008
    tile_rows: int = TILE_ROWS,
    tile_latents: int = TILE_LATENTS,
    granule: int = 0,
    chunk: int = 0,
    keep_codes: bool = False,
    memory: int = MEMORY,
    model: str | Path | None = None,
    near: int = NEAR,
) -> Plan:
    """The plan of a run; refuses what does not fit together before anything is written."""
    found = Dictionary(str(dictionary))
    found.check_finite()
    data = _opened(store, field or found.field, incomplete)
    if data.d_in != found.d_in:
        raise DataError(
            f"rows of {data.field!r} in {store} have {counted(data.d_in, 'number')}, and the dictionary "
            f"{dictionary} takes "
            f"{found.d_in:,}: choose the array it was trained on with --field, or its store"
        )
    latents, rows = found.latents, data.rows
    if rows < 1:
        raise DataError(f"{store} has no rows")
    whole = granule or GRANULE
    unit = max(tile_latents, whole)
    if unit % tile_latents or unit % whole:
        raise ConfigError(
            f"tiles of {counted(tile_latents, 'latent')} and granules of {whole} do not fit into each other"
        )
    most = -(-latents // unit)
    if near < 0:
        raise ConfigError(f"--near must be 0 or more neighbours, got {near}")
    if not 0 <= shards <= most:
        raise ConfigError(
            f"--shards must be 1 to {most}: {counted(latents, 'latent')} are cut at multiples of {unit:,}"
        )
    block = block_rows or BLOCK_ROWS
    block = -(-min(block, rows) // tile_rows) * tile_rows
    if block < 1 or max(block, block_rows) > MOST_BLOCK_ROWS:
        raise ConfigError(
            f"blocks of {counted(max(block, block_rows), 'row')}: at most {MOST_BLOCK_ROWS:,} fit, in tiles "
            f"of {tile_rows:,}"
        )
    checkpoint = found.checkpoint
    plan = Plan(
        dictionary=str(Path(checkpoint.folder if checkpoint else dictionary).absolute()),
        sae=found.digest,
        store=str(store) if "://" in str(store) else str(Path(store).absolute()),
        identity=data.data.identity,
        field=data.field,
        gradient=None if found.field or found.transcodes else _gradient(data),  # of what is rebuilt
        token=_column(data.data, TOKEN_NAMES),
        document=_column(data.data, DOCUMENT_NAMES),
        rows=rows,
        d_in=found.d_in,
        latents=latents,
        k=found.k,
        shards=shards or most,
        block_rows=block,
        tile_rows=tile_rows,
        tile_latents=tile_latents,
        granule=whole,
        chunk=chunk or _chunk(latents, whole),
        seed=seed,
        slots=tuple(slots),
        window=128,
        before=48,
        after=24,
        pool=min(POOL, rows),
        pair_rows=0,
        keep_codes=keep_codes,
        near=near,
        lens=None if model is None else open_lens(model, found.d_out),
    )
    active = max(active_entries(plan)[0] / rows, 1.0)  # latents of a row
    plan = replace(plan, pair_rows=min(rows, PAIR_ROWS, int(PAIR_ENTRIES / active), int(PAIRS / active**2) + 1))
    if not granule:
        plan = replace(plan, granule=_granule(rows * active / latents))
    if shards:
        return plan
    share = active / latents
    fits = (n for n in range(1, most + 1) if encode_memory(plan, n, share) <= memory)
    return replace(plan, shards=next(fits, most))


def _opened(store: str | Path, field: str, incomplete: bool) -> Store:
    data = Store(store, Config(field=field, incomplete=incomplete))
    if data.data.shuffled:
        raise DataError(
            f"{store} is shuffled, and the tokens around an example are those of its document: give the store that "
            "`actshuffle collect` wrote, from which it was shuffled (`actshuffle info` names it)"
        )
    return data


def _column(data: Dataset, names: tuple[str, ...]) -> str | None:
    """The first array of whole numbers, one a row, among some usual names."""
    for name in names:
        if name in data.fields and data.fields[name].dtype.kind in "iu" and not data.fields[name].row_shape:
            return name
    return None


def _gradient(data: Store) -> str | None:
    """The array that `actshuffle collect --gradients` writes beside the one that is read."""
    name = GRADIENTS + data.field
    return name if name in data.data.fields and data.data.fields[name].row_shape == data.row_shape else None


def _granule(each: float) -> int:
    """Latents of a granule, of `each` active entries: a power of two, fewer the more rows there are.

    A task that holds less than a granule at a time reads the granule again for each part of it.
    """
    return min(1 << max(int(GRANULE_ENTRIES / max(each, 1.0)), 1).bit_length() - 1, GRANULE)


def _chunk(latents: int, granule: int) -> int:
    """Latents of a chunk: some sixteen chunks, each of 256 to 16,384 latents."""
    wanted = min(max(-(-latents // 16), 256), 16_384)
    return -(-wanted // granule) * granule


def steps(plan: Plan, *, device: str, most: int) -> list[Step]:
    """The steps of a run, in order; see the room's own docstring."""
    found = [Step("encode", encode.encode_on(device), plan.blocks * plan.shards, encode.is_there)]
    if plan.selects:
        found.append(Step("select", encode.select, plan.blocks, encode.is_there))
    # Few small tasks, which come last: they fill the time in which a worker would wait for the others.
    found.append(Step("survey", survey.survey, 1, survey.is_there, beside=True))
    if plan.lens is not None:
        found.append(Step("unembed", product.unembed, 1, scratch.is_there, beside=True))
    found.append(Step("draw", pairs.draw, plan.blocks, pairs.is_drawn))
    if plan.keep_codes:
        found.append(Step("keep", keep_by_row, plan.blocks, rows_are_there, beside=True))
    found.append(Step("collate", collate_in(most), plan.chunks, is_collated))
    found.append(Step("pairs", pairs.pairs, plan.chunks, pairs.are_there, beside=True))
    if product.is_asked_for(plan):
        found.append(Step("product", product.product, plan.chunks, product.is_there, beside=True))
    if plan.near:
        found.append(Step("contrast", contrast.contrast_in(most), plan.chunks, contrast.is_there))
    if plan.lens is not None:
        found.append(Step("promote", product.promote, product.ranges(plan), product.is_promoted, bool(plan.near)))
    return found


def publish(job: FolderJob) -> dict[str, Any]:
    """Check that no entry was lost, write the metadata, and remove what only an unfinished run needs."""
    plan = Plan.of(job)
    encoded = sum(found["entries"] for found in job.results("select" if plan.selects else "encode"))
    chunks = list(job.results("collate"))
    collated = sum(found["entries"] for found in chunks)
    if encoded != collated:
        raise ConservationError(
            f"{counted(encoded, 'active entry', 'active entries')} were encoded and {collated:,} collated "
            f"in {job.place}: "
            "start again with another OUT"
        )
    (surveyed,) = job.results("survey")
    facts = {
        "format": 1,
        "rows": plan.rows,
        "documents": surveyed["documents"],
        "latents": plan.latents,
        "entries": encoded,
        "alive": sum(found["alive"] for found in chunks),
        "kinds": [[kind, *ends] for kind, ends in plan.kinds.kinds().items()],
        "quantiles": list(QUANTILES),
        **{name: getattr(plan, name) for name in ("store", "identity", "dictionary", "sae", "seed", "window")},
        **{name: getattr(plan, name) for name in ("chunk", "keep_codes", "pair_rows")},
        **{name: getattr(plan, name) for name in ("before", "after", "field", "gradient", "token", "document")},
    }
    columns = plan.columns | pairs.COLUMNS | contrast.columns(plan) | product.columns(plan)
    found = dict(layout.metadata(columns, plan.latents, plan.chunk, {"features": facts}))
    layout.put_all(job, found | dict(product.metadata(plan)))
    for prefix in ("work", scratch.SCRATCH):
        job.objects.delete_prefix(prefix)
    return facts | {"block_rows": plan.block_rows}  # which decides no array but those of kept rows


def build_features(
    dictionary: str | Path,
    store: str | Path,
    out: str | Path,
    *,
    memory: int = MEMORY,
    device: str = "auto",
    executor: Executor | None = None,
    progress: Progress | bool = True,
    overwrite: bool = False,
    fsync: bool = True,
    **settings: Any,
) -> Outcome:
    """Describe every latent of a dictionary on a store of activations in document order; resume, or find it done.

    Parameters
    ----------
    dictionary : a run or checkpoint of ours, or a folder that SAELens or sparsify wrote.
    store : a finished store in document order, as `actshuffle collect` writes it.
    out : folder of the results; `open_features` reads them, docs/features.md defines them.
    memory : bytes that one task may take, beside the interpreter and its libraries.
    device : where the encoder product runs, as torch names it; "auto" is a GPU if there is one.
    executor, progress, overwrite, fsync : as `actshuffle.jobs.run_in_folder` takes them.
    settings : of `saetrain.features.pipeline.plan_features`: field, seed, shards, block_rows and the like; and
        ``model``, the folder of the model whose unembedding gives logits, without which there are none.

    Raises
    ------
    DataError : the store is shuffled, unfinished, of another width, or holds NaNs.
    ConfigError : the settings do not fit together.
    actshuffle.errors.InfeasibleError : memory or disk do not suffice, with the arithmetic.
    actshuffle.errors.ConservationError : codes were damaged between their writing and their reading.
    actshuffle.errors.SourceError : the store was written to meanwhile; the next call begins again.
    """
    if executor is None or device == "auto":  # the workers of another machine may have what this one lacks
        device = settled(device)
    check_memory(executor, memory)
    plan = plan_features(dictionary, store, memory=memory, **settings)
    most = most_entries(plan, memory)
    if read_done(out) is None:
        check(forecast(plan, memory), plan, out, memory)
    read = [*split_names(plan.field), plan.gradient, plan.token, plan.document]
    begun = watch(open_dataset(plan.store, incomplete=True), filter(None, read))

    def published(job: FolderJob) -> dict[str, Any]:
        try:
            begun.check()
        except SourceError:
            job.objects.delete_prefix("receipts")  # some tasks have read the old rows
            raise
        return publish(job)

    return run_in_folder(
        NAME,
        out,
        plan.settings(),
        steps(plan, device=device, most=most),
        publish=published,
        executor=executor,
        progress=progress,
        overwrite=overwrite,
        fsync=fsync,
    )
