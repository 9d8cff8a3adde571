"""The engine against a real server for S3, Ceph's radosgw, where it is installed; part of the long campaigns."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import actshuffle
from actshuffle.errors import ActshuffleError
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import as_place
from actshuffle.testing import Faults, Killed, at, differences
from actshuffle.testing.stories import new_process
from benchmarks.s3 import make
from support.processes import SEED, dask_cluster, shuffled, source
from support.radosgw import BUCKET, SECRET, is_installed, radosgw

pytest.importorskip("s3fs")
pytest.importorskip("obstore")

pytestmark = [pytest.mark.soak, pytest.mark.skipif(not is_installed(), reason="radosgw is not installed")]

ROWS = 40
PLAN = {"levels": 2, "block_bytes": 400, "run_bytes": 1, "chunk_rows": 10}
CLIENTS = ("obstore", "fsspec")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    with radosgw(tmp_path_factory.mktemp("rgw")) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return source(tmp_path_factory.mktemp("source") / "src.zarr", ROWS)


@pytest.fixture
def top(gateway, local, tmp_path):
    url = f"s3://{BUCKET}/{tmp_path.name}"
    gateway.upload(local, f"{url}/src.zarr")
    return url


def run(top, options, **settings):
    new_process()
    asked = {"seed": SEED, **PLAN, "storage_options": options, **settings}
    return actshuffle.shuffle(f"{top}/src.zarr", f"{top}/dst.zarr", **asked)


def assert_exact(gateway, local, top, tmp_path, name="copy"):
    assert differences(local, gateway.download(f"{top}/dst.zarr", tmp_path / name), SEED) == []
    left = open_objects(as_place(top, gateway.options("obstore"))).names("")
    assert set(left) == {"src.zarr", "dst.zarr"}


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("client", CLIENTS)
def test_from_bucket_to_bucket(client, secure, gateway, top, local, tmp_path):
    options = gateway.options(client, secure=secure)
    if secure and client == "fsspec":
        with pytest.raises(ActshuffleError, match=r"HTTP 411.*request_checksum_calculation"):
            run(top, options)
        options["config_kwargs"] = {"request_checksum_calculation": "when_required"}
        run(top, options)
    else:
        run(top, options)
    assert_exact(gateway, local, top, tmp_path)
    assert actshuffle.verify(f"{top}/src.zarr", f"{top}/dst.zarr", storage_options=options).ok


@pytest.mark.parametrize("client", CLIENTS)
def test_killed_at_every_tenth_operation(client, gateway, top, local, tmp_path):
    options, log = gateway.options(client), Faults()
    with log:
        run(top, options)
    for number in range(0, len(log.log), 10):
        try:
            with Faults(at({number: "kill"})):
                run(top, options, overwrite=True)
        except Killed:
            pass
        try:
            run(top, options)
        except ActshuffleError:  # it was killed while it removed the former output
            run(top, options, overwrite=True)
        assert_exact(gateway, local, top, tmp_path, f"copy{number}")


@pytest.mark.parametrize("client", CLIENTS)
def test_on_a_cluster_whose_worker_dies(client, gateway, top, local, tmp_path):
    asked = {**PLAN, "storage_options": gateway.options(client)}
    with dask_cluster(tmp_path / "dask", 2, fault=("put level1/blocks/*", "late")) as cluster:
        end = shuffled(tmp_path / "told.json", f"{top}/src.zarr", f"{top}/dst.zarr", scheduler=cluster.address, **asked)
        assert end["end"] == "done", end
        assert -9 in [w.exitcode for w in cluster.workers]
    assert_exact(gateway, local, top, tmp_path)


def test_objects_that_are_written_in_parts(gateway, tmp_path):
    place = as_place(f"s3://{BUCKET}/{tmp_path.name}", gateway.options("obstore"))
    objects, data = open_objects(place), bytes(range(256)) * (70 << 12)
    with objects.writer("parts", len(data)) as out:
        out.write(memoryview(data))
    assert objects.size("parts") == len(data) > 64 << 20
    assert objects.get("parts") == data
    objects.delete_prefix("")
    assert objects.names("") == []


PEAK = """
import json, sys, actshuffle
from pathlib import Path
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
src, dst, asked = json.loads(sys.argv[1])
actshuffle.plan(src, dst, memory="4GB", storage_options=asked["storage_options"])
_, idle = actshuffle.shuffle, status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
actshuffle.shuffle(src, dst, seed=1, **asked)
print(status("VmHWM") - idle)
"""


@pytest.mark.parametrize(
    ("client", "memory", "chunk_mib", "levels"),
    [("obstore", 256, 32, 3), ("obstore", 256, 16, 2), ("obstore", 512, 32, 2), ("fsspec", 400, 32, 3)],
)
def test_runs_keep_to_their_memory(client, memory, chunk_mib, levels, gateway, tmp_path):
    """Chunks of 32 MiB of rows of 8 KiB, in a process of its own."""
    url, options = f"s3://{BUCKET}/memory", gateway.options("obstore")
    if not open_objects(as_place(f"{url}/src", options)).names(""):
        make(as_place(f"{url}/src", options), 400_000_000, 8192, 32 << 20)
    asked = {"memory": memory * 10**6, "chunk_rows": chunk_mib << 7, "levels": levels, "overwrite": True}
    words = json.dumps((f"{url}/src", f"{url}/dst", {**asked, "storage_options": gateway.options(client)}))
    done = subprocess.run([sys.executable, "-c", PEAK, words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert memory * 10**6 / 3 < int(done.stdout) <= memory * 10**6


@pytest.mark.parametrize("client", CLIENTS)
def test_wrong_secret(client, gateway, top):
    with pytest.raises(ActshuffleError, match="HTTP 403") as refused:
        run(top, gateway.options(client) | {"secret": "not" + SECRET})
    assert SECRET not in str(refused.value)
