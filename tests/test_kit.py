"""The test kit holds what it promises, so that a green test of the program means something."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import errno
import hashlib
import os
import queue
import shutil
import signal
import socket
import ssl
import stat
import struct
import threading
import time
from contextlib import closing, contextmanager, suppress
from http import HTTPStatus
from http.client import HTTPSConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
)
from kit import (
    PATIENCE_SECONDS,
    Answer,
    Credentials,
    FakeS3,
    FaultProxy,
    Lnd,
    Mode,
    NotifySocket,
    S3Server,
    Script,
    Written,
    assert_nothing_lost,
    channel_backup,
    make_client,
    run_script,
)
from kit import fake_s3 as answers
from kit import script as script_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(params=["http", "https"])
def scheme(request: pytest.FixtureRequest) -> str:
    """Return http and then https, since both servers and both kinds of line are used."""
    scheme: str = request.param
    return scheme


# --- LND ---

EVENTS = {
    0x1: "ACCESS",
    0x2: "MODIFY",
    0x4: "ATTRIB",
    0x8: "CLOSE_WRITE",
    0x10: "CLOSE_NOWRITE",
    0x20: "OPEN",
    0x40: "MOVED_FROM",
    0x80: "MOVED_TO",
    0x100: "CREATE",
    0x200: "DELETE",
}
IN_ISDIR = 0x40000000
NAMES = {
    "channel.backup": "main",
    "temp-dont-use.backup": "temp",
    "chan-backup-archives": "archives",
}

READ_OLD = ["OPEN main", "ACCESS main", "CLOSE_NOWRITE main"]
WRITE_TEMP = ["CREATE temp", "OPEN temp", "MODIFY temp", "CLOSE_WRITE temp"]
RENAME = ["MOVED_FROM temp", "MOVED_TO main"]


@contextmanager
def watched(directory: Path) -> Iterator[Callable[[], list[str]]]:
    """Watch a directory with the kernel's inotify, and yield what reads the events up to now."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert libc.inotify_add_watch(descriptor, os.fsencode(directory), sum(EVENTS)) > 0

    def events() -> list[str]:
        data, found = os.read(descriptor, 65536), []
        while data:
            _, mask, _, length = struct.unpack_from("iIII", data)
            name = NAMES.get(data[16 : 16 + length].rstrip(b"\0").decode(), "?")
            if name == "archives" and not mask & 0x100:
                name = ""
            if name:
                found.append(f"{EVENTS[mask & ~IN_ISDIR]} {name}")
            data = data[16 + length :]
        return found

    try:
        yield events
    finally:
        os.close(descriptor)


def test_the_first_write_has_the_events_of_lnd(tmp_path: Path) -> None:
    """The first write ever leaves the events that were measured with LND."""
    lnd = Lnd(tmp_path)
    with watched(tmp_path) as events:
        lnd.write()
        assert events() == [*WRITE_TEMP, *RENAME]


def test_an_update_without_archive_has_the_events_of_lnd(tmp_path: Path) -> None:
    """An update first reads the old file, and then renames a new one over it."""
    lnd = Lnd(tmp_path, archive=False)
    lnd.write()
    with watched(tmp_path) as events:
        lnd.write()
        assert events() == [*READ_OLD, *WRITE_TEMP, *RENAME]


def test_an_update_with_archive_has_the_events_of_lnd(tmp_path: Path) -> None:
    """An update with archive reads the old file twice, the second time between the new file and the
    rename.
    """
    lnd = Lnd(tmp_path)
    lnd.write()
    with watched(tmp_path) as events:
        lnd.write()
        assert events() == [
            *READ_OLD,
            *WRITE_TEMP,
            "OPEN main",
            "CREATE archives",
            *READ_OLD[1:],
            *RENAME,
        ]
        lnd.write()
        assert events() == [*READ_OLD, *WRITE_TEMP, *READ_OLD, *RENAME]


def test_a_left_over_temporary_file_is_deleted_first(tmp_path: Path) -> None:
    """A temporary file that a crash left over is removed before the new one is made."""
    (tmp_path / "temp-dont-use.backup").write_bytes(b"half")
    lnd = Lnd(tmp_path)
    with watched(tmp_path) as events:
        lnd.write()
        assert events() == ["DELETE temp", *WRITE_TEMP, *RENAME]


