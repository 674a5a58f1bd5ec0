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
from typing import TYPE_CHECKING

from kit import (
    SCRIPT,
    FaultProxy,
    Lnd,
    S3Server,
    Script,
    Written,
    find_problems,
    reader_settings,
    run_on_terminal,
    settings_for,
)
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from shared import staged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BUCKET, PREFIX = "backups", "alice/"
SETTLE_SECONDS = 15.0
READING_SECONDS = 1.0
# The grace period of 10 s, one more that is promised, and one for a slow machine.
STOP_SECONDS = 12.0
FOREVER_SECONDS = 3600.0
SLOW_LINE_SECONDS = 0.1
INDENT = 17
PICTURE_WIDTH = 96
INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STYLES = {"LND": "magenta", "daemon": "cyan", "log": "dim cyan", "S3": "green", "disk": "yellow"}

OPENING = (
    "This demo runs the real daemon against a real S3 server on this machine. A stand-in for LND "
    "writes channel.backup; S3 goes away and comes back. It takes about 20 seconds, and nothing "
    "leaves this machine."
)
CLOSING = """What to do next:
  1. Make a bucket and a put-only key: README.md, "Run it by hand", step 1
  2. Install the service on the node:  README.md, "Install it"
  3. Do the drill, print the card:     docs/recovery.md"""


@dataclass
class Version:
    """One version of LND's, and what the log says of it; `timed` if S3 was there to take it."""

    number: int
    written: Written
    timed: bool
    captured_at: float | None = None
    stored_at: float | None = None

    @property
    def waits(self) -> bool:
        return self.captured_at is not None and self.stored_at is None

    def after(self, moment: float | None) -> float:
        """Return the seconds from LND's rename to a moment."""
        return (moment or self.written.renamed_at) - self.written.renamed_at


