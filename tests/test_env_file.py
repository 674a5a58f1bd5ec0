"""The --env-file: accepted is what systemd reads alike, and the environment wins."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kit import FakeS3, as_nobody, run_script
from shared import UNPRINTABLE, done_well, env_file, refused, start

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from shared import Env


# --- What is accepted ---


def read(text: str) -> Env:
    """Return what an --env-file with this content sets."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(text.encode())
        file.flush()
        return program.read_env_file(Path(file.name))


def simple_reading(text: str) -> Env:
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
    "A=!$%&()*+,-./:;<=>?@[]^_`{|}~": "!$%&()*+,-./:;<=>?@[]^_`{|}~",
    'A="b c"': "b c",
    "A='b c'": "b c",
    "A='b\"c'": 'b"c',
    'A="it\'s"': "it's",
    'A=""': "",
    "A=b\r\n": "b",
    "A=\u00fcber": "\u00fcber",
    f"A=b{UNPRINTABLE}": f"b{UNPRINTABLE}",
    "\n\n# comment\n  # another\nA=b": "b",
    "# a \\ b\nA=b": "b",
    "A=first\nA=b": "b",
}


@pytest.mark.parametrize(("text", "value"), ALIKE.items(), ids=ascii)
def test_line_that_systemd_reads_alike_is_accepted(text: str, value: str) -> None:
    """Nothing in it is replaced."""
    assert read(text) == read(text + "\n") == simple_reading(text) == {"A": value}


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


def test_line_that_systemd_reads_otherwise_is_refused(good: Env, tmp_path: Path) -> None:
    """So is one that systemd does not read at all; all are named at once by their numbers."""
    path = tmp_path / "env"
    path.write_text("# first\n" + "\nB=c\n".join(OTHERWISE), encoding="utf-8", newline="")
    said = start(good, "--env-file", str(path), "once")
    numbers = ", ".join(str(2 * number) for number in range(1, len(OTHERWISE) + 1))
    assert said[0].endswith(f"{path}: line {numbers}")


pieces = st.sampled_from(
    [*"AB_1=#;$ \t\"'\\\n\r\f\v\0", "\r\n", "KEY=", "export ", "\x85", "\u00a0", "\u2028", "\u00e9"]
)


@settings(deadline=None, max_examples=250)
@given(st.lists(pieces, max_size=12).map("".join) | st.text(st.characters(codec="utf-8")))
@example("A=b\x85#c")
@example("A=b\u00a0")
def test_accepted_file_means_what_a_simple_reading_gives(text: str) -> None:
    """The values are such that a process can have them."""
    try:
        values = read(text)
    except program.ConfigError:
        return
    assert values == simple_reading(text)
    assert all(re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) for name in values)
    assert not any("\0" in value for value in values.values())


# --- What is read ---


def test_no_file_is_read_unasked(good: Env, tmp_path: Path) -> None:
    """Not even a .env in the working directory."""
    Path(env_file(tmp_path, good)).rename(tmp_path / ".env")
    done = run_script({}, "run", cwd=tmp_path)
    assert done.returncode == 78
    required = ["MONITOR_FILE_PATH", "BACKUP_DIRECTORY", "S3_BUCKET_NAME"]
    assert re.findall(r"(\w+)=: is not set", done.stderr) == required


def test_env_file_is_read_and_the_environment_wins(good: Env, tmp_path: Path) -> None:
    """Nothing is interpolated; an empty variable wins as well, and counts as not set."""
    wrong = {
        "RESCAN_SECONDS": "-5",
        "REFRESH_SECONDS": "-6",
        "S3_BUCKET_NAME": "${HOME}",
        "S3_BACKUP_PREFIX": "/bob",
    }
    del good["S3_BUCKET_NAME"]
    env = good | {"RESCAN_SECONDS": "-7", "S3_BACKUP_PREFIX": ""}
    lines = start(env, "--env-file", env_file(tmp_path, wrong), "run")
    told = re.findall("configuration: (.*): ", "\n".join(lines))
    assert sorted(told) == ["REFRESH_SECONDS=-6", "RESCAN_SECONDS=-7", "S3_BUCKET_NAME=${HOME}"]


@pytest.mark.parametrize("what", ["directory", "UTF-16", "unreadable"])
def test_env_file_that_is_no_text_is_wrong_configuration(what: str, public: Path) -> None:
    path = Path(env_file(public, {"A": "b"}, "UTF-16"))
    if what == "directory":
        path.unlink()
        path.mkdir()
    elif what == "unreadable":
        path.chmod(0)
    with as_nobody(), pytest.raises(program.ConfigError, match=re.escape(str(path))) as caught:
        program.read_env_file(path)
    assert ("not UTF-8" in str(caught.value)) == (what == "UTF-16")


@pytest.mark.unmeasured
def test_the_env_file_before_and_after_the_command(
    fake: FakeS3, written_env: Env, tmp_path: Path
) -> None:
    """It may begin with a byte order mark; one that is not there is exit 78."""
    file = env_file(tmp_path, written_env, "utf-8-sig")
    done_well({}, "--env-file", file, "once")
    done_well({}, "once", "--env-file", file)
    assert len(fake.requests) == 2
    done_well({}, "check", "--env-file", file, "--json")
    done_well({}, "check", "--json", f"--env-file={file}")
    refused(written_env, "/nowhere: No such file", args=("--env-file", "/nowhere", "once"))
    refused(written_env, "/nowhere: No such file", args=("once", "--env-file", "/nowhere"))
    assert run_script(written_env, "once", "--env-file").returncode == 2
