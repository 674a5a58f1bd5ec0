"""Answers of S3, and of what stands in its place, that are incomplete, odd, huge, slow or without
an end: each leads to a line, in bounded time and memory, and what is usable is used.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
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
    S3Server,
    channel_backup,
    hurried,
    run_script,
    settings_at,
    version_name,
)
from kit.answers import BLOCK, continuing, dripping, endless, entry, error, framed, head, listing
from shared import HOUR, NOON, put_version, say

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shared import Done, Env

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


def run(env: Env, *args: str, cwd: Path | None = None, timeout: float = 40) -> Done:
    """Run a command: no traceback, no line without end."""
    done = run_script(env, *args, cwd=cwd, timeout=timeout)
    assert "Traceback" not in done.stderr
    assert "fault of this program" not in done.stderr
    assert max(map(len, done.stderr.splitlines()), default=0) < LONGEST_LINE
    assert done.returncode in (0, 1, 75), done.stderr
    assert done.returncode == 0 or "error: " in done.stderr
    return done


def listed(env: Env) -> list[str]:
    """Return the keys that `list` shows."""
    done = run(env, "list", "--json")
    assert done.returncode == 0, done.stderr
    return [row["key"] for row in json.loads(done.stdout)]


def command_for(key: str, done: Done) -> list[str]:
    """Return the command that `restore` prints for the version before, without --output."""
    (line,) = re.findall(f"{key} is the version before it: (.*)", done.stderr)
    words = shlex.split(line)
    return words[words.index("restore") : words.index("--output")]


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
    for command in ("restore", "check", "once"):
        assert run(raw_env, command, cwd=home).returncode == 0
    assert (home / "channel.backup").read_bytes() == DATA


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
    done = run(raw_env, "restore", cwd=home)
    assert done.returncode == 1
    assert large in done.stderr
    assert f"hint: {KEY} is the version before it: " in done.stderr
    assert raw.sent < BOUND
    assert run(raw_env, "restore", "--key", large, cwd=home).returncode in (1, 75)
    assert raw.sent < 2 * BOUND
    assert not list(home.iterdir())


@pytest.mark.parametrize("how", ["length", "chunked"])
def test_a_version_that_is_cut(raw: RawS3, raw_env: Env, home: Path, how: str) -> None:
    """It is not written."""

    def version(_: Request) -> Iterable[bytes]:
        if how == "length":
            return [head(headers=FACTS | {"Content-Length": str(len(DATA))}), DATA[:-1]]
        return list(framed([DATA], how, headers=FACTS))[:-1]

    raw.reply = store(ONE, version)
    assert run(raw_env, "restore", cwd=home).returncode in (1, 75)
    assert not list(home.iterdir())


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


@pytest.mark.usefixtures("_hurried")
@pytest.mark.parametrize("command", ["once", "list"])
def test_a_message_of_ten_megabytes(raw: RawS3, raw_env: Env, command: str) -> None:
    """A beginning is shown; no answer to a put is read that far."""
    message = error("Odd", "words " + "x" * 10_000_000)
    raw.reply = lambda _: framed([message], status="400 Bad Request")
    said = run(raw_env, command).stderr
    assert len(said) < 2 * LONGEST_LINE
    if "words" in said:  # or it was too long to be read at all
        assert "Odd" in said
    assert "400" in said or command == "once"


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
def test_a_list_of_which_a_part_is_usable(raw: RawS3, raw_env: Env, home: Path, odd: str) -> None:
    """The version that is whole is used; what is lacking is warned of."""
    raw.reply = store(ODD[odd])
    assert KEY in listed(raw_env)
    done = run(raw_env, "restore", cwd=home)
    assert done.returncode == 0, done.stderr
    assert (home / "channel.backup").read_bytes() == DATA
    done = run(raw_env, "check")
    assert done.returncode == 0, done.stderr
    assert len(raw.requests) < 30
    assert odd not in ("no token", "fields") or "warning: " in run(raw_env, "list").stderr


@pytest.mark.parametrize(
    "truncated", ["true", "True", "false", ""], ids=["said", "capital", "denied", "unsaid"]
)
def test_a_list_goes_on_while_there_is_a_token(raw: RawS3, raw_env: Env, truncated: str) -> None:
    """It does so whatever else the page says."""
    first = listing(entry(KEY), truncated=truncated, token="more")
    first = first.replace(b"<IsTruncated></IsTruncated>", b"")
    second = listing(entry(OLDER))
    raw.reply = lambda request: framed(
        [second if "continuation-token=more" in request.path else first]
    )
    assert listed(raw_env) == [KEY, OLDER]


@pytest.mark.usefixtures("_hurried")
def test_each_page_and_each_file_has_its_own_time(raw: RawS3, raw_env: Env, home: Path) -> None:
    """All together they take longer than one answer may."""
    larger = channel_backup(9)
    versions = [
        ("alice/" + version_name(data, NOON - n * HOUR), data)
        for n, data in enumerate((DATA, larger, DATA, DATA))
    ]

    def reply(request: Request) -> Iterator[bytes | float]:
        yield A_MINUTE / 6
        if not is_list(request):
            yield from whole(larger if versions[1][0] in request.path else DATA)
            return
        number = int(request.path.partition("continuation-token=")[2].partition("&")[0] or 0)
        key, data = versions[number]
        token = str(number + 1) if number < 3 else None
        truncated = "true" if token else "false"
        yield from framed([listing(entry(key, len(data)), truncated=truncated, token=token)])

    raw.reply = reply
    done = run(raw_env, "restore", cwd=home, timeout=4 * A_MINUTE)
    assert done.returncode == 0, done.stderr
    assert (home / "channel.backup").read_bytes() == DATA
    assert (home / "channel.backup.2").read_bytes() == larger


def test_two_versions_of_one_second_keep_their_order(raw: RawS3, raw_env: Env, home: Path) -> None:
    """S3 cuts its times to the second, so the later name decides."""
    newest = channel_backup(1)
    older = "alice/" + version_name(DATA, NOON + timedelta(milliseconds=900))
    newer = "alice/" + version_name(newest, NOON + timedelta(milliseconds=1100))
    page = listing(*(entry(key, len(DATA), "2026-03-01T12:00:00.000Z") for key in (older, newer)))
    objects = {older: DATA, newer: newest}
    raw.reply = store(page, lambda request: whole(objects[request.path.split("/", 2)[2]]))
    assert listed(raw_env) == [newer, older]
    assert run(raw_env, "restore", cwd=home).returncode == 0
    assert (home / "channel.backup").read_bytes() == newest
    objects[newer] = b"x" * len(newest)
    done = run(raw_env, "restore", "--output", "second", cwd=home)
    assert done.returncode == 1
    assert run(raw_env, *command_for(older, done), "--output", "third", cwd=home).returncode == 0
    assert (home / "third").read_bytes() == DATA


@pytest.mark.parametrize(
    "page",
    [listing(entry(KEY, missing="Key")), listing(truncated="true")],
    ids=["nothing", "no token"],
)
def test_a_list_of_which_nothing_is_usable(raw: RawS3, raw_env: Env, page: bytes) -> None:
    """It is a failure, and not an empty bucket."""
    raw.reply = lambda _: framed([page])
    assert run(raw_env, "restore").returncode in (1, 75)


@pytest.mark.usefixtures("_hurried")
@pytest.mark.parametrize("tokens", ["the same", "new ones"])
def test_a_list_that_never_ends(raw: RawS3, raw_env: Env, tokens: str) -> None:
    """It is left after some pages, in a circle or not, with a line."""
    numbers = itertools.count()

    def page(_: Request) -> Iterable[bytes]:
        number = next(numbers)
        key = "alice/" + version_name(DATA, NOON + timedelta(seconds=number))
        token = "again" if tokens == "the same" else f"token-{number}"
        return framed([listing(entry(key), truncated="true", token=token)])

    raw.reply = page
    done = run(raw_env, "list", "--json")
    assert len(raw.requests) <= (2 if tokens == "the same" else 100)
    assert "warning: " in done.stderr


@pytest.mark.parametrize("lacking", ["x-amz-meta-sha256", "a digest", "all", "a date"])
def test_a_version_without_a_header(raw: RawS3, raw_env: Env, home: Path, lacking: str) -> None:
    """It is written if its bytes can be verified, and refused in words otherwise."""
    headers = {name: value for name, value in FACTS.items() if lacking not in (name, "all")}
    headers |= {"Last-Modified": "yesterday"} if lacking == "a date" else {}
    headers |= {"x-amz-meta-sha256": ""} if lacking == "a digest" else {}
    raw.reply = store(ONE, lambda _: framed([DATA], headers=headers))
    done = run(raw_env, "restore", cwd=home)
    if lacking in ("x-amz-meta-sha256", "a digest"):
        assert done.returncode == 0, done.stderr
        assert re.search(f"warning: .*{KEY}", done.stderr)
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
    raw: RawS3, raw_env: Env, home: Path, status: str, code: str, message: str
) -> None:
    """It is named, with S3's words, and the printed command restores the one before."""
    newest = "alice/" + version_name(b"newest", NOON + HOUR)

    def version(request: Request) -> Iterable[bytes]:
        if KEY in request.path:
            return whole(DATA)
        return framed([error(code, message)], status=status)

    raw.reply = store(listing(entry(KEY), entry(newest, stored_at="2026-03-01T13:00:00Z")), version)
    done = run(raw_env, "restore", cwd=home)
    assert (done.returncode, list(home.iterdir())) == (1, [])
    assert re.search(f"{newest}.*{code}", done.stderr)
    assert run(raw_env, *command_for(KEY, done), cwd=home).returncode == 0
    assert (home / "channel.backup").read_bytes() == DATA


