"""Whatever lies around in the staging directory: `once` neither fails for it, nor sends it, nor
touches it.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit import FakeS3, Lnd, run_script, settings_at

EARLIER, LATER = "20260101T000000.000000Z", "20290101T000000.000000Z"
IMPOSSIBLE = "20260230T250000.000000Z"  # no such day, no such hour
KINDS = ["file", "file", "file", "directory", "link", "dangling link", "link to a device", "fifo"]


class Thing(NamedTuple):
    """One thing that lies around."""

    name: bytes
    kind: str
    data: bytes


def version_name(data: bytes, moment: str) -> bytes:
    """Return the name that a version of these bytes bears."""
    return f"{moment}-{hashlib.sha256(data).hexdigest()[-6:]}".encode()


odd_names = st.binary(min_size=1, max_size=80).map(
    lambda name: name.replace(b"/", b"_").replace(b"\0", b"_")
)
odd_names |= st.sampled_from(
    [b"\n", b"-rf", b" ", b"*", b"\xff\xfe", b"channel.backup", b"x" * 255, b"\x1b[2J"]
)
odd_names |= st.sampled_from([b".receipt~", b".lock.1", b".damaged-", b"notes.txt", b"..."])
contents = (
    st.binary(max_size=100)
    | st.just(b"{}")
    | st.just(b'{"name": 1}')
    | st.binary(min_size=400, max_size=500)
)


@st.composite
def things(draw: st.DrawFn) -> list[Thing]:
    """Return what lies around, each thing under another name."""
    found: dict[bytes, Thing] = {}
    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=5, max_size=40)):
        data = draw(contents)
        moment = draw(st.sampled_from([EARLIER, LATER, IMPOSSIBLE]))
        name = draw(
            odd_names
            | st.just(version_name(data, moment))
            | st.just(version_name(data + b"?", moment))
        )
        found[name] = Thing(name, kind, data)
    for own in draw(
        st.lists(st.sampled_from([b".receipt", b".x.partial", b"..receipt.partial"]), unique=True)
    ):
        found[own] = Thing(own, "file", draw(contents))
    return [thing for name, thing in found.items() if name not in (b".", b"..", b".lock")]


def put(directory: Path, thing: Thing) -> None:
    """Let a thing lie in the directory."""
    path = os.fsencode(directory) + b"/" + thing.name
    match thing.kind:
        case "directory":
            os.mkdir(path)
        case "link":
            os.symlink(os.fsencode(directory.parent / "target"), path)
        case "dangling link":
            os.symlink(b"nothing", path)
        case "link to a device":
            os.symlink(b"/dev/zero", path)
        case "fifo":
            os.mkfifo(path)
        case _:
            Path(os.fsdecode(path)).write_bytes(thing.data)


def identity(path: str) -> tuple[int, ...]:
    """Return what any change to the thing itself would alter; the name and the link count are left
    out.
    """
    status = os.lstat(path)
    return status.st_ino, status.st_mode, status.st_uid, status.st_size, status.st_mtime_ns


def is_version(thing: Thing) -> bool:
    """Tell whether a thing is a staged version, which is to be sent."""
    names = [version_name(thing.data, moment) for moment in (EARLIER, LATER)]
    return thing.name in names and thing.kind == "file" and len(thing.data) >= 45


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(things())
def test_once_is_not_bothered(lying: list[Thing]) -> None:
    """`once` sends LND's version, also as the last one, and the true staged ones, nothing else, and
    leaves every other thing as it is.
    """
    with tempfile.TemporaryDirectory() as name, FakeS3() as fake:
        directory = Path(name, "staging")
        directory.mkdir(mode=0o700)
        Path(name, "target").write_bytes(b"t" * 100)
        lnd = Lnd(Path(name, "lnd"))
        lnd.write()
        for thing in lying:
            put(directory, thing)
        before = {thing.name: identity(f"{directory}/{os.fsdecode(thing.name)}") for thing in lying}
        done = run_script(
            settings_at(fake.endpoint, lnd, directory, bucket="bucket", prefix=""), "once"
        )
        after = {identity(entry.path) for entry in os.scandir(directory)}
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "\x1b" not in done.stderr
        versions = {thing.name: thing.data for thing in lying if is_version(thing)}
        for thing in lying:
            own = thing.name.startswith(b".receipt") or thing.name.endswith(b".partial")
            if thing.name not in versions and not own:
                assert before[thing.name] in after, f"{thing} is not as it was"
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        sent = {key: entry.data for key, entry in fake.objects("bucket").items()}
        assert {os.fsdecode(name): data for name, data in versions.items()}.items() <= sent.items()
        # LND's goes out once more if others went out after it.
        own_puts = [data for key, data in sent.items() if key.encode() not in versions]
        assert set(own_puts) == {lnd.written[-1].data}
        assert len(own_puts) == 1 + bool(versions)
        assert fake.requests[-1].body == lnd.written[-1].data
