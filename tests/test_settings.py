"""Every setting and the --env-file: what is accepted, and that faults are told all at once, with
what to do.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import boto3
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kit import NOBODY, SCRIPT, Lnd, Script, as_nobody, run_script, script_environment

import s3_backup_lnd_channels as program

REQUIRED = ("MONITOR_FILE_PATH", "BACKUP_DIRECTORY", "S3_BUCKET_NAME")
NOWHERE = "http://127.0.0.1:9"


SESSION = boto3.Session(region_name="us-east-1")


@pytest.fixture(autouse=True)
def _one_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the SDK's session once for all tests inside this process; a new one takes a while."""
    monkeypatch.setattr(boto3, "Session", lambda **_: SESSION)


def faults(environ: dict[str, str]) -> dict[str, program.ConfigError]:
    """Return the faults of a configuration by variable; each is wrong configuration and says what
    to do.
    """
    failures: list[program.ConfigError] = []
    try:
        program.load_settings(environ, "run")
    except* program.ConfigError as group:
        failures = [each for each in group.exceptions if isinstance(each, program.ConfigError)]
    found = {re.split("[ =:]+", str(failure))[1]: failure for failure in failures}
    assert len(found) == len(failures)
    assert all(failure.exit_code == 78 and failure.hint for failure in failures)
    return found


@pytest.fixture
def good(lnd: Lnd, staging: Path) -> dict[str, str]:
    """Return settings without a fault, for an S3 that is not there."""
    return {
        "MONITOR_FILE_PATH": str(lnd.path),
        "BACKUP_DIRECTORY": str(staging),
        "S3_BUCKET_NAME": "bucket",
        "AWS_ENDPOINT_URL_S3": NOWHERE,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "geheim",
    }


# --- each variable ---


def test_good_settings_are_taken_as_they_are(good: dict[str, str], lnd: Lnd, staging: Path) -> None:
    """Settings without a fault are returned with the defaults of the others."""
    found = program.load_settings(good, "run")
    assert (found.file, found.staging, found.bucket, found.prefix) == (
        lnd.path,
        staging,
        "bucket",
        "",
    )
    times = (found.rescan_seconds, found.refresh_seconds, found.grace_seconds)
    assert times == (60.0, 86400.0, 10.0)
    assert "geheim" not in repr(found)


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("value", [None, ""])
def test_required_variable_that_is_absent_or_empty_is_a_fault(
    name: str, value: str | None, good: dict[str, str]
) -> None:
    """A required variable must be there, and an empty one is not there."""
    del good[name]
    found = faults(good if value is None else good | {name: value})
    assert list(found) == [name]
    assert "is not set" in str(found[name])


OPTIONAL = [name for name in program.SETTINGS if name not in REQUIRED] + ["STATE_DIRECTORY"]


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_variable_that_is_empty_counts_as_absent(name: str, good: dict[str, str]) -> None:
    """An empty optional variable means its default; the SDK's: see EMPTY in test_s3."""
    absent = program.load_settings(good, "run")
    assert program.load_settings(good | {name: ""}, "run") == absent


