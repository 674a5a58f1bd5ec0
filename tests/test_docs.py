"""What the documents say of the program, held against the program."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess

import pytest
from kit import CHECKOUT, SCRIPT, run_script

import s3_backup_lnd_channels as program

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
EXAMPLE = (CHECKOUT / "lnd-backup-env.example").read_text(encoding="utf-8")
UNIT = CHECKOUT / "lnd-backup.service"
LINES_MAX = 1348
LIST_FIELDS = ["key", "name", "captured_at", "stored_at", "size_bytes", "empty", "marks"]
CHECK_FIELDS = ["current", "proof", "key", "captured_at", "stored_at", "staged", "reason"]
OWN_SETTINGS = [
    name
    for name in program.VALUES
    if not name.startswith("AWS_") and not name.lower().endswith("_proxy")
]


def test_the_size_in_the_readme_is_true_and_a_promise() -> None:
    """The README tells the number of the program's lines, and they stay few, none over 120
    columns.
    """
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    assert f"one file of {len(lines)} lines" in README
    assert len(lines) <= LINES_MAX
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", OWN_SETTINGS)
def test_every_setting_is_documented_with_its_default(name: str) -> None:
    """Each setting of the program stands in the README's table and in the example, with its
    default.
    """
    default = program.VALUES[name][0]
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
    assert (
        default in row
        if default
        else re.search("required" if default is None else "empty|none", row)
    )
    assert re.search(rf"^#?{name}={default or ''}", EXAMPLE, re.MULTILINE)


def test_the_example_is_accepted(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The example is an --env-file that both readers understand, with every commented setting
    uncommented too.
    """
    whole = tmp_path_factory.mktemp("env") / "all"
    whole.write_text(
        re.sub(r"^#(?=[A-Z_0-9]+=)", "", EXAMPLE, flags=re.MULTILINE), encoding="utf-8"
    )
    for path in (CHECKOUT / "lnd-backup-env.example", whole):
        assert "S3_BUCKET_NAME" in program.read_env_file(path)


@pytest.mark.parametrize("fields", [LIST_FIELDS, CHECK_FIELDS])
def test_every_json_field_is_documented(fields: list[str]) -> None:
    """The README names the fields that --json prints, in their order."""
    assert ", ".join(f"`{field}`" for field in fields) in re.sub(
        r" \([^)]*\)|\n +", lambda m: " " * ("\n" in m[0]), README
    )


def test_every_command_and_exit_code_is_documented() -> None:
    """The README's tables name the commands of --help and the exit codes of the program."""
    shown = run_script({}, "--help").stdout
    for name in program.COMMANDS:
        assert re.search(rf"^\s+{name}\s", shown, re.MULTILINE)
        assert re.search(rf"^\| `{name}`", README, re.MULTILINE)
    codes = {program.DONE, program.FAILED, 2, program.TRY_AGAIN, program.WRONG_CONFIGURATION}
    assert codes == {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}


def test_the_policy_in_the_readme_allows_putting_and_nothing_else() -> None:
    """The policy that the README tells to use is valid JSON, and allows s3:PutObject below the
    prefix alone.
    """
    found = re.search(r'^ +(\{"Version".*?\]\})', README, re.MULTILINE | re.DOTALL)
    assert found
    assert json.loads(found[1])["Statement"] == [
        {"Effect": "Allow", "Action": "s3:PutObject", "Resource": "arn:aws:s3:::BUCKET/PREFIX/*"}
    ]


def test_the_unit_outlives_lnd_and_the_grace_period() -> None:
    """The unit stops after LND, stops later than the program needs, and does not repeat a wrong
    configuration.
    """
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(UNIT, encoding="utf-8")
    assert unit["Unit"]["Before"] == "lnd.service"
    assert unit["Service"]["RestartPreventExitStatus"] == str(program.WRONG_CONFIGURATION)
    assert (
        float(unit["Service"]["TimeoutStopSec"])
        > float(program.VALUES["SHUTDOWN_GRACE_SECONDS"][0] or 0) + 1
    )
    assert unit["Service"]["WatchdogSec"] == "3min"
    assert 3 * float(program.VALUES["RESCAN_SECONDS"][0] or 0) <= 180


@pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="needs systemd-analyze (Debian: systemd)"
)
def test_systemd_understands_the_unit() -> None:
    """Of the unit, systemd has nothing to say but that the program is not installed."""
    told = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", UNIT],  # noqa: S607 - it is looked for above
        check=False,
        capture_output=True,
        encoding="utf-8",
    ).stderr
    assert [
        line for line in told.splitlines() if UNIT.name in line and "is not executable" not in line
    ] == []


def test_the_program_has_one_version() -> None:
    """The version of --version is the newest in the changelog, or not released yet."""
    changelog = (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{program.__version__}]" in changelog
    assert (
        run_script({}, "--version").stdout == f"s3_backup_lnd_channels.py {program.__version__}\n"
    )