def test_versions_without_metadata(s3: S3Server, bucket: str, reader: Env, home: Path) -> None:
    """Another tool copied them: size and six digits decide, with a warning."""
    other = {"mtime": "1"}
    put_version(s3, bucket, NOON, channel_backup(3), metadata=other)
    key = put_version(s3, bucket, NOON + HOUR, DATA, metadata=other)
    done = run(reader, "restore", cwd=home)
    assert done.returncode == 0, done.stderr
    assert re.search(f"warning: .*{key}", done.stderr)
    assert (home / "channel.backup").read_bytes() == DATA
    s3.admin.put_object(Bucket=bucket, Key=key, Body=b"\0" + DATA[1:], Metadata=other)
    assert run(reader, "restore", "--key", key, "--output", "damaged", cwd=home).returncode == 1
    assert not (home / "damaged").exists()


# --- Answers that hang ---


HANGING: dict[str, Callable[[], Iterable[bytes | float]]] = {
    "headers": lambda: dripping(b"HTTP/1.1 200 OK\r\nX-Slow: "),
    "error": lambda: dripping(head("500 Oops") + b"<Error><Code>"),
    "body": lambda: dripping(head(headers=FACTS | {"Content-Length": "700"})),
    "continue": continuing,
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
            output = ("--output", str(home / "restored")) if command == "restore" else ()
            done = run(env, command, *output)
            return done, time.monotonic() - raw.asked_at

    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(timed, ("once", "list", "check", "restore")))
    assert [done.returncode for done, _ in ends] == [75] * 4
    once, *others = (done.stderr for done, _ in ends)
    assert "sent in time: 1: S3 or the source of credentials does not answer" in once
    for said in others:
        assert re.search("error: .*: no answer in time\n.*hint: check the network", said)
    assert max(took for _, took in ends) < A_MINUTE + 2
    assert not (home / "restored").exists()


