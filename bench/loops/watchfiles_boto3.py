"""A peer: watchfiles tells of the change, boto3 puts the file. Arguments: directory, bucket,
prefix.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import boto3
from watchfiles import watch

directory, bucket, prefix = sys.argv[1:]
client = boto3.client("s3")
# Just before it does: the watch is armed by the first turn of the loop.
print("watching", flush=True)

for changes in watch(directory):
    for path in {path for _, path in changes if Path(path).name == "channel.backup"}:
        try:
            data = Path(path).read_bytes()
            client.put_object(Bucket=bucket, Key=f"{prefix}{time.time_ns()}.backup", Body=data)
            print("uploaded", flush=True)
        except Exception as error:  # noqa: BLE001 - most such scripts log it, and go on with the next event
            print(f"failed: {error}", flush=True)
