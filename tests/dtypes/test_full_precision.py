"""What trains in full: held in fp32, so that each step arrives, and computed as the model in 16 bits computes it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_qlora import QLoRAPrecision, convert, load_adapter, merge, save_adapter
from lightning_qlora.dtypes.instance_method import METHODS
from lightning_qlora.plugin.audit import LOST
from lightning_qlora.tensors.held_types import TYPES, full_precision_parameters
from tests.conftest import Classifier, loader
from tests.toys import ARGUMENTS, Lit, assert_equal, ids, toy
from tests.twin import dense_twin, error

pytest.importorskip("transformers")


def in_full(module):
    return {n: p for n, p in module.named_parameters() if p.requires_grad and "lora_" not in n}


@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        ("tied llama", ["lm_head", "input_layernorm"]),
        ("llama", ["norm", "embed_tokens"]),
        ("vit", ["embeddings", "layernorm"]),  # it casts its input to the type of the first weight
        ("convnext", ["embeddings", "dwconv"]),
        ("whisper", ["conv1", "layer_norm"]),
        ("t5", ["wo", "final_layer_norm", "shared"]),
    ],
)
def test_every_element_with_a_gradient_moves_in_a_step(kind, modules):
    pytest.importorskip("transformers")
    from tests.architectures import checks

    if kind == "tied llama":
        lit = checks.Lit(toy("llama", tie_word_embeddings=True), {"input_ids": ids(), "labels": ids()})
    else:
        lit = checks.lit_of(kind)
    inputs = lit.inputs.items()
    lit.inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs}
    convert(lit.bfloat16(), **ARGUMENTS, modules_to_save=modules)
    before = {name: p.detach().clone() for name, p in in_full(lit).items()}
    assert {p.dtype for p in before.values()} == {torch.float32}
    optimizer = torch.optim.AdamW(lit.parameters(), lr=2e-5, eps=1e-30)
    lit.training_step().backward()
    optimizer.step()
    for name, p in in_full(lit).items():
        assert p.grad.any() and ((p != before[name]) | (p.grad == 0)).all(), name


class Tied(nn.Module):
    """Modules that read their parameters in other ways, and those of modules inside them."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 16, padding_idx=0)
        self.norm = nn.LayerNorm(16)
        self.convolution = nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 16, 3, padding=1))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.recurrent = nn.GRU(16, 16, batch_first=True, bidirectional=True)
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(32)), nn.Parameter(torch.randn(32))])
        self.last = nn.Linear(32, 16)
        self.linear = nn.Linear(16, 16)

    def forward(self, tokens):
        x = self.norm(self.embedding(tokens))
        x = x + self.convolution(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        x = self.recurrent(x)[0] * self.scales[0] + self.scales[1]
        x = self.linear(self.last(x.to(self.last.weight.dtype)))
        return F.linear(x, self.embedding.weight)


def tied():
    """In bf16 also on a CPU that is slow in it."""
    model = Tied().bfloat16()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    modules = [name for name, _ in model.named_children() if name != "linear"]
    convert(model, r=1, target_modules=["linear"], lora_dropout=0.0, modules_to_save=modules, compute_dtype="bf16")
    return model


TOKENS = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])


def test_outputs_and_gradients_are_as_close_to_fp32_as_those_of_the_model_in_bf16():
    dtype = torch.bfloat16
    ours = tied()
    plain = tied().to(dtype)
    exact = tied().float()
    assert {p.dtype for p in in_full(ours).values()} == {torch.float32}
    outputs = [model(TOKENS) for model in (ours, plain, exact)]
    assert outputs[0].dtype is dtype and outputs[2].dtype is torch.float32
    for y in outputs:
        y.square().sum().backward()
    grads = [[p.grad for p in in_full(model).values()] for model in (ours, plain, exact)]
    assert {grad.dtype for grad in grads[0]} == {torch.float32}
    for y, other, expected in zip(*([y, *grad] for y, grad in zip(outputs, grads, strict=True)), strict=True):
        error = (y.float() - expected).norm()
        assert error <= 1.3 * (other.float() - expected).norm() + 1e-3 * expected.norm()
    with torch.no_grad():
        assert torch.allclose(ours.eval()(TOKENS), plain.eval()(TOKENS), rtol=2e-2, atol=2e-2)


