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
from functools import partial
from typing import TYPE_CHECKING, Any

import yaml
from botocore.exceptions import ClientError
from kit import CHECKOUT, Credentials, Lnd, S3Server, reader_settings
from shared import done_well, restore

from .servers import NotInstalledError, is_denied, make_venv

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SCRIPT, TEMPLATE = CHECKOUT / "docs/aws-bucket.sh", CHECKOUT / "docs/aws-bucket.yaml"
PREFIX, DAYS, NONCURRENT = "node1/", 30, 90
SERVICES = "s3,iam,sts,cloudformation"
PARAMETERS = ("BucketName", "Prefix", "RetentionDays", "NoncurrentDays")  # that have no default


def read_template() -> dict[str, Any]:
    """Return the template, its tags as the functions that they are short for."""
    # A loader of its own, since constructors belong to the class.
    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    for tag, name in (("!Ref", "Ref"), ("!Sub", "Fn::Sub")):
        loader.add_constructor(
            tag, lambda reader, node, name=name: {name: reader.construct_scalar(node)}
        )
    template: dict[str, Any] = yaml.load(TEMPLATE.read_text(encoding="utf-8"), loader)  # noqa: S506 - a SafeLoader
    return template


def filled(value: Any, names: dict[str, Any]) -> Any:  # noqa: ANN401 - any part of the template
    """Return a part of the template with its parameters filled in."""
    if isinstance(value, dict) and "Ref" in value:
        return names[value["Ref"]]
    if isinstance(value, dict) and "Fn::Sub" in value:
        text = value["Fn::Sub"]
        for name, each in names.items():
            text = text.replace(f"${{{name}}}", str(each))
        return text
    if isinstance(value, dict):
        return {key: filled(each, names) for key, each in value.items()}
    return [filled(each, names) for each in value] if isinstance(value, list) else value


def names(bucket: str) -> dict[str, Any]:
    """Return what the template's parameters and references stand for."""
    return {
        "AWS::Partition": "aws",
        "Bucket": bucket,
        "BucketName": bucket,
        "Prefix": PREFIX,
        "RetentionMode": "GOVERNANCE",
        "RetentionDays": DAYS,
        "NoncurrentDays": NONCURRENT,
    }


def lifecycle(properties: dict[str, Any]) -> dict[str, Any]:
    """Return the template's lifecycle in the words of the S3 API."""
    rules = [dict(rule) for rule in properties["LifecycleConfiguration"]["Rules"]]
    return {"Rules": [{"ID": rule.pop("Id"), "Filter": {"Prefix": ""}} | rule for rule in rules]}


def template_settings(bucket: str) -> dict[str, Any]:
    """Return what the template says, in the form of `Account.settings`."""
    resources = filled(read_template()["Resources"], names(bucket))
    bucket_is = resources["Bucket"]["Properties"]
    said = {
        "versioning": bucket_is["VersioningConfiguration"]["Status"],
        "lock": bucket_is["ObjectLockConfiguration"],
        "lifecycle": sorted(lifecycle(bucket_is)["Rules"], key=lambda rule: str(rule["ID"])),
        "public": bucket_is["PublicAccessBlockConfiguration"],
        "policy": resources["BucketPolicy"]["Properties"]["PolicyDocument"]["Statement"],
    }
    for role, user in (("node", "NodeUser"), ("reader", "ReaderUser")):
        said[role] = [
            policy["PolicyDocument"] for policy in resources[user]["Properties"]["Policies"]
        ]
    return said


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
        assert done.returncode == 0, f"{command[:4]}: {done.stdout[-800:]} {done.stderr[-800:]}"
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
    done_well(putting)
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
    assert [what for what, call in refused.items() if not is_denied(call)] == []
    # This it may; it hides the version, and does not change it.
    thief.put_object(**where, Body=b"over it")
    helper = account.server.client(reader)
    assert helper.get_object(**exact)["Body"].read() == version.data
    assert is_denied(lambda: helper.put_object(**where, Body=b"x"))
    assert is_denied(lambda: helper.delete_object(**where))
    assert account.s3.head_object(**exact)["ObjectLockMode"] == "GOVERNANCE"
    newer = lnd.write()
    done_well(putting)
    restore(reader_settings(account.server, bucket, PREFIX, reader), home)
    assert (home / "channel.backup").read_bytes() == newer.data


def measure(directory: Path) -> tuple[list[str], list[str]]:
    """Return what was shown, a line each, and what went wrong."""
    shown: list[str] = []
    try:
        with S3Server(directory / "https", tls=True, services=SERVICES) as server:
            account = Account(server, directory)
            shown.append(f"{account.lint()}: nothing to say of docs/aws-bucket.yaml")
            for how, make in (("aws-bucket.yaml", account.deploy), ("aws-bucket.sh", account.make)):
                bucket = f"by-{how.rpartition('.')[2]}-1"
                users = make(bucket)
                settings = account.settings(bucket, users)
                assert settings == template_settings(bucket), settings
                use(account, bucket, users, directory / how)
                told = "deployed; the node's key puts and nothing else, the reader's lists and gets"
                shown.append(f"{how}: {told}")
        with S3Server(directory / "http", services=SERVICES) as server:
            account = Account(server, directory)
            # What the node's key may do over https.
            node = server.client(account.key(account.deploy("by-yaml-2")[0]))
            put = partial(node.put_object, Bucket="by-yaml-2", Key=f"{PREFIX}x", Body=b"x")
            assert is_denied(put)
            shown.append("over http: refused")
    except (AssertionError, NotInstalledError, ClientError, OSError) as error:
        return shown, [f"the bucket of docs/: after {shown}: {type(error).__name__}: {error}"]
    return shown, []
