"""The code that only a GPU runs, tested on a CPU: copies on a stream of their own, precisions, bfloat16 rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from saetrain.compute import kernels
from saetrain.compute.ahead import Ahead, Cursor, ahead
from saetrain.compute.devices import matrix_products, precision
from saetrain.compute.kernels import gathered
from saetrain.config import Config, resolve
from saetrain.memory import predict
from saetrain.settings import Compute
from saetrain.training import checkpoint, train
from saetrain.training.losses import step
from saetrain.variants import family, relu
from support.sae import MemorySource, Planted, one_rank, small, small_model


class Told:
    """Copies that tell what happens when."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def begin(self, tensor: Tensor) -> Tensor:
        self.events.append(("begin", int(tensor[0])))
        return tensor.clone()

    def mark(self) -> int:
        return self.events[-1][1]

    def wait(self, mark: int, batch: dict[str, Tensor]) -> None:
        assert mark == int(batch["x"][0])
        self.events.append(("wait", mark))


class Numbers:
    """A cursor over the batches 0, 1, ... of one number each."""

    wait_seconds = 0.5

    def __init__(self, stop: int = 4) -> None:
        self.at, self.stop = 0, stop

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while self.at < self.stop:
            self.at += 1
            yield {"x": torch.tensor([self.at - 1])}

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def test_the_next_copy_begins_before_a_batch_is_given_out() -> None:
    told = Told()
    for batch in Ahead(Numbers(3), told):
        told.events.append(("step", int(batch["x"][0])))
    assert told.events == [
        *[("begin", 0), ("begin", 1), ("wait", 0), ("step", 0)],
        *[("begin", 2), ("wait", 1), ("step", 1)],
        *[("wait", 2), ("step", 2)],
    ]


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_batches_and_places_are_those_of_the_cursor(stop: int) -> None:
    plain, copied = Numbers(stop), Ahead(Numbers(stop), Told())
    assert copied.state_dict() == plain.state_dict()
    assert copied.wait_seconds == 0.5
    pairs = list(zip(_told(plain), _told(copied), strict=True))
    assert len(pairs) == stop
    assert all(a == b for a, b in pairs)


def _told(cursor: Cursor) -> Iterator[tuple[int, dict[str, Any]]]:
    for batch in cursor:
        yield int(batch["x"][0]), cursor.state_dict()


def test_a_pass_that_is_left_loses_no_batch() -> None:
    copied = Ahead(Numbers(), Told())
    assert int(next(iter(copied))["x"][0]) == 0
    assert [int(batch["x"][0]) for batch in copied] == [1, 2, 3]


def test_a_fault_in_the_next_batch_comes_after_this_one() -> None:
    class Broken(Numbers):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            yield from super().__iter__()
            raise OSError("row 4")

    found = iter(Ahead(Broken(2), Told()))
    assert [int(next(found)["x"][0]) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="row 4"):
        next(found)


def test_what_is_no_tensor_stays_as_it_is() -> None:
    class Named(Numbers):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return ({**batch, "name": "a"} for batch in super().__iter__())

    assert [batch["name"] for batch in Ahead(Named(2), Told())] == ["a", "a"]


def test_a_place_is_gone_back_to() -> None:
    copied = Ahead(Numbers(), Told())
    batches = iter(copied)
    next(batches)
    state = copied.state_dict()
    next(batches)
    copied.load_state_dict(state)
    assert copied.state_dict() == state
    assert [int(batch["x"][0]) for batch in copied] == [1, 2, 3]


def test_on_a_cpu_nothing_is_copied() -> None:
    cursor = Numbers()
    assert ahead(cursor, torch.device("cpu")) is cursor


