"""The program under strace: killed at every step, and every step failing, from its first look."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Unpack

from faults.strace import KIND_OF, TURN, Call, Strace, counts
from faults.table import Tally
from kit import VERSION_NAME, Lnd, S3Server, Script, find_problems, settings_for, version_name
from kit.script import warm_starts, write_launcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from kit import Allowed, Written
    from kit.invariant import Problems

WORKERS = 3  # some of their time is waiting
ERRORS = ("EIO", "ENOSPC", "EACCES", "EMFILE", "EINTR")
# Beside the way of a version; one error will do.
ASIDE = ("read", "lock, mode or directory", "watch")
ERRORS_OF = {"rename": ("EXDEV",)}  # that no call of another kind knows
# No system interrupts every call, and Python makes an interrupted one again.
NEVER_LASTING = ("EINTR",)
PATIENCE_SECONDS = 10.0
LASTING_SECONDS = 2.0
CALM = 10  # so many times the turns and failures of an undisturbed run are still no busy loop
GRACE_SECONDS = 10.0
LOOK_SECONDS = 0.02

# Run before the program: stop it when it is about to open or make a directory for the first time.
HELD = """
import os, signal, sys

def hold(event, arguments):
    if event in ("open", "os.mkdir") and isinstance(arguments[0], (str, os.PathLike)):
        if held and os.fspath(arguments[0]) == held[0]:
            held.clear()
            os.kill(os.getpid(), signal.SIGSTOP)

