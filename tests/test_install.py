"""What `make install` makes of the files in a package.

Nothing outside the temporary directory is touched: every installation here has a DESTDIR. The same
on a systemd that runs: `make test-systemd`.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import os
import re
import shutil
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from kit import CHECKOUT, NOBODY, SCRIPT
from shared import run_command, section, write_script

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterable

# The first test waits for an installation that all others share.
pytestmark = pytest.mark.timeout(170)

UNIT = CHECKOUT / "lnd-backup.service"
SYSTEMD = CHECKOUT / "systemd"
SETTINGS = "etc/default/lnd-backup-env"
HOME = "opt/lnd-backup"
UNITS = "etc/systemd/system"
DROP_INS = f"{UNITS}/lnd-backup.service.d"
USER = NOBODY if os.geteuid() == 0 else os.geteuid()  # who can do no harm
needs_setfacl = pytest.mark.skipif(
    not shutil.which("setfacl"), reason="needs setfacl (Debian: acl)"
)


def system_python() -> str:
    """Return a Python of the system that the installer would take, or nothing."""
    code = "import ensurepip, sys, venv; ensurepip.version(); sys.exit(sys.version_info < (3, 11))"
    for name in ("python3", "python3.13", "python3.12", "python3.11"):
        python = shutil.which(name, path="/usr/bin:/usr/local/bin")
        if python and run_command(python, "-I", "-c", code).returncode == 0:
            return python
    return ""


PYTHON = system_python()


class Package:
    """A checkout to install from, which borrows its packages from the tests' venv."""

    def __init__(self, directory: Path, python: Path) -> None:
        """Copy what the installer needs; it will use this Python."""
        self.checkout, self.wheels = directory / "checkout", directory / "wheels"
        self.python = python
        self.wheels.mkdir(parents=True)
        for name in ("docs", "systemd"):
            shutil.copytree(CHECKOUT / name, self.checkout / name)
        for name in ("Makefile", "lnd-backup.service", "lnd-backup-env.example", SCRIPT.name):
            shutil.copy(CHECKOUT / name, self.checkout / name)
        wheel = self.wheels / "everything-1.0-py3-none-any.whl"
        about = "everything-1.0.dist-info"
        content = {
            "everything.pth": sysconfig.get_path("purelib") + "\n",
            "everything.py": "'A module to compile.'\n",
            f"{about}/METADATA": "Metadata-Version: 2.1\nName: everything\nVersion: 1.0\n",
            f"{about}/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
            f"{about}/RECORD": "",
        }
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in content.items():
                # Without the time, so that each package is the same.
                archive.writestr(zipfile.ZipInfo(name), text)
        self.require(f"--hash=sha256:{sha256(wheel)}")

    def require(self, pin: str) -> None:
        """Let the installation require the wheel with this pin."""
        (self.checkout / "requirements.txt").write_text(f"everything==1.0 {pin}\n")

    def make(
        self,
        verb: str,
        root: Path | None,
        *given: str,
        user: int | None = None,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run make with these variables; without a root as an ordinary user, who can do no harm."""
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_NO_CACHE_DIR": "1"}
        assert root or user, "this would install on the machine that runs the tests"
        destination = [f"DESTDIR={root}"] if root else []
        variables = [*destination, f"PYTHON={self.python}", *given]
        return run_command(
            "make", verb, *variables, env=pip | (env or {}), cwd=self.checkout, user=user
        )

    def do(self, verb: str, root: Path, *given: str, **more: Any) -> str:  # noqa: ANN401 - of make
        """Run make, which must succeed, and return what it prints."""
        done = self.make(verb, root, *given, **more)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def refuse(self, verb: str, root: Path, *given: str, told: Iterable[str]) -> str:
        """Run make, which must fail, change nothing, and say this in its last line and a hint.
        Return all that it prints.
        """
        before = tree(root)
        done = self.make(verb, root, *given)
        assert_refused(done, *told)
        assert tree(root) == before
        return done.stdout + done.stderr


def assert_refused(done: subprocess.CompletedProcess[str], *told: str) -> None:
    """Fail unless it failed, and said this in its last line and a hint."""
    assert done.returncode != 0, done.stdout
    message, hint, _ = done.stderr.splitlines()[-3:]  # the last one is make's own
    assert message.startswith("cannot "), done.stderr
    assert hint.startswith("hint: "), done.stderr
    for each in told:
        assert each in f"{message}\n{hint}"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(root: Path) -> dict[str, tuple[int, bytes, int]]:
    """Return the mode, content and inode of everything below the root."""
    entries = {}
    for path in root.rglob("*"):
        status, content = path.lstat(), b""
        if path.is_symlink():
            content = os.fsencode(path.readlink())
        elif path.is_file():
            content = path.read_bytes()
        entries[str(path.relative_to(root))] = (status.st_mode, content, status.st_ino)
    return entries


def files_in(root: Path) -> list[str]:
    """Return the names of the files and links below the root."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


def add_line(path: Path, line: str) -> None:
    """Add a line to a file; of settings it wins over the lines before it."""
    with path.open("a") as file:
        file.write(f"{line}\n")


def write_python(directory: Path) -> Path:
    """Write a Python for which a venv is at hand: to make one takes most of an installation."""
    copy = f'mkdir -p "$(dirname "$4")" && cp -a {directory}/venv "$4"'
    otherwise = f'[ "$2 $3" = "-m venv" ] || exec {PYTHON} "$@"'
    return write_script(directory / "python", f"{otherwise}\n{copy}")


def build_and_install(shared: Path) -> None:
    """Install a package as an ordinary user, once for all processes of the session."""
    # Pytest's own directories are closed to other users.
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "root").mkdir()
        shutil.chown(directory / "root", USER)
        run_command(PYTHON, "-I", "-m", "venv", directory / "venv")
        package = Package(directory, write_python(directory))
        given = ("S3_BUCKET_NAME=my-bucket", "RESCAN_SECONDS=30")
        told = package.do("install", directory / "root", *given, user=USER)
        assert (directory / "root" / SETTINGS).stat().st_mode & 0o777 == 0o600
        for made in ("root", "venv"):
            shutil.copytree(directory / made, shared / made, symlinks=True)
        (shared / "told").write_text(told.replace(str(directory), str(shared)))
        (shared / "place").write_text(str(directory))
    write_python(shared)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what is built once, and not changed: `root`, an installation, what it `told`, and a
    `python` with venvs at hand.
    """
    if not PYTHON:
        pytest.skip("needs a Python 3.11 with venv in /usr (Debian: python3-venv)")
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "installed"
    with (shared.parent / "installed.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "python").exists():
            shutil.rmtree(shared, ignore_errors=True)
            shared.mkdir()
            build_and_install(shared)
    return shared


@pytest.fixture(scope="session")
def released(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """Return the package of the session; nothing changes it."""
    return Package(tmp_path_factory.mktemp("package"), built / "python")


@pytest.fixture
def package(built: Path, tmp_path: Path) -> Package:
    """Return a package of this test alone."""
    return Package(tmp_path / "package", built / "python")


@pytest.fixture
def whole_root(built: Path, tmp_path: Path) -> Path:
    """Return a copy of the root in which the package is installed."""
    return Path(shutil.copytree(built / "root", tmp_path / "root", symlinks=True))


@pytest.fixture
def root(whole_root: Path) -> Path:
    """Return the same without the program's packages; so no time goes into judging settings."""
    for packages in whole_root.rglob("everything.pth"):
        packages.unlink()
    return whole_root


