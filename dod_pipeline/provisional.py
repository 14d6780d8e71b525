"""`dod provisional`: scores of a training's saved steps while it still runs, outside of DVC, which locks its outputs.

A step is saved whole or not at all, so it may be read at once; nothing of the training's is written. Each one is a seed
block (`dod_models.trial`) of few samples. Its records are marked provisional: what the versioned evaluation says of the
step takes their place. Dagster gets an observation of the training's asset, which makes nothing stale.

Where params.yaml has `experiments.KEY.provisional`, stage `train` has this run beside it as a child: whoever starts the
stage, Dagster or DVC, and however it ends, there is nothing else to start, to stop or to find again.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from dod_models import artifact
from dod_pipeline import cluster, launch, ledger, lifeline, records, stages, union
from dod_pipeline.config import Params
from dod_pipeline.stages import Job

CACHE = Path(".state", "provisional")
PAUSE = 2.0  # seconds between two looks at what is saved
PATIENCE = 10  # niceness: whatever else wants the CPU goes first, the training above all
CTRL_C = 130


class Saved(NamedTuple):
    """A saved step, and the computation of its scores."""

    step: int
    checkpoint: str  # the key in params.yaml, where it has one
    job: Job  # its output becomes `done` once everybody was told

    @property
    def done(self) -> Path:
        """Stands where the step was dealt with."""
        return self.job.out.with_suffix(".done")


def saved_steps(params: Params, experiment: str) -> list[Saved]:
    """The steps to be scored that are there, in order: of the training that runs; or of the finished one, whose
    checkpoints in params.yaml have the versioned evaluation."""
    from dod_models import source  # late: this imports torch
    from dod_models.trial import TrialConfig

    settings = params.experiments[experiment]
    asked = settings.provisional
    if asked is None:
        raise ValueError(f"experiments.{experiment}.provisional: not in params.yaml; give it num_samples")
    values = {"block": 0, "num_samples": asked.num_samples}
    values |= {name: settings.sampling | getattr(settings, name) for name in ("stage1", "stage2")}
    config = TrialConfig.parse(values, place=f"params.yaml: sampling of {experiment}")
    measured = {name: Path(name, settings.data) for name in ("reference", "codec")}
    shared = source.key("trial", config.digest, measured.values())
    keys = {item.step: key for key, item in params.checkpoints_of(experiment).items()}
    folder, versioned = folder_of(params, experiment)
    found = []
    for manifest in folder.glob(f"step-*/{artifact.MANIFEST}"):
        step = int(manifest.parent.name.removeprefix("step-"))
        if step % (asked.every or 1) or (versioned and step in keys):
            continue
        with suppress(FileNotFoundError):  # a training that goes on puts an equal one there: at the next look it is
            name = f"{shared}-{artifact.sha256_file(manifest)[:32]}"
            key = keys.get(step, f"{experiment}-{step}")
            inputs = {"checkpoint": manifest.parent, **measured}
            found.append(Saved(step, key, Job("trial", key, config, inputs, CACHE / experiment / f"{name}.json", None)))
    return sorted(found, key=lambda one: one.step)


def folder_of(params: Params, experiment: str) -> tuple[Path, bool]:
    """Where the steps lie, in train/ or in the work of `dod_models.train`; and whether that is finished."""
    job = stages.resolve(params, "train", experiment)
    latents = artifact.sha256_file(job.inputs["latents"] / artifact.MANIFEST)
    if (job.out / artifact.MANIFEST).is_file():
        manifest = artifact.read_json(job.out / artifact.MANIFEST)
        if (manifest["config"], manifest["about"]["latents"]) == (job.config.digest, latents):
            return job.out, True
    work = stages.work_of(job)
    assert work is not None  # it is a training's, and the latents are there
    return work / "out", False


def follow(params: Params, experiment: str, *, watch: bool) -> None:
    """Score what is saved, the newest first; with `watch` go on so until killed, past what fails and is told."""
    passed_over: set[int] = set()
    (CACHE / experiment).mkdir(parents=True, exist_ok=True)
    with artifact.locked(CACHE / experiment):
        while True:
            due = [one for one in saved_steps(params, experiment) if not one.done.exists()]
            due = [one for one in due if one.step not in passed_over]
            if not due and not watch:
                return
            if not due:
                time.sleep(PAUSE)
                continue
            try:
                score(params, experiment, due[-1])
            except (ValueError, OSError) as error:
                if not watch:
                    raise
                print(f"provisional: step {due[-1].step} is passed over: {error}", file=sys.stderr, flush=True)
                passed_over.add(due[-1].step)


def score(params: Params, experiment: str, one: Saved) -> None:
    """Compute a step's scores, unless a killed process did, and tell the history and Dagster."""
    if not one.job.out.exists() and launch.run_here(one.job) != 0:
        raise OSError(f"the scores of step {one.step} of {experiment} failed, as said above")
    trial = artifact.read_json(one.job.out)
    for record in rows_of(experiment, one, trial):
        records.append(record)
    union.sync()
    fids = {name: row["fid"] for name, row in trial["scores"].items()}
    print(f"provisional: {one.checkpoint}: " + ", ".join(f"{name} FID {fid:.4g}" for name, fid in fids.items()))
    try:
        observe(experiment, one.step, fids, trial["config"]["num_samples"])
    except OSError as error:
        print(f"provisional: Dagster could not be told: {error}", file=sys.stderr)
    sys.stdout.flush()
    os.replace(one.job.out, one.done)


