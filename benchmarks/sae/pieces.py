"""`sae-speed`: the time of a training step, split by piece, beside the least that its operations and bytes allow.

Steps run on normalised random rows in this process, on one rank.  A clock is put around the functions below while
they are measured, and stops while another of them runs inside, so that the pieces add up to the step.  *Floors* are
the operations of a piece over those that a large matrix product makes in a second, and its bytes over those that a
copy moves; both are measured in the same run, between the steps.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from actshuffle.units import format_seconds
from benchmarks import plots
from benchmarks.results import Bench, table
from saetrain.compute.devices import settled
from saetrain.compute.kernels import Codes, Encoder
from saetrain.compute.mesh import Mesh
from saetrain.config import Config, resolve
from saetrain.model import Model
from saetrain.norms import Norm
from saetrain.tile import Part
from saetrain.training.losses import step
from saetrain.training.metrics import flops_per_token, measure_peak
from saetrain.training.optim import Optimizer, ramps
from saetrain.variants.family import TopKFamily
from saetrain.variants.table import VARIANTS

REST, DENSE = "rest of the tile", "other products"
PIECES = (
    "normalisation",
    "encoder product",
    "choice of latents",
    "order by latent",
    "decoding",
    "gradient of activations",
    DENSE,
    "gradients of weights",
    "gradients of biases",
    "dead latents (AuxK)",
    REST,
    "norms and unit rows",
    "Adam",
    "rest of the step",
)
WARM = 2  # steps that are not counted
COPY = 1 << 25  # numbers of the copy that gives bytes a second


class Sizes(NamedTuple):
    """Of a step: tokens, width, latents, active latents of a token, and whether all latents are multiplied."""

    tokens: int
    width: int
    latents: int
    active: float
    dense: bool


class Split:
    """Seconds by piece; a piece stops while another runs inside it."""

    def __init__(self, cuda: bool) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.stack: list[str] = []
        self.cuda, self.since = cuda, 0.0

    def _lap(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    @contextmanager
    def piece(self, name: str) -> Iterator[None]:
        self._lap()
        self.stack.append(name)
        try:
            yield
        finally:
            self._lap()
            self.stack.pop()

    def clocked(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.piece(name):
                return function(*args, **kwargs)

        return run


class Products(TorchDispatchMode):
    """Tells the matrix products of a tile from the rest of it."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.split = split

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        if not product or self.split.stack[-1] != REST:
            return func(*args, **(kwargs or {}))
        with self.split.piece(DENSE):
            return func(*args, **(kwargs or {}))


@contextmanager
def clocks(split: Split, variant: type[Model]) -> Iterator[None]:
    """Within, the functions of each piece have a clock around them."""
    places: list[tuple[Any, str, str]] = [
        (Norm, "__call__", "normalisation"),
        (Encoder, "product", "encoder product"),
        (variant, "choose", "choice of latents"),
        (Codes, "by_latent", "order by latent"),
        (Codes, "decode", "decoding"),
        (Codes, "dots", "gradient of activations"),
        (Codes, "scatter", "gradients of weights"),
        (Part, "product", "gradients of weights"),
        (Codes, "sum_by_latent", "gradients of biases"),
        (TopKFamily, "_auxiliary", "dead latents (AuxK)"),
        (variant, "add_tile", REST),
        (Optimizer, "apply", "norms and unit rows"),
        (Optimizer, "_step", "Adam"),
    ]
    before = []
    for owner, name, piece in places:
        held = owner.__dict__.get(name)  # or it is inherited, and the clock is taken away again
        found = held if held is not None else getattr(owner, name)
        before.append((owner, name, held))
        if isinstance(found, cached_property):
            again = cached_property(split.clocked(found.func, piece))
            again.__set_name__(owner, name)
            setattr(owner, name, again)
        else:
            setattr(owner, name, split.clocked(found, piece))
    try:
        with Products(split):
            yield
    finally:
        for owner, name, held in before:
            if held is None:
                delattr(owner, name)
            else:
                setattr(owner, name, held)


def run(bench: Bench, *, archs: list[str], width: int, d_sae: int, k: int, batch: int, steps: int, device: str) -> None:
    mesh = Mesh.start(settled(device))
    bench.plan(len(archs))
    found = []
    try:
        for arch in archs:
            found.append(_one(arch, width, d_sae, k, batch, steps, mesh))
            bench.did(f"{arch}: {format_seconds(found[-1]['whole'])} a step")
    finally:
        mesh.close()
    images = plots.draw(bench, lambda folder: [_draw(folder, found)])
    bench.publish({"summary": found, "threads": torch.get_num_threads()}, page(found, width, d_sae, batch), images)


