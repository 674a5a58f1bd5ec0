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

if TYPE_CHECKING:
    from pathlib import Path

PAGE = (CHECKOUT / "docs/access.md").read_text(encoding="utf-8")
SUDO = '#!/bin/sh\n[ "$1" != -u ] || shift 2\nexec "$@"\n'
SYSTEMCTL = '#!/bin/sh\necho "$*" >>"$CALLS"\n'
# docker compose run --rm --no-deps --entrypoint COMMAND lnd ...: runs the command here.
DOCKER = '#!/bin/sh\ncommand=$6\nshift 7\nexec "$command" "$@"\n'


def block(heading: str, number: int = 0) -> str:
    """Return a block of commands that comes after these words."""
    text = PAGE.partition(heading)[2]
    found = re.findall(r"(?<=\n\n)((?: {4}.*\n)+)", text)
    return re.sub(r"^ {4}", "", found[number], flags=re.MULTILINE)


MOVE = block("**3. Let LND write to the new place.**")
SET_ASIDE = block("**3. Let LND write to the new place.**", 1)
LOOK = block("**4. See that LND writes there.**")
UNDO, LOOK_AGAIN = block("### Undo method 1"), block("### Undo method 1", 1)


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
    """Whatever lnd.conf looks like, the path is added in the right section, and LND is restarted;
    that it writes there is believed only once it does.
    """
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


@pytest.mark.parametrize("line", ["backupfilepath=/elsewhere", "  backupfilepath = /elsewhere"])
def test_a_path_that_is_set_already_stops_it(node: Node, line: str) -> None:
    """LND would take one of two paths: nothing is changed, and LND goes on running."""
    node.conf.write_text(f"[Application Options]\n{line}\n")
    assert "STOP" in node.run(MOVE).splitlines()[-1]
    assert node.conf.read_text() == f"[Application Options]\n{line}\n"
    assert node.calls.read_text() == ""
    assert not node.new.exists()


@pytest.mark.parametrize("missing", ["conf", "old"])
def test_a_wrong_path_stops_it(node: Node, missing: str) -> None:
    """Without the file that a variable names, nothing is changed, and LND goes on running."""
    getattr(node, missing).unlink()
    assert "STOP" in node.run(MOVE).splitlines()[-1]
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


def test_it_can_be_undone(node: Node) -> None:
    """The newest file is at the old place again, the service is off, and LND writes there."""
    node.run(MOVE)
    node.lnd_writes(node.new)
    assert node.run(UNDO).splitlines()[-1].startswith("done")
    assert "backupfilepath" not in node.conf.read_text()
    assert node.old.read_bytes() == b"by LND"
    assert node.calls.read_text().splitlines()[2:] == [
        "stop lnd",
        "disable --now lnd-backup",
        "start lnd",
    ]
    assert node.run(LOOK_AGAIN).startswith("STOP")
    node.lnd_writes(node.old)
    assert node.run(LOOK_AGAIN).startswith("LND writes to")


def test_undoing_what_lnd_never_used_keeps_the_newer_file(node: Node) -> None:
    """If LND went on writing to the old place, what it wrote there stays."""
    node.run(MOVE)
    node.lnd_writes(node.old)
    assert node.run(UNDO).splitlines()[-1].startswith("done")
    assert node.old.read_bytes() == b"by LND"


def test_a_path_that_stays_stops_the_undoing(node: Node) -> None:
    """LND is not started while lnd.conf names a path in another way of writing it."""
    node.conf.write_text(f"backupfilepath = {node.new}\n")
    node.new.write_bytes(b"new")
    assert "STOP" in node.run(UNDO).splitlines()[-1]
    assert "start lnd" not in node.calls.read_text()


def test_a_path_that_was_set_before_is_brought_back(node: Node) -> None:
    """Who set a path of his own, and turned it into a comment, has it again after the undoing."""
    before = f"[Application Options]\n  backupfilepath={node.old}\nalias=a\n"
    node.conf.write_text(before)
    node.run(SET_ASIDE)
    assert node.run(MOVE).splitlines()[-1].startswith("done")
    node.lnd_writes(node.new)
    assert node.run(UNDO).splitlines()[-1].startswith("done")
    assert node.conf.read_text() == f"{before}\n[Application Options]\nno-backup-archive=1\n"


# --- docs/containers.md ---

CONTAINERS = (CHECKOUT / "docs/containers.md").read_text(encoding="utf-8")


def in_container(words: str) -> str:
    """Return the block of commands for LND's container that has these words."""
    found = re.findall(r"^( *)```sh\n(.*?)^ *```$", CONTAINERS, re.MULTILINE | re.DOTALL)
    [block] = [text for _, text in found if f"{words}" in text and "--entrypoint" in text]
    return str(block)


MOVE_THERE, UNDO_THERE = in_container("already names a path"), in_container("still names a path")
COMMENT_OUT = in_container("--entrypoint sed")


@pytest.mark.parametrize("line", ["", "backupfilepath=/elsewhere\n", "  backupfilepath = /else\n"])
def test_lnd_in_a_container_writes_to_its_old_path_again(node: Node, line: str) -> None:
    """The undoing brings back a path that was set before, and nothing else changes in lnd.conf."""
    before = f"[Application Options]\n{line}# backupfilepath=/example\n"
    node.conf.write_text(before)
    move, undo = (
        text.replace("/lnd-scb", str(node.new.parent)) for text in (MOVE_THERE, UNDO_THERE)
    )
    if line:
        assert "STOP" in node.run(move).splitlines()[-1]
        assert node.conf.read_text() == before
        assert not node.new.exists()
        node.run(COMMENT_OUT)
    assert node.run(move).splitlines()[-1].startswith("done")
    assert re.findall(r"^ *backupfilepath.*", node.conf.read_text(), re.MULTILINE) == [
        f"backupfilepath={node.new}"
    ]
    assert node.new.read_bytes() == b"old"
    node.lnd_writes(node.new)
    assert node.run(undo).splitlines()[-1].startswith("done")
    assert node.old.read_bytes() == b"by LND"
    assert node.conf.read_text() == f"{before}\n[Application Options]\nno-backup-archive=1\n"