def rows_of(experiment: str, one: Saved, trial: dict[str, Any]) -> list[records.Record]:
    """One of each stage, marked as provisional."""
    from dod_models.trial import TrialConfig

    assert isinstance(one.job.config, TrialConfig)
    measured = records.Measured.of(one.job)
    computed = datetime.fromtimestamp(one.job.out.stat().st_mtime, UTC)  # told twice, it is the same record
    seed = artifact.read_json(one.job.inputs["checkpoint"] / artifact.MANIFEST)["about"]["seed"]
    found: list[records.Record] = []
    for number, (name, config) in enumerate(one.job.config.stages().items(), start=1):
        row = trial["scores"][name]
        previous = found[-1].config if found else None
        sampled = records.Sampled(number, config.model_dump(mode="json"), config.digest, previous)
        values = {
            "time": computed,
            "experiment": experiment,
            "checkpoint": one.checkpoint,
            "step": one.step,
            "provisional": True,
            "row": name,
            "stage": number,
            "metrics": {"fid": row["fid"]},
            "num_samples": row["num_samples"],
            "evaluations": row["evaluations"],
            "train_seed": seed,
            **records.origin(sampled, one.job, name),
            **measured.fields(name),
            "weights": trial["weights"][name],
            "commit": ledger.current_commit(),
        }
        found.append(records.Record.model_validate(values))
    return found


def observe(experiment: str, step: int, fids: dict[str, float], num_samples: int) -> None:
    """Add the numbers to what Dagster shows of the training; OSError if it can't be told."""
    import dagster as dg

    from dod_pipeline import runs

    numbers = {f"provisional.{name}.fid": fid for name, fid in fids.items()}
    observation = dg.AssetObservation(
        dg.AssetKey(["train", experiment]),
        description=f"Provisional scores of step {step}, of {num_samples} samples, while training runs.",
        metadata={"step": step, "num_samples": num_samples, **numbers},
    )
    with runs.instance(Path()) as instance:
        instance.report_runless_asset_event(observation)


@contextmanager
def beside(params: Params, job: Job) -> Iterator[None]:
    """While a training runs, have its steps scored by a child, if its experiment asks for that. It ends with this block
    or with this process, and whatever becomes of it is no concern of the training's."""
    asked = params.experiments[job.key].provisional if job.stage == "train" else None
    if asked is not None and cluster.takes(job.stage, params.deployment):
        print("no provisional scores: the training's steps lie on the cluster", flush=True)
        asked = None
    if asked is None or launch.is_helper(job.stage):
        yield
        return
    log = CACHE / f"{job.key}.log"
    try:
        process = start(job.key, log, devices=asked.devices)
    except OSError as error:
        print(f"no provisional scores: {error}", flush=True)
        yield
        return
    try:
        yield
    finally:
        if process.poll() not in (None, CTRL_C):
            print(f"provisional scores have ended early, with status {process.returncode}; see {log}", flush=True)
        process.terminate()
        process.wait()


def start(experiment: str, log: Path, *, devices: str) -> subprocess.Popen[bytes]:
    """`dod provisional --watch` as a child that dies with this process, and says nothing to whom the stage reports."""
    command = lifeline.held([sys.executable, "-m", "dod_pipeline.cli", "provisional", experiment, "--watch"])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DAGSTER_PIPES_")}
    environment = kept | {"CUDA_VISIBLE_DEVICES": devices}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as said:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment)
