"""Models that are not flat decoders: their activations are right, token by token, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actshuffle.errors import RequestError, SourceError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from actshuffle.building.collection import collect  # noqa: E402
from actshuffle.building.models import Model  # noqa: E402
from actshuffle.loading.dataset import open_dataset  # noqa: E402

WIDTH, VOCABULARY = 16, 63
SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2}
VISION = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
FEED = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
GEMMA = {"num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 3}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}
TOKENS = np.arange(3, 31).reshape(4, 7)

MAKERS: dict[str, Callable[[Any], Any]] = {
    "albert": lambda t: t.AlbertConfig(**SIZES, embedding_size=8, num_hidden_layers=4),
    "funnel": lambda t: t.FunnelConfig(
        vocab_size=VOCABULARY, block_sizes=[2, 2], d_model=WIDTH, n_head=2, d_head=8, d_inner=32, num_decoder_layers=1
    ),
    "t5": lambda t: t.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=3, num_heads=2),
    "bart": lambda t: t.BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=3, decoder_layers=2, **FEED, **SPECIAL
    ),
    "gemma3": lambda t: t.Gemma3Config(
        text_config=SIZES | GEMMA, vision_config=VISION, image_token_index=60, boi_token_index=61, eoi_token_index=62
    ),
    "llava": lambda t: t.LlavaConfig(
        text_config=t.LlamaConfig(**SIZES, num_hidden_layers=3),
        vision_config=t.CLIPVisionConfig(**VISION),
        image_token_index=60,
    ),
    "llama": lambda t: t.LlamaConfig(**SIZES, num_hidden_layers=3),
    "xlnet": lambda t: t.XLNetConfig(vocab_size=VOCABULARY, d_model=WIDTH, n_layer=3, n_head=2, d_inner=32),
    "mixtral": lambda t: t.MixtralConfig(**SIZES, num_key_value_heads=1, num_hidden_layers=2, num_local_experts=4),
    "roberta": lambda t: t.RobertaConfig(**SIZES, num_hidden_layers=2, max_position_embeddings=20, **SPECIAL),
    "vit": lambda t: t.ViTConfig(**VISION),
    "whisper": lambda t: t.WhisperConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=2, **FEED, **SPECIAL
    ),
    "bert": lambda t: t.BertConfig(**SIZES, num_hidden_layers=3),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``saved(kind)``: the folder of a model with random weights and a tokenizer, made once."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {w: i for i, w in enumerate(["[UNK]", "[A]", "[B]", *(f"w{i}" for i in range(60))])}
    folder = tmp_path_factory.mktemp("models")

    @cache
    def of(kind: str) -> Path:
        torch.manual_seed(0)
        config = MAKERS[kind](transformers)
        config.architectures = [type(config).__name__.replace("Config", "Model")]
        model = transformers.AutoModel.from_config(config)
        model.save_pretrained(folder / kind)
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
        tokenizer.save_pretrained(folder / kind)
        return folder / kind

    return of


def model_of(folder: Path, layers: Any = (), hooks: Any = ()) -> Model:
    settings = {"model_dtype": "float32", "dtype": "float32", "device": "cpu", "probe": [5, 6, 7]}
    return Model({**settings, "model": str(folder), "layers": list(layers), "hooks": list(hooks)})


def plain(folder: Path) -> Any:
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def states(model: Any) -> list[np.ndarray]:
    with torch.inference_mode():
        return [h.numpy() for h in model(input_ids=torch.from_numpy(TOKENS), output_hidden_states=True).hidden_states]


def refusal(folder: Path, layers: Any = (), hooks: Any = (), error: type[Exception] = RequestError) -> str:
    with pytest.raises(error) as caught:
        model_of(folder, layers, hooks)
    return str(caught.value)


# --- Right ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "bert", "albert", "gemma3", "llava", "xlnet", "mixtral", "roberta"])
def test_hidden_states_are_those_of_transformers(saved: Callable[[str], Path], kind: str) -> None:
    expected = states(plain(saved(kind)))
    assert len(expected) > 2
    for layers in (range(len(expected)), range(len(expected) - 1), [1]):  # the last two may leave early
        found = model_of(saved(kind), layers).raw(TOKENS)
        assert set(found) == {f"layer_{n}" for n in layers}
        for n in layers:
            np.testing.assert_array_equal(found[f"layer_{n}"].numpy(), expected[n])


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_of_an_encoder_decoder_the_encoder_is_taken(saved: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    expected = states(plain(saved(kind)).get_encoder())
    for layers in ([0, 1, 2, 3], [1, 2]):
        found = model_of(saved(kind), layers, ["encoder"]).raw(TOKENS)
        for n in layers:
            np.testing.assert_array_equal(found[f"layer_{n}"].numpy(), expected[n])
        np.testing.assert_array_equal(found["encoder"].numpy(), expected[3])
    (tmp_path / "a.txt").write_text("w1 w2 w3 w4 w5")
    collect(str(saved(kind)), [tmp_path / "a.txt"], tmp_path / "x.zarr", layers=[1], context=4, fsync=False)
    told = open_dataset(tmp_path / "x.zarr").attributes
    assert told["model"]["part"] == "encoder"
    assert told["arrays"]["layer_1"].startswith("hidden_states[1] of the encoder: ")
    name = {"t5": "decoder.block.0", "bart": "decoder.layers.0"}[kind]
    assert "only the encoder of this model runs" in refusal(saved(kind), hooks=[name])


def test_outputs_of_transformers_own_kind(saved: Callable[[str], Path]) -> None:
    expected = states(plain(saved("bert")))
    hooks = ["encoder", "encoder.layer.0", "encoder.layer.1.attention"]
    found = model_of(saved("bert"), [1], hooks).raw(TOKENS)
    np.testing.assert_array_equal(found["encoder"].numpy(), expected[3])
    np.testing.assert_array_equal(found["encoder.layer.0"].numpy(), expected[1])
    assert found["encoder.layer.1.attention"].shape == (4, 7, WIDTH)  # the first of a tuple


def test_layers_of_a_funnel_that_keep_all_tokens(saved: Callable[[str], Path]) -> None:
    expected = states(plain(saved("funnel")))
    assert [h.shape[1] for h in expected] == [7, 7, 7, 4, 4, 7, 7]
    found = model_of(saved("funnel"), [0, 2, 5, 6]).raw(TOKENS)
    for n in (0, 2, 5, 6):
        np.testing.assert_array_equal(found[f"layer_{n}"].numpy(), expected[n])
    told = refusal(saved("funnel"), [2, 4])
    assert "'layer_4' gives torch.float32 of shape (3, 3, 16) for 3 windows of 5 tokens" in told
    assert told.endswith("hidden states [0, 1, 2, 5, 6] do")


# --- Refused --------------------------------------------------------------------------------------


def test_a_block_that_runs_several_times(saved: Callable[[str], Path]) -> None:
    shared = "encoder.albert_layer_groups.0.albert_layers.0"
    assert f"module '{shared}' runs 4 times in a pass" in refusal(saved("albert"), hooks=[shared])
    assert "runs 4 times" in refusal(saved("albert"), [1], [f"{shared}.ffn"])
    assert "layer_2" in model_of(saved("albert"), [2], ["encoder"]).raw(TOKENS)


def test_axes_are_told_apart(saved: Callable[[str], Path]) -> None:
    assert "of shape (5, 3, 16) for 3 windows of 5" in refusal(saved("xlnet"), hooks=["layer.0.ff"])  # time first
    assert "of shape (15, " in refusal(saved("mixtral"), hooks=["layers.0.mlp.gate"])  # all tokens of all windows
    assert "of shape (3, 16)" in refusal(saved("bert"), hooks=["pooler"])
    assert "of shape (1, 5, 16)" in refusal(saved("bert"), hooks=["embeddings.position_embeddings"])
    assert "no part in reading text" in refusal(saved("llava"), hooks=["multi_modal_projector"])


class Odd(torch.nn.Module):
    """A module whose output has the axes of activations, and is none."""

    def __init__(self, output: Callable[[Any], Any]) -> None:
        super().__init__()
        self.output = output

    def forward(self, hidden: Any) -> Any:
        return self.output(hidden)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (lambda h: h.long(), "torch.int64 of shape"),
        (lambda h: {"hidden": h}, "gives dict"),
        (lambda h: (None, h), "gives NoneType"),
        (lambda h: h @ h.mT, "width is not the same"),
        (lambda h: h.mT, "of shape (3, 16, 5)"),
    ],
)
def test_outputs_that_are_no_activations(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, output: Any, words: str
) -> None:
    def load(name: str, dtype: str) -> Any:
        model = plain(Path(name))
        model.odd = Odd(output)
        model.encoder.register_forward_hook(lambda _, __, found: [model.odd(found[0])][1:] or None)
        return model

    monkeypatch.setattr("actshuffle.building.models.load_model", load)
    assert words in refusal(saved("bert"), hooks=["odd"])


def test_models_that_do_not_read_text(saved: Callable[[str], Path]) -> None:
    assert "(ViTModel) cannot run on tokens alone" in refusal(saved("vit"), [1], error=SourceError)
    assert "(WhisperEncoder) cannot run on tokens alone" in refusal(saved("whisper"), [1], error=SourceError)


def test_a_window_that_the_model_cannot_take(saved: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w1 " * 50)
    with pytest.raises(SourceError, match="cannot run on a window of 20 tokens"):  # 20 positions, less two
        collect(str(saved("roberta")), [tmp_path / "a.txt"], tmp_path / "x.zarr", layers=[1], fsync=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    collect(str(saved("roberta")), [tmp_path / "a.txt"], tmp_path / "x.zarr", layers=[1], context=18, fsync=False)


def test_the_command_refuses_in_one_sentence(saved: Callable[[str], Path], tmp_path: Path) -> None:
    from click.testing import CliRunner

    from actshuffle.cli.app import main

    (tmp_path / "a.txt").write_text("w1 w2")
    command = ["collect", "--text", str(tmp_path / "a.txt"), "--out", str(tmp_path / "x.zarr"), "--json"]
    for kind, options, words in [
        ("funnel", ["--layers", "3"], "not one vector for each token"),
        ("albert", ["--hooks", "encoder.albert_layer_groups.0"], "runs 4 times"),
        ("gemma3", ["--layers", "4"], "hidden states 0 to 3"),
        ("vit", ["--layers", "1"], "cannot run on tokens alone"),
    ]:
        done = CliRunner().invoke(main, [*command, "--model", str(saved(kind)), *options])
        assert done.exit_code == 2, done.output
        assert words in json.loads(done.stdout)["message"]
        assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
