"""Parts of recomputed blocks in tiles of tokens: the values of the whole, computed as often; or whole, and why."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_qlora import convert, merge
from lightning_qlora.activations import token_tiles
from lightning_qlora.activations.token_tiles import TokenTiles
from lightning_qlora.dtypes.instance_method import instance_method
from lightning_qlora.texts import group
from tests.conftest import launch
from tests.toys import ARGUMENTS, LLAMA, assert_equal, ids, perturb
from tests.twin import dense_twin, error, matched

transformers = pytest.importorskip("transformers")

TOKENS = 80  # of a row
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"vocab_size": 128, "max_position_embeddings": 128}
KEYS = {"num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch):
    """Tiles of 16 tokens and more, so that small models have them."""
    monkeypatch.setattr(token_tiles, "LEAST_ROWS", 16)


def model_of(name):
    kind, config = {
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA | {"max_position_embeddings": 128})),
        "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**SMALL, **KEYS, head_dim=16)),
        "gemma3": (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig(**SMALL, **KEYS, head_dim=16)),
        "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128)),
        "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig(**SMALL, **KEYS, num_local_experts=4)),
        "bert": (transformers.BertForMaskedLM, transformers.BertConfig(**SMALL)),
        "t5": (
            transformers.T5ForConditionalGeneration,
            transformers.T5Config(
                d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=2, vocab_size=128, decoder_start_token_id=0
            ),
        ),
        "switch": (
            transformers.SwitchTransformersForConditionalGeneration,
            transformers.SwitchTransformersConfig(
                d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=2, vocab_size=128, num_experts=4,
                decoder_start_token_id=0, expert_capacity=8,
            ),
        ),
    }[name]  # fmt: skip
    torch.manual_seed(0)
    return kind(config).eval()


def converted(name="llama", setting="offload", dtype=torch.float32, **changes):
    module = model_of(name).to(dtype)
    report = convert(module, **ARGUMENTS | changes, gradient_checkpointing=setting)
    return perturb(module), report


def gradients(module, tokens=TOKENS, seed=0):
    module.zero_grad()
    torch.manual_seed(seed)
    tokens = ids(columns=tokens)
    module(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def close(ours, expected, bound=1e-5):
    assert ours.keys() == expected.keys() and ours
    worst = max(error(ours[name], expected[name]) for name in ours)
    assert worst < bound, worst


def tiled(module):
    """Group of each part that ran in tiles."""
    methods = {name: instance_method(part, TokenTiles) for name, part in module.named_modules()}
    return {group(name) for name, m in methods.items() if m and m.was_tiled}


# ---------------------------------------------------------------- the values of the whole

NORMS = {"input_layernorm", "post_attention_layernorm"}
HEADS = {"self_attn.q_norm", "self_attn.k_norm"}
EXPECTED = {
    "llama": {"mlp"} | NORMS,
    "qwen3": {"mlp"} | NORMS | HEADS,
    "gemma3": NORMS | HEADS | {"pre_feedforward_layernorm", "post_feedforward_layernorm"},
    "gpt2": {"mlp"},
    "mixtral": NORMS,
    "bert": set(),
    "t5": {"layer.*.DenseReluDense", "layer.*.layer_norm"},
    "switch": {"layer.*.layer_norm", "layer.*.mlp"},
}


class RunningMLP(nn.Module):
    """Called a feed-forward part, and made of its layers, but a token depends on those before it."""

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(LLAMA["hidden_size"], 128)
        self.down_proj = nn.Linear(128, LLAMA["hidden_size"])

    def forward(self, x):
        return self.down_proj(self.up_proj(x).relu().flip(-2).cumsum(-2).flip(-2)) / 100


def test_a_part_whose_tokens_depend_on_others_runs_whole():
    results = []
    for setting in (True, "offload"):
        module = model_of("llama")
        for layer in module.model.layers:
            layer.mlp = RunningMLP()
        convert(module, **ARGUMENTS, gradient_checkpointing=setting)
        results.append(gradients(perturb(module)))
    close(*results)
    assert tiled(module) == {"model.layers.*.input_layernorm", "model.layers.*.post_attention_layernorm"}


@pytest.mark.parametrize(
    "name", [name if name in ("llama", "gemma3") else pytest.param(name, marks=pytest.mark.slow) for name in EXPECTED]
)
def test_gradients_are_those_of_the_whole_and_plan_has_the_same_parts(name):
    module, _ = converted(name)
    close(gradients(module), gradients(converted(name, True)[0]))
    assert {part.split(".*.", 1)[1] for part in tiled(module)} == EXPECTED[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"trainable_token_indices": [4, 5]}], ids=str)
def test_gradients_are_those_of_the_dense_twin(dtype, changes):
    module, _ = converted(dtype=dtype, **changes)
    twin = dense_twin(module, model_of("llama"))
    for _ in range(2):  # accumulated
        tokens = ids(columns=TOKENS)
        for model in (module, twin):
            model(input_ids=tokens, labels=tokens).loss.backward()
    assert "model.layers.*.mlp" in tiled(module)
    pairs = [(ours.grad, dense.grad) for ours, dense in matched(module, twin).values() if dense.grad is not None]
    assert max(error(ours, dense) for ours, dense in pairs) < (1e-5 if dtype is torch.float32 else 0.05)


def test_with_few_tokens_all_is_as_with_true():
    module, report = converted()
    expected, _ = converted(setting=True)
    assert_equal(gradients(module, 12), gradients(expected, 12))
    assert "tiles" not in report.summary()
    module.eval()
    with torch.no_grad():
        assert_equal(*(model.eval()(input_ids=ids(columns=TOKENS)).logits for model in (module, expected)))
    assert not tiled(module)


def test_tiles_have_at_least_so_many_rows_and_are_as_many_as_the_widths_say():
    """The layers of Llama's feed-forward part: 128 + 128 + 64 values for 64 of its input."""
    module, _ = converted()
    for tokens, tiles in ((15, 0), (16, 2), (24, 3), (80, 5), (120, 5)):
        rows = []
        module.model.layers[0].mlp.act_fn = Counting(rows)
        gradients(module, tokens)
        rows.clear()
        gradients(module, tokens)
        assert len(rows) == 2 * max(tiles, 1) and sum(rows) == 2 * 2 * tokens and min(rows) >= 16


