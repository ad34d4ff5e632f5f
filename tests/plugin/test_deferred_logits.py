"""deferred_logits on whole models: losses and gradients equal those without it, and where no logits are made."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lightning_qlora import (
    QLoRAPrecision,
    convert,
    estimate_memory,
    load_adapter,
    load_from_checkpoint,
    merge,
    save_adapter,
)
from lightning_qlora.dtypes.instance_method import METHODS, instance_method
from lightning_qlora.logits import piecewise_cross_entropy
from lightning_qlora.logits.deferred_head import DeferredForward
from lightning_qlora.logits.deferred_logits import DeferredLogits
from tests.toys import perturb

V = 320
H = 64
ARGUMENTS = {"r": 4, "lora_dropout": 0.0}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(piecewise_cross_entropy, "PIECE_ELEMENTS", 5 * V)


def ids(seed=0, rows=2, columns=12):
    return torch.randint(3, V, (rows, columns), generator=torch.Generator().manual_seed(seed))


def labels():
    made = ids(1)
    made[:, ::3] = -100
    return made


class Plain(nn.Module):
    """A language model as users write it, with a loss of its own."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        layer = nn.TransformerEncoderLayer(H, 4, 128, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.to_words = nn.Linear(H, V)

    def forward(self, x):
        return self.to_words(self.encoder(self.embedding(x)))

    def loss(self):
        y = labels().clamp_min(0)
        return F.cross_entropy(self(ids()).view(-1, V), y.view(-1), ignore_index=0)


CHANGES = {
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "t5": {"decoder_start_token_id": 0},
}
AUTO = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}


def model(name):
    if name == "plain":
        torch.manual_seed(0)
        return Plain()
    transformers = pytest.importorskip("transformers")
    from tests.architectures.models import configuration

    config = configuration(name)
    for key, value in {"vocab_size": V, **CHANGES.get(name, {})}.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    auto = getattr(transformers, AUTO.get(name, "AutoModelForCausalLM"))
    return auto.from_config(config, dtype=torch.float32).eval()


MODELS = ("llama", "gemma2", "gpt2", "cohere", "granite", "bert", "t5", "plain")


def loss_of(module):
    return module.loss() if isinstance(module, Plain) else module(input_ids=ids(), labels=labels()).loss


def logits_of(module, **arguments):
    made = module(ids(), **arguments)
    return made if isinstance(made, torch.Tensor) else made.logits


def converted(name, **arguments):
    module = model(name)
    convert(module, **ARGUMENTS | arguments)
    return perturb(module, seed=3)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_equal(ours, expected, relative=1e-6):
    """Up to `relative` of the largest element."""
    assert ours.keys() == expected.keys() and ours
    for name, value in expected.items():
        largest = max(value.abs().max().item(), 1e-12)
        assert (ours[name] - value).abs().max().item() <= relative * largest * 5, name


def assert_equal_steps(make, step, relative=1e-6):
    """A step with real and with deferred logits: equal loss and gradients. `make` gets the setting."""
    found = []
    for setting in (False, "auto"):
        module = make(setting)
        loss = step(module)
        loss.backward()
        found.append({"loss": loss.detach()} | gradients(module))
    assert_equal(found[1], found[0], relative)


def both(name, step=loss_of, relative=1e-6, **arguments):
    assert_equal_steps(lambda setting: converted(name, deferred_logits=setting, **arguments), step, relative)