WRONG = {
    "MONITOR_FILE_PATH": ["~/.lnd/channel.backup", "~lnd/channel.backup", "/a\nb"],
    "BACKUP_DIRECTORY": ["~/backup", "/a\nb"],
    "S3_BUCKET_NAME": [
        "s3://bucket",
        "bucket/",
        "bucket/a",
        "ab",
        "my bucket",
        "bucket ",
        "${B}",
        '"b"',
        "b#c",
        "a\nb",
    ],
    "S3_BACKUP_PREFIX": ["/", "/a", "a\nb", "x" * 1025],
    "RESCAN_SECONDS": [
        "0",
        "0.0",
        "-1",
        "1e3",
        "60s",
        " 60",
        "60 ",
        "nan",
        "inf",
        "\u0663",
        "1,5",
        "0x10",
        "9" * 400,
    ],
    "REFRESH_SECONDS": ["-1", "-0", "daily", "nan", "inf", "1_000", "1\n"],
    "SHUTDOWN_GRACE_SECONDS": ["-1", "ten", "nan", "inf", "+1"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_wrong_value_is_a_fault_that_shows_it(name: str, value: str, good: dict[str, str]) -> None:
    """A value that cannot be used is a fault with the variable and the value, and the only one."""
    found = faults(good | {name: value})
    assert list(found) == [name]
    assert f"{name}={value}" in str(found[name])


RIGHT: list[tuple[str, str, str, object]] = [
    ("S3_BUCKET_NAME", "abc", "bucket", "abc"),
    ("S3_BUCKET_NAME", "my.bucket-1", "bucket", "my.bucket-1"),
    ("S3_BUCKET_NAME", "My_Old_Bucket", "bucket", "My_Old_Bucket"),
    (
        "S3_BUCKET_NAME",
        "arn:aws:s3:us-east-1:123456789012:accesspoint/mine",
        "bucket",
        "arn:aws:s3:us-east-1:123456789012:accesspoint/mine",
    ),
    ("S3_BACKUP_PREFIX", "node1", "prefix", "node1/"),
    ("S3_BACKUP_PREFIX", "node1/", "prefix", "node1/"),
    ("S3_BACKUP_PREFIX", "a/b/c", "prefix", "a/b/c/"),
    ("S3_BACKUP_PREFIX", ".hidden/a..b", "prefix", ".hidden/a..b/"),
    ("S3_BACKUP_PREFIX", """a b#${A}"'\\ü""", "prefix", """a b#${A}"'\\ü/"""),
    ("RESCAN_SECONDS", "0.5", "rescan_seconds", 0.5),
    ("RESCAN_SECONDS", "3600", "rescan_seconds", 3600.0),
    ("REFRESH_SECONDS", "0", "refresh_seconds", 0.0),
    ("REFRESH_SECONDS", "604800", "refresh_seconds", 604800.0),
    ("SHUTDOWN_GRACE_SECONDS", "0", "grace_seconds", 0.0),
    ("SHUTDOWN_GRACE_SECONDS", "2.25", "grace_seconds", 2.25),
]


@pytest.mark.parametrize(("name", "value", "field", "expected"), RIGHT)
def test_right_value_is_taken(
    name: str, value: str, field: str, expected: object, good: dict[str, str]
) -> None:
    """A value within the rules is taken, and a prefix gets the slash that it lacks."""
    assert getattr(program.load_settings(good | {name: value}, "run"), field) == expected


@pytest.mark.parametrize(
    "name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"]
)
@pytest.mark.parametrize("value", [" geheim", "geheim ", "ge heim", "geheim\n", "\tgeheim"])
def test_blank_in_a_key_is_a_fault_that_does_not_show_it(
    name: str, value: str, good: dict[str, str]
) -> None:
    """A blank that was copied along with a key is a fault with the variable, and without the
    value.
    """
    found = faults(good | {name: value})
    assert list(found) == [name]
    assert "heim" not in f"{found[name]!r} {found[name]} {found[name].hint}"


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(list(program.SETTINGS)),
    st.text(st.characters(exclude_characters="\0", codec="utf-8")),
)
def test_any_value_is_taken_or_a_fault(name: str, value: str) -> None:
    """No text in a setting ends in anything but settings or faults."""
    with tempfile.TemporaryDirectory() as directory:
        environ = {
            "MONITOR_FILE_PATH": f"{directory}/lnd/channel.backup",
            "BACKUP_DIRECTORY": f"{directory}/staging",
            "S3_BUCKET_NAME": "bucket",
        }
        assert set(faults(environ | {name: value})) <= {name, "BACKUP_DIRECTORY"}


# --- MONITOR_FILE_PATH ---