# --- what is installed ---


def test_everything_is_in_its_place(built: Path) -> None:
    """Program, venv, units, wrapper and settings are there, with their modes."""
    root, told = built / "root", (built / "told").read_text()
    modes = {
        f"{HOME}/current/s3_backup_lnd_channels.py": 0o644,
        f"{HOME}/current/remount-if-replaced": 0o755,
        f"{HOME}/current/check-twice": 0o755,
        "usr/local/bin/lnd-backup": 0o755,
        SETTINGS: 0o600,
        "etc/default/lnd-backup-alert": 0o600,
    }
    for path in (UNIT, *SYSTEMD.glob("*.service"), *SYSTEMD.glob("*.timer")):
        assert (root / UNITS / path.name).read_bytes() == path.read_bytes()
        modes[f"{UNITS}/{path.name}"] = 0o644
    assert {name: (root / name).stat().st_mode & 0o7777 for name in modes} == modes
    assert os.readlink(root / HOME / "current") in os.listdir(root / HOME)
    interpreter, *arguments = section(UNIT, "Service")["ExecStart"].split()
    assert arguments == ["-I", "-m", SCRIPT.stem], "memory is measured with compiled byte code"
    for started in (arguments, ["-I", str(root / HOME / "current" / SCRIPT.name)]):
        version = run_command(root / interpreter.removeprefix("/"), *started, "--version")
        assert version.returncode == 0, version.stderr
    assert "MONITOR_FILE_PATH=: is not set" in told
    assert "S3_BUCKET_NAME" not in told.partition("fill in the settings")[2]


