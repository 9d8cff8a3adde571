"""An S3 endpoint on loopback (moto's server), behind a proxy that can inject faults."""

from __future__ import annotations

import http.client
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from support.ports import free_ports

# moto's server, which otherwise lists its folders of services from disk for each request, in a third of its time.
SERVER = """
from moto import backends, server
names = list(backends.list_of_moto_modules())
backends.list_of_moto_modules = lambda: names
server.main()
"""
KEY, SECRET, TOKEN = "AKIDEXAMPLEKEY", "hunter2hunter2SECRET", "sessionTOKENsession"


@dataclass
class Endpoint:
    """``unkind`` decides about each request: None, an HTTP status, seconds to wait, or "cut"."""

    port: int
    behind: int
    unkind: Callable[[str, str], Any] = lambda method, path: None
    wants: str = ""  # an access key that alone is let in; "" lets all in
    client: str = ""  # of actshuffle's, in the options that follow; "" leaves the choice to it
    seen: list[tuple[str, str]] = field(default_factory=list)
    delayed: set[int] = field(default_factory=set)  # threads whose request waits

    def settle(self) -> None:
        """Wait for the delayed requests, which arrive at last, whether their client waits for them or not."""
        end = time.monotonic() + 120
        while self.delayed:
            assert time.monotonic() < end, "a delayed request does not arrive"
            time.sleep(0.05)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def options(self, key: str | None = KEY, secret: str = SECRET, **extra: Any) -> dict[str, Any]:
        """Storage options of actshuffle: those of fsspec, and the client."""
        extra = {"client_kwargs": {"endpoint_url": self.url, "region_name": "us-east-1"}, **extra}
        if self.client:
            extra = {"client": self.client, **extra}
        return {"anon": True, **extra} if key is None else {"key": key, "secret": secret, "token": TOKEN, **extra}

    def others(self) -> dict[str, Any]:
        """Storage options for zarr itself."""
        return {name: value for name, value in self.options().items() if name != "client"}

    def bucket(self, name: str) -> str:
        self.plain("PUT", f"/{name}")
        return f"s3://{name}"

    def plain(self, method: str, path: str, body: bytes = b"") -> bytes:
        who = {"Authorization": "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request"}
        with closing(http.client.HTTPConnection("127.0.0.1", self.behind, timeout=120)) as link:
            link.request(method, path, body, who)
            answer = link.getresponse()
            data = answer.read()
        assert answer.status < 300, (method, path, answer.status, data[:300])
        return data

    def upload(self, folder: Path, url: str) -> str:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.plain("PUT", f"/{bucket}/{prefix}/{path.relative_to(folder)}", path.read_bytes())
        return url

    def keys(self, url: str) -> list[str]:
        import re

        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        text = self.plain("GET", f"/{bucket}?list-type=2&max-keys=1000&prefix={prefix}").decode()
        return re.findall("<Key>([^<]*)</Key>", text)

    def get(self, url: str) -> bytes:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        return self.plain("GET", f"/{bucket}/{key}")

    def put(self, url: str, data: bytes) -> None:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        self.plain("PUT", f"/{bucket}/{key}", data)

    def delete(self, url: str) -> None:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        self.plain("DELETE", f"/{bucket}/{key}")

    def download(self, url: str, folder: Path) -> Path:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        for key in self.keys(url + "/"):
            path = folder / key.removeprefix(prefix + "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.get(f"s3://{bucket}/{key}"))
        return folder


def failing(share: float, seed: int, what: Any = 500) -> Callable[[str, str], Any]:
    """A share of all requests fail."""
    dice = random.Random(seed)
    return lambda method, path: what if dice.random() < share else None


def _handler(endpoint: Endpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None: ...

        def answer(self) -> None:
            promised = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(promised)
            if len(body) < promised:  # a client that was killed; the server would wait for the rest
                self.close_connection = True
                return
            endpoint.seen.append((self.command, self.path))
            if endpoint.wants and f"Credential={endpoint.wants}/" not in self.headers.get("Authorization", ""):
                known = "Authorization" in self.headers
                code = "InvalidAccessKeyId" if known else "AccessDenied"
                text = "The AWS Access Key Id you provided does not exist in our records." if known else "Access Denied"
                self.say(403, _xml(code, text))
                return
            decision = endpoint.unkind(self.command, self.path)
            if decision == "cut":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            if decision == "expired":
                self.say(400, _xml("ExpiredToken", "The provided token has expired."))
                return
            if isinstance(decision, float):
                endpoint.delayed.add(threading.get_ident())
                try:
                    time.sleep(decision)
                    self.forward(body)
                finally:
                    endpoint.delayed.discard(threading.get_ident())
                return
            if isinstance(decision, int):
                self.say(decision, _xml("InternalError", "We encountered an internal error. Please try again."))
                return
            self.forward(body)

        def forward(self, body: bytes) -> None:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection", "expect")}
            with closing(http.client.HTTPConnection("127.0.0.1", endpoint.behind, timeout=120)) as link:
                link.request(self.command, self.path, body, headers)
                found = link.getresponse()
                data = found.read()
            kept = {
                k: v
                for k, v in found.getheaders()
                if k.lower() not in ("connection", "transfer-encoding", "content-length")
            }
            length = found.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.say(found.status, data, kept, length)

        def say(
            self, status: int, data: bytes, headers: dict[str, str] | None = None, length: str | None = None
        ) -> None:
            with suppress(ConnectionError):
                self.send_response(status)
                for name, value in (headers or {"Content-Type": "application/xml"}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    return Handler


def _xml(code: str, message: str) -> bytes:
    return (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message>'
        "<RequestId>1</RequestId></Error>"
    ).encode()


@contextmanager
def serve(folder: Path) -> Iterator[Endpoint]:
    """A private endpoint, which ends with the block."""
    (behind,) = free_ports(1)
    with (folder / "moto.log").open("wb") as log:
        moto = subprocess.Popen(
            [sys.executable, "-c", SERVER, "-H", "127.0.0.1", "-p", str(behind)], stdout=log, stderr=log, cwd=folder
        )
        endpoint = Endpoint(0, behind)
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(endpoint))
        proxy.daemon_threads = True
        endpoint.port = proxy.server_address[1]
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            deadline = time.monotonic() + 120
            while True:
                with suppress(OSError), socket.create_connection(("127.0.0.1", behind), 1):
                    break
                assert time.monotonic() < deadline
                assert moto.poll() is None, (folder / "moto.log").read_text()
                time.sleep(0.05)
            yield endpoint
        finally:
            proxy.shutdown()
            proxy.server_close()
            moto.kill()
            moto.wait()
