"""Where a stage's computation runs: this process, or several of them under torchrun, which accelerate picks up.

`accelerate launch --cpu` would start a single process, whatever number it is told.
"""

import os
import subprocess
import sys

from dod_models import cli
from dod_pipeline.lifeline import held
from dod_pipeline.stages import Job

PROCESSES = "DOD_PROCESSES"  # environment: how many processes train or encode, e.g. one for each GPU
SPLIT = ("train", "latents")  # the stages that several processes can share


def processes_of(stage: str) -> int:
    """How many processes compute a stage."""
    processes = os.environ.get(PROCESSES, "1")
    if not processes.isdecimal() or int(processes) < 1:
        raise ValueError(f"{PROCESSES}={processes!r}: must be a number of processes, 1 or more")
    return int(processes) if stage in SPLIT else 1


def run(job: Job) -> int:
    """Run the job on this machine; returns its exit status."""
    processes = processes_of(job.stage)
    if processes == 1:
        return cli.main(job.arguments())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    worker = held([sys.executable, "-m", "dod_models.cli", *job.arguments()])
    environment = os.environ if has_gpus() else os.environ | {"ACCELERATE_USE_CPU": "true"}
    code = subprocess.run(held([*launcher, "--no-python", *worker]), env=environment).returncode
    # Shards are encoded by all, and put together by this process: no one of them waits for another.
    return cli.main(job.arguments()) if code == 0 and job.stage == "latents" else code


def has_gpus() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def device_name() -> str:
    """The GPU that torch would use, or "cpu"."""
    import torch

    return str(torch.cuda.get_device_name()) if has_gpus() else "cpu"
