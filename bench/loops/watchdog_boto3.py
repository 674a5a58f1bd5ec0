"""A peer: watchdog tells of the rename, boto3 puts the file. Arguments: directory, bucket,
prefix.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import boto3
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

directory, bucket, prefix = sys.argv[1:]
client = boto3.client("s3")


class Upload(FileSystemEventHandler):  # type: ignore[misc] # it has no types here
    """Uploads what LND renames into place."""

    def on_moved(self, event: FileSystemEvent) -> None:
        path = Path(str(event.dest_path))
        if path.name != "channel.backup":
            return
        try:
            client.put_object(
                Bucket=bucket, Key=f"{prefix}{time.time_ns()}.backup", Body=path.read_bytes()
            )
            print("uploaded", flush=True)
        except Exception as error:  # noqa: BLE001 - most such scripts log it, and go on with the next event
            print(f"failed: {error}", flush=True)


observer = Observer()
observer.schedule(Upload(), directory)
observer.start()
print("watching", flush=True)
observer.join()
