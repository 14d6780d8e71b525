"""`dod retrain`: a candidate that goes on from the champion's weights on the newest images, gated, and promoted if it
is not worse. Killed in the middle, it goes on with the same candidate."""

import shutil
import sys
from pathlib import Path
from typing import Any, Literal

from dod_models import artifact
from dod_pipeline import candidates, champion, dvc_git, gate, listing, runs, stages, union
from dod_pipeline.champion import VAE, Champion
from dod_pipeline.config import PARAMS_FILE, Params, load_params
from dod_pipeline.turns import turn

PINNED = Path("pinned")  # codecs that are kept


def retrain(experiment: str, *, if_changed: bool = False) -> gate.Verdict | None:
    """The gate's verdict on a new candidate, or on the one that was begun; its consequence is written down.

    None if asked to begin one only for images on which nothing was decided yet, and there are none.
    """
    with turn(f"retrain-{experiment}"):
        params, incumbent = load_params(), champion.read(experiment)
        champion.check_fits(params, experiment, incumbent.champion.checkpoint)
        champion.check_weights(incumbent.champion)
        key = params.experiments[experiment].data
        images, _ = listing.update(key, params.datasets[key])
        one = candidates.pending(params, experiment, incumbent)
        if one is None and if_changed and images.sha256 == incumbent.data:
            return None
        check_codec(params, key, incumbent, images.sha256)
        if one is None:
            one = candidates.add(experiment, incumbent)
            commit(params, [str(PARAMS_FILE), "listings"], f"Candidate {one.checkpoint}")  # or its records are "-dirty"
            print(f"candidate {one.checkpoint}, from the weights of {incumbent.champion.checkpoint}", flush=True)
        else:
            print(f"going on with candidate {one.checkpoint}", flush=True)
        params = load_params()
        runs.run(params, [one.experiment], stages.LAST)
        return judge(params, experiment, one.checkpoint, images.sha256)


def judge(params: Params, experiment: str, key: str, data: str | None) -> gate.Verdict:
    """Gate a finished candidate against the champion, and write down what follows."""
    incumbent = champion.read(experiment).champion  # it may have been set anew while the candidate was trained
    champion.check_weights(incumbent)
    ours = champion.holder(params, key)
    if ours.codec != incumbent.codec:
        raise ValueError(
            f"{key} and {incumbent.checkpoint} were trained in the latents of two codecs, {ours.codec[:12]}... and "
            f"{incumbent.codec[:12]}...; {remedy(params.checkpoints[key].data)}"
        )
    union.sync()
    verdict = gate.gate(under_one_gate(params, experiment, [key, incumbent.checkpoint]), key, incumbent.checkpoint)
    gate.append(verdict)
    union.sync()
    event: Literal["promoted", "kept"] = "promoted" if verdict.verdict == "PASS" else "kept"
    why = (
        f"{verdict.verdict} against {incumbent.checkpoint}: FID {verdict.mean:+.3f}, tolerance {verdict.tolerance:.3f}"
    )
    champion.decide(experiment, event, ours, why=why, data=data, verdict=verdict.digest)
    commit(params, ["champions", "history"], f"{key}: {event}")
    return verdict


def commit(params: Params, paths: list[str], message: str) -> None:
    """Commit these, if `deployment.versioning.git_commit` says that runs do; where that fails, a warning says so."""
    if params.deployment.versioning.git_commit:
        try:
            dvc_git.commit(paths, message, root=Path())
        except OSError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)


def under_one_gate(params: Params, experiment: str, keys: list[str]) -> Params:
    """The checkpoints' experiments with the gate that this experiment has now: each of them is a retrain of it."""
    judged = {params.checkpoints[key].experiment for key in keys}
    same = {"gate": params.experiments[experiment].gate}
    changed = {name: params.experiments[name].model_copy(update=same) for name in judged}
    return params.model_copy(update={"experiments": params.experiments | changed})


def check_codec(params: Params, key: str, incumbent: Champion, data: str | None) -> None:
    """ValueError if the candidate's latents would be those of another codec than the champion's."""
    settings, used = params.datasets[key].codec, incumbent.champion
    if settings.get("source", "train") == "train" and data != incumbent.data:
        raise ValueError(
            f"datasets.{key}.codec: is trained on the images, and these have changed since {used.checkpoint} was put "
            f"in use: in another codec's latents its weights mean nothing; {remedy(key)}"
        )
    if settings.get("source") == "finished" and settings.get("sha256") != used.codec:
        raise ValueError(
            f"datasets.{key}.codec.sha256: is {settings.get('sha256')}, and {used.checkpoint} speaks the latents of "
            f"{used.codec}; pin that one, or put a checkpoint of the present codec in use"
        )


def remedy(key: str) -> str:
    """How a data set keeps its codec."""
    return f"keep one codec: `dod pin {key}` puts the present one aside and prints what to write into params.yaml"


def pin(params: Params, key: str) -> dict[str, Any]:
    """Copy a data set's finished codec into a folder that no stage writes; the settings under which it is used."""
    from dod_models.codec import SCHEMA  # late: this imports torch
    from dod_models.stable_diffusion import CONFIG, WEIGHTS

    stages.check_key(params, "codec", key)
    source = stages.paths(params, "codec", key)[1]
    manifest = artifact.verify(source, schema=SCHEMA)
    digest: str = manifest["files"][VAE.as_posix()]["sha256"]
    target = PINNED / f"{key}-{digest[:12]}"
    target.mkdir(parents=True, exist_ok=True)
    partial = target / f".{WEIGHTS}.partial"
    shutil.copyfile(source / VAE, partial)
    partial.replace(target / WEIGHTS)
    shape = artifact.read_json(source / "vae" / CONFIG)
    artifact.write_json(target / CONFIG, shape | {"scaling_factor": manifest["about"]["scale"]})
    kept = {name: value for name, value in params.datasets[key].codec.items() if name in ("image_size", "channels")}
    return {"source": "finished", "path": target.as_posix(), "sha256": digest, **kept}
