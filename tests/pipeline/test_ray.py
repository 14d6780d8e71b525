"""A project whose stages run on a real Ray cluster of two nodes, which have addresses of their own and may be lost.

Nodes reach the bucket and each other by those addresses alone. The local results are those of the fixture `built`.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .bucket import S3, serve
from .network import HUB, lacks, network
from .processes import Command, alive, end_all
from .project import BIN, Project
from .ray_nodes import Cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(lacks() is not None, reason=str(lacks())),
    pytest.mark.skipif(not (BIN / "ray").exists(), reason="ray is not installed: `make ray`"),
]

STORAGE = "s3://data/team"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes beside a head, and an S3 server at the hub, which this process and its commands have entered."""
    with network() as net, serve(tmp_path_factory.mktemp("s3"), address=HUB) as s3:
        variables = s3.environment()
        found = Cluster(net, tmp_path_factory.mktemp("nodes"), variables)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**variables, **found.environment}.items():
                patch.setenv(name, value)
            found.s3 = s3
            for _ in range(2):
                found.add_node()
            yield found
    end_all()


@pytest.fixture
def bucket(cluster: Cluster) -> S3:
    return cluster.s3


@pytest.fixture
def project(cluster: Cluster, built: Project, tmp_path: Path) -> Project:
    """The tiny project, nothing of it made, whose deployment is the cluster, with a prefix of its own."""
    return deployed(cluster, built.clone(tmp_path / "project"), tmp_path.name)


def deployed(cluster: Cluster, project: Project, prefix: str, **changes: Any) -> Project:
    """Have the project use the cluster."""
    params = project.params()
    ray = {"address": cluster.address, "gpus": 0, "cpus": 1, "training_workers": 1, "losses": 3}
    storage = {"url": f"{STORAGE}/{prefix}", "push": "never"}
    params["deployment"] = {"compute": "ray", "ray": ray | changes, "storage": storage}
    project.write_params(params)
    (project.root / "dvc.lock").unlink(missing_ok=True)
    project.commit("on a cluster")
    return project


def train_longer(project: Project, steps: int) -> None:
    """Enough steps for a node to be lost on the way."""
    params = project.params()
    params["experiments"]["tiny"]["train"] |= {"steps": steps, "save_every": steps, "state_every": 10}
    params["checkpoints"] = {"tiny-6": {"experiment": "tiny", "data": "tiny", "step": steps}}
    params["sweeps"] = {}
    project.write_params(params)
    project.commit("longer")


def md5s(project: Project, but: tuple[str, ...] = ("report",)) -> dict[str, str]:
    """Of the outputs that two equal runs have alike."""
    return {path: md5 for path, md5 in project.outs().items() if not path.startswith(but)}


def test_every_stage_on_the_cluster_gives_what_it_gives_here(project: Project, built: Project):
    printed = project.dod("run", "tiny").stdout
    assert md5s(project) == md5s(built)
    for stage in ("reference", "codec", "latents", "train", "stage1", "stage2", "metrics", "sweeps"):
        assert f"job dod-{stage}-tiny" in printed
    assert "Nothing to do" in project.dod("run", "tiny").stdout
