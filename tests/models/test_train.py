import json
import math
import shutil

import pytest
import torch
from accelerate import Accelerator

from dod_models import artifact, train
from dod_models.checkpoint import SCHEMA as CHECKPOINT_SCHEMA
from dod_models.checkpoint import load_checkpoint
from dod_models.data import LatentShards, TrainingDraws
from dod_models.state import TrainConfig, TrainState
from dod_models.train import check_shapes, draw_share, fit, train_step

from . import tiny

CONFIG = TrainConfig.model_validate(tiny.TRAIN)


def step(state: TrainState, shards: LatentShards) -> float:
    """The next step's loss, of one process."""
    draw = draw_share(state.step, config=state.config, shards=shards, rank=0, processes=1)
    return train_step(state, draw)[0].item()


class KilledError(BaseException):
    """What a signal would do: no `except Exception` sees it."""


def run(pipeline, root, *, config: TrainConfig = CONFIG):
    return fit(config, latents=pipeline.latents, out=root / "train", state=root / "state")


def kill_at(monkeypatch, step: int, name: str = "train_step"):
    """Raise in the `step`th call of train's function `name`, before it does anything."""
    real, calls = getattr(train, name), list[None]()

    def killed(*args, **options):
        calls.append(None)
        if len(calls) == step:
            raise KilledError
        return real(*args, **options)

    monkeypatch.setattr(train, name, killed)


def interrupted(pipeline, root, monkeypatch, *, step: int, name: str = "train_step"):
    with monkeypatch.context() as patch:
        kill_at(patch, step, name)
        with pytest.raises(KilledError):
            run(pipeline, root)


def states(root) -> list[str]:
    return sorted(p.name for p in root.glob("state/*/resume/step-*"))


