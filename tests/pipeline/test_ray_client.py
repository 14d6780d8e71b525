"""A parcel's job by Ray's client, here a stand-in that answers as told; test_ray.py has the real one."""

import logging
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dod_pipeline import ray_client
from dod_pipeline.deployment import Ray
from dod_pipeline.parcel import Parcel
from dod_pipeline.ray_client import Submission


class Server:
    """A job server: the status of its jobs, what they have said, and what was asked of it."""

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}
        self.log = ["first\n", "second\nthi", "rd\n"]
        self.lives = 3  # questions about a job until it ends
        self.asked: list[str] = []
        self.faults: list[Exception | float] = []  # of the next questions: what is raised, or how long they hang
        self.breaks = 0  # times that the log breaks off after its first part
        self.ends = "SUCCEEDED"

    def fail(self) -> None:
        if self.faults:
            fault = self.faults.pop(0)
            if isinstance(fault, Exception):
                raise fault
            time.sleep(fault)

    def list_jobs(self) -> list[Any]:
        self.asked.append("list")
        self.fail()
        running = [name for name, status in self.jobs.items() if status == "RUNNING"]
        if running and running[-1].startswith("dod-train-tiny-"):
            self.lives -= 1
            if self.lives < 0:
                self.jobs[running[-1]] = self.ends
        return [
            SimpleNamespace(submission_id=name, status=SimpleNamespace(value=status))
            for name, status in self.jobs.items()
        ]

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any]) -> None:
        self.asked.append("submit")
        assert submission_id not in self.jobs
        self.jobs[submission_id] = "RUNNING"
        self.entrypoint, self.runtime_env = entrypoint, runtime_env
        self.code = Path(runtime_env["working_dir"]).read_bytes()
        self.fail()

    def delete_job(self, name: str) -> None:
        self.asked.append("delete")
        del self.jobs[name]

    def stop_job(self, name: str) -> None:
        self.asked.append("stop")
        self.jobs[name] = "STOPPED"

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        for part in self.log:
            yield part
            if self.breaks:
                self.breaks -= 1
                raise RuntimeError("connection lost")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """What Ray's client speaks to; nobody waits long."""
    found = Server()
    module = ModuleType("ray.job_submission")
    module.JobSubmissionClient = lambda address: found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    monkeypatch.setitem(sys.modules, "ray.job_submission", module)
    monkeypatch.setattr(ray_client, "POLL", 0.05)
    monkeypatch.setattr(ray_client, "ANSWER", 1.0)
    return found


@pytest.fixture
def parcel() -> Parcel:
    return Parcel(
        stage="train",
        key="tiny",
        config={},
        inputs={},
        named={},
        writes=(),
        facts=True,
        code="0",
        storage="s3://data/team",
        cluster=Ray(gpus=0, patience=0.5),
    )


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Lines of the job's log that were shown."""
    caplog.set_level(logging.INFO, logger="dod_models.ray")
    yield caplog


