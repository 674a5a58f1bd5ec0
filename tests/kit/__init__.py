"""The test kit: an LND, an S3 server, a line between them that fails on demand, and the invariant
they are held to.
"""

from .answers import Answer
from .fault_proxy import Counts, FaultProxy, Mode
from .installed import Installed, install
from .invariant import (
    VERSION_NAME,
    Allowed,
    Holder,
    Problems,
    assert_nothing_lost,
    find_problems,
    normalised_prefix,
)
from .lnd import Lnd, Written, channel_backup, version_name
from .nobody import NOBODY, as_nobody
from .output import NotifySocket
from .s3_server import (
    CHECKOUT,
    PATIENCE_SECONDS,
    Credentials,
    S3Server,
    StoredObject,
    allow,
    foreign_settings,
    make_client,
)
from .script import (
    SCRIPT,
    Daemon,
    Script,
    hurried,
    run_on_terminal,
    run_script,
    script_environment,
    unlistable_while,
    write_launcher,
)
from .scripted_s3 import FakeS3, RawS3, Request
from .settings import MADE_UP, reader_settings, settings_at, settings_for

__all__ = [
    "CHECKOUT",
    "MADE_UP",
    "NOBODY",
    "PATIENCE_SECONDS",
    "SCRIPT",
    "VERSION_NAME",
    "Allowed",
    "Answer",
    "Counts",
    "Credentials",
    "Daemon",
    "FakeS3",
    "FaultProxy",
    "Holder",
    "Installed",
    "Lnd",
    "Mode",
    "NotifySocket",
    "Problems",
    "RawS3",
    "Request",
    "S3Server",
    "Script",
    "StoredObject",
    "Written",
    "allow",
    "as_nobody",
    "assert_nothing_lost",
    "channel_backup",
    "find_problems",
    "foreign_settings",
    "hurried",
    "install",
    "make_client",
    "normalised_prefix",
    "reader_settings",
    "run_on_terminal",
    "run_script",
    "script_environment",
    "settings_at",
    "settings_for",
    "unlistable_while",
    "version_name",
    "write_launcher",
]
