import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_qlora import QLoRALinear, convert, merge, save_adapter
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.names import Names
from lightning_qlora.selection.selection import CONVERT, IN_VAIN, REFUSE, RULES, SKIP, TRAIN, decide, select_layers
from lightning_qlora.survey.survey import Kind, Parameter, Part, Survey
from tests.conftest import ROOT
from tests.toys import NAMES, delta, toy

transformers = pytest.importorskip("transformers")


def adapted_by(model):
    """Names of the layers to which PEFT added an adapter."""
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize("kind", NAMES)
def test_all_linear_converts_what_peft_adapts(kind):
    peft = pytest.importorskip("peft")
    task = {"bert": "SEQ_CLS"}.get(kind)
    adapted = peft.get_peft_model(toy(kind), peft.LoraConfig(r=2, target_modules="all-linear", task_type=task))
    theirs = adapted_by(adapted)
    report = convert(toy(kind), r=2)
    too_small = set(report.trained_in_full)
    assert set(report.converted) | (too_small & theirs) == theirs


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["self_attn.q_proj"], r"model\.layers\.1\..*_proj", r".*\.mlp\.(up|down)_proj"]
)
def test_named_targets_are_those_peft_finds(targets):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(toy("llama"), peft.LoraConfig(r=2, target_modules=targets))
    assert set(convert(toy("llama"), r=2, target_modules=targets).converted) == adapted_by(adapted)


def test_modules_to_save_train_in_full():
    model = toy("llama")
    report = convert(model, r=2, modules_to_save=["embed_tokens", "norm"])
    assert report.trained_in_full["model.embed_tokens"] == "in modules_to_save"
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trainable == {"model.embed_tokens.weight", "model.norm.weight"}


def linear(*sizes):
    """Linear layers of these inputs and outputs."""
    return nn.Sequential(*(nn.Linear(*size) for size in sizes))


def part(name="layer", kind=Kind.LINEAR, shape=(64, 64), weight=None, **facts):
    """A linear layer as a survey has it, with what a case changes."""
    parameters = {"weight": weight or Parameter()}
    return Part(Names(name, (name,), name), kind, parameters=parameters, shape=shape, **facts)


def rows(parts, trains=True, saved=None, **arguments):
    """Name, action, reason, rank and seed name of each row."""
    config = QLoRAConfig(**{"r": 4, **arguments})
    choice = decide(Survey(parts, trains), config, saved)
    return [
        (row.name, row.action, row.reason, row.config and row.config.r, row.seed_name) for row in choice.rows.values()
    ]


FROZEN = Parameter(trains=False)
NEW = Parameter(new="new: outside")
ALL = "any other linear layer"
NOT_SMALLER = "an adapter of rank {} would not be smaller than its {} weights".format
MEMBER = "NoneType has a scaling of its own, which a 4-bit layer would replace"
HEAD = "output embedding; name it in target_modules to convert it"
METRIC = "in a metric; name it in target_modules to convert it"
ROUTER = "router of experts; name it in target_modules to convert it"
LEFT = "dense in a model that was loaded in 4 bits; name it in target_modules to convert it"
FLOAT8 = "its weight is float8_e4m3fn; load the model in configure_model or plugin.init(), where it is dequantized"
EARLIER = "as an earlier conversion left it"
NAMED = {"target_modules": ["all-linear", "layer"]}


def stays(reason):
    """Dense and frozen, with a warning if it is named."""
    return (SKIP, reason), (IN_VAIN, reason)


