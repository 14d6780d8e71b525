"""A real S3 server for tests: SeaweedFS, which checks signatures and keeps uploads in parts."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from dod_pipeline.lifeline import held

WEED = Path(sys.executable).parent / "weed"
BUCKET, KEY, SECRET = "data", "the-key", "the-secret"
READER, READER_SECRET = "the-reader", "the-reader-secret"  # may list and read
ROLES = ("master", "volume", "filer", "s3")
PARTS = TransferConfig(multipart_threshold=5 * 2**20, multipart_chunksize=5 * 2**20)  # the smallest that S3 allows


class S3(NamedTuple):
    """A running server with an empty bucket."""

    endpoint: str
    settings: Path  # an empty file: DVC takes no /dev/null for AWS's

    def environment(self, key: str = KEY, secret: str = SECRET) -> dict[str, str]:
        """What boto3 reads; nothing of the user's own settings."""
        mine = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_DEFAULT_REGION": "us-east-1"}
        none = {"AWS_CONFIG_FILE": str(self.settings), "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
        return {**mine, **none, "AWS_ENDPOINT_URL_S3": self.endpoint, "AWS_EC2_METADATA_DISABLED": "true"}

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            config=Config(connect_timeout=1, retries={"max_attempts": 1}),
        )

    def upload(self, folder: Path, prefix: str) -> str:
        """Everything in a folder; the prefix's URL."""
        client = self.client()
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder).as_posix()}", Config=PARTS)
        return f"s3://{BUCKET}/{prefix}"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextmanager
def serve(folder: Path, *, address: str = "127.0.0.1") -> Iterator[S3]:
    """A server on ports of its own that keeps its data in the folder, or finds it there; it dies with this process."""
    access = [
        {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
        for name, key, secret, actions in (
            ("tests", KEY, SECRET, ["Admin"]),
            ("reader", READER, READER_SECRET, ["Read", "List"]),
        )
    ]
    (folder / "access.json").write_text(json.dumps({"identities": access}))
    settings = folder / "aws"
    settings.touch()
    ports = free_ports(2 * len(ROLES))
    named = [f"-{role}.port{kind}={ports.pop()}" for role in ROLES for kind in ("", ".grpc")]
    words = [f"-dir={folder}", f"-ip={address}", f"-ip.bind={address}", "-master.telemetry=false", "-filer", "-s3"]
    words += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder / 'access.json'}", *named]
    endpoint = f"http://{address}:{named[-2].partition('=')[2]}"
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(held([str(WEED), "server", *words]), stdout=log, stderr=log)
    try:
        server, end = S3(endpoint, settings), time.monotonic() + 60
        while True:
            try:
                server.client().create_bucket(Bucket=BUCKET)
                break
            except (BotoCoreError, ClientError) as error:
                if "BucketAlready" in str(error):
                    break
                assert time.monotonic() < end and process.poll() is None, (folder / "log.txt").read_text()[-3000:]
                time.sleep(0.2)
        yield server
    finally:
        process.kill()
        process.wait()
