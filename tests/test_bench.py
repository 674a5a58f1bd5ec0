"""The benchmark's instruments are right: the line, what it reads of processes, its tables and its
targets; and the pages tell its figures. The benchmark itself is `make bench`.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from kit import FakeS3, answers
from kit.line import Line, content
from kit.lnd import CHANNEL_SIZE, EMPTY_SIZE

import bench.__main__
from bench import losses, report, resources, speed
from bench.peers import AWS_V1, AWS_V2, BARE, CURL, PROGRAM, RCLONE
from bench.report import BACKLOG, COUNTED, READING, REST, START, Results, Rows, rename_to_stored
from bench.resources import TICKS, family, memory, peak_rss, usage, watched

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.unmeasured  # nothing of this starts the program

MEGABYTES = 64
PATIENCE_SECONDS = 10.0
BURN = "import time\nwhile time.process_time() < 0.3: pass\nprint(time.process_time(), flush=True)"
FILL = f"data = bytearray(b'x') * ({MEGABYTES} << 20)\nprint(flush=True)\ninput()"
GIVE_BACK = f"data = bytearray(b'x') * ({MEGABYTES} << 20)\ndel data\nprint(flush=True)\ninput()"
SLEEP = """
import time
for _ in range(2):
    print(flush=True)
    input()
    for _ in range(50): time.sleep(0.001)
"""


@contextlib.contextmanager
def connected(line: Line, *bodies: bytes) -> Iterator[http.client.HTTPConnection]:
    """Put these bodies over one connection, and yield it."""
    connection = http.client.HTTPConnection(line.endpoint.partition("//")[2], timeout=10)
    with contextlib.closing(connection):
        for number, body in enumerate(bodies):
            connection.request("PUT", f"/bucket/{number}", body)
            connection.getresponse().read()
        yield connection


def put(line: Line, *bodies: bytes) -> float:
    """Put these bodies over one connection, and return how long it took."""
    began = time.monotonic()
    with connected(line, *bodies):
        return time.monotonic() - began


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_line_tells_what_is_stored_when(fake: FakeS3, tmp_path: Path) -> None:
    """Each PUT that S3 acknowledged is told with its key, size and digest, and no other."""
    bodies = [b"first", b"", b"x" * 1_000_000]
    with Line(fake.port, tmp_path) as line:
        began = time.monotonic()
        put(line, *bodies)
        fake.script(answers.SLOW_DOWN)
        put(line, b"refused")
        stored = [line.wait_for(digest(data)) for data in bodies]
        assert [each[1:] for each in stored if each] == [
            (f"/bucket/{number}", len(data), digest(data)) for number, data in enumerate(bodies)
        ]
        times = [began, *(each.at for each in stored if each), time.monotonic()]
        assert times == sorted(times)
        assert len(line.stored()) == 3


def test_a_line_delays_and_counts(fake: FakeS3, tmp_path: Path) -> None:
    """A request takes a round trip, a connection one more; stored is in the middle."""
    seconds = 0.15
    with Line(fake.port, tmp_path, far=True) as line:
        line.set_round_trip(seconds)
        assert put(line, b"cold") >= 2 * seconds
        assert line.counts.round_trips == 2
        line.reset_counts()
        began = time.monotonic()
        assert put(line, b"one", b"two") >= 3 * seconds
        assert line.counts.round_trips == 3
        stored = line.wait_for(digest(b"two"))
        assert stored
        assert began + 2.5 * seconds <= stored.at <= time.monotonic() - 0.5 * seconds


def test_a_line_is_down_and_up(fake: FakeS3, tmp_path: Path) -> None:
    """In an outage connections are cut and refused; after it all is as before."""
    with Line(fake.port, tmp_path, far=True) as line:
        put(line, b"before")
        line.take_down()
        with pytest.raises(ConnectionError):
            put(line, b"while")
        line.bring_up()
        put(line, b"after")
        assert line.wait_for(digest(b"after"))
        assert [each.sha256 for each in line.stored()] == [digest(b"before"), digest(b"after")]


@pytest.mark.parametrize("far", [False, True])
def test_a_line_cuts(fake: FakeS3, tmp_path: Path, far: bool) -> None:  # noqa: FBT001 - a case
    """What is cut is closed for both sides."""
    with Line(fake.port, tmp_path, far=far) as line, connected(line, b"data") as connection:
        line.cut()
        try:
            assert connection.sock.recv(1) == b""
        except ConnectionResetError:
            assert far


def test_chunks_of_the_sdk_are_put_together() -> None:
    """What the SDK sends in chunks with a checksum behind it is told by its content."""
    head = b"PUT / HTTP/1.1\r\nContent-Encoding: aws-chunked\r\nx-amz-decoded-content-length: 5"
    chunks = b"3\r\nabc\r\n2\r\nde\r\n0\r\nx-amz-checksum-crc32:AAAA\r\n\r\n"
    assert content(head, chunks) == b"abcde"
    assert content(b"PUT / HTTP/1.1", chunks) == chunks


@contextlib.contextmanager
def running(code: str, *, as_child: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Run some Python code, or as the child of a shell that says when it is over."""
    command = [sys.executable, "-c", code]
    if as_child:
        command = ["sh", "-c", '"$@"; echo over; cat >/dev/null', "sh", *command]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    ) as process:
        try:
            yield process
        finally:
            process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    """Return the next line that it printed."""
    return process.stdout.readline() if process.stdout else ""


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def test_cpu_time_of_ended_children_counts() -> None:
    """The CPU time of a group is there when the child that used it is not."""
    with running(BURN, as_child=True) as process:
        used = float(said(process))
        assert said(process) == "over\n"
        assert family(process.pid)[0] == process.pid
        assert used - 3 / TICKS <= usage(family(process.pid)).cpu < used + 0.3


