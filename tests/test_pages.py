"""What the pages tell people to type, to set and to look at is there: commands and options, exit
codes, settings, files, make's targets, metrics, links, and the bucket with its policy. The
container's files keep its promises.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from kit import CHECKOUT, run_script
from shared import blocks, done_well
from stores.bucket import DAYS, NONCURRENT, PREFIX, read_template, template_settings

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

README = CHECKOUT / "README.md"
PAGES = [
    README,
    CHECKOUT / "CONTRIBUTING.md",
    CHECKOUT / "tests/README.md",
    *sorted((CHECKOUT / "docs").glob("*.md")),
]
REFERENCE = CHECKOUT / "docs/reference.md"
CONTAINER = CHECKOUT / "container"
GRACE_SECONDS = float(program.SETTINGS["SHUTDOWN_GRACE_SECONDS"][0] or 0)
# What others read: make's own, the SDK's, a shell's, and the platforms'.
OTHERS = (
    r"AWS_\w+|(HTTPS?|ALL|NO)_PROXY|TMPDIR|LND_(USER|DIRECTORY)|PYTHON(PATH)?|DESTDIR|SECONDS|SEED|QUICK"
    r"|NODE|FORCE|LABEL|NAME|SUITE|BASE|ALERT_(MAIL|URL)|MALLOC_\w+|STATUS|READY|COMPOSE_FILE|BTCPAYGEN_\w+"
)
# How the installer and the units write where things are.
INSTALLED = {
    "$units": "/etc/systemd/system",
    "$current": "/opt/lnd-backup/current",
    "$service": "lnd-backup",
    "%S": "/var/lib",
    "%N": "lnd-backup",
}
OURS_BY_LOOK = r"(S3|MONITOR|BACKUP|RESCAN|REFRESH|SHUTDOWN|HEARTBEAT|METRICS|COPY)_[A-Z_]+"


by_page = pytest.mark.parametrize(
    "page", PAGES, ids=[str(page.relative_to(CHECKOUT)) for page in PAGES]
)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code(page: Path) -> str:
    """Return all that the page shows as code: its blocks, and what stands in backticks."""
    inline = re.findall(r"(?<!`)`([^`]+)`(?!`)", text_of(page))
    return "\n".join([*(text for _, text in blocks(page)), *inline])


@functools.cache
def help_of(command: str) -> str:
    """Return what --help says of a command."""
    return run_script({}, command, "--help", measured=False).stdout


def slugs(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


BUCKET = "some-bucket"
# Stands in for the aws command: keeps its arguments, and answers nothing.
AWS = """#!{python}
import json, sys
with open({calls!r}, "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
"""


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    """Each link to a file of the repository, or to a heading, resolves."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"\s+", " ", text_of(page))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in slugs(file), target


@by_page
def test_commands_and_options_exist(page: Path) -> None:
    """Each command line of the program has a command and options that --help knows."""
    known = {*program.COMMANDS, "card", "test-alert"}  # the last two: of `sudo lnd-backup` alone
    joined = code(page).replace("\\\n", " ")
    lines = re.findall(
        r"(?:lnd_channels\.py|\blnd-backup lnd-backup|sudo lnd-backup) +([^\n|;&#]*)", joined
    )
    assert lines or page.name not in {"recovery.md", "containers.md", "operations.md"}
    for line in lines:
        words = shlex.split(line.replace("…", "X"), comments=True)
        while words and words[0].startswith(("-", "[", "@")):  # --env-file FILE, @NODE
            words = words[2:] if words[0] == "--env-file" else words[1:]
        if not words or not re.fullmatch(r"[a-z]+", words[0]):
            continue
        assert words[0] in known, line
        options = [re.match(r"--[a-z-]+", word) for word in words[1:]]
        for option in filter(None, options):
            assert option[0] in help_of(words[0]), line


@by_page
def test_exit_codes_are_those_of_the_interface(page: Path) -> None:
    """A page promises no exit code that the reference's table does not have, or a signal adds."""
    known = {int(code) for code in re.findall(r"^\| (\d+) \|", text_of(REFERENCE), re.MULTILINE)}
    told = re.findall(r"[Ee]xit(?:s with| codes?|s)? (\d+)|\((?:exit code )?(7\d)\)", text_of(page))
    assert {int(one or other) for one, other in told} <= known | {128, 130}


@by_page
def test_settings_exist(page: Path) -> None:
    """What looks like a setting of ours is one, which the reference and the example have, too."""
    named = {found[0] for found in re.finditer(rf"\b{OURS_BY_LOOK}\b", code(page))}
    assert named <= set(program.SETTINGS)


@by_page
def test_nothing_else_is_set(page: Path) -> None:
    """Whatever is assigned in code is a setting of ours or has a reader that is known."""
    assigned = re.findall(r"(?:^|[\s`(])([A-Z][A-Z0-9_]{2,})=(?!=)", code(page), re.MULTILINE)
    assert [name for name in assigned if not re.fullmatch(f"{OURS_BY_LOOK}|{OTHERS}", name)] == []


@by_page
def test_targets_of_make_exist(page: Path) -> None:
    """Each `make WORD` in code is a target with a line in `make help`."""
    targets = re.findall(r"^([a-z-]+):.*##", text_of(CHECKOUT / "Makefile"), re.MULTILINE)
    for target in re.findall(r"\bmake ([a-z][a-z-]+)", code(page)):
        if target != "python":  # apt install make python3-venv
            assert target in targets


@by_page
def test_files_exist(page: Path) -> None:
    """Each path into the repository exists; each path of the installation is the installer's."""
    shown = code(page)
    for path in re.findall(
        r"(?<![\w/.-])((?:container|docs|systemd|tests|bench)/[\w.@/-]+)", shown
    ):
        pattern = path.rstrip("/.") + "*"
        assert [*CHECKOUT.glob(pattern), *page.parent.glob(pattern)], path
    installed = "".join(
        text_of(file)
        for file in (*(CHECKOUT / "systemd").iterdir(), *CHECKOUT.glob("lnd-backup*"))
        if file.is_file()
    )
    for variable, value in INSTALLED.items():
        installed = installed.replace(variable, value)
    names = r"/(?:etc|opt|run|var/lib)/(?!prometheus)[\w./-]*lnd-(?:backup|scb)[\w-]*"
    for path in set(re.findall(names, shown)) - {"/etc/lnd-backup-env"}:  # BTCPay's, made by hand
        assert path in installed, path


def test_the_pages_that_a_node_needs_are_installed() -> None:
    """Those that are about the program stay in the repository."""
    installer = text_of(CHECKOUT / "systemd/install.sh")
    installed = set(re.findall(r"\bdocs/([a-z-]+\.md)", installer))
    at_home = {"how-it-works.md", "performance.md", "reliability.md"}
    assert installed == {page.name for page in (CHECKOUT / "docs").glob("*.md")} - at_home


def test_metrics_exist(written_env: dict[str, str], tmp_path: Path) -> None:
    """Each metric on a page, and in the alerts, is one that the program writes."""
    metrics = tmp_path / "metrics.prom"
    done_well(written_env | {"METRICS_FILE": str(metrics)})
    written = set(re.findall(r"^(lnd_backup_\w+)", metrics.read_text(), re.MULTILINE))
    for page in (*PAGES, CHECKOUT / "docs" / "alerts.yml"):
        assert set(re.findall(r"\blnd_backup_[a-z_]+", text_of(page))) <= written, page.name


@by_page
def test_blocks_are_well_formed(page: Path) -> None:
    """Shell blocks parse, YAML and JSON load."""
    for language, text in blocks(page):
        if language == "sh":
            shown = text.replace("…", "X")
            subprocess.run(["/bin/bash", "-n"], input=shown, check=True, text=True)
        elif language == "yaml":
            assert yaml.safe_load(text)
        elif language == "json":
            assert json.loads(text)


@by_page
def test_install_lines_name_the_prefix(page: Path) -> None:
    """Who copies an install line gets a prefix, the one that the key may write below."""
    lines = re.findall(r"make install[^\n]*S3_BUCKET_NAME[^\n]*", text_of(page))
    assert [line for line in lines if "S3_BACKUP_PREFIX=" not in line] == []


def test_the_recovery_page_restores_every_file() -> None:
    """Steps 10 and 11 name all that `restore` writes, and the card has its fields."""
    page = text_of(CHECKOUT / "docs" / "recovery.md")
    for verb in ("verifychanbackup", "restorechanbackup"):
        for file in ("channel.backup", *(f"channel.backup.{number}" for number in (2, 3, 4))):
            assert f"lncli {verb} --multi_file ~/recovery/{file}\n" in page
    card = page[page.index("## Recovery card") :]
    fields = ("bucket", "prefix", "endpoint", "region", "node", "version", "SHA-256", "the seed is")
    for field in fields:
        assert re.search(rf"\b{field}\b[^_\n]*_{{8}}", card), field


# --- The container's files ---


def instructions(word: str) -> list[str]:
    """Return the arguments of each such instruction in the Containerfile."""
    joined = re.sub(r"\\\n\s*", " ", text_of(CONTAINER / "Containerfile"))
    return re.findall(rf"^{word} (.+)$", joined, re.MULTILINE)


def seconds(text: str) -> float:
    """Return a duration such as 5m or 30s."""
    return float(text[:-1]) * {"s": 1, "m": 60}[text[-1]]


def test_the_image_keeps_its_promises() -> None:
    """The health check is rare, gives `check` its minute, and takes 75 for "unknown"."""
    assert re.search(r"debian:\w+-slim$", instructions("ARG")[0])
    assert set(instructions("FROM")) == {"${BASE} AS build", "${BASE}"}
    assert any("--require-hashes" in run and "--only-binary" in run for run in instructions("RUN"))
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", instructions("USER")[-1])
    (health,) = instructions("HEALTHCHECK")
    options = dict(re.findall(r"--([a-z-]+)=(\S+)", health))
    assert seconds(options["interval"]) >= 300
    assert seconds(options["timeout"]) > 60
    assert health.endswith('lnd-backup check || [ "$?" -eq 75 ]')


def sidecars() -> Iterator[tuple[str, dict[str, Any]]]:
    """Return the sidecar of compose.yaml, and that of BTCPay's fragment on the page."""
    yield "compose.yaml", yaml.safe_load(text_of(CONTAINER / "compose.yaml"))
    for language, text in blocks(CHECKOUT / "docs" / "containers.md"):
        if language == "yaml" and "services" in (loaded := yaml.safe_load(text)):
            yield "BTCPay", loaded


@pytest.mark.parametrize(("where", "compose"), list(sidecars()), ids=["compose.yaml", "BTCPay"])
def test_the_sidecar_is_confined_and_stops_last(where: str, compose: dict[str, Any]) -> None:
    """It writes to the staging volume alone."""
    services, sidecar = compose["services"], compose["services"]["lnd-backup"]
    lnd = services["lnd" if where == "compose.yaml" else "lnd_bitcoin"]
    volumes = [volume.split(":") for volume in sidecar["volumes"]]
    mounts = {target: (source, mode) for source, target, *mode in volumes}
    scb, mode = mounts["/lnd-scb"]
    assert mode == ["ro"]
    assert {scb, mounts["/staging"][0]} <= set(compose["volumes"])  # named: directories by nature
    assert f"{scb}:/lnd-scb" in lnd["volumes"]
    assert sidecar["environment"]["BACKUP_DIRECTORY"] == "/staging/lnd-backup"
    assert sidecar["environment"]["MONITOR_FILE_PATH"] == "/lnd-scb/channel.backup"
    assert (sidecar["read_only"], sidecar["cap_drop"]) == (True, ["ALL"])
    assert sidecar["security_opt"] == ["no-new-privileges:true"]
    assert seconds(sidecar["stop_grace_period"]) > GRACE_SECONDS + 1
    assert lnd["depends_on"] in (["lnd-backup"], {"lnd-backup": {"condition": "service_started"}})


def test_the_native_sidecar_of_kubernetes() -> None:
    """It starts before LND and stops after it, and its staging directory survives fsGroup."""
    page = CHECKOUT / "docs" / "containers.md"
    pod = next(yaml.safe_load(text) for language, text in blocks(page) if "initContainers" in text)
    (sidecar,) = pod["spec"]["initContainers"]
    assert sidecar["restartPolicy"] == "Always"
    assert pod["spec"]["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    assert sidecar["securityContext"]["readOnlyRootFilesystem"] is True
    assert sidecar["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in sidecar["volumeMounts"]}
    assert mounts == {"/lnd-scb": True, "/staging": False}
    assert pod["spec"]["terminationGracePeriodSeconds"] > GRACE_SECONDS + 1


def test_the_policy_of_the_readme_is_the_templates() -> None:
    """It allows s3:PutObject below the prefix alone."""
    found = re.search(r'^ +(\{"Version".*?\]\})', text_of(README), re.MULTILINE | re.DOTALL)
    assert found
    policy = json.loads(found[1].replace("PREFIX/", PREFIX))
    assert [policy] == template_settings("BUCKET")["node"]
    assert policy["Statement"] == [
        {"Effect": "Allow", "Action": "s3:PutObject", "Resource": f"arn:aws:s3:::BUCKET/{PREFIX}*"}
    ]


def test_the_template_locks_what_is_put() -> None:
    """No lifecycle deletes a current object, the bucket outlives its stack, and only TLS is let."""
    resources: dict[str, Any] = read_template()["Resources"]
    kept, bucket = resources["Bucket"], resources["Bucket"]["Properties"]
    assert kept["DeletionPolicy"] == kept["UpdateReplacePolicy"] == "Retain"
    does = {key for rule in bucket["LifecycleConfiguration"]["Rules"] for key in rule}
    assert does == {"Id", "Status", "NoncurrentVersionExpiration", "AbortIncompleteMultipartUpload"}
    assert bucket["ObjectLockEnabled"] is True
    retention = bucket["ObjectLockConfiguration"]["Rule"]["DefaultRetention"]
    assert retention == {"Mode": {"Ref": "RetentionMode"}, "Days": {"Ref": "RetentionDays"}}
    assert bucket["VersioningConfiguration"] == {"Status": "Enabled"}
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    [statement] = resources["BucketPolicy"]["Properties"]["PolicyDocument"]["Statement"]
    assert statement == statement | {
        "Effect": "Deny",
        "Action": "s3:*",
        "Principal": "*",
        "Condition": {"Bool": {"aws:SecureTransport": "false"}},
    }


@pytest.mark.unmeasured
def test_the_script_makes_what_the_template_makes(tmp_path: Path) -> None:
    stand_in, calls = tmp_path / "aws", tmp_path / "calls"
    stand_in.write_text(AWS.format(python=sys.executable, calls=str(calls)))
    stand_in.chmod(0o755)
    subprocess.run(
        [CHECKOUT / "docs/aws-bucket.sh", BUCKET, PREFIX, "GOVERNANCE", str(DAYS), str(NONCURRENT)],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "AWS_REGION": "eu-central-1"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    words = [word for line in calls.read_text().splitlines() for word in json.loads(line)]
    said = template_settings(BUCKET)
    assert [json.loads(word) for word in words if word.startswith("{")] == [
        said["lock"],
        {"Rules": said["lifecycle"]},
        {"Version": "2012-10-17", "Statement": said["policy"]},
        *said["node"],
        *said["reader"],
    ]
    assert {
        "--object-lock-enabled-for-bucket",
        "BucketOwnerEnforced",
        "LocationConstraint=eu-central-1",
        f"Status={said['versioning']}",
        ",".join(f"{name}={json.dumps(value)}" for name, value in said["public"].items()),
    } <= set(words)