def test_a_model_in_a_lightning_module_computes_the_same_outside_of_its_steps():
    """Mamba multiplies with the weight of its `dt_proj`, which is so small here that it trains in full."""
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=64, num_hidden_layers=1, state_size=8, vocab_size=128))
    lit = Lit(model.bfloat16().eval())
    convert(lit, **ARGUMENTS, compute_dtype="bf16")
    assert model.backbone.layers[0].mixer.dt_proj.weight.dtype is torch.float32
    dense = merge(copy.deepcopy(lit)).model
    torch.testing.assert_close(lit.model(ids()).logits, dense(ids()).logits, atol=5e-2, rtol=5e-2)
    assert torch.equal(lit.model.generate(ids(), max_new_tokens=2)[:, :12], ids())


@pytest.mark.parametrize("how", ["compile", "compile a block", "autocast"])
def test_the_module_still_works_with(how):
    model = tied()
    expected = model(TOKENS)
    use = model
    if how == "compile":
        model = nn.Sequential(model.embedding, model.norm, model.linear)
        expected = model(TOKENS)
        use = torch.compile(model, backend="aot_eager")
    if how == "compile a block":
        model.norm.compile(backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = use(TOKENS)
    torch.testing.assert_close(y, expected, atol=0.05 if how == "autocast" else 0, rtol=0)
    y.sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in in_full(use).values())


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (lambda: nn.BatchNorm1d(16), nn.Module.__call__),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)), nn.Module.__call__),
        (lambda: nn.utils.spectral_norm(nn.Linear(16, 16)), nn.Module.__call__),
    ],
    ids=["BatchNorm", "spectral_norm", "old spectral_norm"],
)
def test_modules_whose_tensors_have_one_type_train_as_in_fp32(make, call):
    """Torch takes no 16-bit statistics beside fp32 parameters, and no 16-bit weights of an fp32 EmbeddingBag."""

    def built():
        torch.manual_seed(0)
        return nn.ModuleDict({"linear": nn.Linear(16, 16), "head": make()}).bfloat16()

    ours = built()
    convert(ours, r=1, target_modules=["linear"], lora_dropout=0.0, modules_to_save=["head"], compute_dtype="bf16")
    dense = dense_twin(ours, built())
    x = torch.randn(3, 8, 16).bfloat16()
    for module, dtype in ((ours, torch.bfloat16), (dense, torch.float32)):
        optimizer = torch.optim.SGD(module["head"].parameters(), lr=0.01)
        for batch in x.to(dtype):
            optimizer.zero_grad()
            y = call(module["head"], module["linear"](batch))
            assert y.dtype is dtype
            (y.float() - 1).square().mean().backward()
            optimizer.step()
    expected = dense["head"].state_dict()
    for name, value in ours["head"].state_dict().items():
        assert value.dtype is not torch.bfloat16 and error(value, expected[name]) < 0.01, name
    merge(ours)
    assert {tensor.dtype for tensor in ours.state_dict().values()} <= {torch.bfloat16, torch.int64}


def test_merging_gives_the_type_and_the_classes_of_before_and_keeps_small_changes():
    model = tied()
    with torch.no_grad():
        model.norm.weight.fill_(1.0)
        model.embedding.weight.fill_(1 + 0.1 * 2**-7)  # a tenth of a step of bf16
    merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in model.parameters())
    names = [[part.__class__.__name__ for part in each.modules()] for each in (model, Tied())]
    assert names[0] == names[1] and not any(TYPES in vars(part) or METHODS in vars(part) for part in model.modules())
    assert (model.norm.weight == 1).all()
    assert 0 < (model.embedding.weight != 1).float().mean() < 0.3


def test_what_cant_be_held_in_fp32_stays():
    scripted = torch.jit.script(nn.LayerNorm(16))
    module = nn.ModuleDict({"a": scripted, "norm": nn.LayerNorm(16), "linear": nn.Linear(16, 16)}).bfloat16()
    convert(module, r=1, target_modules=["linear"], modules_to_save=["a", "norm"])
    types = {name: p.dtype for name, p in in_full(module).items()}
    assert types["a.weight"] is torch.bfloat16
    assert types["norm.weight"] is torch.float32


