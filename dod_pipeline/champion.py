"""`champions/EXPERIMENT.json`: which checkpoint of an experiment is in use, and everything that was decided about it.

The file belongs to git, and no stage depends on it: a promotion makes nothing stale. It is replaced whole, in turns, so
that a reader sees the old champion or the new one. Weights are named by digest, and checked against it whenever a
checkpoint is put in use.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from dod_models import artifact
from dod_models.config import Frozen
from dod_pipeline import stages
from dod_pipeline.config import Params
from dod_pipeline.ledger import current_commit
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


def read(experiment: str) -> Champion:
    """The file of an experiment; a ValueError says how to begin one."""
    path = CHAMPIONS / f"{experiment}.json"
    if not path.is_file():
        raise ValueError(f"{path}: {experiment} has no champion yet; `dod champion {experiment} --set CHECKPOINT`")
    return Champion.load(str(path))


def find(experiment: str) -> Champion | None:
    """The same, or None."""
    return read(experiment) if (CHAMPIONS / f"{experiment}.json").is_file() else None


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
    with turn(f"champion-{experiment}"):
        return add(experiment, Event.model_validate(values | {"commit": current_commit()}))


def roll_back(experiment: str, *, why: str) -> Champion:
    """Put the champion before the present one in use again; ValueError if there is none, or its weights are gone."""
    with turn(f"champion-{experiment}"):
        known = reigns(read(experiment).history)
        if len(known) == 1:
            raise ValueError(
                f"{CHAMPIONS / experiment}.json: {known[0].checkpoint} is the first champion, there is none to go "
                f"back to; `dod champion {experiment} --set CHECKPOINT` puts another one in use"
            )
        before = known[-2]
        check_weights(before)
        now = {"time": datetime.now(UTC), "event": "rolled back", "why": why, "verdict": None, "data": None}
        return add(experiment, before.model_copy(update=now | {"commit": current_commit()}))


def add(experiment: str, event: Event) -> Champion:
    """Append an event. The caller has the turn."""
    known = find(experiment)
    history = (*(known.history if known else ()), event)
    written = Champion(experiment=experiment, champion=reigns(history)[-1], history=history)
    artifact.write_json(CHAMPIONS / f"{experiment}.json", written.model_dump(mode="json"))
    return written
