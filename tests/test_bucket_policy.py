"""The bucket of docs/: one policy in README, template, script and hints, and nothing in it that
deletes a backup.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from kit import CHECKOUT, FakeS3, Lnd, run_script
from kit.fake_s3 import ACCESS_DENIED
from stores.template import filled, read_template, template_settings

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unmeasured

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
SCRIPT = CHECKOUT / "docs/aws-bucket.sh"
BUCKET = "some-bucket"
# Stands in for the aws command: keeps its arguments, and answers nothing.
AWS = """#!{python}
import json, sys
with open({calls!r}, "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
"""


@pytest.fixture
def template() -> dict[str, Any]:
    """Return the template's resources as they are written."""
    resources: dict[str, Any] = read_template()["Resources"]
    return resources


def node_policy(bucket: str, prefix: str) -> dict[str, Any]:
    """Return the policy of the template's user for the node."""
    names = {"Bucket": bucket, "Prefix": prefix, "AWS::Partition": "aws"}
    [policy] = filled(read_template()["Resources"]["NodeUser"]["Properties"]["Policies"], names)
    document: dict[str, Any] = policy["PolicyDocument"]
    return document


def test_the_policy_of_the_readme_is_the_templates() -> None:
    """The policy in the README is that of the template's user for the node."""
    found = re.search(r'^ +(\{"Version".*?\]\})', README, re.MULTILINE | re.DOTALL)
    assert found
    assert json.loads(found[1]) == node_policy("BUCKET", "PREFIX/")


def test_the_policy_of_the_hint_is_the_templates(lnd: Lnd, staging: Path) -> None:
    """The statement that the program names when a put is denied is that of the template's user for
    the node.
    """
    lnd.write()
    with FakeS3(defaults={"PUT": ACCESS_DENIED}) as fake:
        env = {
            "MONITOR_FILE_PATH": str(lnd.path),
            "BACKUP_DIRECTORY": str(staging),
            "S3_BUCKET_NAME": BUCKET,
            "S3_BACKUP_PREFIX": "node1",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_ENDPOINT_URL_S3": fake.endpoint,
        }
        done = run_script(env, "once")
    assert done.returncode == 1
    [hint] = [line for line in done.stderr.splitlines() if "hint: " in line]
    assert json.loads(hint[hint.index("{") :]) == node_policy(BUCKET, "node1/")["Statement"][0]


def test_no_rule_of_the_template_deletes_a_current_object(template: dict[str, Any]) -> None:
    """The lifecycle ends noncurrent versions and unfinished uploads, and the bucket outlives its
    stack.
    """
    rules = template["Bucket"]["Properties"]["LifecycleConfiguration"]["Rules"]
    does = {key for rule in rules for key in rule} - {"Id", "Status"}
    assert does == {"NoncurrentVersionExpiration", "AbortIncompleteMultipartUpload"}
    assert (
        template["Bucket"]["DeletionPolicy"]
        == template["Bucket"]["UpdateReplacePolicy"]
        == "Retain"
    )


def test_the_template_locks_what_is_put(template: dict[str, Any]) -> None:
    """The bucket has versioning, a default retention of the operator's choice, TLS alone, and
    nothing public.
    """
    bucket = template["Bucket"]["Properties"]
    assert bucket["ObjectLockEnabled"] is True
    retention = bucket["ObjectLockConfiguration"]["Rule"]["DefaultRetention"]
    assert retention == {"Mode": {"Ref": "RetentionMode"}, "Days": {"Ref": "RetentionDays"}}
    assert bucket["VersioningConfiguration"] == {"Status": "Enabled"}
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    [statement] = template["BucketPolicy"]["Properties"]["PolicyDocument"]["Statement"]
    assert (statement["Effect"], statement["Action"], statement["Principal"]) == (
        "Deny",
        "s3:*",
        "*",
    )
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def test_the_script_makes_what_the_template_makes(tmp_path: Path) -> None:
    """The commands of the script set what the template sets, with the same policies."""
    stand_in, calls = tmp_path / "aws", tmp_path / "calls"
    stand_in.write_text(AWS.format(python=sys.executable, calls=str(calls)))
    stand_in.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "AWS_REGION": "eu-central-1"}
    subprocess.run(
        [SCRIPT, BUCKET, "node1/", "GOVERNANCE", "30", "90"],
        env=env,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    made: dict[str, dict[str, str]] = {}
    for line in calls.read_text().splitlines():
        _, command, *words = json.loads(line)
        options = {
            word: value
            for word, value in zip(words, [*words[1:], ""], strict=True)
            if word.startswith("--")
        }
        made[command + (options.get("--user-name") or BUCKET).removeprefix(BUCKET)] = options
    said = template_settings(BUCKET)
    create = made["create-bucket"]
    assert "--object-lock-enabled-for-bucket" in create
    assert create["--create-bucket-configuration"] == "LocationConstraint=eu-central-1"
    assert create["--object-ownership"] == "BucketOwnerEnforced"
    assert (
        made["put-bucket-versioning"]["--versioning-configuration"]
        == f"Status={said['versioning']}"
    )
    public = ",".join(f"{name}={json.dumps(value)}" for name, value in said["public"].items())
    assert made["put-public-access-block"]["--public-access-block-configuration"] == public
    documents = {
        "lock": made["put-object-lock-configuration"]["--object-lock-configuration"],
        "lifecycle": made["put-bucket-lifecycle-configuration"]["--lifecycle-configuration"],
        "policy": made["put-bucket-policy"]["--policy"],
        "node": made["put-user-policy-node"]["--policy-document"],
        "reader": made["put-user-policy-reader"]["--policy-document"],
    }
    found = {name: json.loads(text) for name, text in documents.items()}
    found["policy"], found["lifecycle"] = found["policy"]["Statement"], found["lifecycle"]["Rules"]
    assert found == {name: said[name] for name in ("lock", "lifecycle", "policy")} | {
        name: said[name][0] for name in ("node", "reader")
    }
