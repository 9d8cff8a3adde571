"""The machine and the versions behind a figure."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from actshuffle.machine import cores, machine_memory
from actshuffle.units import format_bytes

PACKAGES = ("actshuffle", "numpy", "zarr", "dask", "distributed")


def describe(folder: Path) -> dict[str, Any]:
    """Processor, memory, the disk under ``folder``, kernel and versions; no names, no paths."""
    filesystem, device = _mount(folder)
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "hypervisor": "hypervisor" in _field("/proc/cpuinfo", "flags").split(),
        "memory_bytes": machine_memory(),
        "filesystem": filesystem,
        "disk": _disk(device),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "commit": _commit(),
    }


def in_words(machine: dict[str, Any]) -> str:
    """The description as one paragraph."""
    packages = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    virtual = " (virtual machine)" if machine["hypervisor"] else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores{virtual}, "
        f"{format_bytes(machine['memory_bytes'])} memory, {machine['filesystem']} on "
        f"{machine['disk']}; Linux {machine['kernel']}, Python {machine['python']}, {packages}; "
        f"commit {machine['commit']}."
    )


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions; "" for a package that is not installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def load() -> float:
    """The load average of the last minute, which shows how quiet the machine was."""
    return round(os.getloadavg()[0], 2)


def _field(file: str, name: str) -> str:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _mount(folder: Path) -> tuple[str, str]:
    """Type of the filesystem a folder is on, and its device."""
    folder = folder.resolve()
    best, found = -1, ("unknown filesystem", "")
    for line in Path("/proc/mounts").read_text().splitlines():
        device, where, kind = line.split()[:3]
        if folder.is_relative_to(where) and len(where) > best:
            best, found = len(where), (kind, device)
    return found


def _disk(device: str) -> str:
    name = Path(device).name
    block = next(iter(Path("/sys/block").glob(f"{name.rstrip('0123456789')}*")), None)
    if not device.startswith("/dev/") or block is None:
        return "no block device"
    kind = {"0": "solid state", "1": "rotational"}.get(_text(block / "queue/rotational"), "unknown")
    model = _text(block / "device/model")
    if name.startswith("vd"):  # a hypervisor may report anything
        return "virtio disk"
    return f"{model} ({kind})" if model else kind


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _commit() -> str:
    """The commit that was measured; a + marks uncommitted changes."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "../actshuffle")
        return (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(changed)
    except OSError:
        return "unknown"