@pytest.fixture
def no_logits(monkeypatch):
    """Fails where something computes the logits."""
    monkeypatch.setattr(DeferredLogits, "computed", lambda *_: pytest.fail("the logits were computed"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("no_logits")
def test_losses_and_gradients_are_those_of_real_logits_and_no_logits_are_made(name):
    both(name)


@pytest.mark.parametrize("name", MODELS)
def test_logits_that_are_read_are_the_real_ones(name):
    module = converted(name, deferred_logits=True)
    expected = converted(name, deferred_logits=False)
    arguments = {"decoder_input_ids": ids(2)} if name == "t5" else {}
    ours = logits_of(module, **arguments)
    assert isinstance(ours, DeferredLogits)
    assert torch.equal(ours.argmax(-1), logits_of(expected, **arguments).argmax(-1))
    torch.testing.assert_close(ours + 0, logits_of(expected, **arguments), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert type(logits_of(module, **arguments)) is torch.Tensor


def with_the_number_of_tokens(module):
    return module(input_ids=ids(), labels=labels(), num_items_in_batch=torch.tensor(7)).loss


def with_a_backward_hook(module):
    module.lm_head.register_full_backward_hook(lambda *_: None)
    return loss_of(module)


@pytest.mark.parametrize("step", [with_the_number_of_tokens, with_a_backward_hook])
def test_steps_as_users_write_them(step):
    """tests/logits/test_deferred_logits.py has what is done to logits."""
    both("llama", step)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_gradient_of_the_logits_of_a_model_after_its_loss(name):
    """Gemma 2 caps its logits; a model returns them together with its loss."""
    grads = []
    for setting in (True, False):
        module = converted(name, deferred_logits=setting)
        output = module(input_ids=ids(), labels=labels())
        assert isinstance(output.logits, DeferredLogits) is setting
        output.logits.retain_grad()
        output.loss.backward()
        grads.append(gradients(module) | {"logits": output.logits.grad})
    assert_equal(*grads)


def test_perplexity():
    torchmetrics = pytest.importorskip("torchmetrics.text")
    values = []
    for setting in (False, True):
        metric = torchmetrics.Perplexity(ignore_index=-100)
        logits = logits_of(converted("llama", deferred_logits=setting))
        values.append(metric(logits, labels()))
        metric.update(preds=logits, target=labels())
    torch.testing.assert_close(*values)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("llama", {"gradient_checkpointing": True}),
        ("plain", {"gradient_checkpointing": True}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("gpt2", {"modules_to_save": ["wte"]}),  # tied embeddings, which get both gradients
        ("bert", {"modules_to_save": ["word_embeddings"]}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_logits")
def test_arguments(name, arguments):
    both(name, relative=1e-5, **arguments)


@pytest.mark.slow
def test_a_model_compiled_with_its_loss():
    module, expected = (converted("llama", deferred_logits=setting) for setting in ("auto", False))
    torch.compile(module, backend="aot_eager")(input_ids=ids(), labels=labels()).loss.backward()
    loss_of(expected).backward()
    assert_equal(gradients(module), gradients(expected), relative=1e-5)


class TwoHeads(Plain):
    def __init__(self):
        super().__init__()
        self.to_tags = nn.Linear(H, 7)
        self.lm_head = nn.Linear(H, V, bias=False)

    def loss(self):
        hidden = self.encoder(self.embedding(ids()))
        first, second = (
            F.cross_entropy(head(hidden).view(-1, V), labels().view(-1)) for head in (self.to_words, self.lm_head)
        )
        return first + 0.3 * second + self.to_tags(hidden).square().mean()


@pytest.mark.usefixtures("no_logits")
def test_two_heads():
    def make(setting):
        torch.manual_seed(0)
        module = TwoHeads()
        report = convert(module, **ARGUMENTS, deferred_logits=setting, exclude_modules=["to_words"])
        assert list(report.deferred_logits) == (["to_words", "lm_head"] if setting else [])
        return module

    assert_equal_steps(make, loss_of)


def deferred(module):
    return [name for name, part in module.named_modules() if instance_method(part, DeferredForward)]


def test_the_report_says_what_is_deferred_and_what_it_saves():
    module = model("llama")
    report = convert(module, **ARGUMENTS)
    assert report.deferred_logits == {"lm_head": 1000 * V * 12}
    assert "logits of lm_head: deferred, saves 3.84 MB for each 1,000 tokens" in str(report)
    assert convert(module, **ARGUMENTS).deferred_logits == report.deferred_logits
    assert type(module.lm_head) is nn.Linear
    assert [type(method) for method in vars(module.lm_head)[METHODS]] == [DeferredForward]
    off = convert(model("llama"), **ARGUMENTS, deferred_logits=False)
    assert not off.deferred_logits and "deferred" not in str(off)


def test_no_head_is_an_error_only_if_asked_for():
    module = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    with pytest.raises(ValueError, match=r"deferred_logits=True: Sequential has no output embedding.*lm_head"):
        convert(module, **ARGUMENTS, deferred_logits=True)
    assert convert(module, **ARGUMENTS).deferred_logits == {}


def test_a_merged_head_is_dense_and_computes_the_same():
    module = converted("llama", target_modules=["q_proj", "lm_head"])
    loss = loss_of(module).detach()
    merge(module)
    assert type(module.lm_head) is nn.Linear
    torch.testing.assert_close(loss_of(module).detach(), loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting", [False, True])
def test_adapters_and_checkpoints_do_not_depend_on_it(setting, tmp_path):
    module = converted("llama", deferred_logits=setting)
    other = converted("llama", deferred_logits=not setting)
    save_adapter(module, tmp_path)
    for load in (load_adapter, lambda other, _: other.load_state_dict(module.state_dict())):
        load(perturb(other, seed=4), tmp_path)
        assert loss_of(other).item() == pytest.approx(loss_of(module).item(), rel=1e-6)


class Lit(pl.LightningModule):
    def __init__(self, name="llama"):
        super().__init__()
        self.save_hyperparameters()
        self.model = model(name)
        self.losses = []
        self.accuracies = []

    def training_step(self, batch, _):
        outputs = self.model(input_ids=batch, labels=batch)
        if len(self.losses) % 2:
            self.accuracies.append((outputs.logits[:, :-1].argmax(-1) == batch[:, 1:]).float().mean().item())
        self.losses.append(outputs.loss.item())
        return {"loss": outputs.loss, "logits": outputs.logits}

    def validation_step(self, batch, _):
        logits = self.model(input_ids=batch).logits
        assert type(logits) is torch.Tensor
        self.log("val_loss", F.cross_entropy(logits.transpose(1, 2), batch))

    def train_dataloader(self):
        return torch.utils.data.DataLoader(ids(rows=8), batch_size=2)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_trainer(trainer, tmp_path):
    found = []
    for setting in (False, "auto"):
        module = Lit()
        plugin = QLoRAPrecision(**ARGUMENTS, deferred_logits=setting)
        run = trainer(plugins=plugin, accumulate_grad_batches=2, max_epochs=2)
        run.fit(module)
        found.append((module.losses, module.accuracies, run.callback_metrics["val_loss"].item()))
    assert plugin.report.deferred_logits.keys() == {"model.lm_head"}
    for ours, expected in zip(found[1], found[0], strict=True):
        assert ours == pytest.approx(expected, rel=1e-4)
    run.save_checkpoint(tmp_path / "checkpoint.ckpt")
    again = load_from_checkpoint(Lit, tmp_path / "checkpoint.ckpt")
    assert deferred(again) == ["model.lm_head"]


@pytest.fixture
def process_group(one_rank):
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("arguments", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_ddp(arguments):
    module = converted("plain")
    expected = converted("plain", deferred_logits=False)
    parallel = DistributedDataParallel(module, **arguments)
    logits = parallel(ids())
    assert isinstance(logits, DeferredLogits) is (not arguments)  # where DDP adds a node of its own, it copies them
    F.cross_entropy(logits.view(-1, V), labels().view(-1)).backward()
    F.cross_entropy(expected(ids()).view(-1, V), labels().view(-1)).backward()
    assert_equal(gradients(module), gradients(expected))


@pytest.mark.usefixtures("process_group")
def test_sharded_and_parallel_heads_compute_the_logits():
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    sharded = converted("plain")
    fully_shard(sharded, mesh=mesh)
    assert deferred(sharded) == ["to_words"] and type(sharded(ids())) is torch.Tensor
    parallel = converted("plain", exclude_modules=["to_words"])
    parallelize_module(parallel, mesh, {"to_words": ColwiseParallel()})
    assert not isinstance(parallel(ids()), DeferredLogits) and isinstance(parallel.to_words.weight, DTensor)


def test_the_strategy_that_shards_is_in_the_report(trainer, one_rank):
    class Sharded(Lit):
        def configure_model(self):
            self.trainer.precision_plugin.convert_module(self.model)
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    module = Sharded()
    plugin = QLoRAPrecision(**ARGUMENTS)
    strategy = ModelParallelStrategy(1, 1)
    arguments = {"enable_checkpointing": False, "use_distributed_sampler": False, "limit_val_batches": 0}
    trainer(strategy=strategy, plugins=plugin, **arguments).fit(module)
    assert plugin.report.deferred_logits == {"model.lm_head": 0} and deferred(module) == []
    assert "logits of model.lm_head: not deferred (sharded, or its adapter has lora_dropout)" in str(plugin.report)
    assert all(loss < 10 for loss in module.losses)


@pytest.mark.parametrize(
    ("name", "checkpointing"), [("llama", True), pytest.param("gemma2", False, marks=pytest.mark.slow)]
)
def test_the_planner_counts_both_ways(name, checkpointing):
    vocabulary = 8192
    rows = 2 * 24
    config = model(name).config
    config.vocab_size = vocabulary
    config.dtype = "float32"
    real, ours = (
        estimate_memory(config, 2, 24, **ARGUMENTS, gradient_checkpointing=checkpointing, deferred_logits=setting)
        for setting in (False, "auto")
    )
    difference = real.parts["activations"] - ours.parts["activations"]
    copies = difference / (4 * rows * vocabulary)
    assert 2.8 < copies < (3.2 if name == "llama" else 5.5)  # the log-softmax and two gradients; tanh keeps its output
    for parts in (real.parts, ours.parts):
        del parts["activations"]
    assert real.parts == ours.parts
