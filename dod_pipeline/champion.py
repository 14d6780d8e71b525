"""`champions/EXPERIMENT.json`: which checkpoint of an experiment is in use, and everything that was decided about it.

The file belongs to git, and no stage depends on it: a promotion makes nothing stale. It is replaced whole, in turns, so
that a reader sees the old champion or the new one. Weights are named by digest, and checked against it whenever a
checkpoint is put in use.

Where `deployment.storage` names a place in S3, the object of that name there is the truth for all machines, and the
file a copy that is written after it. An object is replaced only if it still is the one that was read: of two machines
that decide at once one reads again, so that both decisions stand in it.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from dod_models import artifact
from dod_models.config import Frozen
from dod_pipeline import config, stages
from dod_pipeline.config import Params
from dod_pipeline.ledger import current_commit
from dod_pipeline.s3 import Bucket, ChangedError, reaching
from dod_pipeline.turns import turn

CHAMPIONS = Path("champions")
STAGE = "stage2"  # whose averaged weights are in use: those that the gate compares
VAE = Path("vae", "diffusion_pytorch_model.safetensors")  # of a codec


class Holder(NamedTuple):
    """A checkpoint, and what it needs to be used."""

    checkpoint: str
    path: str  # of the file of averaged weights
    sha256: str  # of that file
    codec: str  # sha256 of the weights of the codec whose latents it speaks


class Event(Frozen):
    """A decision. All but `kept` put the checkpoint in use; `kept` names a candidate that was not promoted."""

    time: datetime
    event: Literal["set", "promoted", "kept", "rolled back"]
    checkpoint: str
    path: str
    sha256: str
    codec: str
    data: str | None  # sha256 of the listing of the images; None: never scanned
    verdict: str | None  # id of the gate's record
    why: str
    commit: str | None


class Champion(Frozen):
    """The file."""

    experiment: str
    champion: Event
    history: tuple[Event, ...]

    @property
    def data(self) -> str | None:
        """The newest images on which anything was decided."""
        return next((event.data for event in reversed(self.history) if event.data is not None), None)

    @property
    def decided(self) -> set[str]:
        """Every checkpoint that was decided upon."""
        return {event.checkpoint for event in self.history}


def reigns(history: tuple[Event, ...]) -> list[Event]:
    """The champions that a roll-back would go back to, one after the other; the last one is in use."""
    found: list[Event] = []
    for event in history:
        if event.event in ("set", "promoted"):
            found.append(event)
        elif event.event == "rolled back":
            found[-2:] = [event]
    return found


def name_of(experiment: str) -> str:
    """Where the champion of an experiment stands, here and in S3."""
    return (CHAMPIONS / f"{experiment}.json").as_posix()


def read(experiment: str) -> Champion:
    """The champion of an experiment; a ValueError says how to begin one, a ConnectionError where it can't be read."""
    found = find(experiment)
    if found is None:
        name = name_of(experiment)
        raise ValueError(f"{name}: {experiment} has no champion yet; `dod champion {experiment} --set CHECKPOINT`")
    return found


def find(experiment: str) -> Champion | None:
    """The same, or None."""
    return known(experiment, place())[0]


def place() -> Bucket | None:
    """The place in S3 that holds the truth, if there is one."""
    url = config.storage().url
    if url is None:
        return None
    with reaching(url) as bucket:
        return bucket


def known(experiment: str, bucket: Bucket | None) -> tuple[Champion | None, str | None]:
    """The champion, and which version of the object says so; the file's, where there is no such object yet."""
    name = name_of(experiment)
    found = bucket.read(name) if bucket else None
    if bucket and found:
        try:
            return Champion.parse(json.loads(found[0]), place=f"{bucket.url}/{name}"), found[1]
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{bucket.url}/{name}: not JSON ({error}); put an older version of it back, or upload {name}"
            ) from None
    return (Champion.load(name) if Path(name).is_file() else None), None