class Counting(nn.SiLU):
    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, x):
        self.rows.append(x.numel() // x.shape[-1])
        return super().forward(x)


# ---------------------------------------------------------------- dropout


class Blocks(nn.Module):
    """Two blocks with a feed-forward part of any kind."""

    def __init__(self, part, width=64):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(part, width) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self, part, width):
        super().__init__()
        self.before = nn.Linear(width, width)
        self.part = part(width)

    def forward(self, x):
        x = self.before(x)
        return x + self.part(x)


class DroppingMLP(nn.Module):
    """A feed-forward part with torch's dropout beside that of the adapters."""

    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(0.2)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return self.down(self.dropout(torch.relu(self.up(x))))


def blocks(part, **changes):
    module = Blocks(part)
    report = convert(module, **ARGUMENTS | changes, gradient_checkpointing="offload")
    return perturb(module), report


def test_dropout_draws_the_same_masks_in_both_passes_and_disturbs_no_others():
    """The output is linear in the last B, so its gradient times B is what B adds, with the same masks."""
    module, _ = blocks(DroppingMLP, lora_dropout=0.3)
    x = torch.randn(1, 64, 64)
    drawn = []

    def output():
        torch.manual_seed(3)
        y = module(x).sum()
        drawn.append(torch.rand(1))
        return y

    layer = module.blocks[1].part.down
    loss = output()
    loss.backward()
    drawn.append(torch.rand(1))
    assert "blocks.*.part" in tiled(module)
    added = (layer.lora_B.grad * layer.lora_B).sum().detach()
    with torch.no_grad():
        layer.lora_B.zero_()
    torch.testing.assert_close(loss.detach() - output().detach(), added, rtol=1e-4, atol=1e-4)
    assert_equal(drawn[0], drawn[2])
    torch.manual_seed(3)
    assert not torch.equal(drawn[0], drawn[1])


# ---------------------------------------------------------------- which parts can


class Causal(nn.Module):
    """A way between tokens that may begin with weights of 0."""

    def __init__(self, width, gate=1.0):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.gate = nn.Parameter(torch.tensor(gate))

    def forward(self, x):
        return self.layer(x) + self.gate * x.cumsum(-2)


