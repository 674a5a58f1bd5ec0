"""What the documents say of the program, held against the program."""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import tarfile
import tokenize
from hashlib import sha256
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from kit import CHECKOUT, SCRIPT, run_script
from shared import run_command

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from pathlib import Path

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
REFERENCE = (CHECKOUT / "docs/reference.md").read_text(encoding="utf-8")
EXAMPLE = (CHECKOUT / "lnd-backup-env.example").read_text(encoding="utf-8")
COLUMNS = 100
# These may be lowered, and never raised: a limit that gives way to a change only counts.
LINES_MAX = 1927
HEART_MAX = 621
TOKENS_MAX = 9.5  # in a line of code
FUNCTION_MAX = 45  # lines
CONDITIONALS_MAX = 3  # conditional expressions in 100 lines of code
LIST_FIELDS = ["key", "name", "captured_at", "stored_at", "size_bytes", "empty", "marks"]
CHECK_FIELDS = ["current", "proof", "key", "captured_at", "stored_at", "staged", "reason"]
SOURCE = SCRIPT.read_text(encoding="utf-8")
LINES = SOURCE.splitlines()


def heart() -> int:
    """Return the number of lines of sections 1 to 4."""
    [text] = re.findall(r"^# --- 1\. .*?(?=^# --- 5\. )", SOURCE, re.MULTILINE | re.DOTALL)
    return len(text.splitlines())


def test_the_program_is_read_in_one_sitting() -> None:
    """The program is short, its heart is shorter and stands first, and it is not packed."""
    nodes = list(ast.walk(ast.parse(SOURCE)))
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    docstrings = {
        (node.body[0].lineno, node.body[0].col_offset)
        for node in nodes
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node) is not None
    }
    tokens, within = [], 0
    for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline):
        kind = tokenize.tok_name[token.type]
        within -= kind == "FSTRING_END"  # from Python 3.12 on, an f-string is several tokens
        is_code = kind != "COMMENT" and token.string.strip() and token.start not in docstrings
        if is_code and within == 0 and kind != "FSTRING_END":
            tokens.append(token)
        within += kind == "FSTRING_START"
    code = len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)})
    conditionals = sum(isinstance(node, ast.IfExp) for node in nodes)
    print(  # noqa: T201
        f"{len(LINES)} lines, heart {heart()}, {code} of code, "
        f"{len(tokens) / code:.2f} tokens each, {100 * conditionals / code:.1f} conditionals in 100"
    )
    assert max(map(len, LINES)) <= COLUMNS
    assert [n.name for n in functions if (n.end_lineno or 0) - n.lineno >= FUNCTION_MAX] == []
    assert len(tokens) <= TOKENS_MAX * code
    assert 100 * conditionals <= CONDITIONALS_MAX * code
    assert heart() <= HEART_MAX
    assert len(LINES) <= LINES_MAX


def test_the_size_in_the_readme_is_true() -> None:
    words = " ".join(README.split()).replace(",", "")
    assert re.search(rf"one file of {len(LINES)} lines", words)
    assert re.search(rf"sections 1 to 4 {heart()} lines", words)


@pytest.mark.parametrize("name", program.SETTINGS)
def test_every_setting_is_documented_with_its_default(name: str) -> None:
    """It stands in the reference's table and in the example."""
    default = program.SETTINGS[name][0]
    [row] = [line for line in REFERENCE.splitlines() if line.startswith(f"| `{name}` |")]
    told = {None: "required", "": "empty|none"}.get(default, str(default))
    assert re.search(told, row)
    assert re.search(rf"^#?{name}={default or ''}", EXAMPLE, re.MULTILINE)


def test_the_example_is_accepted(tmp_path: Path) -> None:
    """So it is with every commented setting uncommented."""
    whole = tmp_path / "all"
    whole.write_text(re.sub("(?m)^#(?=[A-Z_0-9]+=)", "", EXAMPLE), encoding="utf-8")
    for path in (CHECKOUT / "lnd-backup-env.example", whole):
        assert "S3_BUCKET_NAME" in program.read_env_file(path)


@pytest.mark.parametrize("fields", [LIST_FIELDS, CHECK_FIELDS])
def test_every_json_field_is_documented(fields: list[str]) -> None:
    """The reference names the fields that --json prints, in their order."""
    plain = " ".join(re.sub(r" \([^)]*\)", "", REFERENCE).split())
    assert ", ".join(f"`{field}`" for field in fields) in plain


