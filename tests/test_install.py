"""What `make install` makes of the files in a package.

Nothing outside the temporary directory is touched: every installation here has a DESTDIR. The same
on a systemd that runs: `make test-systemd`.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import itertools
import os
import re
import shutil
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kit import CHECKOUT, NOBODY, SCRIPT, run_script
from shared import run_command, section

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterable, Iterator

# The first test waits for an installation that all others share.
pytestmark = pytest.mark.timeout(170)

UNIT = CHECKOUT / "lnd-backup.service"
SETTINGS = "etc/default/lnd-backup-env"
HOME = "opt/lnd-backup"
UNITS = "etc/systemd/system"


def system_python() -> str | None:
    """Return a Python of the system that the installer would take."""
    code = "import ensurepip, sys, venv; ensurepip.version(); sys.exit(sys.version_info < (3, 11))"
    for name in ("python3", "python3.13", "python3.12", "python3.11"):
        for directory in ("/usr/bin", "/usr/local/bin"):
            python = f"{directory}/{name}"
            if os.path.exists(python) and run_command(python, "-I", "-c", code).returncode == 0:
                return python
    return None


PYTHON = system_python() or ""
needs_python = pytest.mark.skipif(
    not PYTHON, reason="needs a Python 3.11 with venv in /usr (Debian: python3-venv)"
)


class Package:
    """A checkout to install from, whose only requirement is a wheel that lends it the packages of
    the tests' venv.
    """

    def __init__(self, directory: Path) -> None:
        """Copy what the installer needs."""
        self.checkout, self.wheels = directory / "checkout", directory / "wheels"
        self.wheels.mkdir(parents=True)
        for name in ("docs", "systemd"):
            shutil.copytree(CHECKOUT / name, self.checkout / name)
        for name in ("Makefile", "lnd-backup.service", "lnd-backup-env.example", SCRIPT.name):
            shutil.copy(CHECKOUT / name, self.checkout / name)
        wheel = self.wheels / "everything-1.0-py3-none-any.whl"
        content = {
            "everything.pth": sysconfig.get_path("purelib") + "\n",
            "everything.py": "'A module to compile.'\n",
            "everything-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: "
            "everything\nVersion: 1.0\n",
            "everything-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
            "everything-1.0.dist-info/RECORD": "",
        }
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in content.items():
                archive.writestr(
                    zipfile.ZipInfo(name), text
                )  # without the time: each package is the same
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        self.requirements = self.checkout / "requirements.txt"
        self.requirements.write_text(f"everything==1.0 --hash=sha256:{digest}\n", encoding="utf-8")

    def make(
        self, verb: str, root: Path | None, *given: str, user: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run make with these variables; without a root as an ordinary user, who can do no harm."""
        env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_NO_CACHE_DIR": "1"}
        assert root or user, "this would install on the machine that runs the tests"
        destination = [f"DESTDIR={root}"] if root else []
        default = [] if any(each.startswith("PYTHON=") for each in given) else [f"PYTHON={PYTHON}"]
        return run_command(
            "make", verb, *destination, *default, *given, env=env, cwd=self.checkout, user=user
        )

    def new_version(self) -> None:
        """Change the program, so that the next installation is an upgrade."""
        with (self.checkout / SCRIPT.name).open("a", encoding="utf-8") as script:
            script.write("# newer\n")


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """Return the package of the session; nothing changes it."""
    return Package(tmp_path_factory.mktemp("package"))


