"""A project whose stages run on a real Ray cluster of two nodes, which have addresses of their own and may be lost.

Nodes reach the bucket and each other by those addresses alone, and demand a token. The results to compare with are
computed here, by a clone.
"""

import json
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import project as tiny
from .bucket import BUCKET, serve
from .network import HUB, lacks, network
from .processes import Command, assert_all_end, end_all, wait_for
from .project import BIN, Project
from .ray_nodes import Cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(lacks() is not None, reason=str(lacks())),
    pytest.mark.skipif(not (BIN / "ray").exists(), reason="ray is not installed: `make ray`"),
]

WORKER = "RayTrainWorker"  # in the name of the process that trains
SENT = ("reference", "codec", "latents", "train", "stage1", "stage2", "metrics", "sweeps")


@pytest.fixture(scope="module")
def cluster(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes beside a head, and an S3 server at the hub, which this process and its commands have entered."""
    with (
        network() as net,
        serve(tmp_path_factory.mktemp("s3"), address=HUB) as s3,
        pytest.MonkeyPatch.context() as patch,
    ):
        found = Cluster(net, tmp_path_factory.mktemp("nodes"), s3)
        for name, value in {**s3.environment(), **found.environment}.items():
            patch.setenv(name, value)
        s3.upload(images, "images")
        found.add_node()
        found.add_node()
        yield found
        end_all()
        found.end()


@pytest.fixture(scope="module")
def ready(cluster: Cluster, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The tiny project, made on this machine up to its training; its images lie in the bucket. Only to be copied."""
    values = tiny.params(images)
    values["datasets"]["tiny"]["dataset"]["root"] = f"s3://{BUCKET}/images"
    found = tiny.create(tmp_path_factory.mktemp("ready") / "project", values)
    found.dod("run", "tiny", "--until", "train")
    found.commit("results")
    return found


@pytest.fixture
def project(ready: Project, tmp_path: Path) -> Project:
    """A copy of it for one test."""
    return ready.copy(tmp_path / "project")


def deploy(project: Project, cluster: Cluster, **changes: Any) -> None:
    """Have the project compute on the cluster from now on, with a prefix of its own in the bucket."""
    values = project.params()
    ray = {"address": cluster.address, "gpus": 0, "cpus": 1, "interface": "eth0", "losses": 3}
    url = f"s3://{BUCKET}/{project.root.parent.name}"
    storage = {"url": url, "endpoint": cluster.s3.endpoint, "push": "never"}
    values["deployment"] = {"compute": "ray", "ray": ray | changes, "storage": storage}
    project.write_params(values)
    project.commit("on a cluster")


def change(project: Project, **changes: dict[str, Any]) -> None:
    """Give the experiment other settings."""
    values = project.params()
    experiment = values["experiments"]["tiny"]
    for name, new in changes.items():
        experiment[name] |= new
    step = experiment["train"]["steps"]
    values["checkpoints"] = {"tiny-6": {"experiment": "tiny", "data": "tiny", "step": step}}
    values["sweeps"] = {}
    project.write_params(values)
    project.commit("other settings")


LONG = {"steps": 4000, "save_every": 2000, "state_every": 50, "log_every": 50}  # half a minute
SHARDED = {"num_samples": 480, "batch_size": 10}  # twelve shards


def here(ready: Project, project: Project, root: Path, until: str) -> Project:
    """The project's settings, computed on this machine."""
    local = ready.copy(root)
    local.write_params({name: value for name, value in project.params().items() if name != "deployment"})
    local.dod("run", "tiny", "--until", until)
    return local


def made(project: Project, *, but: str = "report") -> dict[str, str]:
    """md5 of the outputs, without those that two equal runs have different."""
    return {path: md5 for path, md5 in project.outs().items() if not path.startswith(but)}


def keys(cluster: Cluster, below: str) -> list[str]:
    """Objects in the bucket."""
    pages = cluster.s3.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=below)
    return [item["Key"] for page in pages for item in page.get("Contents", [])]


