"""HTTP on loopback: files of the page, and answers of the `Site` as JSON.

A page on loopback can be reached by any web site that the user's browser shows: by a request of its own, or under a
name that it points at 127.0.0.1 (DNS rebinding).  So each request must name this server as its Host, and a request that
writes or computes must carry the token that only our own page holds.  Scripts come from our own files alone (CSP).

Pages of attribution graphs may read features as /features/SCAN/INDEX.json, where the server was told their origins.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from actshuffle.errors import ActshuffleError, words_of
from actshuffle.units import counted
from saetrain.errors import ConfigError, SaetrainError
from saetrain.view.lists import Filter
from saetrain.view.site import Site

HOST = "127.0.0.1"
TOKEN_HEADER = "X-Saetrain-Token"
MOST_BODY = 1 << 20  # bytes of a request
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
SAFE = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Server(ThreadingHTTPServer):
    """One page.  `token` is what the page sends with each request that writes or computes."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, site: Site, port: int = 0) -> None:
        """Listen on a port of 127.0.0.1; 0 takes a free one.  Raises `ConfigError` if it is taken."""
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise ConfigError(f"port {port} of {HOST} cannot be used: {error.strerror}; give another --port") from error
        self.site, self.token = site, secrets.token_urlsafe(32)
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}
        folder = Path(__file__).with_name("static")
        self.files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name.split(".")[-1] in TYPES}

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a browser that went away is no news
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection of a browser."""

    server: Server
    protocol_version = "HTTP/1.1"
    # An answer is one write: the body of one in two waits for the browser to acknowledge the headers, up to 40 ms.
    wbufsize, disable_nagle_algorithm = -1, True
    server_version, sys_version = "saetrain", ""

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        path, query = self._asked()
        if not self._is_ours():
            return
        if path.startswith("/api/"):
            self._answer(lambda: self._read(path.split("/")[2:], query))
        elif path.startswith("/static/"):
            self._file(path.removeprefix("/static/"))
        elif path.startswith("/features/"):
            self._answer(lambda: self._graph_page(path.split("/")[2:]), self._sharing())
        elif path == "/labels.json":
            self._answer(self.server.site.labels.document, {"Content-Disposition": "attachment"})
        elif path == "/favicon.ico":
            self._file("icon.svg")
        elif "." in path.rpartition("/")[2]:
            self._fail(HTTPStatus.NOT_FOUND, f"no such file: {path}")
        else:
            page = self.server.files["index.html"].replace(b"{{token}}", self.server.token.encode())
            self._send(HTTPStatus.OK, page, "text/html")

    def do_POST(self) -> None:
        path, _ = self._asked()
        if not self._is_ours():
            return
        if not secrets.compare_digest(self.headers.get(TOKEN_HEADER, ""), self.server.token):
            self._fail(HTTPStatus.FORBIDDEN, "this request carries no token of this page; load the page again")
            return
        body = self._body()
        if body is not None:
            self._act(path, body)

    do_PUT = do_POST

    # --- requests

    def _asked(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        return unquote(parts.path), {name: values[-1] for name, values in parse_qs(parts.query).items()}

    def _is_ours(self) -> bool:
        """True if the request is meant for this server; else it is refused."""
        if self.headers.get("Host") in self.server.hosts:
            return True
        self.close_connection = True
        self._fail(HTTPStatus.MISDIRECTED_REQUEST, f"this server answers as {' or '.join(sorted(self.server.hosts))}")
        return False

    def _body(self) -> dict[str, Any] | None:
        """The JSON object of a request; None after it was refused."""
        try:
            size = int(self.headers.get("Content-Length", "0"))
            if not 0 < size <= MOST_BODY:
                raise ValueError(f"{counted(size, 'byte')}, of 1 to {MOST_BODY:,}")
            found = json.loads(self.rfile.read(size))
            if not isinstance(found, dict):
                raise TypeError(f"{type(found).__name__}, not an object")
        except (ValueError, TypeError) as error:
            self.close_connection = True  # what is left of the body is not read
            self._fail(HTTPStatus.BAD_REQUEST, f"the body of a request is a JSON object: {error}")
            return None
        return found

    def _read(self, path: list[str], query: dict[str, str]) -> Any:
        """The answer to a question, by the words of its path after /api/."""
        site = self.server.site
        match path:
            case ["facts"]:
                return site.facts()
            case ["overview"]:
                return site.overview()
            case ["list"]:
                return site.listing(
                    _filters(query),
                    query.get("order", "index"),
                    _whole(query.get("start", "0")),
                    falling=_is_set(query, "falling"),
                    only=next((name for name in ("labelled", "dead") if _is_set(query, name)), None),
                )
            case ["feature", latent]:
                return site.feature(_whole(latent))
            case ["beside", latent]:
                order = query.get("order", "index")
                return site.beside(_whole(latent), _filters(query), order, falling=_is_set(query, "falling"))
            case ["examples", latent, kind]:
                return site.examples(_whole(latent), kind)
            case ["compare"]:
                return site.compare([_whole(latent) for latent in query.get("ids", "").split(",")])
            case ["search"]:
                return site.search(query.get("q", ""))
            case ["metrics"]:
                return site.metrics()
            case ["interactions", number, half]:
                order, start = query.get("order", "number"), _whole(query.get("start", "0"))
                return site.pairs(_whole(number)).listing(half, order, start, falling=_is_set(query, "falling"))
            case ["interactions", number, half, line]:
                return site.pairs(_whole(number)).line(half, _whole(line))
        raise LookupError("/".join(path))

    def _graph_page(self, path: list[str]) -> Any:
        """The JSON of a feature for another page, by the words of its path after /features/."""
        match path:
            case [scan, name] if name.endswith(".json"):
                found = self.server.site.graph_page(scan, _whole(name.removesuffix(".json")))
                if found is not None:
                    return found
        raise LookupError("/".join(["features", *path]))

    def _sharing(self) -> dict[str, str]:
        """Headers that let a page of an allowed origin read the answer."""
        origin = self.headers.get("Origin", "")
        if origin not in self.server.site.origins:
            return {}
        return {"Access-Control-Allow-Origin": origin, "Cross-Origin-Resource-Policy": "cross-origin", "Vary": "Origin"}

    def _act(self, path: str, body: dict[str, Any]) -> None:
        """Answer a request that writes or computes."""
        site, words = self.server.site, path.split("/")[1:]
        match words:
            case ["api", "label", latent]:

                def put() -> dict[str, Any]:
                    at = int(site.feature(_whole(latent))["id"])
                    site.labels.put(at, str(body.get("label", "")))
                    return {"id": at, "label": site.labels.get(at)}

                self._answer(put)
            case ["api", "text"]:
                self._answer(lambda: self._live().text(str(body.get("text", ""))))
            case ["api", "steer"]:
                self._steer(body)
            case _:
                self._fail(HTTPStatus.NOT_FOUND, f"no such request: {path}")

    def _live(self) -> Any:
        if self.server.site.live is None:
            raise ConfigError("no model was given; start the page with `saetrain view FEATURES --model NAME`")
        return self.server.site.live

    def _steer(self, body: dict[str, Any]) -> None:
        try:
            features = self.server.site.features
            turned = [int(turn["feature"]) for turn in body.get("turns", []) if "feature" in turn]
            largest = {i: features[i].max for i in turned if 0 <= i < len(features) and not features[i].is_dead}
            pieces = self._live().steer(body, largest)
        except (SaetrainError, ActshuffleError) as error:
            self._fail(HTTPStatus.BAD_REQUEST, words_of(error))
            return
        except (ValueError, TypeError, AttributeError):  # int(None), or a turn that is no object
            self._fail(HTTPStatus.BAD_REQUEST, "each feature that is turned is given by its number")
            return
        self._stream(pieces)

    # --- answers

    def _answer(self, work: Any, headers: dict[str, str] | None = None) -> None:
        began = time.perf_counter()
        try:
            found = _json(work())
        except LookupError as error:
            self._fail(HTTPStatus.NOT_FOUND, f"there is no {error}")
        except (SaetrainError, ActshuffleError) as error:
            self._fail(HTTPStatus.BAD_REQUEST, words_of(error))
        except OSError as error:
            self._fail(HTTPStatus.INTERNAL_SERVER_ERROR, f"{error.strerror or error}: {error.filename or ''}")
        else:
            took = {"Server-Timing": f"answer;dur={1000 * (time.perf_counter() - began):.2f}"}
            self._send(HTTPStatus.OK, found, "application/json", took | (headers or {}))

    def _fail(self, status: HTTPStatus, message: str) -> None:
        self._send(status, _json({"error": message}), "application/json")

    def _file(self, name: str) -> None:
        if name in self.server.files:
            self._send(HTTPStatus.OK, self.server.files[name], TYPES[name.split(".")[-1]])
        else:
            self._fail(HTTPStatus.NOT_FOUND, f"no such file: {name}")

    def _send(self, status: HTTPStatus, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        about = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
        for name, value in {**SAFE, **about, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, pieces: Iterable[dict[str, Any]]) -> None:
        """JSON objects, one a line, as they come; an error on the way is the last of them."""
        self.send_response(HTTPStatus.OK)
        for name, value in {**SAFE, "Content-Type": "application/x-ndjson", "Transfer-Encoding": "chunked"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()
        try:
            for piece in pieces:
                self._chunk(_json(piece) + b"\n")
        except (SaetrainError, ActshuffleError, RuntimeError) as error:
            self._chunk(_json({"which": "error", "text": words_of(error)}) + b"\n")
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


def _json(found: Any) -> bytes:
    return json.dumps(found, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ConfigError(f"a whole number is needed, not {text!r}")
    return int(text)


def _is_set(query: dict[str, str], name: str) -> bool:
    return query.get(name, "0") == "1"


def _filters(query: dict[str, str]) -> list[Filter]:
    """From density=1e-4,1e-3 and the like."""
    found = []
    for name, text in query.items():
        if name in ("order", "start", "falling", "labelled", "dead"):
            continue
        try:
            low, high = map(float, text.split(","))
        except ValueError as error:
            raise ConfigError(f"a filter is two numbers, as {name}=1e-4,1e-3, not {text!r}") from error
        found.append((name, low, high))
    return found
