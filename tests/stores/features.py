"""The features: each one drives the program's command line against a store, and says in a word what
came of it.

A function returns what was measured; it raises AssertionError where the program, not the store, did
wrong.
"""

from __future__ import annotations

import contextlib
import json
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError
from kit import Credentials, FaultProxy, Lnd, Script, channel_backup, run_script, settings_at
from kit.tls_front import TlsFront

from .servers import NoSuchFeatureError, is_denied

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kit import Written

    from .servers import Store

PREFIX = "alice/"
MANY = 1003  # more than a page of 1,000


@dataclass
class Bench:
    """One store over one scheme, with a fresh node and bucket for each feature."""

    store: Store
    scheme: str
    directory: Path
    port: int
    ca_file: Path | None

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True)
        self.lnd = Lnd(self.directory / "lnd")
        self.admin = self.store.client()
        self.make_bucket()

    def make_bucket(self, **kwargs: Any) -> None:  # noqa: ANN401 - passed to the client
        self.bucket = f"bucket-{uuid.uuid4().hex[:12]}"
        self.admin.create_bucket(Bucket=self.bucket, **kwargs)

    def env(self, credentials: Credentials | None = None, port: int = 0) -> dict[str, str]:
        """Return the program's settings, by default with the owner's key."""
        endpoint = f"{self.scheme}://127.0.0.1:{port or self.port}"
        staging = self.directory / f"staging-{uuid.uuid4().hex[:6]}"
        tls = {"AWS_CA_BUNDLE": str(self.ca_file)} if self.ca_file else {}
        user = credentials or self.store.owner
        return tls | settings_at(
            endpoint, self.lnd, staging, bucket=self.bucket, prefix=PREFIX, user=user
        )

    def back_up(self, env: dict[str, str], channels: int = 10) -> Written:
        """Let LND write, and `once` store it."""
        version = self.lnd.write(channels)
        run(env, "once")
        return version

    def stored(self) -> list[tuple[str, bytes]]:
        """Return every object as the owner sees it."""
        entries = self.admin.list_objects_v2(Bucket=self.bucket).get("Contents", [])
        return [(entry["Key"], self.read(entry["Key"])) for entry in entries]

    def read(self, key: str, **version: str) -> bytes:
        answer = self.admin.get_object(Bucket=self.bucket, Key=key, **version)
        with contextlib.closing(answer["Body"]) as body:
            return bytes(body.read())


