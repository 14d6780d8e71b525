"""params.yaml as a whole: what is wrong is named with its place, its value and the remedy."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from dod_pipeline import cli, config, stages
from dod_pipeline.config import Params, load_params

from .project import SOURCE, params


@pytest.fixture
def values() -> dict[str, Any]:
    return params(Path("/images"))


def inner(values: dict[str, Any], place: str) -> dict[str, Any]:
    """The mapping at a dotted place."""
    for name in place.split(".") if place else []:
        values = values[name]
    return values


def complaint(values: dict[str, Any]) -> str:
    """What loading says."""
    with pytest.raises(ValueError) as caught:
        Params.parse(values, place="params.yaml")
    return str(caught.value)


PLACES = ("", "datasets.tiny", "experiments.tiny", "checkpoints.tiny-6", "sweeps.tiny-6")
SETTINGS = {
    "dataset": "datasets.tiny.dataset",
    "reference": "datasets.tiny.reference",
    "codec": "datasets.tiny.codec",
    "latents": "datasets.tiny.latents",
    "train": "experiments.tiny.train",
    "stage1": "experiments.tiny.stage1",
    "stage2": "experiments.tiny.sampling",
    "metrics": "experiments.tiny.evaluation",
}


def test_the_repository_s_own_params_hold_for_every_stage():
    loaded = load_params(SOURCE / "params.yaml")
    for stage in stages.ORDER:
        for key in stages.keys_of(loaded, stage):
            assert stages.resolve(loaded, stage, key).arguments()[0] == stage


# What the paper's sections 3.2, 3.3 and 4.1 state for all three models.
PAPER: dict[str, dict[str, Any]] = {
    "train": {
        "batch_size": 256,
        "learning_rate": 1e-4,
        "warmup_steps": 0,
        "prior_drop": 0.5,
        "prior_share": "bernoulli",
        "ema_warmup": False,
    },
    "stage1": {"num_samples": 50_000, "solver": "dopri5", "guidance": 1.0, "ema_decay": 0.999},
    "stage2": {"num_samples": 50_000, "solver": "dopri5", "ema_decay": 0.999},
    "metrics": {"num_samples": 50_000},
}
# Layers, width and heads of the backbone, width and heads of the LEM (Table 1), guidance of stage 2, steps of Table 5.
MODELS = {
    "dod-s": ((12, 384, 6), (384, 6), 5.5, (400_000, 1_000_000, 1_500_000)),
    "dod-b": ((12, 768, 12), (768, 12), 5.5, (400_000, 1_000_000, 1_500_000)),
    "dod-xl": ((28, 1152, 16), (768, 12), 3.5, (400_000, 1_000_000)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_paper_s_experiments_have_its_settings(name: str):
    loaded = load_params(SOURCE / "params.yaml")
    backbone, lem, guidance, steps = MODELS[name]
    checkpoints = loaded.checkpoints_of(name)
    assert tuple(item.step for item in checkpoints.values()) == steps
    train = stages.resolve(loaded, "train", name).config.model_dump()
    assert train["steps"] == steps[-1] and 0.9999 in train["ema_decays"]
    model, inner = train["model"], train["model"]["lem"]
    assert (model["depth"], model["width"], model["heads"]) == backbone
    assert (inner["width"], inner["heads"]) == lem
    assert [model[key] for key in ("latent_size", "channels", "patch", "num_classes")] == [32, 4, 2, 1000]
    shape = [inner[key] for key in ("encoder_depth", "decoder_depth", "num_tokens", "token_width")]
    assert shape == [8, 4, 32, 16]
    for key in checkpoints:
        for stage, stated in PAPER.items():
            found = train if stage == "train" else stages.resolve(loaded, stage, key).config.model_dump()
            assert found.items() >= stated.items(), stage
        assert stages.resolve(loaded, "stage2", key).config.model_dump()["guidance"] == guidance
    latents = stages.resolve(loaded, "latents", loaded.experiments[name].data).config.model_dump()
    assert latents["mirror"]


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_key_is_named_with_its_place(values: dict[str, Any], place: str):
    inner(values, place)["stpes"] = 3
    assert f"params.yaml: {place}{'.' if place else ''}stpes: unknown key; remove it" in complaint(values)


@pytest.mark.parametrize("place", [*PLACES[1:], "experiments"])
def test_a_missing_key_is_named_with_its_place(values: dict[str, Any], place: str):
    target = inner(values, place if place != "experiments" else "")
    gone = "experiments" if place == "experiments" else next(iter(target))
    del target[gone]
    assert f"{gone}: missing; add it" in complaint(values)


@pytest.mark.parametrize("stage", SETTINGS)
def test_an_unknown_setting_is_named_with_its_stage(values: dict[str, Any], stage: str):
    inner(values, SETTINGS[stage])["num_setps"] = 3
    loaded = Params.parse(values, place="params.yaml")
    key = stages.keys_of(loaded, stage)[0]
    with pytest.raises(ValueError, match=rf"params\.yaml: {stage} of {key}: num_setps: unknown key"):
        stages.resolve(loaded, stage, key)


def test_an_unknown_setting_inside_the_model_is_named(values: dict[str, Any]):
    values["experiments"]["tiny"]["train"]["model"]["lem"]["tokens"] = 3
    with pytest.raises(ValueError, match=r"train of tiny: model\.lem\.tokens: unknown key"):
        stages.resolve(Params.parse(values, place="params.yaml"), "train", "tiny")


@pytest.mark.parametrize(
    "bad", ["a; rm -rf x", "$(reboot)", "a b", "../up", "-n", "", "a/b", "a@b", "v1.5", "é", "a\n", "`x`"]
)
@pytest.mark.parametrize("mapping", ["datasets", "experiments", "checkpoints", "sweeps"])
def test_a_key_that_a_shell_or_a_path_would_take_amiss_is_refused(values: dict[str, Any], mapping: str, bad: str):
    values[mapping][bad] = next(iter(values[mapping].values()))
    assert "should match pattern" in complaint(values)


def test_a_checkpoint_of_an_unknown_experiment_lists_what_there_is(values: dict[str, Any]):
    values["checkpoints"]["tiny-6"]["experiment"] = "tony"
    assert "checkpoints.tiny-6.experiment: 'tony' is not one of experiments: ['tiny']" in complaint(values)


def test_an_experiment_on_unknown_data_lists_what_there_is(values: dict[str, Any]):
    values["experiments"]["tiny"]["data"] = "mnits"
    assert "experiments.tiny.data: 'mnits' is not one of datasets: ['tiny']" in complaint(values)


def test_a_checkpoint_s_data_is_its_experiment_s(values: dict[str, Any]):
    values["datasets"]["other"] = values["datasets"]["tiny"]
    values["checkpoints"]["tiny-6"]["data"] = "other"
    assert "checkpoints.tiny-6.data: is 'other', its experiment's data is 'tiny'" in complaint(values)


@pytest.mark.parametrize("step", [1, 5, 8])
def test_a_step_that_is_never_saved_is_refused(values: dict[str, Any], step: int):
    values["checkpoints"]["tiny-6"]["step"] = step
    assert f"checkpoints.tiny-6.step: {step} is never saved: tiny saves every 2 steps up to 6" in complaint(values)


def test_a_sweep_belongs_to_a_checkpoint(values: dict[str, Any]):
    values["sweeps"]["tiny-4"] = values["sweeps"]["tiny-6"] | {"step": 4}
    assert "sweeps.tiny-4: experiment and step are not those of checkpoints.tiny-4" in complaint(values)


def test_a_sweep_at_another_step_than_its_checkpoint_is_refused(values: dict[str, Any]):
    values["sweeps"]["tiny-6"]["step"] = 4
    assert "sweeps.tiny-6: experiment and step are not those of checkpoints.tiny-6" in complaint(values)


def test_what_is_not_yaml_is_named_with_its_line(tmp_path: Path):
    (tmp_path / "params.yaml").write_text("datasets:\n  a: [1, 2\nb: 3\n")
    with pytest.raises(ValueError, match=r"params\.yaml: not YAML: (.|\n)*line 3"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["", "- 1\n", "just words\n"])
def test_yaml_that_is_no_mapping_is_refused(tmp_path: Path, text: str):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"params\.yaml: \(the whole\): "):
        load_params(tmp_path / "params.yaml")


def test_a_missing_file_says_where_dod_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/params\.yaml: not found; run dod in the folder"):
        load_params()


def test_an_unknown_experiment_stage_or_key_lists_what_there_is(values: dict[str, Any]):
    loaded = Params.parse(values, place="params.yaml")
    with pytest.raises(ValueError, match=r"experiment 'tony' is not in params.yaml; it has tiny"):
        stages.instances(loaded, "tony", "metrics")
    with pytest.raises(
        ValueError, match=r"--until 'metric' is unknown; choose one of dataset, .*metrics, sweeps, report"
    ):
        stages.instances(loaded, "tiny", "metric")
    with pytest.raises(ValueError, match="stage 'trian' is unknown; choose one of dataset"):
        stages.check_key(loaded, "trian", "tiny")
    with pytest.raises(ValueError, match=r"train: key 'tiny-6' is not in params.yaml; it has tiny"):
        stages.check_key(loaded, "train", "tiny-6")


def test_an_experiment_s_stages_are_its_own_and_in_order(values: dict[str, Any]):
    values["experiments"]["other"] = values["experiments"]["tiny"]
    values["checkpoints"]["other-2"] = {"experiment": "other", "data": "tiny", "step": 2}
    values["checkpoints"]["tiny-2"] = {"experiment": "tiny", "data": "tiny", "step": 2}
    found = stages.instances(Params.parse(values, place="params.yaml"), "tiny", "report")
    shared = [(stage, "tiny") for stage in ("dataset", "reference", "codec", "latents", "train")]
    own = [(stage, key) for stage in ("stage1", "stage2", "metrics") for key in ("tiny-2", "tiny-6")]
    assert found == [*shared, *own, ("sweeps", "tiny-6"), ("report", "tiny")]


@pytest.mark.parametrize("place", ["datasets", "experiments", "checkpoints"])
def test_keys_that_dagster_cannot_tell_apart_are_refused(values: dict[str, Any], place: str):
    (item,) = values[place].values()
    values[place] |= {"v1-5": item, "v1_5": item}
    with pytest.raises(ValueError, match=rf"{place}: 'v1-5' and 'v1_5' differ in punctuation alone"):
        Params.parse(values, place="params.yaml")


def test_compute_reaches_training_and_changes_no_digest(values: dict[str, Any]):
    """No stage's params in dvc.yaml hold it either: test_dvc_yaml.py."""
    before = {s: stages.resolve(Params.parse(values, place=""), s, "tiny").config.digest for s in ("train", "report")}
    values["experiments"]["tiny"]["compute"] = {"micro_batch": 2, "sharding": "fsdp"}
    params = Params.parse(values, place="")
    assert {s: stages.resolve(params, s, "tiny").config.digest for s in before} == before
    config = stages.resolve(params, "train", "tiny").config
    assert config.model_dump()["compute"] | {"micro_batch": 2, "sharding": "fsdp"} == config.model_dump()["compute"]
    values["experiments"]["tiny"]["compute"]["micro_bath"] = 2
    with pytest.raises(ValueError, match=r"params.yaml: train of tiny: compute.micro_bath: unknown key"):
        stages.resolve(Params.parse(values, place=""), "train", "tiny")


