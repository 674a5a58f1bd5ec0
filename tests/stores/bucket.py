"""The bucket of docs/: checked with cfn-lint, made by its template and by its script, and then used
by both keys.

The server is ministack, whose CloudFormation makes bucket, policies and users, and no Object Lock
and lifecycle: these are put from the template's own text, and what the script made is compared with
the template.
"""

from __future__ import annotations

import json
import os
import subprocess
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError
from kit import CHECKOUT, Credentials, Lnd, S3Server, reader_settings, run_script

from .servers import NotInstalledError, is_denied, make_venv
from .template import (
    DAYS,
    NONCURRENT,
    PREFIX,
    TEMPLATE,
    filled,
    lifecycle,
    names,
    read_template,
    template_settings,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SCRIPT = CHECKOUT / "docs/aws-bucket.sh"
SERVICES = "s3,iam,sts,cloudformation"
PARAMETERS = ("BucketName", "Prefix", "RetentionDays", "NoncurrentDays")  # that have no default


class Account:
    """An AWS of our own, and the aws command that works on it."""

    def __init__(self, server: S3Server, home: Path) -> None:
        self.server, self.s3, self.iam = server, server.admin, server.client(service="iam")
        self._bin = make_venv("aws") / "bin"
        tls = {"AWS_CA_BUNDLE": str(server.ca_file)} if server.ca_file else {}
        self._env = tls | {
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "HOME": str(home),
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def run(self, *command: str | Path) -> str:
        """Run a command of the administrator's, which must succeed."""
        done = subprocess.run(
            command, env=self._env, capture_output=True, encoding="utf-8", check=False
        )
        said = f"{done.stdout[-800:]} {done.stderr[-800:]}"
        assert done.returncode == 0, f"{command[:4]} exited {done.returncode}: {said}"
        return done.stdout

    def lint(self) -> str:
        """Check the template, warnings and all, and return the version of what checked it."""
        lint = self._bin / "cfn-lint"
        self.run(lint, "--include-checks=W", "--non-zero-exit-code=informational", TEMPLATE)
        return self.run(lint, "--version").strip()

    def deploy(self, bucket: str) -> tuple[str, str]:
        """Deploy the template as its document says, and return the node's and the reader's user."""
        told = names(bucket)
        parameters = [f"{name}={told[name]}" for name in PARAMETERS]
        template = ("--template-file", TEMPLATE, "--capabilities", "CAPABILITY_IAM")
        deploy = ("aws", "cloudformation", "deploy", "--stack-name", bucket, *template)
        self.run(*deploy, "--parameter-overrides", *parameters)
        describe = ("aws", "cloudformation", "describe-stacks", "--stack-name", bucket)
        [stack] = json.loads(self.run(*describe))["Stacks"]
        outputs = {each["OutputKey"]: each["OutputValue"] for each in stack["Outputs"]}
        assert outputs["Bucket"] == bucket
        properties = filled(read_template()["Resources"]["Bucket"]["Properties"], told)
        self.s3.put_object_lock_configuration(
            Bucket=bucket, ObjectLockConfiguration=properties["ObjectLockConfiguration"]
        )
        self.s3.put_bucket_lifecycle_configuration(
            Bucket=bucket, LifecycleConfiguration=lifecycle(properties)
        )
        return outputs["NodeUser"], outputs["ReaderUser"]

    def make(self, bucket: str) -> tuple[str, str]:
        """Run the script as its document says, and return the node's and the reader's user."""
        self.run(SCRIPT, bucket, PREFIX, "GOVERNANCE", str(DAYS), str(NONCURRENT))
        return f"{bucket}-node", f"{bucket}-reader"

    def key(self, user: str) -> Credentials:
        made = json.loads(self.run("aws", "iam", "create-access-key", "--user-name", user))
        key = made["AccessKey"]
        return Credentials(key["AccessKeyId"], key["SecretAccessKey"])

    def settings(self, bucket: str, users: tuple[str, str]) -> dict[str, Any]:
        """Return all that the bucket and its users are set to."""
        s3, iam = self.s3, self.iam
        rules = s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
        found = {
            "versioning": s3.get_bucket_versioning(Bucket=bucket)["Status"],
            "lock": s3.get_object_lock_configuration(Bucket=bucket)["ObjectLockConfiguration"],
            "lifecycle": sorted(rules, key=lambda rule: str(rule["ID"])),
            "public": s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"],
            "policy": json.loads(s3.get_bucket_policy(Bucket=bucket)["Policy"])["Statement"],
        }
        for role, user in zip(("node", "reader"), users, strict=True):
            policies = [
                iam.get_user_policy(UserName=user, PolicyName=name)["PolicyDocument"]
                for name in iam.list_user_policies(UserName=user)["PolicyNames"]
            ]
            found[role] = [json.loads(each) if isinstance(each, str) else each for each in policies]
        return found


def use(account: Account, bucket: str, users: tuple[str, str], home: Path) -> None:
    """Back up with the node's key and restore with the reader's; neither can do more."""
    node, reader = map(account.key, users)
    home.mkdir(parents=True)
    lnd = Lnd(home / "lnd")
    version = lnd.write()
    putting = reader_settings(account.server, bucket, PREFIX, node) | {
        "MONITOR_FILE_PATH": str(lnd.path),
        "BACKUP_DIRECTORY": str(home / "staging"),
    }
    done = run_script(putting, "once")
    assert done.returncode == 0, done.stderr
    [stored] = account.s3.list_object_versions(Bucket=bucket)["Versions"]
    where: dict[str, Any] = {"Bucket": bucket, "Key": stored["Key"]}
    thief, exact = account.server.client(node), where | {"VersionId": stored["VersionId"]}
    until = {"Mode": "GOVERNANCE", "RetainUntilDate": datetime(2026, 1, 1, tzinfo=UTC)}
    refused: dict[str, Callable[[], Any]] = {
        "list": lambda: thief.list_objects_v2(Bucket=bucket, Prefix=PREFIX),
        "list versions": lambda: thief.list_object_versions(Bucket=bucket),
        "get": lambda: thief.get_object(**where),
        "get the version": lambda: thief.get_object(**exact),
        "put elsewhere": lambda: thief.put_object(Bucket=bucket, Key="node2/x", Body=b"x"),
        "delete": lambda: thief.delete_object(**where),
        "delete the version": lambda: thief.delete_object(**exact),
        "end the retention": lambda: thief.put_object_retention(**exact, Retention=until),
        "suspend versioning": lambda: thief.put_bucket_versioning(
            Bucket=bucket, VersioningConfiguration={"Status": "Suspended"}
        ),
        "add a lifecycle": lambda: thief.put_bucket_lifecycle_configuration(
            Bucket=bucket, LifecycleConfiguration={"Rules": []}
        ),
        "administrator deletes a locked version": lambda: account.s3.delete_object(**exact),
    }
    allowed = [what for what, call in refused.items() if not is_denied(call)]
    assert allowed == [], f"the node's key can: {allowed}"
    # This it may; it hides the version, and does not change it.
    thief.put_object(**where, Body=b"over it")
    helper = account.server.client(reader)
    assert helper.get_object(**exact)["Body"].read() == version.data
    assert is_denied(lambda: helper.put_object(**where, Body=b"x"))
    assert is_denied(lambda: helper.delete_object(**where))
    assert account.s3.head_object(**exact)["ObjectLockMode"] == "GOVERNANCE"
    newer = lnd.write()
    assert run_script(putting, "once").returncode == 0
    reading = reader_settings(account.server, bucket, PREFIX, reader)
    done = run_script(reading, "restore", "--output", str(home / "restored"))
    assert done.returncode == 0, done.stderr
    assert (home / "restored").read_bytes() == newer.data


def over_http_is_denied(account: Account, bucket: str, users: tuple[str, str]) -> bool:
    """Tell whether over http the node's key is refused what it may do over https."""
    node = account.server.client(account.key(users[0]))
    return is_denied(lambda: node.put_object(Bucket=bucket, Key=f"{PREFIX}x", Body=b"x"))


def measure(directory: Path) -> tuple[list[str], list[str]]:
    """Return what was shown, a line each, and what went wrong."""
    shown: list[str] = []
    try:
        with S3Server(directory / "https", tls=True, services=SERVICES) as server:
            account = Account(server, directory)
            shown.append(f"{account.lint()}: nothing to say of docs/aws-bucket.yaml")
            for how, make in (("aws-bucket.yaml", account.deploy), ("aws-bucket.sh", account.make)):
                bucket = f"by-{how[-4:].strip('.')}-1"
                users = make(bucket)
                settings = account.settings(bucket, users)
                assert settings == template_settings(bucket), settings
                use(account, bucket, users, directory / how)
                shown.append(
                    f"{how}: deployed; the node's key puts and nothing else, the reader's "
                    f"lists and gets"
                )
        with S3Server(directory / "http", services=SERVICES) as server:
            account = Account(server, directory)
            assert over_http_is_denied(account, "by-yaml-2", account.deploy("by-yaml-2"))
            shown.append("over http: refused")
    except (AssertionError, NotInstalledError, ClientError, OSError) as error:
        return shown, [f"the bucket of docs/: after {shown}: {type(error).__name__}: {error}"]
    return shown, []
