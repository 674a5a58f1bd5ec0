"""Answers of S3, and of what stands in its place, that are incomplete, odd, huge, slow or without
an end: each leads to a line, in bounded time and memory, and what is usable is used.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from kit import (
    PATIENCE_SECONDS,
    Daemon,
    FakeS3,
    Lnd,
    RawS3,
    Request,
    channel_backup,
    hurried,
    run_script,
    settings_at,
    version_name,
)
from kit.answers import BLOCK, continuing, dripping, endless, entry, error, framed, head, listing
from shared import (
    HOUR,
    NOON,
    command_for_the_one_before,
    done_well,
    listed,
    restore,
    restored_bytes,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from functools import partial
    from pathlib import Path

    from shared import Done, Env

pytestmark = pytest.mark.unmeasured

BOUND = 40 << 20  # of bytes taken in: the largest version, what the sockets hold, and some
HURRY = 10  # so much shorter is the program's patience
A_MINUTE = 60 / HURRY
DATA = channel_backup(1)
FACTS = {
    "ETag": '"x"',
    "Last-Modified": "Sun, 01 Mar 2026 12:00:00 GMT",
    "x-amz-meta-sha256": hashlib.sha256(DATA).hexdigest(),
}
KEY, OLDER = ("alice/" + version_name(DATA, at) for at in (NOON, NOON - HOUR))
ONE = listing(entry(KEY))
Reply = Callable[[Request], Iterable[bytes | float]]


@pytest.fixture
def raw() -> Iterator[RawS3]:
    """Return an S3 that answers as the test says."""
    with RawS3(lambda _: []) as server:
        yield server


@pytest.fixture
def raw_env(raw: RawS3, lnd: Lnd, staging: Path) -> Env:
    """Return the settings of a node whose version on disk is the one that the answers hold."""
    lnd.write(data=DATA)
    return settings_at(raw.endpoint, lnd, staging)


@pytest.fixture
def _hurried(started_by: Callable[[str], None]) -> None:
    """Make the program's patience shorter."""
    started_by(hurried(HURRY))


def run(env: Env, *args: str, cwd: Path | None = None) -> Done:
    """Run a command: no traceback, no line without end."""
    done = run_script(env, *args, cwd=cwd)
    assert "Traceback" not in done.stderr
    assert "fault of this program" not in done.stderr
    assert max(map(len, done.stderr.splitlines()), default=0) < 5000
    assert done.returncode in (0, 1, 75), done.stderr
    assert done.returncode == 0 or "error: " in done.stderr
    return done


def is_list(request: Request) -> bool:
    """Tell whether a list is asked for."""
    return request.method == "GET" and "list-type=2" in request.path


def whole(data: bytes) -> Iterator[bytes]:
    """Return the answer with a version."""
    sha256 = hashlib.sha256(data).hexdigest()
    return framed([data], headers=FACTS | {"x-amz-meta-sha256": sha256})


def store(page: bytes, version: Reply = lambda _: whole(DATA)) -> Reply:
    """Return a reply that lists this page, and gives an object by the function."""
    return lambda request: framed([page]) if is_list(request) else version(request)


# --- Bodies ---


@pytest.mark.parametrize("how", ["length", "chunked", "close"])
def test_a_body_may_end_in_any_way(raw: RawS3, raw_env: Env, home: Path, how: str) -> None:
    """A version, a list and a receipt are read whole."""

    def reply(request: Request) -> Iterable[bytes]:
        if request.method == "PUT":
            return framed([], how, headers={"ETag": '"x"'})
        if is_list(request):
            return framed([ONE], how)
        return framed([DATA[:300], DATA[300:]], how, headers=FACTS)

    raw.reply = reply
    assert restored_bytes(raw_env, home) == DATA
    done_well(raw_env, "check")
    done_well(raw_env, "once")


