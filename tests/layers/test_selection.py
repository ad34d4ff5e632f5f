import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_qlora import QLoRALinear, convert, merge, save_adapter
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.selection import REFUSE, RULES, select_layers
from tests.conftest import ROOT
from tests.layers.test_experts import qwen3_moe
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


def test_excluded_layers_stay_dense_and_frozen():
    model = toy("llama")
    report = convert(model, r=2, exclude_modules=["down_proj"])
    assert report.skipped["model.layers.0.mlp.down_proj"] == "in exclude_modules"
    layer = model.model.layers[0].mlp.down_proj
    assert not isinstance(layer, QLoRALinear)
    assert not layer.weight.requires_grad


def test_modules_to_save_train_in_full():
    model = toy("llama")
    report = convert(model, r=2, modules_to_save=["embed_tokens", "norm"])
    assert report.trained_in_full["model.embed_tokens"] == "in modules_to_save"
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trainable == {"model.embed_tokens.weight", "model.norm.weight"}


def test_the_output_embedding_stays_dense_unless_named():
    assert "output embedding" in convert(toy("llama"), r=2).skipped["lm_head"]
    model = toy("llama")
    assert "lm_head" in convert(model, r=2, target_modules=["lm_head", "q_proj"]).converted


def test_tied_weights_stay_tied_and_dense():
    model = toy("gpt2")
    report = convert(model, r=2)
    assert "tied to transformer.wte.weight" in report.skipped["lm_head"]
    assert model.lm_head.weight is model.transformer.wte.weight


def test_routers_stay_dense_and_experts_are_converted():
    kind, config = qwen3_moe()
    report = convert(kind(config), r=2)
    assert not any(name.endswith(".gate") for name in report.converted)
    assert "model.layers.0.mlp.experts.gate_up_proj" in report.converted


def test_a_linear_router_is_known_by_its_experts():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(64, 32)
            self.experts = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])

    report = convert(Mixture(), r=2)
    assert "router" in report.skipped["gate"]
    assert report.converted == ["experts.0", "experts.1"]


def test_a_layer_smaller_than_its_adapter_trains_in_full():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 2))
    report = convert(model, r=8)
    assert report.converted == ["0"]
    assert "rank 8 would not be smaller than its 2x256 weights" in report.trained_in_full["1"]
    assert model[1].weight.requires_grad
    assert model[1].bias.requires_grad
    # r * (in + out) = in * out is the border
    assert convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(128, 128)), r=32).converted == ["1"]


def test_a_layer_with_few_weights_stays_dense():
    """Gemma 3n clamps its 4x16 weights in training."""
    report = convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(16, 4), nn.Linear(16, 5)), r=1)
    assert report.converted == ["0", "2"]
    assert report.trained_in_full == {"1": "its 4x16 weights are too few for 4 bits"}


def test_a_small_layer_that_was_frozen_stays_frozen():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 2).requires_grad_(False))
    assert "1" in convert(model, r=8).skipped
    assert not model[1].weight.requires_grad


def test_a_small_layer_that_is_named_gets_its_adapter():
    assert convert(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 2)), r=8, target_modules=["1"]).converted == ["1"]


def test_layers_that_other_code_only_reads_are_converted():
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    assert convert(model, r=2).converted == ["self_attn.out_proj", "linear1", "linear2"]


class Scaled(nn.Linear):
    """A subclass that computes something else, through its base class."""

    def forward(self, x):
        return super().forward(x) * 2


def test_parametrized_layers_are_skipped_and_subclasses_are_converted():
    class Plain(nn.Linear):
        pass

    model = nn.Sequential(
        nn.Linear(64, 64), Scaled(64, 64), Plain(64, 64), nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    )
    assert convert(model, r=2).converted == ["0", "1", "2"]


def test_a_layer_with_a_parametrized_bias_is_not_converted():
    layer = nn.Linear(64, 64)
    x = torch.randn(2, 64)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Softplus())
    before = layer(x)
    report = convert(nn.Sequential(layer, nn.Linear(64, 64), nn.Linear(64, 64, bias=False)), r=2)
    assert report.converted == ["1", "2"]
    assert report.skipped == {"0": "its bias is computed (parametrized), not stored"}
    assert torch.equal(layer(x), before)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(0, 64), (64, 0)])
