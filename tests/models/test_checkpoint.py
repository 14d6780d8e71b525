from typing import Any

import pytest
import torch

from dod_models.artifact import DamagedError
from dod_models.checkpoint import load_checkpoint, load_state, save_checkpoint, save_state

from . import tiny


@pytest.fixture
def saved(tmp_path):
    model = tiny.random_model(tiny.config())
    weights: dict[str, torch.Tensor] = dict(model.named_parameters())
    halved = {name: w / 2 for name, w in weights.items()}
    folder = tmp_path / "step-8"
    save_checkpoint(folder, {0.999: weights, 0.9999: halved}, model.config, about={"step": 8})
    return folder, model


def test_loading_gives_back_the_weights_of_the_decay(saved):
    folder, model = saved
    whole, manifest = load_checkpoint(folder, decay=0.999)
    half, _ = load_checkpoint(folder, decay=0.9999)
    for name, p in model.named_parameters():
        assert torch.equal(whole.get_parameter(name), p)
        assert torch.equal(half.get_parameter(name), p / 2)
    assert whole.config == model.config
    assert (manifest["about"]["step"], manifest["about"]["decays"]) == (8, [0.999, 0.9999])
    assert not whole.training
    assert not any(p.requires_grad for p in whole.parameters())


def test_equal_weights_make_equal_files(saved, tmp_path):
    folder, model = saved
    weights: dict[str, torch.Tensor] = dict(model.named_parameters())
    halved = {name: w / 2 for name, w in weights.items()}
    save_checkpoint(tmp_path / "again", {0.999: weights, 0.9999: halved}, model.config, about={"step": 8})
    assert tiny.digests(tmp_path / "again") == tiny.digests(folder)


def test_an_unknown_decay_lists_the_known_ones(saved):
    with pytest.raises(ValueError, match=r"step-8: no weights averaged with decay 0.9; it has \[0.999, 0.9999\]"):
        load_checkpoint(saved[0], decay=0.9)


def test_a_changed_byte_is_refused_and_its_file_named(saved):
    folder, _ = saved
    path = folder / "ema-0.999.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"step-8/ema-0.999.safetensors: sha256 is"):
        load_checkpoint(folder, decay=0.999)
    load_checkpoint(folder, decay=0.9999)  # the other file is sound


def states(root, *steps: int):
    for step in steps:
        save_state(root, step, {"w": torch.full((3,), float(step))}, config="", about={"curve": [step]})


def resumed(root) -> Any:
    return load_state(root)


def test_the_newest_state_is_found_and_two_are_kept(tmp_path):
    states(tmp_path, 2, 4, 10)
    tensors, about = resumed(tmp_path)
    assert tensors["w"].tolist() == [10, 10, 10]
    assert about == {"curve": [10], "step": 10}
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000000004", "step-000000010"]


def test_damaged_states_of_later_steps_crowd_no_sound_one_out(tmp_path):
    states(tmp_path, 20, 30)
    for damaged in tmp_path.glob("step-*/state.safetensors"):
        damaged.write_bytes(b"")
    assert resumed(tmp_path) is None
    states(tmp_path, 4, 6)
    assert resumed(tmp_path)[1]["step"] == 6
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000000004", "step-000000006"]


@pytest.mark.parametrize("damage", ["truncated", "emptied", "no manifest"])
def test_a_damaged_state_is_named_and_the_one_before_used(tmp_path, caplog, damage):
    states(tmp_path, 2, 4)
    newest = tmp_path / "step-000000004"
    if damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        data = (newest / "state.safetensors").read_bytes()
        (newest / "state.safetensors").write_bytes(data[:-4] if damage == "truncated" else b"")
    tensors, about = resumed(tmp_path)
    assert tensors["w"].tolist() == [2, 2, 2]
    assert about["step"] == 2
    assert f"resume state passed over: {newest}" in caplog.text


def test_without_a_sound_state_there_is_none(tmp_path):
    assert load_state(tmp_path / "nowhere") is None
    states(tmp_path, 2)
    (tmp_path / "step-000000002" / "state.safetensors").write_bytes(b"")
    assert load_state(tmp_path) is None


def test_a_state_half_written_is_not_found(tmp_path):
    states(tmp_path, 2)
    (tmp_path / ".step-000000004.partial").mkdir()
    assert resumed(tmp_path)[1]["step"] == 2
