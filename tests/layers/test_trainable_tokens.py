"""Rows of an embedding that train alone, compared with torch's gradient of the whole matrix and with PEFT."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

from lightning_qlora import (
    CheckpointMismatchError,
    QLoRAConfig,
    convert,
    disable_adapter,
    estimate_memory,
    load_adapter,
    merge,
    save_adapter,
)
from lightning_qlora.adapters.peft_folder import read_adapter
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.logits.deferred_logits import DeferredLogits
from lightning_qlora.optim.optimizer_parameters import optimizer_parameters, replace_parameters_by_adapters
from lightning_qlora.selection.token_selection import check_tokens
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.survey import survey
from lightning_qlora.tools.merge_folder import merge_folder
from tests.adapters.folders import adapter_of
from tests.toys import LLAMA, Lit, assert_equal, ids, logits, needs, perturb, pretrain, toy

TOKENS = [7, 100, int(ids()[0, 0]), 3, int(ids()[1, 5])]
KEY = "model.embed_tokens.token_adapter.trainable_tokens_delta"
ARGUMENTS = {"r": 4, "lora_dropout": 0.0}
UNTIED = {"embed_tokens": TOKENS, "lm_head": TOKENS[:2]}


def tied():
    return toy("llama", tie_word_embeddings=True)


def near(ours, expected):
    assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def converted(name="llama", tokens=TOKENS, scale=0.05, model=None, **changes):
    model = model or toy(name, **changes)
    convert(model, trainable_token_indices=tokens, **ARGUMENTS)
    return perturb(model, scale)


def resized(seed, rows=131):
    """A model with three new tokens, whose rows transformers draws at random."""
    model = tied()
    torch.manual_seed(seed)
    model.resize_token_embeddings(rows)
    return model


def delta(model):
    return model.get_input_embeddings().token_adapter.trainable_tokens_delta


@pytest.mark.parametrize(("name", "deferred"), [("llama", True), ("t5", False)])
def test_the_rows_have_the_gradient_of_the_whole_embedding_and_nothing_else_of_it_trains(name, deferred):
    model, without = (toy(name, tie_word_embeddings=True) for _ in range(2))
    convert(without, **ARGUMENTS)
    report = convert(model, trainable_token_indices=TOKENS, deferred_logits=deferred, **ARGUMENTS)
    near(logits(model), logits(without))
    perturb(model)
    output = model(input_ids=ids(), labels=ids())
    assert isinstance(output.logits, DeferredLogits) == deferred
    output.loss.backward()
    whole = merge(copy.deepcopy(model))
    weight = whole.get_input_embeddings().weight.requires_grad_()
    loss = whole(input_ids=ids(), labels=ids()).loss
    (grad,) = torch.autograd.grad(loss, weight)
    assert_close(output.loss, loss)
    assert_close(delta(model).grad, grad[TOKENS], atol=1e-5, rtol=1e-3)
    assert not model.get_input_embeddings()._parameters["weight"].requires_grad
    assert report.trained_rows == {"shared" if name == "t5" else "model.embed_tokens": len(TOKENS)}
    assert "5 rows train, the others are frozen" in str(report) and " in full" not in report.summary().splitlines()[0]


@pytest.mark.parametrize(
    ("name", "tokens", "tied"),
    [
        ("llama", TOKENS, True),
        ("llama", TOKENS, False),
        ("llama", UNTIED, False),
        ("gpt2", TOKENS, True),
        ("t5", TOKENS, True),
    ],
)
def test_peft_reads_the_folder_and_its_folder_is_read(name, tokens, tied, tmp_path):
    peft = pytest.importorskip("peft")
    model = converted(name, tokens, tie_word_embeddings=tied)
    expected = logits(model)
    save_adapter(model, tmp_path / "ours")
    base = copy.deepcopy(model)
    for layer in adapted_layers(base).values():
        layer.lora_B.data.zero_()
    merge(base).get_input_embeddings().weight.data[TOKENS] = 1  # rows of other values, which PEFT replaces
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    near(logits(wrapped), expected)
    wrapped.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert_equal(theirs, ours)
    again = toy(name, tie_word_embeddings=tied)
    convert(again, adapter=str(tmp_path / "theirs"))
    assert torch.equal(logits(again), expected)
    third = converted(name, tokens, tie_word_embeddings=tied)
    load_adapter(third, tmp_path / "theirs")
    assert torch.equal(logits(third), expected)


def test_a_list_of_peft_is_for_the_input_embedding(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=TOKENS)
    perturb(peft.get_peft_model(tied(), config)).save_pretrained(tmp_path)
    model = tied()
    convert(model, adapter=str(tmp_path))
    expected = load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.{KEY}"]
    assert torch.equal(delta(model), expected) and adapter_of(model).tokens == {"model.embed_tokens": TOKENS}


class Reads(nn.Module):
    """A language model that reads the weight of its embedding, as Whisper, DeBERTa and SASRec do."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(128, 64)
        self.body = nn.Linear(64, 64)

    def forward(self, tokens):
        weight = self.embed.weight
        x = self.body(self.embed(tokens) + F.embedding(tokens, weight) + weight[tokens])
        return F.linear(x, weight, weight[:, 0]) + x @ weight.T + torch.einsum("bte,ve->btv", x, weight)