def _one(arch: str, width: int, d_sae: int, k: int, batch: int, steps: int, mesh: Mesh) -> dict[str, Any]:
    """Seconds of the whole step, without clocks, and of its pieces, medians over steps taken in turns."""
    cuda, dice = mesh.device.type == "cuda", torch.Generator().manual_seed(0)
    asked = Config(arch=arch, d_sae=d_sae, k=min(k, d_sae), batch_size=batch, steps=10_000, holdout=1)
    config = resolve(asked, width, 10**8)
    model = VARIANTS[arch](config, Norm(torch.zeros(width, dtype=torch.float64), 1.0), mesh)
    centres = torch.randn(4 * d_sae, width, generator=dice)
    # Sums of a few of many directions, which a dictionary can learn.
    rows = [centres[torch.randint(len(centres), (batch, 8), generator=dice)].sum(1).to(mesh.device) for _ in range(4)]
    model.initialise(model.norm(torch.cat(rows))[:8192])
    model.measure_tile(batch)
    optimizer, whole, pieces, active = Optimizer(model), [], [], 0.0
    peaks, copies = [], []
    for at in range(2 * (steps + WARM)):
        split, with_clocks = Split(cuda), at % 2 == 1
        if with_clocks:
            with clocks(split, VARIANTS[arch]), split.piece("rest of the step"):
                active = _step(model, optimizer, rows[at % 4], at)
            pieces.append(dict(split.seconds))
        else:
            began = time.perf_counter()
            active = _step(model, optimizer, rows[at % 4], at)
            if cuda:
                torch.cuda.synchronize()
            whole.append(time.perf_counter() - began)
            peaks.append(measure_peak(mesh.device, model.compute))
            copies.append(bandwidth(mesh.device))
    seconds = {name: statistics.median(one.get(name, 0.0) for one in pieces[WARM:]) for name in PIECES}
    sizes = Sizes(batch, width, d_sae, active, VARIANTS[arch].computes_densely(active, d_sae))
    peak, copied, median = max(peaks), max(copies), statistics.median(whole[WARM:])
    return {
        "arch": arch,
        "active": active,
        "tile": model.tile,
        "whole": median,
        "clocked": sum(seconds.values()),
        "tokens_per_s": batch / median,
        "mfu": batch / median * flops_per_token(config, width, active) / peak,
        "peak": peak,
        "bytes_per_s": copied,
        "pieces": {name: {"seconds": took, **floor(name, sizes, peak, copied)} for name, took in seconds.items()},
    }


def _step(model: Model, optimizer: Optimizer, rows: torch.Tensor, at: int) -> float:
    rate, ramp = ramps(model.config, at)
    done = step(model, model.norm(rows), ramp)
    optimizer.apply(done.grads, rate)
    return done.active


def bandwidth(device: torch.device) -> float:
    """Bytes a second of the fastest of three copies, reads and writes counted."""
    source = torch.zeros(COPY, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(3):
        began = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * source.nbytes / best


def floor(piece: str, sizes: Sizes, peak: float, copied: float) -> dict[str, float]:
    """Least seconds by operations and by bytes in float32; 0 where a piece needs neither.

    Each operand is read or written once, but rows of the dictionary once for each latent that is active on a token.
    """
    b, d, n, a = sizes.tokens, sizes.width, sizes.latents, sizes.tokens * sizes.active
    product, gather = (2 * b * n * d, b * n + n * d + b * d), (2 * a * d, a * d + b * d)
    dense = sizes.dense
    operations, numbers = {
        "normalisation": (0, 2 * b * d),
        "encoder product": product,
        "choice of latents": (0, 0 if dense else b * n),
        "decoding": (0, 0) if dense else gather,
        "gradient of activations": (0, 0) if dense else gather,
        DENSE: (2 * product[0], 2 * product[1]) if dense else (0, 0),
        "gradients of weights": (2 * product[0], 2 * product[1]) if dense else (4 * a * d, 2 * (a * d + n * d)),
        "norms and unit rows": (0, 4 * n * d),  # both gradients once, decoder rows read and written
        "Adam": (0, 7 * 2 * n * d),  # reads parameters, gradients and moments, writes all but the gradients
    }.get(piece, (0, 0))
    return {"operations": operations / peak, "bytes": 4 * numbers / copied}


def _draw(folder: Path, found: list[dict[str, Any]]) -> str:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 0.5 * len(found) + 2.2))
    left = [0.0] * len(found)
    shown = [name for name in PIECES if any(one["pieces"][name]["seconds"] > 0 for one in found)]
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for number, name in enumerate(shown):
        wide = [one["pieces"][name]["seconds"] / one["clocked"] for one in found]
        axis.barh([one["arch"] for one in found], wide, left=left, label=name, color=colours[number % 20])
        left = [a + b for a, b in zip(left, wide, strict=True)]
    axis.set(xlabel="share of the step", xlim=(0, 1))
    axis.invert_yaxis()
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3, fontsize=8)
    figure.savefig(folder / "sae-speed.png")
    plt.close(figure)
    return "sae-speed.png"


def page(found: list[dict[str, Any]], width: int, d_sae: int, batch: int) -> Iterator[str]:
    yield (
        f"{batch:,} tokens a step, {d_sae:,} latents, width {width:,}, one rank. *Of the floor* is the larger of the "
        "two floors over the time. Clocks make a step longer: its time without them is in the headings. A piece "
        "without a figure in a column needs no operations or bytes of its own that the formulas count."
    )
    for one in found:
        yield ""
        yield f"## {one['arch']}: {_ms(one['whole'])} a step, {one['tokens_per_s']:,.0f} tokens/s, MFU {one['mfu']:.0%}"
        yield ""
        yield (
            f"{one['active']:.1f} active latents a token, tiles of {one['tile']:,} tokens; a large product makes "
            f"{one['peak'] / 1e9:,.0f} and a copy moves {one['bytes_per_s'] / 1e9:,.1f} billion a second. With clocks "
            f"a step takes {_ms(one['clocked'])}."
        )
        yield ""
        yield from table(
            ["piece", "time", "of the step", "floor by operations", "floor by bytes", "of the floor"],
            (_line(name, part, one["clocked"]) for name, part in one["pieces"].items() if part["seconds"] > 0),
        )


def _line(name: str, part: dict[str, float], whole: float) -> list[str]:
    seconds, least = part["seconds"], max(part["operations"], part["bytes"])
    return [
        name,
        _ms(seconds),
        f"{seconds / whole:.1%}",
        _ms(part["operations"]) if part["operations"] else "",
        _ms(part["bytes"]) if part["bytes"] else "",
        f"{least / seconds:.2f}" if least else "",
    ]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.2f} ms"
