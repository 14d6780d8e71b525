"""Fixtures of the unit tests. dod_models is imported inside them: jaxtyping's import hook must come first."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def once(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A folder that all workers of pytest-xdist share, for one of them at a time."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield base / name


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> "Pipeline":
    """Every stage run once at tiny size, for all workers of pytest-xdist together; read it, never write into it."""
    from . import tiny

    with once(tmp_path_factory, "tiny-pipeline") as root:
        return tiny.pipeline(root)


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `hf download stabilityai/sd-vae-ft-ema` makes it, the weights random; read only."""
    from .full_size import write_vae

    with once(tmp_path_factory, "sd-vae") as folder:
        return write_vae(folder)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like torch-fidelity's of Inception's weights, the weights random; read only."""
    from .full_size import write_inception

    with once(tmp_path_factory, "inception") as folder:
        return write_inception(folder)
