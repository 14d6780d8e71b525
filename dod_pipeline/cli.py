"""The `dod` command. Imports come late, so that `--help` answers at once."""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dod_pipeline import cli_doctor, cli_evaluate, cli_history, cli_retrain

if TYPE_CHECKING:
    from dod_pipeline.config import Params

Scores = dict[str, dict[str, float]]  # name of a row -> its numbers


def parser() -> argparse.ArgumentParser:
    """All sub-commands; each sets `action`, the function that carries it out."""
    top = argparse.ArgumentParser(
        prog="dod", description="Diffusion on Diffusion: data, training, sampling, evaluation."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="make everything that an experiment needs, and print its results")
    run.add_argument("experiments", nargs="+", metavar="EXPERIMENT")
    run.add_argument("--until", default="report", metavar="STAGE", help="last stage (default: report)")
    run.set_defaults(action=do_run)

    stage = commands.add_parser(
        "stage", help="compute one stage instance now, whatever DVC knows (dvc.yaml calls this)"
    )
    stage.add_argument("stage", metavar="STAGE")
    stage.add_argument("key", metavar="KEY")
    stage.set_defaults(action=do_stage)

    report = commands.add_parser("report", help="make an experiment's page anew if it is out of date")
    report.add_argument("experiment", metavar="EXPERIMENT")
    report.set_defaults(action=do_report)

    commands.add_parser("status", help="which stages are up to date").set_defaults(action=do_status)

    models = commands.add_parser("models", help="parameters and GFLOPs of the presets")
    models.add_argument("--json", action="store_true")
    models.set_defaults(action=do_models)

    for others in (cli_history, cli_evaluate, cli_retrain, cli_doctor):
        others.add(commands)

    generate = commands.add_parser("generate", help="a picture of chosen classes through all stages")
    generate.add_argument("checkpoint", metavar="CHECKPOINT")
    generate.add_argument(
        "--class", dest="classes", type=int, action="append", required=True, metavar="N", help="may be repeated"
    )
    generate.add_argument("--stages", type=int, default=2, metavar="N")
    generate.add_argument("--per-class", type=int, default=4, metavar="N")
    generate.add_argument("--seed", type=int, default=0, metavar="N")
    generate.add_argument("--out", type=Path, default=Path("grid.png"), metavar="FILE.png")
    generate.set_defaults(action=do_generate)

    export = commands.add_parser("export", help="a stage's samples as the npz that ADM's evaluation suite reads")
    export.add_argument("checkpoint", metavar="CHECKPOINT")
    export.add_argument("file", type=Path, metavar="FILE.npz")
    export.add_argument("--stage", type=int, choices=(1, 2), default=2)
    export.set_defaults(action=do_export)

    pull = commands.add_parser("pull", help="fetch what dvc.lock names and the remote has (dvc pull, in bounded time)")
    pull.add_argument("targets", nargs="*", metavar="STAGE@KEY", help="these alone (default: everything)")
    pull.set_defaults(action=do_pull)

    accept = commands.add_parser(
        "accept", help="record that changed code left a stage's outputs right (dvc commit --force)"
    )
    accept.add_argument("targets", nargs="+", metavar="STAGE@KEY")
    accept.set_defaults(action=do_accept)
    return top


def do_run(given: argparse.Namespace) -> int:
    """Make the experiments' stages where they are outdated, through Dagster; then their tables and pictures."""
    from dod_pipeline import runs, union
    from dod_pipeline.config import load_params

    params = load_params()
    union.sync()  # for the checks that look at verdicts
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    show_results(params, runs.run(params, given.experiments, given.until))
    return 0


def show_results(params: "Params", jobs: list[tuple[str, str]]) -> None:
    """Print tables, and the path of the picture in which stage 2 stands under stage 1, of finished checkpoints."""
    from dod_models import artifact
    from dod_pipeline import stages, tables

    shown = {"metrics": tables.results, "sweeps": tables.sweep}
    compared: dict[str, Scores] = {}
    for stage, key in jobs:
        _, out, _ = stages.paths(params, stage, key)
        if stage in shown:
            scores = artifact.read_json(out)
            shown[stage](key, scores)
            compared.setdefault(key, {}).update(scores)
        if stage == "stage2":
            print(f"stage 2 under stage 1, same samples: {out / 'grid.png'}")
        if stage == "report":
            print(f"report: {out}")
    for alike in comparable(params, compared):
        tables.side_by_side(alike)


def comparable(params: "Params", found: dict[str, Scores]) -> list[dict[str, Scores]]:
    """Checkpoints' tables in groups that have one reference and one count, those alone left out."""
    groups: dict[tuple[str, float], dict[str, Scores]] = {}
    for key, scores in found.items():
        if "stage2" in scores:
            setting = params.checkpoints[key].data, scores["stage2"]["num_samples"]
            groups.setdefault(setting, {})[key] = scores
    return [group for group in groups.values() if len(group) > 1]