def test_every_command_and_exit_code_is_documented() -> None:
    shown = run_script({}, "--help").stdout
    for name in program.COMMANDS:
        assert re.search(rf"^\s+{name}\s", shown, re.MULTILINE)
        assert re.search(rf"^\| `{name}`", REFERENCE, re.MULTILINE)
    codes = {program.EXIT_DONE, program.EXIT_FAILED, 2, program.EXIT_TRY_AGAIN, program.EXIT_CONFIG}
    assert codes == {int(code) for code in re.findall(r"^\| (\d+) \|", REFERENCE, re.MULTILINE)}


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    """It says first what it is for whom, and where the exit codes and the settings are."""
    lines = README.splitlines()
    assert len(lines) < 200
    first = " ".join(lines[:6])
    for word in ("Lightning", "LND", "S3-compatible", "channel.backup"):
        assert word in first
    pages = {page.name for page in (CHECKOUT / "docs").glob("*.md")}
    assert set(re.findall(r"\]\(docs/([a-z-]+\.md)", README)) == pages
    [row] = [line for line in lines if line.startswith("| [docs/reference.md]")]
    for word in ("commands", "exit codes", "--json", "all settings"):
        assert word in row


def test_the_readme_names_what_was_tried_and_what_was_not() -> None:
    """The servers of the box are those of docs/stores.md, and what was not tried is said."""
    [box] = re.findall(r"(?:^>.*\n)+", README, re.MULTILINE)
    stores = (CHECKOUT / "docs/stores.md").read_text(encoding="utf-8")
    [head] = re.findall(r"^\| feature \|(.*)\|$", stores, re.MULTILINE)
    for server in head.split("|"):
        for word in server.split():
            assert word in box
    for word in ("Not tried", "paid store", "Raspberry Pi", "mainnet"):
        assert word in box


def test_the_picture_is_whole_and_needs_nothing_from_elsewhere() -> None:
    """docs/demo.svg is small, refers to nothing outside itself, and shows that nothing was lost."""
    assert "](docs/demo.svg)" in README
    picture = (CHECKOUT / "docs/demo.svg").read_text(encoding="utf-8")
    assert len(picture) < 60_000
    root = ET.fromstring(picture)  # noqa: S314 - our own file
    assert not re.search(r"\b(href|src)=|@import|@font-face|url\((?!#)", picture)
    shown = " ".join(root.itertext()).replace("\xa0", " ")
    assert re.search(r"(\d+) versions written, \1 stored, 0 lost, 0 left in staging", shown)
    assert str(CHECKOUT) not in shown


def test_a_release_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    """It has the last commit, not what lies beside it, and its name has the version."""
    user = dict(os.environ)  # whose git may need settings of its own
    shown = run_command("git", "show", "HEAD:s3_backup_lnd_channels.py", env=user, cwd=CHECKOUT)
    if shown.returncode:
        pytest.skip("not in a repository of git, or of somebody else's")
    made = []
    for name in ("one", "two"):
        clone = tmp_path / name
        told = ("git", "clone", "--quiet", "--shared", CHECKOUT, clone)
        assert run_command(*told, env=user).returncode == 0
        shutil.copy(CHECKOUT / "Makefile", clone)  # before it is committed, too
        (clone / "left-over").write_text(name)
        assert run_command("make", "--silent", "dist", env=user, cwd=clone).returncode == 0
        made.append({file.name: file.read_bytes() for file in (clone / "dist").iterdir()})
    assert made[0] == made[1]
    found = re.search(r'^__version__ = "(.+)"$', shown.stdout, re.MULTILINE)
    assert found
    top = f"lnd-backup-{found[1]}"
    archive = made[0].pop(f"{top}.tar.gz")
    assert made[0] == {"SHA256SUMS": f"{sha256(archive).hexdigest()}  {top}.tar.gz\n".encode()}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        names = [entry.name for entry in tar if entry.isfile()]
        assert len({entry.mtime for entry in tar}) == 1
        packed_script = tar.extractfile(f"{top}/s3_backup_lnd_channels.py")
        assert packed_script
        assert packed_script.read().decode() == shown.stdout
    assert names == sorted(names)
    assert {name.split("/")[0] for name in names} == {top}
    for name in ("README.md", "requirements.txt", "systemd/install.sh", "docs/recovery.md"):
        assert f"{top}/{name}" in names
    assert f"{top}/left-over" not in names


def test_a_venv_behind_a_link_is_not_emptied(tmp_path: Path) -> None:
    """`make` refuses in a line where .venv is a link, and what it leads to stays as it is."""
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(CHECKOUT / name, tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/kept").touch()
    (tmp_path / ".venv").symlink_to("other")
    done = run_command("make", "--silent", "lint", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.startswith(".venv is a symbolic link")
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["kept"]


def test_the_program_has_one_version() -> None:
    """The version of --version is the newest in the changelog, or not released yet."""
    changelog = (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{program.__version__}]" in changelog
    told = run_script({}, "--version").stdout
    assert told == f"s3_backup_lnd_channels.py {program.__version__}\n"