def test_settings_hold_what_was_given_and_no_example(built: Path) -> None:
    """What was given is set, what has no default is empty, and there is no prefix of a machine."""
    text = (built / "root" / SETTINGS).read_text()
    assert re.findall(r"^(?!#|AWS)(.+)$", text, re.MULTILINE) == [
        "MONITOR_FILE_PATH=",
        "S3_BUCKET_NAME=my-bucket",
        "RESCAN_SECONDS=30",
    ]


def test_byte_code_is_compiled_and_scripts_are_not_needed(built: Path) -> None:
    """Every module has its byte code, whose names are those of the installed place; pip is gone."""
    current = built / "root" / HOME / "current"
    modules = list(current.rglob("site-packages/**/*.py"))
    assert modules
    for module in modules:
        (compiled,) = (module.parent / "__pycache__").glob(f"{module.stem}.*.pyc")
        assert f"/{HOME}/current/venv/lib".encode() in compiled.read_bytes()
    assert not {path.name for path in current.rglob("*")} & {"pip", "setuptools", "activate"}


def test_the_root_of_the_package_is_nowhere_in_it(built: Path) -> None:
    """No file names the directory in which the package was built."""
    place = (built / "place").read_bytes()
    files = [path for path in (built / "root").rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if place in path.read_bytes()] == []


def test_steps_are_printed(built: Path) -> None:
    """Each file that was put somewhere else than into /opt/lnd-backup was announced."""
    told = (built / "told").read_text()
    elsewhere = [name for name in files_in(built / "root") if not name.startswith(HOME)]
    assert len(elsewhere) > 10
    for name in elsewhere:
        path = re.escape(str(built / "root" / name))
        assert re.search(rf"^\+ install .* {path}$", told, re.MULTILINE), path


def test_another_node_has_settings_of_its_own(released: Package, root: Path) -> None:
    """NODE= makes settings of that name beside the others, which stay as they are."""
    before = (root / SETTINGS).read_bytes()
    released.do("install", root, "NODE=alice", "LND_USER=alice", "S3_BUCKET_NAME=hers")
    settings = root / "etc/default/lnd-backup@alice-env"
    text = settings.read_text()
    assert "S3_BUCKET_NAME=hers\n" in text
    assert "MONITOR_FILE_PATH=/var/lib/lnd-scb@alice/channel.backup\n" in text
    assert (root / SETTINGS).read_bytes() == before
    made = (root / "etc/tmpfiles.d/lnd-backup@alice.conf").read_text()
    assert "d /var/lib/lnd-scb@alice 2750 alice lnd-backup " in made
    released.do("uninstall", root)
    assert list((root / "etc/tmpfiles.d").iterdir()) == []
    assert settings.exists()


# --- upgrades ---


def test_again_changes_nothing(released: Package, root: Path) -> None:
    """A second time with the same sources there is nothing to do, and edited settings stay. What
    merely is in the environment is neither taken nor refused.
    """
    add_line(root / SETTINGS, "REFRESH_SECONDS=3600")
    before = tree(root)
    environment = {"AWS_SECRET_ACCESS_KEY": "abc", "RESCAN_SECONDS": "60"}
    told = released.do("install", root, "S3_BUCKET_NAME=my-bucket", env=environment)
    assert "\n+" not in told
    after = tree(root)
    manifest = f"{HOME}/manifest"  # is written anew
    assert after.pop(manifest)[1] == before.pop(manifest)[1]
    assert after == before


def test_an_upgrade_replaces_the_version_in_use(released: Package, root: Path) -> None:
    """The new version is linked in, and the old one removed."""
    current, old = root / HOME / "current", root / HOME / "old"
    new = current.readlink().name
    old.mkdir()
    current.unlink()
    current.symlink_to(old.name)
    released.do("install", root)
    assert current.readlink().name == new
    assert sorted(os.listdir(root / HOME)) == sorted([new, "current", "manifest"])


NO_PACKAGES = ("the packages could not be installed", "what was running still runs")