def test_code_that_reads_the_weight_gets_the_rows_that_train():
    torch.manual_seed(0)
    model = Reads()
    convert(model, trainable_token_indices=TOKENS, **ARGUMENTS)
    before = model(ids())
    whole = merge(copy.deepcopy(perturb(model)))
    weight = whole.embed.weight.requires_grad_()
    output = model(ids())
    expected = whole(ids())
    near(output, expected)
    output.square().mean().backward()
    (grad,) = torch.autograd.grad(expected.square().mean(), weight)
    of_rows = model.embed.token_adapter.trainable_tokens_delta.grad
    assert_close(of_rows, grad[TOKENS], atol=1e-5, rtol=1e-3)
    near(torch.compile(model, backend="eager")(ids()), expected)
    with pytest.raises(RuntimeError, match="read-only"):
        model.embed.weight.detach()[TOKENS] = 0
    with disable_adapter(model):
        copy.deepcopy(model.embed.weight).zero_()
        assert_close(model(ids()), before)


def test_rows_of_an_output_embedding_with_a_bias_compute_as_in_the_dense_layer():
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50))
    weight, bias = model[2].weight.data.clone(), model[2].bias.data.clone()
    convert(model, target_modules=["1"], trainable_token_indices={"2": [3, 7]}, **ARGUMENTS)
    rows = model[2].token_adapter.trainable_tokens_delta
    x = torch.randn(5, 32)
    assert_close(model[2](x), F.linear(x, weight, bias))
    rows.data.copy_(weight[[3, 7]] + torch.randn(2, 32))
    with disable_adapter(model):
        assert_close(model[2](x), F.linear(x, weight, bias))
    y = model[2](x)
    weight[[3, 7]] = rows.data
    assert_close(y, F.linear(x, weight.requires_grad_(), bias))
    (grad,) = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), weight)
    y.square().sum().backward()
    assert_close(rows.grad, grad[[3, 7]])


def test_layers_that_are_tied_after_conversion_share_weight_and_rows():
    model = converted(tie_word_embeddings=True)
    expected = logits(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert model.lm_head.base().weight is model.model.embed_tokens.base().weight
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("reads", [False, True])
def test_the_row_of_the_padding_token_gets_no_gradient_as_in_torch(reads):
    def loss(module):
        tokens = torch.tensor([2, 5, 5, 7])
        y = F.embedding(tokens, module[0].weight, 2) if reads else module[0](tokens)
        return module[1](y).square().sum()

    module = nn.Sequential(nn.Embedding(8, 64, padding_idx=2), nn.Linear(64, 64))
    convert(module, trainable_token_indices=[5, 2], r=4)
    loss(module).backward()
    grad = module[0].token_adapter.trainable_tokens_delta.grad
    whole = merge(module)
    whole[0].weight.requires_grad_()
    loss(whole).backward()
    assert_close(grad, whole[0].weight.grad[[5, 2]])


def test_an_embedding_that_scales_its_output_stays_as_it_was_in_bf16_and_can_be_compiled():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 72, "num_hidden_layers": 1, "tie_word_embeddings": True}
    config = transformers.Gemma3TextConfig(**LLAMA | sizes, head_dim=16)
    model = transformers.Gemma3ForCausalLM(config).to(torch.bfloat16).eval()
    embedded = model.get_input_embeddings()(ids())
    convert(model, trainable_token_indices=TOKENS, **ARGUMENTS, compute_dtype="bf16")
    embedding = model.get_input_embeddings()
    assert type(embedding).__name__ == "TrainableTokensGemma3TextScaledWordEmbedding"
    assert torch.equal(embedding(ids()), embedded) and delta(model).dtype is torch.float32
    perturb(model, scale=1.0)
    changed = embedding(ids())
    assert torch.equal((changed != embedded).any(-1), torch.isin(ids(), torch.tensor(TOKENS)))
    assert torch.equal(torch.compile(embedding, backend="eager", fullgraph=True)(ids()), changed)
    other = copy.deepcopy(model)
    assert delta(other) is other.lm_head.token_adapter.trainable_tokens_delta is not delta(model)
    with disable_adapter(model):
        assert torch.equal(embedding(ids()), embedded)