@pytest.mark.parametrize("how", ["length", "chunked", "close"])
def test_a_version_without_end(raw: RawS3, raw_env: Env, home: Path, how: str) -> None:
    """Hardly more is read than the largest has; the version before it is offered."""
    large = "alice/" + version_name(b"", NOON + HOUR)

    def version(request: Request) -> Iterable[bytes]:
        if KEY in request.path:
            return whole(DATA)
        if how == "length":
            begin = head(headers=FACTS | {"Content-Length": str(1 << 40)})
            return itertools.chain([begin], endless())
        return framed(endless(), how, headers=FACTS)

    raw.reply = store(listing(entry(KEY), entry(large)), version)
    said = restore(raw_env, home, code=1).stderr
    assert large in said
    assert f"hint: {KEY} is the version before it: " in said
    assert raw.sent < BOUND


CUT = {
    "length": [head(headers=FACTS | {"Content-Length": str(len(DATA))}), DATA[:-1]],
    "chunked": list(framed([DATA], "chunked", headers=FACTS))[:-1],
}


@pytest.mark.parametrize("how", CUT)
def test_a_version_that_is_cut(raw: RawS3, raw_env: Env, home: Path, how: str) -> None:
    """It is not written."""
    raw.reply = store(ONE, lambda _: CUT[how])
    restore(raw_env, home, code=75)


