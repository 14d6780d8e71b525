"""Fixtures of the unit tests. dod_models is imported inside them: jaxtyping's import hook must come first."""

import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from .tiny import Pipeline


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tests run side by side, and tiny matrices gain nothing from threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> "Pipeline":
    """Every stage run once at tiny size, for all workers of pytest-xdist together; read it, never write into it."""
    from . import tiny

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    root: Path = base / "tiny-pipeline"
    with (base / "tiny-pipeline.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return tiny.pipeline(root)
