"""Under S = 0 our backbone is FiTv2: its forward from MODEL.md's table, under its own names, gives what ours gives."""

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import silu

from dod_models import artifact, cli, fitv2
from dod_models.checkpoint import load_checkpoint
from dod_models.model import DoD, ModelConfig, count_parameters

from . import tiny
from .test_model import F64, ODD, attend, from_tokens, inputs, linear, normalize, to_tokens, turn

CONFIG = ModelConfig.model_validate(ODD)
Weights = dict[str, Tensor]


def shapes(depth: int, d: int, *, classes: int, patch_dim: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of FiTv2's state dict."""
    rank, hidden = d // 4, 8 * d // 3
    layers = {
        "x_embedder.proj": (d, patch_dim),
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        "global_adaLN_modulation.1": (6 * d, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
        "final_layer.linear": (patch_dim, d),
    }
    for i in range(depth):
        layers |= {
            f"blocks.{i}.attn.qkv": (3 * d, d),
            f"blocks.{i}.attn.proj": (d, d),
            f"blocks.{i}.mlp.fc1_g": (hidden, d),
            f"blocks.{i}.mlp.fc1_x": (hidden, d),
            f"blocks.{i}.mlp.fc2": (d, hidden),
            f"blocks.{i}.adaLN_modulation.1": (rank, d),
            f"blocks.{i}.adaLN_modulation.2": (6 * d, rank),
        }
    found: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in layers.items()}
    found |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    return found | {"y_embedder.embedding_table.weight": (classes + 1, d)}


def random_weights(dtype: torch.dtype = torch.float32) -> Weights:
    """No zeros, no two tensors alike: a tensor in a wrong place changes the output."""
    rng = torch.Generator().manual_seed(3)
    sizes = shapes(CONFIG.depth, CONFIG.width, classes=CONFIG.num_classes, patch_dim=16)
    return {
        name: torch.randn(shape, generator=rng, dtype=dtype) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.5)
        for name, shape in sizes.items()
    }


def sinusoid(t: Tensor) -> Tensor:
    angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=F64) / 128)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def forward(w: Weights, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """FiTv2 in plain functions of its weights `w`."""
    d, side, head = CONFIG.width, CONFIG.latent_size // CONFIG.patch, CONFIG.width // CONFIG.heads
    time = linear(w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", sinusoid(t))))
    c = silu(time + w["y_embedder.embedding_table.weight"][labels])[:, None]
    h = linear(w, "x_embedder.proj", to_tokens(x, CONFIG.patch))
    for i in range(CONFIG.depth):
        name = f"blocks.{i}"
        modulation = linear(w, f"{name}.adaLN_modulation.2", linear(w, f"{name}.adaLN_modulation.1", c))
        modulation = modulation + linear(w, "global_adaLN_modulation.1", c)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (modulation[..., j * d : (j + 1) * d] for j in range(6))
        qkv = linear(w, f"{name}.attn.qkv", normalize(h) * (1 + scale_a) + shift_a)
        heads = []
        for j in range(CONFIG.heads):
            q, k, v = (qkv[..., part * d + j * head : part * d + (j + 1) * head] for part in range(3))
            heads.append(attend(turn(normalize(q), side), turn(normalize(k), side), v))
        h = h + gate_a * linear(w, f"{name}.attn.proj", torch.cat(heads, dim=-1))
        inner = normalize(h) * (1 + scale_m) + shift_m
        gate, value = linear(w, f"{name}.mlp.fc1_g", inner), linear(w, f"{name}.mlp.fc1_x", inner)
        h = h + gate_m * linear(w, f"{name}.mlp.fc2", silu(gate) * value)
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", c).split(d, dim=-1)
    out = linear(w, "final_layer.linear", normalize(h) * (1 + scale) + shift)
    return from_tokens(out, CONFIG.patch, CONFIG.channels, side)


def test_outputs_and_all_gradients_are_fitv2_s():
    w = {name: tensor.requires_grad_() for name, tensor in random_weights(F64).items()}
    x, z, t, labels = inputs(CONFIG, dtype=F64)
    model: Any = tiny.random_model(CONFIG, dtype=F64)
    model.time_embed.double()
    missing, unexpected = model.load_state_dict(fitv2.from_fitv2(w, CONFIG), strict=False)
    assert unexpected == []
    assert {name.split(".")[0] for name in missing} == {"sample_embed", "lem"}  # which S leaves idle

    def exactly(module, arguments):
        """Our sinusoid is in float32, a fact of test_blocks.py; the comparison goes beyond that."""
        torch.testing.assert_close(arguments[0].double(), sinusoid(t), rtol=0, atol=1e-6)
        return (sinusoid(t),)

    model.time_embed.mlp.register_forward_pre_hook(exactly)
    found, expected = model.velocity(x, t, labels), forward(w, x, t, labels)
    assert found.abs().mean() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)

    found.mul(z).sum().backward()
    expected.mul(z).sum().backward()
    gradients = {}
    for name, tensor in w.items():
        assert tensor.grad is not None and tensor.grad.any(), name
        gradients[name] = tensor.grad
    for name, gradient in fitv2.from_fitv2(gradients, CONFIG).items():
        if name != "no_sample":  # FiTv2 has no S
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=0, atol=1e-10, msg=name)