class Cloned(Told):
    def begin(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def mark(self) -> None: ...
    def wait(self, mark: None, batch: dict[str, Tensor]) -> None: ...


class Careless(Ahead):
    """Its state is that of the cursor, which is a batch ahead."""

    def state_dict(self) -> dict[str, Any]:
        return self.cursor.state_dict()


@pytest.mark.parametrize(("kind", "same"), [(Ahead, True), (Careless, False)])
def test_a_run_that_stops_loses_no_batch(
    kind: type[Ahead], same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Planted.make(2048, 16, 24)

    def trained(folder: str, steps: int) -> Tensor:
        config = small("topk", compute="float32", steps=steps, lr_decay=0.0, lr_warmup=0.0, sparsity_warmup=0.0)
        with one_rank() as mesh:
            train.fit(MemorySource(data.rows, data.documents), {tmp_path / folder: config}, mesh, extend=True)
        return checkpoint.find(tmp_path / folder).read("W_enc")

    plain = trained("plain", 20)
    monkeypatch.setattr(train, "ahead", lambda cursor, device: kind(cursor, Cloned()))
    trained("copied", 9)
    assert torch.equal(trained("copied", 20), plain) is same


# --- precision


@pytest.mark.parametrize(
    ("compute", "device", "found"),
    [
        ("auto", "cuda:1", "bfloat16"),
        ("auto", "cpu", "float32"),
        ("tf32", "cuda", "tf32"),
        ("float64", "cpu", "float64"),
    ],
)
def test_a_precision_is_the_one_asked_for_or_that_of_the_device(compute: str, device: str, found: str) -> None:
    assert precision(compute, device) == found


SWITCHES: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


def switches() -> tuple[str, ...]:
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = "unknown"
    return legacy, *(switch.fp32_precision for switch in SWITCHES)


@pytest.fixture
def restored() -> Iterator[None]:
    before = switches()
    yield
    torch.set_float32_matmul_precision(before[0])
    for switch, precise in zip(SWITCHES, before[1:], strict=True):
        switch.fp32_precision = precise


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("compute", ["float32", "tf32", "bfloat16", "float64"])
@pytest.mark.parametrize("outside", ["", "highest", "high", "medium"])
def test_other_products_are_in_tf32_only_within_a_step(compute: str, outside: str) -> None:
    if outside:
        torch.set_float32_matmul_precision(outside)
    before = switches()
    with pytest.raises(KeyError), matrix_products(compute, torch.device("cuda")):
        assert torch.backends.cuda.matmul.allow_tf32 is (compute in ("tf32", "bfloat16"))
        raise KeyError
    assert switches() == before


@pytest.mark.usefixtures("restored")
def test_a_caller_may_have_used_the_newer_switch() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert switches()[0] == "unknown"
    with matrix_products("float32", torch.device("cuda")):
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.usefixtures("restored")
def test_on_a_cpu_no_switch_is_touched() -> None:
    before = switches()
    with matrix_products("tf32", torch.device("cpu")):
        assert switches() == before


def test_tf32_is_float32_on_a_cpu() -> None:
    rows = Planted.make(2048, 16, 24).rows
    with one_rank() as mesh:
        found = [small_model("relu", mesh, rows, compute=compute) for compute in ("tf32", "float32")]
        x = found[0].norm(rows[:32])
        a, b = (step(model, x).grads for model in found)
    assert found[0].precision == "tf32"
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- narrow rows


@pytest.mark.parametrize(
    ("dtype", "compute", "found"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_rows_are_gathered_in_the_type_of_the_product(
    dtype: torch.dtype, compute: torch.dtype, found: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernel, there in ((object(), found), (None, dtype)):
        monkeypatch.setattr(kernels, "_triton", lambda kernel=kernel: kernel)
        with FakeTensorMode():
            assert gathered(torch.empty(4, 4, device="cuda", dtype=dtype), compute).dtype == there
    assert gathered(torch.empty(4, 4, dtype=dtype), compute).dtype == dtype, "a CPU has no kernel for them"


def test_float64_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sums are in float32."""
    monkeypatch.setattr(kernels, "_triton", object)
    with FakeTensorMode():
        assert kernels._has_kernels(torch.empty(1, 1, device="cuda"))
        assert not kernels._has_kernels(torch.empty(1, 1, device="cuda", dtype=torch.float64))


def _bag_sum(table: Tensor, index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """As the kernel: any table, sums in the type of the weights."""
    bag = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    rows = weight[:, None] * table[index].to(weight.dtype)
    return weight.new_zeros(len(offsets) - 1, table.shape[1]).index_add_(0, bag, rows)


def _bag_dot(up: Tensor, table: Tensor, index: Tensor, bag: Tensor) -> Tensor:
    return (up[bag] * table[index].to(up.dtype)).sum(1)


def test_decoder_rows_are_copied_only_where_that_saves_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,000 rows a copy takes 6,000 bytes a column, and saves 4 an entry."""
    monkeypatch.setattr(kernels, "_triton", object)
    with FakeTensorMode():
        rows = torch.empty(1000, 4, device="cuda")
        for entries, dtype in ((1500, torch.float32), (1501, torch.bfloat16)):
            assert kernels.Decoder(rows, torch.bfloat16, entries).rows.dtype == dtype


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "matryoshka", "relu"])
def test_gradients_from_narrow_rows_are_close(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, seen = Planted.make(2048, 16, 24).rows, set()
    monkeypatch.setattr("saetrain.variants.relu.DENSE_ABOVE", 1.0)

    def bag_sum(table: Tensor, *rest: Tensor) -> Tensor:
        seen.add(table.dtype)
        return _bag_sum(table, *rest)

    with one_rank() as mesh:
        model = small_model(arch, mesh, rows, compute="float32")
        x = model.norm(rows[:32])
        model.state["quiet"][:8] = 10**6  # so that the dead learn too
        exact = step(model, x)
        monkeypatch.setattr(kernels, "_triton", lambda: SimpleNamespace(bag_sum=bag_sum, bag_dot=_bag_dot))
        monkeypatch.setattr(kernels, "_has_kernels", lambda table: True)
        for module in (kernels, family, relu):
            monkeypatch.setattr(module, "gathered", lambda rows, compute: rows.bfloat16())
        model.state["quiet"][:8] = 10**6
        found = step(model, x)
    assert seen == {torch.bfloat16}
    for name, grad in exact.grads.items():
        assert found.grads[name].dtype == torch.float32
        off = float((found.grads[name] - grad).norm() / grad.norm())
        assert 0 < off < 0.02, (name, off)


@pytest.mark.parametrize(("arch", "gathers"), [("topk", True), ("relu", True), ("jumprelu", False), ("gated", False)])
def test_the_plan_counts_narrow_copies_on_a_gpu(arch: str, gathers: bool) -> None:
    def plan(device: str, compute: Compute) -> int:
        settings: dict[str, Any] = {"d_sae": 4096, "k": 16, "steps": 9, "batch_size": 2048, "tile": 256, "holdout": 16}
        config = resolve(Config(arch=arch, device=device, compute=compute, **settings), 128, 10**6)
        return predict(config, 128).peak

    encoder = decoder = 2 * 4096 * 128
    more = plan("cuda", "bfloat16") - plan("cuda", "float32")
    rows = more - encoder - gathers * decoder
    assert (0 < rows < 2 * 2048 * 4 * 128) if gathers else rows == 0
    assert plan("cuda", "float32") - plan("cpu", "float32") >= 4 * 2048 * 128, "the batch that is copied meanwhile"


@pytest.mark.parametrize("arch", ["topk", "matryoshka", "relu"])
def test_a_step_takes_the_tiles_of_the_plan(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saetrain.variants.family.TILE_ELEMENTS", 1 << 12)  # so that a step has several
    rows, seen = Planted.make(2048, 16, 24).rows, []
    with one_rank() as mesh:
        model = small_model(arch, mesh, rows, compute="bfloat16", device="cuda")
        kept = type(model).tile_tokens

        def told(config: Config, shape: Any) -> int:
            tokens: int = kept(config, shape)
            seen.append((shape.narrow, tokens))
            return tokens

        monkeypatch.setattr(type(model), "tile_tokens", staticmethod(told))
        planned = predict(model.config, 16)
        monkeypatch.setattr("saetrain.model.gathers_narrow", lambda precise, device: True)  # as on a GPU
        model.gradients(model.norm(rows[:32]), model.norm(rows[:32]), 1.0)
    assert seen[0][0]
    assert seen[0] == seen[-1]
    assert planned.tile == seen[0][1]
