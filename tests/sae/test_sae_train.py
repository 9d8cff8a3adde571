"""Whole runs on rows in memory: they find planted dictionaries, sweeps equal single runs, NaNs are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import saetrain
from saetrain.compute.kernels import Codes, Encoder
from saetrain.compute.selection import topk
from saetrain.config import Config, field_help, parse_field, resolve
from saetrain.errors import ConfigError, DataError, SaetrainError
from saetrain.exchange.folders import export
from saetrain.memory import predict, together
from saetrain.runs.sweeps import combinations, with_texts
from saetrain.runs.trained import recorded
from saetrain.training import checkpoint
from saetrain.training.log import read_log
from saetrain.training.losses import step
from saetrain.training.train import fit
from saetrain.variants.table import VARIANTS
from saetrain.variants.topk import TopK
from support.sae import ARCHS, MemorySource, Planted, matched, one_rank, small, small_model

PLANTED: dict[str, dict[str, Any]] = {
    "topk": {},
    "batchtopk": {},
    "matryoshka": {"widths": (64, 128)},
    "relu": {"sparsity": 0.7},
    "jumprelu": {"sparsity": 0.5},
    "gated": {"sparsity": 4.0},
}


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted.make(12_000, 32, 64, active=3.0)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_planted_dictionary_is_found(arch: str, planted: Planted, tmp_path: Path) -> None:
    settings = {"d_sae": 128, "k": 3, "steps": 400, "batch_size": 256, "lr": 4e-3, "tile": 256}
    config = Config(arch=arch, **(settings | PLANTED[arch]))
    with one_rank() as mesh:
        source = MemorySource(planted.rows, planted.documents)
        last = fit(source, {tmp_path: config}, mesh)[tmp_path]
    sae = saetrain.load(tmp_path)
    cosine = matched(sae.W_dec, planted.dictionary)
    assert float(cosine.mean()) >= 0.9
    assert last["eval_fvu"] < 0.2
    # The folded model computes on raw rows what the sharded one computes on normalised rows.
    rows = planted.rows[-600:]
    error = (sae(rows) - rows).square().sum() / (rows - rows.mean(0)).square().sum()
    assert float(error) == pytest.approx(last["eval_fvu"], rel=1e-3)
    active = (sae.encode(rows) > 0).sum(1).float().mean()
    assert float(active) == pytest.approx(last["eval_l0"], rel=1e-3)


def test_the_first_step_of_batchtopk_lists_few_values(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, above = [], Encoder.above

    def counted(self: Encoder, x: torch.Tensor, floor: Any) -> Codes:
        found = above(self, x, floor)
        seen.append(len(found.value))
        return found

    monkeypatch.setattr(Encoder, "above", counted)
    with one_rank() as mesh:
        for measured in (True, False):
            model = small_model("batchtopk", mesh, Planted.make(512, 16, 24).rows)
            if not measured:  # the control
                model.state["threshold"].zero_()
            seen.clear()
            step(model, model.norm(Planted.make(512, 16, 24).rows[256:]))
            assert (seen[0] < 2 * 4 * 256) == measured  # of 256 x 64, half of which are positive


def test_an_untrained_dictionary_is_not_found(planted: Planted) -> None:
    random = torch.randn(128, 32, generator=torch.Generator().manual_seed(0))
    assert float(matched(random, planted.dictionary).mean()) < 0.7


def test_a_member_of_a_sweep_is_the_run_of_its_config_alone(tmp_path: Path) -> None:
    """Seeds, widths and precisions differ, over several epochs, and all members read the same batches."""
    data = Planted.make(2048, 16, 24)
    base = {"batch_size": 512, "steps": 8, "holdout": 64, "k": 4, "tile": 64, "lr": 3e-3}
    lists = {"seed": [3, 4], "d_sae": [32, 64], "compute": ["float32", "float64"]}
    members = combinations(base, with_texts(lists))
    with one_rank() as mesh:
        together = MemorySource(data.rows, data.documents)
        fit(together, {tmp_path / name: config for name, config in members.items()}, mesh)
        assert len(together.seen) == 8  # one read for eight
        name = "seed=4-d_sae=64-compute=float64"
        mixed = contents(tmp_path / name)
        for folder, due in (("alone", recorded(tmp_path / name)[0]), ("control", members[name])):
            config = due if folder == "alone" else replace(due, order_seed=4)  # later epochs in another order
            fit(MemorySource(data.rows, data.documents), {tmp_path / folder: config}, mesh)
            same = {n: torch.equal(t, mixed[n]) for n, t in contents(tmp_path / folder).items()}
            assert all(same.values()) == (folder == "alone"), same
        with pytest.raises(ConfigError, match="differ in: batch_size 512 / 16"):
            one, other = members[name], replace(members[name], batch_size=16)
            fit(together, {tmp_path / "a": one, tmp_path / "b": other}, mesh)


def contents(folder: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.find(folder)
    return {name: found.read(name) for name in found.files[0].specs}


def test_runs_that_do_not_fit_into_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, config = Planted.make(2048, 16, 24), small("topk", steps=1)
    one = together([predict(config, 16)])
    monkeypatch.setattr("saetrain.training.members.free_bytes", lambda device: one)
    with one_rank() as mesh:
        source = MemorySource(data.rows, data.documents)
        with pytest.raises(ConfigError, match=r"2 runs at once would take .* are free: choose fewer runs at once"):
            fit(source, {tmp_path / "runs" / n: config for n in "ab"}, mesh)
        assert not (tmp_path / "runs").exists()
        fit(source, {tmp_path / "a": config}, mesh)  # one of them fits


class Halved(TopK):
    """A variant without a file in the package: topk with half of the k latents."""

    name = activation = "halved"

    def choose(self, encoder: Encoder, xc: torch.Tensor) -> Codes:
        return topk(encoder, xc, self.config.k // 2, self.mesh)

    @staticmethod
    def activate(pre: torch.Tensor, k: int, threshold: torch.Tensor | None) -> torch.Tensor:
        return TopK.activate(pre, k // 2, threshold)

    @classmethod
    def saelens_settings(cls, k: int) -> dict[str, Any]:
        return TopK.saelens_settings(k // 2)


def test_a_variant_is_a_class_and_a_row_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "halved", Halved)
    data = Planted.make(2048, 16, 24)
    with one_rank() as mesh:
        source = MemorySource(data.rows, data.documents)
        last = fit(source, {tmp_path / "run": small("halved", k=6, compute="float32")}, mesh)[tmp_path / "run"]
    assert 2 < last["l0"] <= 3
    assert last["eval_l0"] <= 3
    sae = saetrain.load(tmp_path / "run")
    assert (sae.encode(data.rows) > 0).sum(1).max() == 3
    export(tmp_path / "run", tmp_path / "out")
    assert torch.equal(saetrain.load(tmp_path / "out")(data.rows), sae(data.rows))


def test_lines_hold_every_metric_and_are_numbers(tmp_path: Path) -> None:
    data = Planted.make(2048, 16, 24)
    for arch in ARCHS:
        with one_rank() as mesh:
            source = MemorySource(data.rows, data.documents)
            fit(source, {tmp_path / arch: small(arch, log_every=2, eval_every=10)}, mesh)
        found = read_log(tmp_path / arch)
        assert [line["step"] for line in found] == list(range(2, 21, 2))
        always = {
            "loss",
            "reconstruction",
            "fvu",
            "l0",
            "lr",
            "dead",
            "dense",
            "density",
            "document_entropy",
            "gradient_norm.W_enc",
            "gradient_norm.all",
            "update_norm.W_dec",
            "tokens",
            "seconds",
            "time",
        }
        own = {"relu": {"sparsity"}, "jumprelu": {"sparsity", "preact", "threshold"}}
        own |= {"batchtopk": {"threshold"}, "matryoshka": {"threshold"}, "gated": {"sparsity", "gate", "threshold"}}
        timed, evaluated = ({"tokens_per_s", "mfu", "loader_wait"}, {"eval_fvu", "eval_l0", "decoder_cosine_mean"})
        for line in found:
            assert always | own.get(arch, set()) <= set(line)
            assert (line["step"] > 2) == (timed <= set(line))
            assert (line["step"] % 10 == 0) == (evaluated <= set(line))
            assert all(v == v for v in line.values())
        assert sum(found[-1]["density"]) == 64


@pytest.mark.parametrize(("more", "read"), [({}, 2048), ({"holdout": 64}, 1984)])
def test_all_rows_are_trained_on_where_another_store_is_evaluated(
    more: dict[str, int], read: int, tmp_path: Path
) -> None:
    data, asked = Planted.make(2048, 16, 24), []
    source, other = (MemorySource(data.rows, data.documents) for _ in range(2))
    batches = source.batches
    source.batches = lambda rows, *rest: asked.append(rows) or batches(rows, *rest)  # type: ignore[method-assign]
    config = Config(d_sae=64, k=4, steps=2, batch_size=32, tile=16, **more)
    said: list[str] = []
    with one_rank() as mesh:
        line = fit(source, {tmp_path: config}, mesh, heldout=other, say=said.append)[tmp_path]
        assert (asked, line["eval_rows"]) == ([read], 2048)
        assert f"on {read:,} rows" in said[0]
        assert recorded(tmp_path)[0].holdout == 2048 - read
        fit(source, {tmp_path / "tail": config}, mesh)
    assert asked[1] == 2048 - more.get("holdout", 102)  # negative control: its own tail is left out


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_met_in_training_is_named(bad: float, tmp_path: Path) -> None:
    data = Planted.make(2048, 16, 24)
    rows = torch.cat([data.rows[:1000], data.rows[:1000]])
    source = MemorySource(rows, torch.arange(2000))
    source.statistics = lambda: MemorySource(data.rows, data.documents).statistics()  # type: ignore[method-assign]
    with one_rank() as mesh:
        batches = source.batches

        def spoilt(*args: Any) -> Any:
            rows[500, 3] = bad  # after initialisation has looked at the first rows
            return batches(*args)

        source.batches = spoilt  # type: ignore[method-assign]
        with pytest.raises(DataError, match=r"column 3 is (nan|inf)"):
            fit(source, {tmp_path: small("topk", steps=100)}, mesh)
        assert not checkpoint.published(tmp_path) or checkpoint.find(tmp_path).read("W_enc").isfinite().all()


def test_divergence_is_told_from_bad_rows(tmp_path: Path) -> None:
    data = Planted.make(2048, 16, 24)
    with one_rank() as mesh, pytest.raises(SaetrainError, match="diverged"):
        source = MemorySource(data.rows, data.documents)
        fit(source, {tmp_path: small("relu", lr=1e300, clip=0.0, compute="float32")}, mesh)


def test_defaults_follow_the_size_of_the_data() -> None:
    little, much = resolve(Config(), 384, 100_000), resolve(Config(), 4096, 10**9)
    assert (little.batch_size, little.holdout, little.d_sae) == (256, 5000, 6144)
    assert little.steps == 2000
    assert (much.batch_size, much.holdout, much.d_sae, much.dead_tokens) == (4096, 16_384, 65_536, 10**7)
    assert much.steps == (10**9 - 16_384) // 4096
    assert resolve(little, 384, 100_000) == little  # nothing is left to choose
    for config in (little, much):
        assert Config.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="do not fill one batch"):
        resolve(Config(batch_size=4096), 8, 1000)
    with pytest.raises(ConfigError, match="k=100 is more than d_sae=64"):
        resolve(Config(k=100, d_sae=64), 8, 10**6)


@pytest.mark.parametrize("wrong", [{"arch": "gate"}, {"k": 0}, {"lr": -1.0}, {"widths": (4, 2)}, {"compute": "fp8"}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Config(**wrong)


def test_every_setting_has_its_help() -> None:
    names = set(Config().to_json())
    assert set(field_help()) == names
    assert parse_field("widths", "4,8") == (4, 8)
    assert parse_field("steps", "1e3") == 1000
    with pytest.raises(ConfigError, match="d_sae"):
        parse_field("d_sae", "many")
