"""A parcel as a job of a Ray cluster: found or submitted, shown while it runs, stopped with the process that waits.

Ray's job API over HTTP. Its client sets itself no limits in time, so each question gets one here.
"""

import asyncio
import logging
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dod_pipeline.lifeline import unheeding
from dod_pipeline.parcel import PARCELS, Parcel, prefix

log = logging.getLogger("dod_models.ray")  # what `cli.reporting` shows, and tells Dagster

SHIPPED = ("dod_models", "dod_pipeline")  # the code that a job runs: these of the commit
POLL = 2.0  # seconds between two looks at a job
ANSWER = 30.0  # seconds that the job server has for one answer
STOP = 15.0  # seconds that a job has to end when it is told to: Ray kills it after three
TALKERS = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")  # of each connection and package
RUNNING = ("PENDING", "RUNNING")  # Ray's names for the status of a job that has not ended

Answer = TypeVar("Answer")


class Submission:
    """The cluster's job of a parcel."""

    def __init__(self, parcel: Parcel) -> None:
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError:
            raise ValueError(
                "deployment.compute: ray wants the package ray, which is not here: `make ray`, or set compute: local"
            ) from None
        for name in TALKERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        self.parcel, self.address = parcel, parcel.cluster.address
        self.client: Any = self.asked(partial(JobSubmissionClient, self.address))
        self.seen = 0  # characters of the log that were shown

    def asked(self, question: Callable[[], Answer], *, once: bool = False) -> Answer:
        """The job server's answer; ConnectionError once it has given none for as long as the deployment allows."""
        end = time.monotonic() + (0 if once else self.parcel.cluster.patience)
        while True:
            try:
                return in_time(question)
            except Exception as error:  # Ray has many kinds; these may pass, others such as a wrong token don't
                if not isinstance(error, OSError | RuntimeError) or time.monotonic() > end:
                    why = (str(error) or type(error).__name__).splitlines()[0]
                    raise ConnectionError(
                        f"the Ray cluster at {self.address} doesn't answer, or refuses: {why}. Job {self.parcel.id} "
                        f"may go on there, and what it has made is in {self.parcel.storage}: look at "
                        "deployment.ray.address, the head and its token, and run it again"
                    ) from None
                time.sleep(POLL)

    def jobs(self) -> dict[str, str]:
        """The status of each job that was submitted, by name."""
        return {job.submission_id: str(job.status.value) for job in self.asked(self.client.list_jobs)}

    def status(self) -> str | None:
        """The job's status; None where the cluster knows no such job."""
        return self.jobs().get(self.parcel.id)

    def start(self) -> None:
        """Submit the job, unless it runs."""
        known = self.jobs()
        status = known.get(self.parcel.id)
        alike = prefix(self.parcel.stage, self.parcel.key).removeprefix(PARCELS)
        for other in (name for name, how in known.items() if how in RUNNING and name != self.parcel.id):
            if other is not None and other.startswith(alike):
                log.warning(f"job {other} of other settings or code still runs; `ray job stop {other}` stops it")
        if status in RUNNING:
            log.info(f"{self.parcel.stage}: job {self.parcel.id} runs already; waiting for it")
            return
        if status is not None:  # it ended, and what it had made is found in the bucket
            self.asked(lambda: self.client.delete_job(self.parcel.id))
        with tempfile.TemporaryDirectory() as folder:
            code = Path(folder, "code.zip")
            archive = ["git", "archive", "--format=zip", f"--output={code}", "HEAD", *SHIPPED]
            subprocess.run(archive, check=True)
            self.asked(partial(self.submit, code))
        log.info(f"{self.parcel.stage}: job {self.parcel.id} was sent to {self.address}")

    def submit(self, code: Path) -> None:
        """One attempt to submit the job; the one before it may have succeeded, and its answer got lost."""
        if any(job.submission_id == self.parcel.id for job in self.client.list_jobs()):
            return
        self.client.submit_job(
            entrypoint=shlex.join(["python", "-m", "dod_pipeline.ray_driver", self.parcel.storage, self.parcel.id]),
            submission_id=self.parcel.id,
            runtime_env={"working_dir": str(code), "env_vars": environment(self.parcel)},
        )

    def follow(self) -> None:
        """Start the job and show what it says until it ends; OSError where it failed. An interrupt stops it."""
        with self.stopping():
            self.start()
            self.wait()

    def wait(self) -> None:
        """Show what a job that was started says until it ends."""
        teller = threading.Thread(target=self.tell, daemon=True)
        teller.start()
        while (status := self.status()) in RUNNING:
            time.sleep(POLL)
        teller.join(timeout=ANSWER)
        if status != "SUCCEEDED":
            how = f"ended as {status}" if status else "is unknown to the cluster: it was started anew meanwhile"
            said = "what it said stands above. What it had made is kept: run it again"
            raise OSError(f"job {self.parcel.id} {how}; {said}")

    def tell(self) -> None:
        """Show the job's log as it comes, from where it was lost if the connection breaks."""

        async def listen() -> None:
            begun, text = 0, ""
            async for part in self.client.tail_job_logs(self.parcel.id):
                new = part[max(0, self.seen - begun) :]
                begun += len(part)
                self.seen += len(new)
                *lines, text = (text + new).split("\n")
                for line in lines:
                    say(line)
            say(text)

        while True:
            with suppress(Exception):  # whatever breaks a connection; `follow` knows how the job is
                asyncio.run(listen())
                return
            time.sleep(POLL)

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Stop the job if this process is interrupted, by Ctrl-C or SIGTERM."""
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            with unheeding():
                log.info(f"{self.parcel.stage}: stopping job {self.parcel.id}")
                with suppress(ConnectionError):  # it may not have begun
                    self.asked(lambda: self.client.stop_job(self.parcel.id), once=True)
                end = time.monotonic() + STOP
                while self.status() in RUNNING and time.monotonic() < end:
                    time.sleep(POLL)
            raise
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)


def say(line: str) -> None:
    """Show a line of the log, of a progress bar its last state."""
    text = line.rpartition("\r")[2].rstrip()
    if text:
        log.info(text)


def in_time(question: Callable[[], Answer]) -> Answer:
    """What a call returns or raises; TimeoutError where it does neither in time: the client sets itself no limit."""
    found: list[Answer] = []
    wrong: list[Exception] = []

    def ask() -> None:
        try:
            found.append(question())
        except Exception as error:
            wrong.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout=ANSWER)
    if wrong:
        raise wrong[0]
    if not found:
        raise TimeoutError(f"no answer within {ANSWER:g} s")
    return found[0]


def environment(parcel: Parcel) -> dict[str, str]:
    """What a job's processes are told; credentials are the nodes' own."""
    found = {"RAY_COLOR_PREFIX": "0", "RAY_DEDUP_LOGS": "0", "TQDM_MININTERVAL": "30"}
    if parcel.endpoint is not None:
        found["AWS_ENDPOINT_URL_S3"] = parcel.endpoint
    if parcel.cluster.interface is not None:
        found |= {f"{library}_SOCKET_IFNAME": parcel.cluster.interface for library in ("GLOO", "NCCL")}
    return found if parcel.cluster.gpus else found | {"ACCELERATE_USE_CPU": "true"}