def test_a_cast_after_conversion_is_named_at_the_first_step(trainer):
    module = Classifier().bfloat16()
    arguments = {"r": 4, "lora_dropout": 0.1, "modules_to_save": ["2"]}
    convert(module, **arguments)
    module.bfloat16()
    module.forward = lambda x: module.net(x.bfloat16()).float()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=2e-4)
    plugin = QLoRAPrecision(**arguments)
    trainer(plugins=plugin, enable_checkpointing=False).fit(module, loader())
    assert "net.2.weight" in plugin.report.notes[LOST]


def test_adapter_folders_hold_fp32_and_peft_reads_them(tmp_path):
    peft = pytest.importorskip("peft")
    model = toy("llama").bfloat16()
    base = toy("llama").bfloat16()
    convert(model, **ARGUMENTS, modules_to_save=["norm", "lm_head"])
    with torch.no_grad():
        for p in in_full(model).values():
            p.add_(1e-4)
    save_adapter(model, tmp_path)
    again = toy("llama").bfloat16()
    convert(again, adapter=str(tmp_path))
    later = toy("llama").bfloat16()
    convert(later, **ARGUMENTS, modules_to_save=["norm", "lm_head"])
    load_adapter(later, tmp_path)
    for other in (again, later):
        assert_equal(in_full(other), in_full(model))
    with_peft = peft.PeftModel.from_pretrained(base, tmp_path)
    weight = with_peft.base_model.model.lm_head.modules_to_save["default"].weight
    assert torch.equal(weight, model.lm_head.weight.to(weight.dtype))


class Encoder(nn.Module):
    """torch's encoder, whose fused layers take weights of one type."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(64, 2, 128, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(64, 64)

    def forward(self, x, mask):
        return self.head(self.encoder(x, src_key_padding_mask=mask))


@pytest.mark.parametrize(
    ("part", "masked"),
    [("layers.0.linear1", True), ("norm2", False), ("out_proj", True), ("self_attn", False), ("layers.1", True)],
)
def test_torchs_encoder_of_which_a_part_trains_computes_the_same_without_gradients(part, masked):
    module = Encoder().bfloat16()
    convert(module, r=2, lora_dropout=0.0, target_modules=["head"], modules_to_save=[part])
    module.eval()
    x = torch.randn(2, 5, 64).bfloat16()
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None
    expected = module(x, mask)
    with torch.no_grad():
        y = module(x, mask)
    assert torch.equal(y, expected) and not torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize(
    ("dtype", "compute_dtype"),
    [(torch.bfloat16, "fp32"), (torch.float16, "fp32"), (torch.float16, "bf16"), (torch.bfloat16, "bf16")],
)
def test_a_compute_type_that_is_asked_for_holds_beside_what_trains_in_full(dtype, compute_dtype):
    """There the whole module computes under autocast."""
    x = torch.randn(16, 64).to(dtype)
    outputs = []
    for modules in ([], ["2"]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).to(dtype)
        convert(net, **ARGUMENTS | {"target_modules": ["0"]}, modules_to_save=modules, compute_dtype=compute_dtype)
        net[0].register_forward_hook(lambda _layer, _input, output: outputs.append(output))
        net.eval()(x)
    assert outputs[1].dtype is dtype
    assert torch.equal(*outputs)
    dense = F.linear(x.float(), net[0].packed_weight.dequantize(torch.float32), net[0].bias.float())
    rounding = torch.finfo(dtype if compute_dtype == "fp32" else torch.bfloat16).eps
    assert error(outputs[1].float(), dense) < rounding / 2


def test_a_tied_parameter_that_trains_in_full_counts_once():
    module = nn.ModuleDict({"words": nn.Embedding(50, 64), "head": nn.Linear(64, 50, bias=False)}).bfloat16()
    module["head"].weight = module["words"].weight
    report = convert(module, r=4, modules_to_save=["words", "head"])
    assert report.full_precision_bytes == 4 * 50 * 64
    assert [name for name, *_ in full_precision_parameters(module.named_modules())] == ["words.weight"]


def test_a_gradient_from_before_the_conversion_stays():
    module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).bfloat16()
    module(torch.randn(2, 64).bfloat16()).square().sum().backward()
    expected = module[1].weight.grad.float()
    convert(module, r=4, modules_to_save=["1"])
    assert torch.equal(module[1].weight.grad, expected)
