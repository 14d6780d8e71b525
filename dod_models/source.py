"""What work in progress is kept under: what it is made from, the code and torch's version among that."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

from dod_models import artifact


def key(config: str, inputs: Iterable[Path]) -> str:
    """Name of work with this configuration on these finished folders; another edit of the package has another."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    digests = [artifact.sha256_file(path) for path in (*files, *(folder / artifact.MANIFEST for folder in inputs))]
    return hashlib.sha256("/".join([config, torch.__version__, *digests]).encode()).hexdigest()[:32]