FORBIDDEN = [
    "channel.db",
    "wallet.db",
    "Wallet.DB",
    "channel.sqlite",
    "lnd.sqlite3-wal",
    "admin.macaroon",
    "x.MACAROON",
    "hsm_secret",
    "walletunlock.json",
]


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("name", FORBIDDEN)
def test_file_that_must_never_be_copied_is_a_fault(
    name: str, lnd: Lnd, good: dict[str, str], *, linked: bool
) -> None:
    """A name of what must never be restored, or never leave the node, is a fault, also behind a
    link.
    """
    path = lnd.directory / name
    path.write_bytes(b"secret")
    if linked:
        path = lnd.directory / "channel.backup"
        path.symlink_to(name)
    found = faults(good | {"MONITOR_FILE_PATH": str(path)})
    assert list(found) == ["MONITOR_FILE_PATH"]
    assert "channel.backup" in found["MONITOR_FILE_PATH"].hint


@pytest.mark.parametrize(
    "name", ["channel.backup", "channels.backup", "my.db", "macaroon", "sqlite", "channel.db.txt"]
)
def test_any_other_name_is_taken(name: str, lnd: Lnd, good: dict[str, str]) -> None:
    """A file that is not one of the forbidden ones may have any name, and need not be there."""
    assert faults(good | {"MONITOR_FILE_PATH": str(lnd.directory / name)}) == {}


@pytest.mark.parametrize("name", ["", "/"])
def test_directory_in_place_of_the_file_is_a_fault(
    name: str, lnd: Lnd, good: dict[str, str]
) -> None:
    """A directory in place of the file is a fault, with the name of the file in it."""
    found = faults(good | {"MONITOR_FILE_PATH": str(lnd.directory) + name})
    assert str(lnd.path) in found["MONITOR_FILE_PATH"].hint


def test_loop_of_links_is_no_crash(lnd: Lnd, good: dict[str, str]) -> None:
    """A file that is a link to itself ends in settings or faults, and not in a traceback."""
    lnd.path.symlink_to(lnd.path)
    assert set(faults(good)) <= {"MONITOR_FILE_PATH"}


# --- BACKUP_DIRECTORY ---


def staging_fault(good: dict[str, str], path: Path | str) -> program.ConfigError:
    """Return the fault of this staging directory, which must be the only one and name it."""
    found = faults(good | {"BACKUP_DIRECTORY": str(path)})
    assert list(found) == ["BACKUP_DIRECTORY"]
    assert str(path) in str(found["BACKUP_DIRECTORY"])
    return found["BACKUP_DIRECTORY"]


@pytest.mark.parametrize("below", ["", "backup", "chan-backup-archives/backup"])
def test_lnds_own_directory_is_a_fault(below: str, lnd: Lnd, good: dict[str, str]) -> None:
    """The directory of the file, and any below it, is not for staging."""
    assert "LND" in str(staging_fault(good, lnd.directory / below))


def test_lnds_own_directory_behind_a_link_is_a_fault(
    lnd: Lnd, good: dict[str, str], tmp_path: Path
) -> None:
    """LND's directory is recognised behind a link on either path."""
    (tmp_path / "link").symlink_to(lnd.directory)
    staging_fault(good, tmp_path / "link" / "backup")
    staging_fault(
        good | {"MONITOR_FILE_PATH": str(tmp_path / "link" / "channel.backup")},
        lnd.directory / "backup",
    )


