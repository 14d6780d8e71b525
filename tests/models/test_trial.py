import json

import pytest

from dod_models import artifact
from dod_models.checkpoint import weights_file
from dod_models.codec import Codec
from dod_models.evaluator import Evaluator
from dod_models.sample import Samples
from dod_models.trial import TrialConfig, block_seed, build_trial

from . import tiny


def trial(pipeline, out, *, block=0, seed=0):
    stages = {"stage1": tiny.SAMPLING | {"seed": seed}, "stage2": tiny.GUIDED | {"seed": seed}}
    config = TrialConfig.model_validate({"block": block, "num_samples": 72, **stages})
    inputs = {name: pipeline.root / name for name in ("reference", "codec")}
    return build_trial(config, checkpoint=pipeline.checkpoint, **inputs, out=out)


def test_a_block_is_what_the_stages_give_under_its_seed(pipeline, tmp_path):
    """To the bit, and so every checkpoint's block has the same noise and labels."""
    found = trial(pipeline, tmp_path / "trial.json", block=3, seed=5)
    seeded = {"seed": block_seed(5, 3), "num_samples": 72}
    facts, model = tmp_path / "facts.json", {"checkpoint": pipeline.checkpoint, "codec": pipeline.root / "codec"}
    first, second = ({"state": tmp_path / "state" / name} for name in ("stage1", "stage2"))
    tiny.stage("stage1", tiny.SAMPLING | seeded, tmp_path / "stage1", facts, **model, **first)
    previous = {"previous": tmp_path / "stage1"}
    tiny.stage("stage2", tiny.GUIDED | seeded, tmp_path / "stage2", facts, **model, **previous, **second)
    evaluator, codec = Evaluator.load(pipeline.root / "reference"), Codec.load(pipeline.root / "codec")
    for name in ("stage1", "stage2"):
        latents = Samples.load(tmp_path / name).latents
        scored = evaluator.score(evaluator.gathered(codec, latents, 72, name=name))
        assert found["scores"][name].keys() == {"fid", "num_samples", "evaluations"}
        assert found["scores"][name]["fid"] == scored["fid"]
    assert found["scores"]["stage2"]["evaluations"] == 2 + 4
    assert json.loads((tmp_path / "trial.json").read_text()) == found


def test_a_block_says_what_it_was_measured_on(pipeline, tmp_path):
    found = trial(pipeline, tmp_path / "trial.json")
    files = artifact.read_json(pipeline.checkpoint / artifact.MANIFEST)["files"]
    weights = files[weights_file(tiny.SAMPLING["ema_decay"])]["sha256"]
    assert found["weights"] == {"stage1": weights, "stage2": weights}
    for name in ("reference", "codec"):
        assert found[name] == artifact.sha256_file(pipeline.root / name / artifact.MANIFEST)
    assert [path.name for path in tmp_path.iterdir()] == ["trial.json"]  # no samples are kept


def test_blocks_have_seeds_of_their_own():
    seeds = [block_seed(seed, block) for seed in range(20) for block in range(20)]
    assert len({*seeds, *range(20)}) == 420
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert block_seed(0, 0) == 8578478169413579488  # written down: a change would mix old blocks with new ones


@pytest.mark.parametrize("change", [{"block": -1}, {"num_samples": 0}, {"steps": 3}])
def test_a_senseless_block_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        TrialConfig.parse({"block": 0, "num_samples": 70, "stage1": {}, "stage2": {}} | change, place="here")