@pytest.mark.usefixtures("_hurried")
@pytest.mark.parametrize(
    ("command", "status", "how"),
    [
        ("once", "200 OK", "headers"),
        ("once", "200 OK", "chunked"),
        ("once", "500 Oops", "chunked"),
        ("list", "200 OK", "close"),
        ("check", "403 Forbidden", "close"),
        ("check", "200 OK", "chunked"),
    ],
)
def test_a_document_without_end(
    raw: RawS3, raw_env: Env, command: str, status: str, how: str
) -> None:
    """It is left after some megabytes, whatever it was to be."""
    begin = b"<Error><Code>Odd</Code><Message>" if status != "200 OK" else listing()[:-20]
    headers = {"ETag": '"x"', "Content-Type": "application/xml"}
    raw.reply = lambda _: framed(endless(begin), how, status, headers)
    if how == "headers":
        lines = b"".join(b"X-%d: x\r\n" % number for number in range(BLOCK // 8))
        raw.reply = lambda _: endless(head()[:-2], lines)
    assert run(raw_env, command).returncode != 0
    assert raw.sent < BOUND * len(raw.requests)


def test_a_message_of_megabytes(raw: RawS3, raw_env: Env) -> None:
    """A beginning is shown."""
    message = error("Odd", "words " + "x" * 3_000_000)
    raw.reply = lambda _: framed([message], status="400 Bad Request")
    assert "Odd: words x" in run(raw_env, "list").stderr


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
def test_an_error_with_odd_fields(raw: RawS3, raw_env: Env, fields: str) -> None:
    """It may be tried again, though fields are empty, nested or there twice."""
    raw.reply = lambda _: framed([f"<Error>{fields}</Error>".encode()], status="503 Slow Down")
    assert run(raw_env, "list").returncode == 75


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
def test_a_list_that_is_none(raw: RawS3, raw_env: Env, body: bytes) -> None:
    """It is not taken for an empty bucket."""
    raw.reply = lambda _: framed([body])
    done = run(raw_env, "list", "--json")
    assert (done.returncode != 0, done.stdout) == (True, "")


# --- Lists ---


OTHERS = version_name(b"of another node", NOON + HOUR)
DATES = ["9999-12-31T23:59:59.999Z", "2026-02-30T12:00:00Z"]  # not in UTC, and in no month
DATES += ["0001-01-01T00:00:00+23:59", "99991231T235959-2359"]

ODD = {
    "no token": listing(entry(KEY), truncated="true"),
    "fields": listing(
        entry(KEY),
        *(entry(OLDER, missing=name) for name in ("Size", "Key", "ETag", "LastModified")),
        "<Contents></Contents>",
        "<CommonPrefixes></CommonPrefixes>",
    ),
    "numbers": listing(entry(KEY), entry(OLDER, size=-1), entry(OLDER, size="9" * 400)),
    "dates": listing(entry(KEY), *(entry(OLDER, stored_at=date) for date in DATES)),
    "another folder": listing(entry(KEY), entry(f"bob/{OTHERS}"), entry(OTHERS)),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_list_of_which_a_part_is_usable(raw: RawS3, raw_env: Env, home: Path, odd: str) -> None:
    """The version that is whole is used; what is lacking is warned of."""
    raw.reply = store(ODD[odd])
    assert KEY in [row["key"] for row in listed(raw_env)]
    done = restore(raw_env, home)
    assert (home / "channel.backup").read_bytes() == DATA
    assert len(raw.requests) < 10
    assert ("warning: " in done.stderr) == (odd != "another folder")


@pytest.mark.parametrize("truncated", ["true", "True", "false", ""])
def test_a_list_goes_on_while_there_is_a_token(raw: RawS3, raw_env: Env, truncated: str) -> None:
    """It does so whatever else the page says."""
    first = listing(entry(KEY), truncated=truncated, token="more")
    first = first.replace(b"<IsTruncated></IsTruncated>", b"")
    second = listing(entry(OLDER))
    raw.reply = lambda request: framed(
        [second if "continuation-token=more" in request.path else first]
    )
    assert [row["key"] for row in listed(raw_env)] == [KEY, OLDER]


@pytest.mark.usefixtures("_hurried")
def test_each_page_and_each_file_has_its_own_time(raw: RawS3, raw_env: Env, home: Path) -> None:
    """All together they take longer than one answer may."""
    larger = channel_backup(9)
    older = "alice/" + version_name(larger, NOON - HOUR)
    pages = iter(
        [
            listing(entry(KEY), truncated="true", token="1"),
            listing(entry(older, len(larger)), truncated="true", token="2"),
            listing(truncated="true", token="3"),
            listing(),
        ]
    )

    def reply(request: Request) -> Iterator[bytes | float]:
        yield A_MINUTE / 6
        version = whole(larger if older in request.path else DATA)
        yield from framed([next(pages)]) if is_list(request) else version

    raw.reply = reply
    assert restored_bytes(raw_env, home) == DATA
    assert (home / "channel.backup.2").read_bytes() == larger


def test_two_versions_of_one_second_keep_their_order(raw: RawS3, raw_env: Env, home: Path) -> None:
    """S3 cuts its times to the second, so the later name decides."""
    newest = channel_backup(1)
    older = "alice/" + version_name(DATA, NOON + timedelta(milliseconds=900))
    newer = "alice/" + version_name(newest, NOON + timedelta(milliseconds=1100))
    page = listing(*(entry(key, len(DATA), "2026-03-01T12:00:00.000Z") for key in (older, newer)))
    objects = {older: DATA, newer: newest}
    raw.reply = store(page, lambda request: whole(objects[request.path.split("/", 2)[2]]))
    assert [row["key"] for row in listed(raw_env)] == [newer, older]
    assert restored_bytes(raw_env, home) == newest
    objects[newer] = b"x" * len(newest)
    done = run(raw_env, "restore", "--output", "second", cwd=home)
    assert f"{older} is the version before it" in done.stderr
    assert run(raw_env, *command_for_the_one_before(done)).returncode == 0
    assert (home / "second").read_bytes() == DATA


@pytest.mark.usefixtures("_hurried")
@pytest.mark.parametrize(
    ("tokens", "pages"),
    [(itertools.repeat("again"), 2), (map(str, itertools.count()), 100)],
    ids=["the same", "new ones"],
)
def test_a_list_that_never_ends(
    raw: RawS3, raw_env: Env, tokens: Iterator[str], pages: int
) -> None:
    """It is left after some pages, in a circle or not, with a line."""
    raw.reply = lambda _: framed([listing(entry(KEY), truncated="true", token=next(tokens))])
    assert "warning: " in run(raw_env, "list", "--json").stderr
    assert len(raw.requests) <= pages


@pytest.mark.parametrize("headers", [{}, FACTS | {"Last-Modified": "yesterday"}])
def test_a_version_without_a_header(raw: RawS3, raw_env: Env, home: Path, headers: Env) -> None:
    """It is written, as its bytes can be verified."""
    raw.reply = store(ONE, lambda _: framed([DATA], headers=headers))
    assert restored_bytes(raw_env, home) == DATA


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("400 Bad Request", "InvalidRequest"),  # stored with SSE-C
        ("403 Forbidden", "AccessDenied"),  # by KMS
        ("403 Forbidden", "InvalidObjectState"),  # in Glacier
        ("404 Not Found", "NoSuchKey"),
    ],
)
def test_a_version_that_cannot_be_read(
    raw: RawS3, raw_env: Env, home: Path, status: str, code: str
) -> None:
    """It is named, with S3's words, and the printed command restores the one before."""
    newest = "alice/" + version_name(b"newest", NOON + HOUR)

    def version(request: Request) -> Iterable[bytes]:
        return whole(DATA) if KEY in request.path else framed([error(code)], status=status)

    raw.reply = store(listing(entry(KEY), entry(newest, stored_at="2026-03-01T13:00:00Z")), version)
    done = restore(raw_env, home, code=1)
    assert re.search(f"{newest}.*{code}: scripted", done.stderr)
    done_well(raw_env, *command_for_the_one_before(done))
    assert (home / "channel.backup").read_bytes() == DATA


def test_versions_without_metadata(put: partial[str], reader: Env, home: Path) -> None:
    """Another tool copied them: size and six digits decide, with a warning."""
    other = {"mtime": "1"}
    key = put(NOON, DATA, metadata=other)
    assert re.search(f"warning: .*{key}", restore(reader, home).stderr)
    assert (home / "channel.backup").read_bytes() == DATA
    put(NOON, b"\0" + DATA[1:], prefix="", name=key, metadata=other)
    restore(reader, home, "--key", key, "--output", "damaged", code=1)


# --- Answers that hang ---


HANGING: dict[str, Callable[[], Iterable[bytes | float]]] = {
    "headers": lambda: dripping(b"HTTP/1.1 200 OK\r\nX-Slow: "),
    "error": lambda: dripping(head("500 Oops") + b"<Error><Code>"),
    "body": lambda: dripping(head(headers=FACTS | {"Content-Length": "700"})),
    "continue": continuing,
    "nothing": lambda: [PATIENCE_SECONDS],
}


@pytest.mark.usefixtures("_hurried")
@pytest.mark.parametrize("how", HANGING)
def test_one_shots_end_within_a_minute(lnd: Lnd, tmp_path: Path, home: Path, how: str) -> None:
    """However an answer hangs, it is told, and may be tried again."""
    lnd.write(data=DATA)

    def timed(command: str) -> tuple[Done, float]:
        def page(request: Request) -> Iterable[bytes | float]:
            if is_list(request) and how == "body" and command != "list":
                return framed([ONE])
            return HANGING[how]()

        with RawS3(page) as raw:
            env = settings_at(raw.endpoint, lnd, tmp_path / command)
            return run(env, command, cwd=home), time.monotonic() - raw.asked_at

    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(timed, ("once", "list", "check", "restore")))
    assert [done.returncode for done, _ in ends] == [75] * 4
    once, *others = (done.stderr for done, _ in ends)
    assert "still waiting: 1" in once
    for said in others:
        assert re.search("error: .*: (no answer in time|Read timeout.*)\n.*check the network", said)
    assert max(took for _, took in ends) < A_MINUTE + 2
    assert not list(home.iterdir())