def test_peak_of_memory_of_a_child() -> None:
    """The peak holds what a child had that is gone, and what is measured afterwards does not."""
    with running(FILL, as_child=True) as process:
        with watched(process.pid) as seen:
            assert said(process) == "\n"
            began = time.monotonic()
            while seen[-1].pss < MEGABYTES and time.monotonic() < began + PATIENCE_SECONDS:
                time.sleep(0.01)
            tell(process)
            assert said(process) == "over\n"
        after = memory(family(process.pid))
    assert after.rss < MEGABYTES < max(each.pss for each in seen)
    assert all(each.pss <= each.rss for each in seen)


def test_peak_of_memory_that_was_given_back() -> None:
    """The kernel remembers the largest RSS of a process; what processes have now is added up."""
    with running(GIVE_BACK) as process:
        assert said(process) == "\n"
        one, two = memory([process.pid]), memory([process.pid] * 2)
        assert one.rss < MEGABYTES < peak_rss(process.pid)
        assert two.rss == pytest.approx(2 * one.rss, rel=0.1)
        tell(process)


def test_wake_ups() -> None:
    """Each time that a process waits and goes on is one wake-up, and takes some CPU time."""
    with running(SLEEP) as process:
        assert said(process) == "\n"
        before = usage([process.pid])
        tell(process)
        assert said(process) == "\n"
        after = usage([process.pid])
        assert 50 <= after.wake_ups - before.wake_ups < 100
        assert 0 < after.cpu - before.cpu < 1
        tell(process)


def test_what_has_ended_has_no_memory() -> None:
    """A process that ended while it was looked at does not disturb the others' figures."""
    with subprocess.Popen([sys.executable, "--version"], stdout=subprocess.DEVNULL) as process:
        process.wait()
    assert memory([process.pid]) == (0, 0)
    assert usage([process.pid]) == (0, 0)
    with pytest.raises(FileNotFoundError):
        peak_rss(process.pid)


def made_up(rows: list[report.Row], missing: dict[str, str] | None = None) -> Results:
    """Return results with these rows."""
    return Results("2026-01-01T00:00+00:00", {"cores": 2}, {PROGRAM: "0"}, missing or {}, rows)