def test_the_deployment_changes_no_digest(values: dict[str, Any]):
    before = {s: stages.resolve(Params.parse(values, place=""), s, "tiny").config.digest for s in ("train", "report")}
    values["deployment"] = {"storage": {"push": "each"}, "versioning": {"git_commit": True}}
    params = Params.parse(values, place="")
    assert {s: stages.resolve(params, s, "tiny").config.digest for s in before} == before
    for name, value in {"push": "often", "push_of": {"latents": "often"}}.items():
        values["deployment"]["storage"] = {name: value}
        assert f"params.yaml: deployment.storage.{name}" in complaint(values)


def test_a_place_in_s3_stands_alone_or_with_what_belongs_to_it(values: dict[str, Any]):
    found = {}
    for given in ({}, "s3://bucket/team/", {"url": "s3://bucket", "push": "end", "endpoint": "http://host:8333"}):
        values["deployment"] = {"storage": given}
        one = Params.parse(values, place="").deployment.storage
        found[one.url] = (one.push, one.endpoint)
    assert found == {
        None: ("never", None),
        "s3://bucket/team": ("each", None),
        "s3://bucket": ("end", "http://host:8333"),
    }


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("s3://bucket/../other", "storage.url: s3://bucket/../other: not of the form s3://BUCKET/PREFIX"),
        ("/data", "storage.url: not of the form s3://BUCKET/PREFIX"),
        ({"url": "s3://bucket", "secret_access_key": "x"}, "storage.secret_access_key: unknown key"),
        ({"url": "s3://bucket", "endpoint": "host:8333"}, "storage.endpoint: not of the form http://HOST:PORT"),
        ({"endpoint": "http://host:8333"}, "storage: endpoint: of no use without url"),
    ],
)
def test_a_place_that_is_none_is_refused(values: dict[str, Any], storage: Any, said: str):
    values["deployment"] = {"storage": storage}
    assert f"params.yaml: deployment.{said}" in complaint(values)