@pytest.mark.parametrize("how", HANGING)
def test_the_daemon_outlives_answers_that_hang(
    raw: RawS3, raw_env: Env, lnd: Lnd, started_by: Callable[[str], None], how: str
) -> None:
    """Each attempt has an end, and versions are stored as soon as S3 is well again."""
    started_by(hurried(60))
    raw.reply = lambda _: HANGING[how]()
    with Daemon(raw_env | {"SHUTDOWN_GRACE_SECONDS": "0"}) as daemon:
        for count in (1, 2):
            raw.wait_for_requests(count)
            daemon.wait_for_captured(lnd.write(1))
        raw.reply = lambda _: framed([], headers={"ETag": '"x"'})
        daemon.wait_for_stored(lnd.written[-1])
        assert daemon.stop() == 0


def test_a_heartbeat_that_hangs_is_tried_again(
    raw: RawS3, fake_env: Env, lnd: Lnd, started_by: Callable[[str], None]
) -> None:
    """`100 Continue` is answered for ever; no upload waits for it."""
    started_by(hurried(60))
    answered = threading.Event()

    def healthy(_: Request) -> Iterator[bytes]:
        yield head(headers={"Content-Length": "0"})
        answered.set()

    raw.reply = lambda _: continuing()
    beating = {"HEARTBEAT_URL": f"{raw.endpoint}/ping", "SHUTDOWN_GRACE_SECONDS": "0"}
    with Daemon(fake_env | beating) as daemon:
        for count in range(1, 4):
            daemon.wait_for_stored(lnd.write(1))
            raw.wait_for_requests(count, method="GET")
        raw.reply = healthy
        daemon.wait_for_stored(lnd.write(1))
        assert answered.wait(PATIENCE_SECONDS), daemon.log
        assert daemon.stop() == 0