def test_without_packages_the_version_in_use_stays(package: Package, root: Path) -> None:
    """An upgrade for which no package comes changes nothing at all."""
    add_line(package.checkout / SCRIPT.name, "# newer")
    shutil.rmtree(package.wheels)
    package.refuse("install", root, told=NO_PACKAGES)


@pytest.mark.parametrize("pin", ["--hash=sha256:" + "0" * 64, ""], ids=["wrong", "none"])
def test_packages_without_the_right_hash_are_refused(
    pin: str, package: Package, root: Path
) -> None:
    """A package that differs from its pin, or has none, is not installed."""
    package.require(pin)
    assert "hashes" in package.refuse("install", root, told=NO_PACKAGES).lower()


def test_packages_to_be_built_are_refused(package: Package, root: Path) -> None:
    """A source package, whose build would run as root, is not even looked at."""
    next(package.wheels.iterdir()).unlink()
    source = package.wheels / "everything-1.0.zip"
    ran = package.wheels / "ran"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("everything-1.0/setup.py", f"open({str(ran)!r}, 'w')\n")
    package.require(f"--hash=sha256:{sha256(source)}")
    package.refuse("install", root, told=NO_PACKAGES)
    assert not ran.exists()


def test_settings_that_systemd_reads_otherwise_are_refused(
    released: Package, whole_root: Path
) -> None:
    """An upgrade names a line of any node's settings that systemd and the program read apart."""
    alice = whole_root / "etc/default/lnd-backup@alice-env"
    alice.write_text("S3_BUCKET_NAME=b\nexport AWS_REGION=x\n")
    released.refuse("install", whole_root, told=[alice.name, "line 2", "nothing has changed"])


def test_files_that_somebody_changed(released: Package, root: Path) -> None:
    """An upgrade does not undo what an operator changed in a unit; that belongs in a drop-in."""
    add_line(root / UNITS / "lnd-backup.service", "Nice=10")
    released.refuse("install", root, told=["lnd-backup.service exists", "drop-in"])


# --- refusals ---


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("AWS_SECRET_ACCESS_KEY=abc", "AWS_SECRET_ACCESS_KEY is a secret"),
        ("AWS_ACCESS_KEY_ID=abc", "AWS_ACCESS_KEY_ID is a secret"),
        ("AWS_SESSION_TOKEN=abc", "AWS_SESSION_TOKEN is a secret"),
        ("HEARTBEAT_URL=https://hc.example.org/x", "HEARTBEAT_URL is a secret"),
        ("HTTPS_PROXY=http://me:pass@proxy:3128", "HTTPS_PROXY holds a password"),
        ("S3_BUCKET=b", "there is no setting S3_BUCKET"),
        ("AWS_REGIONs=b", "there is no setting AWS_REGIONs"),
        ("LND_USER=bit;coin", "LND_USER=bit;coin is not a valid user name"),
        ("LND_DIRECTORY=/nowhere", "/nowhere is not a directory"),
        ("NODE=a/b", "NODE=a/b is not a valid name for a node"),
        ("COPY_DIRECTORY=/nowhere/copies", "there is no directory /nowhere/copies"),
        ("COPY_DIRECTORY=/home/me/copies", "the service cannot see home directories"),
        ("COPY_DIRECTORY=/tmp/copies", "a /tmp of its own"),
        ("COPY_DIRECTORY=/srv/two words", "a unit file would read this name differently"),
        ("COPY_DIRECTORY=/proc", "/proc is the mount point"),
        ("FORCE=1", "there is no setting FORCE"),
        ("PYTHON=/usr/bin/python9", "apt install python3 python3-venv"),
    ],
)
def test_variables(given: str, told: str, released: Package, tmp_path: Path) -> None:
    """What cannot be is refused, and a secret is not repeated."""
    printed = released.refuse("install", tmp_path, given, told=[told])
    assert "abc" not in printed
    assert "pass" not in printed.replace("password", "")


@pytest.mark.parametrize(
    "given",
    ["S3_BUCKET_NAME=s3://b", 'S3_BUCKET_NAME=b"c', "S3_BUCKET_NAME=$$(id)", "RESCAN_SECONDS=0"],
)
def test_values(given: str, released: Package, whole_root: Path) -> None:
    """A value that the program would refuse is refused before there are settings."""
    (whole_root / SETTINGS).unlink()
    released.refuse("install", whole_root, given, told=[given.partition("=")[0]])