def test_directory_of_a_linked_file_is_a_fault(
    lnd: Lnd, good: dict[str, str], tmp_path: Path
) -> None:
    """Where the file is a link, neither the link's directory nor its target's is for staging."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(lnd.directory)
    lnd.path.symlink_to(tmp_path / "elsewhere" / "channel.backup")
    good["MONITOR_FILE_PATH"] = str(tmp_path / "link" / "channel.backup")
    staging_fault(good, tmp_path / "elsewhere")
    staging_fault(good, lnd.directory / "backup")


@pytest.mark.parametrize(
    "name", ["wallet.db", "channel.db", "readonly.macaroon", "chan-backup-archives"]
)
def test_directory_with_lnds_files_is_a_fault(
    name: str, staging: Path, good: dict[str, str]
) -> None:
    """A directory that holds what LND keeps is not for staging, whatever MONITOR_FILE_PATH says."""
    (staging / name).touch()
    assert "LND" in str(staging_fault(good, staging))


def test_directory_with_lnds_files_that_cannot_be_listed_is_a_fault(
    public: Path, good: dict[str, str]
) -> None:
    """A directory of LND's is recognised by its files also where the user may enter it and not list
    it.
    """
    (public / "lnd").mkdir()
    (public / "lnd" / "wallet.db").touch()
    (public / "lnd").chmod(0o111)
    good["MONITOR_FILE_PATH"] = str(public / "channel.backup")
    with as_nobody():
        assert "LND" in str(staging_fault(good, public / "lnd"))
    (public / "lnd").chmod(0o755)


@pytest.mark.parametrize("target", ["real", "nothing", "link"])
def test_link_as_staging_directory_is_a_fault(
    target: str, good: dict[str, str], tmp_path: Path
) -> None:
    """A link, also a dangling one and a loop, is not for staging."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(target)
    assert re.search("link|directory", str(staging_fault(good, tmp_path / "link")))


def test_file_as_staging_directory_is_a_fault(good: dict[str, str], tmp_path: Path) -> None:
    """A file is not for staging."""
    (tmp_path / "file").touch(mode=0o600)
    assert re.search("link|directory", str(staging_fault(good, tmp_path / "file")))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_directory_of_another_user_is_a_fault(staging: Path, good: dict[str, str]) -> None:
    """A directory that belongs to somebody else is not for staging, and the fault says who that
    is.
    """
    os.chown(staging, NOBODY, NOBODY)
    assert str(NOBODY) in str(staging_fault(good, staging))


