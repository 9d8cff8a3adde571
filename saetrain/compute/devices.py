"""Which device a name stands for, and whether it is there."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from actshuffle.machine import free_memory
from actshuffle.units import counted
from saetrain.errors import ConfigError

_THREADS = threading.Lock()


def named_device(name: str) -> torch.device:
    """The device of "cpu", "cuda", "cuda:N" or "auto", which is a GPU if there is one.

    "cuda" is the GPU of this rank.  Raises `ConfigError` for another name, and for a GPU that is not there.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name):
        raise ConfigError(f"device must be cpu, cuda, cuda:N or auto, got {name!r}")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not there):
        return torch.device("cpu")
    where = torch.device(name if ":" in name else f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    if int(where.index or 0) >= there:
        raise ConfigError(
            f"device {where} is not there: torch finds {counted(there, 'CUDA device')}; --device cpu uses none"
        )
    return where


def settled(name: str) -> str:
    """The same name with "auto" decided; raises as `named_device` does."""
    where = named_device(name)
    return where.type if name == "auto" else name


def precision(compute: str, device: str) -> str:
    """The precision that a setting of `compute` selects on a device: float32, tf32, bfloat16 or float64."""
    return compute if compute != "auto" else "bfloat16" if device.startswith("cuda") else "float32"


def gathers_narrow(precise: str, device: str) -> bool:
    """True if sparse products of this precision read rows of bfloat16 on a device, where it has kernels for them."""
    return precise == "bfloat16" and device.startswith("cuda")


@contextmanager
def matrix_products(compute: str, device: torch.device) -> Iterator[None]:
    """Within, float32 products of matrices on a GPU are those of `compute`, as `precision` names it.

    With tf32 and bfloat16, their factors are rounded to TF32 (10 bits of fraction) and their sums are in float32.
    """
    if device.type != "cuda":
        yield
        return
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    legacy = None  # cannot be read where a caller has set these alone
    with suppress(RuntimeError):
        legacy = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if compute in ("tf32", "bfloat16") else "highest")
    try:
        yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for switch, precise in zip(switches, before, strict=True):
            switch.fp32_precision = precise


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, a product on the CPU is the calling thread's alone.

    A library may cut a long sum by threads, so that its bits depend on their number: MKL does for a Gram matrix of few
    columns.
    """
    with _THREADS:  # a thread that comes first to torch meanwhile would take 1 for its own number
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@contextmanager
def full_precision() -> Iterator[None]:
    """Within, products of float32 on a CPU are in float32, whatever `torch.set_float32_matmul_precision` allows."""
    switch: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = switch.fp32_precision
    if before in ("ieee", "none"):
        yield
        return
    switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that are free on the device, or on this machine."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()
