from functools import partial

import pytest
import torch

from dod_models import cost
from dod_models.model import DoD, ModelConfig

from . import tiny


@pytest.fixture(scope="module")
def table():
    return {row["name"]: row for row in cost.table()}


@pytest.mark.parametrize(
    ("name", "backbone", "lem", "total"),
    [("DoD-S", 26.53, 21.47, 48.00), ("DoD-B", 104.96, 85.71, 190.67), ("DoD-XL", 527.13, 85.71, 612.84)],
)
def test_parameters_are_those_of_the_paper(table, name, backbone, lem, total):
    millions = {part: count / 1e6 for part, count in table[name]["params"].items()}
    assert millions == pytest.approx({"backbone": backbone, "lem": lem, "total": total}, abs=0.01)


def test_gflops_are_those_of_the_paper_s_table_4(table):
    assert table["DoD-B"]["gflops"]["paper"] == pytest.approx(
        {"stage1": 21.81, "stage2": 26.47, "lem": 24.65}, abs=0.01
    )


def test_what_the_paper_prints_is_met_but_for_stage_1_which_it_charges_as_stage_2(table):
    stated = cost.PAPER["DoD-B"]["gflops"]
    ours = table["DoD-B"]["gflops"]["paper"]
    assert ours == pytest.approx({**stated, "stage1": 21.8}, abs=0.05)
    for name, found in cost.PAPER.items():
        assert table[name]["stated"] == found
        for part, millions in found["params"].items():
            assert table[name]["params"][part] / 1e6 == pytest.approx(millions, abs=0.5)  # Table 1 rounds
    assert table["DoD-demo"]["stated"] == {"params": {}, "gflops": {}}


@pytest.mark.parametrize(
    ("size", "gflops"),
    [({"width": 1152, "depth": 36, "heads": 16}, 147), ({"width": 2304, "depth": 40, "heads": 24}, 653)],
)
def test_deeper_backbones_cost_what_fitv2_s_authors_say_of_theirs(size, gflops):
    """FiTv2-XL and FiTv2-3B in the README of whlzy/FiT."""
    with torch.device("meta"):
        model = DoD(ModelConfig.model_validate({**size, "lem": {"width": 8, "heads": 2, "encoder_depth": 1}}))
        call = partial(model.velocity, torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long))
    with torch.no_grad():
        assert round(cost.paper_gflops(model, call)) == gflops


def test_fifteen_blocks_cost_what_the_paper_says_of_fitv2():
    found = cost.describe(ModelConfig.model_validate({"preset": "DoD-B", "depth": 15}))
    assert found["gflops"]["paper"]["stage1"] == pytest.approx(27.25, abs=0.01)


def test_true_flops_count_multiply_adds_twice_and_attention():
    """The LEM by hand: d_l = 20, 4 patches, 1 latent token, one block on either side, 4 numbers a token."""
    d, patches, tokens, e, patch_dim = 20, 4, 5, 4, 16
    block = tokens * (3 * d * d + d * d + 8 * d * d) + 2 * tokens * tokens * d
    multiply_adds = patches * patch_dim * d + block + 1 * d * e + tokens * e * d + block + patches * d * d
    assert cost.describe(tiny.config())["gflops"]["true"]["lem"] == pytest.approx(2 * multiply_adds / 1e9, rel=1e-12)


def test_paper_flops_leave_attention_out_and_count_layer_norms():
    d, patches, tokens, e, patch_dim = 20, 4, 5, 4, 16
    block = tokens * 12 * d * d + 2 * 5 * tokens * d  # two affine norms
    count = patches * patch_dim * d + block + d * e + tokens * e * d + block + 5 * patches * d + patches * d * d
    assert cost.describe(tiny.config())["gflops"]["paper"]["lem"] == pytest.approx(count / 1e9, rel=1e-12)


def test_counting_leaves_the_model_as_it_was():
    model = DoD(tiny.config())
    z = torch.zeros(1, 4, 4, 4)
    first = cost.paper_gflops(model, lambda: model.lem(z))
    assert cost.paper_gflops(model, lambda: model.lem(z)) == first
    assert not any(module._forward_hooks for module in model.modules())


def test_a_sample_costs_what_table_4_says_where_stage_1_is_charged_as_stage_2():
    """30 steps of either stage, both passes of guidance at the price of stage 2."""
    described = {"gflops": {"paper": {**cost.PAPER["DoD-B"]["gflops"]}}}
    found = cost.per_sample(described, [cost.Spent(30), cost.Spent(30, 30, "label")])
    assert [row["gflops_paper"] for row in found] == pytest.approx([795, 2409.6], abs=1e-9)


def test_a_sample_costs_less_than_table_4_says_where_nothing_needs_the_prior(table):
    one, two = cost.per_sample(table["DoD-B"], [cost.Spent(30), cost.Spent(30, 30)])
    assert one["gflops_paper"] == pytest.approx(21.81 * 30, abs=0.3)  # 654 instead of 795
    assert two["gflops_paper"] == pytest.approx((21.81 + 26.47 + 21.81) * 30 + 24.65, abs=1)  # 2127 instead of 2409.6
    assert set(two) == {"gflops_paper", "gflops_true"}


@pytest.mark.parametrize(("branch", "null"), [("both", 1), ("prior", 1), ("label", 10)])
def test_a_null_pass_costs_an_evaluation_of_stage_1_unless_it_keeps_the_prior(branch, null):
    described = {"gflops": {"true": {"stage1": 1.0, "stage2": 10.0, "lem": 100.0}}}
    stages = [cost.Spent(2, 1, branch), cost.Spent(3, 1, branch), cost.Spent(2)]
    first, second = 3.0, 100.0 + 30 + null
    assert cost.per_sample(described, stages) == [
        {"gflops_true": total} for total in (first, first + second, first + second + 120)
    ]
    assert cost.per_sample(described, stages[1:2], first=2) == [{"gflops_true": second}]  # from a real image


def test_what_was_spent_is_what_the_manifest_states():
    about = {"stage_evaluations": 5.0, "null_evaluations": 2.0, "sampling": {"null_branch": "label"}}
    assert cost.Spent.stated(about) == cost.Spent(3.0, 2.0, "label")
