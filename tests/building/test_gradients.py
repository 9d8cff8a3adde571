"""Collected gradients are those of a plain loop over windows, for which a hook adds zero to the residual stream."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actshuffle import filter_rows
from actshuffle.errors import RequestError, SourceError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from actshuffle.building import models as models_module  # noqa: E402
from actshuffle.building.collection import collect  # noqa: E402
from actshuffle.loading.dataset import Dataset, open_dataset  # noqa: E402

WORDS = [f"w{i}" for i in range(40)]
WIDTH, CONTEXT, BOS, BLOCKS = 16, 9, 1, 3
SIZES = {"vocab_size": 43, "hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2}
SIZES |= {"num_hidden_layers": BLOCKS}


@pytest.fixture(scope="module", autouse=True)
def alone() -> Any:
    """Use one thread, so that sums have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(kind: str) -> Any:
    """A model of random weights, small enough for a loop."""
    t = transformers
    if kind == "gpt2":
        shape = {"vocab_size": 43, "n_embd": WIDTH, "n_layer": BLOCKS, "n_head": 2, "n_positions": 32}
        return t.GPT2LMHeadModel(t.GPT2Config(**shape, bos_token_id=1, eos_token_id=2))
    if kind == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**SIZES, num_key_value_heads=1))
    if kind == "t5":
        return t.T5Model(t.T5Config(vocab_size=43, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    config = t.BertConfig(**SIZES, max_position_embeddings=32)
    return t.BertForMaskedLM(config) if kind == "bert" else t.BertModel(config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``saved(kind)``: the folder of a model and a tokenizer, made once."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["[UNK]", "<s>", "</s>", *WORDS])}
    folder = tmp_path_factory.mktemp("models")

    @cache
    def of(kind: str) -> Path:
        torch.manual_seed(0)
        made(kind).save_pretrained(folder / kind)
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", bos_token="<s>")
        fast.save_pretrained(folder / kind)
        return folder / kind

    return of


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of all lengths; windows of one token have no loss."""
    dice = random.Random(2)
    lengths = (20, 1, CONTEXT, CONTEXT + 1, 13, 2)
    lines = [json.dumps({"text": " ".join(dice.choice(WORDS) for _ in range(n))}) for n in lengths]
    file = tmp_path_factory.mktemp("text") / "a.jsonl"
    file.write_text("\n".join(lines))
    return file


def gather(model: Path, text: Path, out: Path, **options: Any) -> Dataset:
    shape: dict[str, Any] = {"layers": range(BLOCKS + 1), "context": CONTEXT, "drop_norm": 0, "fsync": False}
    collect(str(model), [text], out, **(shape | options))
    return open_dataset(out)


def windows(folder: Path, text: Path, lead: tuple[int, ...]) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for line in text.read_text().split("\n"):
        ids = tokenizer(json.loads(line)["text"])["input_ids"]
        step = CONTEXT - len(lead)
        found += [[*lead, *ids[a : a + step]] for a in range(0, len(ids), step)]
    return found


def plain_gradients(model: Any, tokens: list[int], layer: int) -> np.ndarray:
    """The gradient of one window's loss with respect to what a hook adds to the residual stream: zero."""
    inner = model.base_model
    blocks, norm = (inner.h, inner.ln_f) if hasattr(inner, "h") else (inner.layers, inner.norm)
    added = torch.zeros(len(tokens), WIDTH, requires_grad=True)

    def after(_: Any, __: Any, output: Any) -> Any:
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        return (args[0] + added, *args[1:]), kwargs

    if layer == 0:
        hook = blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    else:
        hook = (norm if layer == BLOCKS else blocks[layer - 1]).register_forward_hook(after)
    logits = model(torch.tensor([tokens])).logits[0]
    hook.remove()
    loss = torch.zeros(())
    for at in range(len(tokens) - 1):
        loss = loss - torch.log_softmax(logits[at], 0)[tokens[at + 1]]
    if len(tokens) > 1:
        loss.backward()
    return np.zeros((len(tokens), WIDTH), "f4") if added.grad is None else added.grad.numpy()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("lead", [(), (BOS,)])
def test_gradients_are_those_of_a_plain_loop(
    saved: Callable[[str], Path], text: Path, tmp_path: Path, kind: str, lead: tuple[int, ...]
) -> None:
    data = gather(saved(kind), text, tmp_path / "x.zarr", gradients=True, prefix=BOS if lead else None)
    model = transformers.AutoModelForCausalLM.from_pretrained(saved(kind), dtype=torch.float32).eval()
    for layer in range(BLOCKS + 1):
        parts = [plain_gradients(model, tokens, layer) for tokens in windows(saved(kind), text, lead)]
        expected = np.concatenate([part[len(lead) :] for part in parts])
        found = data.read(f"grad_layer_{layer}", 0, data.rows)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
        assert np.abs(expected).max() > 1e-3
    last = np.cumsum([len(tokens) - len(lead) for tokens in windows(saved(kind), text, lead)]) - 1
    assert not data.read(f"grad_layer_{BLOCKS}", 0, data.rows)[last].any()  # which predict nothing
    assert "cross entropy in nats" in data.attributes["arrays"]["grad_layer_2"]


def test_rows_are_the_same_with_gradients_and_without(saved: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": [1, 2], "hooks": ["h.1.mlp"], "dtype": "bfloat16"}
    without = gather(saved("gpt2"), text, tmp_path / "x.zarr", **options)
    data = gather(saved("gpt2"), text, tmp_path / "y.zarr", gradients=True, **options)
    assert set(data.fields) - set(without.fields) == {"grad_layer_1", "grad_layer_2"}
    for name in without.fields:
        np.testing.assert_array_equal(data.read(name, 0, data.rows), without.read(name, 0, without.rows))
    assert (data.fields["layer_1"].dtype_name, data.fields["grad_layer_1"].dtype_name) == ("bfloat16", "float32")
    model, plain = data.attributes["model"], without.attributes["model"]
    assert {k: v for k, v in model.items() if k != "head"} == plain


def test_gradients_do_not_depend_on_batches_or_parts(
    saved: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows that share a batch do not share a loss; a batch has few enough logits."""
    options: dict[str, Any] = {"layers": [1], "gradients": True, "chunk_rows": 8}
    data = gather(saved("gpt2"), text, tmp_path / "x.zarr", **options)
    again = gather(saved("gpt2"), text, tmp_path / "y.zarr", batch_tokens=1, block_bytes=2000, **options)
    found = data.read("grad_layer_1", 0, data.rows)
    monkeypatch.setattr(models_module, "LOGITS", 2 * CONTEXT * 43)
    few = gather(saved("gpt2"), text, tmp_path / "z.zarr", **options)
    assert few.attributes["arrays"] == data.attributes["arrays"]
    for other in (again, few):
        values = other.read("grad_layer_1", 0, data.rows)
        np.testing.assert_allclose(values, found, rtol=1e-4, atol=1e-6 * np.abs(found).max())


def test_norms_of_gradients_drop_no_row(saved: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    """They differ by orders of magnitude, and are 0 at the ends of windows."""
    options: dict[str, Any] = {"layers": [3], "gradients": True}
    whole = gather(saved("gpt2"), text, tmp_path / "x.zarr", **options)
    norms = np.linalg.norm(whole.read("grad_layer_3", 0, whole.rows), axis=1)
    assert norms.max() > 1.2 * np.median(norms)
    assert gather(saved("gpt2"), text, tmp_path / "y.zarr", drop_norm=1.2, **options).rows == whole.rows
    filter_rows(tmp_path / "x.zarr", tmp_path / "z.zarr", drop_norm=1.2, fsync=False)
    assert open_dataset(tmp_path / "z.zarr").rows == whole.rows
    filter_rows(tmp_path / "x.zarr", tmp_path / "w.zarr", drop_norm=1.2, arrays=["grad_layer_3"], fsync=False)
    assert open_dataset(tmp_path / "w.zarr").rows == (norms <= 1.2 * np.median(norms)).sum() < whole.rows


def test_models_without_such_a_loss(saved: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    def assert_refused(words: str, kind: str, error: type[Exception] = RequestError, **options: Any) -> None:
        with pytest.raises(error, match=words):
            gather(saved(kind), text, tmp_path / "x.zarr", **({"layers": [1], "gradients": True} | options))
        assert not list(tmp_path.glob("x.zarr*"))

    assert_refused("in .*bert .* a token sees later ones", "bert")
    assert_refused("with its head; the files of .* have no ", "bare bert")
    assert_refused("is an encoder-decoder", "t5")
    assert_refused("gradients are those of layers", "gpt2", layers=[], hooks=["h.0"])
    assert_refused("gradients must be True or False", "gpt2", gradients="yes")
    with pytest.raises(SourceError, match="needs a causal language model; cannot load"):
        models_module.load_causal(str(tmp_path / "absent"), "float32")