def test_an_export_onto_the_file_has_the_events_of_lncli(tmp_path: Path) -> None:
    """An export onto the same path opens, truncates and writes the file itself."""
    lnd = Lnd(tmp_path)
    lnd.write()
    with watched(tmp_path) as events:
        lnd.write_in_place()
        assert events() == ["OPEN main", "MODIFY main", "CLOSE_WRITE main"]
    assert lnd.path.read_bytes() == lnd.written[1].data


def test_backups_have_real_sizes_and_never_repeat() -> None:
    """A backup has the size of a real one, and no two are the same."""
    assert [len(channel_backup(channels)) for channels in (0, 1, 10)] == [45, 718, 6775]
    assert channel_backup(0) != channel_backup(0)


def test_versions_are_recorded_in_order(tmp_path: Path) -> None:
    """Every version is recorded with its bytes, its hash and rising times; a file merely placed is
    not.
    """
    lnd = Lnd(tmp_path)
    first, second = lnd.write(channels=3), lnd.write(data=b"x" * 45)
    lnd.place(b"odd")
    assert lnd.written == [first, second]
    assert (first.channels, second.channels) == (3, 0)
    assert first.sha256 == hashlib.sha256(first.data).hexdigest()
    assert first.renamed_at < second.renamed_at
    assert first.wall < second.wall
    assert lnd.path.read_bytes() == b"odd"
    assert len(list((tmp_path / "chan-backup-archives").iterdir())) in (1, 2)


def test_the_gap_lies_between_read_and_rename(tmp_path: Path) -> None:
    """The old version stays in place for the whole gap after LND has read it."""
    lnd = Lnd(tmp_path, read_gap_seconds=0.05)
    lnd.write()
    began = time.monotonic()
    assert lnd.write().renamed_at - began >= 0.05


def test_reading_leaves_the_fingerprint_and_any_change_alters_it(tmp_path: Path) -> None:
    """Reading does not show in the fingerprint, and each way of touching the directory does."""
    lnd = Lnd(tmp_path)
    lnd.leave_decoys()
    lnd.write()
    before = lnd.fingerprint()
    assert {"admin.macaroon", "wallet.db", "channel.backup", "."} == set(before)
    lnd.path.read_bytes()
    assert lnd.fingerprint() == before
    touches: list[Callable[[], None]] = [
        lnd.path.touch,
        lambda: lnd.path.chmod(0o600),
        (tmp_path / "new").touch,
    ]
    for touch in touches:
        touch()
        assert lnd.fingerprint() != before
        before = lnd.fingerprint()


# --- S3 ---


def code(error: pytest.ExceptionInfo[Any]) -> str:
    """Return the code of an error that S3 answered with."""
    return str(error.value.response["Error"]["Code"])


def test_a_wrong_signature_or_an_unknown_key_is_refused(s3: S3Server, bucket: str) -> None:
    """Whoever does not know the secret can store nothing."""
    user = s3.put_only_user(bucket)
    with pytest.raises(ClientError) as error:
        s3.client(Credentials(user.access_key, "wrong")).put_object(
            Bucket=bucket, Key="a", Body=b""
        )
    assert code(error) == "SignatureDoesNotMatch"
    with pytest.raises(ClientError) as error:
        s3.client(Credentials("AKIAUNKNOWN", "wrong")).put_object(Bucket=bucket, Key="a", Body=b"")
    assert code(error) == "InvalidAccessKeyId"
    assert s3.objects(bucket) == {}


def test_a_put_only_user_can_put_below_the_prefix_and_do_nothing_else(
    s3: S3Server, bucket: str
) -> None:
    """The program's key stores below its prefix; it neither reads, lists nor deletes, nor stores
    elsewhere.
    """
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
        with pytest.raises(ClientError) as error:
            call()
        assert code(error) in ("AccessDenied", "403")
    stored = s3.objects(bucket)["alice/a"]
    assert (stored.data, stored.metadata) == (b"data", {"sha256": "00"})
    assert stored.etag == f'"{hashlib.md5(b"data", usedforsecurity=False).hexdigest()}"'


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


def test_a_wrong_checksum_is_refused(s3: S3Server, bucket: str) -> None:
    """Bytes that do not match their Content-MD5 are refused, and not kept."""
    client = s3.client(s3.put_only_user(bucket))
    wrong = base64.b64encode(hashlib.md5(b"other", usedforsecurity=False).digest()).decode()
    with pytest.raises(ClientError) as error:
        client.put_object(Bucket=bucket, Key="a", Body=b"data", ContentMD5=wrong)
    assert code(error) == "BadDigest"
    assert s3.objects(bucket) == {}


