"""The program as the service runs it: a module of which Python has compiled the byte code, with the
unit's settings.
"""

from __future__ import annotations

import py_compile
import re
import sys
from typing import TYPE_CHECKING, NamedTuple

from .s3_server import CHECKOUT
from .script import SCRIPT

if TYPE_CHECKING:
    from pathlib import Path

UNIT = CHECKOUT / "lnd-backup.service"


class Installed(NamedTuple):
    """How to start it, and the environment that this needs beside the settings."""

    command: list[str]
    environment: dict[str, str]


def install(directory: Path) -> Installed:
    """Install the program in a directory, as systemd/install.sh does it in the venv's own."""
    directory.mkdir(parents=True, exist_ok=True)
    module = directory / SCRIPT.name
    if not module.is_symlink():
        module.symlink_to(SCRIPT)
    py_compile.compile(str(module), doraise=True)
    memory = dict(re.findall(r"^Environment=(MALLOC_\w+)=(\S+)$", UNIT.read_text(), re.MULTILINE))
    assert memory, "the unit no longer says how memory is given back"
    return Installed([sys.executable, "-m", SCRIPT.stem], memory | {"PYTHONPATH": str(directory)})