def run(
    env: dict[str, str], *arguments: str, code: int = 0, says: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command of the program, which must end with this code and say this."""
    done = run_script(env, *arguments)
    said = done.stderr[-1500:]
    assert done.returncode == code, f"{arguments} exited {done.returncode}, not {code}: {said}"
    assert says in done.stderr, f"{says!r} is not in: {said}"
    return done


def code_of(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextlib.contextmanager
def needed(what: str) -> Iterator[None]:
    """Raise NoSuchFeatureError if a store has no such thing, as its error says."""
    try:
        yield
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] in (400, 404, 405, 409, 501):
            raise NoSuchFeatureError(f"no {what} ({code_of(error)})") from error
        raise


def put(bench: Bench) -> str:
    """`once` stores the file's bytes under the version's name, with the SHA-256 in the metadata."""
    version = bench.back_up(bench.env())
    [(key, data)] = bench.stored()
    assert re.fullmatch(rf"{PREFIX}\d{{8}}T\d{{6}}\.\d{{6}}Z-{version.sha256[-6:]}", key), key
    assert data == version.data
    metadata = bench.admin.head_object(Bucket=bench.bucket, Key=key)["Metadata"]
    assert {name.lower(): value for name, value in metadata.items()} == {"sha256": version.sha256}
    return "ok"


def wrong_bytes(bench: Bench) -> str:
    """Of a body in which a bit is flipped on the way nothing is stored; or `check` finds it."""
    version = bench.lnd.write()
    tls = bench.scheme == "https"
    with (
        FaultProxy("127.0.0.1", bench.store.port) as proxy,
        TlsFront(proxy.port, bench.directory, tls=tls) as front,
    ):
        proxy.set("corrupt")
        env = bench.env(port=front.port) | {"SHUTDOWN_GRACE_SECONDS": "0"}
        if tls:
            env["AWS_CA_BUNDLE"] = str(front.ca_file)
        with Script(env) as script:
            said = script.wait_for_log(r"stored s3://|cannot store: .*", timeout=30).group()
            assert script.stop() == 0
    if said.startswith("cannot"):
        assert bench.stored() == []
        [staged] = (bench.directory / env["BACKUP_DIRECTORY"]).glob("2*")
        assert staged.read_bytes() == version.data
        return "refused"
    assert [data == version.data for _, data in bench.stored()] == [False]
    run(bench.env(), "check", code=1)
    return "stores them; `check` finds it"


def paging(bench: Bench) -> str:
    """`list` shows more versions than the store gives in one answer, newest first."""
    now = datetime.now(UTC)
    names = [f"{now - timedelta(minutes=n):%Y%m%dT%H%M%S.%f}Z-012345" for n in range(MANY)]

    def store(name: str) -> None:
        bench.admin.put_object(Bucket=bench.bucket, Key=PREFIX + name, Body=b"x" * 45)

    # Alone: rclone answers InternalError to some of those that would make a directory at once.
    store(names[0])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(store, names))
    rows = json.loads(run(bench.env(), "list", "--json").stdout)
    assert [row["name"] for row in rows] == names
    return "ok"


def restore(bench: Bench) -> str:
    """`restore` writes the newest version that holds channels, byte for byte."""
    env, output = bench.env(), bench.directory / "restored"
    bench.back_up(env)
    version = bench.back_up(env)
    bench.back_up(env, channels=0)
    run(env, "restore", "--output", str(output), says="no channels")
    assert output.read_bytes() == version.data
    return "ok"


def check(bench: Bench) -> str:
    """`check` tells a version that is stored from one that is not."""
    env = bench.env()
    bench.back_up(env)
    assert json.loads(run(env, "check", "--json").stdout)["proof"] == "bucket"
    bench.lnd.write()
    run(env, "check", code=1)
    return "ok"


def wrong_key(bench: Bench) -> str:
    """A wrong secret or key ends `once` with 1, and the hint names the key."""
    owner, accepted = bench.store.owner, []
    bench.lnd.write()
    wrong = {
        "secret": Credentials(owner.access_key, "x" + owner.secret_key[1:]),
        "key": Credentials("x" + owner.access_key[1:], owner.secret_key),
    }
    for what, credentials in wrong.items():
        if bench.stored():
            bench.make_bucket()
        done = run_script(bench.env(credentials), "once")
        if done.returncode == 0:
            accepted.append(what)
            continue
        assert done.returncode == 1, done.stderr
        assert re.search("access key|the key's policy|provider", done.stderr), done.stderr
    return f"accepts a wrong {' and '.join(accepted)}" if accepted else "refused"


def missing_bucket(bench: Bench) -> str:
    """A bucket that is not there ends `once` and `list` with 1, and the hint names the bucket."""
    bench.lnd.write()
    bench.bucket += "-gone"
    env = bench.env()
    run(env, "once", code=1, says="NoSuchBucket")
    run(env, "list", code=1, says="NoSuchBucket")
    return "refused"


def in_region(bench: Bench, region: str) -> str:
    """With a wrong region, or none, the version is stored, or the hint names AWS_REGION."""
    version = bench.lnd.write()
    env = bench.env() | {"AWS_REGION": region}
    done = run_script(env, "once")
    if done.returncode:
        assert done.returncode == 1, done.stderr
        assert "AWS_REGION" in done.stderr, done.stderr
        return "refused"
    run(env, "check")
    assert [data for _, data in bench.stored()] == [version.data]
    return "ok"


def put_only(bench: Bench) -> str:
    """With a put-only key `once` and `check` work, and `list` names the reader's key."""
    bucket = bench.bucket
    node = bench.store.put_only(bucket, PREFIX)
    env = bench.env(node)
    version = bench.back_up(env)
    [entry] = bench.admin.list_objects_v2(Bucket=bucket)["Contents"]
    key, client, hidden = entry["Key"], bench.store.client(credentials=node), ""
    try:
        assert bench.read(key) == version.data
    except ClientError as error:
        assert code_of(error) == "AccessDenied", error  # noqa: PT017 - its code counts
        hidden = ", and the bucket's owner may not"
    run(env, "list", code=1, says="reader")
    calls: dict[str, Callable[[], Any]] = {
        "get": lambda: client.get_object(Bucket=bucket, Key=key),
        "put elsewhere": lambda: client.put_object(Bucket=bucket, Key="bob/x", Body=b"x"),
        "delete": lambda: client.delete_object(Bucket=bucket, Key=key),
    }
    more = [what for what, call in calls.items() if not is_denied(call)]
    if "delete" not in more:
        assert json.loads(run(env, "check", "--json").stdout)["proof"] == "receipt"
    return f"ok, but may {' and '.join(more)}{hidden}" if more or hidden else "ok"


def object_lock(bench: Bench) -> str:
    """A bucket with a default retention takes the put, and the version cannot be deleted."""
    retention = {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}}
    lock = {"ObjectLockEnabled": "Enabled", "Rule": retention}
    with needed("Object Lock"):
        bench.make_bucket(ObjectLockEnabledForBucket=True)
        bucket = bench.bucket
        bench.admin.put_object_lock_configuration(Bucket=bucket, ObjectLockConfiguration=lock)
    env = bench.env()
    version = bench.back_up(env)
    run(env, "check")
    [(key, data)] = bench.stored()
    assert data == version.data
    head = bench.admin.head_object(Bucket=bucket, Key=key)
    if head.get("ObjectLockMode") != "COMPLIANCE":
        return "not locked"
    exact = {"Bucket": bucket, "Key": key, "VersionId": head["VersionId"]}
    locked = is_denied(lambda: bench.admin.delete_object(**exact))
    return "ok" if locked else "deletes a locked version"


def versioning(bench: Bench) -> str:
    """An object that somebody puts over another hides it, and the first is still there."""
    bucket, enabled = bench.bucket, {"Status": "Enabled"}
    with needed("versioning"):
        bench.admin.put_bucket_versioning(Bucket=bucket, VersioningConfiguration=enabled)
    env = bench.env()
    version = bench.back_up(env)
    [(key, _)] = bench.stored()
    bench.admin.put_object(Bucket=bucket, Key=key, Body=channel_backup(1))
    [row] = json.loads(run(env, "list", "--json").stdout)
    assert row["key"] == key
    run(env, "check", code=1)
    versions = bench.admin.list_object_versions(Bucket=bucket, Prefix=key)["Versions"]
    kept = [bench.read(key, VersionId=each["VersionId"]) for each in versions]
    assert len(kept) == 2
    return "ok" if version.data in kept else "lost"


FEATURES: dict[str, Callable[[Bench], str]] = {
    "put with checks": put,
    "wrong bytes": wrong_bytes,
    f"list of {MANY:,}, in pages": paging,
    "restore": restore,
    "check": check,
    "wrong key": wrong_key,
    "missing bucket": missing_bucket,
    "another region named": partial(in_region, region="eu-north-1"),
    "no region named": partial(in_region, region=""),
    "put-only policy": put_only,
    "Object Lock, default retention": object_lock,
    "versioning": versioning,
}