def test_an_empty_layer_is_not_converted_even_if_it_is_named(shape):
    report = convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(*shape)), r=2, target_modules=["0", "1"])
    assert report.converted == ["0"]
    assert report.skipped == {"1": f"its {shape[1]}x{shape[0]} weight is empty"}
    with pytest.raises(ValueError, match=r"1: its .* weight is empty"):
        convert(nn.Sequential(nn.ReLU(), nn.Linear(*shape)), r=2, target_modules=["1"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target_modules": ["qproj"]}, r"no module of this model fits 'qproj'\. .*'q_proj'"),
        ({"target_modules": ["q_proj", "w_proj"]}, r"fits 'w_proj'\."),
        ({"target_modules": r".*\.attention"}, "no module of this model fits"),
        ({"target_modules": "all_linear"}, "'all-linear', alone or in a list, means all linear layers"),
        ({"target_modules": "q_proj, v_proj"}, "A list has such endings, a string is a regular expression"),
        ({"modules_to_save": ["classifier"]}, r"modules_to_save=\['classifier'\].*'norm'.*A list has names [^=]*$"),
        ({"target_modules": ["embed_tokens"]}, r"'model\.embed_tokens', a Embedding.*modules_to_save"),
    ],
)
def test_names_that_match_nothing_are_refused_with_the_names_that_exist(arguments, words):
    with pytest.raises(ValueError, match=words):
        convert(toy("llama"), r=2, **arguments)


def test_a_layer_with_a_forward_of_its_own_keeps_it_and_gets_it_back_by_merge():
    layer = Scaled(64, 64)
    x = torch.randn(3, 64)
    convert(nn.Sequential(layer), r=2, lora_dropout=0.0)
    with torch.no_grad():
        layer.lora_B.normal_()
    expected = 2 * torch.nn.functional.linear(x, layer.decode() + delta(layer), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.lora_A.grad.abs().max() > 0 and layer.lora_B.grad.abs().max() > 0
    torch.testing.assert_close(merge(layer)(x), expected)
    assert type(layer) is Scaled


class Penalized(nn.Linear):
    """A subclass that computes the same, and can do more."""

    def penalty(self):
        return self.weight.square().sum()


def test_a_subclass_keeps_its_methods_and_its_class():
    layer = Penalized(64, 64).eval()
    layer.note = "mine"
    model = nn.Sequential(layer)
    assert convert(model, r=2).converted == ["0"]
    with torch.no_grad():
        layer.lora_B.normal_()
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


@pytest.mark.parametrize("name", ["__call__", "scaling", "decode", "compute", "r"])
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


def test_a_layer_with_an_attribute_that_a_4_bit_layer_would_overwrite_is_not_converted():
    layer = nn.Linear(64, 64)
    layer.scaling = 3.0
    report = convert(nn.Sequential(nn.Linear(64, 64), layer), r=2)
    assert "Linear has a scaling of its own" in report.skipped["1"] and layer.scaling == 3.0


def test_falcons_linear_layers_are_converted():
    config = transformers.FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=128)
    report = convert(transformers.FalconForCausalLM(config), r=4)
    names = [name.rpartition(".")[2] for name in report.converted]
    assert names == ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


class Shared(nn.Module):
    """One block in two places."""

    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(64, 64))
        self.dec = self.enc
        self.own = nn.Linear(64, 64)


@pytest.mark.parametrize("name", ["enc.0", "dec.0"])
def test_a_layer_in_several_places_is_chosen_by_any_of_its_names(name):
    choice = select_layers(Shared(), QLoRAConfig(r=4, exclude_modules=[name]))
    assert (list(choice.convert), choice.skip) == (["own"], {"enc.0": "in exclude_modules"})
    assert list(select_layers(Shared(), QLoRAConfig(r=4, target_modules=[name])).convert) == ["enc.0"]
    assert list(select_layers(Shared(), QLoRAConfig(r=4, target_modules=name.replace(".", "[.]"))).convert) == ["enc.0"]
    block = name.partition(".")[0]
    assert select_layers(Shared(), QLoRAConfig(r=4, modules_to_save=[block])).train == {"enc": "in modules_to_save"}