# --- Secrets ---


SECRETS = {"aws_secret_access_key": "5ecretKey/Value", "aws_session_token": "t0kenOf+The/User"}


def use_credentials(env: Env, directory: Path, source: str, values: dict[str, str]) -> None:
    """Let the program get these from a file of credentials, or a process."""
    env |= {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    values = {"aws_access_key_id": "AKIDMADEUP"} | values
    file, printed = directory / "file", directory / "printed.json"
    if source == "credentials":
        lines = [f"{name} = " + value.replace("\n", "\n  ") for name, value in values.items()]
        file.write_text("\n".join(["[default]", *lines]))
        env["AWS_SHARED_CREDENTIALS_FILE"] = str(file)
    else:
        names = ("AccessKeyId", "SecretAccessKey", "SessionToken")
        fields = {"Version": 1} | dict(zip(names, values.values(), strict=True))
        printed.write_text(json.dumps(fields))
        file.write_text(f"[default]\ncredential_process = cat {printed}\n")
        env["AWS_CONFIG_FILE"] = str(file)


@pytest.mark.parametrize("source", ["credentials", "process"])
def test_a_secret_in_an_answer_is_not_shown(
    fake: FakeS3, written_env: Env, tmp_path: Path, source: str
) -> None:
    """It is masked wherever it came from."""
    use_credentials(written_env, tmp_path, source, SECRETS)
    say(fake, 400, error("InvalidToken", f"malformed: {' and '.join(SECRETS.values())}."))
    said = run(written_env, "once").stderr
    assert "malformed" in said
    assert not any(secret in said for secret in SECRETS.values())


@pytest.mark.parametrize("source", ["credentials", "process"])
def test_a_secret_that_is_broken_over_lines_is_not_shown(
    fake: FakeS3, written_env: Env, tmp_path: Path, source: str
) -> None:
    """No request can bear it, and what is told of that has none of its lines."""
    broken = {"aws_session_token": "geheim-and-long\ngeheim-and-longer"}
    use_credentials(written_env, tmp_path, source, SECRETS | broken)
    said = run(written_env, "list").stderr
    assert "Invalid header value" in said
    assert "geheim" not in said
    assert fake.requests == []
