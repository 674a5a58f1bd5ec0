"""The steps of docs/access.md and docs/containers.md that move LND's file, run as the pages have
them, beside stand-ins for sudo, systemctl and docker: what could lead to a false BACKED UP stops
them.
"""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING, NamedTuple

import pytest
from kit import CHECKOUT
from shared import blocks

if TYPE_CHECKING:
    from pathlib import Path

SUDO = '#!/bin/sh\n[ "$1" != -u ] || shift 2\nexec "$@"\n'
SYSTEMCTL = '#!/bin/sh\necho "$*" >>"$CALLS"\n'
# docker compose run --rm --no-deps --entrypoint COMMAND lnd ...: runs the command here.
DOCKER = '#!/bin/sh\ncommand=$6\nshift 7\nexec "$command" "$@"\n'


def block(page: str, words: str) -> str:
    """Return the block of commands of a page that has these words."""
    [found] = [text for _, text in blocks(CHECKOUT / "docs" / page) if words in text]
    return found


ON_THE_HOST, IN_A_CONTAINER = (
    [block(page, words) for words in ("#before &", "already names a path", "still names a path")]
    for page in ("access.md", "containers.md")
)
_, MOVE, UNDO = ON_THE_HOST
LOOK, LOOK_AGAIN = (block("access.md", f"LND writes to ${place}") for place in ("new", "old"))


class Node(NamedTuple):
    """A node whose LND is about to write elsewhere."""

    conf: Path
    old: Path
    new: Path
    calls: Path  # what systemctl was told

    def run(self, commands: str) -> str:
        """Run commands of the page, and return all that they print."""
        values = {"unit": "lnd", "user": "bitcoin", "archive": "no-backup-archive=1"}
        values |= {"conf": str(self.conf), "old": str(self.old), "new": str(self.new)}
        told = {"PATH": f"{self.calls.parent}/bin:{os.environ['PATH']}", "CALLS": str(self.calls)}
        return subprocess.run(
            ["bash", "-c", commands],  # noqa: S607
            check=False,
            env=values | told,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        ).stdout

    def lnd_writes(self, path: Path) -> None:
        """Replace a file as LND does: it is newer than both."""
        path.write_bytes(b"by LND")
        later = max(self.old.stat().st_mtime_ns, self.new.stat().st_mtime_ns) + 1
        os.utime(path, ns=(later, later))


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """Return a node with the file at its old place."""
    (tmp_path / "bin").mkdir()
    for name, text in (("sudo", SUDO), ("systemctl", SYSTEMCTL), ("docker", DOCKER)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "scb").mkdir()
    made = Node(
        tmp_path / "lnd.conf",
        tmp_path / "old.backup",
        tmp_path / "scb/channel.backup",
        tmp_path / "calls",
    )
    made.old.write_bytes(b"old")
    made.conf.write_text("[Application Options]\nalias=a\n")
    made.calls.touch()
    return made


@pytest.mark.parametrize(
    "conf",
    [
        "[Application Options]\nalias=a\n\n[Bitcoin]\nbitcoin.node=bitcoind\n",
        "alias=a\n",
        "  [application options]  \n  alias = a\n",
        "[Application Options]\n# backupfilepath=/example\n;backupfilepath=\n",
        "[Bitcoin]\nbitcoin.node=bitcoind",
    ],
    ids=["header", "no header", "spaces", "comments", "no line break at the end"],
)
def test_lnd_is_told_the_new_place(node: Node, conf: str) -> None:
    """The path is in the right section; that LND writes there is believed once it does."""
    node.conf.write_text(conf)
    assert node.run(MOVE).splitlines()[-1].startswith("done")
    added = f"\n[Application Options]\nbackupfilepath={node.new}\nno-backup-archive=1\n"
    assert node.conf.read_text() == conf + added
    assert node.calls.read_text() == "stop lnd\nstart lnd\n"
    assert node.new.read_bytes() == b"old"
    assert node.run(LOOK).startswith("STOP")
    node.lnd_writes(node.old)
    assert node.run(LOOK).startswith("STOP")
    node.lnd_writes(node.new)
    assert node.run(LOOK).startswith("LND writes to")


