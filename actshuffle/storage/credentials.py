"""Credentials for AWS: those that were given, or those that botocore finds (environment, files, profiles, SSO, roles).

obstore itself reads no files of credentials.  Where botocore is not installed, it is left with the environment and
with what the machine offers (roles of containers and instances).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from actshuffle.errors import RequestError, StorageError
from actshuffle.extras import need
from actshuffle.storage.place import CLIENT, Place

Provider = Callable[[], dict[str, Any]]
FRESH = timedelta(minutes=9)  # botocore renews what expires within 10 minutes


def fixed(key: str, secret: str, token: str | None) -> Provider:
    """Credentials that do not change.  A function, since obstore would add a token of the environment to plain keys."""
    return lambda: {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": None}


def aws_credentials(place: Place, profile: str | None) -> tuple[Provider | None, str | None]:
    """The credentials that this machine has for AWS, and the region of its configuration.

    None where obstore finds them by itself.
    """
    env = os.environ.get
    profile = profile or env("AWS_PROFILE")
    key, secret = env("AWS_ACCESS_KEY_ID"), env("AWS_SECRET_ACCESS_KEY")
    if profile is None and key and secret:
        return fixed(key, secret, env("AWS_SESSION_TOKEN")), None
    if importlib.util.find_spec("botocore") is None:
        if profile is not None or _shared_file().exists():
            raise RequestError(
                f"the credentials for {place} lie in a file or profile of AWS, and botocore, which reads it, is not "
                'installed: pip install botocore, or give "key" and "secret" as storage options'
            )
        return None, None
    session = need("botocore.session", "remote").Session(profile=profile)
    try:
        found, region = session.get_credentials(), session.get_config_variable("region")
    except Exception as err:  # an unknown profile, a file that cannot be read
        raise RequestError(f"no credentials for {place}: {err}") from err
    if found is None:
        raise StorageError(
            f"no credentials for {place}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or give "
            f'"key" and "secret" as storage options, "anon": true for a public bucket, or "profile" ("{CLIENT}": '
            '"fsspec" uses those of fsspec)'
        )

    def provide() -> dict[str, Any]:
        now = found.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + FRESH,
        }

    return provide, region


def _shared_file() -> Path:
    return Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
