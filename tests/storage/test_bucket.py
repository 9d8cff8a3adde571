"""Options of fsspec's clients reach obstore, or are refused by name; errors and secrets; no server is needed."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import ClassVar

import pytest

from actshuffle.errors import RequestError, StorageError
from actshuffle.limits import part_bytes, uploads
from actshuffle.storage import bucket, buffers, credentials, objects
from actshuffle.storage.bucketoptions import Settings, secrets_in, settings
from actshuffle.storage.fsspecstore import FsspecObjects
from actshuffle.storage.place import as_place
from actshuffle.storage.remote import http_error
from actshuffle.storage.requests import pages

pytest.importorskip("obstore")

KEYS = {"key": "AKIDKEY", "secret": "hunter2SECRET"}
PATIENT = {"connect_timeout": "10000ms", "read_timeout": "60000ms", "timeout": "300s"}


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """An environment without credentials, endpoints and regions."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE", "REGION", "DEFAULT_REGION"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))


def made(url: str, **options) -> Settings:
    return settings(as_place(url, options))


# --- Options --------------------------------------------------------------------------------------


def test_s3_plainly():
    found = made("s3://b/some/store/", **KEYS)
    assert (found.kind, found.bucket, found.prefix) == ("S3Store", "b", "some/store")
    assert found.config == {"region": "us-east-1", "unsigned_payload": True, "virtual_hosted_style_request": False}
    assert found.client == PATIENT
    assert found.retry == {}
    assert found.credentials() == {
        "access_key_id": "AKIDKEY",
        "secret_access_key": "hunter2SECRET",
        "token": None,
        "expires_at": None,
    }


@pytest.mark.parametrize(
    ("options", "config", "client"),
    [
        (
            {"client_kwargs": {"endpoint_url": "http://h:9", "region_name": "r"}},
            {"endpoint": "http://h:9", "region": "r", "unsigned_payload": False},
            {"allow_http": True},
        ),
        ({"endpoint_url": "https://h"}, {"endpoint": "https://h", "unsigned_payload": True}, {"allow_http": False}),
        (
            {"endpoint_url": "https://h", "config_kwargs": {"s3": {"addressing_style": "virtual"}}},
            {"endpoint": "https://b.h", "virtual_hosted_style_request": True},
            {},
        ),
        ({"requester_pays": True}, {"request_payer": True}, {}),
        (
            {"s3_additional_kwargs": {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "k", "BucketKeyEnabled": True}},
            {"server_side_encryption": "aws:kms", "sse_kms_key_id": "k", "sse_bucket_key_enabled": True},
            {},
        ),
        ({"client_kwargs": {"verify": False}}, {}, {"allow_invalid_certificates": True}),
        (
            {"config_kwargs": {"connect_timeout": 2, "read_timeout": 0.5, "max_pool_connections": 9}},
            {},
            {"connect_timeout": "2000ms", "read_timeout": "500ms", "pool_max_idle_per_host": "9"},
        ),
        ({"config_kwargs": {"proxies": {"https": "http://p"}}}, {}, {"proxy_url": "http://p"}),
        ({"use_listings_cache": False, "default_block_size": 5, "use_ssl": True}, {}, {}),
    ],
)
def test_options_of_s3fs(options, config, client):
    found = made("s3://b/x", **KEYS, **options)
    assert config.items() <= found.config.items()
    assert client.items() <= found.client.items()


@pytest.mark.parametrize(
    ("retries", "most"), [({"max_attempts": 3}, 3), ({"total_max_attempts": 3, "mode": "standard"}, 2)]
)
def test_retries(retries, most):
    assert made("s3://b/x", **KEYS, config_kwargs={"retries": retries}).retry["max_retries"] == most


