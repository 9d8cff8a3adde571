"""The share of each rank, and all communication between ranks.

World = data-parallel replicas (dp) x tensor-parallel ranks (tp) on a torch DeviceMesh; rank = dp_index * tp + tp_index.

::

                 tp 0             tp 1                 rank (i, j) holds latents [j n / T, (j + 1) n / T)
    dp 0   rank 0: latents A   rank 1: latents B       and sees, with the other ranks of row i, the same
    dp 1   rank 2: latents A   rank 3: latents B       batch / D tokens

Sums have a fixed order: each rank receives one slice from all others, adds them in order of rank, and sends the
result to all.  So every rank holds the same bits, whatever the backend, at the traffic of a ring.  A group of one
rank makes the same calls, and each of them is then the identity.

Bytes that a rank sends, for each token of its replica (T tensor-parallel ranks, e bytes per element of the
store, 4 bytes per float32):

    rows of the batch     d e (T - 1) / T          each rank reads its own rows, once, and shares them
    top-k candidates      4 k (T - 1)              topk; batchtopk sends histograms instead, 24 KB per step
    reconstructions       8 d G (T - 1) / T        G = nested dictionaries, 1 except for matryoshka; AuxK adds one

and between replicas, once per step, (D - 1) / D of its share of the gradients and as much of the parameters: each
replica sums the gradients of some rows, updates these rows, and sends them to the others.  The first replica gets the
others' moments for each checkpoint.  `Mesh.sent` counts the bytes sent.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from saetrain.compute.devices import named_device
from saetrain.errors import ConfigError

RENDEZVOUS = "SAETRAIN_RENDEZVOUS"  # a file through which the ranks of `--nproc` find each other
MESSAGE = 2**22  # numbers of a tensor that is sent by rows, over all replicas, that one message holds
# Replicas share rows in units of as many, so that a share is whole vectors of torch's CPU kernels, however wide a row
# is: they may round what is left over in another way, and the bits would depend on the number of replicas.
UNIT = 16


class Mesh:
    """The ranks of a run and the sums over them.  `Mesh.start` makes one, `close` ends it."""

    def __init__(self, device: torch.device, tensor_parallel: int = 0) -> None:
        self.device = device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.tp = tensor_parallel or self.world
        if self.world % self.tp:
            raise ConfigError(f"--tensor-parallel {self.tp} does not divide the number of ranks, {self.world}")
        self.dp = self.world // self.tp
        self.dp_index, self.tp_index = divmod(self.rank, self.tp)
        self.torch_mesh = init_device_mesh(device.type, (self.dp, self.tp), mesh_dim_names=("dp", "tp"))
        self.groups = {
            "dp": (self.torch_mesh.get_group("dp"), self.dp, self.dp_index),
            "tp": (self.torch_mesh.get_group("tp"), self.tp, self.tp_index),
            "world": (None, self.world, self.rank),
        }
        self.sent: Counter[str] = Counter()

    @classmethod
    def start(cls, device: str = "auto", tensor_parallel: int = 0) -> Mesh:
        """Join the other ranks: by `--nproc`'s file, by torchrun's variables, or as the only one."""
        where = named_device(device)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        else:
            _keep_freed_memory()
        backend = "nccl" if where.type == "cuda" else "gloo"
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if file := os.environ.get(RENDEZVOUS):
            dist.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=world)
        elif world > 1:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
        try:
            return cls(where, tensor_parallel)
        except ConfigError:
            dist.destroy_process_group()
            raise

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def ranks_here(self) -> int:
        """Ranks that share the memory of this rank's device."""
        if self.device.type == "cuda":
            return 1
        return int(os.environ.get("LOCAL_WORLD_SIZE") or self.world)  # torchrun's; those of `--nproc` are all here

    # --- sums and gathers; `over` is "tp", "dp" or "world"

    def gather(self, x: Tensor, over: str, purpose: str = "other") -> Tensor:
        """[size, *x.shape]: the `x` of all ranks, of one shape, in order of rank."""
        group, size, _ = self.groups[over]
        if size == 1:
            return x[None]
        raw = x.contiguous().view(-1).view(torch.uint8)
        out = raw.new_empty(size * raw.numel())
        dist.all_gather_single(out, raw, group=group)
        self.sent[purpose] += raw.numel() * (size - 1)
        return out.view(x.dtype).view(size, *x.shape)

    def sum(self, x: Tensor, over: str, purpose: str = "other") -> Tensor:
        """The sum over ranks, added in order of rank, the same bits everywhere."""
        group, size, _ = self.groups[over]
        if size == 1:
            return x
        if x.numel() < size * 1024:  # short: one message instead of two
            return _add_in_order(self.gather(x, over, purpose))
        flat = x.contiguous().view(-1)
        share = -(-flat.numel() // size)
        flat = torch.nn.functional.pad(flat, (0, share * size - flat.numel()))
        mine = torch.empty_like(flat)
        dist.all_to_all_single(mine, flat, group=group)
        total = _add_in_order(mine.view(size, share))
        dist.all_gather_single(flat, total, group=group)
        self.sent[purpose] += 2 * (size - 1) * share * x.element_size()
        return flat[: x.numel()].view(x.shape)

    def max(self, x: Tensor, over: str) -> Tensor:
        return self.gather(x, over).amax(0)

    def gather_ragged(self, x: Tensor, over: str, purpose: str = "other") -> Tensor:
        """The 1-D `x` of all ranks, concatenated in order of rank; lengths may differ."""
        if self.groups[over][1] == 1:
            return x
        lengths = self.gather(torch.full((1,), x.numel(), device=x.device), over, purpose).view(-1).tolist()
        padded = torch.nn.functional.pad(x, (0, max(lengths) - x.numel()))
        parts = self.gather(padded, over, purpose)
        return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])

    # --- rows that the replicas have in common and share the work on

    def bounds(self, rows: int) -> list[int]:
        """[D + 1]: replica i has the rows from the i-th bound to the next for itself."""
        return [*(i * rows // self.dp // UNIT * UNIT for i in range(self.dp)), rows]

    def own(self, rows: int) -> slice:
        """This replica's rows."""
        return slice(*self.bounds(rows)[self.dp_index :][:2])

    def sum_own(self, x: Tensor, purpose: str = "other") -> Tensor:
        """My rows of the sum of x [rows, ...] over replicas, with the bits of `sum`: a view of x, which is changed."""
        mine = x[self.own(len(x))]
        if self.dp == 1:
            return mine
        for parts in self._messages(x):
            sent = torch.cat([part.reshape(-1) for part in parts])
            here = parts[self.dp_index]
            got = sent.new_empty(self.dp * here.numel())
            sizes = [part.numel() for part in parts]
            dist.all_to_all_single(got, sent, [here.numel()] * self.dp, sizes, self.groups["dp"][0])
            here.copy_(_add_in_order(got.view(self.dp, *here.shape)))
            self.sent[purpose] += (sent.numel() - here.numel()) * x.element_size()
        return mine

    def spread_own(self, x: Tensor, purpose: str = "other") -> None:
        """Give all replicas the rows of x [rows, ...] that each has for itself, in place."""
        for parts in self._messages(x) if self.dp > 1 else ():
            here, longest = parts[self.dp_index], max(map(len, parts))
            padded = here
            if len(here) < longest:
                padded = torch.cat([here, here.new_zeros(longest - len(here), *x.shape[1:])])
            for part, got in zip(parts, self.gather(padded, "dp", purpose), strict=True):
                part.copy_(got[: len(part)])

    def _messages(self, x: Tensor) -> Iterator[list[Tensor]]:
        """For each message, the part that it has of every replica's rows, of about as many rows each."""
        each = max(MESSAGE // (self.dp * math.prod(x.shape[1:])), 1)
        bounds = self.bounds(len(x))
        shares = [x[lo:hi] for lo, hi in pairwise(bounds)]
        for at in range(0, max(map(len, shares)), each):
            yield [share[at : at + each] for share in shares]

    def collect_own(self, x: Tensor, rows: int, purpose: str = "other") -> Iterator[Tensor]:
        """On the first replica all `rows` of a tensor, in order, a block at a time; each replica gives its own, `x`.

        All replicas go through this at once; for the others it is empty.
        """
        group, bounds = self.groups["dp"][0], self.bounds(rows)
        each = max(MESSAGE // math.prod(x.shape[1:]), 1)
        for i, (lo, hi) in enumerate(pairwise(bounds)):
            for at in range(0, hi - lo, each):
                if i == self.dp_index:
                    block = x[at : at + each]
                    if i:
                        dist.send(block, group=group, group_dst=0)
                        self.sent[purpose] += block.numel() * x.element_size()
                elif self.dp_index == 0:
                    block = x.new_empty(min(each, hi - lo - at), *x.shape[1:])
                    dist.recv(block, group=group, group_src=i)
                if self.dp_index == 0:
                    yield block

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on any."""
        return bool(self.gather(torch.full((1,), flag, device=self.device), "world").any())

    def share(self, total: int, name: str) -> tuple[int, int]:
        """This rank's rows [lo, hi) of `total` latents."""
        if total % self.tp:
            raise ConfigError(f"{name} {total} is not a multiple of {self.tp}, the ranks that share the parameters")
        each = total // self.tp
        return self.tp_index * each, (self.tp_index + 1) * each


def _keep_freed_memory() -> None:
    """Have glibc reuse freed blocks of up to 32 MB.

    Returned to the system, each would come back as fresh pages, which cost more than the sums made in them.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD; glibc refuses more
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # another C library


def _add_in_order(parts: Tensor) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
