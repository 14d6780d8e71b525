"""The commands of `dod` that keep a model up to date: scan, pin, champion, retrain. Imports come late."""

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dod_pipeline.champion import Champion


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Give the command line these sub-commands."""
    scan = commands.add_parser("scan", help="look at a data set's images: changed ones make a new version of it")
    scan.add_argument("dataset", metavar="DATASET")
    scan.set_defaults(action=do_scan)

    pin = commands.add_parser("pin", help="keep a data set's trained codec, whatever images come later")
    pin.add_argument("dataset", metavar="DATASET")
    pin.set_defaults(action=do_pin)

    champion = commands.add_parser(
        "champion", help="which checkpoint of an experiment is in use, and how it came to be"
    )
    champion.add_argument("experiment", metavar="EXPERIMENT")
    change = champion.add_mutually_exclusive_group()
    change.add_argument("--set", dest="key", metavar="CHECKPOINT", help="put this checkpoint in use")
    change.add_argument("--rollback", action="store_true", help="put the champion before the present one in use again")
    champion.add_argument("--why", default="by hand", metavar="TEXT", help="kept in the champion's history")
    champion.add_argument("--format", choices=("table", "json", "key"), default="table")
    champion.set_defaults(action=do_champion)

    retrain = commands.add_parser(
        "retrain",
        help="train on from the champion's weights on the newest images, and promote what is not worse",
        description="Exit status: 0 promoted, or nothing to do; 2 FAIL, 3 INCONCLUSIVE (not promoted); 1 an error.",
    )
    retrain.add_argument("experiment", metavar="EXPERIMENT")
    retrain.add_argument(
        "--if-changed", action="store_true", help="begin no candidate unless images changed since the last decision"
    )
    retrain.set_defaults(action=do_retrain)


def do_scan(given: argparse.Namespace) -> int:
    """Print what was found, and whether it is new."""
    from dod_pipeline import listing, stages
    from dod_pipeline.config import load_params

    params = load_params()
    stages.check_key(params, "dataset", given.dataset)
    found, is_new = listing.update(given.dataset, params.datasets[given.dataset])
    what = f"{found.files:,} files, {found.bytes:,} bytes" if found.files and found.bytes else found.state
    print(f"{given.dataset}: {what}: {'written to' if is_new else 'as in'} {listing.file_of(given.dataset)}")
    return 0


def do_pin(given: argparse.Namespace) -> int:
    """Print where the codec lies, and what makes stages take it."""
    from dod_pipeline import retrain
    from dod_pipeline.config import load_params

    found = retrain.pin(load_params(), given.dataset)
    print(f"{found['path']} holds the codec of {given.dataset}; commit it, and write into params.yaml:")
    print(f"  datasets.{given.dataset}.codec: {{{', '.join(f'{name}: {value}' for name, value in found.items())}}}")
    return 0


def do_champion(given: argparse.Namespace) -> int:
    """Show the champion; before that, change it if asked to."""
    from dod_pipeline import champion, listing
    from dod_pipeline.config import load_params

    if given.key is not None:
        params = load_params()
        champion.check_fits(params, given.experiment, given.key)
        known = listing.find(params.experiments[given.experiment].data)
        images = known.sha256 if known else None
        one = champion.holder(params, given.key)
        found = champion.decide(given.experiment, "set", one, why=given.why, data=images)
    elif given.rollback:
        found = champion.roll_back(given.experiment, why=given.why)
    else:
        found = champion.read(given.experiment)
    if given.format == "table":
        show_champion(found)
    else:
        print(
            json.dumps(found.model_dump(mode="json"), indent=1) if given.format == "json" else found.champion.checkpoint
        )
    return 0


def show_champion(found: "Champion") -> None:
    """The history, a decision a line, and who is in use."""
    from dod_pipeline import tables

    rows = []
    for event in found.history:
        images = event.data[:8] if event.data else "-"
        rows.append([f"{event.time:%Y-%m-%d %H:%M:%S}", event.event, event.checkpoint, images, event.why])
    tables.show(f"decisions about {found.experiment}", ["time", "event", "checkpoint", "images", "why"], rows, left=5)
    used = found.champion
    print(f"in use: {used.checkpoint}, {used.path}, sha256 {used.sha256[:12]}...")


def do_retrain(given: argparse.Namespace) -> int:
    """Make and judge a candidate; the exit status is the verdict."""
    import signal

    from dod_pipeline import champion, gate, retrain

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    verdict = retrain.retrain(given.experiment, if_changed=given.if_changed)
    used = champion.read(given.experiment).champion.checkpoint
    if verdict is None:
        print(f"the images are those of the last decision about {given.experiment}; {used} stays in use")
        return 0
    event = champion.read(given.experiment).history[-1]
    print(f"{event.checkpoint}: {event.why}: {event.event}; in use: {used}")
    return gate.STATUS[verdict.verdict]
