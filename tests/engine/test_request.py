"""One table of knobs: text is parsed once, each value has its domain, and run.json returns the same request."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import click
import pytest

import actshuffle
from actshuffle.cli import engine as commands
from actshuffle.cli.options import knob
from actshuffle.engine.request import KNOBS, Request
from actshuffle.errors import FormatError, RequestError

WRITTEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"seed": 3, "memory": None, "fields": None}, {"seed": 3}),
    (
        {"memory": "2GB", "block_bytes": 1e6, "run_bytes": "64 KiB"},
        {"memory": 2 * 10**9, "block_bytes": 10**6, "run_bytes": 65536},
    ),
    ({"levels": "auto", "spill_memory": 0}, {"levels": "auto", "spill_memory": 0}),
    (
        {"levels": "3", "chunk_rows": "1e3", "chunks_per_shard": 2.0},
        {"levels": 3, "chunk_rows": 1000, "chunks_per_shard": 2},
    ),
    ({"fields": "act, token"}, {"fields": ["act", "token"]}),
    ({"fields": iter(["b", "a"])}, {"fields": ["b", "a"]}),
    ({"missing_chunks": "fill"}, {"fill_missing": True}),
    (
        {"missing_chunks": "refuse", "gather": False, "source_row": True},
        {"fill_missing": False, "gather": False, "source_row": True},
    ),
    ({"scratch": Path("/fast"), "codec": "none"}, {"scratch": "/fast", "codec": "none"}),
    (
        {"key_bits": [2, 0], "tasks_wanted": 6, "tasks_per_worker": 2},
        {"key_bits": [2, 0], "tasks_wanted": 6, "tasks_per_worker": 2},
    ),
]


@pytest.mark.parametrize(("given", "recorded"), WRITTEN, ids=str)
def test_a_request_goes_to_json_and_back(given: dict[str, Any], recorded: dict[str, Any]) -> None:
    request = Request.of(**given)
    assert request.to_json() == recorded
    document = json.loads(json.dumps({"seed": 5, **recorded}))
    again = Request.recorded(document)
    assert again.to_json() == document
    assert again == request.filled(seed=5)
    assert not request.against(again)


@pytest.mark.parametrize(
    ("argument", "value", "sentence"),
    [
        ("seed", "7", "seed must be a non-negative whole number, got '7'"),
        ("seed", True, "seed must be a non-negative whole number, got True"),
        ("levels", 17, "levels must be auto or 1 to 16, got 17"),
        ("levels", "few", "levels must be auto or 1 to 16, got 'few'"),
        ("memory", 0, "memory must be more than 0 bytes and less than 2^63, got 0"),
        ("memory", "lots", "memory: cannot read 'lots' as a size; write it like 512MB, 8GB or 64KiB"),
        ("chunk_rows", 1.5, "chunk_rows: 1.5 is not a whole number"),
        ("chunk_rows", 0, "chunk_rows must be a positive whole number below 2^63, got 0"),
        ("fields", "a,,b", "fields must be names of arrays, like act,token, got ('a', '', 'b')"),
        ("missing_chunks", "guess", "missing_chunks must be refuse or fill, got 'guess'"),
        ("gather", 1, "gather must be True or False, got 1"),
        ("scratch", 7, "scratch must be a folder or a URL, got 7"),
    ],
)
def test_a_value_outside_its_domain_is_refused_in_one_sentence(argument: str, value: Any, sentence: str) -> None:
    with pytest.raises(RequestError) as caught:
        Request.of(**{argument: value})
    assert str(caught.value) == sentence


def test_an_unknown_codec_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"codec must be one of none, .*crc32c.*, got 'lzma'"):
        Request.of(codec="lzma")


def test_an_unknown_name_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(TypeError, match="unheard"):
        Request.of(unheard=1)


@pytest.mark.parametrize("document", [None, [], {}, {"seed": 1, "unheard": 2}, {"seed": 1, "memory": "8GB"}], ids=str)
def test_a_damaged_record_is_refused_by_name(document: Any) -> None:
    with pytest.raises(FormatError, match=r"run\.json is damaged: .*overwrite=True starts again"):
        Request.recorded(document)


def test_a_resume_compares_only_values_that_a_user_gave() -> None:
    before = Request.recorded({"seed": 5, "memory": 100, "tasks_wanted": 3})
    assert Request.of(levels="auto", source_row=True, tasks_wanted=9).against(before) == ""
    assert Request.of(seed=6, memory=100, codec="zstd").against(before) == (
        "codec was None, now 'zstd'; seed was 5, now 6"
    )


def test_the_public_functions_take_knobs_by_their_names() -> None:
    for function in (actshuffle.shuffle, actshuffle.plan, actshuffle.sample, actshuffle.append):
        names = set(inspect.signature(function).parameters)
        assert names & {k.argument for k in KNOBS.values()}
    shown = {k.argument for k in KNOBS.values() if k.help}
    assert shown <= set(inspect.signature(actshuffle.shuffle).parameters)


def test_the_command_line_has_an_option_for_each_knob() -> None:
    flags = {flag for option in commands.run.params for flag in option.opts}
    for found in KNOBS.values():
        assert (f"--{found.argument.replace('_', '-')}" in flags) == bool(found.help)
        if found.help:
            assert found.help[0].isupper()
            assert found.help.endswith(".")


def test_control_a_new_knob_becomes_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    novel = KNOBS["memory"]._replace(argument="new_knob", help="New.", shown="old")
    monkeypatch.setitem(KNOBS, "new_knob", novel)
    command = click.command()(knob("new_knob")(lambda new_knob: None))
    (option,) = command.params
    assert option.opts == ["--new-knob"]
    assert option.type_cast_value(click.Context(command), "2KB") == 2000


def test_a_request_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request.of(seed=1).seed = 2  # type: ignore[misc]