def test_effective_user_must_own_the_directory(
    staging: Path, good: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is the effective user; the hint names a directory that it can make itself."""
    monkeypatch.setattr(os, "geteuid", lambda: staging.stat().st_uid + 1)
    failure = staging_fault(good, staging)
    assert str(staging.stat().st_uid) in str(failure)
    assert re.search(rf"{re.escape(str(staging))}/[\w.-]*\w", failure.hint)


def test_a_directory_to_watch_is_the_one_fault(lnd: Lnd, good: dict[str, str]) -> None:
    """LND's directory in the place of its file is named, and what lies beside that directory is not
    blamed for it.
    """
    assert faults(good | {"MONITOR_FILE_PATH": str(lnd.directory)}).keys() == {"MONITOR_FILE_PATH"}


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o770, 0o777, 0o1777])
def test_directory_that_others_can_write_is_a_fault(
    mode: int, staging: Path, good: dict[str, str]
) -> None:
    """A directory that group or others may write is not for staging, until the hint was
    followed.
    """
    staging.chmod(mode)
    follow(staging_fault(good, staging).hint)
    assert faults(good) == {}


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_directory_that_others_can_only_read_is_taken(
    mode: int, staging: Path, good: dict[str, str]
) -> None:
    """A directory that only its owner may write is for staging, such as the one that systemd
    makes.
    """
    staging.chmod(mode)
    assert faults(good) == {}


@pytest.mark.parametrize("mode", [0o000, 0o500, 0o600])
def test_directory_that_its_owner_cannot_use_is_a_fault(
    mode: int, public: Path, good: dict[str, str]
) -> None:
    """A directory that its owner may not list, enter and write is not for staging."""
    staging = public / "staging"
    staging.mkdir()
    if os.geteuid() == 0:
        os.chown(staging, NOBODY, NOBODY)
    staging.chmod(mode)
    good["MONITOR_FILE_PATH"] = str(public / "lnd" / "channel.backup")
    with as_nobody():
        staging_fault(good, staging)
    staging.chmod(0o700)


def test_missing_directory_is_made_later(tmp_path: Path, good: dict[str, str]) -> None:
    """A directory whose parent is there is no fault, and reading the settings does not make it."""
    directory = tmp_path / "new"
    assert (
        program.load_settings(good | {"BACKUP_DIRECTORY": str(directory)}, "run").staging
        == directory
    )
    assert not directory.exists()


def test_missing_directory_in_a_parent_that_cannot_be_written_is_a_fault(
    public: Path, good: dict[str, str]
) -> None:
    """A directory that the user could not make is a fault."""
    public.chmod(0o555)
    good["MONITOR_FILE_PATH"] = str(public / "lnd" / "channel.backup")
    with as_nobody():
        staging_fault(good, public / "new")
    public.chmod(0o755)


def follow(hint: str) -> None:
    """Run the command that the hint names, as the user that runs the tests."""
    match = re.search(r"run: (?:sudo )?(.*)", hint)
    assert match, hint
    subprocess.run(shlex.split(match[1]), check=True)


@pytest.mark.parametrize("name", ["parent", "a parent", "it's"])
def test_hint_for_a_missing_parent_mends_it(
    name: str, tmp_path: Path, good: dict[str, str]
) -> None:
    """A directory without a parent is a fault, and the command in the hint makes it as it must
    be.
    """
    directory = tmp_path / name / "staging"
    follow(staging_fault(good, directory).hint)
    assert faults(good | {"BACKUP_DIRECTORY": str(directory)}) == {}


def test_directory_that_systemd_made_is_the_default(staging: Path, good: dict[str, str]) -> None:
    """STATE_DIRECTORY is the staging directory where BACKUP_DIRECTORY is absent or empty; of
    several, the first.
    """
    del good["BACKUP_DIRECTORY"]
    for given_ in ({}, {"BACKUP_DIRECTORY": ""}):
        for state in (str(staging), f"{staging}:/elsewhere/second"):
            found = program.load_settings(good | given_ | {"STATE_DIRECTORY": state}, "run")
            assert found.staging == staging


def test_backup_directory_wins_over_the_one_that_systemd_made(
    staging: Path, good: dict[str, str]
) -> None:
    """STATE_DIRECTORY means nothing beside BACKUP_DIRECTORY."""
    found = program.load_settings(good | {"STATE_DIRECTORY": "/elsewhere"}, "run")
    assert found.staging == staging


def test_fault_of_the_directory_that_systemd_made_names_it(lnd: Lnd, good: dict[str, str]) -> None:
    """STATE_DIRECTORY is held to the same rules, and the fault shows the path."""
    del good["BACKUP_DIRECTORY"]
    found = faults(good | {"STATE_DIRECTORY": str(lnd.directory)})
    assert str(lnd.directory) in str(found["BACKUP_DIRECTORY"])


# --- --env-file: accepted is what systemd reads alike ---


def read(text: str | bytes) -> dict[str, str]:
    """Return what an --env-file with this content sets."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "env")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return program.read_env_file(path)


def simple_reading(text: str) -> dict[str, str]:
    """Read lines of KEY=value as systemd does where it needs none of its special rules."""
    values = {}
    for line in re.split(r"\r\n|\n|\r", text):
        bare = line.strip(" \t")
        if bare and not bare.startswith("#"):
            name, _, value = bare.partition("=")
            value = value.strip(" \t")
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
            values[name.strip(" \t")] = value[1:-1] if quoted else value
    return values


ALIKE = {
    "A=b": "b",
    "A=": "",
    "A = b": "b",
    "  A=b  ": "b",
    "A=b c": "b c",
    "A=b#c": "b#c",
    "A=a=b=c": "a=b=c",
    "A=$HOME": "$HOME",
    "A=${HOME}": "${HOME}",
    "A='${HOME}'": "${HOME}",
    'A="${HOME}"': "${HOME}",
    "A=$(id)": "$(id)",
    "A=`id`": "`id`",
    "A=b;c": "b;c",
    'A="b c"': "b c",
    "A='b c'": "b c",
    "A='b\"c'": 'b"c',
    'A="it\'s"': "it's",
    'A=""': "",
    "A=b\r\n": "b",
    "A=\u00fcber": "\u00fcber",
    "\n\n# comment\n  # another\nA=b": "b",
    "A=first\nA=b": "b",
}


@pytest.mark.parametrize(("text", "value"), ALIKE.items(), ids=ascii)
def test_line_that_systemd_reads_alike_is_accepted(text: str, value: str) -> None:
    """A line that means the same to systemd is read, and nothing in it is replaced."""
    assert read(text + "\n") == {"A": value} == simple_reading(text)
    assert read(text) == {"A": value}


OTHERWISE = [
    "A=b # comment",
    "A=b\t#comment",
    'A="b" # comment',
    "A= # comment",
    "export A=b",
    "export =b",
    "# comment \\",
    'A="a\\nb"',
    "A=a\\nb",
    'A="a\\$b"',
    "A='a\\\\b'",
    'A="a"b',
    "A='a'b'",
    "A=b\\",
    'A="b',
    "A='b",
    "A",
    "A b=c",
    "=b",
    "1A=b",
    "A-B=c",
    "A.B=c",
    "\u00c4=b",
    "A\u00e9=b",
    "\ufeffA=b",
    "; comment",
    "A: b",
    "A=b\0c",
    "\u00a0A=b",
    "A=b\u00a0",
    "A=b\x85#c",
    "A=b\x0c#c",
    "A\u2003=b",
]


@pytest.mark.parametrize("line", OTHERWISE, ids=ascii)
def test_line_that_systemd_reads_otherwise_is_refused(line: str) -> None:
    """A line that systemd reads otherwise, or not at all, is refused, and the fault names the line
    by its number.
    """
    with pytest.raises(program.ConfigError, match=r"line 2\b") as caught:
        read(f"# first\n{line}\nB=c\n")
    assert caught.value.exit_code == 78
    assert caught.value.hint


def test_every_refused_line_is_named() -> None:
    """All lines that are refused are named at once."""
    with pytest.raises(program.ConfigError, match="line 1, 3"):
        read("export A=b\nB=c\nC=d # comment\n")


pieces = st.sampled_from(
    [*"AB_1=#;$ \t\"'\\\n\r\f\v\0", "\r\n", "KEY=", "export ", "\x85", "\u00a0", "\u2028", "\u00e9"]
)


@settings(deadline=None, max_examples=500)
@given(st.lists(pieces, max_size=12).map("".join) | st.text(st.characters(codec="utf-8")))
@example("A=b\x85#c")
@example("A=b\u00a0")
def test_accepted_file_means_what_a_simple_reading_gives(text: str) -> None:
    """Any file that is accepted sets what a plain reading of its lines sets, to values that a
    process can have.
    """
    try:
        values = read(text)
    except program.ConfigError:
        return
    assert values == simple_reading(text)
    assert all(re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) for name in values)
    assert not any("\0" in value for value in values.values())


