"""Nodes that are not as one thinks: clocks, mounts, disks and file systems."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kit import (
    SCRIPT,
    Answer,
    Daemon,
    FakeS3,
    FaultProxy,
    Lnd,
    RawS3,
    Request,
    S3Server,
    channel_backup,
    hurried,
    reader_settings,
    run_script,
    settings_at,
    settings_for,
    version_name,
)
from kit import script as script_module
from kit.raw_s3 import framed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

pytestmark = pytest.mark.unmeasured

DAY = 86400
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
LARGEST = 16 << 20
MEMORY_MAX_KB = 256 << 10
HURRY = 10
A_MINUTE = 60 / HURRY
AT_ONCE = {"SHUTDOWN_GRACE_SECONDS": "5", "RESCAN_SECONDS": "0.1"}
LIBFAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


# --- The clock ---

SHIFTED = """
import datetime, time
def shift():
    return float(open({path!r}).read() or 0)
class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)
    @classmethod
    def utcnow(cls):
        return cls.utcfromtimestamp(time.time())
right, right_ns = time.time, time.time_ns
time.time = lambda: right() + shift()
time.time_ns = lambda: right_ns() + int(shift() * 1e9)
datetime.datetime = Shifted
"""


class Clock:
    """The program's clock, which is so many seconds ahead of the right one, or behind it."""

    def __init__(self, file: Path, settings: dict[str, str]) -> None:
        """Begin with the right time; the settings make the program go by this clock."""
        self.file = file
        self.settings = settings
        self.set(0)

    def set(self, seconds: int) -> None:
        """Let it jump, also under a program that runs."""
        part = self.file.with_suffix(".part")
        part.write_text(f"{seconds:+d}")
        part.rename(self.file)


@pytest.fixture(params=["libfaketime", "python"])
def clock(
    request: pytest.FixtureRequest, tmp_path: Path, started_by: Callable[[str], None]
) -> Clock:
    """Return the clock of what is started: of the whole process, or of its Python alone."""
    file = tmp_path / "clock"
    if request.param == "python":
        started_by(SHIFTED.format(path=str(file)))
        return Clock(file, {})
    if not LIBFAKETIME:
        pytest.skip("libfaketime is not installed")
    return Clock(
        file,
        {
            "LD_PRELOAD": str(LIBFAKETIME[0]),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        },
    )


def expect_last(fake: FakeS3, version: bytes) -> None:
    """Expect that this version was put last, under the newest name, and that names did increase
    from put to put wherever the same version was put again.
    """
    puts = [request for request in fake.requests if request.method == "PUT"]
    assert puts[-1].body == version
    assert puts[-1].path == max(request.path for request in puts)
    assert len({request.path for request in puts}) == len(puts)


@pytest.mark.parametrize("days", [-730, 400], ids=["behind", "ahead"])
def test_versions_captured_under_a_wrong_clock(
    s3: S3Server,
    bucket: str,
    prefix: str,
    lnd: Lnd,
    staging: Path,
    home: Path,
    clock: Clock,
    days: int,
) -> None:
    """Versions captured under a wrong clock while S3 was away are stored once it is back, and the
    version on disk is what `restore` takes then: put last, under the newest name.
    """
    before = channel_backup(3)  # stored under the right clock
    s3.put_version(bucket, prefix + version_name(before, NOON), before)
    with FaultProxy(s3.host, s3.port) as proxy:
        proxy.set("refuse")
        env = settings_for(s3, bucket, prefix, lnd, staging, endpoint=proxy.endpoint())
        env |= clock.settings | {"SHUTDOWN_GRACE_SECONDS": "0"}
        clock.set(days * DAY)
        with Daemon(env) as daemon:
            for channels in (5, 6, 7):
                daemon.wait_for_captured(lnd.write(channels))
            assert daemon.stop() == 0
        clock.set(0)
        proxy.set("pass")
        done = run_script(env | {"SHUTDOWN_GRACE_SECONDS": "10"}, "once")
        assert done.returncode == 0, done.stderr
    wanted, objects = lnd.written[-1].data, s3.objects(bucket, prefix)
    assert objects[max(objects)].data == wanted
    assert max(objects.values(), key=lambda each: (each.last_modified, each.key)).data == wanted
    assert {each.data for each in lnd.written} == {each.data for each in objects.values()} - {
        before
    }
    reader = reader_settings(s3, bucket, prefix, s3.reader_user(bucket))
    done = run_script(reader, "restore", cwd=home)
    assert done.returncode == 0, done.stderr
    assert (home / "channel.backup").read_bytes() == wanted


