"""The S3 server checks what S3 checks, and comes back as it was."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from kit import PATIENCE_SECONDS, Credentials, S3Server, make_client

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(params=["http", "https"])
def scheme(request: pytest.FixtureRequest) -> str:
    """Return http and then https, since both servers and both kinds of line are used."""
    scheme: str = request.param
    return scheme


def test_a_wrong_signature_or_an_unknown_key_is_refused(s3: S3Server, bucket: str) -> None:
    """Whoever does not know the secret can store nothing."""
    user = s3.put_only_user(bucket)
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        s3.client(Credentials(user.access_key, "wrong")).put_object(
            Bucket=bucket, Key="a", Body=b""
        )
    with pytest.raises(ClientError, match="InvalidAccessKeyId"):
        s3.client(Credentials("AKIAUNKNOWN", "wrong")).put_object(Bucket=bucket, Key="a", Body=b"")
    assert s3.objects(bucket) == {}


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


def test_the_other_users_can_do_what_their_names_say(s3: S3Server, bucket: str) -> None:
    """A reader lists and gets, a reader and writer also puts, and neither deletes."""
    writer = s3.client(s3.read_write_user(bucket))
    reader = s3.client(s3.reader_user(bucket))
    writer.put_object(Bucket=bucket, Key="a", Body=b"data")
    for client in (reader, writer):
        assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 1
        with closing(client.get_object(Bucket=bucket, Key="a")["Body"]) as body:
            assert body.read() == b"data"
        with pytest.raises(ClientError):
            client.delete_object(Bucket=bucket, Key="a")
    with pytest.raises(ClientError):
        reader.put_object(Bucket=bucket, Key="b", Body=b"data")


def test_a_server_comes_back_with_its_objects_buckets_and_users(own_s3: S3Server) -> None:
    """After an orderly end the server is at the same port with all that it held."""
    bucket, empty = own_s3.create_bucket(), own_s3.create_bucket()
    user = own_s3.put_only_user(bucket)
    client = make_client("s3", own_s3.endpoint, user)
    client.put_object(Bucket=bucket, Key="a", Body=b"data", Metadata={"x": "y"})
    own_s3.stop()
    with pytest.raises(EndpointConnectionError):
        client.put_object(Bucket=bucket, Key="b", Body=b"data")
    own_s3.start()
    client.put_object(Bucket=bucket, Key="c", Body=b"data")
    with pytest.raises(ClientError):
        client.list_objects_v2(Bucket=bucket)
    stored = own_s3.objects(bucket)
    assert {key: stored[key].metadata for key in stored} == {"a": {"x": "y"}, "c": {}}
    assert own_s3.objects(empty) == {}
    client.close()


def test_a_suspended_server_answers_when_it_is_resumed(own_s3: S3Server) -> None:
    """A request to a suspended server hangs, and is answered afterwards."""
    bucket = own_s3.create_bucket()
    own_s3.suspend()
    put = partial(own_s3.admin.put_object, Bucket=bucket, Key="a", Body=b"data")
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(put)
        with pytest.raises(TimeoutError):
            answer.result(timeout=0.1)
        own_s3.resume()
        assert answer.result(PATIENCE_SECONDS)["ETag"]


def test_the_server_listens_on_the_loopback_address_alone(s3: S3Server) -> None:
    """The server has one listening socket, on 127.0.0.1."""
    inodes = {
        str(entry.readlink())
        for entry in Path(f"/proc/{s3.pid}/fd").iterdir()
        if entry.is_symlink()
    }
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{s3.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                listening.append(fields[1])
    assert listening == [f"0100007F:{s3.port:04X}"]


def test_a_server_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    """A server that dies at its start is reported at once, with what it said."""
    server = S3Server(tmp_path / "s3", tls=True)
    (tmp_path / "s3" / "key.pem").write_text("no key")
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
