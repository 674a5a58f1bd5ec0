"""Watch the program at work for twenty seconds: a stand-in for LND, the real daemon, and a real S3
server on this machine.

Nothing is taken on trust: each time is that of LND's rename or of the arrival of the daemon's log
line, what waits is what lies in the staging directory, and at the end the bucket is read with
another key and compared byte for byte. With `--picture FILE` it also draws a part of what it shows
(`make picture`).
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C during the imports: the end, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import io
import itertools
import queue
import re
import statistics
import sys
import tempfile
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from kit import (
    SCRIPT,
    VERSION_NAME,
    FaultProxy,
    Lnd,
    S3Server,
    Script,
    Written,
    run_on_terminal,
    settings_for,
)
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kit import StoredObject

BUCKET, PREFIX = "backups", "alice/"
SETTLE_SECONDS = 15.0
READING_SECONDS = 1.0
STOP_SECONDS = (
    12.0  # the grace period of 10 s, one more that is promised, and one for a slow machine
)
FOREVER_SECONDS = 3600.0
SLOW_LINE_SECONDS = 0.1
INDENT = 17
LIST_HEAD, LIST_TAIL = 6, 3  # what is shown of a list that is longer
PICTURE_WIDTH = 96
PICTURE_TITLE = "make demo"
INTERRUPTED = 130

OPENING = (
    "This demo runs the real daemon against a real S3 server on this machine. A stand-in for LND "
    "writes channel.backup; S3 goes away and comes back. It takes about 20 seconds, and nothing "
    "leaves this machine."
)
CLOSING = """What to do next:
  1. Make a bucket and a put-only key: README.md, "Run it by hand", step 1
  2. Install the service on the node:  README.md, "Install it"
  3. Do the drill, print the card:     docs/recovery.md"""


class InterruptedByWatcherError(Exception):
    """The watcher has seen enough."""


@dataclass(frozen=True)
class Line:
    """One line of the daemon's log and when it came; no text: the daemon has ended."""

    at: float
    text: str | None


@dataclass
class Version:
    """One version that LND wrote, and what the daemon's log says about it; `timed` if S3 was there
    to take it.
    """

    number: int
    written: Written
    timed: bool
    captured_at: float | None = None
    stored_at: float | None = None

    @property
    def waits(self) -> bool:
        """Tell whether it is captured and not yet stored."""
        return self.captured_at is not None and self.stored_at is None

    def after(self, moment: float | None) -> float:
        """Return the seconds from LND's rename to a moment."""
        return (moment or self.written.renamed_at) - self.written.renamed_at


class Inbox:
    """What the daemon says, stamped as it arrives, and the watcher's wish to end; read by the main
    thread alone.
    """

    def __init__(self) -> None:
        """Begin empty."""
        self.interrupted = False
        self._lines: queue.SimpleQueue[Line] = queue.SimpleQueue()

    def interrupt(self, *_: object) -> None:
        """Note that the watcher wants to end; a signal handler."""
        self.interrupted = True
        self._lines.put(Line(time.monotonic(), None))

    def follow(self, daemon: Script) -> None:
        """Take in each line of the daemon's log at the moment it comes, until it ends."""
        with contextlib.suppress(AssertionError):  # how the kit tells the end
            for count in itertools.count(1):
                text = daemon.wait_for_log(r"^.*\n", FOREVER_SECONDS, count)[0]
                self._lines.put(Line(time.monotonic(), text.rstrip()))
        self._lines.put(Line(time.monotonic(), None))

    def next(self, seconds: float) -> Line | None:
        """Return the next line, or None if none comes in time; raises when the watcher wants to
        end.
        """
        line = None
        with contextlib.suppress(queue.Empty):
            line = self._lines.get(timeout=max(0.0, seconds))
        if self.interrupted:
            raise InterruptedByWatcherError
        return line


