"""A causal model's hidden state is that of transformers, and an edit of it does what it says, and no more."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import actshuffle
from actshuffle import read_texts
from actshuffle.errors import SourceError
from saetrain.errors import ConfigError, DataError
from saetrain.probing.causal import LanguageModel
from saetrain.probing.corpus import Corpus, Cutting, measure_scale
from support.causal import saved, texts, tiny

TOKENS = torch.tensor([[3, 9, 17, 4, 33], [8, 8, 21, 60, 2]])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_hidden_states_are_those_of_transformers(kind: str, layer: int) -> None:
    model = tiny(layer, kind)
    with torch.no_grad():
        plain = model.model(input_ids=TOKENS, output_hidden_states=True)
        assert torch.equal(model.hidden(TOKENS), plain.hidden_states[layer])
        assert torch.equal(model.run(TOKENS, lambda x, _: x).logits, plain.logits)
        zeroed = model.run(TOKENS, lambda x, _: torch.zeros_like(x)).logits
        assert not torch.allclose(zeroed, plain.logits)
        assert torch.equal(model.run(TOKENS).logits, plain.logits)  # the hook has gone


def test_an_edit_is_told_where_it_is() -> None:
    model, seen = tiny(), []

    def look(x: torch.Tensor, start: int) -> torch.Tensor:
        seen.append((start, x.shape[1]))
        return x

    with torch.no_grad():
        past = model.run(TOKENS[:, :3], look, cache=True).past
        model.run(TOKENS[:, 3:4], look, past, cache=True)
        model.run(TOKENS[:, 4:], look, past, cache=True)
    assert seen == [(0, 3), (3, 1), (4, 1)]


def test_layers_that_cannot_be_edited_are_refused() -> None:
    with pytest.raises(ConfigError, match="follows the final norm"):
        tiny(3)
    with pytest.raises(ConfigError, match="hidden states 0 to 3"):
        tiny(4)
    with pytest.raises(ConfigError, match="no such folder"):
        LanguageModel.load("./nowhere", 1)


def test_models_come_from_folders(tmp_path: Path) -> None:
    model = LanguageModel.load(str(saved(tmp_path)), 1, device="cpu")
    with torch.no_grad():
        assert torch.equal(model.run(TOKENS).logits, tiny().run(TOKENS).logits)
    with pytest.raises(DataError, match="rows of 5 numbers"):
        model.check_width(5)


# --- Windows


def test_windows_hold_every_token_once_behind_the_prefix() -> None:
    model, made = tiny(), texts(9)
    corpus = Corpus(model, made, Cutting(context=12, prefix="<s>", seed=4))
    found = {}
    for document in corpus:
        rows = [row for batch in document.batches for row in batch.tokens.tolist()]
        assert all(row[0] == 1 for row in rows)
        assert all((batch.lo, batch.hi) == (1, batch.tokens.shape[1]) for batch in document.batches)
        found[document.name] = sorted(token for row in rows for token in row[1:])
    for name, text in made:
        tokens = model.tokens_of(text)
        lonely = len(tokens) % 11 == 1  # one token alone predicts nothing
        assert found[name] == sorted(tokens[:-1] if lonely else tokens)


def test_windows_and_rows_are_those_of_collect(tmp_path: Path) -> None:
    model, made = tiny(), texts(7)
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": t}) for _, t in made))
    saved(tmp_path / "model")
    actshuffle.collect(
        str(tmp_path / "model"), [text], tmp_path / "acts.zarr", layers=[2], prefix="<s>", context=12, drop_norm=0
    )
    rows = actshuffle.open_dataset(tmp_path / "acts.zarr")
    held, owner = (torch.from_numpy(np.asarray(rows.read(name, 0, rows.rows))) for name in ("layer_2", "document"))
    corpus = Corpus(model, made, Cutting(context=12, prefix="<s>"))
    for document in corpus:
        ours = torch.cat([model.hidden(b.tokens)[:, b.lo : b.hi].reshape(-1, 16) for b in document.batches])
        theirs = held[owner == document.number]
        assert len(theirs) - len(ours) in (0, 1)  # a last token alone is no window here
        torch.testing.assert_close(ours, theirs[: len(ours)], rtol=1e-5, atol=1e-4)  # batches are cut otherwise
        assert not torch.allclose(ours, held[owner != document.number][: len(ours)], atol=1e-6)


def test_the_seed_alone_decides_which_windows_are_read() -> None:
    model, made = tiny(), texts(30)

    def names(seed: int) -> list[str]:
        return [d.name for d in Corpus(model, made, Cutting(seed=seed))]

    def windows(seed: int) -> list[int]:
        cutting = Cutting(context=8, per_document=2, seed=seed)
        return [len(b.tokens) for d in Corpus(model, made, cutting) for b in d.batches]

    assert names(0) == names(0) != names(1)
    assert sorted(names(0)) == sorted(names(1))
    assert windows(3) == windows(3)
    assert max(windows(3)) == 2


def test_scale_leaves_heavy_rows_out() -> None:
    corpus = Corpus(tiny(), texts(9), Cutting(context=12))
    rows = torch.cat([corpus.model.hidden(b.tokens).reshape(-1, 16) for d in corpus for b in d.batches]).double()
    everything, narrow = measure_scale(corpus, 0.0), measure_scale(corpus, 1.2)
    norms = rows.norm(dim=1)
    assert everything.median_norm == pytest.approx(float(norms.median()), rel=1e-6)
    assert torch.allclose(everything.mean, rows.mean(0))
    kept = norms <= 1.2 * norms.median()
    assert 0 < kept.sum() < len(rows)
    assert torch.allclose(narrow.mean, rows[kept].mean(0))
    assert not torch.allclose(narrow.mean, everything.mean)
    with pytest.raises(ConfigError, match="multiple above 1"):
        measure_scale(corpus, 0.5)


@pytest.mark.parametrize(
    ("cutting", "why"),
    [
        (Cutting(context=2, prefix="<s>"), "two others are needed"),
        (Cutting(prefix="<none>"), "'<none>' is no token"),
        (Cutting(prefix="99"), "'99' is no token"),
        (Cutting(prefix="bos"), "'bos' is no token"),
        (Cutting(context=4000), "takes 64 at most"),
        (Cutting(per_document=-1), "0 .all. or more"),
    ],
)
def test_windows_that_make_no_sense_are_refused(cutting: Cutting, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Corpus(tiny(), texts(2), cutting)


def test_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no documents"):
        Corpus(tiny(), [])
    with pytest.raises(SourceError, match="no such file"):
        list(read_texts([tmp_path / "absent"]))


def test_texts_have_names(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": "four"}\n')
    b = str(tmp_path / "b.jsonl")
    assert list(read_texts([tmp_path])) == [(str(tmp_path / "a.txt"), "one two"), (b, "three"), (f"{b}#1", "four")]