@pytest.mark.parametrize("days", [-730, 400], ids=["behind", "ahead"])
def test_a_clock_that_is_put_right_while_the_daemon_runs(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, clock: Clock, days: int
) -> None:
    """A daemon that captured under a wrong clock puts the version on disk again when the clock is
    right, and that is all.
    """
    clock.set(days * DAY)
    fake.set_default(Answer(503, "SlowDown"))
    with Daemon(fake_env | clock.settings | AT_ONCE) as daemon:
        version = lnd.write()
        daemon.wait_for_captured(version)
        daemon.wait_for_log("SlowDown")
        clock.set(0)
        fake.set_default(Answer())
        daemon.wait_for_stored(version, count=2 if days < 0 else 1)
        daemon.wait_for_looks()
        assert daemon.stop() == 0
    del fake.requests[: -2 if days < 0 else -1]
    expect_last(fake, version.data)
    stored = fake.objects("some-bucket")
    assert len(stored) == (2 if days < 0 else 1)


def test_after_a_drain_the_version_on_disk_is_the_last(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, staging: Path
) -> None:
    """After an outage, in which several versions waited, the version on disk is put last, whatever
    the order of the others.
    """
    fake.set_default(Answer(403, "AccessDenied"))
    with Daemon(fake_env | AT_ONCE) as daemon:
        for channels in (1, 2, 3):
            daemon.wait_for_captured(lnd.write(channels))
        fake.wait_for_requests(1)
        daemon.signal(signal.SIGKILL)
    asked = len(fake.requests)
    fake.set_default(Answer())
    assert run_script(fake_env, "once").returncode == 0
    del fake.requests[:asked]
    expect_last(fake, lnd.written[-1].data)
    stored = fake.objects("some-bucket")
    assert {each.data for each in stored.values()} == {each.data for each in lnd.written}
    assert not list(staging.glob("2*"))


def test_names_increase_when_the_clock_jumps_back(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, clock: Clock
) -> None:
    """After a receipt under a clock that ran ahead, names go on from there, also after a
    restart.
    """
    env = fake_env | clock.settings
    for days in (400, -730, 0):
        clock.set(days * DAY)
        lnd.write()
        assert run_script(env, "once").returncode == 0
        expect_last(fake, lnd.written[-1].data)


def test_a_receipt_from_the_future(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, clock: Clock
) -> None:
    """A receipt that a clock dated 400 days ahead proves nothing, neither to `check` nor to the
    daemon.
    """
    env = fake_env | clock.settings
    lnd.write()
    os.utime(lnd.path, (time.time() - 3600,) * 2)  # it would have been backed up by now
    clock.set(400 * DAY)
    assert run_script(env, "once").returncode == 0
    assert run_script(env, "check").returncode == 0
    clock.set(0)
    done = run_script(env, "check")
    assert done.returncode == 1
    assert not done.stdout.startswith("BACKED UP")
    assert json.loads(run_script(env, "check", "--json").stdout)["current"] is False
    assert run_script(env, "once").returncode == 0
    assert run_script(env, "check").returncode == 0
    assert len(fake.objects("some-bucket")) == 2