plain_values = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters="\"'\\#")
).map(str.strip)


@settings(deadline=None)
@given(st.dictionaries(st.from_regex("[A-Z_][A-Z0-9_]{0,20}", fullmatch=True), plain_values))
def test_plain_file_is_accepted(values: dict[str, str]) -> None:
    """Any file of KEY=value without quotes, backslashes and # is accepted as it is."""
    assert read("".join(f"{name}={value}\n" for name, value in values.items())) == values


# --- the command line ---


def start(good: dict[str, str], *arguments: str, code: int = 78) -> list[str]:
    """Run the program to its early end, in which nothing was made or watched, and return the lines
    of its log.
    """
    staging = Path(good.get("BACKUP_DIRECTORY") or "/nowhere")
    before = list(staging.iterdir()) if staging.is_dir() else None
    done = run_script(good, *arguments)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert (list(staging.iterdir()) if staging.is_dir() else None) == before
    assert not re.search("watching|Traceback", done.stderr)
    return done.stderr.splitlines()


@pytest.mark.parametrize("command", [[], ["once"]])
def test_all_faults_are_told_at_once(command: list[str], lnd: Lnd) -> None:
    """Each fault is a line with variable and value, and one with what to do; then exit 78, and
    nothing was made.
    """
    wrong = {
        "MONITOR_FILE_PATH": str(lnd.directory),
        "BACKUP_DIRECTORY": str(lnd.directory / "missing" / "staging"),
        "S3_BUCKET_NAME": "s3://bucket",
        "S3_BACKUP_PREFIX": "/a",
        "RESCAN_SECONDS": "0",
        "REFRESH_SECONDS": "-1",
        "SHUTDOWN_GRACE_SECONDS": "ten",
        "METRICS_FILE": "metrics",
        "COPY_DIRECTORY": "copies",
    }
    secret = {"AWS_SECRET_ACCESS_KEY": "ge heim", "AWS_ACCESS_KEY_ID": " heim"}
    lines = start(wrong | secret | {"HEARTBEAT_URL": "geheim"}, *command)
    for name, value in wrong.items():
        assert sum(f" {name}={value}: " in line for line in lines) == 1, name
    for name in (*secret, "HEARTBEAT_URL"):
        assert sum(f"{name}=" in line for line in lines) == 1, name
    assert not any("heim" in line for line in lines)
    assert ["hint: " in line for line in lines] == [False, True] * 12
    assert list(lnd.directory.iterdir()) == []


