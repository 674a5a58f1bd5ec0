"""The test kit: an LND, an S3 server, a line between them that fails on demand, and the invariant
they are held to.
"""

from .answers import Answer as Answer
from .fault_proxy import FaultProxy as FaultProxy
from .fault_proxy import Mode as Mode
from .installed import Installed as Installed
from .installed import install as install
from .invariant import VERSION_NAME as VERSION_NAME
from .invariant import Allowed as Allowed
from .invariant import Holder as Holder
from .invariant import assert_nothing_lost as assert_nothing_lost
from .invariant import find_problems as find_problems
from .lnd import Lnd as Lnd
from .lnd import Written as Written
from .lnd import channel_backup as channel_backup
from .lnd import version_name as version_name
from .nobody import NOBODY as NOBODY
from .nobody import as_nobody as as_nobody
from .output import NotifySocket as NotifySocket
from .s3_server import CHECKOUT as CHECKOUT
from .s3_server import PATIENCE_SECONDS as PATIENCE_SECONDS
from .s3_server import Credentials as Credentials
from .s3_server import S3Server as S3Server
from .s3_server import StoredObject as StoredObject
from .s3_server import allow as allow
from .s3_server import foreign_settings as foreign_settings
from .s3_server import make_client as make_client
from .script import SCRIPT as SCRIPT
from .script import Daemon as Daemon
from .script import Script as Script
from .script import hurried as hurried
from .script import run_on_terminal as run_on_terminal
from .script import run_script as run_script
from .script import script_environment as script_environment
from .script import unlistable_while as unlistable_while
from .script import write_launcher as write_launcher
from .scripted_s3 import FakeS3 as FakeS3
from .scripted_s3 import RawS3 as RawS3
from .scripted_s3 import Request as Request
from .settings import MADE_UP as MADE_UP
from .settings import reader_settings as reader_settings
from .settings import settings_at as settings_at
from .settings import settings_for as settings_for