class Screen:
    """A running log of who does what; `log` quotes the daemon's own. A terminal also shows the
    present state below. For a picture, it has one width.
    """

    def __init__(self, picture: Path | None = None) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        self.picture = picture
        self.console = Console(
            highlight=False,
            markup=False,
            emoji=False,
            width=PICTURE_WIDTH if picture else None,
            force_terminal=bool(picture) or None,
        )
        self.began = time.monotonic()

    def say(self, text: str, style: str = "") -> None:
        self.console.print(textwrap.fill(text, self.console.width), style=style)

    def title(self, text: str) -> None:
        self.console.print()
        self.say(" ".join(text.split()).rstrip("."), "bold")

    def fact(self, at: float, who: str, text: str, style: str = "") -> None:
        """Print what somebody did, with the seconds since the beginning."""
        width = max(20, self.console.width - INDENT)
        first, *others = textwrap.wrap(text, width, break_on_hyphens=False) or [""]
        moment = f"{at - self.began:7.3f}  "
        line = Text.assemble((moment, "dim"), (f"{who:<8}", STYLES[who]), (first, style))
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
            drawing = self.console.export_svg(title="make demo", unique_id="demo")
            useless = r" *<!--.*?-->| *@font-face \{.*?\}|Fira Code, (?=monospace)| +$"
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
    """All that takes part, and what was seen of each version: a bucket, a key that may only put,
    LND's directory and the staging directory.
    """

    def __init__(self, screen: Screen, root: Path, server: S3Server, proxy: FaultProxy) -> None:
        self.screen, self.root, self.server, self.proxy = screen, root, server, proxy
        self.lnd, self.staging = Lnd(root / "lnd"), root / "staging"
        self.staging.mkdir(mode=0o700)
        server.create_bucket(BUCKET)
        self.settings = settings_for(
            server, BUCKET, PREFIX, self.lnd, self.staging, endpoint=proxy.endpoint()
        )
        # The daemon's log, and when each line came; None: it has ended.
        self.lines: queue.SimpleQueue[tuple[float, str | None]] = queue.SimpleQueue()
        self.versions: list[Version] = []
        self.daemon: Script | None = None
        self.s3_there = True
        self.problems: list[str] = []
        self.stopping = self.ended = False

    def close(self) -> None:
        if self.daemon:
            self.daemon.close()

    def follow(self, daemon: Script) -> None:
        """Stamp each line of the daemon's log at the moment it comes, until it ends."""
        with contextlib.suppress(AssertionError):  # how the kit tells the end
            for count in itertools.count(1):
                text = daemon.wait_for_log(r"^.*\n", FOREVER_SECONDS, count)[0]
                self.lines.put((time.monotonic(), text.rstrip()))
        self.lines.put((time.monotonic(), None))

    def write(self, channels: int) -> None:
        written = self.lnd.write(channels)
        timed = self.s3_there and self.daemon is not None
        self.versions.append(Version(len(self.versions) + 1, written, timed))
        size = f"{counted(channels, 'channel')}, {len(written.data)} bytes"
        self.screen.fact(written.renamed_at, "LND", f"wrote version {len(self.versions)}: {size}")

    def watch(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Show what the daemon does until the condition holds, the time is over or the daemon has
        ended.
        """
        deadline = time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while not (held := until()) and not self.ended:
                self.hear(*self.lines.get(timeout=max(0.0, deadline - time.monotonic())))
        return held

    def settle(self, reading_seconds: float = READING_SECONDS) -> None:
        """Wait until every version is stored, and then for the watcher's eye."""
        if self.problems:
            return
        came = self.watch(SETTLE_SECONDS, lambda: all(each.stored_at for each in self.versions))
        if not came and not self.ended:
            self.problems.append(f"not every version was stored within {SETTLE_SECONDS:.0f} s")
        self.watch(reading_seconds)

    def hear(self, at: float, text: str | None) -> None:
        """Show one line of the daemon's log, those about versions in words of the demo."""
        if text is None:
            self.ended = True
            if not self.stopping:
                self.problems.append("the daemon ended by itself")
        elif match := re.search(r" (captured|stored) \S*?([^\s/]+): \d+ bytes(.*)", text):
            self.note(at, match[1], match[2], match[3])
        else:
            text = re.sub(r"^[\d-]+ [\d:]+ ", "", text).replace(f"{self.root}/", "")
            loud = {"warning:": "yellow", "error:": "bold red", "critical:": "bold red"}
            self.screen.fact(at, "log", text, loud.get(text.partition(" ")[0], ""))

    def note(self, at: float, what: str, name: str, remark: str) -> None:
        """Note and show that a version was captured or stored; the end of its name tells which one
        it is.
        """
        version = next(each for each in self.versions if name.endswith(each.written.sha256[-6:]))
        if version.stored_at is not None:
            if what == "stored":
                why = "again: the file on disk is always put last"
                self.screen.fact(at, "S3", f"stored version {version.number} {why}")
            return
        took = f"{what} version {version.number} in {shown_time(version.after(at))}"
        if what == "captured":
            version.captured_at = at
            more = (
                f" as {name}{remark}" if self.s3_there else f", {self.waiting} waiting in staging"
            )
            self.screen.fact(at, "daemon", took + more)
        else:
            version.stored_at = at
            more = f", {self.waiting} still waiting" if self.waiting else ""
            self.screen.fact(at, "S3", took + more)

    @property
    def waiting(self) -> int:
        return sum(version.waits for version in self.versions)

    def state(self) -> Text:
        there, away = (" S3 is there ", "black on green"), (" S3 is away  ", "white on red")
        text = Text.assemble(there if self.s3_there else away, "  ")
        for version in self.versions:
            if version.stored_at:
                text.append("#", "green")
            else:
                text.append("o" if version.waits else ".", "yellow")
        return text.append(f"  {len(self.versions)} written, {self.waiting} waiting")


# --- The acts: the docstring of each is its title on the screen ---


def act_start(stage: Stage) -> None:
    """The daemon starts with a key that can only put, and backs up the file that it finds."""
    for name, value in stage.settings.items():
        shown = "***" if "SECRET" in name else value.replace(f"{stage.root}/", "")
        stage.screen.console.print(f"         {name}={shown}", style="dim")
    stage.watch(READING_SECONDS)
    stage.write(0)
    stage.daemon = Script(stage.settings)
    threading.Thread(target=stage.follow, args=[stage.daemon], daemon=True).start()
    stage.settle()


def act_channels(stage: Stage) -> None:
    """LND opens channels: each version is in the bucket milliseconds after LND's rename."""
    for channels in (1, 10, 100):
        stage.write(channels)
        stage.settle()


def act_burst(stage: Stage) -> None:
    """A burst: LND writes six versions in half a second, and every one is kept."""
    for channels in range(101, 107):
        stage.write(channels)
        stage.watch(0.1)
    stage.settle()


def act_restart(stage: Stage) -> None:
    """LND restarts: it writes the file when it stops and again when it starts."""
    for _ in range(2):
        stage.write(106)
        stage.settle()


def act_outage(stage: Stage) -> None:
    """S3 goes away while LND keeps writing: the versions wait on this disk."""
    stage.proxy.set("refuse", cut=True)
    stage.s3_there = False
    for channels in range(107, 112):
        stage.write(channels)
        stage.watch(0.8)
    waiting = f"{counted(len(staged(stage.staging)), 'version')} now in the staging directory"
    stage.screen.fact(time.monotonic(), "disk", waiting, "bold")
    stage.watch(READING_SECONDS)


def act_return(stage: Stage) -> None:
    """S3 comes back on a slow line: the newest version goes first."""
    stage.proxy.set("latency", up=SLOW_LINE_SECONDS, down=SLOW_LINE_SECONDS)
    stage.s3_there = True
    stage.write(112)
    waiting = [version for version in stage.versions if not version.stored_at]
    stage.settle(0.0)
    order = [version.number for version in sorted(waiting, key=lambda each: each.stored_at or 0.0)]
    how = ", the newest first" if order == sorted(order, reverse=True) else ""
    got = f"got them in the order {', '.join(map(str, order))}{how}"
    stage.screen.fact(time.monotonic(), "S3", got, "bold")
    stage.watch(READING_SECONDS)


def act_stop(stage: Stage) -> None:
    """The machine shuts down: LND writes one last time, and the daemon gets SIGTERM."""
    assert stage.daemon
    stage.write(112)
    stage.stopping = True
    stage.daemon.signal(signal.SIGTERM)
    if not stage.watch(STOP_SECONDS, lambda: stage.ended):
        stage.problems.append(f"the daemon did not stop within {STOP_SECONDS:.0f} s")
    elif code := stage.daemon.wait():
        stage.problems.append(f"the daemon ended with exit code {code}")


def act_read_back(stage: Stage) -> None:
    """The worst day: with a key that can only read, on any computer."""
    stage.proxy.set("pass")
    reader = stage.server.reader_user(BUCKET)
    elsewhere = reader_settings(stage.server, BUCKET, PREFIX, reader)
    elsewhere["AWS_ENDPOINT_URL_S3"] = stage.proxy.endpoint()
    node = stage.settings | elsewhere
    output = stage.root / "restored" / "channel.backup"
    output.parent.mkdir()
    for settings, command in (
        (node, ["check"]),
        (elsewhere, ["list"]),
        (elsewhere, ["restore", "--output", str(output)]),
    ):
        stage.screen.say(f"$ s3_backup_lnd_channels.py {command[0]}", "bold")
        code, seen = run_on_terminal(settings, *command, log=True)
        for line in told(seen):
            shown = line.replace(f"{stage.root}/", "")
            shown = shown.replace(f"{sys.executable} {SCRIPT}", SCRIPT.name)
            stage.screen.console.print(shown, style="dim", markup=False)
        if code:
            stage.problems.append(f"{command[0]} ended with exit code {code}")
            return
    if output.read_bytes() == stage.versions[-1].written.data:
        stage.screen.say("the restored file is what LND last wrote, byte for byte", "green")
    else:
        stage.problems.append("the restored file is not what LND last wrote")


def told(seen: str) -> list[str]:
    """Return the lines of a command, without the log's word of the settings that it is using."""
    return [
        line.rstrip()
        for line in seen.splitlines()
        if not line.startswith("20") or " using " not in line
    ]


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
    """The proof: every version that LND wrote, compared with the bucket byte for byte."""
    stage.screen.title(prove.__doc__ or "")
    objects = stage.server.objects(BUCKET)
    held = {entry.data: key for key, entry in reversed(objects.items())}  # the first of two
    stage.screen.console.print(comparison(stage, held))
    # After the outage the newest is put once more, so that it is the last one.
    found = find_problems(stage.lnd, stage.server, BUCKET, PREFIX, stage.staging, refreshes=1)
    stage.problems += [*found.lost, *found.repeated, *found.false]
    left = len(staged(stage.staging))
    if left:
        stage.problems.append(f"versions left in the staging directory: {left}")
    written = counted(len(stage.versions), "version")
    stored = sum(version.written.data in held for version in stage.versions)
    totals = f"{written} written, {stored} stored, {len(found.lost)} lost, {left} left in staging."
    with stage.screen.drawn():
        stage.screen.console.print()
        stage.screen.say(totals, "bold red" if stage.problems else "bold green")
        for problem in stage.problems:
            stage.screen.say(f"FAILED: {problem}", "bold red")
        if not stage.problems:
            stage.screen.say(medians(stage.versions))
    return not stage.problems


def comparison(stage: Stage, held: dict[bytes, str]) -> Table:
    """Return a row for every version that LND wrote, with the object that holds the same bytes."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for head in ("", "written, UTC", "channels", "bytes", "stored in"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column(f"in s3://{BUCKET}/{PREFIX}", no_wrap=True)
    for version in stage.versions:
        written, key = version.written, held.get(version.written.data)
        after = shown_time(version.after(version.stored_at)) if key and version.stored_at else "-"
        table.add_row(
            str(version.number),
            f"{written.wall:%H:%M:%S.%f}"[:-3],
            str(written.channels),
            str(len(written.data)),
            after,
            Text(key.removeprefix(PREFIX)) if key else Text("not in the bucket", "bold red"),
        )
    return table


def medians(versions: list[Version]) -> str:
    """Return how long it took from LND's rename on while S3 was there."""
    timed = [each for each in versions if each.timed and each.captured_at and each.stored_at]
    captured = statistics.median(version.after(version.captured_at) for version in timed)
    stored = statistics.median(version.after(version.stored_at) for version in timed)
    return (
        f"Median time from LND's rename: {shown_time(captured)} until captured, "
        f"{shown_time(stored)} until stored "
        f"({counted(len(timed), 'version')}, written while S3 was reachable)."
    )


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def shown_time(seconds: float) -> str:
    """Return a duration as people read it."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def perform(screen: Screen) -> bool:
    """Play the acts until something fails, and tell whether the proof succeeded."""
    with (
        tempfile.TemporaryDirectory(prefix="demo-") as directory,
        S3Server(Path(directory, "s3")) as server,
        FaultProxy(server.host, server.port) as proxy,
        contextlib.closing(Stage(screen, Path(directory), server, proxy)) as stage,
    ):
        with screen.live(stage.state):
            for act in ACTS:
                if not stage.problems:
                    with screen.drawn() if act in DRAWN else contextlib.nullcontext():
                        screen.title(act.__doc__ or "")
                        act(stage)
        return prove(stage)


def interrupt(*_: object) -> None:
    """Let the first signal end everything in order; one more changes nothing."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Show it all; the exit code is 0 only if every version is in the bucket."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw an SVG of it as well")
    screen = Screen(parser.parse_args().picture)
    for number in SIGNALS:
        signal.signal(number, interrupt)
    screen.say(OPENING)
    try:
        proven = perform(screen)
    except KeyboardInterrupt:
        screen.say("Interrupted; what was started is ended, and what was written is removed.")
        return INTERRUPTED
    except RuntimeError as error:  # the kit's word for a server that does not start
        screen.say(str(error), "bold red")
        return 1
    screen.console.print("", CLOSING, sep="\n")
    if proven:
        screen.draw()
    return 0 if proven else 1


if __name__ == "__main__":
    sys.exit(main())