def build_and_install(shared: Path) -> None:
    """Install a package as an ordinary user, and make a bare venv, each once for all processes of
    the session.
    """
    user = NOBODY if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(
        dir="/tmp"
    ) as name:  # pytest's own directories are closed to other users
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "root").mkdir()
        if user:
            shutil.chown(directory / "root", user)
        done = Package(directory).make(
            "install",
            directory / "root",
            "S3_BUCKET_NAME=my-bucket",
            "RESCAN_SECONDS=30",
            user=user,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        mode = (directory / "root" / SETTINGS).stat().st_mode
        assert mode & 0o777 == 0o600
        shutil.copytree(directory / "root", shared / "root", symlinks=True)
        (shared / "told").write_text(
            done.stdout.replace(str(directory), str(shared)), encoding="utf-8"
        )
        (shared / "place").write_text(str(directory), encoding="utf-8")
    assert run_command(PYTHON, "-I", "-m", "venv", shared / "venv").returncode == 0
    (shared / "python").write_text(
        f"""#!/bin/sh
[ "$2 $3" = "-m venv" ] || exec {PYTHON} "$@"
mkdir -p "$(dirname "$4")" && cp -a {shared}/venv "$4"
""",
        encoding="utf-8",
    )
    (shared / "python").chmod(0o755)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what is built once: `root`, an installation, what it `told`, and a `python` with venvs
    at hand.
    """
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
def installed(built: Path) -> tuple[Path, str]:
    """Return the root in which the package is installed, and what was printed; nothing changes
    it.
    """
    return built / "root", (built / "told").read_text(encoding="utf-8")


@pytest.fixture
def package(tmp_path: Path) -> Package:
    """Return a package of this test alone."""
    return Package(tmp_path / "package")


@pytest.fixture
def root(installed: tuple[Path, str], tmp_path: Path) -> Path:
    """Return a copy of the root in which the package is installed."""
    shutil.copytree(installed[0], tmp_path / "root", symlinks=True)
    return tmp_path / "root"


def tree(root: Path) -> dict[str, tuple[int, str, int]]:
    """Return the mode, content and inode of everything below the root."""
    entries = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = (
            os.readlink(path)
            if path.is_symlink()
            else path.read_bytes().hex()
            if path.is_file()
            else ""
        )
        entries[str(path.relative_to(root))] = (status.st_mode, content, status.st_ino)
    return entries


def assert_refused(done: subprocess.CompletedProcess[str], *told: str) -> None:
    """Fail unless it failed, and said this in one line and a hint."""
    assert done.returncode != 0, done.stdout
    lines = done.stderr.splitlines()
    assert lines[0].startswith("cannot "), done.stderr
    assert lines[1].startswith("hint: "), done.stderr
    for each in told:
        assert each in "\n".join(lines[:2])


@needs_python
class TestInstall:
    """`make install` with a DESTDIR, which is what a packager runs."""

    def test_everything_is_in_its_place(self, installed: tuple[Path, str]) -> None:
        """Program, venv, units, wrapper and settings are there, with their modes."""
        root, told = installed
        modes = {
            f"{HOME}/current/s3_backup_lnd_channels.py": 0o644,
            f"{HOME}/current/remount-if-replaced": 0o755,
            f"{HOME}/current/check-twice": 0o755,
            f"{UNITS}/lnd-backup-check@.service": 0o644,
            f"{UNITS}/lnd-backup-check@.timer": 0o644,
            f"{UNITS}/lnd-backup.service": 0o644,
            f"{UNITS}/lnd-backup@.service": 0o644,
            f"{UNITS}/lnd-backup.timer": 0o644,
            "usr/local/bin/lnd-backup": 0o755,
            SETTINGS: 0o600,
            "etc/default/lnd-backup-alert": 0o600,
        }
        assert {name: (root / name).stat().st_mode & 0o7777 for name in modes} == modes
        assert os.readlink(root / HOME / "current") in os.listdir(root / HOME)
        (start,) = re.findall(r"^ExecStart=(.+)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
        interpreter, *arguments = start.split()
        assert arguments == ["-I", "-m", SCRIPT.stem], (
            "the figures on memory are those of compiled byte code"
        )
        for started in (arguments, ["-I", str(root / HOME / "current" / SCRIPT.name)]):
            version = run_command(root / interpreter.removeprefix("/"), *started, "--version")
            assert version.returncode == 0, version.stderr
        for path in (UNIT, CHECKOUT / "systemd/lnd-backup.timer"):
            assert (root / UNITS / path.name).read_bytes() == path.read_bytes()
        assert "MONITOR_FILE_PATH=: is not set" in told
        assert "S3_BUCKET_NAME" not in told.partition("fill in the settings")[2]

    def test_settings_hold_what_was_given_and_no_example(self, installed: tuple[Path, str]) -> None:
        """What was given is set, what has no default is left empty, and nothing of the building
        machine is in it.
        """
        text = (installed[0] / SETTINGS).read_text(encoding="utf-8")
        assert re.findall(r"^(?!#|AWS)(.+)$", text, re.MULTILINE) == [
            "MONITOR_FILE_PATH=",
            "S3_BUCKET_NAME=my-bucket",
            "RESCAN_SECONDS=30",
        ]

    def test_byte_code_is_compiled_and_scripts_are_not_needed(
        self, installed: tuple[Path, str]
    ) -> None:
        """Every module has its byte code, whose names are those of the installed place; pip is
        gone.
        """
        current = installed[0] / HOME / "current"
        modules = [path for path in current.rglob("*.py") if "site-packages" in path.parts]
        assert modules
        for module in modules:
            (compiled,) = (module.parent / "__pycache__").glob(f"{module.stem}.*.pyc")
            assert f"/{HOME}/current/venv/lib".encode() in compiled.read_bytes()
        assert not [
            path for path in current.rglob("*") if path.name in {"pip", "setuptools", "activate"}
        ]

    def test_the_root_of_the_package_is_nowhere_in_it(self, built: Path) -> None:
        """No file names the directory in which the package was built."""
        place = (built / "place").read_bytes()
        files = [path for path in (built / "root").rglob("*") if path.is_file()]
        assert len(files) > 20
        assert [path for path in files if place in path.read_bytes()] == []

    def test_steps_are_printed(self, installed: tuple[Path, str]) -> None:
        """Each file that was put somewhere else than into /opt/lnd-backup was announced."""
        root, told = installed
        for path in (
            path for top in ("etc", "usr") for path in (root / top).rglob("*") if path.is_file()
        ):
            assert re.search(rf"^\+ install .* {re.escape(str(path))}$", told, re.MULTILINE), path

    def test_again_changes_nothing(self, released: Package, root: Path) -> None:
        """A second time with the same sources there is nothing to do, and edited settings stay."""
        with (root / SETTINGS).open("a", encoding="utf-8") as settings:
            settings.write("REFRESH_SECONDS=3600\n")
        before = tree(root)
        done = released.make("install", root, "S3_BUCKET_NAME=my-bucket")
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stdout.splitlines() if line.startswith("+")] == []
        after = tree(root)
        assert {**after, f"{HOME}/manifest": ()} == {**before, f"{HOME}/manifest": ()}
        assert after[f"{HOME}/manifest"][1] == before[f"{HOME}/manifest"][1]

    def test_an_upgrade_replaces_the_version_in_use(
        self, package: Package, root: Path, built: Path
    ) -> None:
        """A changed program is built beside the old one, linked in, and the old one removed."""
        old = os.readlink(root / HOME / "current")
        package.new_version()
        done = package.make("install", root, f"PYTHON={built}/python")
        assert done.returncode == 0, done.stderr
        new = os.readlink(root / HOME / "current")
        assert new != old
        assert sorted(os.listdir(root / HOME)) == sorted([new, "current", "manifest"])
        assert (
            (root / HOME / "current" / SCRIPT.name)
            .read_text(encoding="utf-8")
            .endswith("# newer\n")
        )

    def test_without_packages_the_version_in_use_stays(
        self, package: Package, root: Path, built: Path
    ) -> None:
        """An upgrade for which no package comes changes nothing at all."""
        package.new_version()
        shutil.rmtree(package.wheels)
        before = tree(root)
        done = package.make("install", root, f"PYTHON={built}/python")
        assert done.returncode != 0
        assert "cannot install: the packages could not be installed" in done.stderr
        assert "what was running still runs" in done.stderr
        assert tree(root) == before

    @pytest.mark.parametrize("pin", ["--hash=sha256:" + "0" * 64, ""])
    def test_packages_without_the_right_hash_are_refused(
        self, pin: str, package: Package, root: Path, built: Path
    ) -> None:
        """A package that differs from its pin, or has none, is not installed."""
        package.requirements.write_text(f"everything==1.0 {pin}\n", encoding="utf-8")
        before = tree(root)
        done = package.make("install", root, f"PYTHON={built}/python")
        assert done.returncode != 0
        assert "hashes" in done.stderr.lower()
        assert tree(root) == before

    def test_packages_to_be_built_are_refused(
        self, package: Package, root: Path, built: Path
    ) -> None:
        """A source package, whose build would run as root, is not even looked at."""
        source = package.wheels / "everything-1.0.zip"
        ran = package.wheels / "ran"
        with zipfile.ZipFile(source, "w") as archive:
            archive.writestr("everything-1.0/setup.py", f"open({str(ran)!r}, 'w')\n")
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        package.requirements.write_text(
            f"everything==1.0 --hash=sha256:{digest}\n", encoding="utf-8"
        )
        next(package.wheels.glob("*.whl")).unlink()
        assert package.make("install", root, f"PYTHON={built}/python").returncode != 0
        assert not ran.exists()

    @pytest.mark.parametrize(
        "line",
        [
            "export S3_BUCKET_NAME=b",
            "S3_BUCKET_NAME=b # the bucket",
            'S3_BUCKET_NAME="b',
            "S3_BUCKET_NAME=b\\",
        ],
    )
    def test_settings_that_systemd_reads_otherwise_are_refused(
        self, line: str, package: Package, root: Path
    ) -> None:
        """An environment file that the two readers read differently stops an upgrade, which names
        the line.
        """
        settings = root / SETTINGS
        number = len(settings.read_text(encoding="utf-8").splitlines()) + 1
        with settings.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        current = os.readlink(root / HOME / "current")
        done = package.make("install", root)
        assert_refused(done, f"line {number}", "nothing has changed")
        assert os.readlink(root / HOME / "current") == current


@needs_python
class TestRefusals:
    """What the installer does not do; nothing is changed then."""

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
        ],
    )
    def test_variables(self, given: str, told: str, released: Package, tmp_path: Path) -> None:
        """A secret, a name that is no setting and a value that cannot be are refused, and a secret
        is not repeated.
        """
        done = released.make("install", tmp_path, given)
        assert_refused(done, told)
        assert "abc" not in done.stdout + done.stderr
        assert "pass" not in (done.stdout + done.stderr).replace("password", "")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("value", ["s3://b", "b c", "b#c", 'b"c', "$$(id)", "`id`"])
    def test_values(self, value: str, released: Package, root: Path) -> None:
        """A value that the program would refuse is refused before there are settings."""
        unit = root / "etc/systemd/system/lnd-backup.service"
        for path in (root / SETTINGS, unit):
            path.unlink()
        assert_refused(released.make("install", root, f"S3_BUCKET_NAME={value}"), "S3_BUCKET_NAME")
        assert not (root / SETTINGS).exists()
        assert not unit.exists(), "nothing is put in place before that"

    def test_settings_are_never_changed(self, released: Package, root: Path) -> None:
        """A value that differs from that in the settings is refused."""
        before = tree(root)
        assert_refused(
            released.make("install", root, "S3_BUCKET_NAME=other"), "is never changed", "sudoedit"
        )
        assert tree(root) == before

    def test_secrets_in_the_environment_are_nobody_s_business(
        self, released: Package, root: Path
    ) -> None:
        """What merely is in the environment is neither taken nor refused."""
        env = {"AWS_SECRET_ACCESS_KEY": "abc", "S3_BUCKET_NAME": "other", "PIP_NO_INDEX": "1"}
        done = run_command(
            "make", "install", f"DESTDIR={root}", f"PYTHON={PYTHON}", env=env, cwd=released.checkout
        )
        assert done.returncode == 0, done.stderr
        assert "S3_BUCKET_NAME=my-bucket\n" in (root / SETTINGS).read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        "name",
        [
            "usr/local/bin/lnd-backup",
            f"{UNITS}/lnd-backup.service",
            HOME,
            f"{UNITS}/lnd-backup@.timer",
        ],
    )
    def test_files_of_others(self, name: str, released: Package, tmp_path: Path) -> None:
        """A file of that name which this did not make stays as it is."""
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("mine\n", encoding="utf-8")
        before = tree(tmp_path)
        assert_refused(
            released.make("install", tmp_path), f"/{name} exists", "systemctl edit lnd-backup"
        )
        assert tree(tmp_path) == before

    def test_files_that_somebody_changed(self, package: Package, root: Path) -> None:
        """An upgrade does not undo what an operator changed in a unit; the hint tells where that
        belongs.
        """
        unit = root / UNITS / "lnd-backup.service"
        unit.write_text(
            unit.read_text(encoding="utf-8").replace("Nice=5", "Nice=10"), encoding="utf-8"
        )
        before = tree(root)
        package.new_version()
        assert_refused(package.make("install", root), "lnd-backup.service exists", "drop-in")
        assert tree(root) == before

    @pytest.mark.parametrize(
        ("code", "told"),
        [
            ("sys.version_info = (3, 10, 1)", "is too old: 3.11 or newer is needed"),
            ("sys.modules['ensurepip'] = None", "has no venv module"),
            ("sys.executable = '/home/me/.pyenv/python3'", "is not in /usr"),
        ],
    )
    def test_pythons(self, code: str, told: str, released: Package, tmp_path: Path) -> None:
        """A Python that cannot be used is refused with what to install or to name."""
        python = tmp_path / "python"
        python.write_text(
            f'#!/bin/sh\n[ "$2" = -c ] || exec {PYTHON} "$@"\nexec {PYTHON} -I -c "import '
            f'sys; {code}; $3"\n',
            encoding="utf-8",
        )
        python.chmod(0o755)
        root = tmp_path / "root"
        root.mkdir()
        assert_refused(released.make("install", root, f"PYTHON={python}"), told)
        assert list(root.iterdir()) == []

    def test_no_python(self, released: Package, tmp_path: Path) -> None:
        """A Python that is not there is refused."""
        done = released.make("install", tmp_path, "PYTHON=/usr/bin/python9")
        assert_refused(done, "there is no /usr/bin/python9", "apt install python3 python3-venv")

    @pytest.mark.parametrize("verb", ["install", "uninstall", "purge"])
    def test_who_is_not_root(self, verb: str) -> None:
        """Without a DESTDIR only root may, and the command to type is named."""
        with tempfile.TemporaryDirectory(dir="/tmp") as name:
            Path(name).chmod(0o755)
            done = Package(Path(name)).make(
                verb, None, user=NOBODY if os.geteuid() == 0 else os.geteuid()
            )
        assert_refused(done, "only root can do this", f"sudo make {verb}")


@needs_python
class TestUninstall:
    """`make uninstall` and `make purge`."""

    def test_settings_and_staged_versions_stay(self, released: Package, root: Path) -> None:
        """Everything is removed but settings and what is staged; another installation takes them
        up.
        """
        staged = root / "var/lib/lnd-backup/20261120T215558.123456Z-a1b2c3"
        staged.parent.mkdir(parents=True)
        staged.write_bytes(b"x")
        done = released.make("uninstall", root)
        assert done.returncode == 0, done.stderr
        left = sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())
        assert left == ["etc/default/lnd-backup-alert", SETTINGS, str(staged.relative_to(root))]
        assert "kept: settings and staged versions: /etc/default/lnd-backup-env" in done.stdout

    @pytest.mark.parametrize("place", ["lnd-backup", "lnd-backup@alice", "elsewhere"])
    def test_purge_refuses_while_versions_wait(
        self, place: str, released: Package, root: Path
    ) -> None:
        """A version that was never sent, of whichever node and in whichever staging directory, is
        named, and nothing is changed.
        """
        version = root / "var/lib" / place / "20261120T215558.123456Z-a1b2c3"
        version.parent.mkdir(parents=True)
        version.write_bytes(b"x")
        other = "BACKUP_DIRECTORY=/var/lib/elsewhere\n"
        (root / "etc/default/lnd-backup@bob-env").write_text(other, encoding="utf-8")
        before = tree(root)
        done = released.make("purge", root)
        assert done.returncode != 0
        named, told, hint, _ = done.stderr.splitlines()
        assert named == str(version)
        assert told.endswith("never reached the bucket; nothing has changed")
        assert "sudo make purge FORCE=1" in hint
        assert tree(root) == before

    def test_purge_removes_everything_but_what_is_lnd_s(
        self, released: Package, root: Path
    ) -> None:
        """Settings, receipts and what the alerts remember are removed too; with FORCE=1 also what
        was never sent, which is named.
        """
        versions = []
        for name in ("lnd-backup", "lnd-backup@alice"):
            directory = root / "var/lib" / name
            directory.mkdir(parents=True)
            versions.append(directory / "20261120T215558.123456Z-a1b2c3")
            (directory / ".receipt").write_bytes(b"{}")
        versions[1].write_bytes(b"x")
        (root / "var/lib/lnd-backup-alert").mkdir()
        (root / "etc/default/lnd-backup@alice-env").write_text("", encoding="utf-8")
        scb = root / "var/lib/lnd-scb/channel.backup"
        scb.parent.mkdir()
        scb.write_bytes(b"x")
        assert released.make("purge", root, "FORCE=0").returncode != 0
        done = released.make("purge", root, "FORCE=1")
        assert done.returncode == 0, done.stderr
        assert [path for path in root.rglob("*") if not path.is_dir()] == [scb]
        assert f"deleting what never reached the bucket:\n{versions[1]}\n" in done.stdout
        assert not (root / "var/lib/lnd-backup-alert").exists()
        assert "kept, because it is LND's: " in done.stdout

    def test_one_node_alone_is_refused(self, released: Package, root: Path) -> None:
        """NODE= with uninstall or purge would remove more than it says; the lines for it are
        named.
        """
        before = tree(root)
        assert_refused(released.make("purge", root, "NODE=alice"), "disable --now lnd-backup@alice")
        assert tree(root) == before

    def test_files_that_somebody_changed_stay(self, released: Package, root: Path) -> None:
        """A file that an operator changed is kept, and named."""
        unit = root / UNITS / "lnd-backup.timer"
        unit.write_text("mine\n", encoding="utf-8")
        done = released.make("uninstall", root)
        assert done.returncode == 0, done.stderr
        assert unit.read_text(encoding="utf-8") == "mine\n"
        assert f"kept, because somebody changed it: /{UNITS}/lnd-backup.timer" in done.stdout

    def test_twice_is_once(self, released: Package, root: Path) -> None:
        """Nothing to uninstall is no failure."""
        assert released.make("uninstall", root).returncode == 0
        assert released.make("uninstall", root).returncode == 0


@needs_python
def test_another_node_has_settings_of_its_own(released: Package, root: Path) -> None:
    """NODE= makes settings of that name beside the others, which stay as they are; an upgrade holds
    all of them against what systemd would read.
    """
    before = (root / SETTINGS).read_bytes()
    done = released.make("install", root, "NODE=alice", "LND_USER=alice", "S3_BUCKET_NAME=hers")
    assert done.returncode == 0, done.stderr
    settings = root / "etc/default/lnd-backup@alice-env"
    assert settings.stat().st_mode & 0o777 == 0o600
    text = settings.read_text(encoding="utf-8")
    assert "S3_BUCKET_NAME=hers\n" in text
    assert "MONITOR_FILE_PATH=/var/lib/lnd-scb@alice/channel.backup\n" in text
    assert (root / SETTINGS).read_bytes() == before
    made = (root / "etc/tmpfiles.d/lnd-backup@alice.conf").read_text(encoding="utf-8")
    assert re.findall(r"^(?:d|a) (\S+)", made, re.MULTILINE) == ["/var/lib/lnd-scb@alice"] * 2
    assert " alice lnd-backup " in made
    again = released.make("install", root)
    assert again.returncode == 0, again.stderr
    settings.write_text("export S3_BUCKET_NAME=hers\n", encoding="utf-8")
    assert_refused(released.make("install", root), "lnd-backup@alice-env", "nothing has changed")
    settings.write_text(text, encoding="utf-8")
    assert released.make("uninstall", root).returncode == 0
    assert list((root / "etc/tmpfiles.d").iterdir()) == []
    assert settings.exists()


@needs_python
class TestCopyDirectory:
    """`make install COPY_DIRECTORY=`, for the second place."""

    @pytest.fixture
    def place(self) -> Iterator[str]:
        """Return a directory that the service could see."""
        with tempfile.TemporaryDirectory(dir="/var/lib", prefix="lnd-backup-tests-") as name:
            yield name

    def test_it_is_set_and_opened(self, place: str, released: Package, root: Path) -> None:
        """The setting is added to settings that are there, of which nothing else changes, and a
        drop-in opens the directory; a later upgrade keeps both, and an uninstall removes the
        drop-in.
        """
        before = (root / SETTINGS).read_text(encoding="utf-8")
        done = released.make("install", root, f"COPY_DIRECTORY={place}")
        assert done.returncode == 0, done.stderr
        text = (root / SETTINGS).read_text(encoding="utf-8")
        assert text == before.replace("#COPY_DIRECTORY=\n", f"COPY_DIRECTORY={place}\n")
        assert (root / SETTINGS).stat().st_mode & 0o777 == 0o600
        drop_in = root / UNITS / "lnd-backup.service.d/copy-directory.conf"
        assert section(drop_in, "Service") == {"ReadWritePaths": f"-{place}"}
        for given in ([], [f"COPY_DIRECTORY={place}"]):
            again = released.make("install", root, *given)
            assert again.returncode == 0, again.stderr
            assert [line for line in again.stdout.splitlines() if line.startswith("+")] == []
        assert drop_in.exists()
        assert released.make("uninstall", root).returncode == 0
        assert not drop_in.exists()

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")
    def test_of_a_stick_the_mount_point_is_opened(self, released: Package, root: Path) -> None:
        """The drop-in names the mount point: named itself, the directory would be a mount of the
        service's own. On a disk that also holds LND's file, or is the system's, it is named itself.
        """
        for watched, mount_point, opened in (
            ("/var/lib/lnd-scb", "/mnt", "/mnt"),
            ("/mnt/lnd", "/mnt", "/mnt/copies"),
            ("/var/lib/lnd-scb", "/srv", "/srv/copies"),
        ):
            text = (root / SETTINGS).read_text(encoding="utf-8")
            text = re.sub("(?m)^#?COPY_DIRECTORY=.*$", "#COPY_DIRECTORY=", text)
            text = re.sub("(?m)^MONITOR_FILE_PATH=.*$", f"MONITOR_FILE_PATH={watched}/x", text)
            (root / SETTINGS).write_text(text, encoding="utf-8")
            done = run_command(
                "unshare", "--mount", "sh", "-euc",
                'mount -t tmpfs none "$1"; mkdir "$1/copies"; '
                'make install DESTDIR="$2" PYTHON="$3" COPY_DIRECTORY="$1/copies"',
                "sh", mount_point, root, PYTHON,
                cwd=released.checkout,
                env={"PIP_NO_INDEX": "1"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            drop_in = root / UNITS / "lnd-backup.service.d/copy-directory.conf"
            assert section(drop_in, "Service") == {"ReadWritePaths": f"-{opened}"}

    def test_another_value_is_not_overwritten(
        self, place: str, released: Package, root: Path
    ) -> None:
        """A directory that is set already stays, and nothing is changed."""
        with (root / SETTINGS).open("a", encoding="utf-8") as settings:
            settings.write("COPY_DIRECTORY=/mnt/other\n")
        before = tree(root)
        assert_refused(
            released.make("install", root, f"COPY_DIRECTORY={place}"),
            "is never changed",
            f"sudoedit /{SETTINGS}, and run this again",
        )
        assert tree(root) == before

    def test_another_name_of_it_is_refused(self, place: str, released: Package, root: Path) -> None:
        """A link could lead elsewhere tomorrow; the real name is told."""
        os.mkdir(f"{place}/real")
        os.symlink("real", f"{place}/link")
        assert_refused(
            released.make("install", root, f"COPY_DIRECTORY={place}/link"),
            f"make install COPY_DIRECTORY={place}/real",
        )


@needs_python
@pytest.mark.skipif(not shutil.which("setfacl"), reason="needs setfacl (Debian: acl)")
@pytest.mark.parametrize("given", ["LND_USER=root", "LND_DIRECTORY={}"])
def test_lnd_and_the_service_mean_the_same_file(
    given: str, released: Package, root: Path, tmp_path: Path
) -> None:
    """Settings that name another file than LND would write are refused, and the line to write is
    told; with that line it goes on.
    """
    directory, settings = tmp_path / "mainnet", root / SETTINGS
    directory.mkdir()
    name, _, place = given.format(directory).partition("=")
    expected = f"MONITOR_FILE_PATH={'/var/lib/lnd-scb' if place == 'root' else place}"
    text = settings.read_text(encoding="utf-8")
    for other in ("/home/bitcoin/mainnet", f"{tmp_path}"):
        settings.write_text(
            text.replace("MONITOR_FILE_PATH=", f"MONITOR_FILE_PATH={other}/channel.backup", 1),
            encoding="utf-8",
        )
        before = tree(root)
        refused = released.make("install", root, f"{name}={place}")
        told = (f"MONITOR_FILE_PATH={other}/channel.backup", f"{expected}/channel.backup", name)
        assert_refused(refused, *told)
        assert tree(root) == before
    settings.write_text(
        text.replace("MONITOR_FILE_PATH=", f"{expected}/channel.backup", 1), encoding="utf-8"
    )
    done = released.make("install", root, f"{name}={place}")
    assert done.returncode == 0, done.stderr


def test_the_directory_of_lnd_is_opened_alone(released: Package, root: Path) -> None:
    """LND_DIRECTORY= gives a drop-in that shows this directory, hides what is closed around it, and
    sets the path.
    """
    (root / SETTINGS).unlink()
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        closed, link = Path(name, "hdd/lnd"), Path(name, "link")
        directory = closed / "data/chain/bitcoin/mainnet"
        directory.mkdir(parents=True)
        closed.chmod(0o700)
        link.symlink_to(directory)
        done = released.make("install", root, f"LND_DIRECTORY={link}", "S3_BUCKET_NAME=my-bucket")
        assert done.returncode == 0, done.stderr
        drop_in = section(root / UNITS / "lnd-backup.service.d/lnd-directory.conf", "Service")
        assert drop_in == {
            "TemporaryFileSystem": f"{closed}:ro",
            "BindReadOnlyPaths": f"-{directory}",
        }
        assert f"MONITOR_FILE_PATH={directory}/channel.backup\n" in (root / SETTINGS).read_text(
            encoding="utf-8"
        )
        assert "fill in the settings" not in done.stdout
        check = root / UNITS / "lnd-backup-check@lnd-backup.service.d/lnd-directory.conf"
        assert section(check, "Service") == drop_in
        assert "Wants=" not in check.read_text(encoding="utf-8")
        check.unlink()  # as an earlier version left it
        check.parent.rmdir()
        assert released.make("install", root).returncode == 0
        assert section(check, "Service") == drop_in
        assert released.make("uninstall", root).returncode == 0
        assert not (root / UNITS / "lnd-backup.service.d").exists()
        assert not check.parent.exists()


def test_a_line_that_is_misread_is_named_by_the_program(tmp_path: Path) -> None:
    """The installer leaves the judgement of an environment file to the program: exit 78, and the
    line's number.
    """
    path = tmp_path / "env"
    path.write_text("S3_BUCKET_NAME=b\nexport AWS_REGION=x\n", encoding="utf-8")
    done = run_script({"RESCAN_SECONDS": "0"}, "--env-file", str(path), "check")
    assert done.returncode == 78
    assert re.search(rf"cannot read --env-file: {path}: line 2$", done.stderr, re.MULTILINE)


# --- the shell programs are read before they run as root ---

INSTALLER = CHECKOUT / "systemd/install.sh"
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


def head_of(program: Path) -> dict[str, str]:
    """Return what a program says of itself in its first comment, by the word that begins it."""
    lines = itertools.takewhile(
        lambda line: line.startswith("#"), program.read_text(encoding="utf-8").splitlines()
    )
    parts = re.split(r"^# ([a-z]+) {2,}(?=\S)", "\n".join(lines), flags=re.MULTILINE)
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
    return any(
        fnmatch.fnmatchcase(str(place), name)
        for name in names
        for place in (Path(path), *Path(path).parents)
    )


def test_the_head_of_the_installer_names_every_path() -> None:
    """The head says what the installer reads, writes, removes, connects to and never does; each
    path in its code is named there, and each path that is named there is in its code.
    """
    head = head_of(INSTALLER)
    assert {"reads", "writes", "removes", "connects", "never", "order", "begin"} <= set(head)
    named = {path for part in head.values() for path in PATHS.findall(part)}
    used = paths_used_by_the_installer() - OF_THE_SYSTEM
    assert len(used) > 20
    assert [path for path in used if not is_named(path, named)] == []
    assert [name for name in named if not any(is_named(path, [name]) for path in used)] == []


@needs_python
def test_an_installation_writes_what_the_head_names(released: Package, root: Path) -> None:
    """Each file of a service and of another node is below a path that the head says is written."""
    done = released.make("install", root, "NODE=alice", "LND_USER=alice")
    assert done.returncode == 0, done.stderr
    written = PATHS.findall(head_of(INSTALLER)["writes"])
    left = [f"/{path.relative_to(root)}" for path in root.rglob("*") if not path.is_dir()]
    assert "/etc/tmpfiles.d/lnd-backup@alice.conf" in left
    assert [path for path in left if not is_named(path, written)] == []