def test_no_file_is_read_unasked(good: dict[str, str], tmp_path: Path) -> None:
    """Without settings the required ones are told, and a .env in the working directory is not
    read.
    """
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in good.items()))
    done = run_script({}, "run", cwd=tmp_path)
    assert done.returncode == 78
    assert [name for name in REQUIRED if f"{name}=: is not set" in done.stderr] == list(REQUIRED)


AWS_FAULTS = [
    {"AWS_PROFILE": "nix"},
    {"AWS_REQUEST_CHECKSUM_CALCULATION": "bogus"},
    {"AWS_REGION": "us east"},
    {"AWS_CONFIG_FILE": str(SCRIPT)},
    {"AWS_CA_BUNDLE": "/nowhere/ca.pem"},
    {"AWS_ENDPOINT_URL": "https://s3. example.org"},
    *[
        {"AWS_ENDPOINT_URL_S3": url}
        for url in (
            "s3.example.org",
            "//s3.example.org",
            "ftp://s3.example.org",
            "http://host:port",
            "https:///a",
            "HTTPS",
        )
    ],
]


@pytest.mark.parametrize("wrong", AWS_FAULTS, ids=str)
def test_value_that_the_sdk_cannot_use_is_a_fault_that_shows_it(
    wrong: dict[str, str], good: dict[str, str], tmp_path: Path
) -> None:
    """What the AWS SDK cannot use is told beside a fault of ours, before anything is made, with
    exit 78, the value, and what to do.
    """
    good["BACKUP_DIRECTORY"] = str(tmp_path / "new")
    if "AWS_ENDPOINT_URL" in wrong:
        del good["AWS_ENDPOINT_URL_S3"]
    lines = start(good | wrong | {"RESCAN_SECONDS": "0"}, "once")
    assert any("RESCAN_SECONDS=0" in line for line in lines)
    assert any(value in line for value in wrong.values() for line in lines)
    assert ["hint: " in line for line in lines] == [False, True] * 2
    assert not (tmp_path / "new").exists()


