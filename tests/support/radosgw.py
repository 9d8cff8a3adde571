"""A private Ceph cluster on loopback: one monitor, one OSD, one radosgw, which speaks S3; all under one folder.

Debian and Ubuntu have the programs: apt-get install radosgw ceph-mon ceph-osd ceph-common.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import as_place
from support.ports import free_ports

KEY, SECRET, BUCKET = "ACTSHUFFLEKEY0000001", "actshufflesecret0000000000000000000000001", "bucket"
PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin", "openssl")

CONFIG = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon2},v1:127.0.0.1:{mon1}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
ms bind ipv6 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
run dir = {at}
admin socket = {at}/$name.asok
pid file =
log file = {at}/$name.log
crash dir = {at}
keyring = {at}/keyring
mon data = {at}/mon
mon cluster log file = {at}/cluster.log
osd data = {at}/osd
osd objectstore = bluestore
bluestore block size = 12G
bluestore block create = true
bluestore fsck on mount = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon data avail crit = 1
mon data avail warn = 1
mon max pg per osd = 1000
osd memory target = 1G
[client.rgw]
keyring = {at}/keyring
rgw data = {at}/rgw
rgw frontends = beast endpoint=127.0.0.1:{http} ssl_endpoint=127.0.0.1:{https} ssl_certificate={at}/both.pem
rgw enable usage log = false
"""


def is_installed() -> bool:
    return all(shutil.which(program) for program in PROGRAMS)


@dataclass
class Gateway:
    """S3 by http and by https, with a certificate of its own."""

    folder: Path
    http: int
    https: int

    def options(self, client: str, *, secure: bool = False, **more: Any) -> dict[str, Any]:
        """Storage options of actshuffle."""
        kwargs: dict[str, Any] = {"endpoint_url": f"http://127.0.0.1:{self.http}", "region_name": "us-east-1"}
        if secure:
            kwargs |= {"endpoint_url": f"https://127.0.0.1:{self.https}", "verify": str(self.folder / "ca.pem")}
        return {"client": client, "key": KEY, "secret": SECRET, "client_kwargs": kwargs, **more}

    def upload(self, folder: Path, url: str) -> None:
        objects = open_objects(as_place(url, self.options("obstore")))
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            objects.put(str(path.relative_to(folder)), path.read_bytes())

    def download(self, url: str, folder: Path) -> Path:
        objects = open_objects(as_place(url, self.options("obstore")))
        for key in objects.list(""):
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(objects.get(key) or b"")
        return folder


@contextmanager
def radosgw(at: Path) -> Iterator[Gateway]:
    """Start the cluster in an empty folder, with an empty bucket; stop it at the end."""
    mon1, mon2, http, https = free_ports(4)
    config = at / "ceph.conf"
    config.write_text(CONFIG.format(at=at, fsid=uuid.uuid4(), mon1=mon1, mon2=mon2, http=http, https=https))
    for name in ("mon", "osd", "rgw"):
        (at / name).mkdir()

    def call(*words: str, **more: Any) -> str:
        conf = ["-c", str(config)] if words[0].startswith(("ceph", "radosgw")) and words[0] != "ceph-authtool" else []
        told = subprocess.run([words[0], *conf, *words[1:]], capture_output=True, text=True, timeout=120, **more)
        assert told.returncode == 0, (words, told.stderr[-2000:])
        return told.stdout

    # An authority and a certificate of it: obstore takes no certificate for both.
    request = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2")
    call(*request, "-subj", "/CN=authority", "-keyout", f"{at}/ca.key", "-out", f"{at}/ca.pem")
    call(
        *(*request, "-subj", "/CN=127.0.0.1", "-keyout", f"{at}/key.pem", "-out", f"{at}/cert.pem"),
        *("-CA", f"{at}/ca.pem", "-CAkey", f"{at}/ca.key", "-addext", "subjectAltName=IP:127.0.0.1"),
        *("-addext", "basicConstraints=critical,CA:FALSE"),
    )
    (at / "both.pem").write_text((at / "cert.pem").read_text() + (at / "key.pem").read_text())
    ring = f"{at}/keyring"
    call("ceph-authtool", ring, "--create-keyring", "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
    for name, caps in (
        ("client.admin", ("mon", "allow *", "osd", "allow *", "mgr", "allow *")),
        ("osd.0", ("mon", "allow profile osd", "mgr", "allow profile osd", "osd", "allow *")),
        ("client.rgw", ("mon", "allow rwx", "osd", "allow rwx")),
    ):
        pairs = [word for kind, cap in zip(caps[::2], caps[1::2], strict=True) for word in ("--cap", kind, cap)]
        call("ceph-authtool", ring, "--gen-key", "-n", name, *pairs)
    fsid = config.read_text().split("fsid = ")[1].split()[0]
    call(
        *("monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a"),
        *(f"[v2:127.0.0.1:{mon2},v1:127.0.0.1:{mon1}]", f"{at}/monmap"),
    )
    call("ceph-mon", "--mkfs", "-i", "a", "--monmap", f"{at}/monmap", "--keyring", ring)
    with ExitStack() as stack:

        def spawn(*words: str) -> None:
            log = stack.enter_context((at / f"{words[0]}.out").open("wb"))
            process = subprocess.Popen([words[0], "-c", str(config), "-f", *words[1:]], stdout=log, stderr=log)
            stack.callback(_end, process)

        spawn("ceph-mon", "-i", "a")
        _wait(lambda: call("ceph", "-s"))
        secret = call("ceph-authtool", ring, "-p", "-n", "osd.0").strip()
        (at / "osd.json").write_text(json.dumps({"cephx_secret": secret}))
        own = str(uuid.uuid4())
        assert call("ceph", "osd", "new", own, "-i", f"{at}/osd.json").strip() == "0"
        call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", own)
        spawn("ceph-osd", "-i", "0")
        _wait(lambda: call("ceph", "osd", "stat").index("1 up"))
        spawn("radosgw", "-n", "client.rgw")
        _wait(lambda: socket.create_connection(("127.0.0.1", http), 1).close())
        user = ("user", "create", "--uid", "actshuffle", "--display-name", "a", "--access-key", KEY, "--secret", SECRET)
        call("radosgw-admin", "-n", "client.rgw", *user)
        found = Gateway(at, http, https)
        _make_bucket(found)
        yield found


def _make_bucket(gateway: Gateway) -> None:
    import botocore.session

    endpoint = f"http://127.0.0.1:{gateway.http}"
    keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
    session = botocore.session.Session()
    client = session.create_client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
    client.create_bucket(Bucket=BUCKET)
    client.close()


def _wait(call: Any) -> None:
    deadline = time.monotonic() + 120
    while True:
        with suppress(AssertionError, OSError, ValueError, subprocess.TimeoutExpired):
            call()
            return
        assert time.monotonic() < deadline, "the cluster did not start"
        time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(120)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, 9)
        process.wait()
