"""The size of memory: the same answer as Dask's, and the limits of containers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from actshuffle.machine import CGROUP_FILES, CGROUP_USAGE, free_memory, machine_memory

WHOLE = machine_memory.__wrapped__


def test_memory_is_what_distributed_says():
    from distributed.system import memory_limit

    assert machine_memory() == memory_limit()


@pytest.mark.parametrize("name", CGROUP_FILES)
def test_memory_of_a_container_is_its_limit(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("67108864\n")
    assert WHOLE(tmp_path) == 64 << 20


@pytest.mark.parametrize("text", ["max\n", "9223372036854771712\n", "0\n", "-1\n", ""])
def test_memory_of_a_container_without_limit_is_the_machines(text, tmp_path):
    (tmp_path / "memory.max").write_text(text)
    assert WHOLE(tmp_path) == WHOLE(tmp_path / "none") > 64 << 20


def test_memory_is_the_least_of_several_limits(tmp_path):
    (tmp_path / "memory.max").write_text(str(96 << 20))
    (tmp_path / "memory.high").write_text(str(64 << 20))
    assert WHOLE(tmp_path) == 64 << 20


def test_memory_is_the_resource_limit_where_that_is_less(tmp_path):
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_RSS, (1 << 26, 1 << 26));"
        "from actshuffle.machine import machine_memory; import sys;"
        "assert machine_memory() == 1 << 26; assert 'distributed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_free_memory_is_that_of_the_machine(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 999999 kB\nMemFree: 10 kB\nMemAvailable:    2048 kB\n")
    assert free_memory(meminfo, tmp_path) == 2 << 20
    assert free_memory(tmp_path / "none", tmp_path) == machine_memory()
    assert 0 < free_memory() <= machine_memory()


@pytest.mark.parametrize("names", CGROUP_USAGE)
def test_free_memory_of_a_container_counts_pages_that_the_cache_gives_back(names, tmp_path):
    limit, usage, stat = (tmp_path / name for name in names)
    limit.parent.mkdir(exist_ok=True)
    limit.write_text("1000000\n")
    usage.write_text("900000\n")
    stat.write_text("anon 300000\ninactive_file 200000\nactive_file 50000\nshmem 7\n")
    assert free_memory(tmp_path / "none", tmp_path) == 350_000
    usage.write_text("1300000\n")
    assert free_memory(tmp_path / "none", tmp_path) == 0
    limit.write_text("max\n")
    assert free_memory(tmp_path / "none", tmp_path) == machine_memory()