class Normalized(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(self.layer(x).flatten(0, 1)).view_as(x)


class Convolved(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.convolution = nn.Conv1d(width, width, 3, padding=2, groups=width)

    def forward(self, x):
        return self.layer(self.convolution(x.mT)[..., : x.shape[-2]].mT)


@pytest.mark.parametrize("kind", [Causal, Normalized, Convolved], ids=lambda kind: kind.__name__)
def test_parts_that_need_other_tokens_run_whole(kind):
    module, _ = blocks(type("MLP", (kind,), {}))
    module(torch.randn(2, 80, 64)).sum().backward()
    assert not tiled(module)


class GatedMLP(nn.Module):
    """A part of which a small layer trains in full, and another one is frozen in full."""

    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.gate = nn.Linear(width, 1)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return torch.sigmoid(self.gate(x)) * self.down(nn.functional.gelu(self.up(x)))


@pytest.mark.parametrize("cache", [True, False])
def test_under_autocast_of_the_user(cache):
    """Its cache of casts must not keep those of a pass without gradients."""
    module, _ = blocks(GatedMLP, modules_to_save=["gate"])
    x = torch.randn(2, 32, 64)
    results = []
    for width in (32, 8):
        for start in range(0, 32, width):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
                module(x[:, start : start + width]).square().sum().backward()  # in the region that keeps casts
        results.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
        module.zero_grad()
    assert "blocks.*.part" in tiled(module) and any("gate" in name for name in results[0])
    close(*results, 0.02)


def test_several_rows_of_tokens_frozen_inputs_and_layers_without_an_adapter():
    module, _ = blocks(GatedMLP, exclude_modules=["blocks.0.part.up"])
    x = torch.randn(3, 2, 16, 64)
    for needs_x in (True, False):
        inputs = x.clone().requires_grad_(needs_x)
        module(inputs).square().sum().backward()
        ours = [*(p.grad for p in module.parameters() if p.grad is not None), *([inputs.grad] if needs_x else [])]
        module.zero_grad()
        expected = []
        for row in x.flatten(0, 1):  # too short for tiles
            row = row[None].requires_grad_(needs_x)
            module(row).square().sum().backward()
            expected.append(row.grad)
        sums = [*(p.grad for p in module.parameters() if p.grad is not None)]
        if needs_x:
            sums.append(torch.cat(expected).view_as(x))
        torch.testing.assert_close(ours, sums, rtol=1e-4, atol=1e-4)
        module.zero_grad()


# ---------------------------------------------------------------- what others do to a module


def test_a_second_derivative_is_refused():
    module, _ = converted()
    tokens = ids(columns=TOKENS)
    loss = module(input_ids=tokens, labels=tokens).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, [module.model.layers[0].mlp.up_proj.lora_B], create_graph=True)


@pytest.mark.slow
def test_a_compiled_module_computes_the_whole():
    module, _ = converted()
    expected = gradients(converted(setting=True)[0])
    close(gradients(torch.compile(module, backend="aot_eager")), {f"_orig_mod.{k}": v for k, v in expected.items()})
    assert not tiled(module)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_has_tiles_of_its_own(copied):
    module, _ = converted()
    expected = gradients(module)
    again = copied(module)
    part = again.model.layers[0].mlp
    assert instance_method(part, TokenTiles).module is part
    assert_equal(gradients(again), expected)
    merge(again)
    assert not any(instance_method(part, TokenTiles) for part in again.modules())


def test_a_forward_pass_without_a_backward_pass_and_a_graph_that_is_used_twice():
    module, _ = converted()
    expected = gradients(module)
    tokens = ids(columns=TOKENS)
    module.zero_grad()
    loss = module(input_ids=tokens, labels=tokens).loss
    module(input_ids=tokens, labels=tokens)
    for _ in range(2):
        loss.backward(retain_graph=True)
    twice = {name: p.grad / 2 for name, p in module.named_parameters() if p.grad is not None}
    assert_equal(twice, expected)


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """DDP, FSDP2 of blocks and of their parts, and tensor parallelism, beside the whole."""
    for rank in launch("tests.scripts.tiles_on_ranks", tmp_path)[1]:
        for strategy in ("ddp", "fsdp2", "fsdp2_of_parts", "tensor_parallel"):
            expected, _ = rank[strategy, True, 16]
            whole, text = rank[strategy, "offload", 1024]
            assert_equal(whole, expected)
            assert text.startswith("all blocks are recomputed; ") and "of inputs wait on the host" in text
            close(rank[strategy, "offload", 16][0], expected)