def do_stage(given: argparse.Namespace) -> int:
    """Compute a stage; an evaluation, and what the stage took, are added to the history."""
    if "DVC_STAGE" in os.environ:  # dvc started this, and whoever called dvc may have been killed with it
        from dod_pipeline import lifeline

        lifeline.hold(int(caller) if (caller := os.environ.get(lifeline.CALLER)) else None)
    from dod_models import artifact
    from dod_pipeline import costs, launch, listing, mirror, provisional, records, sources, stages, union
    from dod_pipeline.config import load_params

    params = load_params()
    job = stages.resolve(params, given.stage, given.key)
    if job.stage in ("metrics", "sweeps", "report"):  # they state what other stages took, wherever these ran
        union.sync()
    if job.stage == "report":  # the one stage that dod_models knows nothing of
        from dod_pipeline import report

        report.write(job)
        return 0
    if job.stage == "dataset":
        listing.advise(given.key)
    started = time.monotonic()
    with provisional.beside(params, job), mirror.beside(params, job):
        ran = launch.run(job, params.deployment)
    if ran.code != 0 or launch.is_helper(job.stage):  # the first machine has the results
        return ran.code
    seconds = time.monotonic() - started
    sources.keep_settings(job)
    costs.append(job, seconds=seconds, device=ran.device, processes=ran.processes)
    if job.stage in ("metrics", "sweeps"):
        for record in records.records(params, job):
            records.append(record)
    if job.stage == "train":
        artifact.write_json(Path("curves", f"{given.key}.json"), stages.training_curve(job))  # for `dvc plots`
    union.sync()
    return 0


def do_report(given: argparse.Namespace) -> int:
    """`dvc repro` of the report alone: what it reads must be there."""
    from dod_pipeline import dvc_repo, report, stages, union
    from dod_pipeline.config import load_params

    union.sync()
    job = stages.resolve(load_params(), "report", given.experiment)
    report.open_subject(job)  # before dvc removes the old page
    with dvc_repo.alone():
        dvc_repo.repro_one(dvc_repo.address(job.stage, job.key), root=Path())
    print(f"report: {job.out}")
    return 0


def do_status(given: argparse.Namespace) -> int:
    """Print each stage instance of params.yaml, and what changed."""
    from dod_pipeline import dvc_repo, stages, tables
    from dod_pipeline.config import load_params

    params = load_params()
    changed = dvc_repo.status([])
    rows = []
    for stage, key in [(s, k) for s in stages.ORDER for k in stages.keys_of(params, s)]:
        reasons = changed.get(dvc_repo.address(stage, key), [])
        rows.append([f"{stage}@{key}", explain(reasons)])
    tables.show("stages", ["stage", "state"], rows, left=2)
    return 0


def explain(reasons: list[str | dict[str, dict[str, str]]]) -> str:
    """DVC's reasons in a line: `changed outs: train/mnist deleted`, with three names of a kind at most."""
    parts = []
    for reason in reasons:
        if isinstance(reason, str):
            parts.append(reason)
            continue
        for kind, what in reason.items():
            if "new" in what.values():
                return "not made yet, or its settings are new"
            names = [f"{name} {how}" for name, how in what.items()]
            parts.append(f"{kind}: {', '.join(names[:3])}" + f" and {len(names) - 3} more" * (len(names) > 3))
    return "; ".join(parts) or "up to date"


def do_models(given: argparse.Namespace) -> int:
    """Print the presets' costs."""
    from dod_models import cost
    from dod_pipeline import tables

    found = cost.table()
    if given.json:
        print(json.dumps(found))
    else:
        tables.models(found)
    return 0


def do_generate(given: argparse.Namespace) -> int:
    """Sample the classes with the checkpoint's own settings, and write the picture."""
    from dod_pipeline import samples

    shape = {"classes": given.classes, "num_stages": given.stages, "per_class": given.per_class}
    return samples.generate(given.checkpoint, shape=shape, seed=given.seed, out=given.out)


def do_export(given: argparse.Namespace) -> int:
    """Write a stage's images as ADM's npz."""
    from dod_pipeline import samples

    return samples.export(given.checkpoint, stage=given.stage, out=given.file)


def do_pull(given: argparse.Namespace) -> int:
    """Fetch outputs from DVC's remote, within `deployment.storage.timeout`."""
    from dod_pipeline import dvc_transfer, remote
    from dod_pipeline.config import load_params

    storage = load_params().deployment.storage
    remote.use(storage)
    dvc_transfer.pull(given.targets, root=Path(), timeout=storage.timeout)
    return 0


def do_accept(given: argparse.Namespace) -> int:
    """Record the present code, settings and outputs as belonging together."""
    from dod_pipeline import dvc_repo

    print(f"recording without running: {', '.join(given.targets)}. Do this only where the change alters no result.")
    with dvc_repo.alone():
        dvc_repo.accept(given.targets)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run a command; what a user can cause is one message on stderr and exit status 1."""
    given = parser().parse_args(arguments)
    try:
        status: int = given.action(given)
    except BrokenPipeError:  # `dod history | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as the shell reports SIGPIPE
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"dod: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndod: stopped; run it again to go on", file=sys.stderr)  # a killed stage may leave half a line
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