CASES = [  # what a survey says of a layer beside the usual, arguments, and the outcome by default and if it is named
    ({}, {}, (CONVERT, ALL), (CONVERT, ALL)),
    ({}, {"exclude_modules": ["layer"]}, (SKIP, "in exclude_modules"), (SKIP, "in exclude_modules")),
    ({}, {"target_modules": ["other"]}, (SKIP, "not in target_modules"), (CONVERT, ALL)),
    ({"weight": NEW}, {}, (TRAIN, "new: outside"), (CONVERT, ALL)),
    ({"weight": NEW}, {"exclude_modules": ["layer"]}, (SKIP, "in exclude_modules"), (SKIP, "in exclude_modules")),
    ({"kind": Kind.OTHER}, {}, None, (REFUSE, "only linear layers can be converted")),
    ({"kind": Kind.OTHER, "weight": NEW}, {}, (TRAIN, "new: outside"), (REFUSE, "only linear layers can be converted")),
    ({"member": "scaling"}, {}, (SKIP, MEMBER), (REFUSE, MEMBER)),
    ({"member": "scaling"}, {"exclude_modules": ["layer"]}, (SKIP, "in exclude_modules"), (SKIP, "in exclude_modules")),
    ({"computed": ("bias",)}, {}, *stays("its bias is computed (parametrized), not stored")),
    ({"weight": Parameter(ties=("a.w", "b.w"))}, {}, *stays("its weight is tied to a.w")),
    ({"weight": Parameter(ties=("a.w",)), "kind": Kind.STACK}, {}, *stays("its weight is tied to a.w")),
    ({"weight": Parameter(dtype=torch.float8_e4m3fn)}, {}, *stays(FLOAT8)),
    ({"weight": Parameter(dtype=torch.int8)}, {}, *stays("its weight is int8")),
    ({"weight": Parameter(dtype=torch.uint8), "kind": Kind.PACKED}, {}, (CONVERT, ALL), (CONVERT, ALL)),
    ({"is_output_embedding": True}, {}, (SKIP, HEAD), (CONVERT, ALL)),
    ({"is_in_metric": True}, {"trains": False}, (SKIP, METRIC), (CONVERT, ALL)),
    ({"is_router": True}, {}, (SKIP, ROUTER), (CONVERT, ALL)),
    ({"weight": FROZEN}, {}, (SKIP, "frozen by the module"), (CONVERT, ALL)),
    ({"weight": FROZEN}, {"trains": False}, (CONVERT, ALL), (CONVERT, ALL)),
    ({"weight": FROZEN, "kind": Kind.PACKED}, {}, (CONVERT, ALL), (CONVERT, ALL)),
    ({"kind": Kind.PACKED, "is_in_frozen_model": True}, {}, (SKIP, "frozen by the module"), (CONVERT, ALL)),
    ({"is_left_dense": True}, {}, (SKIP, LEFT), (CONVERT, ALL)),
    ({"is_left_dense": True}, {"r": 32}, (TRAIN, NOT_SMALLER(32, "64x64")), (CONVERT, ALL)),
    ({}, {"r": 31}, (CONVERT, ALL), (CONVERT, ALL)),
    ({}, {"r": 32}, (TRAIN, NOT_SMALLER(32, "64x64")), (CONVERT, ALL)),
    ({"shape": (2, 256)}, {"r": 8, "trains": False}, (SKIP, NOT_SMALLER(8, "2x256")), (CONVERT, ALL)),
    ({"kind": Kind.STACK}, {"r": 32}, (SKIP, NOT_SMALLER(32, "64x64")), (CONVERT, ALL)),
    ({"weight": FROZEN}, {"r": 99}, (SKIP, "frozen by the module"), (CONVERT, ALL)),
    ({}, {"r": 99, "rank_pattern": {"layer": 4}}, (CONVERT, ALL), (CONVERT, ALL)),
    ({"shape": (4, 16)}, {"r": 1}, (TRAIN, "its 4x16 weights are too few for 4 bits"), (CONVERT, ALL)),  # Gemma 3n
    ({"shape": (5, 16)}, {"r": 1}, (CONVERT, ALL), (CONVERT, ALL)),
    ({"shape": (0, 64)}, {}, (TRAIN, "its 0x64 weights are too few for 4 bits"), (SKIP, "its 0x64 weight is empty")),
    ({"kind": Kind.SCRIPT}, {}, *2 * [(SKIP, "a torch.jit.ScriptModule, which can't be changed")]),
    ({"kind": Kind.CONVERTED}, {}, None, None),
    ({"kind": Kind.DECIDED}, {}, None, None),
    ({"is_recorded": True}, {}, *2 * [(TRAIN, EARLIER)]),
    ({"is_recorded": True, "weight": FROZEN}, {}, *2 * [(SKIP, EARLIER)]),
    ({"is_recorded": True, "kind": Kind.OTHER}, {}, None, None),
    ({}, {"saved": {"layer": {}}}, *2 * [(CONVERT, "in 4 bits in the checkpoint to load")]),
    ({"is_router": True}, {"saved": {"layer": {"r": 2}}}, *2 * [(CONVERT, "in 4 bits in the checkpoint to load")]),
    ({}, {"saved": {}}, *2 * [(SKIP, "not in 4 bits in the checkpoint")]),
    ({}, {"modules_to_save": ["layer"]}, *2 * [(TRAIN, "in modules_to_save")]),
]  # fmt: skip