def write_env(path: Path, text: str | bytes) -> Path:
    """Write an --env-file."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_env_file_is_read_and_the_environment_wins(good: dict[str, str], tmp_path: Path) -> None:
    """What the file sets counts as it is, without interpolation, unless the environment has it."""
    text = "RESCAN_SECONDS=-5\nREFRESH_SECONDS=-6\nS3_BUCKET_NAME=${HOME}\n"
    path = write_env(tmp_path / "env", text)
    del good["S3_BUCKET_NAME"]
    lines = start(good | {"RESCAN_SECONDS": "-7"}, "--env-file", str(path), "run")
    told = [line.partition("configuration: ")[2] for line in lines if "configuration: " in line]
    assert sorted(line.rpartition(": ")[0] for line in told) == [
        "REFRESH_SECONDS=-6",
        "RESCAN_SECONDS=-7",
        "S3_BUCKET_NAME=${HOME}",
    ]


def test_env_file_that_is_missing_is_wrong_configuration(
    good: dict[str, str], tmp_path: Path
) -> None:
    """An --env-file that is not there is told with its path, and exits 78."""
    lines = start(good, "--env-file", str(tmp_path / "missing"), "once")
    assert f"{tmp_path / 'missing'}: No such file" in lines[0]
    assert "hint: " in lines[1]


def test_env_file_with_nul_is_wrong_configuration(good: dict[str, str], tmp_path: Path) -> None:
    """An --env-file with a NUL byte, which no variable can hold, is told with its path and line,
    and exits 78.
    """
    path = write_env(tmp_path / "env", b"A=b\0c\n")
    assert f"{path}: line 1" in start(good, "--env-file", str(path), "once")[0]


@pytest.mark.parametrize("what", ["directory", "not UTF-8", "unreadable"])
def test_env_file_that_is_no_text_is_wrong_configuration(what: str, public: Path) -> None:
    """An --env-file that is a directory, not UTF-8 or not readable is wrong configuration, with its
    path.
    """
    path = public / "env"
    if what == "directory":
        path.mkdir()
    else:
        write_env(path, b"A=\xff\n")
    if what == "unreadable":
        path.chmod(0)
    with as_nobody(), pytest.raises(program.ConfigError, match=re.escape(str(path))) as caught:
        program.read_env_file(path)
    assert caught.value.exit_code == 78


USAGE = [
    ["nonsense"],
    ["--nonsense"],
    ["--env-file"],
    ["run", "more"],
    ["--vers"],
]


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What is no command and no option is told with the usage, and exits 2."""
    with pytest.raises(SystemExit) as caught:
        program.main(arguments)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("usage: s3_backup_lnd_channels.py")


def test_wrong_usage_of_the_real_program_exits_2(good: dict[str, str]) -> None:
    """The process itself exits 2 before it reads a setting."""
    start({"BACKUP_DIRECTORY": good["BACKUP_DIRECTORY"]}, "nonsense", code=2)


def test_version_is_printed() -> None:
    """--version needs no settings and prints the program's version."""
    done = run_script({}, "--version")
    assert (done.returncode, done.stdout) == (
        0,
        f"s3_backup_lnd_channels.py {program.__version__}\n",
    )


# --- secrets and journald ---

PASSWORDS = [f"http://alice:{word}@127.0.0.1:9" for word in ("geheim", "ge/heim", "ge heim")]
PASSWORDS.append("alice:geheim@127.0.0.1:9")


@pytest.mark.parametrize("url", PASSWORDS)
@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "HTTP_PROXY"])
def test_password_in_a_url_is_never_told(
    name: str, url: str, good: dict[str, str], lnd: Lnd
) -> None:
    """User and password in the URL of the endpoint or the proxy, also in one that is faulty, never
    reach the output.
    """
    lnd.write()
    good |= {
        "SHUTDOWN_GRACE_SECONDS": "0",
        "AWS_ENDPOINT_URL_S3": "http://s3.example.org",
        name: url,
    }
    with Script(good, "run") as script:
        script.wait_for_log("error: |cannot store")
        if script.returncode is None:
            script.stop()
        output = script.log + script.stdout
    assert "alice" not in output
    assert "heim" not in output


def test_every_line_has_a_priority_for_journald(good: dict[str, str], tmp_path: Path) -> None:
    """Where stderr is the journal, every line of every fault, hints included, begins with its
    priority.
    """
    out, into = os.pipe()
    status = os.fstat(into)
    environ = good | {
        "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}",
        "RESCAN_SECONDS": "0\n<0>forged",
        "S3_BUCKET_NAME": "",
    }
    with os.fdopen(out, "rb") as reader:
        try:
            environment = script_environment(environ, str(tmp_path))
            done = subprocess.run(
                [sys.executable, str(SCRIPT)], env=environment, stderr=into, check=False
            )
        finally:
            os.close(into)
        lines = reader.read().decode().splitlines()
    assert done.returncode == 78
    assert len(lines) == 4
    assert all(line.startswith("<3>") for line in lines)
