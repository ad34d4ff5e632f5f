"""Which parameters are experts, which linear layers are routers, and which patterns name them."""

import pytest
import torch
from torch import nn

from lightning_qlora import QLoRAConfig, QLoRALinear, convert
from lightning_qlora.experts.expert_selection import expert_parameters
from lightning_qlora.selection.selection import select_layers
from tests.experts.test_experts import MODELS, made, qwen3_moe
from tests.toys import expert_stacks

pytest.importorskip("transformers")


def choose(model, r=2, **arguments):
    return select_layers(model, QLoRAConfig(r=r, **arguments))


LAYOUTS = {  # model -> end of the name of each stack, and whether one expert is [in, out]
    "qwen3_moe": {"gate_up_proj": False, "down_proj": False},
    "gpt_oss": {"gate_up_proj": True, "down_proj": True},
    "nemotron_h": {"up_proj": False, "down_proj": False},
    "jetmoe": {"input_linear.weight": False, "output_linear.weight": False},
    "dbrx": {"w1": False, "v1": False, "w2": True},
    "llama4_text": {"gate_up_proj": True, "down_proj": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_converts_experts_of_every_layout(name):
    """The layout of one expert follows the width of the model."""
    model = made(MODELS[name])
    endings = LAYOUTS[name]
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters() if key.endswith(tuple(endings))}
    convert(model, r=2)
    stacks = {key: stack for key, _, _, stack in expert_stacks(model.named_modules())}
    assert {key: stack.weight_shape for key, stack in stacks.items()} == shapes
    assert {end: stack._transposed for key, stack in stacks.items() for end in endings if key.endswith(end)} == endings
    assert {stack.r for stack in stacks.values()} == {2}
    assert not any(type(part).__name__.endswith("Router") and isinstance(part, QLoRALinear) for part in model.modules())


SIZES = {"num_experts": 4, "hidden_size": 8}


@pytest.mark.parametrize(
    ("attributes", "shapes", "transposed"),
    [
        (SIZES, {"up": (4, 8, 16), "down": (4, 16, 8)}, {"up": True, "down": True}),
        ({"experts_here": 4, "hidden_dim": 16}, {"up": (4, 8, 16), "w2": (4, 16, 8)}, {"up": False, "w2": False}),
        (SIZES, {"up": (4, 8, 8), "down": (4, 16, 8)}, {"up": True, "down": True}),
        (SIZES, {"up": (4, 8, 8)}, {"up": False}),
        ({**SIZES, "is_transposed": False}, {"up": (4, 8, 16)}, {"up": False}),
        ({"num_experts": 4, "hidden_size": 16, "is_transposed": True}, {"up": (4, 8, 16)}, {"up": True}),
        ({"num_experts": 5}, {"up": (4, 8, 16)}, {}),
        ({"num_experts_per_tok": 4, "width": 4}, {"up": (4, 8, 16)}, {}),
        ({"num_experts": 0, "experts": True}, {"up": (0, 8, 16), "down": (1, 8, 16)}, {}),
        (
            {"moe_num_experts": 4, "ffn_size": 8, "hidden_size": 6},
            {"w1": (32, 6), "w2": (32, 6)},
            {"w1": False, "w2": True},
        ),
        ({"num_experts": 4, "x_dim": 1, "y_size": 3}, {"w1": (4, 6), "w2": (13, 6)}, {}),
        ({"experts_here": 4, "ffn_size": 8}, {"w1": (32, 6), "bias": (4,)}, {}),
    ],
)
def test_stacks_are_known_by_the_number_of_experts_and_their_layout_by_the_width_of_the_model(
    attributes, shapes, transposed
):
    owner = nn.Module()
    vars(owner).update(attributes)
    for key, shape in shapes.items():
        owner.register_parameter(key, nn.Parameter(torch.empty(shape)))
    stacks = expert_parameters(owner)
    assert {stack.key: stack.transposed for stack in stacks} == transposed
    for stack in stacks:
        rows, columns = shapes[stack.key][-2] // (1 if len(shapes[stack.key]) == 3 else 4), shapes[stack.key][-1]
        assert stack.experts == 4 and stack.shape == ((columns, rows) if stack.transposed else (rows, columns))


@pytest.mark.parametrize(("router", "outputs"), [("choose", 2), ("gate", 32), ("router", 32)])
def test_a_linear_router_is_known_by_its_experts_or_by_its_name_beside_experts(router, outputs):
    mixture = nn.ModuleDict({router: nn.Linear(64, outputs), "experts": nn.ModuleList(nn.Linear(64, 64) for _ in "ab")})
    mixture["alone"] = nn.Sequential(nn.Linear(64, 2))
    mixture["projection"] = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    module = nn.ModuleDict({"mixture": mixture, router: nn.Linear(64, outputs)})
    choice = choose(module, r=1)
    reason = "router of experts; name it in target_modules to convert it"
    assert choice.skip == {f"mixture.{router}": reason, "mixture.alone.0": reason}
    projections = ["mixture.projection.0", "mixture.projection.1"]
    assert [*choice.convert] == ["mixture.experts.0", "mixture.experts.1", *projections, router]
    assert f"mixture.{router}" in choose(module, r=1, target_modules=["mixture." + router]).convert


def test_a_block_is_searched_for_routers_once_however_many_layers_it_has():
    class Blocks(nn.ModuleList):
        searches = 0

        def children(self):
            self.searches += 1
            return super().children()

    few, many = (Blocks(nn.Sequential(nn.Linear(64, 64)) for _ in range(number)) for number in (3, 30))
    for blocks in (few, many):
        assert len(choose(blocks).convert) == len(blocks)
    assert few.searches == many.searches


@pytest.mark.parametrize(
    ("targets", "keys"),
    [
        (["gate_up_proj"], {"gate_up_proj"}),
        (["mlp.experts.down_proj", "q_proj"], {"down_proj"}),
        (["experts"], {"gate_up_proj", "down_proj"}),
        (r".*experts\.gate_up_proj", {"gate_up_proj"}),
    ],
)
def test_patterns_name_the_parameter(targets, keys):
    choice = choose(made(qwen3_moe), target_modules=targets)
    assert {name.rpartition(".")[2] for name in choice.convert if "experts" in name} == keys
    left = {"gate_up_proj", "down_proj"} - keys
    assert all(choice.skip[f"model.layers.0.mlp.experts.{key}"] == "not in target_modules" for key in left)


def test_exclude_rank_and_modules_to_save():
    model = made(qwen3_moe)
    report = convert(
        model, r=2, exclude_modules=["layers.0.mlp.experts.down_proj"], rank_pattern={"experts.gate_up_proj": 4},
        modules_to_save=["layers.1.mlp.experts"],
    )  # fmt: skip
    assert {name: stack.r for name, _, _, stack in expert_stacks(model.named_modules())} == {
        "model.layers.0.mlp.experts.gate_up_proj": 4
    }
    assert report.skipped["model.layers.0.mlp.experts.down_proj"] == "in exclude_modules"
    trains = [layer.mlp.experts.down_proj.requires_grad for layer in model.model.layers]
    assert trains == [False, True]


def test_experts_that_are_tied_or_smaller_than_an_adapter_stay_dense_and_frozen():
    model = made(qwen3_moe).requires_grad_(True)
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.gate_up_proj = first.gate_up_proj
    report = convert(model, r=24)
    name = "model.layers.{}.mlp.experts.{}".format
    assert report.skipped[name(0, "down_proj")] == "an adapter of rank 24 would not be smaller than its 64x32 weights"
    assert report.skipped[name(0, "gate_up_proj")] == f"its weight is tied to {name(1, 'gate_up_proj')}"
    assert not any(p.requires_grad for p in (*first.parameters(), *second.parameters()))


def test_a_pattern_that_names_nothing_lists_the_parameters_of_experts():
    with pytest.raises(ValueError, match="gate_up_proj"):
        convert(made(qwen3_moe), target_modules=["experts.nothing"])