@pytest.mark.parametrize(
    ("url", "options", "named"),
    [
        ("s3://b/x", {"fixed_upload_size": True}, "fixed_upload_size"),
        ("s3://b/x", {"client_kwargs": {"api_version": "1"}}, "client_kwargs.api_version"),
        ("s3://b/x", {"config_kwargs": {"s3": {"use_accelerate_endpoint": True}}}, "s3.use_accelerate_endpoint"),
        ("s3://b/x", {"s3_additional_kwargs": {"ACL": "private"}}, "s3_additional_kwargs.ACL"),
        ("s3://b/x", {"config_kwargs": {"read_timeout": "soon"}}, "read_timeout"),
        ("s3://b/x", {"use_ssl": False}, "use_ssl"),
        ("s3://b/x", {"client_kwargs": {"verify": "/nonexistent"}}, "verify"),
        ("gs://b/x", {"token": "browser"}, "token"),
        ("gs://b/x", {"session_kwargs": {"trust_env": True}}, "session_kwargs.trust_env"),
        ("az://b/x", {"location_mode": "secondary"}, "location_mode"),
        ("az://b/x", {"connection_string": "AccountName=a;EndpointSuffix=core.chinacloudapi.cn"}, "connection_string"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(url, options, named):
    with pytest.raises(RequestError, match=named.replace(".", r"\.")) as refused:
        made(url, **KEYS, **options) if url.startswith("s3") else made(url, **options)
    assert '"client": "fsspec"' in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_half_a_key_and_no_bucket():
    with pytest.raises(RequestError, match="belong together"):
        made("s3://b/x", key="AKIDKEY")
    with pytest.raises(RequestError, match="names no bucket"):
        made("s3:///x", **KEYS)


def test_google_and_azure():
    found = made("gs://b/x", token="anon", endpoint_url="http://h:1", project="p", access="read_only")
    assert (found.kind, found.config) == ("GCSStore", {"skip_signature": True, "base_url": "http://h:1"})
    assert made("gcs://b/x", token={"type": "service_account"}).config == {
        "service_account_key": '{"type": "service_account"}'
    }
    found = made("abfss://c@acc.dfs.core.windows.net/x/y", account_key="a2V5")
    assert (found.kind, found.bucket, found.prefix) == ("AzureStore", "c", "x/y")
    assert found.config == {"account_name": "acc", "account_key": "a2V5"}
    text = "DefaultEndpointsProtocol=https;AccountName=n;AccountKey=a2V5==;EndpointSuffix=core.windows.net"
    assert made("az://c/x", connection_string=text).config == {"account_name": "n", "account_key": "a2V5=="}
    assert made("az://c/x", account_name="n", sas_token="sv=1").config == {"account_name": "n", "sas_key": "sv=1"}


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("s3://b/x", KEYS),
        ("s3://b/x", {"anon": True}),
        ("gs://b/x", {"token": "anon"}),
        ("az://c/x", {"account_name": "n", "account_key": "a2V5"}),
        ("abfss://c@acc.dfs.core.windows.net/x", {"account_key": "a2V5"}),
    ],
)
def test_obstore_opens_what_was_made(url, options):
    assert isinstance(objects.open_objects(as_place(url, options)), bucket.BucketObjects)


def test_the_client_is_chosen_by_option(monkeypatch):
    fsspec = objects.open_objects(as_place("s3://b/x", {**KEYS, "client": "fsspec"}))
    assert isinstance(fsspec, FsspecObjects)
    with pytest.raises(RequestError, match="obstore"):
        objects.open_objects(as_place("memory://x", {"client": "obstore"}))
    with pytest.raises(RequestError, match="'boto'"):
        objects.open_objects(as_place("s3://b/x", {**KEYS, "client": "boto"}))
    objects.remote_objects.cache_clear()
    monkeypatch.setattr(objects, "find_spec", lambda name: None)  # obstore is not installed
    assert isinstance(objects.open_objects(as_place("s3://b/x", KEYS)), FsspecObjects)
    objects.remote_objects.cache_clear()


# --- Credentials -----------------------------------------------------------------------------------


def test_credentials_of_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "K")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "T")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://h:1")
    found = made("s3://b/x")
    assert [found.credentials()[name] for name in ("access_key_id", "secret_access_key", "token")] == ["K", "S", "T"]
    assert found.config["endpoint"] == "http://h:1"
    assert made("s3://b/x", **KEYS).credentials()["token"] is None  # the environment's token belongs to its key