def test_the_objects_are_read_over_several_pages(s3_http: S3Server) -> None:
    """All objects below the prefix are returned, also when there are more than a page of them
    holds.
    """
    bucket = s3_http.create_bucket()
    paginator = s3_http.admin.get_paginator
    try:
        s3_http.admin.get_paginator = lambda name: _SmallPages(paginator(name))
        for number in range(5):
            s3_http.admin.put_object(Bucket=bucket, Key=f"a/{number}", Body=b"")
        s3_http.admin.put_object(Bucket=bucket, Key="b", Body=b"")
        assert list(s3_http.objects(bucket, "a/")) == [f"a/{number}" for number in range(5)]
    finally:
        del s3_http.admin.get_paginator


class _SmallPages:
    """A paginator whose pages hold two entries."""

    def __init__(self, paginator: Any) -> None:  # noqa: ANN401 - botocore is not typed
        self.paginator = paginator

    def paginate(self, **kwargs: object) -> Any:  # noqa: ANN401 - as above
        """Return the pages."""
        return self.paginator.paginate(**kwargs, PaginationConfig={"PageSize": 2})


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_server_comes_back_with_its_objects_buckets_and_users(own_s3: S3Server, how: str) -> None:
    """After an orderly end and after a crash the server is at the same port with all that it
    held.
    """
    bucket, empty = own_s3.create_bucket(), own_s3.create_bucket()
    user = own_s3.put_only_user(bucket)
    client = make_client("s3", own_s3.endpoint, user)
    client.put_object(Bucket=bucket, Key="a", Body=b"data", Metadata={"x": "y"})
    getattr(own_s3, how)()
    with pytest.raises(EndpointConnectionError):
        client.put_object(Bucket=bucket, Key="b", Body=b"data")
    own_s3.start()
    client.put_object(Bucket=bucket, Key="c", Body=b"data")
    with pytest.raises(ClientError):
        client.list_objects_v2(Bucket=bucket)
    assert {key: stored.metadata for key, stored in own_s3.objects(bucket).items()} == {
        "a": {"x": "y"},
        "c": {},
    }
    assert own_s3.objects(empty) == {}
    client.close()


def test_a_suspended_server_answers_when_it_is_resumed(own_s3: S3Server) -> None:
    """A request to a suspended server hangs, and is answered afterwards."""
    bucket = own_s3.create_bucket()
    own_s3.suspend()
    done: queue.SimpleQueue[object] = queue.SimpleQueue()
    thread = threading.Thread(
        target=lambda: done.put(
            own_s3.admin.put_object(Bucket=bucket, Key="a", Body=b"data")["ETag"]
        )
    )
    thread.start()
    with pytest.raises(queue.Empty):
        done.get(timeout=0.1)
    own_s3.resume()
    assert done.get(timeout=PATIENCE_SECONDS)
    thread.join()


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


# --- the proxy ---


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    """Return a proxy in front of the session's server."""
    with FaultProxy(s3.host, s3.port) as running:
        yield running


@pytest.fixture
def put(s3: S3Server, bucket: str, proxy: FaultProxy) -> Iterator[Callable[[bytes], Any]]:
    """Return what puts an object through the proxy as the program does: one attempt, no Expect,
    with MD5.
    """
    client = make_client("s3", proxy.endpoint(s3.scheme), s3.put_only_user(bucket), s3.ca_file)
    client.meta.events.register("before-sign.s3.PutObject", _without_expect)

    def put_object(body: bytes) -> Any:  # noqa: ANN401 - botocore is not typed
        digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        return client.put_object(Bucket=bucket, Key="a", Body=body, ContentMD5=digest)

    yield put_object
    client.close()


def _without_expect(request: Any, **_: object) -> None:  # noqa: ANN401 - botocore is not typed
    """Drop the header that costs a round trip."""
    if "Expect" in request.headers:
        del request.headers["Expect"]