@pytest.mark.parametrize(("facts", "arguments", "by_default", "if_named"), CASES)
def test_the_first_rule_that_applies_decides(facts, arguments, by_default, if_named):
    for names, expected in (({}, by_default), (NAMED, if_named)):
        found = rows([part(**facts)], **{**arguments, **names})
        assert [row[1:3] for row in found] == ([] if expected is None else [expected])


@pytest.mark.parametrize("number", range(len(RULES)))
def test_without_a_rule_one_of_these_cases_differs(number, monkeypatch):
    def outcomes():
        return [
            rows([part(**facts)], **{**arguments, **names}) for facts, arguments, *_ in CASES for names in ({}, NAMED)
        ]

    before = outcomes()
    monkeypatch.setattr("lightning_qlora.selection.selection.RULES", RULES[:number] + RULES[number + 1 :])
    assert outcomes() != before


def test_rows_have_the_rank_and_the_seed_name_of_their_layer():
    inner = Part(Names("net.body.0", ("net.body.0", "body.0"), "body.0"), Kind.LINEAR, shape=(64, 64))
    other = Part(Names("net.head", ("net.head", "head"), "head"), Kind.LINEAR, shape=(64, 64))
    parts = [inner, other]
    assert rows(parts) == [("net.body.0", CONVERT, ALL, 4, "body.0"), ("net.head", CONVERT, ALL, 4, "head")]
    ranks = {"rank_pattern": {"^body": 1, r"^body\.0": 2, "net.head": 3}}
    assert [row[3] for row in rows(parts, **ranks)] == [2, 3]
    assert [row[3] for row in rows(parts, saved={"net.body.0": {"r": 7}, "net.head": {}}, **ranks)] == [7, 3]
    assert rows(parts, exclude_modules=["body"])[0][1:3] == (SKIP, "in exclude_modules")


def test_what_is_inside_of_a_part_that_is_decided_as_a_whole_has_no_row():
    new = {"weight": NEW, "bias": NEW}
    parts = [
        Part(Names("", ("",), ""), has_parts=True, parameters={"scale": NEW, "shift": Parameter()}),
        Part(Names("a", ("a",), "a"), has_parts=True, parameters=new),
        part("a.b"), part("ab"), part("s", Kind.SCRIPT), part("s.t"),
        Part(Names("m", ("m",), "m"), has_stacks=True, parameters=new),
        part("m.up", Kind.STACK, weight=NEW), part("m_experts", Kind.EXPERTS),
    ]  # fmt: skip
    assert [row[:2] for row in rows(parts, modules_to_save=["a"])] == [
        ("a", TRAIN), ("scale", TRAIN), ("ab", CONVERT), ("s", SKIP), ("m.up", CONVERT),
    ]  # fmt: skip
    names = [row[0] for row in rows(parts)]
    assert names == ["scale", "a.weight", "a.bias", "a.b", "ab", "s", "m.up"]
    assert "a.weight" not in [row[0] for row in rows(parts, exclude_modules=["a"])]


