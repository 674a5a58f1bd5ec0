"""The S3 server checks what S3 checks, and keeps to itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from botocore.exceptions import ClientError
from kit import S3Server, make_client

if TYPE_CHECKING:
    from collections.abc import Callable


def test_a_put_only_user_can_put_below_the_prefix_and_do_nothing_else(
    s3: S3Server, bucket: str
) -> None:
    """The program's key stores below its prefix; it does not read, list or delete."""
    client = s3.client(s3.put_only_user(bucket, "alice/"))
    client.put_object(Bucket=bucket, Key="alice/a", Body=b"data", Metadata={"sha256": "00"})
    forbidden: list[Callable[[], object]] = [
        lambda: client.put_object(Bucket=bucket, Key="bob/a", Body=b"data"),
        lambda: client.get_object(Bucket=bucket, Key="alice/a"),
        lambda: client.head_object(Bucket=bucket, Key="alice/a"),
        lambda: client.list_objects_v2(Bucket=bucket, Prefix="alice/"),
        lambda: client.delete_object(Bucket=bucket, Key="alice/a"),
    ]
    for call in forbidden:
        with pytest.raises(ClientError, match=r"AccessDenied|403"):
            call()
    stored = s3.objects(bucket)["alice/a"]
    assert (stored.data, stored.metadata) == (b"data", {"sha256": "00"})


def test_the_server_listens_on_the_loopback_address_alone(s3: S3Server) -> None:
    """The server has one listening socket, on 127.0.0.1."""
    process = Path(f"/proc/{s3.pid}")
    own = {str(entry.readlink()) for entry in (process / "fd").iterdir() if entry.is_symlink()}
    table = (process / "net/tcp").read_text() + (process / "net/tcp6").read_text()
    rows = [line.split() for line in table.splitlines()]
    listening = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]
    assert listening == [f"0100007F:{s3.port:04X}"]


def test_a_server_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    """A server that dies at its start is reported at once, with what it said."""
    server = S3Server(tmp_path / "s3", tls=True)
    (tmp_path / "s3" / "cert.pem").write_text("no key")
    with pytest.raises(RuntimeError, match="Traceback"):
        server.start()


def test_the_clients_ignore_the_settings_of_the_caller(
    s3_http: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Proxies, profiles and endpoints in the environment do not reach the kit's clients."""
    bucket = s3_http.create_bucket()
    user = s3_http.put_only_user(bucket)
    (tmp_path / "config").write_text("[default]\nrequest_checksum_calculation = nonsense\n")
    for name in ("HTTP_PROXY", "http_proxy", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    client = make_client("s3", s3_http.endpoint, user)
    client.put_object(Bucket=bucket, Key="a", Body=b"")
    client.close()
    assert os.environ["AWS_PROFILE"] == "nobody"
