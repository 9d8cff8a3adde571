"""The whole engine in an object store: URLs and storage options as fsspec users give them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import time
import traceback
from collections import Counter
from itertools import product

import numpy as np
import pytest
import zarr

import actshuffle
from actshuffle.errors import (
    ActshuffleError,
    DestinationExistsError,
    DestinationInUseError,
    MissingChunkError,
    SourceError,
    StorageError,
)
from actshuffle.executors import Serial
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import as_place
from actshuffle.testing import Faults, Killed, at, differences, matching
from actshuffle.testing.stories import new_process
from support.executors import Paused
from support.processes import SEED, busy, dask_cluster, drive, ended, outcome, shuffled, source, start
from support.stores import array, values

pytest.importorskip("moto")
pytest.importorskip("s3fs")
pytest.importorskip("obstore")

from support.s3 import KEY, SECRET, TOKEN, failing, serve

ROWS = 40
PLAN = {"levels": 2, "block_bytes": 400, "run_bytes": 1, "chunk_rows": 10}
ONCE = {"config_kwargs": {"retries": {"max_attempts": 1}}}
QUICK = {"config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 1, "read_timeout": 1}}


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


@pytest.fixture(scope="session", autouse=True)
def services():
    """botocore parses its descriptions of services, megabytes of them, once instead of for each client."""
    from botocore.loaders import JSONFileLoader

    load, known = JSONFileLoader.load_file, {}

    def once(self, path):
        if path not in known:
            known[path] = load(self, path)
        return known[path]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", once)
        yield


@pytest.fixture(params=["obstore", pytest.param("fsspec", marks=pytest.mark.soak)])
def client(request):
    """All tests run on both clients; those that are not marked `on_both` do so in the long campaigns."""
    return request.param


on_both = pytest.mark.parametrize("client", ["obstore", "fsspec"])


@pytest.fixture(autouse=True)
def kind(endpoint, client, monkeypatch):
    endpoint.client = client
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    yield
    endpoint.unkind = lambda method, path: None
    endpoint.wants = endpoint.client = ""


@pytest.fixture
def impatient(monkeypatch):
    """The client asks twice instead of 25 times, with waits that double, before it reports an outage."""
    from s3fs import S3FileSystem

    monkeypatch.setattr(S3FileSystem, "retries", 1)


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    return source(tmp_path_factory.mktemp("source") / "src.zarr", ROWS)


@pytest.fixture
def bucket(endpoint, local, request):
    """A bucket with a source in it."""
    url = endpoint.bucket(f"b{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}")
    endpoint.upload(local, f"{url}/src.zarr")
    return url


def shuffle(endpoint, src, dst, **settings):
    new_process()
    settings = {"seed": SEED, **PLAN, "storage_options": endpoint.options(), **settings}
    return actshuffle.shuffle(src, dst, **settings)


def assert_exact(endpoint, local, url, tmp_path):
    copy = endpoint.download(url, tmp_path / "copy")
    assert differences(local, copy, SEED) == []
    shutil.rmtree(copy)
    bucket = url.rsplit("/", 1)[0]
    beside = [k for k in endpoint.keys(bucket) if not k.startswith(("src.zarr/", "dst.zarr/"))]
    assert beside == []
    assert not [k for k in endpoint.keys(url) if "receipts" in k or "run.json" in k]


# --- It works -----------------------------------------------------------------------------------


@on_both
def test_from_bucket_to_bucket(endpoint, bucket, local, tmp_path):
    src, dst = f"{bucket}/src.zarr", f"{bucket}/dst.zarr"
    assert shuffle(endpoint, src, dst).plan.levels == 2
    assert_exact(endpoint, local, dst, tmp_path)
    options = endpoint.options()
    assert actshuffle.verify(src, dst, storage_options=options).ok
    assert actshuffle.verify(src, dst, storage_options=options, quick=True).ok
    assert actshuffle.info(dst, options)["rows"] == ROWS
    assert actshuffle.status(dst, options)["state"] == "complete"
    assert shuffle(endpoint, src, dst).already_finished
    with pytest.raises(DestinationExistsError, match="seed was"):
        shuffle(endpoint, src, dst, seed=99)
    # Others' clients in the same thread go on to work.
    rows = zarr.open_group(dst, mode="r", storage_options=endpoint.others())["x"][:]
    assert rows.shape == (ROWS, 4)
    shuffle(endpoint, src, dst, overwrite=True, levels=1, block_bytes=None, memory="200MB")
    assert_exact(endpoint, local, dst, tmp_path)


@on_both
def test_requests_are_counted_and_none_asks_for_a_size_first(endpoint, bucket, client):
    endpoint.seen.clear()
    result = shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr")
    seen = Counter(method if "list-type" not in path else "LIST" for method, path in endpoint.seen)
    counted, late = result.requests, 2  # the claim is given up when the result is there
    assert counted["put"] == seen["PUT"]
    if client == "obstore":
        assert counted["list"] == seen["LIST"]
        assert counted["head"] == seen["HEAD"]
        assert seen["GET"] - late <= counted["get"] <= seen["GET"]
        assert seen["POST"] + seen["DELETE"] - late <= counted["delete"] <= seen["POST"] + seen["DELETE"]
    read = [path for method, path in endpoint.seen if method == "GET" and "/c/" in path]
    asked = {path for method, path in endpoint.seen if method == "HEAD"}
    assert read
    assert not asked & set(read)
    assert str(result).endswith(f"{sum(counted.values())} requests to object stores")
    assert result.requests.keys() <= {"get", "put", "list", "head", "delete"}


def test_objects_that_are_written_in_parts(endpoint, bucket, monkeypatch):
    """They appear whole or not at all, and nothing of them stays in the store after a failure."""
    monkeypatch.setattr("actshuffle.storage.bucket.STORE_WHOLE", 1 << 20)
    data = np.random.default_rng(0).integers(0, 256, (17 << 20) + 5, np.uint8).tobytes()
    objects = open_objects(as_place(bucket, endpoint.options()))

    def write(stop, then=None):
        with objects.writer("parts", len(data)) as out:
            for at in range(0, stop, 3 << 20):
                out.write(memoryview(data)[at : min(at + (3 << 20), stop)])
            if then is not None:
                raise then

    with pytest.raises(ZeroDivisionError):
        write(10 << 20, ZeroDivisionError())
    endpoint.unkind = lambda method, path: 403 if method == "PUT" and "partNumber=2" in path else None
    with pytest.raises(StorageError, match=r"HTTP 403.*parts"):
        write(len(data))
    endpoint.unkind = lambda method, path: None
    assert objects.size("parts") is None
    assert b"<UploadId>" not in endpoint.plain("GET", f"/{bucket.removeprefix('s3://')}?uploads")
    endpoint.seen.clear()
    write(len(data))
    assert sum("partNumber" in path for _, path in endpoint.seen) == 3
    assert objects.get("parts") == data
    objects.put("whole", data)
    assert objects.get("whole") == data


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_process_says_that_its_client_is_gone(endpoint, bucket, tmp_path):
    objects = open_objects(as_place(bucket, endpoint.options()))
    assert objects.get("none") is None
    child = os.fork()
    if not child:  # no assertion here: pytest goes on in the child if it raises
        said = []
        for call in (lambda: objects.get("none"), lambda: open_objects(as_place(bucket, endpoint.options()))):
            try:
                said.append(str(call()))
            except ActshuffleError as err:
                said.append(f"{type(err).__name__}: {err}")
        (tmp_path / "said").write_text("\n".join(said))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    used, opened = (tmp_path / "said").read_text().split("\n")
    assert used.startswith("StorageError")
    assert opened.startswith("RequestError")
    assert '"spawn"' in used
    assert '"spawn"' in opened


def test_filter_from_bucket_to_bucket(endpoint, bucket):
    rows = np.random.default_rng(2).standard_normal((ROWS, 4)).astype("f4")
    rows[[0, 7, 39]] *= 100
    options, src, dst = endpoint.options(), f"{bucket}/norms.zarr", f"{bucket}/dst.zarr"
    array(src, rows, chunks=(10, 4), storage_options=endpoint.others())
    asked = {"drop_norm": 10, "storage_options": options, "chunk_rows": 10}
    new_process()
    with Faults(matching("put _actshuffle/receipts/0.json", "kill")), pytest.raises(Killed):
        actshuffle.filter_rows(src, dst, **asked)
    new_process()
    assert actshuffle.filter_rows(src, dst, **asked).dropped["drop_norm"] == 3
    left = zarr.open_group(dst, mode="r", storage_options=endpoint.others())["data"][:]
    np.testing.assert_array_equal(left, np.delete(rows, [0, 7, 39], axis=0))
    assert {key.split("/")[0] for key in endpoint.keys(bucket)} == {"src.zarr", "norms.zarr", "dst.zarr"}


def test_from_bucket_to_disk_and_back(endpoint, bucket, local, tmp_path, monkeypatch):
    monkeypatch.setattr("actshuffle.arrays.source.STORE_PIECE", 61)  # which cuts rows
    shuffle(endpoint, f"{bucket}/src.zarr", tmp_path / "dst.zarr", fsync=False)
    assert differences(local, tmp_path / "dst.zarr", SEED) == []
    shuffle(endpoint, local, f"{bucket}/dst.zarr", scratch=str(tmp_path / "scratch"))
    assert_exact(endpoint, local, f"{bucket}/dst.zarr", tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{"compressors": "auto"}, {"chunks": (5, 4), "shards": (10, 4)}, {"zarr_format": 2}, {"chunks": (9, 2)}],
    ids=["zstd", "sharded", "v2", "cut rows"],
)
def test_sources_that_zarr_decodes(settings, endpoint, bucket, tmp_path):
    array(tmp_path / "in", values(ROWS, (4,)), **settings)
    endpoint.upload(tmp_path / "in", f"{bucket}/other")
    codec = {"codec": "zstd"} if "shards" not in settings else {"chunks_per_shard": 2, "block_bytes": 700}
    shuffle(endpoint, f"{bucket}/other", f"{bucket}/dst.zarr", **codec)
    copy = endpoint.download(f"{bucket}/dst.zarr", tmp_path / "copy")
    assert differences(tmp_path / "in", copy, SEED) == []


def test_on_a_cluster_whose_worker_dies(endpoint, bucket, local, tmp_path):
    settings = {**PLAN, "storage_options": endpoint.options()}
    src, dst = f"{bucket}/src.zarr", f"{bucket}/dst.zarr"
    with dask_cluster(tmp_path / "dask", 2, fault=("put level1/blocks/*", "late")) as cluster:
        end = shuffled(tmp_path / "told.json", src, dst, scheduler=cluster.address, **settings)
        assert end["end"] == "done", end
        assert -9 in [w.exitcode for w in cluster.workers]
        logs = b"".join(p.read_bytes() for p in (tmp_path / "dask").glob("*.log"))
        logs += (tmp_path / "told.log").read_bytes()
    assert_exact(endpoint, local, dst, tmp_path)
    assert SECRET.encode() not in logs
    assert TOKEN.encode() not in logs


@pytest.mark.parametrize(
    ("client", "what"),
    [
        ("obstore", "put level1/runs/*"),
        ("obstore", "put x/c.2.0"),
        ("fsspec", "put x/c.2.0"),
        ("obstore", "delete_prefix _actshuffle/receipts"),
        *(
            pytest.param(client, what, marks=pytest.mark.soak)
            for client, what in (
                ("fsspec", "put level1/runs/*"),
                ("fsspec", "delete_prefix _actshuffle/receipts"),
                *product(
                    ("obstore", "fsspec"),
                    ("put level1/blocks/c.1.0", "put _actshuffle/receipts/1.json", "put _actshuffle/zarr.json"),
                ),
            )
        ),
    ],
)
def test_killed_and_resumed(what, endpoint, bucket, local, tmp_path):
    with Faults(matching(what, "kill")), pytest.raises(Killed):
        shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr")
    shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr")
    assert_exact(endpoint, local, f"{bucket}/dst.zarr", tmp_path)


def _pause(url, settings, flags):
    actshuffle.shuffle(f"{url}/src.zarr", f"{url}/dst.zarr", seed=SEED, executor=Paused(flags), **PLAN, **settings)


def test_two_at_once(endpoint, bucket, local, tmp_path):
    """A bucket has no locks, but a process of the same host is seen to be alive, or dead."""
    settings = {"storage_options": endpoint.options()}
    with busy(_pause, bucket, settings, flags=tmp_path / "flags") as first:
        with pytest.raises(DestinationInUseError, match=f"dst.zarr is in use: process {first.pid} on"):
            shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr")
        first.kill()
        first.join()
        shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr")
    assert_exact(endpoint, local, f"{bucket}/dst.zarr", tmp_path)


def test_the_first_of_two_hosts_stops_and_the_second_goes_on(endpoint, bucket, local, tmp_path):
    """Neither can see whether the other lives; the claim of the second shows the first that it is not alone."""
    ended = []

    class Overtaken(Serial):
        def map(self, fn, calls):
            for number, call in enumerate(calls):
                if number == 1 and not ended:
                    ended.append(shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr", overwrite=True, seed=6))
                yield fn(*call)

    with pytest.raises(DestinationInUseError, match="no longer this process's"):
        shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr", executor=Overtaken())
    assert ended[0].seed == 6
    copy = endpoint.download(f"{bucket}/dst.zarr", tmp_path / "copy")
    assert differences(local, copy, 6) == []


@pytest.mark.soak
def test_killed_at_every_tenth_operation(endpoint, bucket, local, tmp_path):
    log = Faults()
    with log:
        shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr", overwrite=True)
    for number in range(0, len(log.log), 10):
        try:
            with Faults(at({number: "kill"})):
                shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr", overwrite=True)
        except Killed:
            pass
        try:
            shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr")
        except DestinationExistsError as err:
            if "finished" not in str(err):
                shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr", overwrite=True)
        assert_exact(endpoint, local, f"{bucket}/dst.zarr", tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("number", range(12))
def test_driver_killed_at_random(number, endpoint, bucket, local, tmp_path):
    told, dice = tmp_path / "told.json", random.Random(number)
    settings = {**PLAN, "storage_options": endpoint.options()}
    places = (f"{bucket}/src.zarr", f"{bucket}/dst.zarr")
    driver = start(drive, told, *places, settings)
    time.sleep(dice.uniform(0.2, 6))
    driver.kill()
    ended(driver)
    if not told.exists():
        assert shuffled(told, *places, **settings)["end"] in ("done", "DestinationExistsError")
    assert_exact(endpoint, local, places[1], tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("who", "number"), [*(("worker", number) for number in range(12)), *(("scheduler", number) for number in range(6))]
)
def test_cluster_killed_at_random(who, number, endpoint, bucket, local, tmp_path):
    told, dice = tmp_path / "told.json", random.Random(number)
    settings = {**PLAN, "storage_options": endpoint.options()}
    places = (f"{bucket}/src.zarr", f"{bucket}/dst.zarr")
    with dask_cluster(tmp_path / "dask", 2) as cluster:
        driver = start(drive, told, *places, settings | {"scheduler": cluster.address})
        time.sleep(dice.uniform(0.2, 6))
        victim = cluster.scheduler if who == "scheduler" else dice.choice(cluster.workers)
        victim.kill()
        ended(driver)
    end = outcome(told)["end"]
    assert end in ("done", "ClusterError")
    if end != "done":
        assert shuffled(told, *places, **settings)["end"] in ("done", "DestinationExistsError")
    assert_exact(endpoint, local, places[1], tmp_path)


# --- Bad weather --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", [500, 0.3, pytest.param(503, marks=pytest.mark.soak), pytest.param("cut", marks=pytest.mark.soak)]
)
def test_some_requests_fail_or_dawdle(what, endpoint, bucket, local, tmp_path):
    endpoint.unkind = failing(0.05, 1, what)
    for attempt in range(5):
        try:
            shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr")
            break
        except (StorageError, SourceError) as err:  # its client gave up: say so, and go on when told to
            assert attempt < 4, err
    endpoint.unkind = lambda method, path: None
    assert_exact(endpoint, local, f"{bucket}/dst.zarr", tmp_path)


@pytest.mark.parametrize(
    ("what", "method"),
    [
        (500, "PUT"),
        ("cut", "GET"),
        (3.0, "PUT"),
        *(
            pytest.param(what, method, marks=pytest.mark.soak)
            for what, method in ((500, "GET"), ("cut", "PUT"), (3.0, "GET"))
        ),
    ],
)
def test_all_requests_fail_from_some_time_on(what, method, endpoint, bucket, local, tmp_path, impatient):
    """An outage gives a typed error in bounded time, and the run resumes when it is over."""
    count, first = [0], 20 if method == "GET" else 8

    def outage(asked, path):
        count[0] += asked == method
        return what if count[0] > first and asked == method else None

    endpoint.unkind = outage
    started = time.monotonic()
    with pytest.raises((StorageError, SourceError)) as raised:
        shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr", storage_options=endpoint.options(**QUICK))
    assert count[0] < first + 20
    assert time.monotonic() - started < 300
    assert bucket.removeprefix("s3://") in str(raised.value)
    endpoint.unkind = lambda method, path: None
    endpoint.settle()
    shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr")
    assert_exact(endpoint, local, f"{bucket}/dst.zarr", tmp_path)


# --- Who may --------------------------------------------------------------------------------------


def assert_refused(endpoint, bucket, options, error=ActshuffleError):
    asked = len(endpoint.seen)
    with pytest.raises(error) as raised:
        shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr", storage_options=options)
    assert len(endpoint.seen) - asked < 5, "it asks again and again"
    text = "".join(traceback.format_exception(raised.value))
    assert SECRET not in text
    assert TOKEN not in text
    endpoint.wants = ""
    endpoint.unkind = lambda method, path: None
    assert not [k for k in endpoint.keys(bucket) if not k.startswith("src.zarr/")]
    return str(raised.value)


def test_anonymous(endpoint, bucket):
    endpoint.wants = KEY
    said = assert_refused(endpoint, bucket, endpoint.options(key=None))
    assert "Access Denied" in said or "Forbidden" in said


@on_both
def test_wrong_key(endpoint, bucket):
    endpoint.wants = KEY
    said = assert_refused(endpoint, bucket, endpoint.options(key="AKIDOTHER"))
    assert "Access Key Id" in said or "Forbidden" in said


def test_expired_token(endpoint, bucket):
    endpoint.unkind = lambda method, path: "expired"
    said = assert_refused(endpoint, bucket, endpoint.options(**ONCE))
    assert "expired" in said.lower() or "Bad Request" in said


def test_token_that_expires_during_the_run(endpoint, bucket, local, tmp_path):
    count = [0]

    def expire(method, path):
        count[0] += 1
        return "expired" if count[0] > 120 else None

    endpoint.unkind = expire
    with pytest.raises(ActshuffleError):
        shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr", storage_options=endpoint.options(**QUICK))
    endpoint.unkind = lambda method, path: None
    shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr")
    assert_exact(endpoint, local, f"{bucket}/dst.zarr", tmp_path)


def test_no_credentials_at_all(endpoint, bucket, monkeypatch):
    options = {"client_kwargs": {"endpoint_url": endpoint.url, "region_name": "us-east-1"}}
    endpoint.wants = KEY
    assert_refused(endpoint, bucket, options)


@on_both
def test_no_such_bucket(endpoint, bucket, tmp_path):
    with pytest.raises(ActshuffleError, match="nobucket"):
        shuffle(endpoint, "s3://nobucket/src.zarr", tmp_path / "dst.zarr")
    with pytest.raises(ActshuffleError, match="nobucket"):
        shuffle(endpoint, f"{bucket}/src.zarr", "s3://nobucket/dst.zarr")


def test_no_such_source(endpoint, bucket, tmp_path):
    with pytest.raises(SourceError, match=r"nothing.zarr"):
        shuffle(endpoint, f"{bucket}/nothing.zarr", tmp_path / "dst.zarr")


def test_nobody_listens(bucket, endpoint, tmp_path):
    options = endpoint.options(**QUICK)
    options["client_kwargs"] = {"endpoint_url": "http://127.0.0.1:9", "region_name": "us-east-1"}
    with pytest.raises(ActshuffleError):
        shuffle(endpoint, f"{bucket}/src.zarr", tmp_path / "dst.zarr", storage_options=options)


@on_both
def test_missing_and_truncated_chunks(endpoint, bucket, tmp_path):
    key = f"{bucket}/src.zarr/x/c/2/0"
    data = endpoint.get(key)
    endpoint.put(key, data[:-1])
    with pytest.raises(MissingChunkError, match="x/c/2/0"):
        shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr")
    endpoint.delete(key)
    with pytest.raises(MissingChunkError, match="x/c/2/0"):
        shuffle(endpoint, f"{bucket}/src.zarr", f"{bucket}/dst.zarr")
    assert not [k for k in endpoint.keys(bucket) if not k.startswith("src.zarr/")]


# --- Secrets --------------------------------------------------------------------------------------


@on_both
def test_no_secret_is_written_or_logged(endpoint, bucket, tmp_path, caplog, impatient):
    """Secrets appear neither in run.json, receipts or the marker, nor in scratch, logs, errors or their causes."""
    caplog.set_level(logging.DEBUG, logger="actshuffle")
    src, dst = f"{bucket}/src.zarr", f"{bucket}/dst.zarr"
    jobs, texts = [], []
    with Faults(matching("put _actshuffle/receipts/1.json", "kill")), pytest.raises(Killed) as death:
        shuffle(endpoint, src, dst, planned=jobs.append)
    texts += traceback.format_exception(death.value)
    texts += [repr(jobs[0]), str(jobs[0]), json.dumps(jobs[0].to_json()), str(jobs[0].destination)]
    texts.append(json.dumps(actshuffle.status(dst, endpoint.options())))
    for key in endpoint.keys(bucket):
        texts.append(endpoint.get(f"{bucket}/{key}").decode("latin-1"))
    for what in (500, "cut", "expired"):
        endpoint.unkind = lambda method, path, what=what: what if method == "PUT" else None
        with pytest.raises(ActshuffleError) as raised:
            shuffle(endpoint, src, dst, storage_options=endpoint.options(**QUICK))
        texts += traceback.format_exception(raised.value)
    endpoint.unkind = lambda method, path: None
    shuffle(endpoint, src, dst)
    for key in endpoint.keys(bucket):
        texts.append(endpoint.get(f"{bucket}/{key}").decode("latin-1"))
    texts.append(caplog.text)
    assert "dst.zarr" in "\n".join(texts)
    assert secrets_in(texts) == set()
    assert endpoint.seen


def secrets_in(texts):
    return {secret for secret in (SECRET, TOKEN, KEY) for text in texts if secret in text}


def test_control_secrets_are_seen(endpoint, bucket, caplog):
    """They appear in an object and in a log, where the test above looks for them."""
    endpoint.put(f"{bucket}/dst.zarr/run.json", json.dumps(endpoint.options()).encode())
    caplog.set_level(logging.DEBUG, logger="actshuffle")
    logging.getLogger("actshuffle").debug("%s", endpoint.options())
    texts = [endpoint.get(f"{bucket}/{key}").decode("latin-1") for key in endpoint.keys(bucket)]
    assert secrets_in(texts) == secrets_in([caplog.text]) == {SECRET, TOKEN, KEY}