def test_layers_that_read_their_weights_and_tied_parametrized_and_packed_ones_are_found_in_a_module():
    """The facts of the cases above, in modules of torch; what trains in full does, and the rest is frozen."""
    tied = linear((64, 64), (64, 64), (64, 64))
    tied[1].weight = tied[0].weight
    odd = linear((64, 64), (64, 64))
    odd[1].scaling = 3.0
    parametrized = nn.Sequential(
        nn.Linear(64, 64),
        nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)),
        nn.utils.parametrize.register_parametrization(nn.Linear(64, 64), "bias", nn.Softplus()),
    )
    frozen = linear((64, 64), (64, 64), (256, 2))
    frozen[1].requires_grad_(False)
    for module, converted, trained, skipped in (
        (nn.TransformerEncoderLayer(64, 4, 128), ["self_attn.out_proj", "linear1", "linear2"], {}, {}),
        (tied, ["2"], {}, {"0": "its weight is tied to 1.weight", "1": "its weight is tied to 0.weight"}),
        (odd, ["0"], {}, {"1": "Linear has a scaling of its own, which a 4-bit layer would replace"}),
        (
            parametrized, ["0"], {},
            {f"{i}": f"its {name} is computed (parametrized), not stored" for i, name in ((1, "weight"), (2, "bias"))},
        ),
        (frozen, ["0"], {"2": NOT_SMALLER(2, "2x256")}, {"1": "frozen by the module"}),
        (linear((64, 64)).append(nn.Linear(64, 64).to(torch.float8_e4m3fn)), ["0"], {}, {"1": FLOAT8}),
    ):  # fmt: skip
        report = convert(module, r=2)
        assert (report.converted, report.trained_in_full, report.skipped) == (converted, trained, skipped)
        for trains, names in ((True, trained), (False, skipped)):
            for name in names:
                assert {p.requires_grad for p in module.get_submodule(name).parameters()} == {trains}


class Scaled(nn.Linear):
    """A subclass that computes something else, through its base class."""

    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target_modules": ["qproj"]}, r"no module of this model fits 'qproj'\. .*'q_proj'"),
        ({"target_modules": ["q_proj", "w_proj"]}, r"fits 'w_proj'\."),
        ({"target_modules": r".*\.attention"}, "no module of this model fits"),
        ({"target_modules": "q_proj, v_proj"}, "A list has such endings, a string is a regular expression"),
        (
            {"modules_to_save": ["classifier"]},
            r"^modules_to_save=\['classifier'\]: no module of this model fits 'classifier'\. What it can name ends in "
            r"\['0', '1', 'down_proj', 'embed_tokens', .*'v_proj'\]\. ",
        ),
        ({"rank_pattern": {"upp": 2}}, r"rank_pattern=\{'upp': 2\}: no module of this model fits 'upp'"),
        ({"target_modules": ["embed_tokens"]}, r"'model\.embed_tokens', a Embedding.*modules_to_save"),
        ({"exclude_modules": ["vision"]}, r"exclude_modules=.*: no module of this model fits 'vision'"),
        ({"exclude_modules": ["lp"]}, r"exclude_modules=.*: no module of this model fits 'lp'"),
        ({"exclude_modules": "mlp"}, r"exclude_modules=.*: no module of this model fits 'mlp'"),
    ],
)
def test_names_that_match_nothing_are_refused_with_the_names_that_exist(arguments, words):
    with pytest.raises(ValueError, match=words):
        convert(toy("llama"), r=2, **arguments)


class Falcon(nn.Linear):
    """As the layers of Falcon: it reads its weight."""

    def forward(self, input):
        return input @ self.weight.T + self.bias