def test_a_value_that_make_would_expand(released: Package, root: Path) -> None:
    before = tree(root)
    done = released.make("install", root, "S3_BACKUP_PREFIX=a$node/")
    assert "S3_BACKUP_PREFIX has a $, which make would read as a variable" in done.stderr
    assert (done.returncode, tree(root)) == (2, before)


def test_two_installations_at_once(released: Package, root: Path) -> None:
    """The second would build in the place of the first."""
    lock = os.open(root / HOME, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    released.refuse("install", root, told=["another installation is at work"])
    os.close(lock)


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ("S3_BUCKET_NAME=other", "leave out S3_BUCKET_NAME"),
        ("COPY_DIRECTORY=/mnt/copies", "run this again"),
    ],
)
def test_settings_are_never_changed(given: str, then: str, released: Package, root: Path) -> None:
    """A value that differs from that in the settings is refused."""
    add_line(root / SETTINGS, "COPY_DIRECTORY=/mnt/other")
    told = ["is never changed", f"sudoedit /{SETTINGS}, and {then}"]
    released.refuse("install", root, given, told=told)


@pytest.mark.parametrize(
    "name",
    ["usr/local/bin/lnd-backup", f"{UNITS}/lnd-backup.service", f"{UNITS}/lnd-backup@.timer", HOME],
)
def test_files_of_others(name: str, released: Package, tmp_path: Path) -> None:
    """A file of that name which this did not make stays as it is."""
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("mine\n")
    released.refuse("install", tmp_path, told=[f"/{name} exists", "systemctl edit lnd-backup"])


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("sys.version_info = (3, 10, 1)", "is too old: 3.11 or newer is needed"),
        ("sys.modules['ensurepip'] = None", "has no venv module"),
        ("sys.executable = '/home/me/.pyenv/python3'", "is not in /usr"),
    ],
)
def test_pythons(code: str, told: str, released: Package, tmp_path: Path) -> None:
    """A Python that cannot be used is refused with what to install or to name."""
    python = write_script(
        tmp_path / "python",
        f'[ "$2" = -c ] || exec {PYTHON} "$@"\nexec {PYTHON} -I -c "import sys; {code}; $3"',
    )
    released.refuse("install", tmp_path, f"PYTHON={python}", told=[told])


@pytest.mark.parametrize("verb", ["install", "uninstall", "purge"])
def test_who_is_not_root(verb: str, public: Path, built: Path) -> None:
    """Without a DESTDIR only root may, and the command to type is named."""
    done = Package(public, built / "python").make(verb, None, user=USER)
    assert_refused(done, "only root can do this", f"sudo make {verb}")


# --- uninstall and purge ---


def stage(root: Path, name: str) -> Path:
    """Leave a version that was never sent in this staging directory."""
    staging = root / "var/lib" / name
    staging.mkdir(parents=True)
    version = staging / "20261120T215558.123456Z-a1b2c3"
    version.write_bytes(b"x")
    return version


def test_settings_and_staged_versions_stay(released: Package, root: Path) -> None:
    """Settings, staged versions and a file that an operator changed stay, and are named."""
    staged = str(stage(root, "lnd-backup").relative_to(root))
    changed = f"{UNITS}/lnd-backup.timer"
    (root / changed).write_text("mine\n")
    told = released.do("uninstall", root)
    left = ["etc/default/lnd-backup-alert", SETTINGS, changed, staged]
    assert files_in(root) == left
    assert (root / changed).read_text() == "mine\n"
    assert f"kept, because somebody changed it: /{changed}" in told
    assert "kept: settings and staged versions: /etc/default/lnd-backup-env" in told
    released.do("uninstall", root)
    assert files_in(root) == left


PLACES = ["lnd-backup", "lnd-backup@alice", "lnd-backup@alice/below", "elsewhere"]


@pytest.mark.parametrize("place", PLACES)
def test_purge_refuses_while_versions_wait(place: str, released: Package, root: Path) -> None:
    """A version that was never sent, of whichever node and in whichever staging directory, is
    named, and nothing is changed.
    """
    version = stage(root, place)
    other = " BACKUP_DIRECTORY = /var/lib/elsewhere \n"  # as the program takes it
    (root / "etc/default/lnd-backup@bob-env").write_text(other)
    told = ["never reached the bucket; nothing has changed", "sudo make purge FORCE=1"]
    assert f"{version}\n" in released.refuse("purge", root, "FORCE=0", told=told)