@pytest.mark.parametrize("size", [300, 100_000])
def test_round_trips_are_counted(
    s3: S3Server, proxy: FaultProxy, put: Callable[[bytes], Any], size: int
) -> None:
    """A cold put takes two round trips over http and three over https, a warm one takes one, of any
    size.
    """
    cold = {"http": 2, "https": 3}[s3.scheme]
    modes: list[tuple[Mode, float, float]] = [("pass", 0.0, 0.0), ("latency", 0.03, 0.02)]
    for mode, up, down in modes:
        proxy.set(mode, cut=True, up=up, down=down)
        for expected, connections in ((cold, 1), (1, 0)):
            proxy.reset_counts()
            began = time.monotonic()
            put(os.urandom(size))
            took = time.monotonic() - began
            assert (proxy.counts.round_trips, proxy.counts.connections) == (expected, connections)
            assert took >= expected * (up + down)
    assert proxy.counts.bytes_up > size
    assert proxy.counts.bytes_down > 0


def test_latency_delays_without_slowing_down() -> None:
    """Many pieces written one after the other arrive together after one delay, not after one delay
    each.
    """
    with FaultProxy(*_echo_address()) as proxy:
        proxy.set("latency", up=0.05, down=0.05)
        with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            began = time.monotonic()
            for number in range(200):
                connection.sendall(bytes([number]))
            received = b""
            while len(received) < 200:
                received += connection.recv(1024)
            took = time.monotonic() - began
    assert received == bytes(range(200))
    assert 0.2 <= took < 200 * 0.05


def _echo_address() -> tuple[str, int]:
    """Start a server for one connection that sends everything back, and return its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def echo() -> None:
        with listener, listener.accept()[0] as connection:
            while data := connection.recv(1024):
                connection.sendall(data)

    threading.Thread(target=echo, daemon=True).start()
    return "127.0.0.1", listener.getsockname()[1]


def test_refused_and_reset_connections_fail_at_once_and_recover(
    proxy: FaultProxy, put: Callable[[bytes], Any]
) -> None:
    """A refused connection is not accepted at all, a reset one is, and after either the same port
    works again.
    """
    proxy.set("refuse")
    with pytest.raises(EndpointConnectionError):
        put(b"data")
    assert proxy.counts.connections == 0
    with socket.socket() as connection:
        assert connection.connect_ex(("127.0.0.1", proxy.port)) == errno.ECONNREFUSED
    proxy.set("rst")
    with pytest.raises((ConnectionClosedError, EndpointConnectionError)):
        put(b"data")
    assert proxy.counts.connections == 1
    proxy.set("pass")
    put(b"data")


def test_a_black_hole_accepts_and_says_nothing(proxy: FaultProxy) -> None:
    """A black hole takes bytes and gives none."""
    proxy.set("blackhole")
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=0.1) as connection:
        connection.sendall(b"PUT / HTTP/1.1\r\n\r\n")
        assert proxy.wait_until(lambda counts: counts.bytes_up == 18).bytes_down == 0
        with pytest.raises(TimeoutError):
            connection.recv(1)


def test_open_connections_can_be_cut_and_frozen(
    s3: S3Server, proxy: FaultProxy, put: Callable[[bytes], Any]
) -> None:
    """A cut connection fails at its next use or is opened anew, a frozen one takes bytes and never
    answers.
    """
    put(b"data")
    proxy.cut_all()
    put(b"data")
    assert proxy.counts.connections == 2
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=0.1) as connection:
        connection.sendall(b"G")
        proxy.wait_until(lambda counts: counts.connections == 3)
        proxy.freeze_all()
        connection.sendall(b"ET / HTTP/1.0\r\n\r\n")
        with pytest.raises(TimeoutError):
            connection.recv(1)
    assert s3.port != proxy.port


@pytest.mark.parametrize(
    ("mode", "end"), [("rst_after_up", ConnectionResetError), ("stall_after_up", TimeoutError)]
)
def test_a_reset_or_stall_comes_after_so_many_bytes(mode: Mode, end: type[OSError]) -> None:
    """The server gets exactly the first bytes, and then a reset, or nothing at all."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        FaultProxy(*listener.getsockname()) as proxy,
    ):
        proxy.set(mode, n=10)
        with (
            socket.create_connection(("127.0.0.1", proxy.port)) as client,
            listener.accept()[0] as server,
        ):
            client.sendall(b"0123456")
            assert server.recv(7, socket.MSG_WAITALL) == b"0123456"
            client.sendall(b"789abc")
            assert server.recv(3, socket.MSG_WAITALL) == b"789"
            server.settimeout(0.1)
            with pytest.raises(end):
                server.recv(1)