def test_rows_collect_values() -> None:
    """Values of the same figure, contestant and case are one row, others rows of their own."""
    rows = Rows()
    for staged in (100, 7, 100):
        rows.add("group", "PSS", "MB", PROGRAM, 1.23456, 2, staged=staged)
    assert [(row.case, row.values) for row in rows] == [
        ({"staged": 100}, [1.235, 2, 1.235, 2]),
        ({"staged": 7}, [1.235, 2]),
    ]


def test_a_table_has_medians_spreads_and_ratios() -> None:
    """A cell shows the median, the quartiles and the ratio."""
    rows = Rows()
    rows.add("group", "figure", "ms", RCLONE, 40.0, size="45 B")
    rows.add("group", "figure", "ms", BARE, 1.0, 2.0, 3.0, size="45 B")
    rows.add("group", "figure", "ms", PROGRAM, 4.0, 1.0, 2.0, 3.0, 5.0, size="45 B")
    rows.add("group", "figure", "ms", CURL, size="45 B")
    assert report.tables(made_up(rows))[0].splitlines() == [
        "### group, ms",
        "",
        "|  | figure, size 45 B |",
        "| --- | ---: |",
        f"| {PROGRAM} | 3 (1.5 to 4.5), 1.5 of bare |",
        f"| {BARE} | 2 (1 to 3), 0.667x |",
        f"| {RCLONE} | 40, 13.3x |",
    ]


def test_a_target_is_met_or_not_or_not_measured() -> None:
    """The worst figure counts, and where one is missing, the target is not measured."""
    rows = Rows()
    verdict = {each.what: each.verdict for each in report.TARGETS}
    start = verdict["time from start to first version stored, against `aws s3 cp`"]
    idle = verdict["idle processor time, ms an hour"]
    assert {each(made_up(rows)) for each in verdict.values()} == {"not measured"}
    rows.add(START, "", "ms", PROGRAM, 80)
    rows.add(START, "", "ms", AWS_V1, 120)
    assert start(made_up(rows)) == "not measured"
    rows.add(START, "", "ms", AWS_V2, 100)
    assert start(made_up(rows)) == "met"
    rows.add(START, "", "ms", PROGRAM, 81, 81)
    assert start(made_up(rows)) == "not met"
    rows.add(REST, "CPU time", "ms per hour", PROGRAM, 90)
    assert idle(made_up(rows)) == "met"
    told = report.summary(made_up(rows))
    assert f"met 1 on 2026-01-01, missed 1, and {len(verdict) - 2} were not measured" in told


def test_every_target_finds_its_figures() -> None:
    """What a target compares is in the stored results, under these very names."""
    results = Results.load()
    assert [each.what for each in report.TARGETS if each.measured(results) is None] == []


def test_what_was_left_out_is_told_with_its_reason() -> None:
    """A peer that could not be installed is named."""
    told = report.setting(made_up([], {"some peer": "no such package"}))
    assert "some peer: not measured: no such package" in told


def test_results_are_stored_as_they_are(tmp_path: Path) -> None:
    """What is stored is read, and written as the same bytes: a row in a line."""
    Results.load().save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == report.STORED.read_bytes()
    assert report.STORED.read_text().count('\n  {"group"') == len(Results.load().rows)