def jobs(cluster: Cluster) -> dict[str, str]:
    """Status of the cluster's jobs, by name."""
    listed = subprocess.run(
        [BIN / "ray", "list", "jobs", "--format=json", f"--address={cluster.address}"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(listed.stdout) if listed.stdout.startswith("[") else []  # it says in words that there are none
    return {job["submission_id"]: job["status"] for job in found if job["submission_id"]}


def job_of(cluster: Cluster, stage: str, known: set[str]) -> str:
    """The name of a stage's job that is not one of those known."""
    return next(name for name in jobs(cluster) if name.startswith(f"dod-{stage}-") and name not in known)


def below(project: Project) -> str:
    """The project's prefix in the bucket."""
    return f"{project.root.parent.name}/"


def mirrored(cluster: Cluster, project: Project) -> bool:
    """Whether the bucket has a state of the training."""
    return any(key.endswith("index.json") for key in keys(cluster, f"{below(project)}state/train/"))


def test_every_stage_gives_on_the_cluster_what_it_gives_here(cluster: Cluster, ready: Project, tmp_path: Path):
    project = ready.clone(tmp_path / "project")
    (project.root / "dvc.lock").unlink()
    with (project.root / "dod_pipeline" / "node.py").open("a") as code:
        code.write('\n\nprint("the code of the commit", flush=True)\n')  # the nodes' own installation lacks it
    deploy(project, cluster)
    printed = project.dod("run", "tiny").stdout
    assert made(project) == made(
        here(ready, project, tmp_path / "local", "report")
    )  # to the bit: one thread, one worker
    for stage in SENT:
        assert f"dod-{stage}-tiny" in printed
    assert "the code of the commit" in printed
    assert printed.count("train: step 6:") == 1  # a node's log line, as it came
    assert not [key for key in keys(cluster, below(project)) if "/parcels/" in key or "/state/" in key]
    assert "Nothing to do" in project.dod("run", "tiny").stdout


def test_two_workers_train_as_one_to_float_tolerance(cluster: Cluster, ready: Project, project: Project):
    shutil.rmtree(project.root / "train")
    (project.root / "dvc.lock").unlink()
    deploy(project, cluster, training_workers=2)
    project.dod("stage", "train", "tiny")
    ours, theirs = (
        [json.loads(line) for line in (p.root / "train" / "tiny" / "curve.jsonl").read_text().splitlines()]
        for p in (project, ready)
    )
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-4)
    ledgers = [(p.root / "train" / "tiny" / "ledger.jsonl").read_text() for p in (project, ready)]
    assert ledgers[0] == ledgers[1]


def test_training_goes_on_when_its_node_is_lost(cluster: Cluster, ready: Project, project: Project, tmp_path: Path):
    change(project, train=LONG)
    deploy(project, cluster)
    command = Command(project, "dod", "run", "tiny", "--until", "train")
    assert wait_for(lambda: mirrored(cluster, project), 240), command.text
    lost = next(host for host in cluster.nodes if WORKER in cluster.running(host))
    cluster.lose(lost)
    cluster.add_node()
    assert command.end(600) == 0, command.text
    assert command.text.count("train: beginning") == 1 and "train: going on from step" in command.text
    assert made(project) == made(here(ready, project, tmp_path / "local", "train"))


def test_a_lost_node_costs_the_shards_that_it_was_making(
    cluster: Cluster, ready: Project, project: Project, tmp_path: Path
):
    change(project, sampling=SHARDED)
    deploy(project, cluster)
    command = Command(project, "dod", "run", "tiny", "--until", "stage1")
    marks = f"{below(project)}state/stage1/"
    assert wait_for(lambda: sum("/shards/" in key for key in keys(cluster, marks)) >= 2, 240), command.text
    cluster.lose(cluster.nodes[0])
    cluster.add_node()
    assert command.end(600) == 0, command.text
    assert "12 of 12 shards to make" in command.text
    lost = command.text.count("failed because the node it was running on is dead")
    begun = Counter(
        re.findall(r"making shard (\d+)", command.text)
    )  # what the lost node said last may have got lost too
    assert lost == 1 and set(begun) == {str(index) for index in range(12)}, command.text
    assert sum(begun.values()) <= 12 + lost, command.text
    assert made(project) == made(here(ready, project, tmp_path / "local", "stage1"))


def test_a_killed_command_finds_its_job_running(cluster: Cluster, project: Project):
    change(project, train=LONG)
    deploy(project, cluster)
    known = set(jobs(cluster))
    first = Command(project, "dod", "run", "tiny", "--until", "train")
    assert wait_for(lambda: "train: step " in first.text, 240), first.text
    first.process.kill()
    assert_all_end(project.root, 30)
    name = job_of(cluster, "train", known)
    assert jobs(cluster)[name] == "RUNNING"
    done = project.dod("run", "tiny", "--until", "train").stdout
    assert f"{name} runs already" in done
    assert [job for job in jobs(cluster) if job.startswith("dod-train-") and job not in known] == [name]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_the_run_stops_the_job_and_frees_the_nodes(cluster: Cluster, project: Project, number: signal.Signals):
    change(project, train=LONG | {"seed": int(number)})
    deploy(project, cluster)
    known = set(jobs(cluster))
    command = Command(project, "dod", "run", "tiny", "--until", "train")
    assert wait_for(lambda: "train: step " in command.text and mirrored(cluster, project), 240), command.text
    command.process.send_signal(number)
    assert command.end(120) == 130, command.text
    assert jobs(cluster)[job_of(cluster, "train", known)] == "STOPPED"
    assert wait_for(lambda: not any(WORKER in cluster.running(host) for host in cluster.nodes), 60)
    again = project.dod("run", "tiny", "--until", "train").stdout
    assert "train: going on from step" in again


@pytest.mark.timeout(300)  # less than the patience
def test_a_wrong_token_is_refused_at_once(cluster: Cluster, project: Project):
    deploy(project, cluster, patience=600)
    done = project.run("dod", "stage", "reference", "tiny", status=1, RAY_AUTH_TOKEN="0" * 64)
    assert cluster.address in done.stderr and "Authentication failed" in done.stderr
    assert cluster.environment["RAY_AUTH_TOKEN"] not in done.stderr + done.stdout


def test_a_lost_head_is_told_and_nothing_is_lost(cluster: Cluster, ready: Project, project: Project, tmp_path: Path):
    """Last, as it ends the cluster: the next one goes on with what the bucket has."""
    change(project, train=LONG)
    deploy(project, cluster, patience=10)
    command = Command(project, "dod", "run", "tiny", "--until", "train")
    assert wait_for(lambda: mirrored(cluster, project), 240), command.text
    cluster.lose(cluster.head)
    assert command.end(180) == 1
    assert f"the Ray cluster at {cluster.address} doesn't answer" in command.text
    cluster.start_anew()
    deploy(project, cluster)
    done = project.dod("run", "tiny", "--until", "train").stdout
    assert "train: going on from step" in done
    assert made(project) == made(here(ready, project, tmp_path / "local", "train"))
