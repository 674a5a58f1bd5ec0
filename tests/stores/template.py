"""The CloudFormation template of docs/, read and filled in."""

from __future__ import annotations

from typing import Any

import yaml
from kit import CHECKOUT

TEMPLATE = CHECKOUT / "docs/aws-bucket.yaml"
PREFIX, DAYS, NONCURRENT = "node1/", 30, 90


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
