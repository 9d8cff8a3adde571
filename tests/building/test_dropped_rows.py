"""Rows that `collect` drops: those that are left equal plain transformers' on the same windows, and all are counted.

In the model here the first place of a window and one word have vectors a hundred times as long as others: an attention
sink of either kind.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from actshuffle import filter_rows, info, status
from actshuffle.arrays.names import UNFILTERED
from actshuffle.building import rowfilter
from actshuffle.checking.contents import info_text
from actshuffle.engine.state import status_text
from actshuffle.errors import (
    DestinationExistsError,
    IncompleteStoreError,
    InfeasibleError,
    RequestError,
    ResumeMismatchError,
    SourceError,
)
from actshuffle.jobs.locks import Locks
from actshuffle.storage.files import LocalObjects
from actshuffle.storage.place import as_place

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from actshuffle.building import tokens as tokens_module  # noqa: E402
from actshuffle.building.collection import Collected, collect  # noqa: E402
from actshuffle.loading.dataset import Dataset, open_dataset  # noqa: E402
from support.executors import Stops  # noqa: E402
from support.stores import files  # noqa: E402

WORDS = [f"w{i}" for i in range(40)]
BOS, SINK = 1, 9  # ids of the begin-of-text token, and of a word whose vector is long: w6
WIDTH, CONTEXT = 16, 10


@pytest.fixture(scope="module", autouse=True)
def alone() -> Any:
    """Use one thread, so that sums have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of random weights with two sinks; its tokenizer has a word per token, and adds none."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["[UNK]", "<s>", "</s>", *WORDS])}
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(vocabulary), n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32)
    made = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        made.transformer.wpe.weight[0] *= 100
        made.transformer.wte.weight[SINK] *= 100
    folder = tmp_path_factory.mktemp("model")
    made.save_pretrained(folder)
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", bos_token="<s>").save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of all lengths, one of them empty."""
    dice = random.Random(2)
    lengths = (25, 0, 1, CONTEXT, *(dice.randrange(1, 40) for _ in range(8)))
    lines = [json.dumps({"text": " ".join(dice.choice(WORDS) for _ in range(n))}) for n in lengths]
    file = tmp_path_factory.mktemp("text") / "a.jsonl"
    file.write_text("\n".join(lines))
    return file


def gather(model: Path, text: Path, out: Path, **options: Any) -> tuple[Collected, Dataset]:
    """A collection of all rows whose windows run alone, as they do in `passes`."""
    options = {
        "layers": [0, 1, 2],
        "context": CONTEXT,
        "batch_tokens": 1,
        "drop_norm": 0,
        "fsync": False,
        "chunk_rows": 16,
    } | options
    done = collect(str(model), [text], out, **options)
    return done, open_dataset(out)


class Row(NamedTuple):
    """A token of a window as plain transformers sees it; ``position`` is None for the prefix."""

    token: int
    document: int
    position: int | None
    window_position: int
    states: tuple[np.ndarray, ...]  # by layer


