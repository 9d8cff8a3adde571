"""Every form of text file gives the same documents, and a file that is not text is refused by name."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actshuffle.errors import RequestError, SourceError
from actshuffle.foreign.textfiles import documents, kind_of

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

DOCUMENTS = ["one two", "zwei\ndrei é 漢", "", 'a,"b"', "x" * 5000]
LINES = "\n\n".join(json.dumps({"id": n, "text": text}) for n, text in enumerate(DOCUMENTS))
ARRAY = json.dumps([{"text": text} for text in DOCUMENTS], indent=1, ensure_ascii=False)
CSV = 'id,text\n1,"one two"\n2,"zwei\ndrei é 漢"\n3,""\n4,"a,""b"""\n5,' + "x" * 5000 + "\n"
TSV = re.sub(r"^(id|\d),", "\\1\t", CSV, flags=re.MULTILINE)


def zstd(data: bytes) -> bytes:
    """Two frames, with a skippable frame between them."""
    codec, half = pa.Codec("zstd"), len(data) // 2
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    return bytes(codec.compress(data[:half])) + skipped + bytes(codec.compress(data[half:]))


def found(folder: Path, name: str, data: bytes, field: str = "text") -> list[str]:
    (folder / name).write_bytes(data)
    return list(documents(folder / name, field))


def refusal(folder: Path, name: str, data: bytes) -> str:
    with pytest.raises(SourceError) as error:
        found(folder, name, data)
    assert name in str(error.value)
    return str(error.value)


# --- Text and JSON --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),  # as C4 has it
        ("a.JSON", ARRAY),
        ("a.json", json.dumps(DOCUMENTS)),
        ("a.json", "\n \n[" + ",\n".join(map(json.dumps, DOCUMENTS)) + "\n]\n\n"),
        ("a.jsonl", "\n".join(map(json.dumps, DOCUMENTS))),
        ("a.csv", CSV),
        ("a.tsv", TSV),
    ],
)
def test_documents_of_text(tmp_path: Path, name: str, text: str) -> None:
    assert found(tmp_path, name, text.encode()) == DOCUMENTS


