"""Which device a name stands for, and whether it is there."""

from __future__ import annotations

import os
import re

import torch

from actshuffle.machine import free_memory
from actshuffle.units import counted
from saetrain.errors import ConfigError


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


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that are free on the device, or on this machine."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()