@pytest.mark.parametrize("secret", ["user:hush", "user:hu/sh", "hush"])
def test_an_endpoint_with_a_secret_is_refused_and_the_secret_is_not_repeated(values: dict[str, Any], secret: str):
    values["deployment"] = {"storage": {"url": "s3://bucket", "endpoint": f"https://{secret}@host"}}
    said = complaint(values)
    assert "deployment.storage.endpoint: " in said and "https://" in said and "hu" not in said


def test_the_endpoint_is_where_boto3_looks_for_it(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of this process and its children; what the environment says already goes first."""
    monkeypatch.setenv(config.ENDPOINT, "http://first:1")
    values["deployment"] = {"storage": {"url": "s3://bucket", "endpoint": "http://second:2"}}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    load_params(path)
    assert os.environ[config.ENDPOINT] == "http://first:1"
    monkeypatch.delenv(config.ENDPOINT)
    load_params(path)
    assert os.environ[config.ENDPOINT] == "http://second:2"


def test_compute_within_train_is_refused(values: dict[str, Any]):
    values["experiments"]["tiny"]["train"] = {**values["experiments"]["tiny"]["train"], "compute": {}}
    assert "params.yaml: experiments.tiny.train: compute stands beside train, not in it" in complaint(values)


def test_weights_to_sample_from_are_held_in_training(values: dict[str, Any]):
    values["experiments"]["tiny"]["stage2"]["ema_decay"] = 0.5
    assert "stage2.ema_decay: 0.5 is not one of train.ema_decays: [0.9]" in complaint(values)


def test_a_sweep_takes_of_the_evaluation_what_concerns_it(values: dict[str, Any]):
    values["experiments"]["tiny"]["evaluation"]["shard_size"] = 20
    loaded = Params.parse(values, place="params.yaml")
    for stage in ("metrics", "sweeps"):
        assert stages.resolve(loaded, stage, "tiny-6").config.model_dump()["num_samples"] == 70


def test_only_checkpoints_of_one_reference_and_count_stand_side_by_side(values: dict[str, Any]):
    values["datasets"]["other"] = values["datasets"]["tiny"]
    values["experiments"]["other"] = values["experiments"]["tiny"] | {"data": "other"}
    for name, data in (("a", "tiny"), ("b", "tiny"), ("c", "tiny"), ("d", "other")):
        experiment = {"tiny": "tiny", "other": "other"}[data]
        values["checkpoints"][name] = {"experiment": experiment, "data": data, "step": 6}
    loaded = Params.parse(values, place="params.yaml")
    counts = {"a": 70, "b": 70, "c": 50, "d": 70}
    found = {name: {"stage2": {"num_samples": float(count)}} for name, count in counts.items()}
    assert [list(group) for group in cli.comparable(loaded, found)] == [["a", "b"]]
