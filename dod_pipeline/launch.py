"""Where a stage's computation runs: this process, several of them under torchrun, which accelerate picks up, or a
cluster.

`accelerate launch --cpu` would start a single process, whatever number it is told.
"""

import os
import signal
import subprocess
import sys
from types import FrameType
from typing import NamedTuple

from dod_models import cli
from dod_models.config import STOPPED
from dod_pipeline import cluster, fetch
from dod_pipeline.deployment import Deployment
from dod_pipeline.lifeline import held
from dod_pipeline.stages import Job

# Several processes make these stages' shards, and the launching one puts them together.
SHARDED = ("latents", "stage1", "stage2", "metrics")
SPLIT = ("train", *SHARDED)  # the stages that several processes can share

# Environment: how many processes share such a stage on a machine, e.g. one for each GPU; on how many machines, each of
# which is told the same but for its own number, from 0; and where number 0 listens (host:port). Shards made by others
# reach number 0 through a `.state` that all of them share; it makes those that it doesn't find.
PROCESSES, MACHINES, MACHINE, MAIN = "DOD_PROCESSES", "DOD_MACHINES", "DOD_MACHINE", "DOD_MAIN"

NOTICE = "100"  # seconds that processes have to save; a spot instance is taken away 120 seconds after the notice


def number(name: str, *, of: str, least: int) -> int:
    """A whole number from the environment, `least` where it isn't given."""
    text = os.environ.get(name, str(least))
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}={text!r}: must be {of}, {least} or more")
    return int(text)


def processes_of(stage: str) -> int:
    """How many processes of this machine compute a stage."""
    processes = number(PROCESSES, of="a number of processes", least=1)
    return processes if stage in SPLIT else 1


def machines_of(stage: str) -> tuple[int, int]:
    """How many machines compute a stage, and which of them this is."""
    machines, machine = number(MACHINES, of="a number of machines", least=1), number(MACHINE, of="a machine", least=0)
    if machine >= machines:
        raise ValueError(f"{MACHINE}={machine}: must be below {MACHINES}, which is {machines}")
    return (machines, machine) if stage in SPLIT else (1, 0)


def is_helper(stage: str) -> bool:
    """Whether this machine computes for another one, which has the results."""
    return machines_of(stage)[1] > 0


class Ran(NamedTuple):
    """How a job has ended, and what computed it."""

    code: int  # exit status
    device: str  # "cpu", or the GPU's name
    processes: int


def run(job: Job, deployment: Deployment) -> Ran:
    """Run the job where the deployment says, what it reads from S3 brought there."""
    if cluster.takes(job.stage, deployment):
        return Ran(0, *cluster.run(job, deployment))
    fetch.inputs(job)
    return Ran(run_here(job), device_name(), processes_of(job.stage) * machines_of(job.stage)[0])


def run_here(job: Job) -> int:
    """Run the job on this machine; returns its exit status."""
    processes, (machines, machine) = processes_of(job.stage), machines_of(job.stage)
    if processes == machines == 1:
        return cli.main(job.arguments())
    environment = dict(os.environ) if has_gpus() else os.environ | {"ACCELERATE_USE_CPU": "true"}
    if machines == 1:  # nothing here concerns the network
        meeting = ["--standalone", "--local_addr", "127.0.0.1"]
        environment = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} | environment
    else:
        host, _, port = os.environ.get(MAIN, "").rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"{MAIN}={os.environ.get(MAIN, '')!r}: must be machine 0's host:port, e.g. 10.0.0.1:29500")
        meeting = ["--nnodes", str(machines), "--node_rank", str(machine), "--master_addr", host, "--master_port", port]
    options = ["--nproc_per_node", str(processes), "--shutdown_timeout", NOTICE, "--no_python"]
    worker = held([sys.executable, "-m", "dod_models.cli", *job.arguments()])
    launcher = [sys.executable, "-m", "torch.distributed.run", *meeting, *options, *worker]
    code = wait_for(held(launcher), environment)
    # Shards are made by all, and put together by this process: no one of them waits for another.
    return cli.main(job.arguments()) if code == 0 and job.stage in SHARDED and machine == 0 else code


def wait_for(command: list[str], environment: dict[str, str]) -> int:
    """Run a command and return its exit status. SIGTERM or Ctrl-C is handed on to it, and it ends in its own time.

    It hears of it once, in a process group of its own: torchrun kills its workers when it is told again.
    """
    handed_on = False

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal handed_on
        if not handed_on:
            handed_on = True
            process.send_signal(signal.SIGTERM)

    with subprocess.Popen(command, env=environment, process_group=0) as process:
        before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return STOPPED if handed_on and code != 0 else code


def has_gpus() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def device_name() -> str:
    """The GPU that torch would use, or "cpu"."""
    if "torch" not in sys.modules:  # whoever computed without it used no GPU, and it takes a second or two to import
        return "cpu"
    import torch

    return str(torch.cuda.get_device_name()) if has_gpus() else "cpu"