@pytest.mark.parametrize(("kind", "factor"), [(Scaled, 2), (Falcon, 1)])
def test_a_layer_with_a_forward_of_its_own_keeps_it_and_gets_it_back_by_merge(kind, factor):
    layer = kind(64, 64)
    x = torch.randn(3, 64)
    assert convert(nn.Sequential(layer), r=2, lora_dropout=0.0).converted == ["0"]
    layer.lora_B.data.normal_()
    expected = factor * nn.functional.linear(x, layer.decode() + delta(layer), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.lora_A.grad.abs().max() > 0 and layer.lora_B.grad.abs().max() > 0
    torch.testing.assert_close(merge(layer)(x), expected)
    assert type(layer) is kind


class Penalized(nn.Linear):
    """A subclass that computes the same, and can do more."""

    def penalty(self):
        return self.weight.square().sum()


def test_a_subclass_keeps_its_methods_and_its_class():
    layer = Penalized(64, 64).eval()
    layer.note = "mine"
    model = nn.Sequential(layer)
    assert convert(model, r=2).converted == ["0"]
    layer.lora_B.data.normal_()
    expected = (layer.decode() + delta(layer)).square().sum()
    x = torch.randn(2, 64)
    for again in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(again, Penalized) and isinstance(again, QLoRALinear) and again.note == "mine"
        torch.testing.assert_close(again.penalty(), expected)
        assert torch.equal(again(x), layer(x)) and type(again) is type(layer)
    convert(other := Penalized(64, 64), r=2)
    assert type(other) is type(layer)
    merge(model)
    assert type(model[0]) is Penalized


def _called(self, x):
    return nn.Linear.__call__(self, x) * 3


@pytest.mark.parametrize("name", ["__call__", "__deepcopy__", "__reduce__", "scaling", "decode", "compute", "r", "end"])
def test_a_subclass_with_a_member_that_4_bits_would_replace_is_skipped(name):
    kind = type("Odd", (nn.Linear,), {name: _called if name == "__call__" else 2})
    model = nn.Sequential(nn.Linear(64, 64), kind(64, 64))
    x = torch.randn(2, 64)
    before = model[1](x)
    report = convert(model, r=2)
    assert report.converted == ["0"] and f"Odd has a {name} of its own" in report.skipped["1"]
    assert torch.equal(model[1](x), before)
    with pytest.raises(ValueError, match=f"names '0', a Odd: Odd has a {name} of its own"):
        convert(nn.Sequential(kind(64, 64)), r=2, target_modules=["0"])
    assert convert(nn.Sequential(kind(64, 64), nn.Linear(64, 64)), r=2, exclude_modules=["0"]).converted == ["1"]


def test_a_subclass_may_override_methods_of_nn_module():
    class Careful(nn.Linear):
        moves = 0

        def _apply(self, fn, recurse=True):
            self.moves += 1
            return super()._apply(fn, recurse)

        def extra_repr(self):
            return "mine"

        def train(self, mode=True):
            return super().train(False)

    layer = Careful(64, 64)
    assert convert(nn.Sequential(layer), r=2).converted == ["0"]
    assert layer.bfloat16().moves == 1 and layer.weight.dtype is torch.bfloat16
    assert not layer.train().training


class Shared(nn.Module):
    """One block in two places."""

    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(64, 64))
        self.dec = self.enc
        self.own = nn.Linear(64, 64)


@pytest.mark.parametrize("name", ["enc.0", "dec.0"])
def test_a_layer_in_several_places_is_chosen_by_any_of_its_names(name):
    def choose(**arguments):
        return select_layers(Shared(), QLoRAConfig(r=4, **arguments))

    choice = choose(exclude_modules=[name])
    assert (list(choice.convert), choice.skip) == (["own"], {"enc.0": "in exclude_modules"})
    for targets in ([name], name.replace(".", "[.]")):
        assert list(choose(target_modules=targets).convert) == ["enc.0"]
    assert choose(modules_to_save=[name.partition(".")[0]]).train == {"enc": "in modules_to_save"}


@pytest.mark.parametrize("excluded", [["mlp"], ["model.layers.1.mlp", "layers.0.mlp"], r"model\.layers\.\d+\.mlp"])
def test_the_name_of_a_module_excludes_what_is_inside_it(excluded):
    report = convert(model := toy("llama"), r=2, exclude_modules=excluded)
    assert len(report.converted) == 8 and not any("mlp" in name for name in report.converted)
    assert report.skipped["model.layers.0.mlp.down_proj"] == "in exclude_modules"
    assert not model.model.layers[0].mlp.down_proj.weight.requires_grad


def test_all_linear_and_others_in_a_list(tmp_path):
    peft = pytest.importorskip("peft")
    without = convert(toy("llama"), r=2)
    assert without.skipped == {"lm_head": "output embedding; name it in target_modules to convert it"}
    both = convert(model := toy("llama"), r=2, target_modules=["all-linear", "lm_head"])
    assert set(both.converted) == {*without.converted, "lm_head"}
    save_adapter(model, tmp_path)
    theirs = peft.get_peft_model(toy("llama"), peft.LoraConfig.from_pretrained(tmp_path))
    assert adapted_by(theirs) == set(both.converted)


def test_the_documentation_has_the_rules_in_their_order():
    rows = [f"| {rule.when} | {rule.by_default or '-'} | {rule.if_named or '-'} |" for rule in RULES]
    assert "\n".join(rows) in (ROOT / "docs" / "layers.md").read_text(encoding="utf-8")
