"""The harness of the benchmark: what it measures with is right. The benchmark itself is `make
bench`.
"""

from __future__ import annotations

import hashlib
import http.client
import threading
import time
from typing import TYPE_CHECKING

import pytest
from kit import Answer, FakeS3
from kit.line import Line, content

from bench import losses, report
from bench.report import BARE, PROGRAM
from bench.results import Results
from bench.rows import Row

if TYPE_CHECKING:
    from pathlib import Path


def put(line: Line, *bodies: bytes) -> float:
    """Put these bodies over one connection, and return the seconds of the last."""
    connection = http.client.HTTPConnection(line.endpoint.partition("//")[2], timeout=10)
    began = 0.0
    for number, body in enumerate(bodies):
        began = time.monotonic()
        connection.request("PUT", f"/bucket/{number}", body)
        connection.getresponse().read()
    taken = time.monotonic() - began
    connection.close()
    return taken


def digest(data: bytes) -> str:
    """Return the SHA-256 of the data."""
    return hashlib.sha256(data).hexdigest()


def test_a_line_tells_what_is_stored_when(tmp_path: Path) -> None:
    """Each PUT that S3 acknowledged is told with its key, size and digest; one that it refused is
    not.
    """
    with FakeS3() as fake, Line(fake.port, tmp_path) as line:
        began = time.monotonic()
        put(line, b"first", b"", b"x" * 1_000_000)
        fake.script(Answer(503, "SlowDown"))
        put(line, b"refused")
        stored = [line.wait_for(digest(data)) for data in (b"first", b"", b"x" * 1_000_000)]
        assert [(each.key, each.size) for each in stored if each] == [
            ("/bucket/0", 5),
            ("/bucket/1", 0),
            ("/bucket/2", 1_000_000),
        ]
        times = [began, *(each.at for each in stored if each), time.monotonic()]
        assert times == sorted(times)
        assert line.wait_for(digest(b"refused"), 0) is None
        assert len(line.stored()) == 3


@pytest.mark.parametrize("seconds", [0.04, 0.15])
def test_a_line_delays_and_counts(tmp_path: Path, seconds: float) -> None:
    """A request takes a round trip, a connection one more, and so they are counted; stored is in
    the middle.
    """
    with FakeS3() as fake, Line(fake.port, tmp_path, far=True) as line:
        line.set_round_trip(seconds)
        assert put(line, b"cold") >= 2 * seconds
        assert line.counts.round_trips == 2
        line.reset_counts()
        began = time.monotonic()
        assert put(line, b"one", b"two") >= seconds
        assert line.counts.round_trips == 3
        ended = time.monotonic()
        stored = line.wait_for(digest(b"two"))
        assert stored
        assert began + 2.5 * seconds <= stored.at <= ended - 0.5 * seconds


def test_a_line_is_down_and_up(tmp_path: Path) -> None:
    """In an outage connections are cut and refused; after it all is as before."""
    with FakeS3() as fake, Line(fake.port, tmp_path, far=True) as line:
        put(line, b"before")
        line.take_down()
        with pytest.raises(ConnectionError):
            put(line, b"while")
        line.bring_up()
        put(line, b"after")
        assert line.wait_for(digest(b"after"))
        assert [each.sha256 for each in line.stored()] == [digest(b"before"), digest(b"after")]


@pytest.mark.parametrize("far", [False, True])
def test_a_line_cuts(tmp_path: Path, far: bool) -> None:  # noqa: FBT001 - a case
    """What is cut is closed for both sides."""
    with FakeS3() as fake, Line(fake.port, tmp_path, far=far) as line:
        connection = http.client.HTTPConnection(line.endpoint.partition("//")[2], timeout=10)
        connection.request("PUT", "/bucket/key", b"data")
        connection.getresponse().read()
        timer = threading.Timer(0.05, line.cut)
        timer.start()
        try:
            assert connection.sock.recv(1) == b""
        except ConnectionResetError:
            assert far
        timer.join()
        connection.close()


def test_chunks_of_the_sdk_are_put_together() -> None:
    """What the SDK sends in chunks with a checksum behind it is told by its content."""
    head = b"PUT / HTTP/1.1\r\nContent-Encoding: aws-chunked\r\nx-amz-decoded-content-length: 5"
    assert (
        content(head, b"3\r\nabc\r\n2\r\nde\r\n0\r\nx-amz-checksum-crc32:AAAA\r\n\r\n") == b"abcde"
    )
    assert content(b"PUT / HTTP/1.1", b"3\r\nabc\r\n0\r\n\r\n") == b"3\r\nabc\r\n0\r\n\r\n"


def made_up(rows: list[Row]) -> Results:
    """Return results with these rows."""
    return Results(
        "2026-01-01T00:00+00:00",
        {"cores": 2},
        {PROGRAM: "0"},
        {"some peer": "no such package"},
        rows,
    )


def test_a_table_has_medians_spreads_and_ratios() -> None:
    """A cell shows the median, the quartiles and the ratio to this program; this program's, that to
    the bare put.
    """
    rows = [
        Row("group", "figure", "ms", "rclone copyto", {"size": "45 B"}, [40.0]),
        Row("group", "figure", "ms", BARE, {"size": "45 B"}, [1.0, 2.0, 3.0]),
        Row("group", "figure", "ms", PROGRAM, {"size": "45 B"}, [4.0, 1.0, 2.0, 3.0, 5.0]),
        Row("group", "figure", "ms", "curl --aws-sigv4", {"size": "45 B"}, []),
    ]
    table = report.tables(made_up(rows))[0]
    assert table.header == ["", "figure, size 45 B"]
    assert table.title == "group, ms"
    assert table.lines == [
        [PROGRAM, "3 (1.5 to 4.5), 1.5 of bare"],
        [BARE, "2 (1 to 3), 0.667x"],
        ["rclone copyto", "40, 13.3x"],
    ]


def test_what_was_not_measured_meets_no_target() -> None:
    """A target is met, not met, or not measured; what is missing is named with its reason."""
    rows = [
        Row(losses.GROUP, "of 2", "", PROGRAM, {}, [0.0]),
        Row(losses.GROUP, "of 1", "", PROGRAM, {}, [1.0]),
    ]
    verdicts = {line[0]: line[-1] for line in report.targets(made_up(rows)).lines}
    assert verdicts.pop("versions lost, in pairs and outages") == "not met"
    assert set(verdicts.values()) == {"not measured"}
    assert report.targets(made_up(rows[:1])).lines[6][-1] == "met"
    assert "some peer: not measured: no such package" in report.setting(made_up([]))


def test_results_are_stored_as_they_are(tmp_path: Path) -> None:
    """What is stored is read again, a row in a line."""
    rows = [Row("group", "", "ms", PROGRAM, {"size": "45 B", "staged": 1}, [1.5, 2.25])] * 2
    made_up(rows).save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == made_up(rows)
    assert (tmp_path / "results.json").read_text().count('"unit": "ms"') == 2
    assert len((tmp_path / "results.json").read_text().splitlines()) == 10


def test_the_documents_tell_the_stored_results() -> None:
    """README, docs/performance.md and the plots say what bench/results.json says: run `python -m
    bench.report`.
    """
    results = Results.load()
    for path, whole in report.documents(results).items():
        assert path.read_text() == whole, path
