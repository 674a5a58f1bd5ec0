"""An S3 server that checks signatures, permissions and checksums: ministack on the loopback
address.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import uuid
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

import botocore.session
import trustme
from botocore.config import Config
from botocore.exceptions import BotoCoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

CHECKOUT = Path(__file__).resolve().parents[2]
REGION = "us-east-1"
MINISTACK_PYTHON = CHECKOUT / ".venv-s3/bin/python"
PATIENCE_SECONDS = 30.0  # for what comes at once, on a machine that has much else to do

# Run by the Python of ministack's own environment. Its command would also take port 443. No session
# tickets: they come unasked and would be counted as an answer by the proxy. The end of stdin, that
# of whoever started it, is its end.
_LAUNCH = """
import asyncio, os, sys, threading
from hypercorn.asyncio import serve
from hypercorn.config import Config
from ministack.app import app

class KitConfig(Config):
    def create_ssl_context(self):
        context = super().create_ssl_context()
        if context is not None:
            context.num_tickets = 0
        return context

config = KitConfig()
config.certfile, config.keyfile = sys.argv[2:] or (None, None)
config.bind, config.keep_alive_timeout = ["fd://" + sys.argv[1]], 75
config.graceful_timeout = config.shutdown_timeout = 0.2
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
asyncio.run(serve(app, config))
"""

_environment_lock = threading.Lock()


@dataclass(frozen=True)
class Credentials:
    """An access key and its secret."""

    access_key: str
    secret_key: str


@dataclass(frozen=True)
class StoredObject:
    """One object as the bucket holds it."""

    key: str
    data: bytes = field(repr=False)
    metadata: dict[str, str]
    last_modified: datetime


ROOT = Credentials("test", "test")


def foreign_settings() -> list[str]:
    """Return the environment variables of the caller that would reach into an AWS client."""
    return [name for name in os.environ if re.match("AWS_|.*_PROXY$", name, re.IGNORECASE)]


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """Hide the caller's AWS settings, AWS files and proxies from what is built inside."""
    with _environment_lock, mock.patch.dict(os.environ):
        for name in foreign_settings():
            del os.environ[name]
        os.environ |= {
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        yield


@cache
def _session() -> Any:  # noqa: ANN401 - botocore is not typed
    """Return the one botocore session that all clients share; making one is slow."""
    return botocore.session.Session()


def make_client(
    service: str, endpoint: str, credentials: Credentials, ca_file: Path | None = None
) -> Any:  # noqa: ANN401 - botocore's clients are made at run time
    """Return a client that takes nothing from the environment and tries each call once."""
    with clean_environment():
        return _session().create_client(
            service,
            region_name=REGION,
            endpoint_url=endpoint,
            verify=str(ca_file) if ca_file else None,
            aws_access_key_id=credentials.access_key,
            aws_secret_access_key=credentials.secret_key,
            config=Config(
                s3={"addressing_style": "path"},
                retries={"total_max_attempts": 1, "mode": "standard"},
                connect_timeout=PATIENCE_SECONDS,
                read_timeout=PATIENCE_SECONDS,
            ),
        )


def allow(actions: str | list[str], *resources: str) -> dict[str, Any]:
    """Return the IAM statement that allows the actions on resources without `arn:aws:s3:::`."""
    return {
        "Effect": "Allow",
        "Action": actions,
        "Resource": [f"arn:aws:s3:::{resource}" for resource in resources],
    }


class S3Server:
    """ministack with AUTH=true over http or https, with its state on disk and its port kept across
    restarts.
    """

    def __init__(self, directory: Path, *, tls: bool = False, services: str = "s3,iam,sts") -> None:
        self.services = services
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.scheme = "https" if tls else "http"
        self.host = "127.0.0.1"
        self.port = 0
        self.ca_file: Path | None = None
        self._certificate: list[str] = []
        self.log_file = directory / "ministack.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: dict[tuple[str, Credentials], Any] = {}
        self._buckets: list[str] = []
        if tls:
            self._make_certificate()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def endpoint(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    @property
    def admin(self) -> Any:  # noqa: ANN401 - botocore's clients are made at run time
        return self.client()

    def client(self, credentials: Credentials = ROOT, service: str = "s3") -> Any:  # noqa: ANN401 - see above
        """Return a client for the server, the same one for the same credentials."""
        key = (service, credentials)
        if key not in self._clients:
            self._clients[key] = make_client(service, self.endpoint, credentials, self.ca_file)
        return self._clients[key]

    def start(self) -> None:
        """Start the server, with the buckets and users of an earlier run, until it answers."""
        # The server inherits it; until it is ready, connections queue in it.
        listener = socket.create_server((self.host, self.port))
        self.port = listener.getsockname()[1]
        with listener, self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [MINISTACK_PYTHON, "-c", _LAUNCH, str(listener.fileno()), *self._certificate],
                env=self._environment(),
                cwd=self.directory,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[listener.fileno()],
            )
        try:
            self._restore_buckets()
        except BotoCoreError as error:
            self.kill()
            text = self.log_file.read_text(errors="replace")[-4000:]
            raise RuntimeError(f"ministack did not start: {error!r}\n{text}") from error

    def stop(self) -> None:
        """End the server in order; state is kept and `start` brings it back."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server at once, with what it has in memory alone."""
        self._end(signal.SIGKILL)

    def suspend(self) -> None:
        """Freeze the server: the kernel accepts connections and data, and nobody answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen server go on with all that has arrived meanwhile."""
        os.kill(self.pid, signal.SIGCONT)

    def create_bucket(self, name: str | None = None, **kwargs: Any) -> str:  # noqa: ANN401 - passed to the client
        """Create a bucket, by default under a name that was never used, and return its name."""
        bucket = name or f"bucket-{uuid.uuid4().hex}"
        self.admin.create_bucket(Bucket=bucket, **kwargs)
        self._buckets.append(bucket)
        return bucket

    def put_version(
        self, bucket: str, key: str, data: bytes, metadata: dict[str, str] | None = None
    ) -> str:
        """Store a version, by default with its digest, as the program does, and return its key."""
        if metadata is None:
            metadata = {"sha256": hashlib.sha256(data).hexdigest()}
        self.admin.put_object(Bucket=bucket, Key=key, Body=data, Metadata=metadata)
        return key

    def user(self, *statements: dict[str, Any]) -> Credentials:
        """Create a user with these IAM statements and nothing else, and return its key."""
        user = f"user-{uuid.uuid4().hex}"
        iam = self.client(service="iam")
        policy = json.dumps({"Version": "2012-10-17", "Statement": statements})
        iam.create_user(UserName=user)
        iam.put_user_policy(UserName=user, PolicyName="kit", PolicyDocument=policy)
        key = iam.create_access_key(UserName=user)["AccessKey"]
        return Credentials(key["AccessKeyId"], key["SecretAccessKey"])

    def put_only_user(self, bucket: str, prefix: str = "") -> Credentials:
        """Create the program's user, which may put below the prefix and nothing else."""
        return self.user(allow("s3:PutObject", f"{bucket}/{prefix}*"))

    def reader_user(self, bucket: str) -> Credentials:
        return self.user(allow("s3:GetObject", f"{bucket}/*"), allow("s3:ListBucket", bucket))

    def read_write_user(self, bucket: str) -> Credentials:
        return self.user(
            allow(["s3:PutObject", "s3:GetObject"], f"{bucket}/*"), allow("s3:ListBucket", bucket)
        )

    def objects(self, bucket: str, prefix: str = "") -> dict[str, StoredObject]:
        """Return every object below the prefix by key, read from the server."""
        pages = self.admin.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {key: self._object(bucket, key) for key in keys}

    def _object(self, bucket: str, key: str) -> StoredObject:
        answer = self.admin.get_object(Bucket=bucket, Key=key)
        with contextlib.closing(answer["Body"]) as body:
            return StoredObject(key, body.read(), answer["Metadata"], answer["LastModified"])

    def _end(self, how: signal.Signals) -> None:
        """Signal the process, also if it is suspended, and wait for its end."""
        for client in self._clients.values():
            client.close()
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)
        process.wait()
        if process.stdin:
            process.stdin.close()

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "TMPDIR": str(self.directory),
            "GATEWAY_PORT": str(self.port),
            "AUTH": "true",
            "SERVICES": self.services,
            "S3_PERSIST": "1",
            "S3_DATA_DIR": str(self.directory / "s3"),
            "PERSIST_STATE": "1",
            "STATE_DIR": str(self.directory / "state"),
            "IOT_MTLS_ENABLED": "0",
            "SFTP_ENABLED": "0",
            "DOCKER_HOST": f"unix://{self.directory}/no-docker",
        }

    def _make_certificate(self) -> None:
        authority = trustme.CA()
        certificate = authority.issue_cert(self.host, "localhost", "s3.example.org")
        self.ca_file = self.directory / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca_file))
        pem = str(self.directory / "cert.pem")
        certificate.private_key_and_cert_chain_pem.write_to_path(pem)
        self._certificate = [pem, pem]

    def _restore_buckets(self) -> None:
        """Create those buckets anew that are gone, which are the ones without an object."""
        present = {bucket["Name"] for bucket in self.admin.list_buckets()["Buckets"]}
        for bucket in self._buckets:
            if bucket not in present:
                self.admin.create_bucket(Bucket=bucket)