@pytest.mark.parametrize("step", [1, 2, 3, 5, 6, 8])
def test_resuming_changes_no_bit(pipeline, tmp_path, monkeypatch, caplog, step):
    interrupted(pipeline, tmp_path, monkeypatch, step=step)
    assert not (tmp_path / "train").exists()
    facts = run(pipeline, tmp_path)
    resumed = 2 * ((step - 1) // 2)
    assert (f"train: going on from step {resumed}\n" in caplog.text) == (resumed > 0)
    assert tiny.digests(tmp_path / "train") == tiny.digests(pipeline.train)
    assert facts == pipeline.facts["train"]


def test_finished_work_stays_until_the_next_training_begins(pipeline, tmp_path, caplog):
    """Nobody may have recorded the output yet: a run that is repeated at once does not train again."""
    run(pipeline, tmp_path)
    shutil.rmtree(tmp_path / "train")
    caplog.clear()
    assert run(pipeline, tmp_path) == pipeline.facts["train"]
    assert "train: going on from step 8\n" in caplog.text
    assert tiny.digests(tmp_path / "train") == tiny.digests(pipeline.train)


@pytest.mark.parametrize(
    ("name", "call"), [("save_checkpoint", 1), ("save_state", 2), ("save_checkpoint", 2), ("save_state", 4)]
)
def test_being_killed_while_saving_changes_no_bit(pipeline, tmp_path, monkeypatch, name, call):
    interrupted(pipeline, tmp_path, monkeypatch, step=call, name=name)
    run(pipeline, tmp_path)
    assert tiny.digests(tmp_path / "train") == tiny.digests(pipeline.train)


def test_many_interruptions_change_no_bit(pipeline, tmp_path, monkeypatch):
    for _ in range(3):
        interrupted(pipeline, tmp_path, monkeypatch, step=4)  # every run reaches one state more
    assert states(tmp_path) == ["step-000000004", "step-000000006"]
    run(pipeline, tmp_path)
    assert tiny.digests(tmp_path / "train") == tiny.digests(pipeline.train)


def test_a_damaged_state_costs_steps_and_no_bit(pipeline, tmp_path, monkeypatch, caplog):
    interrupted(pipeline, tmp_path, monkeypatch, step=7)
    newest = next(tmp_path.glob("state/*/resume/step-000000006"))
    (newest / "state.safetensors").write_bytes(b"damaged")
    run(pipeline, tmp_path)
    out = caplog.text
    assert f"resume state passed over: {newest}/state.safetensors" in out
    assert "train: going on from step 4" in out
    assert tiny.digests(tmp_path / "train") == tiny.digests(pipeline.train)


def lose_checkpoint(root):
    shutil.rmtree(next(root.glob("state/*/out/step-4")))


def test_a_lost_checkpoint_is_made_again(pipeline, tmp_path, monkeypatch, caplog):
    interrupted(pipeline, tmp_path, monkeypatch, step=7)
    lose_checkpoint(tmp_path)
    run(pipeline, tmp_path)
    assert "train: starting again, for the state of step 6 lacks a checkpoint" in caplog.text
    assert tiny.digests(tmp_path / "train") == tiny.digests(pipeline.train)


def test_a_run_that_starts_again_can_itself_be_resumed(pipeline, tmp_path, monkeypatch, caplog):
    interrupted(pipeline, tmp_path, monkeypatch, step=7)
    lose_checkpoint(tmp_path)
    interrupted(pipeline, tmp_path, monkeypatch, step=4)
    caplog.clear()
    run(pipeline, tmp_path)
    assert "train: going on from step 2" in caplog.text
    assert tiny.digests(tmp_path / "train") == tiny.digests(pipeline.train)


def test_another_config_does_not_go_on_from_this_one_s_state(pipeline, tmp_path, monkeypatch, caplog):
    interrupted(pipeline, tmp_path, monkeypatch, step=7)
    run(pipeline, tmp_path, config=CONFIG.model_copy(update={"seed": 1}))
    assert "going on" not in caplog.text
    assert tiny.digests(tmp_path / "train") != tiny.digests(pipeline.train)


def test_a_second_trainer_of_the_same_output_is_refused(pipeline, tmp_path):
    key = f"{CONFIG.digest[:16]}-{LatentShards(pipeline.latents).digest[:16]}"
    work = tmp_path / "state" / key / "out"
    with artifact.locked(work), pytest.raises(BlockingIOError, match="another process"):
        run(pipeline, tmp_path)


def test_the_output_holds_checkpoints_and_the_curve_and_no_work_in_progress(pipeline):
    files = artifact.verify(pipeline.train, schema=train.SCHEMA)["files"]
    weights = {f"step-{step}/ema-{decay}.safetensors" for step in (4, 8) for decay in (0.5, 0.9)}
    assert set(files) == {"curve.jsonl", "ledger.jsonl", "step-4/manifest.json", "step-8/manifest.json", *weights}
    for step in (4, 8):
        about = artifact.verify(pipeline.train / f"step-{step}", schema=CHECKPOINT_SCHEMA)["about"]
        assert (about["step"], about["steps"], about["seed"]) == (step, 8, 0)
        assert about["latents"] == LatentShards(pipeline.latents).digest


def test_the_curve_averages_the_steps_of_each_row(pipeline):
    rows = [json.loads(line) for line in (pipeline.train / "curve.jsonl").read_text().splitlines()]
    state, shards = TrainState(CONFIG, Accelerator()), LatentShards(pipeline.latents)
    losses = [step(state, shards) for _ in range(8)]
    assert [row["loss"] for row in rows] == pytest.approx([(losses[i] + losses[i + 1]) / 2 for i in (0, 2, 4, 6)])
    assert [(row["step"], row["samples"]) for row in rows] == [(2, 16), (4, 32), (6, 48), (8, 64)]
    assert rows[-1] == pipeline.facts["train"]


def test_checkpoints_hold_the_averages_of_the_weights_at_their_step(pipeline):
    state, shards = TrainState(CONFIG, Accelerator()), LatentShards(pipeline.latents)
    expected = {d: {name: p.detach().double() for name, p in state.raw.named_parameters()} for d in CONFIG.ema_decays}
    for number in range(8):
        step(state, shards)
        for decay, weights in expected.items():
            used = min(decay, (1 + number) / (10 + number))  # the warm-up
            for name, p in state.raw.named_parameters():
                weights[name] = used * weights[name] + (1 - used) * p.detach().double()
        if number + 1 in (4, 8):
            for decay, weights in expected.items():
                model, _ = load_checkpoint(pipeline.train / f"step-{number + 1}", decay=decay)
                for name, p in model.named_parameters():
                    torch.testing.assert_close(p.double(), weights[name], rtol=0, atol=1e-6)


@pytest.fixture
def randomized(pipeline):
    """A state whose model has random weights: a fresh one's output is zero whatever goes in."""
    state = TrainState(CONFIG, Accelerator())
    other = tiny.random_model(CONFIG.model)
    with torch.no_grad():
        for p, q in zip(state.raw.parameters(), other.parameters(), strict=True):
            p.copy_(q)
    return state, other, LatentShards(pipeline.latents)


def test_the_loss_is_the_paper_s(randomized):
    """|| v(x_t, t | label, LEM(z0) or S) - (data - noise) ||^2, sample by sample, prior and target from one draw."""
    state, model, shards = randomized
    state.step = 5
    loss = step(state, shards)
    draw = TrainingDraws(shards, range(40, 48), seed=0, label_drop=0.1, prior_drop=0.5, exact_share=False)
    assert 0 < len(draw.keep) < 8
    errors = []
    with torch.no_grad():
        for i in range(8):
            z, noise, label = draw.latents[i : i + 1], draw.noise[i : i + 1], draw.labels[i : i + 1]
            t = 1 / (1 + torch.exp(-draw.normal[i : i + 1]))
            sample = model.embed_sample(z) if i in draw.keep else None
            v = model.velocity(t.item() * z + (1 - t.item()) * noise, t, label, sample)
            errors.append((v - (z - noise)).square().mean().item())
    assert loss == pytest.approx(sum(errors) / 8, rel=1e-5)


def test_the_learning_rate_warms_up_linearly_and_then_stays(randomized):
    """Adam's first step moves every weight that has a clear gradient by the learning rate, whatever the clipping."""
    state, model, shards = randomized
    step(state, shards)
    moved = max((p - q).abs().max().item() for p, q in zip(state.raw.parameters(), model.parameters(), strict=True))
    assert moved == pytest.approx(3e-3 / 3, rel=1e-2)
    rates = [state.optimizer.param_groups[0]["lr"]]
    for _ in range(4):
        step(state, shards)
        rates.append(state.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3, 3e-3])


