"""Text as people keep it, as a sequence of documents; a file that is nothing of the kind is refused by name.

The first bytes of a file tell what it is, and only if they do not, its name::

    1f 8b, 42 5a 68, fd 37 7a .., 28 b5 2f fd    gzip, bzip2, xz, zstd: the same again for what is inside
    "PAR1"; "ARROW1", ff ff ff ff                parquet; Arrow file, stream: a document per value of a column
    ef bb bf, ff fe, fe ff, ...                  text in UTF-8, UTF-16, UTF-32 (a byte order mark)
    anything else                                text in UTF-8

    .csv .tsv                                    a document per value of a column
    .jsonl .ndjson                               a document per line
    .json                                        an array of documents, or as .jsonl, or one document
    any other name                               one document

A JSON document is a string, or an object with the text in a field.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from actshuffle.errors import SourceError
from actshuffle.foreign.texttables import column_texts, csv_texts, unpacked_zstd

Reader = Callable[[Path, IO[str], str], Iterator[str]]  # from a file, its text and the name of a field to documents
_PACKED: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": unpacked_zstd,
}
_PACKED_NAMES = {".gz", ".bz2", ".xz", ".zst", ".zstd"}
_TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
_MARKS = {  # those of UTF-32 first: one of them begins like one of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NAMES = {".csv": "csv", ".tsv": "tsv", ".jsonl": "lines", ".ndjson": "lines", ".json": "json"}
_POINTER = b"version https://git-lfs.github.com/spec/"
_HEAD = 4096  # bytes that are looked at before anything is done
_PIECE = 1 << 20  # characters, or bytes, that are read at a time


class Kind(NamedTuple):
    """A format ("text", "lines", "array", "json", or a table), the encoding of the text, and what opens the file."""

    format: str
    encoding: str
    open: Callable[[], IO[bytes]]


def kind_of(file: Path) -> Kind:
    """Look at the beginning of a file; refuse one that is not text by then."""
    with _reading(file, "utf-8"):
        head = _head(partial(_plain, file))
        unpacked = next((opener for magic, opener in _PACKED.items() if head.startswith(magic)), _plain)
        head = _head(partial(unpacked, file))
    if head.startswith(_POINTER):
        raise SourceError(f"{file} is a pointer of Git LFS, its contents are elsewhere; fetch them with git lfs pull")
    table = next((name for magic, name in _TABLES.items() if head.startswith(magic)), None)
    if table is not None and unpacked is not _plain:
        raise SourceError(f"{file} is a compressed {table} file; unpack it first")
    suffixes = [s.lower() for s in file.suffixes]
    suffix = next((s for s in reversed(suffixes) if s not in _PACKED_NAMES), "")
    if table is None and suffix in (".parquet", ".arrow", ".feather") and head:
        raise SourceError(f"{file} is no {suffix[1:]} file: it begins with {head[:4]!r}")
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8")
    with _reading(file, encoding, partial(unpacked, file)):
        start = "" if table else codecs.getincrementaldecoder(encoding)().decode(head)
    _refuse_nul(file, start)
    name = table or _NAMES.get(suffix, "text")
    if name == "json" and start.lstrip().startswith("["):
        name = "array"
    return Kind(name, encoding, partial(unpacked, file))


def documents(file: Path, field: str) -> Iterator[str]:
    """The documents of a file, one after the other; ``field`` names the text in objects and tables."""
    kind = kind_of(file)
    with _reading(file, kind.encoding, kind.open):
        if kind.format in ("parquet", "arrow"):
            yield from column_texts(file, kind.format, field)
        elif kind.format in ("csv", "tsv"):
            yield from csv_texts(file, kind.open, kind.encoding, "," if kind.format == "csv" else "\t", field)
        else:
            with io.TextIOWrapper(kind.open(), kind.encoding) as text:
                yield from _FORMATS[kind.format](file, text, field)


def _plain(file: Path) -> IO[bytes]:
    return file.open("rb")


def _head(opener: Callable[[], IO[bytes]]) -> bytes:
    with opener() as data:
        return data.read(_HEAD)


@contextmanager
def _reading(file: Path, encoding: str, opener: Callable[[], IO[bytes]] | None = None) -> Iterator[None]:
    """Errors of all that reads below us as ours, naming the file."""
    try:
        yield
    except UnicodeDecodeError as err:
        at = None if opener is None else _first_wrong_byte(opener, encoding)
        where = "" if at is None else f" at byte {at:,}"
        raise SourceError(
            f"{file} is not text in {encoding.upper().removesuffix('-SIG')}: {err.reason}{where}; convert it to UTF-8, "
            "or leave it out"
        ) from err
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as err:
        raise SourceError(f"{file} cannot be unpacked, it is damaged or truncated: {err}") from err
    except OSError as err:
        raise SourceError(f"cannot read {file}: {err}") from err


def _first_wrong_byte(opener: Callable[[], IO[bytes]], encoding: str) -> int:
    """The offset of the first byte that does not decode; the length of the file if the end of it is missing."""
    decoder, end = codecs.getincrementaldecoder(encoding)(), 0
    with opener() as data:
        while block := data.read(_PIECE):
            end += len(block)
            try:
                decoder.decode(block)
            except UnicodeDecodeError as err:
                return end - len(err.object) + err.start
    return end


def _whole(file: Path, text: IO[str], _: str) -> Iterator[str]:
    found = text.read()
    _refuse_nul(file, found)
    yield found


def _refuse_nul(file: Path, text: str) -> None:
    if (at := text.find("\0")) >= 0:
        raise SourceError(f"{file} is not text: character {at:,} is NUL; leave it out, or save it as text in UTF-8")


def _lines(file: Path, text: IO[str], field: str, first: int = 1) -> Iterator[str]:
    for number, line in enumerate(text, first):
        if line.strip():
            where = f"{file}, line {number:,}"
            yield _text_of(_parsed(line, where), field, where)


def _array(file: Path, text: IO[str], field: str) -> Iterator[str]:
    for number, value in enumerate(_elements(file, text), 1):
        yield _text_of(value, field, f"{file}, element {number:,}")


def _json(file: Path, text: IO[str], field: str) -> Iterator[str]:
    """The text of each line; or of all of them, if the first one is not whole."""
    number, line = next(((n, line) for n, line in enumerate(text, 1) if line.strip()), (0, ""))
    try:
        value = json.loads(line or "null")
    except (ValueError, RecursionError):
        yield _text_of(_parsed(line + text.read(), str(file)), field, str(file))
        return
    if line:
        yield _text_of(value, field, f"{file}, line {number:,}")
        yield from _lines(file, text, field, number + 1)


_FORMATS: dict[str, Reader] = {"text": _whole, "lines": _lines, "array": _array, "json": _json}


def _elements(file: Path, text: IO[str]) -> Iterator[Any]:
    """The elements of a JSON array; little more than one of them is in memory at a time."""
    decode, blank = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    held, at, number = "", 0, 0

    def following() -> str:
        """The next character that is not blank; none at the end."""
        nonlocal held, at
        while True:
            match = blank.match(held, at)
            at = match.end() if match else at
            if at < len(held):
                return held[at]
            held, at = text.read(_PIECE), 0
            if not held:
                return ""

    following()  # the bracket
    at += 1
    while following() != "]":
        number += 1
        where = f"{file}, element {number:,}"
        if number > 1:
            if following() != ",":
                raise SourceError(f"{where} is no JSON: a comma or a bracket is missing before it")
            at += 1
            following()
        while True:
            try:
                value, at = decode(held, at)
                break
            except (ValueError, RecursionError) as err:
                # A value that is cut off fails at its end, or as a string without one; any other is wrong.
                cut = "Unterminated" in str(err) or getattr(err, "pos", 0) > len(held) - 16
                more = text.read(max(_PIECE, len(held))) if cut else ""
                if not more:
                    raise SourceError(f"{where} is no JSON: {_why(err)}") from err
                held, at = held[at:] + more, 0
        yield value
    at += 1
    if following():
        raise SourceError(f"{file} is no JSON: there is more after the end of the array")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as err:
        raise SourceError(f"{where} is no JSON: {_why(err)}") from err


def _why(err: Exception) -> str:
    return str(err).split(":")[0]  # the rest counts lines within one of the file's


def _text_of(found: Any, field: str, where: str) -> str:
    if isinstance(found, str):
        return _encodable(found, where)
    if not isinstance(found, dict) or field not in found:
        has = (", ".join(map(repr, found)) or "nothing") if isinstance(found, dict) else "no object"
        raise SourceError(f"{where}: no {field!r}, but {has}; --field names another")
    if not isinstance(found[field], str):
        raise SourceError(f"{where}: {field!r} is no text")
    return _encodable(found[field], where)


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise SourceError(f"{where}: character {err.start:,} is half of a surrogate pair, which is no text") from err
    return text