def test_credentials_of_a_profile(tmp_path):
    (tmp_path / "credentials").write_text("[me]\naws_access_key_id = PK\naws_secret_access_key = PS\n")
    (tmp_path / "config").write_text("[profile me]\nregion = eu-north-1\n")
    found = made("s3://b/x", profile="me")
    given = found.credentials()
    assert (given["access_key_id"], given["secret_access_key"]) == ("PK", "PS")
    assert given["expires_at"] > datetime.now(UTC)
    assert found.config["region"] == "eu-north-1"
    with pytest.raises(RequestError, match="other"):
        made("s3://b/x", profile="other")


def test_no_credentials(tmp_path, monkeypatch):
    with pytest.raises(StorageError, match="no credentials for s3://b/x: set AWS_ACCESS_KEY_ID and"):
        made("s3://b/x")
    monkeypatch.setattr(credentials.importlib.util, "find_spec", lambda name: None)  # botocore is not installed
    assert made("s3://b/x").credentials is None  # obstore looks for a role
    (tmp_path / "credentials").write_text("")
    with pytest.raises(RequestError, match="pip install botocore"):
        made("s3://b/x")


# --- Errors and secrets ------------------------------------------------------------------------------

ANSWER = (
    "Generic S3 error: Error performing PUT http://h/b/k in 1ms - Server returned non-2xx status code: 403 Forbidden: "
    "<Error><Code>InvalidAccessKeyId</Code><Message>No such key.</Message><AWSAccessKeyId>AKIDKEY</AWSAccessKeyId>"
    "</Error>\n\nDebug source:\nGeneric {\n kind: Status }"
)


def test_errors_show_status_and_code_and_no_more():
    found = Settings("S3Store", "b", "", secrets=("hunter2SECRET",))
    assert bucket._clean(ANSWER, found) == "HTTP 403 InvalidAccessKeyId: No such key"
    lost = "Generic S3 error: sending hunter2SECRET failed\n\nDebug source:\nHttp { kind: Connect }"
    assert bucket._clean(lost, found) == "Generic S3 error: sending ... failed (Connect)"
    moved = bucket._clean("Generic S3 error: Received redirect without LOCATION", found)
    assert "region_name" in moved


def test_errors_of_botocore_show_status_and_code():
    class ClientError(Exception):
        response: ClassVar = {
            "Error": {"Code": "SlowDown", "Message": "wait."},
            "ResponseMetadata": {"HTTPStatusCode": 503},
        }

    try:
        try:
            raise ClientError
        except ClientError as err:
            raise OSError("busy") from err
    except OSError as err:
        assert http_error(err) == "HTTP 503 SlowDown: wait"
    assert http_error(OSError("plain")) == ""


def test_secrets_are_those_of_all_options_that_may_hold_one():
    options = {**KEYS, "client_kwargs": {"aws_session_token": "TOKENtoken", "region_name": "eu-north-1"}}
    assert sorted(secrets_in(json.loads(as_place("s3://b", options).options))) == [
        "AKIDKEY",
        "TOKENtoken",
        "hunter2SECRET",
    ]


# --- Arithmetic, memory ------------------------------------------------------------------------------


def test_requests_of_uploads_and_lists():
    assert [uploads(n) for n in (0, 64 << 20, (64 << 20) + 1)] == [1, 1, 2 + 9]
    assert (part_bytes((1 << 30) - 1), part_bytes(1 << 30)) == (8 << 20, 24 << 20)
    assert part_bytes(10 << 40) * 10_000 >= 10 << 40
    assert [pages(n) for n in (0, 1, 1000, 1001)] == [1, 1, 1, 2]


def test_freed_memory_is_kept_where_a_nanny_would_have_it_returned(monkeypatch):
    """In the environment of Dask's nanny, `lean_heap` changes nothing until a remote place is opened."""
    calls = []
    monkeypatch.setattr(buffers, "_mallopt", lambda: lambda name, value: calls.append((name, value)) or 1)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    buffers.roomy_heap.cache_clear()
    with buffers.lean_heap():
        pass
    assert calls == []
    assert buffers.roomy_heap()
    assert sorted(calls) == sorted([(-3, 8 << 20), (-1, 16 << 20)])
    with buffers.lean_heap():
        assert calls[2:] == [(-3, 256 << 10), (-1, 256 << 10)]
    assert calls[4:] == calls[:2]
    buffers.roomy_heap.cache_clear()
