"""Batches of a finished store, read ahead, for training.

::

    files --threads--> blocks of batches (reused memory) --views--> {"data": ..., "source_row": ...}

*Batches.*  ``batch_size`` rows make one step of the whole job; rank r of w gets the r-th of w neighbouring parts of
it, equal but for one row.  So the sequence of global batches does not depend on the number of ranks, every row is in
exactly one batch of one rank per epoch, and all ranks make the same number of steps.  The last batch of an epoch is
short (on many ranks, some may get no row of it) unless ``drop_last`` leaves it out.

*Lifetime.*  A batch is a view of a block that threads have filled; nothing is copied.  It stays valid as long as
anything refers to it, or to an array, tensor or slice made of it.  After that its memory is filled again.  Only raw
addresses (``data_ptr()``, ``ctypes``) must not outlive it.  Whoever keeps a batch keeps its whole block.

*Epochs.*  See `actshuffle.loading.epochs`.  Over a shuffled store epoch 0 is the stored order: exactly uniform.  Every
later epoch is a permutation of units of neighbouring rows and a rotation: it is exactly uniform by itself, but not
independent of the others.  Over any other store no epoch is uniform.

*State.*  The cursor counts rows of the epoch over all ranks, so it fits any number of ranks, and any batch size.  Rows
that were read ahead and not handed out do not count.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from actshuffle.errors import RequestError
from actshuffle.loading.columns import Layout, Stores, choose, open_stores, source_rows, widest
from actshuffle.loading.dataset import Dataset
from actshuffle.loading.epochs import Order, Step, steps, unit_rows
from actshuffle.loading.fieldinfo import FieldInfo
from actshuffle.loading.prefetch import BatchBlock, Buffering, Loan, Pool, Reading, blocks, in_order
from actshuffle.loading.unchanged import Watch
from actshuffle.machine import cores, machine_memory
from actshuffle.ordering.mixing import MixingAccumulator, MixingReport
from actshuffle.units import counted, format_bytes, parse_bytes, switches

if TYPE_CHECKING:
    from actshuffle.loading.torchface import TorchDataset

Batch = dict[str, Any]  # arrays or tensors by name
# Bytes that one thread reads at a time; or one batch, if that is more.  Rows in the page cache are copied to
# memory, and a few blocks of 8 MiB stay in the processor's cache, where that is a fifth quicker than into larger
# ones.  From a disk, with threads in one file, they are a fifth slower, and of what must be decoded they cut pieces.
CACHED_BLOCK_BYTES, BLOCK_BYTES = 8 << 20, 64 << 20
LOOKS = 8  # at the page cache, when a pass begins
STATE_FORMAT = 1
LEAST = {"batch_size": 1, "world_size": 1, "rank": 0, "seed": 0, "epochs": 1, "threads": 1, "buffer_rows": 0}
SCORED_ROWS = 1 << 20
_FOREVER = 1 << 62


class Loader:
    """An iterable of batches, each a dict of arrays by field name.

    Parameters
    ----------
    stores : a path or `Dataset`; or several with the same rows (a list, or a dict by prefix), whose
        arrays are then called ``prefix/name``; the prefix is the file name without ``.zarr``.
    batch_size : rows of one step, over all ranks.
    fields : names of the arrays to read; all if not given.
    rank, world_size : which part of every batch is read here.
    epochs : epochs of one pass; None never ends.  Iterating again goes on where the last pass ended.
    seed : of the order of later epochs, and of the buffer.
    drop_last : leave out the last batch of an epoch if it is short.
    prefetch_bytes, threads : memory read ahead ("256MB"), by how many threads; at least, and if not given,
        a block for each thread and one more.  A block holds at least one batch.
    as_torch : tensors, not arrays; ``pin`` page-locks them where there is a GPU.
    buffer_rows : for stores that are not shuffled: rows of the shuffle buffer (memory: twice that); 0
        reads in stored order.
    incomplete : take stores without a completion marker.

    Raises
    ------
    IncompleteStoreError, SourceError, RequestError : as soon as it is made; SourceError if a store changes meanwhile.
    """

    def __init__(
        self,
        stores: Stores,
        batch_size: int,
        *,
        fields: Iterable[str] | None = None,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = 1,
        seed: int = 0,
        drop_last: bool = False,
        prefetch_bytes: int | str = 0,
        threads: int | None = None,
        pin: bool = False,
        as_torch: bool = False,
        buffer_rows: int | None = None,
        incomplete: bool = False,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        given = locals()
        for name, least in LEAST.items():
            value, optional = given[name], name in ("epochs", "threads", "buffer_rows")
            if not (optional and value is None) and (type(value) is not int or value < least):
                raise RequestError(f"{name} must be a whole number of at least {least}, got {value!r}")
        switches(drop_last=drop_last, pin=pin, as_torch=as_torch, incomplete=incomplete)
        if rank >= world_size:
            raise RequestError(f"rank {rank} of {counted(world_size, 'rank')}; they count from 0")
        if pin and not as_torch:
            raise RequestError("pin is for tensors: give as_torch too")
        self.datasets: dict[str, Dataset] = open_stores(stores, incomplete=incomplete, storage_options=storage_options)
        self.layout: Layout = choose(self.datasets, fields)
        first = next(iter(self.datasets.values()))
        if buffer_rows is None and not first.shuffled:
            some = min(max(1, (1 << 30) // max(1, self.layout.row_bytes)), max(1, first.rows))
            raise RequestError(
                f"{first.path} is not shuffled ({first.kind}): batches in its order hold rows of a few "
                f"documents. Shuffle it, or give --buffer-rows {some} (say) for a shuffle buffer of "
                f"{format_bytes(some * self.layout.row_bytes)}, which mixes less; --buffer-rows 0 reads "
                "it as it is"
            )
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.epochs, self.drop_last, self.as_torch = epochs, drop_last, as_torch
        self.threads = threads or min(4, cores())
        self.prefetch_bytes = parse_bytes(prefetch_bytes)
        self.rows = first.rows
        buffer_rows = min(buffer_rows or 0, self.rows)
        pieces = max(f.piece_rows for d in self.datasets.values() for f in d.fields.values())
        unit = unit_rows(self.rows, widest(self.datasets.values()).object_rows, pieces, buffered=buffer_rows > 0)
        self.order = Order(self.rows, unit, seed, buffer_rows)
        self.wait_seconds, self.rows_seen = 0.0, 0
        self._cursor = 0, 0  # epoch and row of the next step
        self._skip, self._stride = (0, 1)  # steps to leave out, now and between: DataLoader workers share
        self._turn = 0
        self._pinned = False
        self._pool: tuple[int, Pool] | None = None  # by the size of blocks
        self._watch = Watch((column.dataset, column.field) for column in self.layout.columns)
        if as_torch:
            from actshuffle.loading import torchface

            torchface.check_types(self.layout)
            self._pinned = pin and torchface.can_pin()

    def _block_bytes(self) -> int:
        """Small if what is read is in the page cache now, by a look at a few rows."""
        # Other rows each time: a look at what is not there brings it there.
        rows = [secrets.randbelow(max(1, self.rows)) for _ in range(LOOKS)]
        cached = self.rows and all(c.dataset.is_cached(c.field, row) for c in self.layout.columns for row in rows)
        return CACHED_BLOCK_BYTES if cached else BLOCK_BYTES

    @property
    def fields(self) -> dict[str, FieldInfo]:
        """The arrays of a batch."""
        return {column.name: column.info for column in self.layout.columns}

    @property
    def batches_per_epoch(self) -> int:
        return self.rows // self.batch_size if self.drop_last else -(-self.rows // self.batch_size)

    def __len__(self) -> int:
        """Batches of a whole pass."""
        if self.epochs is None:
            raise TypeError("a loader without end has no length")
        return self.batches_per_epoch * self.epochs

    def __getitem__(self, index: Any) -> Any:
        """Batches have an order, and no index; what asks for one is usually torch's DataLoader."""
        raise RequestError(
            "a Loader hands out whole batches in order, and has none by number: iterate over it, or give a torch "
            "DataLoader `loader.torch()` with batch_size=None"
        )

    def __iter__(self) -> Iterator[Batch]:
        """A pass from the cursor on.  There is one cursor: beginning another pass ends this one."""
        self._turn += 1
        return self._pass(self._turn)

    def _pass(self, turn: int) -> Iterator[Batch]:
        epoch, row = self._cursor
        until = self._pass_end(epoch)
        if not self.batches_per_epoch:
            until = epoch
        ahead = steps(self.rows, self.batch_size, self.drop_last, epoch, row, until)
        mine = islice(ahead, self._skip, None, self._stride)
        for block, loan in self._filled(mine):
            at = 0
            for step, (a, b) in zip(block.steps, block.parts, strict=True):
                if self._turn != turn:
                    raise RequestError("another pass over this loader has begun, or its cursor was moved")
                batch = self._batch(loan, block.rows, at, at + b - a)
                at += b - a
                self.rows_seen += b - a
                if self._pass_by(step):
                    self._watch.check()
                yield batch
                del batch
            del loan
        if self._stride == 1 and self._turn == turn:
            self._cursor = until, 0

    def _pass_end(self, epoch: int) -> int:
        """The epoch at which a pass that begins in ``epoch`` ends."""
        return _FOREVER if self.epochs is None else (epoch // self.epochs + 1) * self.epochs

    def _pass_by(self, step: Step) -> bool:
        """Move the cursor past a step; True at the end of an epoch."""
        last = step.stop + (self.batch_size if self.drop_last else 1) > self.rows
        if self._stride > 1:  # the next of ours is counted from this one
            self._cursor, self._skip = (step.epoch, step.start), self._stride
        else:
            self._cursor = (step.epoch + 1, 0) if last else (step.epoch, step.stop)
        return last

    def _filled(self, mine: Iterator[Step]) -> Iterator[tuple[BatchBlock, Loan]]:
        """Blocks in order, with threads ahead of the consumer."""
        row_bytes = max(1, self.layout.row_bytes)
        block_bytes = self._block_bytes()
        most_rows = max(1, block_bytes // row_bytes)
        batch_bytes = -(-self.batch_size // self.world_size) * row_bytes
        depth = max(self.threads + 1, self.prefetch_bytes // max(batch_bytes, block_bytes))
        if self._pool is None or self._pool[0] != block_bytes:  # kept for the passes to come
            self._pool = block_bytes, Pool(depth + 1)
        lend = self._pool[1].lend
        if self._pinned:
            from actshuffle.loading.torchface import lend_pinned as lend
        work: Iterable[Any] = blocks(mine, self.rank, self.world_size, most_rows)
        way: Reading | Buffering
        if self.order.buffer_rows:
            way = Buffering(self.layout, self.order, lend, self.threads)
        else:
            once = self.rows * row_bytes > machine_memory() // 2
            way = Reading(self.layout, self.order, lend, once=once)
        pool = ThreadPoolExecutor(self.threads, "actshuffle-load")
        try:
            for block, loan in in_order(pool, way.fill, map(way.plan, work), depth, self._waited):
                way.reached(block)
                yield block, loan
                del block, loan  # while the next is waited for, this memory can be filled again
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            way.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pool": None}

    def _waited(self, seconds: float) -> None:
        self.wait_seconds += seconds

    def _batch(self, loan: Loan, rows: int, a: int, b: int) -> Batch:
        if self.as_torch:
            from actshuffle.loading.torchface import batch_of

            return batch_of(self.layout, loan, rows, a, b)
        return self.layout.batch_of(loan.memory, rows, a, b)

    def seek(self, epoch: int, row: int = 0) -> None:
        """Move the cursor; a pass under way ends."""
        if epoch < 0 or not 0 <= row <= self.rows:
            raise RequestError(f"epoch {epoch}, row {row:,} of {self.rows:,}")
        self._cursor, self._skip, self._stride = (epoch, row), 0, 1
        self._turn += 1

    def share_steps(self, worker: int, workers: int) -> None:
        """Yield every ``workers``-th step only, the ``worker``-th first: how DataLoader workers share.

        A state that such a worker saved goes on as it was.
        """
        if self._stride not in (1, workers):
            raise RequestError(f"this state was saved by one of {counted(self._stride, 'worker')}, now {workers}")
        if self._stride == 1 and workers > 1:
            self._skip, self._stride = worker, workers

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, after the last batch it handed out: small, plain values."""
        epoch, row = self._cursor
        cursor = {"epoch": epoch, "row": row, "skip": self._skip, "stride": self._stride}
        return {"format": STATE_FORMAT, **cursor, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader of the same stores was; bitwise, on any number of ranks."""
        try:
            if state["format"] != STATE_FORMAT:
                raise RequestError(f"loader state of format {state['format']}; this reads {STATE_FORMAT}")
            for name, ours in self._identity().items():
                if state[name] != ours:
                    raise RequestError(f"this state is of another loader: {name} was {state[name]!r}, now {ours!r}")
            epoch, row, skip, stride = (int(state[k]) for k in ("epoch", "row", "skip", "stride"))
        except (KeyError, TypeError, ValueError) as err:
            if isinstance(err, RequestError):
                raise
            raise RequestError(f"this is no state of a loader: {type(err).__name__}: {err}") from err
        self.seek(epoch, row)
        self._skip, self._stride = max(0, skip), max(1, stride)

    def _identity(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "seed": self.order.seed,
            "unit": self.order.unit,
            "buffer_rows": self.order.buffer_rows,
            "stores": [dataset.identity for dataset in self.datasets.values()],
        }

    def mixing(self, epoch: int = 0, alpha: float = 0.01) -> MixingReport:
        """The two-sided tests of `actshuffle.ordering.mixing` on the order of an epoch; reads no row data.

        Where rows came from is told by ``source_row``; a store without it counts as its own source.
        """
        dataset = next(iter(self.datasets.values()))
        scored = MixingAccumulator(
            self.rows, src_chunk_rows=widest([dataset]).object_rows, dst_chunk_rows=self.batch_size
        )
        ranks = None
        if dataset.shuffled and dataset.rows != dataset.population:  # of the source rows it has: their ranks
            ranks = np.sort(source_rows(dataset, np.arange(self.rows)))
        for at in range(0, self.rows, SCORED_ROWS):
            rows = self.order.rows_at(epoch, at, min(at + SCORED_ROWS, self.rows))
            found = source_rows(dataset, rows)
            scored.update(at, found if ranks is None else np.searchsorted(ranks, found))
        return scored.report(alpha)

    def torch(self) -> TorchDataset:
        """This loader as a `torch.utils.data.IterableDataset` of tensors."""
        from actshuffle.loading.torchface import TorchDataset, check_types

        check_types(self.layout)
        other = copy.copy(self)
        other.as_torch, other._pinned = True, False
        return TorchDataset(other)

    def __repr__(self) -> str:
        stores = ", ".join(d.path for d in self.datasets.values())
        ranks = f", rank {self.rank} of {self.world_size}" if self.world_size > 1 else ""
        buffer = f", buffer of {counted(self.order.buffer_rows, 'row')}" if self.order.buffer_rows else ""
        return (
            f"Loader({stores}: {counted(self.rows, 'row')}, {counted(self.batches_per_epoch, 'batch', 'batches')} of "
            f"{self.batch_size:,}{ranks}{buffer}; {', '.join(self.fields)})"
        )
