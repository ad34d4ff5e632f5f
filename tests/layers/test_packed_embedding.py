"""Embeddings in 4 bits, compared with torch's F.embedding and F.linear, bitsandbytes' Embedding4bit and PEFT."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_qlora import (
    CheckpointMismatchError,
    QLoRAConfig,
    QLoRAPrecision,
    convert,
    disable_adapter,
    estimate_memory,
    load_adapter,
    load_from_checkpoint,
    merge,
    save_adapter,
    save_quantized,
)
from lightning_qlora.adapters.peft_reader import read_adapter
from lightning_qlora.huggingface.merge_folder import merge_folder
from lightning_qlora.huggingface.quantize_on_load import quantize_while_loading
from lightning_qlora.layers import packed_embedding
from lightning_qlora.layers.deferred_logits import DeferredLogits
from lightning_qlora.layers.packed_embedding import decode_embeddings, frozen_layers
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.training.early_optimizer import replace_parameters_by_adapters
from tests.conftest import make_trainer
from tests.toys import Lit, ids, logits, needs, perturb, toy

ARGUMENTS = {"r": 4, "lora_dropout": 0.0, "quantize_embeddings": True}
TOKENS = [7, 100, int(ids()[0, 0])]


def converted(name="llama", model=None, tied=True, scale=0.05, **arguments):
    model = model or toy(name, tie_word_embeddings=tied)
    convert(model, **ARGUMENTS | arguments)
    return perturb(model, scale)


def scaled_model(dtype=torch.bfloat16):
    """Gemma 3, whose embedding multiplies its output."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_lookup_gives_the_rows_of_the_decoded_weight_and_of_bitsandbytes(dtype, quant_type):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    dense = nn.Embedding(300, 192, padding_idx=3, dtype=dtype)
    theirs = bnb.nn.Embedding4bit(300, 192, dtype=dtype, quant_type=quant_type)
    theirs.load_state_dict(dense.state_dict())
    theirs.to("cpu")
    module = nn.Sequential(dense, nn.Linear(192, 192, dtype=dtype))
    report = convert(module, quant_type=quant_type, **ARGUMENTS)
    tokens = torch.randint(300, (4, 7))
    tokens[0] = 3
    found, weight = dense(tokens), dense.decode()
    assert found.dtype is dtype and torch.equal(found, F.embedding(tokens, weight))
    assert torch.equal(found, theirs(tokens)) and not found[0].any()
    assert torch.equal(F.embedding(tokens.int(), dense.weight), found) and torch.equal(dense.weight, weight)
    assert dense(tokens[:0]).shape == (0, 7, 192)
    assert report.embeddings == {"0": (300, 192)} and "0  x1  4-bit, frozen, 300x192" in str(report)
    assert sum(p.nbytes for p in dense.parameters()) == 300 * 192 // 2 + 300 * 3 * 4
    for wrong in (-1, 300):
        with pytest.raises(IndexError):
            dense(torch.tensor([wrong]))


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize(("name", "tied"), [("llama", True), ("llama", False), ("gpt2", True), ("t5", True)])
def test_a_model_computes_what_it_does_with_the_decoded_embeddings(name, tied, deferred, monkeypatch):
    monkeypatch.setattr(packed_embedding, "PIECE", 48 * 64)  # three pieces of the output embedding
    before = toy(name, tie_word_embeddings=tied)
    tied = before.lm_head.weight is before.get_input_embeddings().weight  # T5 ignores the argument
    model = converted(model=before, deferred_logits=deferred)
    decode_embeddings(dense := copy.deepcopy(model))
    assert not frozen_layers(dense) and type(dense.get_input_embeddings()) is nn.Embedding
    tie = model.get_input_embeddings().packed is model.lm_head.packed
    assert tie == tied == (dense.get_input_embeddings().weight is dense.lm_head.weight)
    grads = []
    for each in (model, dense):
        output = each(input_ids=ids(), labels=ids())
        output.loss.backward()
        grads.append([output.loss, *(p.grad for layer in adapted_layers(each).values() for p in layer.parameters())])
    assert isinstance(model(input_ids=ids(), labels=ids()).logits, DeferredLogits) == deferred
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-4, rtol=1e-4)
    x = torch.randn(2, 5, 64, requires_grad=True)
    weight = model.lm_head.decode()
    (ours,), (theirs,) = (
        torch.autograd.grad(head(x).square().sum(), x) for head in (model.lm_head, lambda x: F.linear(x, weight))
    )
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)
    if name != "t5":
        generated = model.generate(ids(1, 4), max_new_tokens=5, do_sample=False)
        assert torch.equal(generated, dense.generate(ids(1, 4), max_new_tokens=5, do_sample=False))