class Screen:
    """A running log of who does what; `log` quotes the daemon's own. A terminal also shows the
    present state below.
    """

    STYLES = (
        ("LND", "magenta"),
        ("daemon", "cyan"),
        ("log", "dim cyan"),
        ("S3", "green"),
        ("disk", "yellow"),
    )

    def __init__(self, picture: Path | None = None) -> None:
        """Write to stdout, whatever its encoding can hold; for a picture, in one width."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        self.picture = picture
        width = PICTURE_WIDTH if picture else None
        self.console = Console(
            highlight=False,
            markup=False,
            emoji=False,
            width=width,
            force_terminal=bool(picture) or None,
        )
        self.plain = self.console.options.ascii_only and not picture
        self.began = time.monotonic()

    def say(self, text: str, style: str = "") -> None:
        """Print a paragraph."""
        self.console.print(textwrap.fill(text, self.console.width), style=style)

    def title(self, text: str) -> None:
        """Begin an act."""
        self.console.print()
        self.say(text, "bold")

    def fact(self, at: float, who: str, text: str, style: str = "") -> None:
        """Print what somebody did, with the seconds since the beginning."""
        first, *others = textwrap.wrap(
            text, max(20, self.console.width - INDENT), break_on_hyphens=False
        ) or [""]
        line = Text.assemble(
            (f"{at - self.began:7.3f}  ", "dim"),
            (f"{who:<8}", dict(self.STYLES)[who]),
            (first, style),
        )
        for other in others:
            line.append("\n" + " " * INDENT + other, style)
        self.console.print(line)

    @contextlib.contextmanager
    def drawn(self) -> Iterator[None]:
        """Take what is said meanwhile into the picture, if there is to be one."""
        self.console.record = self.picture is not None
        yield
        self.console.record = False

    def draw(self) -> None:
        """Write the picture, without what it would fetch from elsewhere."""
        if self.picture:
            self.console.record = True
            drawing = self.console.export_svg(title=PICTURE_TITLE, unique_id="demo")
            for useless in (
                r"<!--.*?-->",
                r"@font-face \{.*?\}",
                r"Fira Code, (?=monospace)",
                r" +$",
            ):
                drawing = re.sub(useless, "", drawing, flags=re.DOTALL | re.MULTILINE)
            self.picture.write_text(re.sub(r"\n{2,}", "\n", drawing), encoding="utf-8")

    def live(self, state: Callable[[], Text]) -> contextlib.AbstractContextManager[object]:
        """Keep the present state in the last line, where a terminal can do that."""
        if self.picture or not self.console.is_interactive:
            return contextlib.nullcontext()
        return Live(
            get_renderable=state, console=self.console, transient=True, refresh_per_second=12
        )


class Stage:
    """All that takes part, and what was seen of each version; leaving the `with` block kills the
    daemon.
    """

    def __init__(
        self, screen: Screen, inbox: Inbox, root: Path, server: S3Server, proxy: FaultProxy
    ) -> None:
        """Set the stage: a bucket, a key that may only put, LND's directory and the staging
        directory.
        """
        self.screen, self.inbox, self.root, self.server, self.proxy = (
            screen,
            inbox,
            root,
            server,
            proxy,
        )
        self.lnd, self.staging = Lnd(root / "lnd"), root / "staging"
        server.create_bucket(BUCKET)
        self.settings = settings_for(
            server, BUCKET, PREFIX, self.lnd, self.staging, endpoint=proxy.endpoint()
        )
        self.versions: list[Version] = []
        self.daemon: Script | None = None
        self.s3_there = True
        self.problems: list[str] = []
        self.stopping = self.ended = False

    def __enter__(self) -> Self:
        """Return the stage."""
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the daemon if it still runs."""
        if self.daemon:
            self.daemon.close()

    def start_daemon(self) -> None:
        """Start the real program with the settings alone, and follow its log."""
        self.daemon = Script(self.settings)
        threading.Thread(target=self.inbox.follow, args=[self.daemon], daemon=True).start()

    def write(self, channels: int) -> None:
        """Let LND write a version."""
        written = self.lnd.write(channels)
        version = Version(
            len(self.versions) + 1, written, timed=self.s3_there and self.daemon is not None
        )
        self.versions.append(version)
        size = f"{counted(channels, 'channel')}, {len(written.data)} bytes"
        self.screen.fact(written.renamed_at, "LND", f"wrote version {version.number}: {size}")

    def watch(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Show what the daemon does until the condition holds, the time is over or the daemon has
        ended.
        """
        deadline = time.monotonic() + seconds
        while (
            not (held := until())
            and not self.ended
            and (line := self.inbox.next(deadline - time.monotonic()))
        ):
            self.hear(line)
        return held

    def settle(self, reading_seconds: float = READING_SECONDS) -> None:
        """Wait until every version is stored, and then for the watcher's eye."""
        if self.problems:
            return
        came = self.watch(
            SETTLE_SECONDS, lambda: all(version.stored_at for version in self.versions)
        )
        if not came and not self.ended:
            self.problems.append(f"not every version was stored within {SETTLE_SECONDS:.0f} s")
        self.watch(reading_seconds)

    def hear(self, line: Line) -> None:
        """Show one line of the daemon's log, those about versions in words of the demo."""
        if line.text is None:
            self.ended = True
            if not self.stopping:
                self.problems.append("the daemon ended by itself")
        elif match := re.search(r" (captured|stored) \S*?([^\s/]+): \d+ bytes(.*)", line.text):
            self.note(line.at, match[1], match[2], match[3])
        else:
            text = re.sub(r"^[\d-]+ [\d:]+ ", "", line.text).replace(f"{self.root}/", "")
            loud = {"warning:": "yellow", "error:": "bold red", "critical:": "bold red"}
            self.screen.fact(line.at, "log", text, loud.get(text.partition(" ")[0], ""))

    def note(self, at: float, what: str, name: str, remark: str) -> None:
        """Note and show that a version was captured or stored; the end of its name tells which one
        it is.
        """
        version = next(
            (each for each in self.versions if name.endswith(each.written.sha256[-6:])), None
        )
        if version is None:
            self.screen.fact(at, "daemon", f"{what} {name}, which LND never wrote", "bold red")
            return
        if version.stored_at is not None:
            if what == "stored":
                again = (
                    f"stored version {version.number} again: the file on disk is always put last"
                )
                self.screen.fact(at, "S3", again)
            return
        if what == "captured":
            version.captured_at = at
        else:
            version.stored_at = at
        waiting = sum(each.waits for each in self.versions)
        if what == "captured":
            more = f" as {name}{remark}" if self.s3_there else f", {waiting} waiting in staging"
        else:
            more = f", {waiting} still waiting" if waiting else ""
        took = f"{what} version {version.number} in {shown_time(version.after(at))}"
        self.screen.fact(at, "daemon" if what == "captured" else "S3", took + more)

    def staged(self) -> list[str]:
        """Return the names of the versions that lie in the staging directory."""
        if not self.staging.is_dir():
            return []
        return sorted(
            entry.name for entry in self.staging.iterdir() if VERSION_NAME.fullmatch(entry.name)
        )

    def state(self) -> Text:
        """Return the present state: one mark for each version, from the first to the last."""
        stored, staged, neither = ("#", "o", ".") if self.screen.plain else ("■", "□", "·")
        text = (
            Text(" S3 is there ", "black on green")
            if self.s3_there
            else Text(" S3 is away  ", "white on red")
        )
        text.append("  ")
        for version in self.versions:
            if version.stored_at:
                text.append(stored, "green")
            else:
                text.append(staged if version.waits else neither, "yellow")
        waiting = sum(version.waits for version in self.versions)
        return text.append(f"  {len(self.versions)} written, {waiting} waiting")


# --- The acts ---


def act_start(stage: Stage) -> None:
    """Start the daemon, as a service does, on a node whose LND has no channels yet."""
    stage.screen.title(
        "The daemon starts with a key that can only put, and backs up the file that it finds"
    )
    for name, value in stage.settings.items():
        shown = "***" if "SECRET" in name else value.replace(f"{stage.root}/", "")
        stage.screen.console.print(f"         {name}={shown}", style="dim")
    stage.watch(READING_SECONDS)
    stage.write(0)
    stage.start_daemon()
    stage.settle()


def act_channels(stage: Stage) -> None:
    """Open channels."""
    stage.screen.title(
        "LND opens channels: each version is in the bucket milliseconds after LND's rename"
    )
    for channels in (1, 10, 100):
        stage.write(channels)
        stage.settle()


def act_burst(stage: Stage) -> None:
    """Write several versions within a second."""
    stage.screen.title("A burst: LND writes six versions in half a second, and every one is kept")
    for channels in range(101, 107):
        stage.write(channels)
        stage.watch(0.1)
    stage.settle()


def act_restart(stage: Stage) -> None:
    """Restart LND."""
    stage.screen.title("LND restarts: it writes the file when it stops and again when it starts")
    stage.write(106)
    stage.settle()
    stage.write(106)
    stage.settle()


def act_outage(stage: Stage) -> None:
    """Take S3 away while LND goes on writing."""
    stage.screen.title("S3 goes away while LND keeps writing: the versions wait on this disk")
    stage.proxy.set("refuse", cut=True)
    stage.s3_there = False
    for channels in range(107, 112):
        stage.write(channels)
        stage.watch(0.8)
    waiting = f"{counted(len(stage.staged()), 'version')} now in the staging directory"
    stage.screen.fact(time.monotonic(), "disk", waiting, "bold")
    stage.watch(READING_SECONDS)


def act_return(stage: Stage) -> None:
    """Bring S3 back, on a line slow enough for the eye, and let LND write: the daemon then tries
    at once.
    """
    stage.screen.title("S3 comes back on a slow line: the newest version goes first")
    stage.proxy.set("latency", up=SLOW_LINE_SECONDS, down=SLOW_LINE_SECONDS)
    stage.s3_there = True
    stage.write(112)
    waiting = [version for version in stage.versions if not version.stored_at]
    stage.settle(0.0)
    order = [version.number for version in sorted(waiting, key=lambda each: each.stored_at or 0.0)]
    how = ", the newest first" if order == sorted(order, reverse=True) else ""
    stage.screen.fact(
        time.monotonic(), "S3", f"got them in the order {', '.join(map(str, order))}{how}", "bold"
    )
    stage.watch(READING_SECONDS)


def act_stop(stage: Stage) -> None:
    """Stop LND and then the daemon, as systemd does."""
    stage.screen.title(
        "The machine shuts down: LND writes one last time, and the daemon gets SIGTERM"
    )
    if not stage.daemon:
        return
    stage.write(112)
    stage.stopping = True
    stage.daemon.signal(signal.SIGTERM)
    if not stage.watch(STOP_SECONDS, lambda: stage.ended):
        stage.problems.append(f"the daemon did not stop within {STOP_SECONDS:.0f} s")
        stage.daemon.signal(signal.SIGKILL)
    elif code := stage.daemon.wait():
        stage.problems.append(f"the daemon ended with exit code {code}")


def act_read_back(stage: Stage) -> None:
    """Ask for what the bucket holds, with a reader's key, and bring the file back as on the day of
    a loss.
    """
    stage.screen.title("The worst day: with a key that can only read, on any computer")
    stage.proxy.set("pass")
    reader = stage.server.reader_user(BUCKET)
    bucket = {
        name: value
        for name, value in stage.settings.items()
        if name not in ("MONITOR_FILE_PATH", "BACKUP_DIRECTORY")
    }
    bucket |= {"AWS_ACCESS_KEY_ID": reader.access_key, "AWS_SECRET_ACCESS_KEY": reader.secret_key}
    output = stage.root / "restored" / "channel.backup"
    output.parent.mkdir()
    node = {name: stage.settings[name] for name in ("MONITOR_FILE_PATH", "BACKUP_DIRECTORY")}
    for settings, arguments in (
        (node, ["check"]),
        ({}, ["list"]),
        ({}, ["restore", "--output", str(output)]),
    ):
        stage.screen.say(f"$ s3_backup_lnd_channels.py {arguments[0]}", "bold")
        code, seen = run_on_terminal(bucket | settings, *arguments, log=True)
        lines = [line.rstrip() for line in seen.splitlines()]
        lines = [line for line in lines if not line.startswith("20") or " using " not in line]
        for line in shortened(lines) if arguments[0] == "list" else lines:
            shown = line.replace(f"{stage.root}/", "").replace(
                f"{sys.executable} {SCRIPT}", SCRIPT.name
            )
            stage.screen.console.print(shown, style="dim", markup=False)
        if code:
            stage.problems.append(f"{arguments[0]} ended with exit code {code}")
            return
    if output.read_bytes() == stage.versions[-1].written.data:
        stage.screen.say("the restored file is what LND last wrote, byte for byte", "green")
    else:
        stage.problems.append("the restored file is not what LND last wrote")


def shortened(lines: list[str]) -> list[str]:
    """Return a list without its middle, if it is long."""
    left_out = len(lines) - LIST_HEAD - LIST_TAIL
    if left_out < 2:
        return lines
    return [*lines[:LIST_HEAD], f"  ... {left_out} more ...", *lines[-LIST_TAIL:]]


ACTS = (
    act_start,
    act_channels,
    act_burst,
    act_restart,
    act_outage,
    act_return,
    act_stop,
    act_read_back,
)
DRAWN = (act_outage, act_return)


# --- The proof ---


def prove(stage: Stage) -> bool:
    """Compare the bucket with what LND wrote, show it, and tell whether nothing is missing."""
    stage.screen.title(
        "The proof: every version that LND wrote, compared with the bucket byte for byte"
    )
    objects = stage.server.objects(BUCKET)
    held = {entry.data: key for key, entry in reversed(objects.items())}  # the first of two
    stage.screen.console.print(comparison(stage, held))
    stored = sum(version.written.data in held for version in stage.versions)
    staged = stage.staged()
    lost = sum(
        version.written.data not in held and not waits(version, staged)
        for version in stage.versions
    )
    stage.problems += shortcomings(stage, objects.values(), lost, len(staged))
    written = counted(len(stage.versions), "version")
    totals = f"{written} written, {stored} stored, {lost} lost, {len(staged)} left in staging."
    with stage.screen.drawn():
        stage.screen.console.print()
        stage.screen.say(totals, "bold red" if stage.problems else "bold green")
        for problem in stage.problems:
            stage.screen.say(f"FAILED: {problem}", "bold red")
        if not stage.problems:
            stage.screen.say(medians(stage.versions))
    return not stage.problems


def waits(version: Version, staged: list[str]) -> bool:
    """Tell whether a version lies in the staging directory."""
    return any(name.endswith(version.written.sha256[-6:]) for name in staged)


def comparison(stage: Stage, held: dict[bytes, str]) -> Table:
    """Return a row for every version that LND wrote, with the object that holds the same bytes."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for head in ("", "written, UTC", "channels", "bytes", "stored in"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column(f"in s3://{BUCKET}/{PREFIX}", no_wrap=True)
    table.add_column("", no_wrap=True)
    equal, different = ("ok", "NO") if stage.screen.plain else ("✓", "✗")
    for version in stage.versions:
        written, key = version.written, held.get(version.written.data)
        after = shown_time(version.after(version.stored_at)) if key and version.stored_at else "-"
        cells = [
            f"{written.wall:%H:%M:%S.%f}"[:-3],
            str(written.channels),
            str(len(written.data)),
            after,
        ]
        found = Text(key.removeprefix(PREFIX)) if key else Text("not in the bucket", "bold red")
        tick = Text(equal, "green") if key else Text(different, "bold red")
        table.add_row(str(version.number), *cells, found, tick)
    return table


def shortcomings(
    stage: Stage, objects: Iterable[StoredObject], lost: int, staged: int
) -> list[str]:
    """Return all that is wrong with the outcome."""
    written = {version.written.data for version in stage.versions}
    contents = [entry.data for entry in objects]
    faults = {
        "versions lost, neither in the bucket nor in the staging directory": lost,
        "versions left in the staging directory": staged,
        "objects with bytes that LND never wrote": sum(data not in written for data in contents),
        # one does: after the outage the newest is put once more, so that it is the last one
        "objects that repeat another": max(len(contents) - len(set(contents)) - 1, 0),
    }
    return [f"{what}: {count}" for what, count in faults.items() if count]


def medians(versions: list[Version]) -> str:
    """Return how long it took while S3 was there, from LND's rename on, by the arrival of the log
    lines.
    """
    timed = [
        version
        for version in versions
        if version.timed and version.captured_at and version.stored_at
    ]
    captured = statistics.median(version.after(version.captured_at) for version in timed)
    stored = statistics.median(version.after(version.stored_at) for version in timed)
    return (
        f"Median time from LND's rename: {shown_time(captured)} until captured, "
        f"{shown_time(stored)} until stored "
        f"({counted(len(timed), 'version')}, written while S3 was reachable)."
    )


def counted(count: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def shown_time(seconds: float) -> str:
    """Return a duration as people read it."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def perform(screen: Screen, inbox: Inbox) -> bool:
    """Play the acts below a temporary directory until something fails, and tell whether the proof
    succeeded.
    """
    with (
        tempfile.TemporaryDirectory(prefix="demo-") as directory,
        S3Server(Path(directory, "s3")) as server,
        FaultProxy(server.host, server.port) as proxy,
        Stage(screen, inbox, Path(directory), server, proxy) as stage,
    ):
        with screen.live(stage.state):
            for act in ACTS:
                if not stage.problems:
                    with screen.drawn() if act in DRAWN else contextlib.nullcontext():
                        act(stage)
        return prove(stage)


def main() -> int:
    """Show it all; the exit code is 0 only if every version is in the bucket."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw an SVG of it as well")
    screen, inbox = Screen(parser.parse_args().picture), Inbox()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, inbox.interrupt)
    screen.say(OPENING)
    try:
        proven = perform(screen, inbox)
    except Exception as error:
        if inbox.interrupted:
            screen.say("Interrupted; what was started is ended, and what was written is removed.")
            return INTERRUPTED
        if isinstance(error, RuntimeError):  # the kit's word for a server that does not start
            screen.say(str(error), "bold red")
            return 1
        raise
    screen.console.print("", CLOSING, sep="\n")
    if proven:
        screen.draw()
    return 0 if proven else 1


if __name__ == "__main__":
    sys.exit(main())
