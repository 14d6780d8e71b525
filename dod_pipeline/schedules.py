"""What Dagster begins by itself: retrainings, by the clock or when images have changed. Each is off until it is
switched on in the pages, and says `dod retrain` in a process of its own."""

import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import closing
from typing import NamedTuple

import dagster as dg

from dod_pipeline import champion, lifeline, listing
from dod_pipeline.config import Params, identifier, load_params

VERDICTS = {0: "PASS, or nothing to do", 2: "FAIL", 3: "INCONCLUSIVE"}  # exit status of `dod retrain`
GRACE = 120.0  # seconds that an interrupted retraining has to save


class Ask(dg.Config):
    """What a run is launched with."""

    if_changed: bool = False  # begin no candidate unless the images have changed since the last decision


class Automation(NamedTuple):
    """What Dagster is given for the experiments."""

    jobs: list[dg.JobDefinition]
    schedules: list[dg.ScheduleDefinition]
    sensors: list[dg.SensorDefinition]


def automation(params: Params) -> Automation:
    """A job for each experiment, a schedule where `retrain.cron` is given, a sensor where `retrain.watch` is true."""
    found = Automation([], [], [])
    for experiment, settings in params.experiments.items():
        if "warm_start" in settings.train:  # a retrain, whose settings are its experiment's
            continue
        job = job_of(experiment)
        found.jobs.append(job)
        if settings.retrain.cron is not None:
            found.schedules.append(schedule(experiment, job, settings.retrain.cron))
        if settings.retrain.watch:
            found.sensors.append(sensor(experiment, job, seconds=settings.retrain.watch_every))
    return found


def op_of(experiment: str) -> str:
    """Name of the job's only step: Dagster wants another one than the job's."""
    return f"dod_retrain_{identifier(experiment)}"


def job_of(experiment: str) -> dg.JobDefinition:
    """The job that says `dod retrain`; never two of one experiment at a time."""
    name = f"retrain_{identifier(experiment)}"

    @dg.op(name=op_of(experiment), pool=name)
    def body(context: dg.OpExecutionContext, config: Ask) -> None:
        arguments = ["retrain", experiment, *["--if-changed"] * config.if_changed]
        with closing(lines_of(arguments)) as lines:  # whatever interrupts this, the command hears of it
            for line in lines:
                context.log.info(line)

    @dg.job(
        name=name,
        description=f"A candidate from the champion's weights of {experiment}, gated, and promoted if it is not worse.",
        tags={"dod/experiment": experiment},
    )
    def job() -> None:
        body()

    return job


def lines_of(arguments: list[str]) -> Generator[str]:
    """What a `dod` command prints, as it comes, progress bars as they end; dg.Failure unless it came to a verdict.

    It dies with this process; an interrupt is handed on to it, and waited for.
    """
    command = lifeline.held([sys.executable, "-m", "dod_pipeline.cli", *arguments])
    last = ""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as said:
        assert said.stdout is not None
        try:
            for block in said.stdout:
                line = block.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2].rstrip()
                if line:
                    last = line
                    yield line
            code = said.wait()
        except BaseException:
            said.send_signal(signal.SIGTERM)
            try:
                said.wait(GRACE)
            except subprocess.TimeoutExpired:
                said.kill()
            raise
    if code not in VERDICTS:
        raise dg.Failure(description=last or f"dod {' '.join(arguments)} ended with {code}", allow_retries=False)
    yield f"dod {' '.join(arguments)}: {VERDICTS[code]}"


def schedule(experiment: str, job: dg.JobDefinition, cron: str) -> dg.ScheduleDefinition:
    """By the clock; ValueError where it isn't cron's language."""
    try:
        return dg.ScheduleDefinition(job=job, cron_schedule=cron, default_status=dg.DefaultScheduleStatus.STOPPED)
    except dg.DagsterInvalidDefinitionError as error:
        raise ValueError(f"params.yaml: experiments.{experiment}.retrain.cron: {error}") from None


def sensor(experiment: str, job: dg.JobDefinition, *, seconds: int) -> dg.SensorDefinition:
    """Asks for one retraining for each version of the images, once two looks have found the same."""

    @dg.sensor(
        name=f"images_of_{identifier(experiment)}",
        description=f"Retrains {experiment} when its images are others than at the last decision about its champion.",
        job=job,
        minimum_interval_seconds=seconds,
        default_status=dg.DefaultSensorStatus.STOPPED,
    )
    def body(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        params, known = load_params(), champion.find(experiment)
        if known is None:
            return dg.SkipReason(f"no champion yet: dod champion {experiment} --set CHECKPOINT")
        key = params.experiments[experiment].data
        now = listing.scan(key, params.datasets[key])
        if now.sha256 == known.data:
            return dg.SkipReason("the images are those of the last decision")
        if now.sha256 != context.cursor:  # somebody may be copying them here
            context.update_cursor(now.sha256)
            return dg.SkipReason(f"{now.files} images, others than before: asking again before a run is begun")
        asked = {"ops": {op_of(experiment): {"config": {"if_changed": True}}}}
        return dg.RunRequest(run_key=now.sha256, run_config=asked, tags={"dod/images": now.sha256 or ""})

    return body