# --- The file and its mount ---


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("command", ["run", "once", "check"])
def test_a_single_file_that_is_mounted(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, tmp_path: Path, command: str
) -> None:
    """A file that was bound into a container, and replaced outside, shows the old content for ever:
    a problem, and no success.
    """
    lnd.write()
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "channel.backup").touch()
    mount = f'mount --bind {lnd.path} {inside}/channel.backup && exec "$@"'
    wrapper = ["/usr/bin/unshare", "--mount", "/bin/sh", "-c", mount, "sh"]
    if subprocess.run([*wrapper, "true"], check=False).returncode:
        pytest.skip("no mounts here")
    env = fake_env | AT_ONCE | {"MONITOR_FILE_PATH": str(inside / "channel.backup")}
    if command == "run":
        with Daemon(env, command=[*wrapper, sys.executable, str(SCRIPT)]) as daemon:
            daemon.wait_for_stored(lnd.written[0])
            lnd.write()
            said = daemon.wait_for_log(r"(warning|error): .*\n.*hint: .*").group()
            assert re.search("(?i)directory|bind|mount", said)
            daemon.systemd.wait_for("(?i)STATUS=.*(deleted|no name|replaced|mount|removed)")
            assert daemon.stop() == 0
        return
    code = (
        "import os, subprocess, sys\n"
        f"os.rename({str(lnd.path)!r} + '.new', {str(lnd.path)!r})\n"
        f"sys.exit(subprocess.call([sys.executable, {str(SCRIPT)!r}, {command!r}]))"
    )
    if command == "check":
        assert run_script(fake_env, "once").returncode == 0
    asked = len(fake.requests)
    lnd.path.with_suffix(".backup.new").write_bytes(channel_backup(3))
    shell = [*wrapper, sys.executable, "-c", code]
    done = subprocess.run(
        shell,
        env=script_module.script_environment(env, str(tmp_path)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert not done.stdout.startswith("BACKED UP")
    assert "Traceback" not in done.stderr
    assert not [request for request in fake.requests[asked:] if request.method == "PUT"]


def test_the_largest_version(fake: FakeS3, fake_env: dict[str, str], lnd: Lnd) -> None:
    """A file of 16 MiB is backed up, and one that has a byte more is refused, while what is staged
    is sent all the same.
    """
    lnd.place(bytes(LARGEST))
    assert run_script(fake_env, "once").returncode == 0
    lnd.place(bytes(LARGEST + 1))
    done = run_script(fake_env, "once")
    assert done.returncode == 1
    assert str(LARGEST + 1) in done.stderr.replace(",", "")
    assert [len(request.body) for request in fake.requests] == [LARGEST]


def test_large_versions_fit_into_the_units_memory(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd
) -> None:
    """With three of the largest versions staged at once, and more that are too large, the daemon
    stays below the unit's MemoryMax=.
    """
    fake.hold()
    with Daemon(fake_env | AT_ONCE) as daemon:
        for _ in range(3):
            daemon.wait_for_captured(lnd.write(data=os.urandom(LARGEST)))
        for _ in range(3):
            lnd.place(os.urandom(63 << 20))
            daemon.wait_for_looks()
        lnd.path.unlink()
        fake.release()
        for version in lnd.written:
            daemon.wait_for_stored(version)
        assert {len(request.body) for request in fake.requests} == {LARGEST}
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        assert int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) < MEMORY_MAX_KB
        assert daemon.stop() == 0


def test_once_while_the_file_is_written_all_the_time(
    lnd: Lnd, staging: Path, started_by: Callable[[str], None]
) -> None:
    """When the file is rewritten every 50 ms and a put takes 200 ms, `once` ends within a minute
    all the same.
    """
    started_by(hurried(HURRY))
    ended = threading.Event()

    def slow(_: Request) -> Iterable[bytes | float]:
        yield 0.2
        yield from framed([], headers={"ETag": '"x"'})

    def write() -> None:
        while not ended.wait(0.05):
            lnd.write(1)

    lnd.write(1)
    writing = threading.Thread(target=write)
    writing.start()
    try:
        with RawS3(slow) as raw:
            done = run_script(settings_at(raw.endpoint, lnd, staging), "once", timeout=20)
            assert time.monotonic() - raw.asked_at < A_MINUTE + 2
    finally:
        ended.set()
        writing.join()
    assert done.returncode in (0, 75), done.stderr
    assert "Traceback" not in done.stderr


def test_once_sends_a_backlog_however_long_it_takes(
    lnd: Lnd, staging: Path, started_by: Callable[[str], None]
) -> None:
    """As long as S3 acknowledges version after version, `once` goes on beyond its minute, until all
    of them are sent.
    """
    started_by(hurried(4 * HURRY))
    sent = []

    def slow(request: Request) -> Iterable[bytes | float]:
        sent.append(request.body)
        yield 0.1
        yield from framed([], headers={"ETag": '"x"'})

    left = [channel_backup(1) for _ in range(25)]
    for minute, data in enumerate(left):
        (staging / version_name(data, NOON + timedelta(minutes=minute))).write_bytes(data)
    with RawS3(slow) as raw:
        done = run_script(settings_at(raw.endpoint, lnd, staging), "once", timeout=60)
        assert time.monotonic() - raw.asked_at > A_MINUTE / 4
    assert set(sent) == set(left)
    assert "waiting, and not sent" not in done.stderr


# --- The staging directory ---

UNLISTABLE = """
import os
listed = {{"scandir": os.scandir, "listdir": os.listdir}}
def failing(name):
    def call(path="."):
        whole = os.readlink(f"/proc/self/fd/{{path}}") if isinstance(path, int) else str(path)
        if os.path.exists({there!r}) and whole == {staging!r}:
            raise OSError({number}, os.strerror({number}))
        return listed[name](path)
    return call
for name in listed:
    setattr(os, name, failing(name))
"""


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_staging_directory_that_cannot_be_listed(
    fake: FakeS3,
    fake_env: dict[str, str],
    lnd: Lnd,
    staging: Path,
    tmp_path: Path,
    started_by: Callable[[str], None],
    number: int,
) -> None:
    """While the staging directory cannot be listed, each new version goes to S3 all the same."""
    there = tmp_path / "broken"
    started_by(UNLISTABLE.format(there=str(there), staging=str(staging), number=number))
    with Daemon(fake_env | AT_ONCE) as daemon:
        daemon.wait_for_stored(lnd.write())
        there.touch()
        for _ in range(2):
            version = lnd.write()
            daemon.wait_for_stored(version)
        assert version.data in [each.data for each in fake.objects("some-bucket").values()]
        daemon.wait_for_log(re.escape(os.strerror(number)))
        there.unlink()
        daemon.wait_for_stored(lnd.write())
        assert daemon.stop() == 0


# --- Where a version is restored to ---

LACKING = {
    "links": "os.link = refusing(os.link, errno.EPERM)",
    "modes": "os.chmod = os.fchmod = refusing(os.chmod, errno.EPERM)",
    "sync of a directory": """
synced = os.fsync
def fsync(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    synced(descriptor)
os.fsync = fsync""",
}
LACKING |= {"everything": "\n".join(LACKING.values())}
REFUSING = """
import errno, os, stat
def refusing(_, number):
    def call(*arguments, **more):
        {first}
        raise OSError(number, os.strerror(number))
    return call
"""


@pytest.mark.parametrize("lacking", LACKING)
def test_a_file_system_that_lacks_something(
    s3: S3Server,
    bucket: str,
    prefix: str,
    home: Path,
    started_by: Callable[[str], None],
    lacking: str,
) -> None:
    """Where there are no hard links (exFAT, SMB), no modes, or no sync of a directory, the version
    is written whole, and nothing is overwritten.
    """
    wanted = channel_backup(2)
    s3.put_version(bucket, prefix + version_name(wanted, NOON), wanted)
    reader = reader_settings(s3, bucket, prefix, s3.reader_user(bucket))
    started_by(REFUSING.format(first="pass") + LACKING[lacking])
    done = run_script(reader, "restore", cwd=home)
    assert done.returncode == 0, done.stderr
    assert [(path.name, path.read_bytes()) for path in home.iterdir()] == [
        ("channel.backup", wanted)
    ]
    assert stat.S_IMODE((home / "channel.backup").stat().st_mode) == 0o600
    (home / "channel.backup").write_bytes(b"mine")
    done = run_script(reader, "restore", cwd=home)
    assert done.returncode == 1
    assert [path.read_bytes() for path in home.iterdir()] == [b"mine"]


@pytest.mark.parametrize("what", ["file", "empty", "link"])
def test_what_appears_meanwhile_without_links(
    s3: S3Server,
    bucket: str,
    prefix: str,
    home: Path,
    started_by: Callable[[str], None],
    what: str,
) -> None:
    """Also without hard links, nothing that appears in the last moment is overwritten or
    followed.
    """
    wanted = channel_backup(2)
    s3.put_version(bucket, prefix + version_name(wanted, NOON), wanted)
    reader = reader_settings(s3, bucket, prefix, s3.reader_user(bucket))
    path = str(home / "channel.backup")
    first = {
        "file": f'open({path!r}, "w").write("mine")',
        "empty": f'open({path!r}, "w").close()',
        "link": f"os.symlink({str(home / 'elsewhere')!r}, {path!r})",
    }[what]
    started_by(REFUSING.format(first=first) + LACKING["links"])
    done = run_script(reader, "restore", cwd=home)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (only,) = home.iterdir()
    assert only.is_symlink() == (what == "link")
    assert what == "link" or only.read_bytes() == (b"mine" if what == "file" else b"")


@pytest.mark.parametrize(
    "encoding",
    [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1:strict"}],
    ids=["ascii", "latin"],
)
def test_a_stdout_that_cannot_encode(
    s3: S3Server, bucket: str, lnd: Lnd, staging: Path, home: Path, encoding: dict[str, str]
) -> None:
    """What stdout cannot encode, of a path or a prefix, is escaped, and the result is the same."""
    wanted, prefix = lnd.write().data, "ключ ü/"
    s3.put_version(bucket, prefix + version_name(wanted, NOON), wanted)
    user = s3.read_write_user(bucket)
    env = settings_at(s3.endpoint, lnd, staging, bucket=bucket, prefix=prefix, user=user) | encoding
    output = home / "копия"
    for args in (("restore", "--output", str(output)), ("list",), ("list", "--json"), ("check",)):
        done = run_script(env, *args)
        assert done.returncode == 0, done.stderr
        assert done.stdout
        assert "Traceback" not in done.stderr
    assert output.read_bytes() == wanted


@pytest.mark.parametrize(
    "encoding",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=["ascii", "C"],
)
def test_a_path_that_stdout_cannot_encode(
    s3: S3Server, bucket: str, prefix: str, home: Path, encoding: dict[str, str]
) -> None:
    """A path alone, outside of what stdout can encode, is escaped, too."""
    wanted = channel_backup(1)
    s3.put_version(bucket, prefix + version_name(wanted, NOON), wanted)
    reader = reader_settings(s3, bucket, prefix, s3.reader_user(bucket))
    done = run_script(reader | encoding, "restore", "--output", "ü", cwd=home)
    assert done.returncode == 0, done.stderr
    assert (home / "ü").read_bytes() == wanted
    assert "lncli" in done.stdout


def test_no_thread_can_be_started(
    fake_env: dict[str, str], fake: FakeS3, lnd: Lnd, started_by: Callable[[str], None]
) -> None:
    """When the system grants no thread, versions are captured, the log says why they are not sent,
    and they are sent once it grants one.
    """
    started_by("""
import threading
start = threading.Thread.start
left = [3]
def refuse(thread):
    if left[0]:
        left[0] -= 1
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = refuse
""")
    version = lnd.write()
    with Daemon(fake_env | AT_ONCE) as daemon:
        daemon.wait_for_log("warning: cannot store: can't start new thread\n.*hint: ")
        daemon.wait_for_stored(version)
        assert daemon.stop() == 0
    assert {request.body for request in fake.requests} == {version.data}