@pytest.mark.parametrize(
    ("options", "missing", "stored"),
    [([], {}, True), (["--quick"], {}, False), ([], {RCLONE: "no root"}, False)],
)
def test_only_a_whole_run_replaces_the_figures(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    missing: dict[str, str],
    stored: bool,  # noqa: FBT001 - a case
) -> None:
    """A quick run, and one that left a peer out, leave the stored results and the pages alone."""
    pages: list[str] = []
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    monkeypatch.setattr(bench.__main__, "PARTS", ())
    monkeypatch.setattr(bench.__main__, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(bench.__main__, "install_all", lambda: ([], missing))
    monkeypatch.setattr(bench.__main__, "end_what_was_started", lambda: None)
    monkeypatch.setattr(report, "STORED", tmp_path / "results.json")
    monkeypatch.setattr(report, "main", lambda: pages.append("written"))
    (tmp_path / "cache").mkdir()
    assert bench.__main__.main() == 0
    assert (tmp_path / "results.json").exists() == stored
    assert (tmp_path / "cache/results.json").exists() != stored
    assert pages == ["written"] * stored


def test_the_documents_tell_the_stored_results() -> None:
    """If they do not: run `python -m bench.report`."""
    results = Results.load()
    for path, whole in report.documents(results).items():
        assert path.read_text() == whole, path


def prose(path: Path) -> list[str]:
    """Return the paragraphs of a page that are not made from the results, and without code."""
    head, _, rest = path.read_text().partition(report.BEGIN)
    plain = re.sub(r"`[^`]*`", "", head + rest.partition(report.END)[2])
    parts = re.split(r"\n\n+|\n(?=\W*[-|] )", plain)
    return [" ".join(part.split()) for part in parts if not part.startswith("    ")]


def counted(scheme: str, connection: str) -> float:
    row = Results.load().find(COUNTED, PROGRAM, case={"scheme": scheme, "connection": connection})
    assert row
    return row.median


def test_every_number_of_the_page_comes_from_the_run() -> None:
    """Whatever number docs/performance.md has beside its tables is a setting of the benchmark or a
    stored result. What was tried is told apart: `make bench` does not repeat it.
    """
    results = Results.load()
    listed = results.find(READING, PROGRAM, "counted, handshake included", {"command": "list"})
    assert listed
    trips = [counted(*each) for each in (("http", "warm"), ("http", "cold"), ("https", "cold"))]
    known = [
        f"awscli {results.versions[AWS_V1][0]}",
        f"({losses.PAIR_GAP_SECONDS * 1e3:g} ms between the two",
        f"outages of {losses.FULL.outage:g} s",
        f"up to {resources.UPDATES_MAX} updates",
        f"over {resources.FULL.idle:g} s, scaled",
        f"a line of {speed.DRAIN_ROUND_TRIP_SECONDS * 1e3:g} ms",
        f"first {speed.BACKLOGS[0]} versions",
        "a backlog of {} and of {:,}".format(*speed.BACKLOGS),
        f"{EMPTY_SIZE + CHANNEL_SIZE * speed.USUAL:,} bytes",
        "{:g} on an open connection, {:g} on a new one over http, {:g} over https".format(*trips),
        f"each {int(listed.case['objects']) / (listed.median - 1):,g} objects",
    ]
    told, _, rest = " ".join(prose(report.DOCUMENT)).partition("## What was tried")
    tried, _, uncovered = rest.partition("## What is not covered")
    assert "does not repeat these" in tried
    told += uncovered
    for phrase in known:
        assert told.count(phrase) == 1, phrase
        told = told.replace(phrase, "")
    assert re.findall(r"\S*(?<![\w])\d[\d.,]*(?!\w).{0,20}", told) == []
    assert f"first {speed.BACKLOGS[0]} versions" in BACKLOG
    assert f"{EMPTY_SIZE + CHANNEL_SIZE * speed.USUAL:,} B" in rename_to_stored("http", "warm")


def test_every_measured_number_of_the_readme_has_a_source() -> None:
    """A time, a size or a share in the README is a stored result, a setting of the benchmark, or
    stands beside the day or the run that it comes from.
    """
    own = f"two writes {losses.PAIR_GAP_SECONDS * 1e3:g} ms apart"
    text = "\n".join(prose(report.README))
    assert text.count(own) == 1
    measured = [
        part
        for part in text.replace(own, "").splitlines()
        if re.search(r"(?<![\w-])\d[\d.,]* ?(ms|s|MB|%|seconds|times)\b", part)
    ]
    assert measured
    for part in measured:
        assert re.search(r"\d+ [A-Z]\w+ 20\d\d|real LND above|The demo", part), part