def test_a_pattern_that_matches_only_a_dense_layer_says_why_it_is_dense():
    net = nn.Sequential(nn.Linear(48, 96), nn.Linear(96, 48))
    with pytest.raises(ValueError, match=r"rank_pattern: '0' fits none .* 0: .*an adapter of rank 70 would not be"):
        convert(net, r=4, rank_pattern={"0": 70})


@pytest.mark.parametrize("excluded", [["mlp"], ["model.layers.1.mlp", "layers.0.mlp"], r"model\.layers\.\d+\.mlp"])
def test_the_name_of_a_module_excludes_what_is_inside_it(excluded):
    report = convert(toy("llama"), r=2, exclude_modules=excluded)
    assert len(report.converted) == 8 and not any("mlp" in name for name in report.converted)
    assert report.skipped["model.layers.0.mlp.down_proj"] == "in exclude_modules"


@pytest.mark.parametrize("excluded", [["vision"], ["lp"], r"mlp"])
def test_an_exclusion_that_fits_nothing_is_refused(excluded):
    with pytest.raises(ValueError, match=r"exclude_modules=.*: no module of this model fits '(vision|lp|mlp)'"):
        convert(toy("llama"), r=2, exclude_modules=excluded)


def test_all_linear_and_others_in_a_list(tmp_path):
    peft = pytest.importorskip("peft")
    both, without = (convert(toy("llama"), r=2, target_modules=t) for t in (["all-linear", "lm_head"], "all-linear"))
    assert set(both.converted) == {*without.converted, "lm_head"}
    convert(model := toy("llama"), r=2, target_modules=["all-linear", "lm_head"])
    save_adapter(model, tmp_path)
    theirs = peft.get_peft_model(toy("llama"), peft.LoraConfig.from_pretrained(tmp_path))
    assert adapted_by(theirs) == set(both.converted)


def test_a_tied_head_that_is_named_among_others_is_warned_of():
    with pytest.warns(UserWarning, match=r"names layers that stay dense.* lm_head: its weight is tied to model\.embed"):
        report = convert(toy("llama", tie_word_embeddings=True), r=2, target_modules=["all-linear", "lm_head"])
    assert "lm_head" in report.skipped and len(report.converted) == 14


def test_the_documentation_has_the_rules_in_their_order():
    rows = [f"| {rule.when} | {rule.by_default or '-'} | {rule.if_named or '-'} |" for rule in RULES]
    assert "\n".join(rows) in (ROOT / "docs" / "layers.md").read_text()


def test_the_first_rule_that_applies_decides():
    """A layer that is excluded, new, named, of a class of its own and too small: each rule hides those after it."""
    net = nn.Sequential(Penalized(64, 64), nn.Linear(64, 64))
    net[0].packed = None
    arguments = {"r": 64, "exclude_modules": ["0"]}
    assert select_layers(net, QLoRAConfig(**arguments)).skip["0"] == "in exclude_modules"
    assert select_layers(net, QLoRAConfig(r=64, target_modules=["1"])).skip["0"] == "not in target_modules"
    assert "has a packed of its own" in select_layers(net, QLoRAConfig(r=64)).skip["0"]
    assert "has a packed of its own" in select_layers(net, QLoRAConfig(r=64, target_modules=["0"])).reasons(REFUSE)["0"]
    del net[0].packed
    assert "an adapter of rank 64" in select_layers(net, QLoRAConfig(r=64)).train["0"]
    assert list(select_layers(net, QLoRAConfig(r=64, target_modules=["0"])).convert) == ["0"]


def test_the_reason_of_tied_layers_names_the_other_one():
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    module[1].weight = module[0].weight
    reasons = convert(module, r=4).skipped
    assert reasons == {"0": "its weight is tied to 1.weight", "1": "its weight is tied to 0.weight"}
