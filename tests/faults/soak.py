"""`make soak`: a random schedule of LND's writes, faults and kills, with the invariant checked all
the time.

The schedule is cut into rounds of a few seconds, each with a seed of its own and everything else
new, so that the round that failed can be run again alone. The seed gives what the schedule does,
and not when exactly.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from kit import Daemon, FaultProxy, Lnd, S3Server, assert_nothing_lost, settings_for
from shared import done_well, staged

if TYPE_CHECKING:
    from kit import Mode

PREFIX = "alice/"
STEPS = 40
PATIENCE_SECONDS = 90.0
LINES: list[tuple[Mode, dict[str, float]]] = [
    ("refuse", {}),
    ("rst", {}),
    ("rst_after_up", {"n": 900}),
    ("rst_after_up", {"n": 4000}),
    ("swallow_response", {}),
    ("corrupt", {}),
    ("portal", {}),
    ("portal", {"etag": 1}),
    ("latency", {"up": 0.05, "down": 0.05}),
    ("throttle", {"bps": 20_000}),
]


class Round:
    """One LND, bucket, staging directory and daemon, which is killed and started again."""

    def __init__(self, seed: int, server: S3Server, directory: Path) -> None:
        self.chance = random.Random(seed)  # noqa: S311 - a schedule is no secret
        self.server, self.directory = server, directory
        self.lnd, self.staging = Lnd(directory / "lnd"), directory / "staging"
        self.bucket = server.create_bucket()
        self.proxy = FaultProxy(server.host, server.port)
        self.daemons: list[Daemon] = []  # the last one runs
        self.seen: set[str] = set()
        self.history: list[str] = []
        self.done: Counter[str] = Counter()

    def run(self) -> None:
        """Go through the schedule, then let all be well and check the whole invariant."""
        actions = {
            self.write: 6,
            self.burst: 2,
            self.fail: 3,
            self.heal: 2,
            self.kill: 2,
            self.stop: 1,
            self.suspend: 1,
            self.pause: 1,
            self.move_directory: 1,
        }
        schedule = self.chance.choices(list(actions), list(actions.values()), k=STEPS)
        more = {"RESCAN_SECONDS": "1", "SHUTDOWN_GRACE_SECONDS": "1"}
        with contextlib.ExitStack() as self.stack:
            self.stack.enter_context(self.proxy)
            place = (self.server, self.bucket, PREFIX, self.lnd, self.staging)
            self.env = more | settings_for(*place, endpoint=self.proxy.endpoint())
            self.start()
            for action in schedule:
                self.done[action.__name__] += 1
                self.history.append(f"{time.strftime('%F %T')} {action.__name__}")
                action()
                self.check_staged()
            self.end()
        # Each start, and each drain of several versions, puts the version on disk once more.
        kept = (self.server, self.bucket, PREFIX, self.staging)
        assert_nothing_lost(self.lnd, *kept, replaced_ok=True, refreshes=None)

    def start(self) -> None:
        self.daemons.append(self.stack.enter_context(Daemon(self.env)))

    def running(self) -> Daemon:
        """Return the daemon, which has to run."""
        daemon = self.daemons[-1]
        assert daemon.returncode is None, f"it ended by itself with {daemon.returncode}"
        return daemon

    # --- what may happen ---

    def write(self) -> None:
        self.lnd.write(channels=self.chance.choice([0, 1, 10, 10, 300]))

    def burst(self) -> None:
        for _ in range(self.chance.randrange(2, 30)):
            self.write()

    def fail(self) -> None:
        """The line to S3 fails in some way, with or without what is under way."""
        mode, settings = self.chance.choice(LINES)
        self.history.append(f"  {mode} {settings}")
        self.proxy.set(mode, cut=self.chance.random() < 0.5, **settings)

    def heal(self) -> None:
        self.proxy.set("pass", cut=True)

    def kill(self) -> None:
        daemon = self.running()
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        self.start()

    def stop(self) -> None:
        assert self.running().stop() == 0
        self.start()

    def suspend(self) -> None:
        """The daemon stands still for a moment, while LND writes."""
        self.running().signal(signal.SIGSTOP)
        self.burst()
        self.pause()
        self.running().signal(signal.SIGCONT)

    def pause(self) -> None:
        time.sleep(self.chance.uniform(0, 0.5))  # the moment

    def move_directory(self) -> None:
        """LND's directory is renamed away, and another one comes in its place."""
        self.lnd.directory.rename(self.directory / f"old-{secrets.token_hex(4)}")
        self.lnd.directory.mkdir(mode=0o700)
        self.write()

    # --- what has to be so ---

    def check_staged(self) -> None:
        """Fail unless whatever was once staged is still staged or stored."""
        self.running()
        now = set(staged(self.staging))
        self.seen |= now
        list_all = self.server.admin.get_paginator("list_objects_v2").paginate
        pages = list_all(Bucket=self.bucket, Prefix=PREFIX)
        entries = [entry for page in pages for entry in page.get("Contents", [])]
        stored = {entry["Key"].removeprefix(PREFIX) for entry in entries}
        assert self.seen <= now | stored, f"lost: {sorted(self.seen - now - stored)}"

    def end(self) -> None:
        """Let all be well, and wait until all is stored."""
        self.heal()
        last = self.lnd.write()
        daemon = self.running()
        daemon.wait_for_log(rf"stored \S+-{last.sha256[-6:]}\b", timeout=PATIENCE_SECONDS)
        assert daemon.stop() == 0
        done_well(self.env)  # whatever the grace period was too short for
        assert {path.name for path in self.staging.iterdir()} == {".lock", ".receipt"}
        stored = self.server.objects(self.bucket, PREFIX)
        assert stored[max(stored)].data == last.data


def main() -> int:
    """Run rounds until the time is over, and return the exit code."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("seconds", type=float, help="how long")
    first = "the seed of the first round; each round adds one"
    parser.add_argument("seed", type=int, nargs="?", help=first)
    options = parser.parse_args()
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    until, totals = time.monotonic() + options.seconds, Counter[str]()
    with (
        tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as name,
        S3Server(Path(name, "s3")) as server,
    ):
        for rounds in itertools.count():
            if rounds and time.monotonic() > until:
                break
            directory = Path(name, str(rounds))
            directory.mkdir()
            one = Round(seed + rounds, server, directory)
            try:
                one.run()
            except Exception as error:  # noqa: BLE001 - whatever it is, the seed is said
                logs = [daemon.log for daemon in one.daemons]
                print(*one.history, *logs, f"{type(error).__name__}: {error}", sep="\n")
                print(f"failed: make soak SECONDS=1 SEED={seed + rounds}")
                return 1
            one.done |= {"version": len(one.lnd.written), "start": len(one.daemons)}
            told = f"{one.done['version']} versions, {one.done['start']} starts"
            print(f"seed {seed + rounds}: {told}", flush=True)
            totals += one.done
    print(f"{rounds} rounds, nothing lost; {dict(totals)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