def test_every_tensor_is_used_once_and_every_parameter_under_s_is_met():
    names = [name for theirs in fitv2.sources(CONFIG.depth).values() for name in theirs]
    assert sorted(names) == sorted(random_weights())
    with torch.device("meta"):
        own = {name for name, _ in DoD(CONFIG).named_parameters() if not name.startswith(("lem.", "sample_embed."))}
    assert own == {*fitv2.sources(CONFIG.depth), "no_sample"}


def test_thirty_six_blocks_are_the_671_million_parameters_of_fitv2_xl():
    """As its authors count them; ours has S and the sample embedder besides."""
    config = ModelConfig.model_validate({"preset": "DoD-XL", "depth": 36})
    released = shapes(36, 1152, classes=1000, patch_dim=16)
    count = sum(math.prod(shape) for shape in released.values())
    assert round(count / 1e6) == 671
    with torch.device("meta"):
        model = DoD(config)
        mapped = fitv2.from_fitv2({name: torch.empty(shape) for name, shape in released.items()}, config)
    beyond = sum(p.numel() for p in model.sample_embed.parameters()) + model.no_sample.numel()
    assert count == count_parameters(model)["backbone"] - beyond == sum(p.numel() for p in mapped.values()) - 1152


# --- The command


def run(weights, out, *, model: dict[str, Any] = ODD, **options: Any) -> int:
    config = json.dumps({"model": model, **options})
    facts = out.with_suffix(".json")
    return cli.main(["fitv2", "--config", config, "--weights", str(weights), "--out", str(out), "--facts", str(facts)])


def test_a_file_of_either_format_becomes_the_same_checkpoint(tmp_path):
    w = random_weights()
    buffers = {"rel_pos_embed.freqs_h": torch.ones(2), "rel_pos_embed.freqs_w": torch.ones(2)}
    save_file(w | buffers, tmp_path / "model_ema.safetensors")
    torch.save(w, tmp_path / "model_ema.bin")
    for name in ("model_ema.safetensors", "model_ema.bin"):
        assert run(tmp_path / name, tmp_path / name.split(".")[1]) == 0
    made = tmp_path / "safetensors"
    model, manifest = load_checkpoint(made, decay=0.9999)
    assert manifest["about"]["fitv2"] == artifact.sha256_file(tmp_path / "model_ema.safetensors")
    assert manifest["about"]["left_out"] == sorted(buffers)
    facts = artifact.read_json(tmp_path / "safetensors.json")
    assert facts == {"parameters": sum(t.numel() for t in w.values()), "sha256": manifest["about"]["fitv2"]}
    state = model.state_dict()
    for name, tensor in fitv2.from_fitv2(w, CONFIG).items():
        assert torch.equal(state[name], tensor)
    weights = "ema-0.9999.safetensors"
    assert (made / weights).read_bytes() == (tmp_path / "bin" / weights).read_bytes()
    run(tmp_path / "model_ema.bin", tmp_path / "other", seed=1)  # draws what FiTv2 has not, and that alone
    other = load_checkpoint(tmp_path / "other", decay=0.9999)[0].state_dict()
    changed = {name.split(".")[0] for name, tensor in state.items() if not torch.equal(tensor, other[name])}
    assert changed == {"lem", "sample_embed"}


class Trap:
    """What a hostile file would do when it is unpickled."""

    def __reduce__(self):
        return (print, ("sprung",))


def without(name: str) -> Weights:
    return {key: tensor for key, tensor in random_weights().items() if key != name}


CASES: list[tuple[Any, dict[str, Any], str]] = [
    (without("blocks.1.mlp.fc1_x.bias"), ODD, "the file lacks blocks.1.mlp.fc1_x.bias; give"),
    (random_weights() | {"pos_embed": torch.ones(1)}, ODD, "the file has, and FiTv2 has not, pos_embed; give"),
    (random_weights(), {**ODD, "depth": 2}, "the file has 3 blocks, model.depth is 2; set it to 3"),
    (random_weights(), {**ODD, "num_classes": 6}, "y_embedder.embedding_table.weight: shape (6, 24), our "),
    (random_weights(), {**ODD, "width": 36}, "x_embedder.proj.weight: shape (24, 16), our patch_embed.weight has (36"),
    ({"model": random_weights()}, ODD, "not a state dict of tensors; save"),
    ({"x_embedder.proj.weight": Trap()}, ODD, "neither safetensors nor torch's tensors alone"),
    ({"a": torch.ones(1)}, ODD, "blocks.0.adaLN_modulation.1.bias, blocks.0.adaLN_modulation.1.weight, "),
]


@pytest.mark.parametrize(("content", "model", "message"), CASES)
def test_what_is_not_this_fitv2_is_refused_by_name(tmp_path, capsys, content, model, message):
    torch.save(content, tmp_path / "model_ema.bin")
    assert run(tmp_path / "model_ema.bin", tmp_path / "out", model=model) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"fitv2: {tmp_path}/model_ema.bin: ") and said.err.count("\n") == 1
    assert message in said.err
    assert "sprung" not in said.out
    assert not (tmp_path / "out").exists()