def test_a_swallowed_response_leaves_the_object_stored(
    s3: S3Server, bucket: str, proxy: FaultProxy, put: Callable[[bytes], Any]
) -> None:
    """The server stores the object, and the client never hears of it, over http and over https."""
    proxy.set("swallow_response")
    failed: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def attempt() -> None:
        try:
            put(b"data")
        except BotoCoreError as error:
            failed.put(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    proxy.wait_until(lambda counts: counts.swallowed > 0)
    assert s3.objects(bucket)["a"].data == b"data"
    assert failed.empty()
    proxy.cut_all()
    assert isinstance(failed.get(timeout=PATIENCE_SECONDS), ConnectionClosedError)
    thread.join()


def test_a_throttled_line_is_slow(proxy: FaultProxy, put: Callable[[bytes], Any]) -> None:
    """Bytes take as long as the line's rate says."""
    proxy.set("throttle", bps=100_000)
    began = time.monotonic()
    put(b"x" * 20_000)
    assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize("scheme", ["http"])
def test_a_corrupted_body_is_refused(
    s3: S3Server, bucket: str, proxy: FaultProxy, put: Callable[[bytes], Any]
) -> None:
    """A bit that flips on the way makes S3 refuse the object; the line is good again afterwards."""
    proxy.set("corrupt")
    for _ in range(2):
        with pytest.raises(ClientError) as error:
            put(os.urandom(100_000))
        assert code(error) == "BadDigest"
    assert s3.objects(bucket) == {}
    proxy.set("pass", cut=True)
    put(b"data")


@pytest.mark.parametrize("scheme", ["http"])
@pytest.mark.parametrize("etag", [0, 1])
def test_a_portal_answers_with_a_page(
    s3: S3Server, bucket: str, proxy: FaultProxy, put: Callable[[bytes], Any], etag: int
) -> None:
    """A captive portal answers every put with 200 and a page, and S3 never sees it."""
    proxy.set("portal", etag=etag)
    for _ in range(2):
        assert ("ETag" in put(b"data")) == bool(etag)
    assert proxy.counts.connections == 1
    assert s3.objects(bucket) == {}


def test_an_unreachable_server_resets_the_client() -> None:
    """Where the proxy cannot reach the server, the client is cut off."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with (
        FaultProxy(*address) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE_SECONDS) as connection,
    ):
        connection.sendall(b"G")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_a_connection_of_the_last_moment_leaves_nothing_open() -> None:
    """A client that the proxy sees when it is about to end is cut off, and nothing is left
    undone.
    """
    busy, free = threading.Event(), threading.Event()

    def be_busy() -> None:
        busy.set()
        free.wait()

    with socket.socket() as client:
        with FaultProxy("127.0.0.1", 1) as proxy:
            proxy.loop.call_soon_threadsafe(be_busy)  # it sees the client and the end at once
            busy.wait()
            client.connect(("127.0.0.1", proxy.port))
            threading.Timer(0.1, free.set).start()
        assert not asyncio.all_tasks(proxy.loop)  # what it left undone
        client.settimeout(PATIENCE_SECONDS)
        with suppress(ConnectionResetError):
            assert client.recv(1) == b""


# --- the scripted S3 ---


@contextmanager
def fake_client(fake: FakeS3) -> Iterator[Any]:
    """Yield a client of the scripted server."""
    client = make_client("s3", fake.endpoint, Credentials("key", "secret"))
    yield client
    client.close()


@pytest.mark.parametrize(
    "answer",
    [
        answers.SLOW_DOWN,
        answers.INTERNAL_ERROR,
        answers.ACCESS_DENIED,
        answers.EXPIRED_TOKEN,
        answers.CLOCK_SKEW,
        answers.UNKNOWN_KEY,
        answers.WRONG_SIGNATURE,
        answers.NO_SUCH_BUCKET,
    ],
    ids=lambda answer: answer.code,
)
def test_a_scripted_error_comes_once(answer: Answer) -> None:
    """The scripted error is what the client sees, and the next put succeeds; both are recorded."""
    with FakeS3(answer) as fake, fake_client(fake) as client:
        with pytest.raises(ClientError) as error:
            client.put_object(Bucket="bucket", Key="a", Body=b"data")
        assert code(error) == answer.code
        assert client.put_object(Bucket="bucket", Key="a", Body=b"data")["ETag"]
        first, second = fake.wait_for_requests(2)
        assert (first.method, first.path, first.body) == ("PUT", "/bucket/a", b"data")
        assert second.headers["content-length"] == "4"


def test_scripted_oddities() -> None:
    """Success without ETag, a portal's page, a redirect and a dropped connection are as they are
    named.
    """
    with FakeS3(answers.NO_ETAG, answers.PORTAL_WITH_ETAG) as fake, fake_client(fake) as client:
        assert "ETag" not in client.put_object(Bucket="bucket", Key="a", Body=b"data")
        portal = client.put_object(Bucket="bucket", Key="a", Body=b"data")
        assert portal["ETag"]
        assert portal["ResponseMetadata"]["HTTPHeaders"]["content-length"] == str(len(answers.HTML))
        fake.script(answers.DROPPED)
        with pytest.raises(ConnectionClosedError):
            client.put_object(Bucket="bucket", Key="a", Body=b"data")
        fake.set_default(answers.WRONG_REGION)
        with pytest.raises(ClientError) as error:
            client.put_object(Bucket="bucket", Key="a", Body=b"data")
        assert code(error) == "PermanentRedirect"
        with pytest.raises(ClientError) as error:
            client.list_objects_v2(Bucket="bucket")
        assert code(error) == "AccessDenied"


def test_answers_can_be_held_back() -> None:
    """A held answer comes when it is released, and leaving the block releases and cuts
    everything.
    """
    with FakeS3(hold=True) as fake, fake_client(fake) as client:
        done: queue.SimpleQueue[object] = queue.SimpleQueue()
        thread = threading.Thread(
            target=lambda: done.put(client.put_object(Bucket="bucket", Key="a", Body=b""))
        )
        thread.start()
        fake.wait_for_requests(1)
        assert done.empty()
        fake.release()
        assert done.get(timeout=PATIENCE_SECONDS)
        thread.join()
        fake.hold()
        with socket.create_connection(("127.0.0.1", fake.port)) as connection:
            connection.sendall(b"PUT /a HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
            fake.wait_for_requests(2)
    with pytest.raises(AssertionError, match="2 of 3 requests"):
        fake.wait_for_requests(3, timeout=0)


def test_a_client_that_is_gone_before_it_is_accepted_leaves_nothing_open() -> None:
    """A connection that was reset before the server took it is closed, and the next one is
    served.
    """
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    fake = FakeS3(tls=context)
    with socket.create_connection(("127.0.0.1", fake.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with fake, closing(HTTPSConnection("127.0.0.1", fake.port, context=trusting)) as client:
        client.request("PUT", "/bucket/a")
        assert client.getresponse().status == HTTPStatus.OK


# --- running the program ---

PROGRAM = """
import json, os, signal, socket, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
print(json.dumps(dict(os.environ)), flush=True)
print(" ".join(sys.argv[1:]), sys.stdin.read(), flush=True)
for number in range(3):
    print("line", number, file=sys.stderr, flush=True)
if "NOTIFY_SOCKET" in os.environ:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"STATUS=up\\nREADY=1", os.environ["NOTIFY_SOCKET"])
if "stay" in sys.argv:
    signal.pause()
