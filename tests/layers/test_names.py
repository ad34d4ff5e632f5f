"""Names of layers: those in the model that holds them count, wherever the model stands."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_qlora import QLoRAConfig, QLoRALinear, convert
from lightning_qlora.layers.names import Names
from lightning_qlora.selection.selection import select_layers
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.survey import survey
from tests.toys import Lit, toy

pytest.importorskip("transformers")


class WithHead(Lit):
    def __init__(self, model):
        super().__init__(model)
        self.head = nn.Linear(64, 64)


class Net(pl.LightningModule):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def stack():
    return nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64)))


def names(root, name):
    return next(part.names for part in survey(Parts.of(root, wrappers=())).parts if part.names.full == name)


def adapters(module):
    return [layer.lora_A.detach() for layer in module.modules() if isinstance(layer, QLoRALinear)]


IN_T5 = "encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    ("root", "name", "others", "seed_name"),
    [
        (lambda: toy("llama"), "model.layers.0.mlp.up_proj", [], "model.layers.0.mlp.up_proj"),
        (lambda: Lit(toy("llama")), "model.lm_head", ["lm_head"], "lm_head"),
        (lambda: WithHead(toy("llama")), "model.lm_head", ["lm_head"], "lm_head"),
        (lambda: WithHead(toy("llama")), "head", [], "head"),
        (lambda: nn.ModuleDict({"a": toy("llama")}), "a.lm_head", ["lm_head"], "lm_head"),
        (lambda: Net(a=nn.ModuleDict({"b": toy("llama")})), "a.b.lm_head", ["b.lm_head", "lm_head"], "lm_head"),
        # T5 has an encoder and a decoder that are transformers models too: the outermost one counts
        (lambda: Lit(toy("t5")), f"model.{IN_T5}", [IN_T5], IN_T5),
        (lambda: Net(net=stack()), "net.1.0", ["1.0"], "1.0"),
        (lambda: Net(net=nn.Linear(64, 64)), "net", [], "net"),
        (lambda: Net(net=stack(), scale=nn.Parameter(torch.ones(1))), "net.1.0", ["1.0"], "net.1.0"),
        # two children may have layers of the same name, whose adapters are to differ
        (lambda: Net(a=stack(), b=stack()), "b.1.0", ["1.0"], "b.1.0"),
        (lambda: stack(), "1.0", [], "1.0"),
        (
            lambda: Lit(torch.compile(toy("llama"))),
            "model._orig_mod.lm_head",
            ["_orig_mod.lm_head", "lm_head", "model.lm_head"],
            "lm_head",
        ),
        (lambda: Net(net=torch.compile(stack())), "net._orig_mod.1.0", ["_orig_mod.1.0", "1.0", "net.1.0"], "1.0"),
    ],
)
def test_a_layer_has_a_name_in_each_module_around_it(root, name, others, seed_name):
    assert names(root(), name) == Names(name, (name, *others), seed_name)


def test_a_model_gets_the_same_adapters_wherever_it_stands_and_each_of_two_children_its_own():
    bare = toy("llama")
    lit = Lit(toy("llama"))
    deeper = Net(a=nn.ModuleDict({"b": toy("llama")}), c=nn.Linear(64, 64))
    twins = Net(a=stack(), b=stack())
    for module in (bare, lit, deeper, twins):
        convert(module, r=4)
    expected = adapters(bare)
    for other in (lit, deeper.a):
        assert all(map(torch.equal, adapters(other), expected))
    assert not any(map(torch.equal, adapters(twins.a), adapters(twins.b)))  # of children with equal names


ENDINGS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
FIRST, SECOND = ([f"model.model.layers.{i}.{ending}" for ending in ENDINGS] for i in (0, 1))


@pytest.mark.parametrize(
    ("arguments", "converted"),
    [
        ({"target_modules": r"model\.layers\.1\..*_proj"}, SECOND),
        ({"target_modules": r"model\.model\.layers\.1\..*_proj"}, SECOND),
        ({"exclude_modules": r"model\.model\.layers\.0\..*", "target_modules": r".*_proj"}, SECOND),
        ({"exclude_modules": ["model.layers.0.mlp.up_proj"]}, [*FIRST[:5], FIRST[6], *SECOND]),
    ],
)
def test_a_pattern_matches_the_name_in_the_model_or_the_full_name(arguments, converted):
    assert [*select_layers(Lit(toy("llama")), QLoRAConfig(r=4, **arguments)).convert] == converted


def test_ranks_and_alphas_of_layers_by_either_name():
    patterns = {r"^model\.layers\.1\.mlp\.up_proj": 8}, {"model.model.layers.0.mlp.up_proj": 32}
    config = QLoRAConfig(r=4, lora_alpha=8, rank_pattern=patterns[0], alpha_pattern=patterns[1])
    choice = select_layers(Lit(toy("llama")), config).convert.items()
    own = {name: (layer.config.r, layer.config.lora_alpha) for name, layer in choice}
    assert own == dict.fromkeys(FIRST + SECOND, (4, 8)) | {FIRST[5]: (4, 32), SECOND[5]: (8, 8)}


def test_an_anchored_pattern_reaches_no_other_part_of_a_bare_module():
    """The first part of a name is left out only where it is the attribute of a LightningModule."""

    def model():
        first, second = (nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(64, 64)])}) for _ in range(2))
        first["decoder"] = second
        return first

    bare = model()
    lit = Net(net=model())
    for module in (bare, lit):
        convert(module, r=4, rank_pattern={r"^layers\.0": 16}, alpha_pattern={r"^layers\.0": 2})
    for module in (bare, lit.net):
        assert module["layers"][0].r == 16 and module["decoder"]["layers"][0].r == 4
        assert module["decoder"]["layers"][0].scaling == 4
    assert convert(model(), r=4, target_modules=r"layers\.0").converted == ["layers.0"]