held = [{at!r}]
sys.addaudithook(hold)
"""


class Case(NamedTuple):
    """One run with one fault: from the n-th call on of this name, which kills, or fails once or for
    a while; without a name there is none.
    """

    scenario: str
    call: str
    number: int
    error: str = ""
    lasting: bool = False

    @property
    def fault(self) -> str:
        """Return its row in the table."""
        if not self.error:
            return f"killed at: {KIND_OF[self.call]}" if self.call else ""
        if self.lasting:
            return f"calls fail for {LASTING_SECONDS:.0f} s: {self.error}"
        return f"a call fails: {self.error}"

    @property
    def injection(self) -> str:
        """Return what strace is told."""
        what = f"error={self.error}" if self.error else "signal=KILL"
        when = f"{self.number}{'+' if self.lasting else ''}"
        return f"{self.call}:{what}:when={when}" if self.call else ""


class Run:
    """One LND, one staging directory and one bucket, with the program at work on them."""

    def __init__(self, server: S3Server, case: Case) -> None:
        self.server, self.case = server, case
        self.directory = Path(tempfile.mkdtemp(dir=server.directory))
        self.bucket = server.create_bucket()
        self.lnd = Lnd(self.directory / "lnd")
        self.staging = self.directory / "staging"
        self.trace = self.directory / "trace"
        settings = settings_for(server, self.bucket, "", self.lnd, self.staging)
        self.env = settings | {"RESCAN_SECONDS": "2"}
        self.tally = Tally(case.fault)
        self.log = ""

    def note(self, log: str, strace: Strace, code: int | None) -> None:
        """Note what it said, and how often the fault was injected."""
        self.log = log
        injected = strace.injected() if self.case.error else int(code == -signal.SIGKILL)
        self.tally.numbers["injected"] = injected

    def problems(self, **allowed: Unpack[Allowed]) -> Problems:
        return find_problems(self.lnd, self.server, self.bucket, "", self.staging, **allowed)

    def complain(self, what: str) -> None:
        case = self.case
        self.tally.complaints.append(f"[{case.scenario}, {case.injection}] {what}\n{self.log}")

    def damage(self, what: Iterable[str]) -> None:
        for each in what:
            self.tally.numbers["damaged"] += 1
            self.complain(each)

    def staged(self) -> dict[str, bytes]:
        paths = self.staging.iterdir() if self.staging.is_dir() else ()
        return {path.name: path.read_bytes() for path in paths if VERSION_NAME.fullmatch(path.name)}

    def stored(self) -> dict[str, bytes]:
        return {name: each.data for name, each in self.server.objects(self.bucket).items()}

    def receipt(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.staging / ".receipt").read_text()
        return ""

    def judge(self) -> None:
        """Start the program again, plainly, and count what has become of the versions."""
        self.tally.numbers["at_stake"] = len(self.lnd.written)
        self.damage(self.problems(replaced_ok=True).false)
        staged, stored = self.staged(), self.stored()
        with Script(self.env, "once") as again:
            code = again.wait()
        self.log += f"--- the plain start afterwards ---\n{again.log}"
        if code != 0 or re.search("damaged|error:|Traceback", again.log):
            self.damage([f"the plain start afterwards ended with {code}"])
        after = self.stored()
        problems = self.problems(refreshes=None)
        self.damage(problems.false)
        leftovers = {path.name for path in self.staging.iterdir()} - {".lock", ".receipt"}
        self.damage(f"left over: {name}" for name in sorted(leftovers))
        gone = [name for name, data in (staged | stored).items() if after.get(name) != data]
        for each in [*problems.lost, *(f"lost after it was captured: {name}" for name in gone)]:
            self.tally.numbers["lost"] += 1
            self.complain(each)
        # The start puts the version on disk under a new name, unless the very same bytes were still
        # to be sent; and a drain of several versions puts the newest once more.
        newest, earlier = self.lnd.written[-1].data, self.lnd.written[0].data
        expected = int(newest not in staged.values()) + int(earlier in staged.values())
        expected += int(self.case.scenario == "once" and earlier in stored.values())
        names = Counter((staged | stored).values())
        extra = sum(number - 1 for number in names.values())
        extra += len(after.keys() - staged.keys() - stored.keys())
        if extra > expected:
            self.tally.numbers["duplicates"] += extra - expected
            self.complain(f"{extra - expected} captures under two keys: {sorted(after)}")


class Program(Script):
    """The program, of which nobody knows how it will end."""

    def wait_until(
        self, reached: Callable[[str], object], timeout: float = PATIENCE_SECONDS
    ) -> bool:
        """Wait until its log, or whatever else, is so; False if it ended or time passed before."""
        until = time.monotonic() + timeout
        while not reached(self.log):
            if self.returncode is not None:
                return bool(reached(self.log))
            if time.monotonic() > until:
                return False
            time.sleep(LOOK_SECONDS)
        return True

    def wait_until_held(self) -> None:
        """Wait until it stands still where HELD stops it."""
        stat = Path(f"/proc/{self.pid}/stat")
        if not self.wait_until(lambda _: stat.read_text().rpartition(")")[2].split()[0] == "T"):
            raise AssertionError(f"it did not come to its staging directory:\n{self.log}")


def run_once(run: Run) -> list[Call]:
    """`once`, with a version left staged, from its first touch of the staging directory on."""
    earlier = run.lnd.write(channels=3)
    run.staging.mkdir(mode=0o700)
    path = run.staging / version_name(earlier.data, datetime(2026, 1, 1, tzinfo=UTC))
    path.write_bytes(earlier.data)
    path.chmod(0o600)
    run.lnd.write(channels=10)
    launcher = write_launcher(run.directory / "launcher.py", HELD.format(at=str(run.staging)))
    with Program(run.env, "once", launcher=launcher) as program:
        program.wait_until_held()
        with Strace(program, run.trace, run.case.injection) as strace:
            program.signal(signal.SIGCONT)
            program.wait_until(lambda _: strace.injected())
        code = program.wait()
        run.note(program.log, strace, code)
    # A version that could not be deleted is still there.
    wanted = {*run.staged().values(), run.lnd.written[-1].data}
    if code == 0 and not wanted <= set(run.stored().values()):
        run.complain("exit 0, and not everything is stored")
    if code not in (0, -signal.SIGKILL) and not re.search("error: |warning: |critical: ", run.log):
        run.complain(f"exit {code}, and nothing in the log")
    if "a fault of this program" in run.log and not hit_the_loop(strace.calls()):
        run.complain("it takes the fault for one of its own")
    if code not in (0, 1, 75, 78, -signal.SIGKILL):
        run.complain(f"exit {code}")
    return strace.calls()


def run_daemon(run: Run) -> list[Call]:
    """The daemon, up and with a connection that it has used, takes in a version and stops."""
    first = run.lnd.write(channels=10)
    return run_on(run, lambda _: first.sha256 in run.receipt() and not [*run.staging.glob("2*")])


def run_cold_daemon(run: Run) -> list[Call]:
    """The daemon, up and without a connection, takes in its first version and stops."""
    return run_on(run, re.compile("cannot read channel.backup").search)


def run_on(run: Run, is_up: Callable[[str], object]) -> list[Call]:
    """Let the daemon come up, and then take in a version and stop."""
    with Program(run.env, "run") as program:
        if not program.wait_until(is_up):
            raise AssertionError(f"the daemon did not come up:\n{program.log}")
        with Strace(program, run.trace, run.case.injection) as strace:
            second, stopping = run.lnd.write(channels=300), False
            program.wait_until(lambda log: strace.injected() or is_stored(second)(log))
            if run.case.lasting:
                time.sleep(LASTING_SECONDS)  # the fault lasts
            elif not strace.injected():  # it may still come, or comes while the daemon stops
                stopping = program.returncode is None
                program.signal(signal.SIGTERM)
                program.wait_until(lambda _: strace.injected())
        # The line in the log may be what failed.
        by_itself = program.wait_until(
            lambda log: is_stored(second)(log) or second.sha256 in run.receipt()
        )
        by_itself = by_itself or second.data in run.stored().values()
        if not stopping:  # a second signal would end it at once
            program.signal(signal.SIGTERM)
        program.wait_until(lambda _: False, PATIENCE_SECONDS + GRACE_SECONDS)
        code = program.returncode
        run.note(program.log, strace, code)
    loud = code == 1 and "critical: " in run.log
    cut_short = loud or (stopping and code is None)
    if code == -signal.SIGKILL or (cut_short and hit_the_loop(strace.calls())):
        return strace.calls()
    if not by_itself:
        run.complain("the daemon did not store the version by itself")
    if code != 0:
        run.complain(f"the daemon ended with {code}")
    return strace.calls()


def hit_the_loop(calls: list[Call]) -> bool:
    """Tell whether what failed was the event loop's own: inotify, or the socket by which threads
    and signals wake it.

    No kernel does that. Without the one it has to end, loudly; without the other it does not hear
    of a signal.
    """
    hit = [call for call in calls if "(INJECTED)" in call.line]
    # A signal is one byte to the loop.
    waking = re.compile(r'anon_inode|write\(\d+<[^>]*>, "[^"]*", 1\)')
    main = min((call.thread for call in calls), key=int)  # the oldest; a trace may begin in another
    return any(
        waking.search(call.line) or (call.name == "recvfrom" and call.thread == main)
        for call in hit
    )


def is_stored(version: Written) -> Callable[[str], object]:
    """Return what finds the receipt for a version in a log."""
    return re.compile(f"stored .*{version.sha256[-6:]}").search


SCENARIOS = {"once": run_once, "run": run_daemon, "run over https": run_cold_daemon}


@cache
def undisturbed(server: S3Server, scenario: str) -> list[Call]:
    """Run a scenario without a fault, and return its calls."""
    run = Run(server, Case(scenario, "", 0))
    calls = SCENARIOS[scenario](run)
    run.judge()
    if run.tally.complaints:
        raise AssertionError(f"without any fault: {run.tally.complaints}")
    return calls


# What survives a power cut depends on the order of these, and no file shows it.
DELETED = "the version is deleted"
ORDER = [
    "the version is synced",
    "the version gets its name",
    "the directory is synced",
    "the version is sent",
    "S3 acknowledges it",
    "the receipt is synced",
    "the receipt gets its name",
    "the directory is synced",
    DELETED,
]
IN_ORDER = "none: the order of its steps"


def order_of(calls: Iterable[Call]) -> list[str]:
    """Return what happened to the first version that got its name, up to its deletion."""
    lines = [call.line for call in calls]
    named = re.compile(r'renameat\w*\(\d+<([^>]+)>, "[^"]+", .*"(\d{8}T[^"]+)"')
    directory, version = map(re.escape, named.findall("\n".join(lines))[0])
    patterns = {
        rf"fsync\(\d+<{directory}/\.{version}\.partial>": "the version is synced",
        rf'(rename|link)\w*\(.*"\.{version}\.partial", .*"{version}"': "the version gets its name",
        rf"fsync\(\d+<{directory}>": "the directory is synced",
        rf"send\w+\(.*PUT /\S*/{version} HTTP": "the version is sent",
        r"recv\w+\(.*HTTP/1\.1 200 ": "S3 acknowledges it",
        rf"fsync\(\d+<{directory}/\.\.receipt\.partial>": "the receipt is synced",
        r'(rename|link)\w*\(.*"\.\.receipt\.partial", .*"\.receipt"': "the receipt gets its name",
        rf'unlink\w*\(.*"{version}"': DELETED,
    }
    found = [
        what for line in lines for pattern, what in patterns.items() if re.search(pattern, line)
    ]
    return found[: found.index(DELETED) + 1] if DELETED in found else found


def check_order(calls: Iterable[Call]) -> Tally:
    """Compare the order of operations in an undisturbed run with what it has to be."""
    tally = Tally(IN_ORDER, Counter(injected=1, at_stake=1))
    if (found := order_of(calls)) != ORDER:
        tally.numbers["damaged"] += 1
        tally.complaints.append(f"the order is {found}, where it has to be {ORDER}")
    return tally


def attempt(server: S3Server, case: Case) -> Tally:
    """Run one case, and return what came of it."""
    run = Run(server, case)
    try:
        calls = SCENARIOS[case.scenario](run)
        run.judge()
        if case.lasting:
            normal = counts(undisturbed(server, case.scenario))
            busy = Counter(call.name for call in calls)
            for name in (TURN, case.call):
                if busy[name] > CALM * max(normal.get(name, 0), 5) * LASTING_SECONDS:
                    often = f"{busy[name]} times in {LASTING_SECONDS} s: {normal.get(name)}"
                    run.complain(f"a busy loop? {name} {often}")
    except AssertionError as error:
        run.complain(str(error))
    if not run.tally.complaints:
        shutil.rmtree(run.directory)
    return run.tally


EVERY_ERROR = (*ERRORS, *itertools.chain.from_iterable(ERRORS_OF.values()))
FAULTS = [  # in the order of the table
    IN_ORDER,
    *dict.fromkeys(Case("", call, 1).fault for call in KIND_OF),
    *(Case("", "read", 1, error).fault for error in EVERY_ERROR),
    *(Case("", "read", 1, error, lasting=True).fault for error in EVERY_ERROR),
]


def errors_of(call: str) -> tuple[str, ...]:
    """Return the errors with which a call is made to fail."""
    kind = KIND_OF[call]
    return ERRORS[:1] if kind in ASIDE else ERRORS + ERRORS_OF.get(kind, ())


def cases(scenario: str, normal: Mapping[str, int]) -> Iterator[Case]:
    """Yield every case of a scenario, in which each call is made so many times."""
    for call, number in normal.items():
        if call == TURN:
            continue
        for n in range(1, number + 1):
            yield Case(scenario, call, n)
            yield from (Case(scenario, call, n, error) for error in errors_of(call))
        if scenario != "once":
            for error in errors_of(call):
                if error not in NEVER_LASTING:
                    yield Case(scenario, call, 1, error, lasting=True)


def inject_all(http: S3Server, https: S3Server, only: str) -> list[Tally]:
    """Run every case of every scenario whose fault is named so, and return what came of them."""
    servers = {"once": http, "run": http, "run over https": https}
    with warm_starts(), ThreadPoolExecutor(WORKERS) as pool:
        calls = dict(zip(servers, pool.map(undisturbed, servers.values(), servers), strict=True))
        tallies = [check_order(calls["run"])]
        jobs = [
            pool.submit(attempt, server, case)
            for name, server in servers.items()
            for case in cases(name, counts(calls[name]))
            if only in case.fault
        ]
        for number, job in enumerate(jobs, 1):
            tallies.append(tally := job.result())
            for complaint in tally.complaints:
                print(complaint, file=sys.stderr, flush=True)
            if number % 50 == 0:
                print(f"{number} of {len(jobs)} runs under strace", file=sys.stderr, flush=True)
    return sorted(tallies, key=lambda tally: FAULTS.index(tally.fault))
