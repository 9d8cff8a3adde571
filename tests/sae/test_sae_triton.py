"""The kernels for CUDA, run by Triton's interpreter on the CPU, against plain torch."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
INSIDE = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported, and again for each kernel
inside = pytest.mark.skipif(not INSIDE, reason="runs in the process that test_in_the_interpreter starts")


@pytest.mark.skipif(INSIDE, reason="this is the process that it starts")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "--quiet", str(Path(__file__))]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "11 passed" in done.stdout


@pytest.fixture
def kernels() -> Any:
    return importlib.import_module("saetrain.compute.triton_kernels")


def codes(generator: torch.Generator, bags: int, latents: int) -> tuple[torch.Tensor, ...]:
    """index, weight, bag, offsets; some bags are empty."""
    counts = torch.randint(0, 4, (bags,), generator=generator)
    bag = torch.repeat_interleave(torch.arange(bags), counts)
    index = torch.randint(0, latents, (len(bag),), generator=generator)
    weight = torch.randn(len(bag), generator=generator)
    return index, weight, bag, torch.nn.functional.pad(counts.cumsum(0), (1, 0))


@inside
@pytest.mark.parametrize("width", [1, 5, 16, 1030])  # 1,030 takes two blocks of columns
@pytest.mark.parametrize("bags", [0, 7])
def test_bag_sum_and_bag_dot_equal_plain_torch(kernels: Any, width: int, bags: int) -> None:
    generator = torch.Generator().manual_seed(width)
    index, weight, bag, offsets = codes(generator, bags, 11)
    table = torch.randn(11, width, generator=generator)
    up = torch.randn(bags, width, generator=generator)
    dense = torch.zeros(bags, width, dtype=torch.float64)
    dense.index_add_(0, bag, weight[:, None].double() * table[index].double())
    torch.testing.assert_close(kernels.bag_sum(table, index, weight, offsets).double(), dense, rtol=1e-5, atol=1e-5)
    dots = (up[bag].double() * table[index].double()).sum(1)
    torch.testing.assert_close(kernels.bag_dot(up, table, index, bag).double(), dots, rtol=1e-5, atol=1e-4)


@inside
def test_tables_of_bfloat16_are_summed_in_float32(kernels: Any) -> None:
    """256 + 1 is 256 in bfloat16: a sum in that type would stay there."""
    table = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)
    index = torch.tensor([0] + [1] * 64)
    found = kernels.bag_sum(table, index, torch.ones(65), torch.tensor([0, 65]))
    assert float(found) == 320.0
    assert found.dtype == torch.float32


@inside
@pytest.mark.parametrize("width", [5, 1030])
def test_rows_of_bfloat16_give_what_the_same_numbers_give_in_float32(kernels: Any, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    index, weight, bag, offsets = codes(generator, 7, 11)
    table = torch.randn(11, width, generator=generator).bfloat16()
    up = torch.randn(7, width, generator=generator)
    assert torch.equal(*(kernels.bag_sum(rows, index, weight, offsets) for rows in (table, table.float())))
    assert torch.equal(*(kernels.bag_dot(up, rows, index, bag) for rows in (table, table.float())))
