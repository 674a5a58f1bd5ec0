"""The --env-file: accepted is what systemd reads alike, and the environment wins."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kit import FakeS3, as_nobody, run_script
from shared import start

import s3_backup_lnd_channels as program

REQUIRED = ("MONITOR_FILE_PATH", "BACKUP_DIRECTORY", "S3_BUCKET_NAME")


# --- What is accepted ---


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


# --- What is read ---


def test_no_file_is_read_unasked(good: dict[str, str], tmp_path: Path) -> None:
    """Without settings the required ones are told, and a .env in the working directory is not
    read.
    """
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in good.items()))
    done = run_script({}, "run", cwd=tmp_path)
    assert done.returncode == 78
    assert [name for name in REQUIRED if f"{name}=: is not set" in done.stderr] == list(REQUIRED)


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


@pytest.mark.unmeasured
def test_a_byte_order_mark(fake: FakeS3, written_env: dict[str, str], tmp_path: Path) -> None:
    """A file that begins with a byte order mark is taken, or the mark is named."""
    text = "".join(f"{name}={value}\n" for name, value in written_env.items())
    (tmp_path / "env").write_text(text, encoding="utf-8-sig")
    done = run_script({}, "--env-file", str(tmp_path / "env"), "once")
    if done.returncode:
        assert done.returncode == 78
        said = done.stderr.replace(str(tmp_path), "")  # which bears the name of this test
        assert re.search("(?i)byte.order.mark|BOM", said)
    else:
        assert len(fake.objects("some-bucket")) == 1


@pytest.mark.unmeasured
def test_a_file_of_another_encoding(written_env: dict[str, str], tmp_path: Path) -> None:
    """A file in UTF-16, as an editor of Windows writes it, is refused as that."""
    text = "".join(f"{name}={value}\n" for name, value in written_env.items())
    (tmp_path / "env").write_text(text, encoding="utf-16")
    done = run_script({}, "--env-file", str(tmp_path / "env"), "once")
    assert done.returncode == 78
    assert "UTF-8" in done.stderr


@pytest.mark.unmeasured
def test_the_env_file_before_and_after_the_command(
    fake: FakeS3, written_env: dict[str, str], tmp_path: Path
) -> None:
    """`--env-file` is taken before and after the command; one that is not there is exit 78."""
    file = str(tmp_path / "env")
    (tmp_path / "env").write_text(
        "".join(f"{name}={value}\n" for name, value in written_env.items())
    )
    for args in (("--env-file", file, "once"), ("once", "--env-file", file)):
        done = run_script({}, *args)
        assert done.returncode == 0, done.stderr
    assert len(fake.requests) == 2
    for options in (("--env-file", file, "--json"), ("--json", f"--env-file={file}")):
        assert run_script({}, "check", *options).returncode == 0
    for args in (("--env-file", "/nowhere", "once"), ("once", "--env-file", "/nowhere")):
        done = run_script(written_env, *args)
        assert done.returncode == 78
        assert "/nowhere: No such file" in done.stderr
        assert "hint: " in done.stderr
    assert run_script(written_env, "once", "--env-file").returncode == 2


@pytest.mark.unmeasured
def test_an_empty_variable_hides_the_one_in_the_file(
    fake: FakeS3, written_env: dict[str, str], tmp_path: Path
) -> None:
    """The file never overrides the environment, in which an empty variable counts as not set."""
    file = tmp_path / "settings"
    file.write_text("S3_BACKUP_PREFIX=bob/\n")
    done = run_script(written_env | {"S3_BACKUP_PREFIX": ""}, "--env-file", str(file), "once")
    assert done.returncode == 0, done.stderr
    (request,) = fake.requests
    assert "/bob/" not in request.path
