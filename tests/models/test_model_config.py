import pytest

from dod_models.model import PRESETS, ModelConfig


def test_given_keys_win_over_the_preset_s_those_of_the_lem_one_by_one():
    config = ModelConfig.model_validate({"preset": "DoD-B", "depth": 15, "lem": {"num_tokens": 8}})
    assert (config.depth, config.width, config.heads) == (15, 768, 12)
    assert (config.lem.num_tokens, config.lem.width, config.lem.heads, config.lem.encoder_depth) == (8, 768, 12, 8)
    assert PRESETS["DoD-B"]["lem"] == {"width": 768, "heads": 12}  # the preset itself is untouched


def test_a_preset_and_its_values_are_one_config():
    values = {"width": 384, "depth": 12, "heads": 6, "lem": {"width": 384, "heads": 6}}
    assert ModelConfig.model_validate({"preset": "DoD-S"}).digest == ModelConfig.model_validate(values).digest


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "DoD-L"}, "preset 'DoD-L' is unknown; choose one of DoD-S, DoD-B, DoD-XL, DoD-demo"),
        ({"preset": "DoD-B", "latent_size": 31}, "latent_size 31 is not a multiple of patch 2"),
        ({"preset": "DoD-B", "heads": 7}, "width 768 / heads 7"),
        ({"preset": "DoD-B", "width": 120}, "must be a multiple of 4"),  # 10 numbers a head can't be halved into pairs
        ({"preset": "DoD-B", "lem": {"heads": 5}}, "lem.width 768 must be a multiple of 4 and of lem.heads 5"),
        ({"preset": "DoD-B", "lem": {"token_width": 6}}, "lem.token_width 6"),
        ({"preset": "DoD-B", "lem": {"tokens": 6}}, "model: lem.tokens: unknown key"),
        ({"width": 384}, "model: depth: missing"),
        ("DoD-B", "got 'DoD-B'"),
    ],
)
def test_a_config_that_cannot_work_is_refused_with_the_reason(values, message):
    with pytest.raises(ValueError) as caught:
        ModelConfig.parse(values, place="model")
    assert message in str(caught.value)
