"""The floor: puts the file named by each line of stdin, without watching, staging or retrying.

Arguments: `sdk` or `http`, bucket, prefix. For each file it prints when the put began and when it
was over.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import os
import select
import ssl
import sys
import time
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

if TYPE_CHECKING:
    from collections.abc import Callable


def integrity(data: bytes) -> tuple[str, str]:
    """Return what the program sends too: Content-MD5, and SHA-256 for the metadata."""
    md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
    return md5, hashlib.sha256(data).hexdigest()


def without_expect(request: Any, **_: object) -> None:  # noqa: ANN401 - botocore is not typed
    """Ask for no leave to send, which costs a round trip."""
    if "Expect" in request.headers:
        del request.headers["Expect"]


def with_the_sdk(bucket: str) -> Callable[[str, bytes], None]:
    """Return a put by one warm client of boto3."""
    client = boto3.client("s3")
    client.meta.events.register("before-sign.s3.PutObject", without_expect)

    def put(key: str, data: bytes) -> None:
        md5, sha256 = integrity(data)
        client.put_object(
            Bucket=bucket,
            Key=key,
            Body=io.BytesIO(data),
            ContentMD5=md5,
            Metadata={"sha256": sha256},
        )

    return put


def with_http(bucket: str) -> Callable[[str, bytes], None]:
    """Return a put by one connection of the standard library, signed by botocore's signer."""
    url = urllib.parse.urlsplit(os.environ["AWS_ENDPOINT_URL_S3"])
    connection = http.client.HTTPConnection(str(url.hostname), url.port)
    if url.scheme == "https":
        context = ssl.create_default_context(cafile=os.environ["AWS_CA_BUNDLE"])
        connection = http.client.HTTPSConnection(str(url.hostname), url.port, context=context)
    key_pair = Credentials(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    signer = S3SigV4Auth(key_pair, "s3", os.environ["AWS_DEFAULT_REGION"])

    def put(key: str, data: bytes) -> None:
        md5, sha256 = integrity(data)
        headers = {
            "Content-MD5": md5,
            "x-amz-meta-sha256": sha256,
            "Content-Length": str(len(data)),
        }
        request = AWSRequest("PUT", f"{url.geturl()}/{bucket}/{key}", headers, data)
        signer.add_auth(request)
        if connection.sock and select.select([connection.sock], [], [], 0)[0]:
            connection.close()  # the other end closed it; the next request opens a new one
        connection.request("PUT", f"/{bucket}/{key}", data, dict(request.headers))
        answer = connection.getresponse()
        answer.read()
        if answer.status != http.HTTPStatus.OK:
            raise OSError(f"status {answer.status}")

    return put


kind, bucket, prefix = sys.argv[1:]
put = {"sdk": with_the_sdk, "http": with_http}[kind](bucket)
print("ready", flush=True)
for line in sys.stdin:
    data = Path(line.rstrip("\n")).read_bytes()
    began = time.monotonic()
    put(f"{prefix}{time.time_ns()}", data)
    print(f"put {began!r} {time.monotonic()!r}", flush=True)
