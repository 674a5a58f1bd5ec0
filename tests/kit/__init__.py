"""The test kit: an LND, an S3 server, a line between them that fails on demand, and the invariant
they are held to.
"""

from .answers import Answer
from .fault_proxy import FaultProxy, Mode
from .installed import Installed, install
from .invariant import VERSION_NAME, Allowed, Holder, assert_nothing_lost, find_problems
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