def test_a_checkpoint_goes_on_in_another_process_where_the_rows_of_new_tokens_have_other_random_values():
    tokens = [130, 128, 129]
    first = converted(model=resized(1), tokens=tokens)
    second = converted(model=resized(2), tokens=tokens, scale=0)
    assert not torch.equal(first.model.embed_tokens.weight, second.model.embed_tokens.weight)
    state = first.state_dict()
    assert not any(key.endswith("embed_tokens.weight") for key in state)
    second.load_state_dict(state)
    assert torch.equal(logits(first), logits(second))
    with pytest.raises(CheckpointMismatchError, match=r"\[130, 128, 129\].* in the checkpoint and .*\[128\].* here"):
        converted(model=resized(1), tokens=[128]).load_state_dict(first.state_dict())
    dense = toy("llama", seed=3, vocab_size=131, tie_word_embeddings=True)
    second.load_state_dict(dense.state_dict())
    assert torch.equal(delta(second), dense.model.embed_tokens.weight[tokens])


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_merged_into_a_folder_as_in_memory(tied, tmp_path):
    tokens = [128, 130] if tied else {"embed_tokens": [128, 130], "lm_head": [1, 129]}
    model = pretrain(toy("llama", tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "small")
    model.resize_token_embeddings(131)
    model.save_pretrained(tmp_path / "base")
    converted(model=model, tokens=tokens)
    save_adapter(model, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    merge_folder(tmp_path / "base", adapter, tmp_path / "merged")
    loaded = type(model).from_pretrained(tmp_path / "merged").state_dict()
    merged = merge(model).state_dict()
    assert_equal(loaded, merged)
    assert type(model.get_input_embeddings()) is nn.Embedding and type(model.lm_head) is nn.Linear
    with pytest.raises(ValueError, match=r"has the 128 rows 0 to 127, and not 1(29|30). Call resize_token_embeddings"):
        merge_folder(tmp_path / "small", adapter, tmp_path / "refused")


@pytest.mark.parametrize(
    ("tokens", "others", "message"),
    [
        ([128], {}, r"'model.embed_tokens' has the 128 rows 0 to 127, and not 128. Call resize_token_embeddings"),
        ([1, 2, 1], {}, "an index stands in a list more than once"),
        ([-1], {}, r"index in trainable_token_indices=-1: must be an integer >= 0"),
        ({"nothing": [1]}, {}, r"'nothing' fits no module; .* has the embeddings \['model.embed_tokens'\]"),
        ({"norm": [1]}, {}, "'model.norm' is a LlamaRMSNorm: only rows of nn.Embedding and nn.Linear"),
        ([1], {"modules_to_save": ["lm_head"]}, "'lm_head' trains in full .* or out of trainable_token_indices"),
        ({"embed_tokens": [1], "lm_head": [2]}, {}, r"'lm_head' was .*, or is tied to a layer, with the rows \[1\]"),
    ],
)
def test_what_does_not_fit_is_named(tokens, others, message):
    with pytest.raises(ValueError, match=message):
        convert(tied(), trainable_token_indices=tokens, r=4, **others)


def test_a_layer_can_be_tied_after_conversion():
    model = converted()
    head = nn.Linear(1, 1, bias=False)
    head.weight = model.model.embed_tokens.weight
    hidden = torch.randn(3, head.weight.shape[1])
    y = head(hidden)
    torch.testing.assert_close(y, hidden @ (model.model.embed_tokens.weight * 1).T)
    y.square().sum().backward()
    assert delta(model).grad.abs().max() > 0


def test_modules_without_an_embedding_or_with_one_that_other_code_uses_are_refused():
    with pytest.raises(ValueError, match=r"has no nn.Embedding.*Pass \{name of the layer: \[1\]\}"):
        convert(nn.Sequential(nn.Linear(64, 64)), trainable_token_indices=[1], r=4)
    module = nn.ModuleDict({"embedding": nn.Embedding(8, 64), "layer": nn.Linear(64, 64), "user": nn.Module()})
    module["user"].table = module["embedding"].weight
    with pytest.raises(ValueError, match=r"'user.table' is tied to the embedding.*modules_to_save"):
        convert(module, trainable_token_indices=[1], r=4)
    without = nn.Sequential(nn.Embedding(8, 64, device="meta"), nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"'0' has no values yet\. Load the module before it is converted\."):
        check_tokens(survey(Parts.of(without)), [1], {})
    net = nn.Sequential(nn.Linear(64, 64))
    convert(net, r=4)
    with pytest.raises(
        ValueError, match=r"'0\.0' is a QLoRALinear in 4 bits: only rows of nn\.Embedding and nn\.Linear"
    ):
        convert(nn.Sequential(net, nn.Linear(64, 64)), trainable_token_indices={"0.0": [1]}, r=4)
    with pytest.raises(TypeError, match="must be a list of indices, or a dict of such lists"):
        QLoRAConfig(trainable_token_indices=[])


def test_an_adapter_for_other_tokens_is_refused(tmp_path):
    save_adapter(converted(), tmp_path)
    message = r"token_adapter.*has trainable_token_indices=None there, and the adapter \[7, "
    with pytest.raises(CheckpointMismatchError, match=message):
        load_adapter(converted(tokens=None), tmp_path)


def test_a_converted_model_stays_so_in_a_module():
    model = converted(tie_word_embeddings=True)
    report = convert(Lit(model), **ARGUMENTS)
    assert report.trained_rows == {"model.model.embed_tokens": len(TOKENS)} and not report.trained_in_full
    assert delta(model).requires_grad
    with pytest.raises(ValueError, match=r"was converted before, or is tied to a layer, with the rows \[7, 100"):
        convert(nn.ModuleDict({"model": model, "new": nn.Linear(64, 64)}), trainable_token_indices=[1], **ARGUMENTS)


def test_memory_and_an_early_optimizer_have_the_rows():
    model = tied()
    optimizer = torch.optim.AdamW(model.parameters())
    config = copy.deepcopy(model.config)
    converted(model=model)
    replace_parameters_by_adapters(optimizer)
    held = set(map(id, optimizer_parameters(optimizer)))
    assert id(delta(model)) in held and id(model.lm_head.weight) not in held
    with_rows, without = (
        estimate_memory(config, 1, 8, trainable_token_indices=tokens, **ARGUMENTS) for tokens in (TOKENS, None)
    )
    assert with_rows.trainable_parameters - without.trainable_parameters == len(TOKENS) * 64
    assert with_rows.parts["gradients"] - without.parts["gradients"] == len(TOKENS) * 64 * 4


@needs("torch", "2.12", "fully_shard takes floats alone before")
def test_sharded_rows_train_and_are_saved(one_rank, tmp_path):
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    plain, sharded = (converted(tie_word_embeddings=True) for _ in range(2))
    fully_shard(sharded, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    for model in (plain, sharded):
        model(input_ids=ids(), labels=ids()).loss.backward()
    assert_close(delta(sharded).grad.full_tensor(), delta(plain).grad)
    save_adapter(sharded, tmp_path)
    load_adapter(plain, tmp_path)
    assert torch.equal(logits(plain), logits(sharded))
    module = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64))
    fully_shard(module[0], mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="trainable_token_indices"):
        convert(module, trainable_token_indices=TOKENS, **ARGUMENTS)