def test_purge_removes_everything_but_what_is_lnd_s(released: Package, root: Path) -> None:
    """Settings and receipts go too; with FORCE=1 also what was never sent, which is named."""
    version = stage(root, "lnd-backup@alice")
    (version.parent / ".receipt").write_bytes(b"{}")
    (root / "var/lib/lnd-backup-alert").mkdir()
    (root / "etc/default/lnd-backup@alice-env").touch()
    scb = root / "var/lib/lnd-scb/channel.backup"
    scb.parent.mkdir()
    scb.write_bytes(b"x")
    other = stage(root, "elsewhere")
    bobs = "BACKUP_DIRECTORY=/var/lib/elsewhere\n"
    (root / "etc/default/lnd-backup@bob-env").write_text(bobs)
    told = released.do("purge", root, "FORCE=1")
    assert files_in(root) == [str(path.relative_to(root)) for path in (other, scb)]
    assert f"kept, although it never reached the bucket: {other}\n" in told
    assert f"deleting what never reached the bucket: {version}\n" in told
    assert not (root / "var/lib/lnd-backup-alert").exists()
    assert "kept, because it is LND's: " in told


def test_one_node_alone_is_refused(released: Package, root: Path) -> None:
    """NODE= with uninstall or purge would remove more than it says; the lines for it are named."""
    released.refuse("purge", root, "NODE=alice", told=["disable --now lnd-backup@alice"])


# --- a second place, and LND's own directory ---


@pytest.fixture
def place() -> Iterable[Path]:
    """Return a directory that the service could see."""
    with tempfile.TemporaryDirectory(dir="/var/lib", prefix="lnd-backup-tests-") as name:
        yield Path(name)


def test_it_is_set_and_opened(place: Path, released: Package, root: Path) -> None:
    """COPY_DIRECTORY= is added to settings that are there, of which nothing else changes, and a
    drop-in opens the directory; a later upgrade keeps both, and an uninstall removes the drop-in.
    """
    settings = root / SETTINGS
    before = settings.read_text()
    released.do("install", root, f"COPY_DIRECTORY={place}")
    assert settings.read_text() == before.replace("#COPY_DIRECTORY=\n", f"COPY_DIRECTORY={place}\n")
    assert settings.stat().st_mode & 0o777 == 0o600
    drop_in = root / DROP_INS / "copy-directory.conf"
    assert section(drop_in, "Service") == {"ReadWritePaths": f"-{place}"}
    for given in ([], [f"COPY_DIRECTORY={place}"]):
        assert "\n+" not in released.do("install", root, *given)
    assert drop_in.exists()
    released.do("uninstall", root)
    assert not drop_in.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")