@pytest.mark.parametrize("text", [LINES, ARRAY, CSV])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, text: str, encoding: str) -> None:
    name = {LINES: "a.jsonl", ARRAY: "a.json", CSV: "a.csv"}[text]
    assert found(tmp_path, name, text.encode(encoding)) == DOCUMENTS
    assert found(tmp_path, "a.txt", "é\r\n漢".encode(encoding)) == ["é\n漢"]
    big = "﻿é漢".encode("utf-16-be" if encoding == "utf-16" else "utf-32-be")
    assert found(tmp_path, "a.txt", big) == ["é漢"]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_compressed_files(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    ending = {gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".xz", zstd: ".zst"}[pack]
    for name, text in {"a.jsonl": LINES, "a.json": ARRAY, "a.csv": CSV}.items():
        packed = pack(text.encode())
        assert found(tmp_path, name + ending, packed) == DOCUMENTS
        assert found(tmp_path, name, packed) == DOCUMENTS  # of a wrong name
        assert found(tmp_path, name + ending, text.encode()) == DOCUMENTS  # unpacked under its old name
    assert found(tmp_path, f"a.txt{ending}", pack("é".encode("utf-16"))) == ["é"]
    with pytest.raises(SourceError, match=r"a\.jsonl.*(runcated|damaged)"):
        found(tmp_path, f"a.jsonl{ending}", pack(f"{LINES}\n".encode() * 50)[:-9])


def test_a_long_array_is_not_held_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "long.json").open("w") as file:
        file.write("[")
        for n in range(20_000):
            file.write(f'{", " * (n > 0)}{{"text": "{n} {"word " * 200}"}}')
        file.write("]")
    assert (tmp_path / "long.json").stat().st_size > 20e6
    tracemalloc.start()
    count = sum(text.startswith(f"{n} ") for n, text in enumerate(documents(tmp_path / "long.json", "text")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 12e6, peak


def test_a_document_of_an_array_may_be_larger_than_a_piece(tmp_path: Path) -> None:
    texts = ["a" * 3_000_000, "b\\" * 1_500_000, "c"]
    assert found(tmp_path, "a.json", json.dumps(texts).encode()) == texts


# --- Tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_columns_of_text(tmp_path: Path, kind: Any) -> None:
    column = pa.chunked_array([pa.array(DOCUMENTS[:2]), pa.array(DOCUMENTS[2:])]).cast(kind)
    table = pa.table({"id": range(5), "text": column, "vector": [[1.0]] * 5}).unify_dictionaries()
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    with pa.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as out:
        out.write_table(table)
    with pa.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as out:
        out.write_table(table)
    (tmp_path / "no_ending").write_bytes((tmp_path / "a.parquet").read_bytes())
    for name in ("a.parquet", "stream.arrow", "file.arrow", "no_ending"):
        assert list(documents(tmp_path / name, "text")) == DOCUMENTS, name


def test_tables_that_are_refused(tmp_path: Path) -> None:
    def assert_refused(words: str, columns: dict[str, Any]) -> None:
        parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
        with pytest.raises(SourceError, match=words):
            list(documents(tmp_path / "a.parquet", "text"))

    assert_refused("no column 'text' in 'body', 'id'; field", {"body": ["a"], "id": [1]})
    assert_refused("'text' holds list<.*>, which is no text", {"text": [["a"]]})
    assert_refused("'text' holds binary", {"text": [b"a"]})
    assert_refused("row 1 has no 'text'", {"text": ["a", None]})
    assert "begins with b'hell'" in refusal(tmp_path, "b.parquet", b"hello")
    assert "cannot read" in refusal(tmp_path, "c.parquet", b"PAR1 noise PAR1")
    packed = gzip.compress((tmp_path / "a.parquet").read_bytes())
    assert "unpack it first" in refusal(tmp_path, "d.parquet.gz", packed)
    assert "no column 'text' in 'a', 'b'" in refusal(tmp_path, "e.csv", b"a,b\n1,2\n")
    assert "2 columns 'text'" in refusal(tmp_path, "f.csv", b"text,text\n1,2\n")
    assert "Expected 2 columns, got 1" in refusal(tmp_path, "g.csv", b"text,n\na\n")


def test_pyarrow_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(RequestError, match=r"needs pyarrow.*pip install .\.\[collect\]"):
        list(documents(tmp_path / "a.parquet", "text"))
    assert found(tmp_path, "a.jsonl.gz", gzip.compress(LINES.encode())) == DOCUMENTS


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("latin.txt", "caf\xe9 au lait".encode("latin-1"), "not text in UTF-8: .* at byte 3;"),
        ("late.txt", b"x" * 3_000_000 + b"\xff" + b"x" * 100, "at byte 3,000,000;"),
        ("late.csv", b"text\n" + b"x" * 10_000 + b"\xff\n", "Row #2: .*invalid UTF8"),
        ("cut.txt", "a é".encode()[:-1], "end of data at byte 3;"),
        ("cut.txt", "\ufeffaé".encode("utf-16-le")[:-1], "not text in UTF-16"),
        ("picture.png", b"\x89PNG\r\n\x1a\n" + bytes(9), "not text in UTF-8"),
        ("archive.zip", b"PK\x03\x04" + bytes(9), "character 4 is NUL"),
        ("unmarked.txt", "abc".encode("utf-16-le"), "character 1 is NUL"),
        ("nul.txt", b"x" * 9000 + b"\0", "character 9,000 is NUL"),
        ("archive.tar.gz", gzip.compress(b"name" + bytes(100)), "character 4 is NUL"),
        ("pointer.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
        ("broken.json", b'["a" "b"]', "element 2 is no JSON"),
        ("broken.json", b'["a", ]', "element 2 is no JSON"),
        ("broken.json", b'["a", {"text": "b', "element 2 is no JSON"),
        ("broken.json", b'["a"] "b"', "more after the end"),
        ("deep.json", b"[" * 100_000, "element 1 is no JSON"),
        ("number.json", b"[1, 2]", "element 1: no 'text', but no object"),
        ("other.json", b'{\n"body": "a"\n}', "no 'text', but 'body'; field"),
        ("second.json", b'{"text": "a"}\n\n{"text": 3}', "line 3: 'text' is no text"),
        ("null.jsonl", b'{"text": null}', "line 1: 'text' is no text"),
        ("half.jsonl", rb'{"text": "a\ud800"}', "line 1: character 1 is half of a surrogate"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError, match=f"{name}.*{words}"):
        list(documents(tmp_path / name, "text"))


def test_most_are_refused_by_their_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(range(256)))
    with pytest.raises(SourceError, match=r"x\.bin is not text"):
        kind_of(tmp_path / "x.bin")
    (tmp_path / "x.txt").write_bytes("é".encode() * 4096)  # a character across the end of what is looked at
    (tmp_path / "y.txt").write_bytes(b"x" + "é".encode() * 4096)
    assert kind_of(tmp_path / "x.txt").format == kind_of(tmp_path / "y.txt").format == "text"