@pytest.mark.parametrize("how", HANGING)
def test_the_daemon_outlives_answers_that_hang(
    raw: RawS3, raw_env: Env, lnd: Lnd, started_by: Callable[[str], None], how: str
) -> None:
    """Each attempt has an end, and versions are stored as soon as S3 is well again."""
    started_by(hurried(60))
    raw.reply = lambda _: HANGING[how]()
    with Daemon(raw_env | {"SHUTDOWN_GRACE_SECONDS": "0"}) as daemon:
        for count in range(1, 4):
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
VALUES = {"aws_access_key_id": "AKIDMADEUP"} | SECRETS


@pytest.mark.parametrize(
    ("source", "command"), [("environment", "once"), ("credentials", "list"), ("process", "once")]
)
def test_a_secret_in_an_answer_is_not_shown(
    fake: FakeS3, written_env: Env, tmp_path: Path, source: str, command: str
) -> None:
    """It is masked wherever it came from."""
    written_env |= {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    file = tmp_path / "file"
    if source == "environment":
        written_env |= {name.upper(): value for name, value in VALUES.items()}
    elif source == "credentials":
        lines = [f"{name} = {value}" for name, value in VALUES.items()]
        file.write_text("\n".join(["[default]", *lines]))
        written_env["AWS_SHARED_CREDENTIALS_FILE"] = str(file)
    else:
        names = ("AccessKeyId", "SecretAccessKey", "SessionToken")
        printed = {"Version": 1} | dict(zip(names, VALUES.values(), strict=True))
        (tmp_path / "printed.json").write_text(json.dumps(printed))
        file.write_text(f"[default]\ncredential_process = cat {tmp_path}/printed.json\n")
        written_env["AWS_CONFIG_FILE"] = str(file)
    say(fake, 400, error("InvalidToken", f"malformed: {' and '.join(SECRETS.values())}."))
    done = run(written_env, command)
    assert done.returncode == 1
    assert "malformed" in done.stderr
    assert not any(secret in done.stderr + done.stdout for secret in SECRETS.values())


@pytest.mark.parametrize("source", ["credentials", "process"])
def test_a_secret_that_is_broken_over_lines_is_not_shown(
    fake: FakeS3, written_env: Env, tmp_path: Path, source: str
) -> None:
    """No request can bear it, and what is told of that has none of its lines."""
    written_env |= {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    first, second = "geheim-and-long", "geheim-and-longer"
    if source == "credentials":
        lines = "aws_access_key_id = A\naws_secret_access_key = made-up-secret\n"
        (tmp_path / "file").write_text(
            f"[default]\n{lines}aws_session_token = {first}\n  {second}\n"
        )
        written_env["AWS_SHARED_CREDENTIALS_FILE"] = str(tmp_path / "file")
    else:
        key = {"AccessKeyId": "A", "SecretAccessKey": "made-up-secret"}
        printed = {"Version": 1, "SessionToken": f"{first}\n{second}\n"} | key
        (tmp_path / "printed.json").write_text(json.dumps(printed))
        (tmp_path / "file").write_text(
            f"[default]\ncredential_process = cat {tmp_path}/printed.json\n"
        )
        written_env["AWS_CONFIG_FILE"] = str(tmp_path / "file")
    done = run(written_env, "list")
    assert "Invalid header value" in done.stderr
    assert "geheim" not in done.stderr
    assert fake.requests == []


# --- Errors ---


@pytest.mark.parametrize("command", ["once", "list"])
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
    raw: RawS3, raw_env: Env, started_by: Callable[[str], None], command: str, fields: str
) -> None:
    """It may be tried again, though fields are empty, nested or there twice."""
    started_by(hurried(4 * HURRY))
    raw.reply = lambda _: framed([f"<Error>{fields}</Error>".encode()], status="503 Slow Down")
    assert run(raw_env, command).returncode == 75
