"""DVC's part of the place in S3 that `deployment.storage` names: a remote of this folder, whatever git's copy says."""

import os
from pathlib import Path

from dod_pipeline import dvc_transfer
from dod_pipeline.config import ENDPOINT
from dod_pipeline.deployment import Storage
from dod_pipeline.dvc_transfer import Remote

NAME = "storage"


def of(storage: Storage) -> Remote | None:
    """The remote, if there is such a place."""
    if storage.url is None:
        return None
    asked = storage.endpoint and os.environ.get(ENDPOINT, storage.endpoint)  # as boto3 is told
    return Remote(NAME, f"{storage.url}/dvc", (("endpointurl", asked),) if asked else ())


def use(storage: Storage, root: Path = Path()) -> None:
    """Make DVC push to it and pull from it, also when somebody calls dvc by hand."""
    found = of(storage)
    if found is not None:
        dvc_transfer.use(found, root=root)