def passes(model: Path, text: Path, lead: tuple[int, ...]) -> list[Row]:
    """Every token that is read, prefixes included: one plain forward pass per window."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows, content = [], CONTEXT - len(lead)
    for document, line in enumerate(text.read_text().split("\n")):
        ids = tokenizer(json.loads(line)["text"])["input_ids"]
        for start in range(0, len(ids), content):
            window = [*lead, *ids[start : start + content]]
            with torch.inference_mode():
                states = plain(torch.tensor([window]), output_hidden_states=True).hidden_states
            for at, token in enumerate(window):
                position = start + at - len(lead) if at >= len(lead) else None
                rows.append(Row(token, document, position, at, tuple(s[0, at].numpy() for s in states)))
    return rows


def assert_equal(data: Dataset, rows: list[Row]) -> None:
    """The store holds these rows, and no other."""
    assert data.rows == len(rows)
    for name in ("token", "document", "position", "window_position"):
        np.testing.assert_array_equal(data.read(name, 0, data.rows), [getattr(row, name) for row in rows])
    for layer in range(3):
        values = np.stack([row.states[layer] for row in rows])
        np.testing.assert_array_equal(data.read(f"layer_{layer}", 0, data.rows), values)


# --- By place and by token --------------------------------------------------------------------------------------


def test_the_place_in_its_window_is_told(model: Path, text: Path, tmp_path: Path) -> None:
    done, data = gather(model, text, tmp_path / "x.zarr")
    rows = passes(model, text, ())
    assert_equal(data, rows)
    assert {row.window_position for row in rows} == set(range(CONTEXT))
    assert set(done.dropped.values()) == {0}
    assert "dropped" not in str(done)
    assert "dropped" not in info_text(info(data.path))


@pytest.mark.parametrize("prefix", ["bos", "<s>", "1", 1])
def test_prefix_is_read_and_its_rows_are_dropped(model: Path, text: Path, tmp_path: Path, prefix: str | int) -> None:
    done, data = gather(model, text, tmp_path / "x.zarr", prefix=prefix)
    rows = passes(model, text, (BOS,))
    kept = [row for row in rows if row.position is not None]
    assert_equal(data, kept)
    assert min(row.window_position for row in kept) == 1
    assert done.dropped == data.attributes["dropped_rows"]
    assert done.dropped["prefix"] == len(rows) - len(kept) > 0
    assert data.attributes["row_filter"]["prefix"] == {"id": BOS, "token": "<s>"}
    assert "10 tokens at most, 0 of them special, 1 the prefix" in data.attributes["windows"]
    told = f"rows dropped: {len(rows) - len(kept)} by --prefix"
    assert told in str(done)
    assert told in info_text(info(data.path))
    longest = max(np.linalg.norm(row.states[1]) for row in kept if row.token != SINK)
    assert longest < min(np.linalg.norm(row.states[1]) for row in rows if row.position is None)  # it is a sink


@pytest.mark.parametrize("lead", [(), (BOS,)])
def test_first_tokens_and_tokens_by_id(model: Path, text: Path, tmp_path: Path, lead: tuple[int, ...]) -> None:
    named = [SINK, 20]
    options = {"prefix": BOS if lead else None, "skip_first": 3, "drop_tokens": named[::-1]}
    done, data = gather(model, text, tmp_path / "x.zarr", block_bytes=3400, **options)
    rows = passes(model, text, lead)
    later = [row for row in rows if row.window_position >= 3]
    kept = [row for row in later if row.token not in named]
    assert_equal(data, kept)
    assert done.dropped == {
        "prefix": sum(row.position is None for row in rows),
        "special": 0,
        "skip_first": sum(row.window_position < 3 and row.position is not None for row in rows),
        "drop_tokens": len(later) - len(kept),
        "drop_norm": 0,
    }
    assert done.dropped["drop_tokens"] > 0
    assert sum(done.dropped.values()) + data.rows == len(rows)
    assert data.attributes["row_filter"]["drop_tokens"] == named
    assert data.attributes["row_filter"]["skip_first"] == 3


def test_rows_at_most_counts_those_that_are_kept(model: Path, text: Path, tmp_path: Path) -> None:
    options = {"skip_first": 2, "drop_tokens": [SINK], "prefix": BOS}
    whole = gather(model, text, tmp_path / "x.zarr", **options)[1]
    for most in (1, 30, 31):
        data = gather(model, text, tmp_path / f"{most}.zarr", rows=most, **options)[1]
        assert data.rows == most
        for name in ("token", "window_position", "layer_1"):
            np.testing.assert_allclose(data.read(name, 0, most), whole.read(name, 0, most), rtol=0, atol=1e-5)


def test_special_tokens_that_are_kept_are_dropped_by_place(model: Path, text: Path, tmp_path: Path) -> None:
    """A tokenizer that adds a token after each text: its rows are kept, and may be dropped by their id."""
    from tokenizers import processors

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options: dict[str, Any] = {"tokenizer": str(tmp_path / "tokenizer"), "special": "keep", "prefix": BOS}
    kept = gather(model, text, tmp_path / "x.zarr", **options)[1]
    tokens, places = (kept.read(name, 0, kept.rows) for name in ("token", "window_position"))
    ends = np.flatnonzero(tokens == 2)
    assert (kept.read("position", 0, kept.rows)[ends] == -1).all()
    np.testing.assert_array_equal(places[1:][np.isin(np.arange(kept.rows - 1), ends)], 1)  # the prefix has no row
    done, data = gather(model, text, tmp_path / "y.zarr", skip_first=3, drop_tokens=[2], **options)
    rows = np.flatnonzero((places >= 3) & (tokens != 2))
    for name in kept.fields:
        np.testing.assert_array_equal(data.read(name, 0, data.rows), kept.take(name, rows))
    assert (done.dropped["special"], done.dropped["skip_first"]) == (0, int((places < 3).sum()))


def test_dropped_rows_do_not_depend_on_how_the_work_is_cut(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "GROUP_TOKENS", 60)
    options: dict[str, Any] = {
        "skip_first": 2,
        "drop_tokens": [SINK],
        "prefix": BOS,
        "batch_tokens": 64,
        "drop_norm": 0,
    }
    whole = gather(model, text, tmp_path / "x.zarr", **options)[1]
    options["block_bytes"] = 3400
    blocks = gather(model, text, tmp_path / "y.zarr", **options)[1]
    for name in whole.fields:
        np.testing.assert_array_equal(blocks.read(name, 0, blocks.rows), whole.read(name, 0, whole.rows))
    for number in (2, 3, 1):
        done = collect(
            str(model),
            [text],
            tmp_path / "z.zarr",
            layers=[0, 1, 2],
            context=CONTEXT,
            chunk_rows=16,
            fsync=False,
            part=(number, 3),
            **options,
        )
    assert done.complete
    assert files(tmp_path / "y.zarr") == files(tmp_path / "z.zarr")


def test_prefixes_and_filters_that_make_no_sense(model: Path, text: Path, tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(tmp_path / "begins")
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "without")

    def assert_refused(words: str, error: type[Exception] = RequestError, **options: Any) -> None:
        with pytest.raises(error, match=words):
            gather(model, text, tmp_path / "x.zarr", **options)
        assert not list(tmp_path.glob("x.zarr*"))

    assert_refused("has no begin-of-text token", tokenizer=str(tmp_path / "without"), prefix="bos")
    assert_refused("begins each window with '<s>' itself", tokenizer=str(tmp_path / "begins"), prefix="bos")
    assert_refused("prefix 43 is no token of .*go up to 42", prefix=43)
    assert_refused("prefix '<pad>' is no token", prefix="<pad>")
    for prefix in ("", True, 1.5, -1):
        assert_refused("the prefix is bos, |is no token", prefix=prefix)
    assert_refused("window of 1 token.*1 of them special or the prefix", prefix=1, context=1)
    for value in (-1, 1.5, True, "3"):
        assert_refused("skip_first must be a whole number", skip_first=value)
        assert_refused("drop_tokens must be a", drop_tokens=[value])
    assert_refused("drop_tokens must be a list", drop_tokens="9")
    assert_refused(r"ids from 0 to 42, got \[1, 43\]", drop_tokens=[43, 1])
    assert_refused("no row is left of .*by skip_first", SourceError, skip_first=CONTEXT)


# --- By norm ----------------------------------------------------------------------------------------------------


def near(rows: list[Row], layers: tuple[int, ...], multiple: float) -> list[Row]:
    """The rows whose norms are at most so many times the median of all rows, in each of the layers."""
    left = np.ones(len(rows), bool)
    for layer in layers:
        norms = np.linalg.norm(np.stack([row.states[layer] for row in rows]).astype("f8"), axis=1)
        left &= norms <= multiple * np.median(norms)
    return [row for row, stays in zip(rows, left, strict=True) if stays]


def test_no_row_beyond_ten_times_the_median_remains_by_default(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.zarr"
    done, data = gather(model, text, out, drop_norm=None)
    rows = passes(model, text, ())
    kept = near(rows, (0, 1, 2), 10)
    assert_equal(data, kept)
    assert len(rows) > len(kept) > len(rows) / 2
    assert {row.window_position for row in rows if row not in kept and row.token != SINK} == {0}
    told = data.attributes["row_filter"]["drop_norm"]
    assert done.dropped["drop_norm"] == len(rows) - len(kept) == data.attributes["dropped_rows"]["drop_norm"]
    assert told["multiple"] == 10
    for layer in range(3):
        norms = np.linalg.norm(np.stack([row.states[layer] for row in rows]).astype("f8"), axis=1)
        assert told["medians"][f"layer_{layer}"] == pytest.approx(np.median(norms), rel=1e-12)
        assert told["rows"][f"layer_{layer}"] == (norms > 10 * np.median(norms)).sum()
        assert (told["rows"][f"layer_{layer}"] > 0) == (layer < 2)  # the last one is normed
    assert f"rows dropped: {done.dropped['drop_norm']} by --drop-norm" in str(done)
    assert "by --drop-norm" in info_text(info(out))
    assert [p.name for p in tmp_path.iterdir()] == ["x.zarr"]
    again, _ = gather(model, text, out, drop_norm=None)
    assert (again.rows, again.dropped, again.seconds) == (done.rows, done.dropped, 0.0)
    for other in (0, 11):
        with pytest.raises(DestinationExistsError, match="finished with other arguments"):
            gather(model, text, out, drop_norm=other)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_collection_equals_the_filter_of_one_with_all_rows(
    model: Path, text: Path, tmp_path: Path, dtype: str
) -> None:
    """In 16 bits too, whose norms are those of the values that are stored."""
    options: dict[str, Any] = {"prefix": BOS, "skip_first": 2, "dtype": dtype, "hooks": ["h.0.mlp"]}
    gather(model, text, tmp_path / "x.zarr", drop_norm=2, **options)
    gather(model, text, tmp_path / "all.zarr", drop_norm=0, **options)
    filter_rows(tmp_path / "all.zarr", tmp_path / "y.zarr", drop_norm=2, chunk_rows=16, fsync=False)
    x, y = open_dataset(tmp_path / "x.zarr"), open_dataset(tmp_path / "y.zarr")
    assert 0 < x.rows == y.rows < open_dataset(tmp_path / "all.zarr").rows
    for name in y.fields:
        np.testing.assert_array_equal(x.read(name, 0, x.rows), y.read(name, 0, y.rows))


def test_parts_and_stops_give_the_same_bytes(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rowfilter, "TASK_BYTES", 16 * 64)
    options: dict[str, Any] = {"block_bytes": 3400, "drop_norm": None}
    whole, out = Stops(), tmp_path / "z.zarr"
    gather(model, text, tmp_path / "x.zarr", executor=whole, **options)

    def part(number: int, executor: Stops | None = None) -> Collected:
        shape: dict[str, Any] = {"layers": [0, 1, 2], "context": CONTEXT, "batch_tokens": 1, "chunk_rows": 16}
        asked = shape | options
        return collect(str(model), [text], out, part=(number, 2), executor=executor, fsync=False, **asked)

    assert not part(2).complete
    assert status(out)["state"] == "half done"
    assert "of" in status_text(status(out))
    with pytest.raises(IncompleteStoreError, match="the same command again goes on"):
        open_dataset(out)
    with pytest.raises(ResumeMismatchError, match=r"drop_norm was 10.0, now 0.0"):
        gather(model, text, out, drop_norm=0)
    tasks = whole.seen.count(True)
    ran = 0
    for after in (1, 4, 7, 9):  # in the first stage, in the second, ...
        stopped = Stops(after)
        with pytest.raises(KeyboardInterrupt):
            part(1, stopped)
        ran += stopped.seen.count(True)
        assert status(out)["state"] == "half done"
    with pytest.raises(ResumeMismatchError, match="half done with other arguments"):
        gather(model, text, out, drop_norm=11, block_bytes=3400)
    last = Stops()
    assert part(1, last).complete
    assert ran < tasks
    assert part(2).complete  # as it was
    assert files(tmp_path / "x.zarr") == files(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.zarr", "z.zarr"]


def test_one_of_two_parts_that_end_together_copies(model: Path, text: Path, tmp_path: Path) -> None:
    out, all_rows = tmp_path / "x.zarr", as_place(tmp_path / f"x.zarr{UNFILTERED}")
    gather(model, text, tmp_path / "whole.zarr", drop_norm=None)

    def part(number: int) -> Collected:
        shape: dict[str, Any] = {"layers": [0, 1, 2], "context": CONTEXT, "batch_tokens": 1, "chunk_rows": 16}
        return collect(str(model), [text], out, part=(number, 2), fsync=False, **shape)

    with Locks() as other:
        other.take(all_rows)
        ended = [part(number) for number in (1, 2, 2)]
    assert [done.complete for done in ended] == [False, False, False]
    assert "this part is done, others are not" in str(ended[-1])
    assert open_dataset(all_rows.url).rows == ended[-1].rows == len(passes(model, text, ()))
    assert part(1).complete
    assert files(out) == files(tmp_path / "whole.zarr")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole.zarr", "x.zarr"]


def test_overwrite_replaces_a_store_of_either_kind(model: Path, text: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "x.zarr", len(passes(model, text, ()))
    for norm in (0, None, 0, 3):
        done, data = gather(model, text, out, drop_norm=norm, overwrite=True)
        assert (data.rows == rows) == (norm == 0)
    with pytest.raises(KeyboardInterrupt):
        gather(model, text, out, drop_norm=4, overwrite=True, block_bytes=3400, executor=Stops(1))
    done, data = gather(model, text, out, drop_norm=4, block_bytes=3400)  # what was replaced is gone: this resumes
    assert (done.rows, data.attributes["row_filter"]["drop_norm"]["multiple"]) == (data.rows, 4)


def test_a_disk_without_room_for_both_is_refused(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = len(passes(model, text, ()))
    monkeypatch.setattr(LocalObjects, "free_bytes", lambda self: int(1.5 * 208 * rows))
    with pytest.raises(InfeasibleError, match=r"for all rows and for those that drop_norm leaves"):
        gather(model, text, tmp_path / "x.zarr", drop_norm=None)
    gather(model, text, tmp_path / "y.zarr", drop_norm=0)
    (tmp_path / "z.zarr").mkdir()
    (tmp_path / "z.zarr/mine.txt").write_text("keep")
    with pytest.raises(DestinationExistsError):
        gather(model, text, tmp_path / "z.zarr", drop_norm=None)
    assert not [p for p in tmp_path.rglob("layer_1*") if "y.zarr" not in str(p) and ".collect" not in str(p)]