@pytest.mark.parametrize(
    ("watched", "mount_point", "opened"),
    [
        ("/var/lib/lnd-scb", "/mnt", "/mnt"),
        ("/mnt/lnd", "/mnt", "/mnt/copies"),
        ("/var/lib/lnd-scb", "/srv", "/srv/copies"),
    ],
)
def test_of_a_stick_the_mount_point_is_opened(
    watched: str, mount_point: str, opened: str, released: Package, root: Path
) -> None:
    """The drop-in names the mount point: named itself, the directory would be a mount of the
    service's own. On a disk that also holds LND's file, or is the system's, it is named itself.
    """
    add_line(root / SETTINGS, f"MONITOR_FILE_PATH={watched}/channel.backup")
    done = run_command(
        "unshare", "--mount", "sh", "-euc",
        'mount -t tmpfs none "$1"; mkdir "$1/copies"; '
        'make install DESTDIR="$2" PYTHON="$3" COPY_DIRECTORY="$1/copies"',
        "sh", mount_point, root, PYTHON,
        cwd=released.checkout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    drop_in = root / DROP_INS / "copy-directory.conf"
    assert section(drop_in, "Service") == {"ReadWritePaths": f"-{opened}"}


def test_another_name_of_it_is_refused(place: Path, released: Package, root: Path) -> None:
    """A link could lead elsewhere tomorrow; the real name is told."""
    (place / "real").mkdir()
    (place / "link").symlink_to("real")
    told = [f"make install COPY_DIRECTORY={place}/real"]
    released.refuse("install", root, f"COPY_DIRECTORY={place}/link", told=told)


def test_a_copy_among_files_of_others_is_refused(
    place: Path, released: Package, root: Path
) -> None:
    """The program would not start with it, or nobody could tell whose files lie there."""
    add_line(root / SETTINGS, f"MONITOR_FILE_PATH={place}/lnd/channel.backup")
    for name in ("lnd/copies", "bob"):
        (place / name).mkdir(parents=True)
    told = [f"{place}/lnd/copies is LND's, or the staging directory"]
    released.refuse("install", root, f"COPY_DIRECTORY={place}/lnd/copies", told=told)
    bobs = "etc/default/lnd-backup@bob-env"
    (root / bobs).write_text(f"COPY_DIRECTORY={place}/bob\n")
    told = [f"{place}/bob is COPY_DIRECTORY in /{bobs}, too"]
    released.refuse("install", root, f"COPY_DIRECTORY={place}/bob", told=told)


def test_a_file_that_lnd_does_not_write(released: Package, root: Path) -> None:
    """The same is refused where it is given beside LND_USER."""
    (root / SETTINGS).unlink()
    given = ["LND_USER=root", "MONITOR_FILE_PATH=/home/bitcoin/channel.backup"]
    told = [given[1], "which is not in /var/lib/lnd-scb", "leave out LND_USER"]
    released.refuse("install", root, *given, told=told)


@needs_setfacl
def test_what_is_open_is_not_hidden(released: Package, root: Path, public: Path) -> None:
    """Otherwise, beside LND's directory, it would hide the program or the staging directory."""
    (root / SETTINGS).unlink()
    directory = public / "lnd"
    directory.mkdir()
    released.do("install", root, f"LND_DIRECTORY={directory}")
    drop_in = section(root / DROP_INS / "lnd-directory.conf", "Service")
    assert drop_in == {"BindReadOnlyPaths": f"-{directory}"}
    check = root / UNITS / "lnd-backup-check@lnd-backup.service.d/lnd-directory.conf"
    add_line(check, "Nice=10")
    told = ["lnd-backup-check@lnd-backup.service.d/lnd-directory.conf exists"]
    released.refuse("install", root, told=told)


@needs_setfacl
@pytest.mark.parametrize(
    ("given", "place"), [("LND_USER=root", "/var/lib/lnd-scb"), ("LND_DIRECTORY={0}", "{0}")]
)
def test_lnd_and_the_service_mean_the_same_file(
    given: str, place: str, released: Package, root: Path, tmp_path: Path
) -> None:
    """Settings that name another file than LND would write are refused, with the line to write."""
    given, place = given.format(tmp_path), place.format(tmp_path)
    other = "MONITOR_FILE_PATH=/home/bitcoin/mainnet/channel.backup"
    right = f"MONITOR_FILE_PATH={place}/channel.backup"
    add_line(root / SETTINGS, other)
    told = [other, right, f"leave out {given.partition('=')[0]}"]
    released.refuse("install", root, given, told=told)
    add_line(root / SETTINGS, right)
    released.do("install", root, given)


@needs_setfacl
def test_the_directory_of_lnd_is_opened_alone(released: Package, root: Path, public: Path) -> None:
    """A drop-in shows LND_DIRECTORY, and hides what is closed around it; the path is set."""
    (root / SETTINGS).unlink()
    closed, link = public / "hdd/lnd", public / "link"
    directory = closed / "data/chain/bitcoin/mainnet"
    directory.mkdir(parents=True)
    closed.chmod(0o700)
    link.symlink_to(directory)
    released.do("install", root, f"LND_DIRECTORY={link}", "S3_BUCKET_NAME=my-bucket")
    drop_in = section(root / DROP_INS / "lnd-directory.conf", "Service")
    assert drop_in == {
        "TemporaryFileSystem": f"{closed}:ro",
        "BindReadOnlyPaths": f"-{directory}",
    }
    expected = f"MONITOR_FILE_PATH={directory}/channel.backup\n"
    assert expected in (root / SETTINGS).read_text()
    check = root / UNITS / "lnd-backup-check@lnd-backup.service.d/lnd-directory.conf"
    assert section(check, "Service") == drop_in
    assert "Wants=" not in check.read_text()
    shutil.rmtree(check.parent)  # as an earlier version left it
    released.do("install", root)
    assert section(check, "Service") == drop_in
    released.do("uninstall", root)
    assert not (root / DROP_INS).exists()
    assert not check.parent.exists()


# --- the shell programs are read before they run as root ---

INSTALLER = SYSTEMD / "install.sh"
SHELL_COLUMNS, SHELL_FUNCTION_MAX = 100, 40  # a function is seen whole on one screen
PATHS = re.compile(r"(?<![\w.)}])/(?:etc|opt|run|usr|var)/[\w./@*-]*[\w*]")
# Directories of the system: it only looks whether they are there, or compares a path with them.
OF_THE_SYSTEM = {"/etc/default", "/etc/systemd/system", "/etc/tmpfiles.d", "/run/systemd/system"}
OF_THE_SYSTEM |= {"/run/user/*", "/usr/*", "/var/*", "/var/tmp/*"}  # noqa: S108 - none is made


def shell_programs() -> list[Path]:
    """Return the programs of the repository whose first line names a shell."""
    tops = (CHECKOUT / name for name in (".ci", "bench", "container", "docs", "systemd", "tests"))
    files = (path for top in tops for path in top.rglob("*") if path.is_file())
    return sorted(path for path in files if re.match(rb"#!.*sh\n", path.read_bytes()))


def test_every_shell_program_is_checked() -> None:
    """`make lint` hands all of them to shellcheck."""
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    found = re.search(r"^SHELL_PROGRAMS := (.+)$", makefile, re.MULTILINE)
    assert found
    assert found[1].split() == [str(path.relative_to(CHECKOUT)) for path in shell_programs()]


@pytest.mark.parametrize(
    "program", shell_programs(), ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_a_shell_program_fits_the_screen(program: Path) -> None:
    """No function is longer than a screen, and no line of what runs on a node is wider."""
    text = program.read_text(encoding="utf-8")
    if program.parent.name == "systemd" and program.parent.parent == CHECKOUT:
        assert [line for line in text.splitlines() if len(line) > SHELL_COLUMNS] == []
    begun = re.findall(r"^(\w+)\(\) \{(?: #.*)?$", text, re.MULTILINE)
    functions = re.findall(r"^(\w+)\(\) \{(?: #.*)?\n((?:(?!\}$).*\n)*)\}$", text, re.MULTILINE)
    assert [name for name, _ in functions] == begun
    assert [name for name, body in functions if body.count("\n") + 2 > SHELL_FUNCTION_MAX] == []


def head_of_the_installer() -> dict[str, str]:
    """Return what it says of itself in its first comment, by the word that begins it."""
    head = INSTALLER.read_text(encoding="utf-8").partition("\nset -eu\n")[0]
    parts = re.split(r"^# ([a-z]+) {2,}(?=\S)", head, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def paths_used_by_the_installer() -> set[str]:
    """Return the paths in its code, those of a node without a name."""
    text = INSTALLER.read_text(encoding="utf-8")
    code = "\n".join(line.partition(" # ")[0] for line in text.splitlines() if line[:1] != "#")
    values = dict(re.findall(r'^([a-z_]+)=("?[^\s"(]+)', code, re.MULTILINE))
    values["service"] = "lnd-backup"
    code = code.replace("\\.", ".")
    for _ in values:
        code = re.sub(r"\$([a-z_]+)", lambda name: values.get(name[1], name[0]), code)
    return set(PATHS.findall(re.sub(r'"?\$DESTDIR"?|\$\{node.*?\}', "", code)))


def is_named(path: str, names: Iterable[str]) -> bool:
    """Tell whether one of these names, which may have a *, is this path or one above it."""
    places = [path, *map(str, Path(path).parents)]
    return any(fnmatch.filter(places, name) for name in names)


def test_the_head_of_the_installer_names_every_path() -> None:
    """Each path in its code is named there, and each path that is named there is in its code."""
    head = head_of_the_installer()
    assert {"reads", "writes", "removes", "connects", "never", "order", "begin"} <= set(head)
    named = {path for part in head.values() for path in PATHS.findall(part)}
    used = paths_used_by_the_installer() - OF_THE_SYSTEM
    assert len(used) > 20
    assert [path for path in used if not is_named(path, named)] == []
    assert [name for name in named if not any(is_named(path, [name]) for path in used)] == []


def test_an_installation_writes_what_the_head_names(released: Package, root: Path) -> None:
    """Each file of a service and of another node is below a path that the head says is written."""
    released.do("install", root, "NODE=alice", "LND_USER=alice")
    written = PATHS.findall(head_of_the_installer()["writes"])
    left = [f"/{name}" for name in files_in(root)]
    assert "/etc/tmpfiles.d/lnd-backup@alice.conf" in left
    assert [path for path in left if not is_named(path, written)] == []