"""


@pytest.fixture
def _program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a small program in the place of the real one."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(script_module, "SCRIPT", tmp_path / "program.py")


@pytest.mark.usefixtures("_program")
def test_the_program_runs_with_a_scrubbed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program sees the given settings, the bare minimum, and nothing else of the caller's."""
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    monkeypatch.setenv("COVERAGE_PROCESS_START", "")
    result = run_script({"A": "b"}, "one", "two")
    assert result.returncode == 0
    assert result.stderr.splitlines() == ["line 0", "line 1", "line 2"]
    environment, arguments = result.stdout.splitlines()
    assert arguments == "one two "
    assert '"A": "b"' in environment
    assert "AWS_EC2_METADATA_DISABLED" in environment
    assert "AWS_PROFILE" not in environment
    assert os.environ["HOME"] not in environment.split('"HOME": ')[1].split(",")[0]


def test_all_that_was_written_is_read_however_slow_the_reader_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was written, or sent to systemd, before one asks is in the answer, though the thread has
    read nothing.
    """
    woken, follow = threading.Event(), script_module._Text._follow  # noqa: SLF001 - what the thread does

    def wait_and_follow(text: script_module._Text) -> None:
        woken.wait()
        follow(text)

    monkeypatch.setattr(script_module._Text, "_follow", wait_and_follow)  # noqa: SLF001
    out, into = os.pipe()
    with NotifySocket() as notify, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
        log = script_module._Text("the log", out)  # noqa: SLF001
        for number in range(5):
            service.sendto(b"%d" % number, notify.path)
            os.write(into, b"%d\nbegin" % number)
        try:
            assert notify.messages == ["0", "1", "2", "3", "4"]
            assert str(log) == "0\nbegin1\nbegin2\nbegin3\nbegin4\n"
            os.write(into, "\u00fc\n".encode())
            assert log.wait_for("^begin\u00fc$", timeout=0, count=1)
        finally:
            woken.set()
            os.close(into)
            log.join()
            os.close(out)


@pytest.mark.usefixtures("_program")
def test_the_log_of_a_running_program_can_be_waited_for() -> None:
    """What the program writes and tells systemd can be waited for while it runs, and its end as
    well.
    """
    with NotifySocket() as notify, Script({"NOTIFY_SOCKET": notify.path}, "stay") as script:
        assert script.wait_for_log(r"^line (\d)$", count=3)[1] == "2"
        notify.wait_for("^READY=1$")
        assert notify.messages == ["STATUS=up\nREADY=1"]
        assert script.returncode is None
        with pytest.raises(AssertionError, match=r"line 0\nline 1\nline 2"):
            script.wait_for_log("never", timeout=0.01)
        script.signal(signal.SIGTERM)
        assert script.wait() == script.returncode == 3
        with pytest.raises(AssertionError, match="until it ended"):
            script.wait_for_log("never")
        assert script.stdout.endswith("stay \n")


@pytest.mark.usefixtures("_program")
def test_a_program_left_running_is_killed() -> None:
    """Leaving the block kills the program and removes its home."""
    with Script({}, "stay") as script:
        script.wait_for_log("line 2")
        home = Path(f"/proc/{script.pid}/cwd").readlink()
        assert home.is_dir()
    assert script.returncode == -signal.SIGKILL
    assert not home.exists()


# --- the invariant ---


class Kept:
    """A world in which nothing is lost: two versions stored, the last one staged as well as
    stored.
    """

    def __init__(self, s3: S3Server, bucket: str, lnd: Lnd, staging: Path) -> None:
        """Let LND write three versions, and keep them as the program does."""
        self.s3, self.bucket, self.lnd, self.staging = s3, bucket, lnd, staging
        self.written = [lnd.write(channels) for channels in (1, 0, 2)]
        self.store(self.written[0], 0)
        self.store(self.written[1], 1)
        self.stage(self.written[2], 2)
        (staging / ".state").touch(mode=0o600)

    def name(self, version: Written, number: int) -> str:
        """Return the name of a version captured at that second."""
        return f"20261120T2155{number:02}.123456Z-{version.sha256[-6:]}"

    def store(
        self, version: Written, number: int, data: bytes | None = None, **metadata: str
    ) -> None:
        """Put a version, or other bytes under its name, into the bucket."""
        self.s3.admin.put_object(
            Bucket=self.bucket,
            Key="alice/" + self.name(version, number),
            Body=version.data if data is None else data,
            Metadata={"sha256": version.sha256} | metadata,
        )

    def stage(self, version: Written, number: int, data: bytes | None = None) -> Path:
        """Put a version, or other bytes under its name, into staging."""
        path = self.staging / self.name(version, number)
        path.write_bytes(version.data if data is None else data)
        path.chmod(0o600)
        return path

    def remove(self, number: int) -> None:
        """Delete a version from the bucket."""
        self.s3.admin.delete_object(
            Bucket=self.bucket, Key="alice/" + self.name(self.written[number], number)
        )

    def check(self, **kwargs: Any) -> None:  # noqa: ANN401 - passed on
        """Hold everything to the invariant."""
        assert_nothing_lost(self.lnd, self.s3, self.bucket, "alice", self.staging, **kwargs)


@pytest.fixture
def kept(s3_http: S3Server, lnd: Lnd, staging: Path) -> Kept:
    """Return a world in which nothing is lost."""
    return Kept(s3_http, s3_http.create_bucket(), lnd, staging)


def test_the_invariant_holds_where_nothing_is_lost(kept: Kept) -> None:
    """Versions that are stored, staged or both satisfy the invariant, and so do those after an
    orderly upload.
    """
    kept.check()
    kept.store(kept.written[2], 2)
    kept.check()
    shutil.rmtree(kept.staging)
    kept.check()


def test_a_lost_version_is_found_unless_it_was_replaced(kept: Kept) -> None:
    """A version in neither place is lost, except one that is named as replaced; the last one never
    is.
    """
    kept.remove(1)
    with pytest.raises(AssertionError, match=r"version 1 of 3 is lost: <0 channels, 45 bytes"):
        kept.check()
    kept.check(replaced_ok={1})
    kept.check(replaced_ok=True)
    with pytest.raises(AssertionError, match="version 1 of 3 is lost"):
        kept.check(replaced_ok={0})
    (kept.staging / kept.name(kept.written[2], 2)).unlink()
    with pytest.raises(AssertionError, match="version 2 of 3 is lost"):
        kept.check(replaced_ok=True)


def test_second_names_are_found_unless_they_are_refreshes(kept: Kept) -> None:
    """The same bytes under two names are a duplicate, in either place, unless so many refreshes
    took place.
    """
    kept.store(kept.written[2], 3)
    with pytest.raises(
        AssertionError, match="1 second names for the same bytes, where 0 are allowed"
    ):
        kept.check()
    kept.check(refreshes=1)
    kept.stage(kept.written[2], 4)
    with pytest.raises(
        AssertionError, match="2 second names for the same bytes, where 1 are allowed"
    ):
        kept.check(refreshes=1)
    kept.check(refreshes=None)


def test_foreign_names_are_left_out(kept: Kept) -> None:
    """What others left is a violation until it is named."""
    (kept.staging / "notes.txt").touch(mode=0o600)
    kept.s3.admin.put_object(Bucket=kept.bucket, Key="alice/other/key", Body=b"")
    with pytest.raises(
        AssertionError, match=r"alice/other/key does not have.*\n(.*\n)*.*notes.txt does not have"
    ):
        kept.check()
    kept.check(foreign={"notes.txt", "other/key"})


def _unwritten() -> Written:
    """Return a version that no LND of the test wrote."""
    data = channel_backup(0)
    return Written(data, hashlib.sha256(data).hexdigest(), 0, 0.0, None)  # type: ignore[arg-type]


def _swap_first_names(kept: Kept) -> None:
    """Store the first version as if it had been captured after the second."""
    kept.remove(0)
    kept.store(kept.written[0], 3)


VIOLATIONS: dict[str, tuple[Callable[[Kept], object], str]] = {
    "object torn": (
        lambda kept: kept.store(kept.written[0], 0, kept.written[0].data[:-1]),
        "holds other bytes than its name says",
    ),
    "metadata wrong": (
        lambda kept: kept.store(kept.written[0], 0, sha256="0" * 64),
        "does not have its SHA-256 as metadata",
    ),
    "staged torn": (
        lambda kept: kept.stage(kept.written[2], 2, kept.written[2].data[:-1]),
        "staged file .* holds other bytes",
    ),
    "staged name": (
        lambda kept: (kept.staging / "20261120T215558.123456Z-a1b2c3.tmp").touch(mode=0o600),
        "does not have the name of a version",
    ),
    "staged link": (
        lambda kept: (kept.staging / ".link").symlink_to(kept.lnd.path),
        "is not a regular file",
    ),
    "staging open": (lambda kept: kept.staging.chmod(0o750), "has mode 0750, not 0700"),
    "staged open": (lambda kept: (kept.staging / ".state").chmod(0o644), "has mode 0644, not 0600"),
    "bytes unknown": (lambda kept: kept.store(_unwritten(), 3), "that were never a version"),
    "order wrong": (_swap_first_names, "its name does not follow"),
}


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_each_violation_is_found(kept: Kept, violation: str) -> None:
    """The invariant goes red for each kind of violation, and says what it is."""
    violate, message = VIOLATIONS[violation]
    violate(kept)
    with pytest.raises(AssertionError, match=message):
        kept.check()


def test_a_placed_file_may_be_kept_but_need_not(kept: Kept) -> None:
    """A file that was placed at LND's path satisfies the invariant whether it was backed up or
    not.
    """
    kept.lnd.place(b"x" * 100)
    kept.check()
    placed = Written(
        b"x" * 100, hashlib.sha256(b"x" * 100).hexdigest(), 0, 0.0, kept.written[0].wall
    )
    kept.store(placed, 3)
    kept.check()


def test_staging_is_as_private_as_the_fixture_makes_it(staging: Path, env: dict[str, str]) -> None:
    """The fixtures give a private staging directory and settings that name it."""
    assert stat.S_IMODE(staging.stat().st_mode) == 0o700
    assert env["BACKUP_DIRECTORY"] == str(staging)