def test_gradients_are_clipped_to_their_norm(randomized):
    state, _, shards = randomized
    step(state, shards)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in state.raw.parameters()))
    assert norm == pytest.approx(CONFIG.clip, rel=1e-3)


def test_the_state_s_tensors_restore_it(randomized):
    state, _, shards = randomized
    step(state, shards)
    other = TrainState(CONFIG, Accelerator())
    other.restore({name: t.clone() for name, t in state.tensors().items()}, 1)
    assert step(state, shards) == step(other, shards)
    first, second = state.tensors(), other.tensors()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_lowers_the_loss(pipeline, tmp_path):
    """A fresh model predicts zero: its loss is E|data - noise|^2, about 2 for latents of unit spread."""
    changes = {
        "steps": 60,
        "save_every": 60,
        "state_every": 60,
        "log_every": 10,
        "batch_size": 32,
        "learning_rate": 1e-2,
    }
    last = run(pipeline, tmp_path, config=TrainConfig.model_validate({**tiny.TRAIN, **changes}))
    first = json.loads((tmp_path / "train" / "curve.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(2, abs=0.4)
    assert last["loss"] < 0.9 * first["loss"]


def test_a_diverging_training_is_an_error_that_names_step_and_remedy(pipeline, tmp_path):
    config = TrainConfig.model_validate({**tiny.TRAIN, "learning_rate": 1e30, "warmup_steps": 0})
    with pytest.raises(FloatingPointError, match=r"norm (nan|inf) at step \d, samples \d+ to"):
        run(pipeline, tmp_path, config=config)
    assert not (tmp_path / "train").exists()
    assert states(tmp_path) == []  # nothing to resume from


def test_too_little_memory_is_an_error_that_names_the_settings(pipeline, tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(train, "train_step", full)
    with pytest.raises(ValueError, match=r"train: CUDA out of memory. Tried to allocate 2.00 GiB. Set .*micro_batch"):
        run(pipeline, tmp_path)


def changed(**model):
    return TrainConfig.model_validate({**tiny.TRAIN, "model": {**tiny.MODEL, **model}})


@pytest.mark.parametrize(
    ("config", "processes", "message"),
    [
        (changed(latent_size=8), 1, r"latents are \(4, 4, 4\), model.channels and model.latent_size say \(4, 8, 8\)"),
        (changed(channels=3), 1, r"latents are \(4, 4, 4\), .* say \(3, 4, 4\)"),
        (changed(num_classes=10), 1, r"latents have 3 classes, model.num_classes is 10"),
        (CONFIG, 3, r"batch_size 8 is not a multiple of the 3 processes"),
    ],
)
def test_what_does_not_fit_together_is_refused(pipeline, config, processes, message):
    with pytest.raises(ValueError, match=message):
        check_shapes(config, LatentShards(pipeline.latents), processes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_every": 3}, "state_every 3 is not a multiple of log_every 2"),
        ({"save_every": 5}, "save_every 5 is not a multiple of log_every 2"),
        ({"steps": 10}, "steps 10 is not a multiple of save_every 4"),
        ({"label_drop": 1.5}, "label_drop"),
    ],
)
def test_a_schedule_that_does_not_come_out_even_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate({**tiny.TRAIN, **changes})