def holder(params: Params, key: str) -> Holder:
    """A finished checkpoint of params.yaml, its weights checked against their manifest."""
    from dod_models import checkpoint  # late: this imports torch

    stages.check_key(params, STAGE, key)
    inputs, _, _ = stages.paths(params, STAGE, key)
    decay = stages.resolve(params, STAGE, key).config.model_dump()["ema_decay"]
    name = checkpoint.weights_file(decay)
    manifest = artifact.verify(inputs["checkpoint"], schema=checkpoint.SCHEMA, only=name)
    codec = artifact.read_json(inputs["codec"] / artifact.MANIFEST)["files"][VAE.as_posix()]["sha256"]
    return Holder(key, str(inputs["checkpoint"] / name), manifest["files"][name]["sha256"], codec)


def check_fits(params: Params, experiment: str, key: str) -> None:
    """ValueError unless a checkpoint can stand for an experiment: of the same data and model, so that it can be
    compared, and a retrain can begin from it."""
    if experiment not in params.experiments:
        raise ValueError(f"experiment {experiment!r} is not in params.yaml; it has {', '.join(params.experiments)}")
    stages.check_key(params, STAGE, key)
    other = params.checkpoints[key].experiment
    ours, theirs = params.experiments[experiment], params.experiments[other]
    if (ours.data, ours.train.get("model")) != (theirs.data, theirs.train.get("model")):
        raise ValueError(
            f"{key}: its experiment {other} has another data set or another train.model than {experiment}; choose a "
            f"checkpoint of {experiment} or of one of its retrains"
        )


def check_weights(event: Event) -> None:
    """ValueError unless the weights that an event names lie where it says."""
    path = Path(event.path)
    found = artifact.sha256_file(path) if path.is_file() else None
    if found == event.sha256:
        return
    how = "is missing" if found is None else f"has sha256 {found[:12]}..., was made anew or damaged"
    commit = f" as of commit {event.commit.removesuffix('-dirty')[:12]}" if event.commit else ""
    raise ValueError(
        f"{path}: {how}, and {event.checkpoint} was put in use with sha256 {event.sha256[:12]}...; bring it back with "
        f"`dvc checkout --force {path.parent.parent}` and the dvc.lock{commit}, or `dod champion EXPERIMENT --set` "
        "another one"
    )


def decide(
    experiment: str,
    event: Literal["set", "promoted", "kept"],
    one: Holder,
    *,
    why: str,
    data: str | None = None,
    verdict: str | None = None,
) -> Champion:
    """Write down a decision; the checkpoint is in use from now on, unless it was `kept` out."""
    values = {"time": datetime.now(UTC), "event": event, **one._asdict(), "data": data, "verdict": verdict, "why": why}
    new = Event.model_validate(values | {"commit": current_commit()})
    return add(experiment, lambda before: new)


def roll_back(experiment: str, *, why: str) -> Champion:
    """Put the champion before the present one in use again; ValueError if there is none, or its weights are gone."""
    now = {"time": datetime.now(UTC), "event": "rolled back", "why": why, "verdict": None, "data": None}

    def back(before: Champion | None) -> Event:
        used = reigns((before or read(experiment)).history)
        if len(used) == 1:
            raise ValueError(
                f"{name_of(experiment)}: {used[0].checkpoint} is the first champion, there is none to go "
                f"back to; `dod champion {experiment} --set CHECKPOINT` puts another one in use"
            )
        check_weights(used[-2])
        return used[-2].model_copy(update=now | {"commit": current_commit()})

    return add(experiment, back)


def add(experiment: str, decision: Callable[[Champion | None], Event]) -> Champion:
    """Append the event that follows from what is known, once no other one in this folder does."""
    with turn(f"champion-{experiment}"):
        bucket, name = place(), name_of(experiment)
        while True:
            before, version = known(experiment, bucket)
            history = (*(before.history if before else ()), decision(before))
            written = Champion(experiment=experiment, champion=reigns(history)[-1], history=history)
            values = written.model_dump(mode="json")
            try:
                if bucket:
                    bucket.write(name, json.dumps(values, indent=1, sort_keys=True).encode(), etag=version)
            except ChangedError:  # on another machine somebody was faster
                continue
            artifact.write_json(Path(name), values)
            return written
