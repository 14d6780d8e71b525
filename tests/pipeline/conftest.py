"""Fixtures of the pipeline's tests: the tiny project, built once for all workers of pytest-xdist together."""

import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dod_pipeline import cluster
from dod_pipeline.deployment import Deployment

from . import project as tiny
from .bucket import BUCKET, S3, serve
from .one_node import Here
from .processes import end_all
from .project import Project


@pytest.fixture(scope="session", autouse=True)
def heed_interrupts():
    """A shell's background job ignores SIGINT, and all that it starts does: not what tests of Ctrl-C want."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """As in the subprocesses: sums depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers share."""
    found: Path = tmp_path_factory.getbasetemp()
    return found.parent if "PYTEST_XDIST_WORKER" in os.environ else found


@pytest.fixture(scope="session")
def images(base: Path) -> Path:
    """The tiny project's images; read only."""
    with (base / "images.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return base / "images" if (base / "images").exists() else tiny.write_images(base / "images")


@pytest.fixture(scope="session")
def built(base: Path, images: Path) -> Project:
    """The tiny project after `dod run tiny` twice, a commit and a push; only to be copied."""
    root, log = base / "built" / "project", base / "built" / "log.txt"
    root.parent.mkdir(exist_ok=True)
    with (base / "built.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            project = tiny.create(root, tiny.params(images))
            printed = project.dod("run", "tiny").stdout
            project.dod("run", "tiny")
            project.commit("results")
            project.dvc("push")
            log.write_text(printed)
    return Project(root)


@pytest.fixture(scope="module")
def shared(built: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the built project for the tests of one file that leave it as it is."""
    return built.copy(tmp_path_factory.mktemp("shared") / "project")


@pytest.fixture
def own(built: Project, tmp_path: Path) -> Project:
    """A copy of the built project for one test."""
    return built.copy(tmp_path / "project")


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Callable[[Project], None]:
    """Make a project the current folder, for commands that run in this process."""

    def enter(project: Project) -> None:
        monkeypatch.chdir(project.root)
        monkeypatch.setenv("PATH", tiny.environment()["PATH"])
        monkeypatch.setenv("DAGSTER_HOME", str(project.root / "dagster_home"))

    return enter


@pytest.fixture
def home(own: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Dagster's folder of the copied project, for this process too; no command outlives the test."""
    found = own.root / "dagster_home"
    monkeypatch.setenv("DAGSTER_HOME", str(found))
    yield found
    end_all()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A real S3 server of this worker's own."""
    with serve(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server, as boto3's usual chain finds it."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def deployment(
    own: Project,
    images: Path,
    inside: Callable[[Project], None],
    s3: S3,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Deployment:
    """The built project's folder, and a deployment whose cluster is this process."""
    inside(own)
    monkeypatch.setenv("DOD_CACHE", str(tmp_path / "node"))
    monkeypatch.setattr(cluster, "Submission", Here)
    Here.made = []
    values = {
        "compute": "ray",
        "ray": {"gpus": 0, "shared": [str(images)]},
        "storage": {"url": f"s3://{BUCKET}/{tmp_path.name}"},
    }
    return Deployment.model_validate(values)
