"""The storage options that users of fsspec give (s3fs, gcsfs, adlfs), as obstore takes them.

An option without a counterpart is refused by its name, never ignored: the answer says how to go on with fsspec.
Options that only concern fsspec's own caches are dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from actshuffle.errors import RequestError
from actshuffle.storage.credentials import aws_credentials, fixed
from actshuffle.storage.place import CLIENT, Place

CONNECT, READ, WHOLE = 10, 60, 300  # seconds to wait for a connection, for the next bytes, and for a whole answer
_IDLE = """
    skip_instance_cache use_listings_cache listings_expiry_time max_paths default_block_size default_fill_cache
    default_cache_type asynchronous cache_regions max_concurrency version_aware consistency block_size cache_timeout
    check_connection project
"""  # they steer caches of fsspec that nothing here uses


@dataclass
class Settings:
    """What obstore is opened with: ``kind`` of store, ``config``, ``client`` and ``retry``; ``secrets`` go nowhere."""

    kind: str
    bucket: str
    prefix: str
    config: dict[str, Any] = field(default_factory=dict)
    client: dict[str, Any] = field(default_factory=dict)
    retry: dict[str, Any] = field(default_factory=dict)
    credentials: Callable[[], Any] | None = None
    secrets: tuple[str, ...] = ()


class _Options:
    """The options of a place, from which each is taken once; those that are left have no counterpart."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._left: dict[str, Any] = json.loads(place.options)
        for name in (CLIENT, *_IDLE.split()):
            self._left.pop(name, None)

    def take(self, *path: str) -> Any:
        """The value at a path of nested options, or None."""
        *folders, name = path
        inside: Any = self._left
        for folder in folders:
            inside = inside.get(folder) if isinstance(inside, dict) else None
        return inside.pop(name, None) if isinstance(inside, dict) else None

    def first(self, *paths: str) -> Any:
        """The first value that is given among options of the same meaning; all of them are taken."""
        found = [self.take(*path.split(".")) for path in paths]
        return next((value for value in found if value is not None), None)

    def refuse(self, names: str, why: str = "has no counterpart in obstore") -> RequestError:
        return RequestError(
            f'storage option {names} of {self.place} {why}: leave it out, or give "{CLIENT}": "fsspec" to go on with '
            "fsspec's own client"
        )

    def end(self) -> None:
        """Refuse what is left."""
        if left := _leaves(self._left):
            raise self.refuse(", ".join(sorted(left)))


def settings(place: Place) -> Settings:
    """What obstore is opened with for the URL and options of a place."""
    options, scheme = _Options(place), urlsplit(place.url).scheme
    made = _SCHEMES[scheme](place, options)
    options.end()
    made.secrets = tuple(secrets_in(json.loads(place.options)))
    return made