def test_a_job_is_submitted_with_the_commit_s_code_and_no_secret(
    server: Server, parcel: Parcel, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    Submission(parcel).follow()
    assert server.entrypoint == f"python -m dod_pipeline.ray_driver s3://data/team {parcel.id}"
    commit = ["git", "archive", "--format=zip", "HEAD", *ray_client.SHIPPED]
    assert server.code == subprocess.run(commit, capture_output=True, check=True).stdout
    assert "a-secret" not in str(server.runtime_env)
    assert [line for line in said.messages if line in ("first", "second", "third")] == ["first", "second", "third"]


def test_a_prefix_is_no_command(server: Server, parcel: Parcel):
    place = "s3://data/a b;touch $(id)"
    Submission(parcel.model_copy(update={"storage": place})).follow()
    words = shlex.split(server.entrypoint)
    assert words[3] == place and len(words) == 5


def test_nodes_are_told_the_endpoint_and_the_interface(server: Server, parcel: Parcel):
    Submission(
        parcel.model_copy(update={"endpoint": "http://10.0.0.1:8333", "cluster": Ray(gpus=0, interface="eth1")})
    ).follow()
    told = server.runtime_env["env_vars"]
    assert told["AWS_ENDPOINT_URL_S3"] == "http://10.0.0.1:8333"
    assert told["GLOO_SOCKET_IFNAME"] == told["NCCL_SOCKET_IFNAME"] == "eth1"


def test_an_older_job_that_still_runs_is_named(server: Server, parcel: Parcel, said: pytest.LogCaptureFixture):
    server.jobs["dod-train-tiny-0123456789abcdef"] = "RUNNING"
    server.jobs["dod-train-other-0123456789abcdef"] = "RUNNING"
    Submission(parcel).follow()
    named = [line for line in said.messages if "still runs" in line]
    assert len(named) == 1 and "`ray job stop dod-train-tiny-0123456789abcdef`" in named[0]


def test_a_job_that_runs_is_waited_for(server: Server, parcel: Parcel, said: pytest.LogCaptureFixture):
    server.jobs[parcel.id] = "RUNNING"
    Submission(parcel).follow()
    assert "submit" not in server.asked and any("runs already" in line for line in said.messages)


@pytest.mark.parametrize("before", ["FAILED", "STOPPED", "SUCCEEDED"])
def test_a_job_that_has_ended_is_submitted_anew(before: str, server: Server, parcel: Parcel):
    server.jobs[parcel.id] = before
    Submission(parcel).follow()
    assert [word for word in server.asked if word != "list"] == ["delete", "submit"]


def test_a_submission_whose_answer_was_lost_is_not_repeated(server: Server, parcel: Parcel):
    def lose() -> None:
        if server.asked[-1] == "submit":
            raise OSError("connection reset")

    server.fail = lose  # type: ignore[method-assign]
    Submission(parcel).follow()
    assert server.asked.count("submit") == 1


def test_a_job_that_fails_is_an_error_that_names_it(server: Server, parcel: Parcel):
    server.ends = "FAILED"
    with pytest.raises(OSError, match=f"job {parcel.id} ended as FAILED"):
        Submission(parcel).follow()


def test_a_job_that_the_cluster_forgot_is_told(server: Server, parcel: Parcel):
    server.jobs[parcel.id] = "RUNNING"
    found = Submission(parcel)
    found.start()
    server.jobs.clear()
    with pytest.raises(OSError, match="is unknown to the cluster"):
        found.wait()


def test_a_log_that_breaks_off_goes_on_without_a_repeat(server: Server, parcel: Parcel, said: pytest.LogCaptureFixture):
    server.breaks = 2
    Submission(parcel).follow()
    assert [line for line in said.messages if line in ("first", "second", "third")] == ["first", "second", "third"]


def test_a_progress_bar_is_shown_as_it_stands_last(server: Server, parcel: Parcel, said: pytest.LogCaptureFixture):
    server.log = ["train:  10%\rtrain:  50%\rtrain: 100%\n"]
    Submission(parcel).follow()
    assert "train: 100%" in said.messages


@pytest.mark.parametrize("fault", [OSError("reset"), RuntimeError("500"), 2.0])
def test_an_answer_that_fails_to_come_once_is_asked_for_again(fault: Any, server: Server, parcel: Parcel):
    server.faults = [fault]
    Submission(parcel.model_copy(update={"cluster": Ray(gpus=0, patience=20)})).follow()
    assert server.jobs[parcel.id] == "SUCCEEDED"


@pytest.mark.parametrize("fault", [OSError("refused"), 5.0])
def test_a_head_that_is_lost_is_told_in_bounded_time(fault: Any, server: Server, parcel: Parcel):
    server.faults = [fault] * 100
    begun = time.monotonic()
    with pytest.raises(
        ConnectionError, match=r"Ray cluster at http://127.0.0.1:8265 doesn't answer, or refuses.*may go on there"
    ):
        Submission(parcel).follow()
    assert time.monotonic() - begun < 30


def test_a_refusal_is_told_at_once(server: Server, parcel: Parcel):
    class AuthenticationError(Exception):
        """Ray's, which is a kind of its own."""

    server.faults = [AuthenticationError("Authentication failed: invalid token\nlong advice")]
    patient = parcel.model_copy(update={"cluster": Ray(gpus=0, patience=600)})
    with pytest.raises(ConnectionError, match=r"refuses: Authentication failed: invalid token\. Job"):
        Submission(patient).follow()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_job(number: signal.Signals, server: Server, parcel: Parcel):
    server.lives = 10**6
    found, before = Submission(parcel), signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(0.5, lambda: signal.pthread_kill(threading.main_thread().ident or 0, number))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        found.follow()
    timer.join()
    assert server.asked.count("stop") == 1 and server.jobs[parcel.id] == "STOPPED"
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_interrupt_while_the_job_is_submitted_stops_it(server: Server, parcel: Parcel):
    def interrupt() -> None:
        if server.asked[-1] == "submit":
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.5)

    server.fail = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        Submission(parcel).follow()
    assert server.jobs[parcel.id] == "STOPPED"


def test_without_ray_the_remedy_is_named(parcel: Parcel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray.job_submission", None)
    with pytest.raises(ValueError, match="`make ray`, or set compute: local"):
        Submission(parcel)
