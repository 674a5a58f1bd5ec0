"""Answers of S3, and of what stands in its place, that are incomplete, odd, huge, slow or without
an end: each leads to a line, in bounded time and memory, and what is usable is used.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from kit import (
    PATIENCE_SECONDS,
    Answer,
    Daemon,
    FakeS3,
    Lnd,
    RawS3,
    Request,
    S3Server,
    channel_backup,
    hurried,
    reader_settings,
    run_script,
    settings_at,
    version_name,
)
from kit.answers import BLOCK, continuing, dripping, endless, entry, error, framed, head, listing
from shared import HOUR, NOON

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.unmeasured

BOUND = 40 << 20  # of bytes taken in: the largest version, what the sockets hold, and some
LONGEST_LINE = 5000
HURRY = 10  # so much shorter is the program's patience
A_MINUTE = 60 / HURRY
DATA = channel_backup(1)
DIGEST = hashlib.sha256(DATA).hexdigest()
FACTS = {
    "ETag": '"x"',
    "Last-Modified": "Sun, 01 Mar 2026 12:00:00 GMT",
    "x-amz-meta-sha256": DIGEST,
}
KEY = "alice/" + version_name(DATA, NOON)


@pytest.fixture
def raw_env(lnd: Lnd, staging: Path) -> dict[str, str]:
    """Return the settings of a node whose version on disk is the one that the answers hold."""
    lnd.write(data=DATA)
    return settings_at("http://127.0.0.1:1", lnd, staging)


def run(
    raw_env: dict[str, str], endpoint: str, *args: str, cwd: Path | None = None, timeout: float = 40
) -> subprocess.CompletedProcess[str]:
    """Run a command against this endpoint: no traceback, no line without end."""
    raw_env = raw_env | {"AWS_ENDPOINT_URL_S3": endpoint}
    done = run_script(raw_env, *args, cwd=cwd, timeout=timeout)
    assert "Traceback" not in done.stderr
    assert "fault of this program" not in done.stderr
    assert max(map(len, done.stderr.splitlines()), default=0) < LONGEST_LINE
    assert done.returncode in (0, 1, 75), done.stderr
    assert done.returncode == 0 or "error: " in done.stderr
    return done


def is_list(request: Request) -> bool:
    """Tell whether a list is asked for."""
    return request.method == "GET" and "list-type=2" in request.path


def store(
    pages: Callable[[Request], Iterable[bytes | float]],
    version: Callable[[Request], Iterable[bytes | float]],
) -> Callable[[Request], Iterable[bytes | float]]:
    """Return a reply that lists by one function and gives an object by the other."""
    return lambda request: pages(request) if is_list(request) else version(request)


# --- Bodies ---


@pytest.mark.parametrize("how", ["length", "chunked", "close"])
def test_a_body_may_end_in_any_way(raw_env: dict[str, str], home: Path, how: str) -> None:
    """A version, a list and a receipt are read whole whether a length, a last chunk or the end of
    the connection ends them.
    """
    parts = [DATA[:300], DATA[300:]]
    reply = store(
        lambda _: framed([listing(entry(KEY))], how), lambda _: framed(parts, how, headers=FACTS)
    )
    with RawS3(reply) as raw:
        assert run(raw_env, raw.endpoint, "restore", cwd=home).returncode == 0
        assert run(raw_env, raw.endpoint, "check").returncode == 0
        raw.reply = lambda _: framed([], how, headers={"ETag": '"x"'})
        assert run(raw_env, raw.endpoint, "once").returncode == 0
    assert (home / "channel.backup").read_bytes() == DATA


@pytest.mark.parametrize("how", ["length", "chunked", "close"])
def test_a_version_without_end(raw_env: dict[str, str], home: Path, how: str) -> None:
    """Of a version that is too large hardly more is read than the largest one has; it is named, and
    the one before it offered.
    """
    large = "alice/" + version_name(b"", NOON + HOUR)

    def version(request: Request) -> Iterable[bytes]:
        if KEY in request.path:
            return framed([DATA], headers=FACTS)
        if how == "length":
            begin = head(headers=FACTS | {"Content-Length": str(1 << 40)})
            return itertools.chain([begin], endless())
        return framed(endless(), how, headers=FACTS)

    def pages(_: Request) -> Iterable[bytes]:
        return framed([listing(entry(KEY), entry(large))])

    with RawS3(store(pages, version)) as raw:
        done = run(raw_env, raw.endpoint, "restore", cwd=home)
        assert done.returncode == 1
        assert large in done.stderr
        assert f"hint: {KEY} is the version before it: " in done.stderr
        assert raw.sent < BOUND
        assert not list(home.iterdir())
        assert run(raw_env, raw.endpoint, "restore", "--key", large, cwd=home).returncode in (1, 75)
        assert raw.sent < 2 * BOUND
        assert not list(home.iterdir())


@pytest.mark.parametrize("how", ["length", "chunked"])
def test_a_version_that_is_cut(raw_env: dict[str, str], home: Path, how: str) -> None:
    """A version whose connection ends before it does is not written."""

    def version(_: Request) -> Iterable[bytes]:
        if how == "length":
            return [head(headers=FACTS | {"Content-Length": str(len(DATA))}), DATA[:-1]]
        return list(framed([DATA], how, headers=FACTS))[:-1]

    with RawS3(store(lambda _: framed([listing(entry(KEY))]), version)) as raw:
        assert run(raw_env, raw.endpoint, "restore", cwd=home).returncode in (1, 75)
    assert not list(home.iterdir())


@pytest.mark.parametrize(
    ("command", "status", "how"),
    [
        ("once", "200 OK", "chunked"),
        ("once", "500 Oops", "chunked"),
        ("list", "200 OK", "close"),
        ("check", "403 Forbidden", "close"),
        ("check", "200 OK", "chunked"),
    ],
)
def test_a_document_without_end(
    raw_env: dict[str, str], started_by: Callable[[str], None], command: str, status: str, how: str
) -> None:
    """An answer that goes on for ever is left after some megabytes, whatever it was to be."""
    started_by(hurried(HURRY))
    begin = b"<Error><Code>Odd</Code><Message>" if status != "200 OK" else listing()[:-20]
    headers = {"ETag": '"x"', "Content-Type": "application/xml"}
    with RawS3(lambda _: framed(endless(begin), how, status, headers)) as raw:
        done = run(raw_env, raw.endpoint, command)
        assert raw.sent < BOUND * len(raw.requests)
    assert done.returncode != 0


def test_headers_without_end(raw_env: dict[str, str], started_by: Callable[[str], None]) -> None:
    """Headers that go on for ever are left as well."""
    started_by(hurried(HURRY))
    lines = b"".join(b"X-%d: x\r\n" % number for number in range(BLOCK // 8))
    with RawS3(lambda _: endless(head()[:-2], lines)) as raw:
        assert run(raw_env, raw.endpoint, "once").returncode in (1, 75)
        assert raw.sent < BOUND * len(raw.requests)


@pytest.mark.parametrize("command", ["once", "list"])
def test_a_message_of_ten_megabytes(
    raw_env: dict[str, str], started_by: Callable[[str], None], command: str
) -> None:
    """Of a message that fills megabytes a beginning is shown, with the code and the status; no
    answer to a put is read that far.
    """
    started_by(hurried(HURRY))
    message = error("Odd", "words " + "x" * 10_000_000)
    with RawS3(lambda _: framed([message], status="400 Bad Request")) as raw:
        done = run(raw_env, raw.endpoint, command)
    assert len(done.stderr) < 2 * LONGEST_LINE
    if "words" in done.stderr:  # or it was too long to be read at all
        assert "Odd" in done.stderr
    assert "400" in done.stderr or command == "once"


BOMB = b'<!DOCTYPE b [<!ENTITY a0 "boom">' + b"".join(
    b'<!ENTITY a%d "%s">' % (number, b"&a%d;" % (number - 1) * 10) for number in range(1, 10)
)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<a>" * 100_000,
        b'{"IsTruncated": false}',
        BOMB + b"]><ListBucketResult><Name>&a9;</Name></ListBucketResult>",
    ],
    ids=["nothing", "deep", "json", "bomb"],
)
def test_a_list_that_is_none(raw_env: dict[str, str], body: bytes) -> None:
    """What cannot be a list is not taken for an empty bucket."""
    with RawS3(lambda _: framed([body])) as raw:
        done = run(raw_env, raw.endpoint, "list", "--json")
    assert (done.returncode != 0, done.stdout) == (True, "")


# --- Lists ---


OLDER = "alice/" + version_name(DATA, NOON - HOUR)
OTHERS = version_name(b"of another node", NOON + HOUR)

ODD = {
    "no token": listing(entry(KEY), truncated="true"),
    "empty token": listing(entry(KEY), truncated="true", token=""),
    "no date": listing(entry(KEY), entry(OLDER, missing="LastModified")),
    "fields": listing(
        entry(KEY),
        *(entry(OLDER, missing=name) for name in ("Size", "Key", "ETag")),
        "<Contents></Contents>",
        "<CommonPrefixes></CommonPrefixes>",
    ),
    "numbers": listing(entry(KEY), entry(OLDER, size=-1), entry(OLDER, size="9" * 400)),
    "the year 9999": listing(entry(KEY), entry(OLDER, stored_at="9999-12-31T23:59:59.999Z")),
    "a day that no month has": listing(entry(KEY), entry(OLDER, stored_at="2026-02-30T12:00:00Z")),
    "another folder": listing(entry(KEY), entry(f"bob/{OTHERS}"), entry(OTHERS)),
    "dates": listing(
        entry(KEY),
        entry(OLDER, stored_at="0001-01-01T00:00:00+23:59"),
        entry(OLDER, stored_at="99991231T235959-2359"),
    ),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_list_of_which_a_part_is_usable(raw_env: dict[str, str], home: Path, odd: str) -> None:
    """Beside an entry or a page that lacks something, or tells what cannot be, the version that is
    whole is listed, restored, and found by `check`.
    """
    reply = store(lambda _: framed([ODD[odd]]), lambda _: framed([DATA], headers=FACTS))
    with RawS3(reply) as raw:
        done = run(raw_env, raw.endpoint, "list", "--json")
        assert done.returncode == 0, done.stderr
        assert KEY in [row["key"] for row in json.loads(done.stdout)]
        done = run(raw_env, raw.endpoint, "restore", cwd=home)
        assert done.returncode == 0, done.stderr
        assert (home / "channel.backup").read_bytes() == DATA
        done = run(raw_env, raw.endpoint, "check")
        assert done.returncode == 0, done.stderr
        assert len(raw.requests) < 30


@pytest.mark.parametrize(
    "truncated", ["true", "True", "false", ""], ids=["said", "capital", "denied", "unsaid"]
)
def test_a_list_goes_on_while_there_is_a_token(raw_env: dict[str, str], truncated: str) -> None:
    """A page that leads to another one is not the last, whatever else it says."""
    older = "alice/" + version_name(DATA, NOON - HOUR)

    def page(request: Request) -> Iterable[bytes]:
        if "continuation-token=more" in request.path:
            return framed([listing(entry(older))])
        first = listing(entry(KEY), truncated=truncated, token="more")
        return framed([first.replace(b"<IsTruncated></IsTruncated>", b"")])

    with RawS3(page) as raw:
        done = run(raw_env, raw.endpoint, "list", "--json")
    assert [row["key"] for row in json.loads(done.stdout)] == [KEY, older]


def test_each_page_and_each_file_has_its_own_time(
    raw_env: dict[str, str], home: Path, started_by: Callable[[str], None]
) -> None:
    """A list and files that take longer in all than one answer may take are waited for."""
    started_by(hurried(HURRY))
    keys = ["alice/" + version_name(DATA, NOON - n * HOUR) for n in range(4)]
    larger = channel_backup(9)
    keys[1] = "alice/" + version_name(larger, NOON - HOUR)

    def reply(request: Request) -> Iterator[bytes | float]:
        yield A_MINUTE / 6
        if not is_list(request):
            data = larger if keys[1] in request.path else DATA
            facts = FACTS | {"x-amz-meta-sha256": hashlib.sha256(data).hexdigest()}
            yield from framed([data], headers=facts)
            return
        number = int(request.path.partition("continuation-token=")[2].partition("&")[0] or 0)
        size = len(larger) if number == 1 else len(DATA)
        token = str(number + 1) if number < 3 else None
        page = listing(
            entry(keys[number], size), truncated=str(token is not None).lower(), token=token
        )
        yield from framed([page])

    with RawS3(reply) as raw:
        done = run(raw_env, raw.endpoint, "restore", cwd=home, timeout=4 * A_MINUTE)
    assert done.returncode == 0, done.stderr
    assert (home / "channel.backup").read_bytes() == DATA
    assert (home / "channel.backup.2").read_bytes() == larger


def test_two_versions_of_one_second_keep_their_order(raw_env: dict[str, str], home: Path) -> None:
    """Where S3 cuts its times to the second, the later of two names is the newer version, and the
    command for the version before it fetches the other one.
    """
    newest = channel_backup(1)
    early, late = (NOON + timedelta(milliseconds=ms) for ms in (900, 1100))
    older, newer = (
        "alice/" + version_name(data, at) for data, at in ((DATA, early), (newest, late))
    )
    page = listing(*(entry(key, len(DATA), "2026-03-01T12:00:00.000Z") for key in (older, newer)))
    broken = threading.Event()

    def version(request: Request) -> Iterable[bytes]:
        data = DATA if older in request.path else newest
        facts = FACTS | {"x-amz-meta-sha256": hashlib.sha256(data).hexdigest()}
        return framed(
            [b"x" * len(data) if broken.is_set() and data == newest else data], headers=facts
        )

    with RawS3(store(lambda _: framed([page]), version)) as raw:
        done = run(raw_env, raw.endpoint, "list", "--json")
        assert [row["key"] for row in json.loads(done.stdout)] == [newer, older]
        assert run(raw_env, raw.endpoint, "restore", cwd=home).returncode == 0
        assert (home / "channel.backup").read_bytes() == newest
        broken.set()
        done = run(raw_env, raw.endpoint, "restore", "--output", "second", cwd=home)
        assert done.returncode == 1
        _, *words = shlex.split(done.stderr.partition(f"{older} is the version before it: ")[2])
        words = words[words.index("restore") : words.index("--output")]
        assert run(raw_env, raw.endpoint, *words, "--output", "third", cwd=home).returncode == 0
        assert (home / "third").read_bytes() == DATA


@pytest.mark.parametrize("odd", ["no token", "fields"])
def test_what_is_wrong_with_a_list_is_told(raw_env: dict[str, str], odd: str) -> None:
    """A page that is not the last one and leads nowhere, and an entry that lacks something, are
    warned of.
    """
    with RawS3(lambda _: framed([ODD[odd]])) as raw:
        assert "warning: " in run(raw_env, raw.endpoint, "list").stderr


@pytest.mark.parametrize("page", ["nothing", "no token"])
def test_a_list_of_which_nothing_is_usable(raw_env: dict[str, str], page: str) -> None:
    """When nothing is usable it is a failure, and not an empty bucket."""
    body = {
        "nothing": listing(entry(KEY, missing="Key")),
        "no token": listing(truncated="true"),
    }[page]
    with RawS3(lambda _: framed([body])) as raw:
        done = run(raw_env, raw.endpoint, "restore")
    assert done.returncode in (1, 75)


@pytest.mark.parametrize("tokens", ["the same", "new ones"])
def test_a_list_that_never_ends(
    raw_env: dict[str, str], started_by: Callable[[str], None], tokens: str
) -> None:
    """A list that leads on for ever, in a circle or not, ends within a minute, with a line."""
    started_by(hurried(HURRY))
    numbers = itertools.count()

    def page(_: Request) -> Iterable[bytes]:
        number = next(numbers)
        at = NOON + timedelta(seconds=number)
        token = "again" if tokens == "the same" else f"token-{number}"
        return framed(
            [listing(entry("alice/" + version_name(DATA, at)), truncated="true", token=token)]
        )

    with RawS3(page) as raw:
        done = run(raw_env, raw.endpoint, "list", "--json", timeout=4 * A_MINUTE)
        assert tokens == "new ones" or len(raw.requests) < 100
    assert "warning: " in done.stderr or "error: " in done.stderr
    assert done.returncode == 0 or done.stdout == ""


@pytest.mark.parametrize("lacking", ["x-amz-meta-sha256", "all", "a date"])
def test_a_version_without_a_header(raw_env: dict[str, str], home: Path, lacking: str) -> None:
    """A version that comes without one of its headers, or with one that cannot be read, is written
    if its bytes can be verified, and refused in words otherwise.
    """
    headers = {name: value for name, value in FACTS.items() if lacking not in (name, "all")}
    headers |= {"Last-Modified": "yesterday"} if lacking == "a date" else {}
    reply = store(
        lambda _: framed([listing(entry(KEY))]), lambda _: framed([DATA], headers=headers)
    )
    with RawS3(reply) as raw:
        done = run(raw_env, raw.endpoint, "restore", cwd=home)
    if lacking == "x-amz-meta-sha256":
        assert done.returncode == 0, done.stderr
        assert any("warning: " in line and KEY in line for line in done.stderr.splitlines())
    assert [path.read_bytes() for path in home.iterdir()] == [DATA] * (done.returncode == 0)


# --- Versions that cannot be read ---


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        ("400 Bad Request", "InvalidRequest", "The object was stored using a form of SSE."),
        ("403 Forbidden", "AccessDenied", "User is not authorized to perform: kms:Decrypt"),
        ("403 Forbidden", "InvalidObjectState", "The operation is not valid for GLACIER"),
        ("404 Not Found", "NoSuchKey", "The specified key does not exist."),
    ],
    ids=["sse-c", "kms", "glacier", "gone"],
)
def test_a_version_that_cannot_be_read(
    raw_env: dict[str, str], home: Path, status: str, code: str, message: str
) -> None:
    """When the newest version cannot be read it is named, with S3's words, and the printed command
    restores the one before it.
    """
    newest = "alice/" + version_name(b"newest", NOON + HOUR)
    pages = [listing(entry(KEY), entry(newest, stored_at="2026-03-01T13:00:00Z"))]

    def version(request: Request) -> Iterable[bytes]:
        if KEY in request.path:
            return framed([DATA], headers=FACTS)
        return framed([error(code, message)], status=status)

    with RawS3(store(lambda _: framed(pages), version)) as raw:
        done = run(raw_env, raw.endpoint, "restore", cwd=home)
        assert (done.returncode, list(home.iterdir())) == (1, [])
        assert any(newest in line and code in line for line in done.stderr.splitlines())
        (command,) = (
            line for line in done.stderr.splitlines() if " restore " in line and f" {KEY}" in line
        )
        words = shlex.split(command[command.index(sys.executable) :])
        done = run(raw_env, raw.endpoint, *words[words.index("restore") :], cwd=home)
        assert done.returncode == 0, done.stderr
    assert (home / "channel.backup").read_bytes() == DATA


def test_versions_without_metadata(s3: S3Server, bucket: str, prefix: str, home: Path) -> None:
    """Versions that were copied by another tool, or lie behind a gateway that forgot, are restored
    by size and six digits, with a warning; a damaged one is not.
    """
    reader = reader_settings(s3, bucket, prefix, s3.reader_user(bucket))
    for hours, data in enumerate((channel_backup(3), DATA)):
        key = prefix + version_name(data, NOON + HOUR * hours)
        s3.admin.put_object(Bucket=bucket, Key=key, Body=data, Metadata={"mtime": "1"})
    done = run(reader, s3.endpoint, "restore", cwd=home)
    assert done.returncode == 0, done.stderr
    assert any("warning: " in line and key in line for line in done.stderr.splitlines())
    assert (home / "channel.backup").read_bytes() == DATA
    s3.admin.put_object(Bucket=bucket, Key=key, Body=b"\0" + DATA[1:], Metadata={"mtime": "1"})
    done = run(reader, s3.endpoint, "restore", "--key", key, "--output", "damaged", cwd=home)
    assert done.returncode == 1
    assert not (home / "damaged").exists()


# --- Answers that hang ---


HANGING: dict[str, Callable[[], Iterable[bytes | float]]] = {
    "headers": lambda: dripping(b"HTTP/1.1 200 OK\r\nX-Slow: "),
    "error": lambda: dripping(head("500 Oops") + b"<Error><Code>"),
    "body": lambda: dripping(head(headers=FACTS | {"Content-Length": "700"})),
    "continue": continuing,
}


@pytest.mark.parametrize("how", HANGING)
def test_one_shots_end_within_a_minute(
    raw_env: dict[str, str], home: Path, started_by: Callable[[str], None], how: str
) -> None:
    """However an answer hangs, each command gives up within a minute, and it may be tried again."""
    started_by(hurried(HURRY))

    def timed(command: str) -> tuple[int, float]:
        def page(request: Request) -> Iterable[bytes | float]:
            if is_list(request) and how == "body" and command != "list":
                return framed([listing(entry(KEY))])
            return HANGING[how]()

        with RawS3(page) as raw:
            env = raw_env | {"BACKUP_DIRECTORY": str(home / command)}
            output = ("--output", str(home / "restored")) if command == "restore" else ()
            done = run(env, raw.endpoint, command, *output)
            return done.returncode, time.monotonic() - raw.asked_at

    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(timed, ("once", "list", "check", "restore")))
    assert [code for code, _ in ends] == [75] * 4
    assert max(took for _, took in ends) < A_MINUTE + 2
    assert not (home / "restored").exists()


@pytest.mark.parametrize("how", HANGING)
def test_the_daemon_outlives_answers_that_hang(
    raw_env: dict[str, str], lnd: Lnd, started_by: Callable[[str], None], how: str
) -> None:
    """However many answers hang, each attempt has an end, and versions are stored as soon as S3 is
    well again.
    """
    started_by(hurried(60))
    with RawS3(lambda _: HANGING[how]()) as raw:
        raw_env["AWS_ENDPOINT_URL_S3"] = raw.endpoint
        with Daemon(raw_env | {"SHUTDOWN_GRACE_SECONDS": "0"}) as daemon:
            for count in range(1, 4):
                raw.wait_for_requests(count)
                daemon.wait_for_captured(lnd.write(1))
            raw.reply = lambda _: framed([], headers={"ETag": '"x"'})
            daemon.wait_for_stored(lnd.written[-1])
            assert daemon.stop() == 0


def test_a_heartbeat_that_hangs_is_tried_again(
    fake_env: dict[str, str], lnd: Lnd, started_by: Callable[[str], None]
) -> None:
    """However many heartbeats were answered by `100 Continue` for ever, the next one is sent, and
    no upload waits.
    """
    started_by(hurried(60))
    with RawS3(lambda _: continuing()) as beat:
        raw_env = fake_env | {
            "HEARTBEAT_URL": f"{beat.endpoint}/ping",
            "SHUTDOWN_GRACE_SECONDS": "0",
        }
        with Daemon(raw_env) as daemon:
            for count in range(1, 4):
                daemon.wait_for_stored(lnd.write(1))
                beat.wait_for_requests(count, method="GET")
            answered = threading.Event()

            def healthy(_: Request) -> Iterator[bytes]:
                yield head(headers={"Content-Length": "0"})
                answered.set()

            beat.reply = healthy
            daemon.wait_for_stored(lnd.write(1))
            assert answered.wait(PATIENCE_SECONDS), daemon.log
            assert daemon.stop() == 0


# --- Secrets ---


@pytest.mark.parametrize(
    ("source", "command"), [("environment", "once"), ("credentials", "list"), ("process", "once")]
)
def test_a_secret_in_an_answer_is_not_shown(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, tmp_path: Path, source: str, command: str
) -> None:
    """What S3 says of a secret is shown without it, wherever the secret came from."""
    lnd.write()
    secrets = {"aws_secret_access_key": "5ecretKey/Value", "aws_session_token": "t0kenOf+The/User"}
    values = {"aws_access_key_id": "AKIDMADEUP"} | secrets
    lines = "".join(f"{name} = {value}\n" for name, value in values.items())
    names = ("AccessKeyId", "SecretAccessKey", "SessionToken")
    printed = json.dumps({"Version": 1} | dict(zip(names, values.values(), strict=True)))
    (tmp_path / "printed.json").write_text(printed)
    if source == "process":
        lines = f"credential_process = cat {tmp_path / 'printed.json'}\n"
    (tmp_path / "file").write_text(f"[default]\n{lines}")
    file = {"credentials": "AWS_SHARED_CREDENTIALS_FILE"}.get(source, "AWS_CONFIG_FILE")
    if source == "environment":
        more = {name.upper(): value for name, value in values.items()}
    else:
        more = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", file: str(tmp_path / "file")}
    said = " and ".join(secrets.values())
    answer = Answer(400, body=error("InvalidToken", f"malformed: {said}."), etag=False)
    for method in ("PUT", "GET"):
        fake.set_default(answer, method)
    done = run(fake_env | more, fake.endpoint, command)
    assert done.returncode == 1
    assert "malformed" in done.stderr
    assert not any(secret in done.stderr + done.stdout for secret in secrets.values())


# --- Errors ---


@pytest.mark.parametrize("command", ["once", "list", "check", "restore"])
@pytest.mark.parametrize(
    "fields",
    [
        "<Code>SlowDown</Code><Message/>",
        "<Code/><Message>x</Message>",
        "<Code>SlowDown</Code><Message>x<b>y</b></Message>",
        "<Code>A</Code><Code>B</Code><Message>x</Message><Message>y</Message>",
        "<Code><a>b</a></Code>",
    ],
)
def test_an_error_with_odd_fields(
    raw_env: dict[str, str], started_by: Callable[[str], None], command: str, fields: str
) -> None:
    """An error whose fields are empty, nested or there twice may be tried again."""
    started_by(hurried(4 * HURRY))
    body = f"<Error>{fields}</Error>".encode()
    with RawS3(lambda _: framed([body], status="503 Slow Down")) as raw:
        assert run(raw_env, raw.endpoint, command).returncode == 75