def _s3(place: Place, options: _Options) -> Settings:
    made = _bucket("S3Store", place)
    config, client = made.config, made.client
    env = os.environ.get
    secure = options.first("use_ssl", "client_kwargs.use_ssl")
    endpoint = options.first("client_kwargs.endpoint_url", "endpoint_url")
    endpoint = endpoint or env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL")
    if secure is False and not endpoint:
        raise options.refuse("use_ssl", "needs an endpoint_url that begins with http://")
    profile = options.first("profile", "client_kwargs.profile_name")
    region = options.first("client_kwargs.region_name", "config_kwargs.region_name")
    key = options.first("key", "username", "client_kwargs.aws_access_key_id")
    secret = options.first("secret", "password", "client_kwargs.aws_secret_access_key")
    token = options.first("token", "client_kwargs.aws_session_token")
    anonymous = options.take("anon")
    if options.first("config_kwargs.signature_version") not in (None, "s3v4", "v4"):
        raise options.refuse("config_kwargs.signature_version", "must be s3v4")
    if anonymous:
        config["skip_signature"] = True
    elif key or secret:
        if not (key and secret):
            raise options.refuse("key, secret", "belong together, and one of them is missing")
        made.credentials = fixed(key, secret, token)
    else:
        made.credentials, found_region = aws_credentials(place, profile)
        region = region or found_region
    config["region"] = region or env("AWS_REGION") or env("AWS_DEFAULT_REGION") or "us-east-1"
    if endpoint:
        config["endpoint"] = endpoint
        client["allow_http"] = endpoint.startswith("http://")
        # Over TLS the hash of what is sent protects nothing more, and costs as much as sending it.
        config["unsigned_payload"] = not client["allow_http"]
    else:
        config["unsigned_payload"] = True
    style = options.take("config_kwargs", "s3", "addressing_style")
    if style == "virtual" and endpoint:
        scheme, _, host = endpoint.partition("://")
        config["endpoint"] = f"{scheme}://{made.bucket}.{host}"
    elif style not in (None, "path", "virtual", "auto"):
        raise options.refuse("config_kwargs.s3.addressing_style", "must be path, virtual or auto")
    config["virtual_hosted_style_request"] = style == "virtual"
    if options.first("requester_pays", "s3_additional_kwargs.RequestPayer"):
        config["request_payer"] = True
    extra = {"ServerSideEncryption": "server_side_encryption", "SSEKMSKeyId": "sse_kms_key_id"}
    for name, ours in {**extra, "BucketKeyEnabled": "sse_bucket_key_enabled"}.items():
        if (value := options.take("s3_additional_kwargs", name)) is not None:
            config[ours] = value
    _verify(options, made, options.take("client_kwargs", "verify"), env("AWS_CA_BUNDLE"))
    _patience(
        options,
        made,
        connect=options.take("config_kwargs", "connect_timeout"),
        read=options.take("config_kwargs", "read_timeout"),
        attempts=options.take("config_kwargs", "retries", "max_attempts"),
        total=options.take("config_kwargs", "retries", "total_max_attempts"),
    )
    options.take("config_kwargs", "retries", "mode")  # all modes repeat, and wait longer each time
    for name in ("request_checksum_calculation", "response_checksum_validation"):  # obstore adds none
        if options.take("config_kwargs", name) not in (None, "when_required", "when_supported"):
            raise options.refuse(f"config_kwargs.{name}", "must be when_required or when_supported")
    if (most := options.take("config_kwargs", "max_pool_connections")) is not None:
        client["pool_max_idle_per_host"] = str(most)
    if (proxies := options.take("config_kwargs", "proxies")) is not None:
        client["proxy_url"] = proxies.get("https" if not client.get("allow_http") else "http")
    if (agent := options.take("config_kwargs", "user_agent")) is not None:
        client["user_agent"] = agent
    return made


def _gs(place: Place, options: _Options) -> Settings:
    made = _bucket("GCSStore", place)
    token = options.take("token")
    if token == "anon" or options.take("anon"):
        made.config["skip_signature"] = True
    elif isinstance(token, dict):
        made.config["service_account_key"] = json.dumps(token)
    elif isinstance(token, str) and Path(token).is_file():
        made.config["application_credentials"] = token
    elif token not in (None, "google_default", "cloud"):
        raise options.refuse("token", "must be anon, google_default, cloud, a file of credentials or its content")
    if endpoint := options.take("endpoint_url"):
        made.config["base_url"] = endpoint
        made.client["allow_http"] = endpoint.startswith("http://")
    access = options.take("access")
    if access not in (None, "full_control", "read_write", "read_only"):
        raise options.refuse("access", "must be full_control, read_write or read_only")
    _verify(options, made, options.take("session_kwargs", "verify"), None)
    _patience(options, made, read=options.take("requests_timeout"))
    return made