@pytest.mark.parametrize(
    "change",
    [
        'rm "$conf"',
        'rm "$old"',
        'echo "backupfilepath=/elsewhere" >>"$conf"',
        'echo "  backupfilepath = /elsewhere" >>"$conf"',
    ],
)
def test_a_wrong_path_stops_it(node: Node, change: str) -> None:
    """Of two paths in lnd.conf, LND would take one: nothing is changed, and LND goes on running."""
    node.run(change)
    before = node.run('cat "$conf"')
    assert "STOP" in node.run(MOVE).splitlines()[-1]
    assert node.run('cat "$conf"') == before
    assert node.calls.read_text() == ""
    assert not node.new.exists()


@pytest.mark.parametrize("look", [LOOK, LOOK_AGAIN], ids=["the move", "the undoing"])
@pytest.mark.parametrize("missing", ["old", "new"])
def test_a_file_that_is_missing_is_no_proof(node: Node, look: str, missing: str) -> None:
    """`test` calls a file newer than one that is not there: nothing is believed of LND then."""
    node.run(MOVE)
    getattr(node, missing).unlink()
    assert node.run(look).startswith("STOP")


def test_a_copy_that_fails_stops_it(node: Node) -> None:
    """LND is not told a place that does not exist."""
    node.new.parent.rmdir()
    assert "done" not in node.run(MOVE)
    assert "backupfilepath" not in node.conf.read_text()


@pytest.mark.parametrize("place", ["new", "old"])
def test_it_can_be_undone(node: Node, place: str) -> None:
    """The newest file is at the old place again, also if LND never wrote to the new one."""
    node.run(MOVE)
    node.lnd_writes(getattr(node, place))
    assert node.run(UNDO).splitlines()[-1].startswith("done")
    assert "backupfilepath" not in node.conf.read_text()
    assert node.old.read_bytes() == b"by LND"
    told = node.calls.read_text().splitlines()[2:]
    timers = "stop lnd-backup.timer lnd-backup-check@lnd-backup.timer"
    assert told == ["stop lnd", "disable --now lnd-backup", timers, "start lnd"]
    if place == "new":
        assert node.run(LOOK_AGAIN).startswith("STOP")
    node.lnd_writes(node.old)
    assert node.run(LOOK_AGAIN).startswith("LND writes to")


def test_a_path_that_stays_stops_the_undoing(node: Node) -> None:
    """LND is not started while lnd.conf names a path in another way of writing it."""
    node.conf.write_text(f"backupfilepath = {node.new}\n")
    node.new.write_bytes(b"new")
    assert "STOP" in node.run(UNDO).splitlines()[-1]
    assert "start lnd" not in node.calls.read_text()


@pytest.mark.parametrize("line", ["", "backupfilepath=/elsewhere\n", "  backupfilepath = /else\n"])
@pytest.mark.parametrize("steps", [ON_THE_HOST, IN_A_CONTAINER], ids=["host", "container"])
def test_a_path_that_was_set_before_is_brought_back(
    node: Node, steps: list[str], line: str
) -> None:
    """Nothing else changes in lnd.conf."""
    before = f"[Application Options]\n{line}# backupfilepath=/example\n"
    node.conf.write_text(before)
    aside, move, undo = (step.replace("/lnd-scb", str(node.new.parent)) for step in steps)
    if line:
        assert "STOP" in node.run(move).splitlines()[-1]
        assert node.conf.read_text() == before
        assert not node.new.exists()
        node.run(aside)
    assert node.run(move).splitlines()[-1].startswith("done")
    paths = re.findall(r"^ *backupfilepath.*", node.conf.read_text(), re.MULTILINE)
    assert paths == [f"backupfilepath={node.new}"]
    assert node.new.read_bytes() == b"old"
    node.lnd_writes(node.new)
    assert node.run(undo).splitlines()[-1].startswith("done")
    assert node.old.read_bytes() == b"by LND"
    assert node.conf.read_text() == f"{before}\n[Application Options]\nno-backup-archive=1\n"
