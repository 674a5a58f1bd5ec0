"""What tests/README.md and CONTRIBUTING.md say of the tests is true, and no row is missing."""

from __future__ import annotations

import re

import pytest
import test_docs
from kit import CHECKOUT

import s3_backup_lnd_channels as program

TESTS = CHECKOUT / "tests"
TABLES = (TESTS / "README.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def rows(first: str) -> dict[str, str]:
    """Return the second cells of every table whose first column has this head, by the first."""
    found: dict[str, str] = {}
    for table in re.findall(rf"^\| {first} \|.*\n\|[-| ]+\n((?:\|.*\n)+)", TABLES, re.MULTILINE):
        for line in table.splitlines():
            row = re.fullmatch(r"\| (.+?) \| (.*) \|", line)
            assert row, line
            assert row[1] not in found, f"there twice: {row[1]}"
            found[row[1]] = row[2]
    assert found, f"no table begins with {first}"
    return found


def test_every_named_test_exists() -> None:
    named = NAMED.findall(TABLES)
    for file, test in named:
        source = (TESTS / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{file}::{test}"
    assert len(re.findall(r"`[^`\n]*\.py::[^`\n]*`", TABLES)) == len(named)


@pytest.mark.parametrize("first", ["promise", "setting", "exit code"])
def test_every_row_names_a_test(first: str) -> None:
    """It has nothing else in its cell."""
    for name, cell in rows(first).items():
        assert NAMED.search(cell), name
        assert NAMED.sub("", cell).strip(", ") == "", name


def test_every_setting_has_a_row() -> None:
    assert set(rows("setting")) == {f"`{name}`" for name in program.SETTINGS}


def test_every_exit_code_has_a_row() -> None:
    codes = {program.EXIT_DONE, program.EXIT_FAILED, 2, program.EXIT_TRY_AGAIN, program.EXIT_CONFIG}
    assert set(rows("exit code")) == {str(code) for code in codes} | {"128 + signal"}


def test_every_file_of_tests_is_named() -> None:
    named = {name for name, _ in NAMED.findall(TABLES)}
    files = [*TESTS.glob("test_*.py"), *TESTS.glob("*/on_*.py"), TESTS / "faults/node.py"]
    assert [file.name for file in files if file.relative_to(TESTS).as_posix() not in named] == []


def test_every_module_of_the_kit_is_described() -> None:
    """The names that begin a row are the module's."""
    told = rows("module")
    modules = {f"`kit/{module.name}`": module for module in (TESTS / "kit").glob("*.py")}
    assert set(told) == set(modules)
    for name, module in modules.items():
        assert len(told[name].split()) > 4, name
        source = module.read_text(encoding="utf-8")
        for word in re.findall(r"`(\w+)`", told[name].partition(":")[0]):
            assert re.search(rf"^(class|def) {word}\b", source, re.MULTILINE), (name, word)


def test_every_directory_is_described() -> None:
    """The directories that are named exist, and those below tests/ are all named."""
    told = rows("directory")
    for name, cell in told.items():
        assert (CHECKOUT / name.strip("`")).is_dir(), name
        assert cell, name
    there = {f"`tests/{path.name}`" for path in TESTS.iterdir() if path.is_dir()}
    assert there - {"`tests/__pycache__`"} | {"`bench`"} == set(told)


def test_the_limits_are_those_that_are_tested() -> None:
    """CONTRIBUTING.md names each limit of tests/test_docs.py on the program, with its number."""
    text = (CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    limits = dict(re.findall(r"^\| `([A-Z]+_MAX)` \| (.+?) \|", text, re.MULTILINE))
    whole = {name for name in vars(test_docs) if name.endswith("_MAX")}
    assert set(limits) == whole
    for name, told in limits.items():
        if not told.startswith("see "):
            assert float(told.split()[0]) == getattr(test_docs, name), name
    assert f" at {test_docs.COLUMNS} columns" in " ".join(text.split())
