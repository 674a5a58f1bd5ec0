"""The program's settings, for a server of the kit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .invariant import normalised_prefix
from .s3_server import REGION, Credentials

if TYPE_CHECKING:
    from pathlib import Path

    from .lnd import Lnd
    from .s3_server import S3Server

MADE_UP = Credentials("AKIDENVIRONMENT", "t0p-s3cr3t/t0p-s3cr3t")  # for those who do not look


def reader_settings(
    server: S3Server, bucket: str, prefix: str, user: Credentials
) -> dict[str, str]:
    """Return the bucket's settings and nothing else, as on a machine that never saw the node."""
    tls = {"AWS_CA_BUNDLE": str(server.ca_file)} if server.ca_file else {}
    return tls | _bucket_settings(server.endpoint, bucket, prefix, user)


def _bucket_settings(endpoint: str, bucket: str, prefix: str, user: Credentials) -> dict[str, str]:
    return {
        "S3_BUCKET_NAME": bucket,
        "S3_BACKUP_PREFIX": prefix,
        "AWS_ACCESS_KEY_ID": user.access_key,
        "AWS_SECRET_ACCESS_KEY": user.secret_key,
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_REGION": REGION,
    }


def settings_at(
    endpoint: str,
    lnd: Lnd,
    staging: Path,
    *,
    bucket: str = "some-bucket",
    prefix: str = "alice/",
    user: Credentials = MADE_UP,
) -> dict[str, str]:
    """Return the program's settings for whatever answers at the endpoint."""
    node = {"MONITOR_FILE_PATH": str(lnd.path), "BACKUP_DIRECTORY": str(staging)}
    return node | _bucket_settings(endpoint, bucket, prefix, user)


def settings_for(
    server: S3Server,
    bucket: str,
    prefix: str,
    lnd: Lnd,
    staging: Path,
    *,
    endpoint: str | None = None,
) -> dict[str, str]:
    """Return the program's settings, with a new key that may put below the prefix alone."""
    user = server.put_only_user(bucket, normalised_prefix(prefix))
    where = endpoint or server.endpoint
    return reader_settings(server, bucket, prefix, user) | settings_at(
        where, lnd, staging, bucket=bucket, prefix=prefix, user=user
    )
