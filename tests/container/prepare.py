"""Makes the image for `make test-container`: on a minimal Debian, with wheels that are at hand."""

from __future__ import annotations

import os
import subprocess
import sys

from kit import CHECKOUT
from stores.servers import install_missing

CACHE = CHECKOUT / ".cache" / "container"
BASE, IMAGE = "localhost/lnd-backup-base", "localhost/lnd-backup"

# What is needed, by the Debian package that brings it.
NEEDED = {"podman": "podman", "crun": "crun", "mmdebstrap": "mmdebstrap"}
# Podman's own store below the checkout. No daemon, no systemd, and no control groups of its own.
PODMAN = [
    "podman",
    f"--root={CACHE / 'store'}",
    f"--runroot={CACHE / 'run'}",
    f"--storage-driver={os.environ.get('STORAGE_DRIVER', 'overlay')}",
    "--cgroup-manager=cgroupfs",
    "--events-backend=none",
]


def install() -> None:
    if os.geteuid() != 0:
        sys.exit("cannot build and run containers: only root can: sudo make test-container")
    if missing := install_missing(NEEDED):
        sys.exit(f"cannot build and run containers: missing: apt install {missing}")


def build(suite: str) -> None:
    """Make the base, unless it is there, and the image."""
    CACHE.mkdir(parents=True, exist_ok=True)
    base, partial = CACHE / f"{suite}.tar", CACHE / f"{suite}-partial.tar"
    if not base.exists():
        print(f"making a minimal Debian {suite}", flush=True)
        run("mmdebstrap", "--quiet", "--variant=minbase", suite, str(partial))
        partial.rename(base)
    print(f"building {IMAGE} from it", flush=True)
    run(*PODMAN, "import", "--quiet", str(base), BASE)
    run(
        *PODMAN,
        *("build", "--quiet", "--isolation=chroot", "--format=docker", f"--build-arg=BASE={BASE}"),
        *(*wheels_at_hand(), f"--tag={IMAGE}"),
        *(f"--file={CHECKOUT / 'container' / 'Containerfile'}", str(CHECKOUT)),
    )
    run(*PODMAN, "image", "prune", "--force")


def wheels_at_hand() -> list[str]:
    """Fetch the wheels with this machine's pip, and return the options that let the build use these
    alone: what this machine needs to reach an index is nothing for the image.
    """
    wheels, settings = CACHE / "wheels", CACHE / "pip.conf"
    run(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--only-binary", ":all:", "--require-hashes", "--dest", str(wheels)),
        *("-r", str(CHECKOUT / "requirements.txt")),
    )
    settings.write_text("[global]\nno-index = true\nfind-links = /wheels\n", encoding="utf-8")
    return [f"--volume={wheels}:/wheels:ro", f"--volume={settings}:/etc/pip.conf:ro"]


def run(*command: str) -> None:
    """Run a command that must succeed, and that says on stderr why it does not."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tools"]:
            install()
        case ["image", suite]:
            build(suite)