def _az(place: Place, options: _Options) -> Settings:
    made, config = _bucket("AzureStore", place), {}
    for part in filter(None, (options.take("connection_string") or "").split(";")):
        name, _, value = part.partition("=")
        known = {
            "AccountName": "account_name",
            "AccountKey": "account_key",
            "BlobEndpoint": "endpoint",
            "SharedAccessSignature": "sas_key",
        }
        if name in known:
            config[known[name]] = value
        elif name == "EndpointSuffix" and value != "core.windows.net":
            raise options.refuse("connection_string", f"has the EndpointSuffix {value}, which obstore does not take")
    for name, ours in {
        "account_name": "account_name",
        "account_key": "account_key",
        "sas_token": "sas_key",
        "tenant_id": "tenant_id",
        "client_id": "client_id",
        "client_secret": "client_secret",
        "account_host": "endpoint",
    }.items():
        if (value := options.take(name)) is not None:
            config[ours] = f"https://{value}" if name == "account_host" else value
    if options.take("anon"):
        config["skip_signature"] = True
    if "@" in (host := urlsplit(place.url).netloc):
        container, _, account = host.partition("@")
        made.bucket = container
        config.setdefault("account_name", account.partition(".")[0])
    if config.get("endpoint", "").startswith("http://"):
        made.client["allow_http"] = True
    made.config = config
    _patience(options, made, connect=options.take("connection_timeout"), read=options.take("read_timeout"))
    return made


_SCHEMES: dict[str, Callable[[Place, _Options], Settings]] = {"s3": _s3, "s3a": _s3, "gs": _gs, "gcs": _gs}
_SCHEMES |= {"az": _az, "abfs": _az, "abfss": _az}
SCHEMES = frozenset(_SCHEMES)


def _bucket(kind: str, place: Place) -> Settings:
    parts = urlsplit(place.url)
    if not parts.netloc:
        raise RequestError(f"{place} names no bucket: write {parts.scheme}://bucket/path")
    return Settings(kind, parts.netloc, place.url.split("://", 1)[1].partition("/")[2].strip("/"))


def _verify(options: _Options, made: Settings, verify: Any, bundle: str | None) -> None:
    """Which certificates are trusted: all, those of the system, or those in a file as well."""
    if verify is False:
        made.client["allow_invalid_certificates"] = True
    elif path := verify if isinstance(verify, str) else bundle:
        try:
            made.client["root_certificate"] = Path(path).read_text()
        except OSError as err:
            raise options.refuse(
                "verify", f"names a file of certificates that cannot be read ({err.strerror})"
            ) from err


def _patience(
    options: _Options, made: Settings, *, connect: Any = None, read: Any = None, attempts: Any = None, total: Any = None
) -> None:
    """Timeouts in seconds, and the number of repetitions."""
    for name, given, usual in (("connect_timeout", connect, CONNECT), ("read_timeout", read, READ)):
        value = usual if given is None else given
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise options.refuse(name, f"must be a number of seconds, got {value!r}")
        made.client[name] = f"{max(1, round(value * 1000))}ms"
    made.client["timeout"] = f"{WHOLE}s"
    if total is not None:
        attempts = total - 1
    if attempts is not None:
        made.retry["max_retries"] = attempts
        made.retry["retry_timeout"] = timedelta(minutes=3)


def secrets_in(given: Any, name: str = "") -> list[str]:
    """The texts among nested options that may be secrets: all but those of names that say otherwise."""
    if isinstance(given, dict):
        return [text for inner, value in given.items() for text in secrets_in(value, inner)]
    open_names = ("endpoint", "region", "profile", CLIENT, "project", "access", "account_name", "style", "mode")
    shown = any(part in name for part in open_names) and "access_key" not in name
    return [given] if isinstance(given, str) and len(given) > 3 and not shown else []


def _leaves(left: Mapping[str, Any], above: str = "") -> list[str]:
    """The full names of options that are left; empty folders are none."""
    found = []
    for name, value in left.items():
        if isinstance(value, dict):
            found += _leaves(value, f"{above}{name}.")
        elif value is not None:
            found.append(f"{above}{name}")
    return found