def test_an_embedding_that_scales_its_output_keeps_its_forward_and_can_be_copied_pickled_and_compiled():
    model = scaled_model()
    dense = copy.deepcopy(model)
    converted(model=model, trainable_token_indices=TOKENS)
    embedding = model.get_input_embeddings()
    expected = embedding(ids())
    with torch.no_grad(), disable_adapter(model):
        weight = dense.get_input_embeddings().weight
        weight.copy_(embedding.decode())
        assert torch.equal(embedding(ids()), dense.get_input_embeddings()(ids()))
        weight[TOKENS] = embedding.token_adapter.trainable_tokens_delta.to(weight.dtype)
    assert torch.equal(expected, dense.get_input_embeddings()(ids()))
    assert torch.equal(torch.compile(embedding, backend="eager", fullgraph=True)(ids()), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        assert other.lm_head.packed is other.get_input_embeddings().packed is not embedding.packed
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    assert torch.equal(torch.compile(model.lm_head, backend="eager", fullgraph=True)(x), model.lm_head(x))


def test_compiled_code_decodes_rows_and_not_the_embedding():
    graphs = []

    def backend(graph, example):
        graphs.append(str(graph.graph))
        return graph

    embedding = nn.Embedding(128, 64)
    convert(nn.Sequential(embedding, nn.Linear(64, 64)), **ARGUMENTS)
    expected = embedding(ids())
    assert torch.equal(torch.compile(embedding, backend=backend, fullgraph=True)(ids()), expected)
    assert graphs and "[128, 64]" not in graphs[0]


@pytest.mark.parametrize("tokens", [None, TOKENS])
def test_integers_are_refused_as_by_a_layer_with_an_adapter(tokens):
    model, x, refused = converted(trainable_token_indices=tokens), torch.ones(2, 64, dtype=torch.int64), set()
    head, layer = model.lm_head, next(iter(adapted_layers(model).values()))
    for call in (layer, head, lambda x: F.linear(x, head.weight)):
        with pytest.raises(TypeError, match=r"must be float32.*, not torch\.int64") as error:
            call(x)
        refused.add(str(error.value).removeprefix(f"{layer.full_name}: "))  # a 4-bit layer knows its name
    assert len(refused) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_rows_train_on_a_vocabulary_in_4_bits(tied, tmp_path):
    peft = pytest.importorskip("peft")
    tokens = TOKENS if tied else {"embed_tokens": TOKENS, "lm_head": TOKENS[:2]}
    model = converted(tied=tied, trainable_token_indices=tokens, deferred_logits=True)
    assert torch.equal(
        converted(tied=tied, trainable_token_indices=tokens, scale=0).get_input_embeddings()(ids()),
        converted(tied=tied, scale=0).get_input_embeddings()(ids()),
    )
    output = model(input_ids=ids(), labels=ids())
    output.loss.backward()
    whole = merge(copy.deepcopy(model))
    weight = whole.get_input_embeddings().weight.requires_grad_()
    loss = whole(input_ids=ids(), labels=ids()).loss
    (grad,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(output.loss, loss, atol=1e-4, rtol=1e-4)
    delta = model.get_input_embeddings().token_adapter.trainable_tokens_delta
    torch.testing.assert_close(delta.grad, grad[TOKENS], atol=1e-4, rtol=1e-3)
    save_adapter(model, tmp_path / "adapter")
    again = converted(tied=tied, trainable_token_indices=tokens, scale=0)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    base = copy.deepcopy(model)
    with torch.no_grad():
        for key, parameter in base.named_parameters():
            if key.endswith("lora_B"):
                parameter.zero_()
    theirs = peft.PeftModel.from_pretrained(merge(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-3, rtol=1e-3)


def test_a_checkpoint_goes_on_where_the_rows_of_new_tokens_have_other_random_values():
    def resized(seed):
        model = toy("llama", tie_word_embeddings=True)
        torch.manual_seed(seed)
        model.resize_token_embeddings(131)
        return model

    tokens = [130, 128, 129]
    first, second = (converted(model=resized(s), trainable_token_indices=tokens, scale=s % 2) for s in (1, 2))
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
    second.load_state_dict(first.state_dict())
    assert torch.equal(logits(first), logits(second))
    for model, size in ((first, 140), (first, 128), (converted(tied=False), 140)):
        with pytest.raises(
            ValueError, match=r"resize_token_embeddings: a \w+ of \d+ rows can't get 1.*before it is conv"
        ):
            model.resize_token_embeddings(size)
    first.resize_token_embeddings(131)  # of this size already
    assert first.lm_head.packed is first.get_input_embeddings().packed


def test_rows_of_an_untied_output_embedding_are_not_lost_by_resizing():
    model = toy("llama")
    convert(model, r=4, trainable_token_indices={"lm_head": TOKENS})
    with pytest.raises(ValueError, match="a TrainableTokensLinear of 128 rows can't get 144"):
        model.resize_token_embeddings(pad_to_multiple_of=144)
    convert(model := toy("llama"), r=4, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="a QLoRALinear of 128 rows can't get 129"):
        model.resize_token_embeddings(129)


@pytest.mark.parametrize("checkpoint", ["adapter", "full"])
def test_a_run_resumes_from_its_checkpoint(checkpoint, tmp_path):
    def lit():
        return Lit(toy("llama", tie_word_embeddings=True))

    plugin = QLoRAPrecision(trainable_token_indices=TOKENS, checkpoint=checkpoint, **ARGUMENTS)
    trainer = make_trainer(tmp_path, plugins=plugin, max_epochs=1)
    trainer.fit(module := lit())
    state = trainer.optimizers[0].state
    assert all(p.requires_grad for p in state) and module.model.model.embed_tokens.packed not in state
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = load_from_checkpoint(Lit, tmp_path / "last.ckpt", model=toy("llama", tie_word_embeddings=True))
    assert torch.equal(logits(again.model.eval()), logits(module.model.eval()))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert ("model.lm_head.packed" in saved) == (checkpoint == "full")
    other = Lit(toy("llama", seed=1, tie_word_embeddings=True))
    convert(other, trainable_token_indices=TOKENS, **ARGUMENTS)
    if checkpoint == "full":
        other.load_state_dict(saved)
        assert torch.equal(logits(other.model), logits(module.model))
    else:
        with pytest.raises(CheckpointMismatchError, match="trained on another base"):
            other.load_state_dict(saved)
    convert(other := lit(), r=4, lora_dropout=0.0, trainable_token_indices=TOKENS)
    with pytest.raises(CheckpointMismatchError, match="quantize_embeddings is True in the checkpoint and False here"):
        other.load_state_dict(saved)


def test_a_checkpoint_of_the_dense_module_is_quantized():
    model, dense = converted(scale=0), toy("llama", seed=1, tie_word_embeddings=True)
    model.load_state_dict(dense.state_dict())
    assert torch.equal(logits(model), logits(converted(model=dense, scale=0)))
    assert model.lm_head.packed is model.model.embed_tokens.packed
    state = {**toy("llama", vocab_size=129).state_dict()}
    with pytest.raises(RuntimeError, match=r"has shape \[129, 64\], and \[128, 64\] here"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "tied", "files"),
    [
        ("llama", True, "dense"),
        ("llama", True, "4-bit"),
        ("llama", False, "dense"),
        ("gpt2", True, "4-bit"),
        ("t5", True, "dense"),
    ],
)
def test_it_is_quantized_while_it_loads_and_its_4_bit_folder_holds_the_decoded_rows(name, tied, files, tmp_path):
    model = toy(name, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "dense")
    expected = converted(model=model, scale=0)
    save_quantized(expected, tmp_path / "4-bit")
    config = QLoRAConfig(**ARGUMENTS)
    with quantize_while_loading(config):
        loaded = type(model).from_pretrained(tmp_path / files)
    assert {type(layer) for layer in frozen_layers(loaded)} == {type(layer) for layer in frozen_layers(expected)}
    assert (loaded.lm_head.packed is loaded.get_input_embeddings().packed) == tied
    convert(loaded, **ARGUMENTS)
    theirs, ours = loaded.state_dict(), expected.state_dict()
    prints = [key for key in ours if key.endswith(".fingerprint")]
    assert theirs.keys() == ours.keys() and all(theirs[key] == ours[key] for key in prints)
    assert torch.equal(logits(loaded), logits(expected))
    merged = merge(loaded).state_dict()
    assert merged.keys() == merge(expected).state_dict().keys()
    stored = load_file(tmp_path / "4-bit" / "model.safetensors")
    assert not any("embed_tokens.packed" in key or "lm_head.weight." in key for key in stored)


def test_files_with_another_output_embedding_than_the_config_ties_are_refused(tmp_path):
    model = toy("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with quantize_while_loading(QLoRAConfig(**ARGUMENTS)), pytest.raises(ValueError, match="tie_word_embeddings=False"):
        type(model).from_pretrained(tmp_path)


def test_an_adapter_is_merged_into_the_folder_as_in_memory(tmp_path):
    model = toy("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    converted(model=model, trainable_token_indices=TOKENS)
    save_adapter(model, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.quantization["embeddings"] == ["model.embed_tokens", "lm_head"]
    merge_folder(tmp_path / "base", adapter, tmp_path / "merged")
    loaded, merged = type(model).from_pretrained(tmp_path / "merged").state_dict(), merge(model).state_dict()
    assert loaded.keys() == merged.keys() and all(torch.equal(value, loaded[key]) for key, value in merged.items())
    merge_folder(tmp_path / "base", adapter, tmp_path / "float", base="float")
    kept = type(model).from_pretrained(tmp_path / "float").get_input_embeddings().weight
    rest = [row for row in range(128) if row not in TOKENS]
    assert torch.equal(kept[rest], toy("llama", tie_word_embeddings=True).get_input_embeddings().weight[rest])


def module_with(embedding, **others):
    return nn.ModuleDict({"embedding": embedding, "linear": nn.Linear(64, 64), **others})


def test_what_stays_dense_has_a_reason_and_a_module_without_any_is_refused():
    positions = module_with(nn.Embedding(128, 64), positions=nn.Embedding(12, 64), narrow=nn.Embedding(128, 40))
    report = convert(positions, **ARGUMENTS)
    assert [*report.embeddings] == ["embedding"]
    assert report.skipped == {
        "positions": "has less than a tenth of the weights of the largest embedding",
        "narrow": "its rows of 40 weights are no whole blocks of 64",
    }
    used = module_with(nn.Embedding(128, 64), user=nn.Module())
    used["user"].table = used["embedding"].weight
    for module, arguments, reason in [
        (module_with(nn.Embedding(128, 64, max_norm=1.0)), {}, "embedding: max_norm changes the rows"),
        (used, {}, r"embedding: its weight is tied to user.table, of a Module, which would not read it in 4 bits"),
        (module_with(nn.Embedding(128, 64)), {"exclude_modules": ["embedding"]}, "embedding: in exclude_modules"),
        (module_with(nn.Embedding(128, 64)), {"modules_to_save": ["embedding"]}, "embedding: in modules_to_save"),
        (nn.Sequential(nn.Linear(64, 64)), {}, "It has no nn.Embedding"),
        (module_with(nn.Embedding(128, 64, dtype=torch.float64)), {}, "embedding: its weight is float64"),
    ]:
        with pytest.raises(
            ValueError, match=rf"quantize_embeddings=True: no embedding of this \w+ can be .*\n?.*{reason}"
        ):
            convert(module, **ARGUMENTS | arguments)
    report = convert(toy("llama"), **ARGUMENTS, modules_to_save=["lm_head"])
    assert [*report.embeddings] == ["model.embed_tokens"] and "lm_head" in report.trained_in_full
    report = convert(toy("llama"), **ARGUMENTS | {"target_modules": ["q_proj", "lm_head"]})
    assert [*report.embeddings] == ["model.embed_tokens"] and "lm_head" in report.converted


def test_a_weight_that_is_written_is_an_error_and_a_tie_by_hand_holds():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.body, self.lm_head = nn.Embedding(128, 64), nn.Linear(64, 64), nn.Linear(64, 128)
            self.lm_head.weight = self.wte.weight

        def forward(self, tokens):
            x = self.body(self.wte(tokens))
            return self.lm_head(x), F.linear(x, self.wte.weight, self.lm_head.bias), x @ self.wte.weight.T

    module = Tied()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(module, **ARGUMENTS)
    called, read, product = module(ids())
    assert torch.equal(called, read) and type(merge(copy.deepcopy(module)).lm_head.bias) is nn.Parameter
    torch.testing.assert_close(product + module.lm_head.bias, called)
    with pytest.raises(RuntimeError, match="read-only"):
        module.wte.weight = nn.Parameter(torch.zeros(128, 64))
    with pytest.raises(RuntimeError, match="read-only"):
        module.wte.weight.data = torch.zeros(128, 64)
    with pytest.raises(RuntimeError, match="read-only"):
        F.embedding(ids(), module.wte.weight, max_norm=1.0)


def test_memory_and_an_early_optimizer_have_no_embedding():
    model = toy("llama", tie_word_embeddings=True)
    optimizer = torch.optim.AdamW(model.parameters())
    config, before = copy.deepcopy(model.config), model.lm_head.weight
    report = convert(model, trainable_token_indices=TOKENS, **ARGUMENTS)
    replace_parameters_by_adapters(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    rows = model.lm_head.token_adapter.trainable_tokens_delta
    assert id(rows) in held and id(before) not in held and id(model.lm_head.packed) not in held
    estimate = estimate_memory(config, 1, 8, trainable_token_indices=TOKENS, **ARGUMENTS)
    packed = {
        id(p): p.nbytes
        for part in model.modules()
        for k, p in part._parameters.items()
        if p is not None and p.dtype is torch.uint8
    }
    assert estimate.parts["4-bit weights"] == sum(packed.values())
    assert estimate.total_parameters == report.total_parameters and estimate.dense_bytes == report.bytes_before // 2
    assert report.bytes_before == sum(p.nbytes for p in toy("llama", tie_word_embeddings=True).parameters())


@needs("torch", "2.12", "fully_shard takes floats alone before")
def test_it_is_sharded_by_fully_shard_and_refused_by_tensor_parallelism():
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        plain, sharded = (converted(trainable_token_indices=TOKENS) for _ in range(2))
        fully_shard(sharded, mesh=mesh)
        for model in (plain, sharded):
            model(input_ids=ids(), labels=ids()).loss.backward()
        grads = [m.get_input_embeddings().token_adapter.trainable_tokens_delta.grad for m in (plain, sharded)]
        torch.testing.assert_close(grads[1].full_tensor(), grads[0])
        assert {key: int(v) for key, v in sharded.state_dict().items() if "print" in key} == {
            key: int(v) for key, v in plain.state_dict().items() if "print" in key
        }
        for name, style in (("model.embed_tokens", RowwiseParallel()), ("lm_head", ColwiseParallel())):
            with pytest.raises(ValueError, match=r"can't be split by tensor parallelism"):
                parallelize_module(converted(), mesh, {name: style})
    finally:
        torch.distributed.destroy_process_group()
