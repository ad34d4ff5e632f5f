"""What a survey says of a module, and that one walk over it is enough."""

import torch
from torch import nn

from lightning_qlora import QLoRALinear, convert
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.survey import Kind, Parameter, survey

WALKS = 3  # of one conversion, over the whole module


class Walked(nn.Module):
    """It counts the walks over all of its parts."""

    def __init__(self):
        super().__init__()
        self.walks = 0
        self.embed = nn.Embedding(50, 64)
        self.body = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
        self.conv = nn.Conv1d(64, 4, 3)
        self.head = nn.Linear(64, 50)

    def named_modules(self, memo=None, *args, **kwargs):
        self.walks += memo is None
        return super().named_modules(memo, *args, **kwargs)


def parts_of(module):
    return {part.names.full: part for part in survey(Parts.of(module, wrappers=())).parts}


def test_a_survey_walks_over_a_module_once_and_a_conversion_seldom():
    module = Walked()
    survey(Parts.of(module, wrappers=()))
    assert module.walks == 1
    convert(module, r=4)
    assert module.walks <= 1 + WALKS
    before = module.walks
    convert(module, r=4)
    assert module.walks <= before + WALKS


def test_a_module_with_a_value_for_each_name_is_not_one_that_transformers_loaded_in_4_bits():
    class AnyName(nn.Linear):
        def __getattr__(self, name):
            return "any" if name.startswith("is_") else super().__getattr__(name)

    module = nn.Sequential(AnyName(64, 64))
    convert(module, r=4)
    assert isinstance(module[0], QLoRALinear)


def test_each_part_has_its_place_and_kind_and_what_it_holds():
    module = nn.ModuleDict(
        {"body": nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), "script": torch.jit.script(nn.ReLU())}
    )
    module["body"][1].bias.requires_grad_(False)
    module["tied"] = nn.Linear(4, 8, bias=False).bfloat16()
    module["tied"].weight = module["body"][0].weight
    module["fp16"] = nn.Linear(2, 3).half().to("meta")
    module["again"] = module["body"]
    seen = survey(Parts.of(module, wrappers=()))
    parts = parts_of(module)
    assert [name for name, _ in seen.modules] == [name for name, _ in module.named_modules()] == list(parts)
    assert {name: part.kind for name, part in parts.items() if part.kind is not Kind.OTHER} == {
        "body.0": Kind.LINEAR, "script": Kind.SCRIPT, "tied": Kind.LINEAR, "fp16": Kind.LINEAR,
    }  # fmt: skip
    assert parts["body.0"].names.others == ("again.0",) and parts["fp16"].shape == (3, 2)
    assert parts["body.0"].parameters == {"weight": Parameter(ties=("tied.weight",)), "bias": Parameter()}
    assert parts["body.1"].parameters == {"weight": Parameter(), "bias": Parameter(trains=False)}
    assert parts["fp16"].weight == Parameter(dtype=torch.float16)
    assert parts["body"].has_parts and not parts["fp16"].has_parts and seen.trains
    assert not survey(Parts.of(module.requires_grad_(False), wrappers=())).trains


def test_experts_follow_the_module_that_holds_them_and_what_was_converted_is_known():
    block = nn.Module()
    block.num_experts = 3
    block.up = nn.Parameter(torch.randn(3, 64, 32))
    module = nn.ModuleDict({"tokens": nn.Embedding(9, 64), "block": block})
    parts = parts_of(module)
    assert list(parts) == ["", "tokens", "block", "block.up"] and parts["block"].has_stacks
    experts = parts["block.up"]
    assert (experts.kind, experts.shape, experts.key) == (Kind.STACK, (64, 32), "up")
    assert experts.names.for_patterns == ("block.up", "block") and experts.owner is block
    convert(module, r=2, trainable_token_indices=[1])
    module["new"] = nn.Linear(64, 64)
    kinds = {name: part.kind for name, part in parts_of(module).items() if name}
    assert kinds == {
        "tokens": Kind.DECIDED, "tokens.token_adapter": Kind.OTHER, "block": Kind.OTHER, "new": Kind.LINEAR,
        "block.up_experts": Kind.CONVERTED,
    }  # fmt: skip
    assert [name for name, part in parts_of(module).items() if part.is_recorded] == [
        "tokens",
        "tokens.token_adapter",
        "block",
        "block.up_experts",
    ]
