"""Sequences of what users do to a module, drawn by Hypothesis, done to a converted module and to its dense twin.

`KINDS` are the modules, `ACTIONS` what is done to them. Each kind is a state machine, whose rules are the actions. A
sequence after which the two differ is printed as a script; it runs after `from tests.test_twin import *`. `make test`
does half of the actions to each kind, so each action to half of the kinds; `make test-all` does the others, and draws
TWIN_EXAMPLES sequences for each kind (25).
"""

import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from lightning.fabric import Fabric
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from lightning_qlora import (
    QLoRAPrecision,
    calibrate,
    convert,
    disable_adapter,
    load_adapter,
    load_from_checkpoint,
    merge,
    save_adapter,
)
from lightning_qlora.experts.experts import QLoRAExperts
from lightning_qlora.layers.qlora_linear import adapted_layers
from tests.conftest import ROOT, PackageElsewhere, make_trainer
from tests.machines.products import FAST, SLOW, Products, state, stated
from tests.toys import BERT, GPT2, LLAMA
from tests.twin import adapters_of, dense_twin, error, matched

EXAMPLES = int(os.environ.get("TWIN_EXAMPLES", "25"))


# ---------------------------------------------------------------- the modules


class Built(pl.LightningModule):
    """A network by its name in `NETS`, with the loss of its outputs."""

    def __init__(self, kind: str):
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = NETS[kind]()

    def forward(self, x):
        y = self.net(x)
        return getattr(y, "logits", y)

    def training_step(self, batch, batch_idx):
        return loss_of(self(batch), batch)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.5)


def loss_of(y, batch):
    """Cross entropy of logits of tokens; else the distance to another target for each row, with gradients up to 1."""
    if y.ndim == 3:
        return F.cross_entropy(y.flatten(0, 1), batch.flatten())
    target = torch.arange(len(y), dtype=torch.float32).view(-1, *[1] * (y.ndim - 1))
    return F.smooth_l1_loss(y.float(), (0.5 + target).expand(y.shape))


class WithTeacher(nn.Module):
    """A student, and its frozen copy that follows it through `.data` (DINO, BYOL)."""

    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64))
        self.head = nn.Linear(64, 4)
        self.teacher = copy.deepcopy(self.head).requires_grad_(False)

    def forward(self, x):
        y = self.student(x)
        return self.head(y) + self.teacher(y).detach().square()

    def after_step(self):
        for p, q in zip(self.teacher.parameters(), self.head.parameters(), strict=True):
            p.data.mul_(0.9).add_(0.1 * q.data)


class TiedLayers(nn.Module):
    """A layer that is called twice, and two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.embedding = nn.Embedding(64, 64)
        self.out = nn.Linear(64, 64, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x):
        y = self.embedding.weight.mean(0) + x
        return self.out(self.second(F.gelu(self.first(F.gelu(self.first(y))))))


class ClampedHead(nn.Linear):
    """A new head, whose scale is clamped in the forward pass (CLIP)."""

    def __init__(self):
        super().__init__(64, 8)
        self.scale = nn.Parameter(torch.tensor([9.0]))

    def forward(self, x):
        self.scale.data.clamp_(max=4.6)
        return super().forward(x) * self.scale


class InFabric(nn.Module):
    """Two networks and a frozen teacher: each is set up by Fabric on its own."""

    def __init__(self, dtype=None):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64))
        self.second = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).to(dtype)
        self.teacher = copy.deepcopy(self.first).requires_grad_(False)
        self.wrapped = ()  # what `fabric.setup` returned, in this order

    def forward(self, x):
        first, second, teacher = self.wrapped or self.children()
        return second((first(x) + teacher(x)).to(self.second[0].bias.dtype)).float() + first(2 * x)

    def set_up(self, plugin, reverse):
        """Convert all, as users do; `fabric` goes with this module."""
        self.fabric = Fabric(accelerator="cpu", devices=1, plugins=plugin)
        names = [name for name, _ in self.named_children()]
        wrapped = {name: self.fabric.setup_module(getattr(self, name)) for name in sorted(names, reverse=reverse)}
        self.wrapped = tuple(wrapped[name] for name in names)  # a tuple: their parameters have one name
        self.teacher.requires_grad_(False)


class In16Bits(nn.Module):
    """A body in 16 bits, and a new head that trains in full."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64))
        self.head = ClampedHead()
        self.bfloat16()

    def forward(self, x):
        return self.head(self.body(x.to(self.body[0].bias.dtype)))


class WithBatchNorm(nn.Module):
    """A model in 16 bits with statistics, in a part that is frozen and in one that trains."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 64))
        self.trained = nn.BatchNorm1d(64)
        self.bfloat16()

    def forward(self, x):
        return self.trained(self.body(x.to(self.body[0].bias.dtype)))


def plain():
    return nn.Sequential(
        nn.Linear(64, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 64, bias=False), nn.Linear(64, 8)
    )


def transformer(name, **config):
    def make():
        import transformers

        model = getattr(transformers, name)
        return model(model.config_class(**config))

    return make


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16, "num_hidden_layers": 1}
NETS = {
    "plain": plain,
    "teacher": WithTeacher,
    "tied": TiedLayers,
    "in_16_bits": In16Bits,
    "with_batch_norm": WithBatchNorm,
    "in_fabric": InFabric,
    "in_fabric_mixed": lambda: InFabric(torch.bfloat16),
    "llama": transformer("LlamaForCausalLM", **LLAMA),
    "gpt2": transformer("GPT2LMHeadModel", **GPT2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "bert": transformer("BertForSequenceClassification", **BERT, hidden_dropout_prob=0, attention_probs_dropout_prob=0),
    "experts": transformer("Qwen3MoeForCausalLM", **{**LLAMA, **MOE}),
}


@dataclass
class Kind:
    """A network and how it is converted.

    Attributes:
        net: Its name in `NETS`.
        arguments: Those of the conversion.
        tokens: Whether its inputs are token ids.
        tolerance: Relative error of values and gradients; of a module in 16 bits that of its rounding.
        machine: The products of the processor; on a slow one a module in 16 bits is held in fp32.
    """

    net: str
    arguments: dict[str, Any] = field(default_factory=dict)
    tokens: bool = False
    tolerance: float = 2e-3
    machine: Products = FAST

    def make(self) -> Built:
        return Built(self.net)

    @property
    def in_fabric(self) -> bool:
        return self.net.startswith("in_fabric")

    @property
    def all_arguments(self) -> dict[str, Any]:
        return {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **self.arguments}

    def convert(self, module, reverse=False, **arguments):
        arguments = {**self.all_arguments, **arguments}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.in_fabric:
                module.net.set_up(QLoRAPrecision(**arguments), reverse)
            else:
                convert(module, **arguments)
        if arguments.get("init_lora_weights") == "calibrated":
            module(self.batch(0))
            calibrate(module)

    def batch(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            return torch.randint(3, 128, (2, 6), generator=generator)
        return torch.randn(4, 64, generator=generator)


KINDS = {
    "Plain": Kind("plain"),
    "Dropout": Kind("plain", {"lora_dropout": 0.3, "use_rslora": True, "checkpoint": "full"}),
    "DoRA": Kind("plain", {"use_dora": True}),
    "Teacher": Kind("teacher", {"modules_to_save": ["head"], "quant_type": "int4"}),
    "Tied": Kind("tied", {"quant_type": "fp4", "double_quant": False}),
    "NewHead": Kind("in_16_bits", {"modules_to_save": ["head"]}, tolerance=0.1),
    "Held": Kind("in_16_bits", {"modules_to_save": ["head"]}, machine=SLOW),
    "HeldNorms": Kind("with_batch_norm", {"modules_to_save": ["trained"], "checkpoint": "full"}, machine=SLOW),
    "Llama": Kind("llama", {"deferred_logits": True}, tokens=True),
    "Tokens": Kind(
        "llama", {"trainable_token_indices": [5, 3, 60], "target_modules": ["all-linear", "lm_head"]}, tokens=True
    ),
    "GPT2": Kind("gpt2", {"use_dora": True, "block_size": 32}, tokens=True),
    "Bert": Kind("bert", {"modules_to_save": ["classifier"]}, tokens=True),
    "Experts": Kind("experts", {"use_rslora": True}, tokens=True),
    "TwoInFabric": Kind("in_fabric"),
    "MixedInFabric": Kind("in_fabric_mixed", {"compute_dtype": "bf16"}, tolerance=0.1),
    "Calibrated": Kind("plain", {"init_lora_weights": "calibrated"}),
}


# ---------------------------------------------------------------- a module and its twin


class Pair:
    """A converted module and its twin; each method does the same to both."""

    def __init__(self, kind: Kind):
        self.kind = kind
        self.folder = Path(tempfile.mkdtemp())
        self.batches = 0
        self.base = None  # the state of the dense module, if it is not that of the kind
        self.touched = False  # whether frozen values were written, or other parameters were let train
        self.start_with(self.make(), self.make())
        for ours, dense in matched(self.ours, self.dense).values():
            if ours.requires_grad and not bool(dense.any()):  # B, so that each gradient is one
                value = 0.05 * torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
                self.write(ours, dense, value)

    @torch.no_grad()
    def write(self, ours, dense, value):
        ours.copy_(value)
        dense.copy_(value)

    def make(self):
        """The module before its last conversion."""
        module = self.kind.make()
        if self.base is not None:
            module.load_state_dict(self.base)
        return module

    def start_with(self, module, plain):
        self.kind.convert(module)
        arguments = self.kind.all_arguments
        rank = arguments["r"] ** (0.5 if arguments.get("use_rslora") else 1)
        assert {layer.scaling for layer in adapted_layers(module).values()} == {arguments["lora_alpha"] / rank}
        self.use(module, dense_twin(module, plain))
        self.start = {name: dense.detach().clone() for name, (_, dense) in self.parameters().items()}

    def use(self, ours, dense):
        """Go on with these two."""
        self.ours, self.dense = ours, dense
        self.optimizers = None

    @property
    def both(self):
        return self.ours, self.dense

    def parts(self):
        """The modules that were converted, each with its twin."""
        if self.kind.in_fabric:
            return [*zip(self.ours.net.children(), self.dense.net.children(), strict=True)]
        return [self.both]

    def parameters(self, trained: bool | None = None, part=None):
        pairs = matched(*(part or self.both))
        return {name: pair for name, pair in pairs.items() if trained is None or pair[0].requires_grad is trained}

    def trained_by_conversion(self):
        """What trains in a module that was just converted."""
        module = self.make()
        self.kind.convert(module)
        return [p for p in module.parameters() if p.requires_grad]

    def batch(self):
        self.batches += 1
        return self.kind.batch(self.batches)

    def loss(self, module, batch, call=None):
        torch.manual_seed(self.batches)
        return loss_of((call or module)(batch), batch)

    def derive(self, module, loss):
        """The backward pass of a loss."""
        if self.kind.in_fabric and module is self.ours:
            module.net.fabric.backward(loss)
        else:
            loss.backward()

    def backward(self, batch=None, call=None):
        """Losses of one batch and their gradients, which must be equal."""
        batch = self.batch() if batch is None else batch
        losses = []
        for module in self.both:
            loss = self.loss(module, batch, call and call(module))
            self.derive(module, loss)
            losses.append(loss)
        self.close(*losses, "loss")

    def close(self, ours, dense, what, scale=None):
        difference = error(ours, dense, scale)
        assert difference <= self.kind.tolerance, f"{what}: relative error {difference:.3g}"

    def same_gradients(self, tolerance=None):
        tolerance = tolerance or self.kind.tolerance
        pairs = self.parameters(trained=True)
        whole = sum(float(p.grad.double().square().sum()) for _, p in pairs.values() if p.grad is not None) ** 0.5
        for name, (ours, dense) in pairs.items():
            assert (ours.grad is None) == (dense.grad is None), name
            if ours.grad is not None:
                difference = float((ours.grad.double() - dense.grad.double()).norm())
                limit = tolerance * (float(dense.grad.double().norm()) + 0.05 * whole)
                assert difference <= limit + 1e-7, f"gradient of {name}: {difference:.3g} of {limit:.3g}"

    def make_optimizers(self, make=None, pieces: int = 1):
        """As a user makes them: of the parameters that train in each part, in `pieces` of one each."""
        make = make or (lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.5))
        self.optimizers = []
        for part in self.parts():
            pairs = [*self.parameters(trained=True, part=part).values()]
            for piece in range(min(pieces, len(pairs))):
                self.use_optimizers(*(make([pair[i] for pair in pairs[piece::pieces]]) for i in (0, 1)))

    def use_optimizers(self, ours, dense):
        if self.kind.in_fabric:
            ours = self.ours.net.fabric.setup_optimizers(ours)
        self.optimizers.append((ours, dense))

    def step(self):
        if self.optimizers is None:
            self.make_optimizers()
        for pair in self.optimizers:
            for optimizer in pair:
                optimizer.step()
        for module in self.both:
            if hasattr(module.net, "after_step"):
                module.net.after_step()
                self.touched = True

    def zero_grad(self):
        for module in self.both:
            module.zero_grad()

    def train(self, steps: int = 1):
        for _ in range(steps):
            self.zero_grad()
            self.backward()
            self.same_gradients()
            self.step()

    def same_outputs(self, ours=None, dense=None):
        ours, dense = ours or self.ours, dense or self.dense
        batch = self.kind.batch(0)
        outputs = []
        for module in (ours, dense):
            torch.manual_seed(0)
            with torch.no_grad():
                outputs.append(module(batch).float())
        self.close(*outputs, "outputs")

    def check(self):
        """Everything that can be compared is equal."""
        for name, (ours, dense) in self.parameters().items():
            assert ours.requires_grad == dense.requires_grad, name
            if name in self.start and self.start[name].shape == dense.shape:
                moved = (dense.detach() - self.start[name]).norm()
                difference = float((ours.detach().double() - dense.detach().double()).norm())
                limit = self.kind.tolerance * float(moved) + 1e-5 * float(dense.detach().norm()) + 1e-7
                if ours.dtype in (torch.bfloat16, torch.float16):
                    limit += 2**-8 * float(dense.detach().norm())
                assert difference <= limit, f"{name}: differs by {difference:.3g}, it moved by {float(moved):.3g}"
        if self.kind.tolerance > 0.05:  # steps amplify the rounding of 16 bits: each action is judged from equal values
            for name, (ours, dense) in self.parameters().items():
                self.write(dense, dense, ours)
                self.start[name] = dense.detach().clone()
        for mode in (True, False):
            for module in self.both:
                module.train(mode)
            self.same_outputs()
        for module in self.both:
            module.train()
        self.zero_grad()
        self.backward()
        self.same_gradients()
        self.zero_grad()


def enable(twin, enabled):
    for adapted in adapters_of(twin):
        adapted.enabled = enabled


@contextmanager
def disabled(pair):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with disable_adapter(pair.ours):
            enable(pair.dense, False)
            try:
                yield
            finally:
                enable(pair.dense, True)


class Interrupted(Exception):
    """What the sequences raise in between."""


def raise_(*_, **__):
    raise Interrupted


# ---------------------------------------------------------------- the actions

ACTIONS = {}


def action(function):
    ACTIONS[function.__name__] = function
    return function


@action
def train(pair, n):
    pair.train(1 + n % 3)


@action
def adamw(pair, n):
    eps = 1e-3 if pair.kind.tolerance < 0.05 else 1.0  # steps of small gradients would be those of their rounding
    pair.make_optimizers(lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, eps=eps))
    pair.train(1 + n % 2)


@action
def two_optimizers(pair, n):
    if len(pair.parameters(trained=True)) > 1:
        pair.make_optimizers(pieces=2)
        pair.train()


@action
def accumulate(pair, n):
    pair.zero_grad()
    for _ in range(2 + n % 2):
        pair.backward()
    pair.same_gradients()
    pair.step()


@action
def clip(pair, n):
    """By the norm of each converted module, or by value; in Fabric by its function."""
    pair.zero_grad()
    pair.backward()
    if pair.optimizers is None:
        pair.make_optimizers()
    key, function = ("clip_val", nn.utils.clip_grad_value_) if n % 4 == 3 else ("max_norm", nn.utils.clip_grad_norm_)
    size = 10.0 ** -(n % 3)
    if pair.kind.in_fabric:
        fabric = pair.ours.net.fabric
        results = [
            (fabric.clip_gradients(pair.ours, ours, **{key: size}), function(dense.param_groups[0]["params"], size))
            for ours, dense in pair.optimizers
        ]
    else:
        results = [[function(module.parameters(), size) for module in pair.both]]
    for norms in results if key == "max_norm" else ():
        pair.close(*norms, "norm of the gradient")
    pair.same_gradients()
    pair.step()


@action
def closure(pair, n):
    """A step that computes its loss itself; the first time it is interrupted."""
    if pair.optimizers is None:
        pair.make_optimizers()
    batch = pair.batch()
    for module, optimizer in zip(pair.both, pair.optimizers[0], strict=True):

        def compute(module=module, fails=False):
            module.zero_grad()
            loss = pair.loss(module, batch)
            pair.derive(module, loss)
            if fails:
                raise Interrupted
            return loss

        if n % 2:
            with pytest.raises(Interrupted):
                optimizer.step(lambda compute=compute: compute(fails=True))
        optimizer.step(compute)


@action
def recompute(pair, n):
    """The whole module recomputed in the backward pass."""
    pair.zero_grad()
    pair.backward(call=lambda module: lambda x: checkpoint(module, x, use_reentrant=False))
    pair.same_gradients()
    pair.step()


@action
def functional(pair, n):
    """A call with other values of what trains (MAML's first order, influence functions)."""
    pair.zero_grad()
    values = {name: 0.9 * p.detach() for name, (p, _) in pair.parameters(trained=True).items()}
    names = [{id(p): name for name, p in module.named_parameters()} for module in pair.both]
    outputs = []
    for i, module in enumerate(pair.both):
        there = {names[i][id(p[i])]: values[name].to(p[i].dtype) for name, p in pair.parameters(trained=True).items()}
        torch.manual_seed(0)
        outputs.append(torch.func.functional_call(module, there, (pair.kind.batch(n),)).float())
    pair.close(*outputs, "outputs of other values")


@action
def vector(pair, n):
    """What trains as one vector, changed and written back."""
    pairs = [*pair.parameters(trained=True).values()]
    for i in (0, 1):
        parameters = [p[i] for p in pairs]
        vector_to_parameters(0.9 * parameters_to_vector(parameters).detach(), parameters)


@action
def average(pair, n):
    """AveragedModel with decay, over some steps; it computes as the average of the twin does."""
    averages = [AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5)) for module in pair.both]
    for _ in range(1 + n % 2):
        pair.train()
        for each, module in zip(averages, pair.both, strict=True):
            each.update_parameters(module)
    pair.same_outputs(*(each.module for each in averages))
    if n % 3 == 2:
        pair.use(*(each.module for each in averages))


@action
def average_by_hand(pair, n):
    """EMA as people write it: over all parameters that are floating-point, through `.data`."""
    averages = [copy.deepcopy(module).requires_grad_(False) for module in pair.both]
    pair.train()
    for each, module in zip(averages, pair.both, strict=True):
        for p, q in zip(each.parameters(), module.parameters(), strict=True):
            p.data.mul_(0.7).add_(q.data, alpha=0.3)
    pair.same_outputs(*averages)


@action
def average_state_dict(pair, n):
    """timm's ModelEmaV2: over all entries of the state dicts, the statistics of BatchNorm too."""
    pair.train()  # from the first write to a frozen parameter on, state dicts have it
    averages = [copy.deepcopy(module) for module in pair.both]
    for _ in range(1 + n % 2):
        pair.train()
        for each, module in zip(averages, pair.both, strict=True):
            with torch.no_grad():
                for p, q in zip(each.state_dict().values(), module.state_dict().values(), strict=True):
                    if p.is_floating_point():
                        p.copy_(0.5 * p + 0.5 * q)
    pair.same_outputs(*averages)


@action
def patched_class(pair, n):
    """A class that gets another forward pass after conversion (a bug fix, a fused kernel), and its own again."""
    kind = (nn.LayerNorm, nn.BatchNorm1d, nn.Embedding, ClampedHead)[n % 4]
    original = kind.forward
    kind.forward = lambda self, x: 0.5 * original(self, x)
    try:
        pair.same_outputs()
    finally:
        kind.forward = original


@action
def replaced_forward(pair, n):
    """A module that gets another forward pass, around its own, as accelerate does."""
    names = [name for name, part in pair.ours.named_modules() if isinstance(part, (nn.LayerNorm, nn.Embedding))]
    if not names:
        return
    parts = [module.get_submodule(names[n % len(names)]) for module in pair.both]
    befores = [vars(part).get("forward") for part in parts]
    for part in parts:
        part.forward = lambda x, forward=part.forward: 0.5 * forward(x)
    pair.same_outputs()
    for part, before in zip(parts, befores, strict=True):
        del part.forward
        if before is not None:
            part.forward = before


@action
def freeze(pair, n):
    trained = [*pair.parameters(trained=True).values()]
    if len(trained) > 2:
        for parameter in trained[n % len(trained)]:
            parameter.requires_grad_(False)
            parameter.grad = None
        pair.optimizers = None


@action
def thaw(pair, n):
    frozen = [*pair.parameters(trained=False).values()]
    if frozen:
        pair.touched = True
        for parameter in frozen[n % len(frozen)]:
            parameter.requires_grad_(True)
        pair.optimizers = None


WRITES = (
    lambda p: p.data.mul_(1.5),
    lambda p: p.data.copy_(p.data * 1.5),
    lambda p: p.data.__setitem__(slice(None), p.data * 1.5),
    lambda p: p.data.float().numpy() if p.dtype is torch.bfloat16 else p.data.numpy().__imul__(1.5),
    lambda p: setattr(p, "data", p.data * 1.5),
    lambda p: nn.init.constant_(p.data, 0.25),
)


@action
def write_data(pair, n):
    """A write that autograd and versions do not see."""
    pairs = [*pair.parameters().items()]
    _, parameters = pairs[n * 7 % len(pairs)]
    pair.touched = pair.touched or not parameters[0].requires_grad
    for parameter in parameters:
        WRITES[n % len(WRITES)](parameter)


@action
def cast_and_back(pair, n):
    """Casts of the whole module; those to 16 bits round its parameters, and no 4-bit weight."""
    dtype = (torch.double, torch.bfloat16, torch.half)[n % 3]
    if pair.kind.tolerance > 0.05:  # its twin never was in 16 bits
        dtype = torch.double
    info = torch.finfo(dtype)
    pair.touched = pair.touched or dtype is not torch.double
    for tensor in pair.dense.buffers():
        tensor.data = tensor.data.to(dtype).to(tensor.dtype)
    pair.ours.to(dtype)
    pair.ours.float()
    for ours, dense in pair.parameters().values():
        least = info.eps * info.tiny * dense.numel() ** 0.5  # the distance of subnormal numbers
        assert error(ours, dense) <= info.eps + pair.kind.tolerance + least / float(dense.norm().clamp_min(1e-30))
        pair.write(dense, dense, ours)
    if pair.kind.tolerance < 0.05:
        pair.optimizers = None
    else:
        pair.start_with(pair.make(), pair.make())


@action
def contexts(pair, n):
    """Contexts of torch around a step: inference, then autocast, whose gradients are compared with those in fp32."""
    with torch.inference_mode(n % 2 == 0), torch.no_grad():
        pair.same_outputs()
    pair.zero_grad()
    batch = pair.batch()
    for module, enabled in zip(pair.both, (True, False), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = pair.loss(module, batch)
        pair.derive(module, loss)
    # In bf16 a router chooses other experts for some tokens: 0.22 of the gradients was seen.
    pair.same_gradients(tolerance=0.3 if pair.kind.net == "experts" else 0.1)
    pair.zero_grad()


@action
def copies(pair, n):
    """Go on with a copy: copy.deepcopy, or torch.save and torch.load, which parametrized modules refuse."""
    if n % 2:
        ours = copy.deepcopy(pair.ours)
    else:
        torch.save(pair.ours, pair.folder / "module.pt")
        ours = torch.load(pair.folder / "module.pt", weights_only=False)
    pair.use(ours, copy.deepcopy(pair.dense))


@action
def without_adapter(pair, n):
    """The reference model of DPO, also where code in the context raises."""
    with disabled(pair):
        pair.same_outputs()
    if n % 2:
        with pytest.raises(Interrupted), disabled(pair):
            raise_()
    pair.same_outputs()


@action
def copies_without_adapter(pair, n):
    """A copy that is made in disable_adapter computes as the module does when it ends."""
    with disabled(pair):
        kept = copy.deepcopy(pair.ours)
    pair.same_outputs(kept, pair.dense)
    pair.use(kept, pair.dense)


@action
def interrupted_forward(pair, n):
    """An error in a forward pass: of a layer in the middle."""
    for module in pair.both:
        parts = [part for part in module.modules() if isinstance(part, (nn.Linear, nn.LayerNorm, nn.GELU))]
        hook = parts[n % len(parts)].register_forward_pre_hook(raise_)
        again = module.register_forward_hook(raise_)  # also where that layer was not called
        with pytest.raises(Interrupted):
            pair.loss(module, pair.kind.batch(n))
        hook.remove()
        again.remove()


@action
def interrupted_backward(pair, n):
    for module in pair.both:
        torch.manual_seed(n)
        y = module(pair.kind.batch(n)).float()
        y.register_hook(raise_)
        with pytest.raises(Interrupted):
            pair.derive(module, y.sum())
    pair.zero_grad()


@action
def interrupted_state_dict(pair, n):
    """A child whose state_dict raises, once."""
    for module in pair.both:
        parts = [*module.net.children()]
        part = parts[n % len(parts)]
        hook = part.register_state_dict_post_hook(raise_)
        with pytest.raises(Interrupted):
            module.state_dict()
        del part._state_dict_hooks[hook.id]


@action
def load_own_state(pair, n):
    """A state dict that is loaded again after more steps.

    After the first step: a frozen value that was never written is left out, and can't be restored once it is.
    """
    pair.train()
    states = [copy.deepcopy(module.state_dict()) for module in pair.both]
    pair.train(1 + n % 2)
    for number, (module, saved) in enumerate(zip(pair.both, states, strict=True)):
        if n % 3 == 1:  # a file that is mapped, and overwritten later
            path = pair.folder / f"mapped{number}.pt"
            torch.save(saved, path)
            saved = torch.load(path, mmap=True)
        module.load_state_dict(saved)
        garbage = {key: torch.zeros_like(value) for key, value in saved.items()}
        if n % 3 == 1:
            torch.save(garbage, path)
        else:
            for key, value in saved.items():
                value.copy_(garbage[key])


@action
def load_fresh(pair, n):
    """A state dict in a module that was made and converted anew: in memory, from a file, assigned, or part by part."""
    trained = pair.parameters(trained=True).keys()
    ours = pair.make()
    pair.kind.convert(ours, reverse=n % 2 == 1)
    dense = dense_twin(ours, pair.make())
    tied = len([*dense.parameters()]) < len([*dense.named_parameters(remove_duplicate=False)])
    assign = n % 4 == 2 and not tied  # torch ends a tie then, and the next module that is made has it again
    if n % 4 == 3 and pair.base is None:
        for part, again in zip(pair.ours.net.children(), ours.net.children(), strict=True):
            again.load_state_dict(part.state_dict())
    else:
        state = {key: value.clone() for key, value in pair.ours.state_dict().items()}
        if n % 4 == 1:
            torch.save(state, pair.folder / "state.pt")
            state = torch.load(pair.folder / "state.pt")
        ours.load_state_dict(state, assign=assign)
    dense.load_state_dict(copy.deepcopy(pair.dense.state_dict()), assign=assign)
    for name, parameters in matched(ours, dense).items():
        for parameter in parameters:
            parameter.requires_grad_(name in trained)
    pair.use(ours, dense)


@action
def fabric_checkpoint(pair, n):
    """Networks and optimizers of one file, which are set up in another order."""
    if not pair.kind.in_fabric:
        return
    if pair.optimizers is None:
        pair.train()

    def content(net, optimizers):
        names = [name for name, _ in net.named_children()]
        numbered = {f"optimizer{i}": ours for i, (ours, _) in enumerate(optimizers)}
        return {**dict(zip(names, net.wrapped, strict=True)), **numbered, "plugin": net.fabric.strategy.precision}

    before, optimizers, trained = pair.ours.net, pair.optimizers, pair.parameters(trained=True).keys()
    before.fabric.save(pair.folder / "fabric.ckpt", content(before, optimizers))
    pair.ours = pair.make()
    pair.kind.convert(pair.ours, reverse=n % 2 == 1)
    for name, (ours, _) in pair.parameters().items():
        ours.requires_grad_(name in trained)
    pair.optimizers = []
    names = {id(dense): ours for ours, dense in pair.parameters().values()}
    for _, dense in optimizers:
        parameters = [names[id(parameter)] for parameter in dense.param_groups[0]["params"]]
        pair.use_optimizers(type(dense)(parameters, lr=0.1), dense)
    pair.ours.net.fabric.load(pair.folder / "fabric.ckpt", content(pair.ours.net, pair.optimizers))
    pair.train()


@action
def resume_optimizer(pair, n):
    """Optimizers that are made again and get the state of those before."""
    before, pair.optimizers = pair.optimizers, []
    for old in before or ():
        again = [type(old[1])([*each.param_groups[0]["params"]], lr=0.05) for each in old]
        for new, each in zip(again, old, strict=True):
            new.load_state_dict(copy.deepcopy(each.state_dict()))
        pair.use_optimizers(*again)
    pair.optimizers = pair.optimizers or None
    pair.train()


@action
def adapter_folder(pair, n):
    """A folder of PEFT, in a module that was made anew: by load_adapter, or by the conversion."""
    if pair.touched or len(pair.parameters(trained=True)) != len(pair.trained_by_conversion()):
        return
    if pair.kind.net == "with_batch_norm":  # a folder of PEFT has no place for statistics of a frozen part
        return
    ours = pair.make()
    if n % 2 or pair.kind.in_fabric:
        pair.kind.convert(ours)
        before, pair.ours = pair.parts(), ours
        for (part, _), (again, _) in zip(before, pair.parts(), strict=True):
            save_adapter(part, pair.folder / "adapter")
            load_adapter(again, pair.folder / "adapter")
    else:
        save_adapter(pair.ours, pair.folder / "adapter")
        pair.kind.convert(ours, adapter=str(pair.folder / "adapter"))
    pair.use(ours, pair.dense)


@action
def lightning_checkpoint(pair, n):
    """A file of a Trainer, loaded without a Trainer; it builds the module by its arguments."""
    if pair.base is not None or pair.kind.in_fabric:
        return
    trainer = make_trainer(pair.folder)
    trainer.strategy.connect(pair.ours)
    trained = pair.parameters(trained=True).keys()
    trainer.save_checkpoint(pair.folder / "c.ckpt")
    pair.ours._trainer = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = load_from_checkpoint(Built, pair.folder / "c.ckpt")
    for name, parameters in matched(ours, pair.dense).items():
        parameters[0].requires_grad_(name in trained)
    pair.use(ours.train(), pair.dense)


def fit_module(pair, module, path=None, **arguments):
    """Epochs of a Trainer."""
    data = torch.utils.data.DataLoader([pair.kind.batch(100 + i) for i in range(2)], batch_size=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(pair.folder, enable_checkpointing=False, **arguments)
        trainer.fit(module, data, ckpt_path=path)
    module.train()
    return trainer


FIT = (
    {},
    {"accumulate_grad_batches": 2},
    {"gradient_clip_val": 0.1},
    {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
)


@action
def fit(pair, n):
    """Some steps of a Trainer; the twin's without the plugin."""
    if pair.kind.in_fabric:
        return
    for module, plugins in zip(pair.both, (QLoRAPrecision(), None), strict=True):
        torch.manual_seed(n)
        fit_module(pair, module, plugins=plugins, **FIT[n % 4])
        module._trainer = None
    pair.optimizers = None


@action
def resume_fit(pair, n):
    """A run that ends after its first epoch, and goes on from a checkpoint in a module that was made anew."""
    if pair.kind.in_fabric or pair.touched or len(pair.parameters(True)) != len(pair.trained_by_conversion()):
        return
    plugin = partial(QLoRAPrecision, **pair.kind.all_arguments)
    torch.manual_seed(n)
    path = pair.folder / "epoch.ckpt"
    fit_module(pair, pair.ours, plugins=plugin()).save_checkpoint(path)
    ours = pair.make()
    fit_module(pair, ours, path, plugins=plugin(), max_epochs=2)
    torch.manual_seed(n)
    fit_module(pair, pair.dense, max_epochs=2)
    ours._trainer = pair.dense._trainer = None
    pair.use(ours, pair.dense)


@action
def read_weights(pair, n):
    """Code that reads `layer.weight`: values, and a product with it."""
    layers = {name: layer for name, layer in adapted_layers(pair.ours).items() if not isinstance(layer, QLoRAExperts)}
    name = [*layers][n % len(layers)]
    weight, expected = layers[name].weight, pair.dense.get_submodule(name).weight
    pair.close(weight + 0, expected, "weight")
    if not pair.kind.arguments.get("lora_dropout"):
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(n))
        pair.close(F.linear(x.to(weight.dtype), weight).float(), F.linear(x, expected), "product with the weight")


@action
def merge_and_convert(pair, n):
    """Merge, and convert what came out."""
    if pair.kind.tolerance > 0.05 or pair.kind.machine is SLOW:  # merged in 16 bits, rounded
        return
    for part, _ in pair.parts():
        merge(part)
    for part in [*pair.dense.modules()]:
        if parametrize.is_parametrized(part):
            for key in [*part.parametrizations]:
                parametrize.remove_parametrizations(part, key)
            vars(part).pop("forward", None)
    pair.same_outputs()
    state = pair.ours.state_dict()
    for key, value in pair.dense.state_dict().items():
        pair.close(state[key], value, key)
    pair.base = copy.deepcopy(state)
    pair.touched = False
    pair.start_with(pair.ours, pair.make())


def machine(name: str, kind: Kind) -> type[RuleBasedStateMachine]:
    """The state machine of a kind."""

    def init(self):
        RuleBasedStateMachine.__init__(self)
        state(kind.machine)
        self.pair = Pair(kind)
        self.pair.check()

    def teardown(self):
        shutil.rmtree(self.pair.folder, ignore_errors=True)
        state(FAST)

    members = {"__init__": init, "teardown": teardown, "__module__": __name__}
    for title, function in ACTIONS.items():

        def do(self, n, function=function):
            function(self.pair, n)
            self.pair.check()

        do.__name__ = do.__qualname__ = title
        members[title] = rule(n=st.integers(0, 11))(do)
    return type(name, (RuleBasedStateMachine,), members)


MACHINES = {name: machine(name, kind) for name, kind in KINDS.items()}
globals().update(MACHINES)  # for the scripts that Hypothesis prints


# These come last, since after them the others do less: no folder of an adapter holds a base that was written to.
CHANGES = ("freeze", "thaw", "write_data", "cast_and_back", "merge_and_convert")
LOADS = ("load_fresh", "lightning_checkpoint", "copies", "load_own_state", "adapter_folder")


@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KINDS)
def test_a_module_and_its_dense_twin_stay_equal(name, half):
    """In another order for each kind; an action has each number from 0 to 11 in one of the kinds, of both halves."""
    first = [title for title in ACTIONS if title not in CHANGES]
    first = [title for i, title in enumerate(first) if (i + [*KINDS].index(name) // 2) % 2 == half]
    last = [title for pair in zip(CHANGES, LOADS, strict=True) for title in pair]
    # As in `configure_model`. Before 2.12, torch's own AdamW and checkpoint make tensors without a device.
    elsewhere = PackageElsewhere() if torch.__version__ >= "2.12" else nullcontext()
    with stated(KINDS[name].machine), elsewhere as mode:
        pair = Pair(KINDS[name])
        for title in (*random.Random(name).sample(first, len(first)), *last):
            number = (5 * [*KINDS].index(name) + [*ACTIONS].index(title)) % 12
            print(f"{title}(pair, {number})")
            ACTIONS[title](pair, number)
            pair.check()
    assert not getattr(mode, "asked", None)
    shutil.rmtree(pair.folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_sequences(name):
    run_state_machine_as_test(
        MACHINES[name],
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=20,
            database=None,
            deadline=None,
            suppress_health_check=[*HealthCheck],
            phases=[Phase.generate, Phase.shrink],
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("title", ACTIONS)
def test_each_action(name, title):
    with stated(KINDS[name].machine):
        each_action(KINDS[name], title)


def each_action(kind, title):
    for numbers in ((0, 1), (2, 3)):
        pair = Pair(kind)
        pair.train()
        for n in numbers:
            ACTIONS[title](pair, n)
            pair.check()
        shutil.rmtree(pair.folder)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("mode", "kind"), [("apart", "Plain"), ("raise", "Teacher"), ("ddp", "Plain"), ("ddp", "Bert")]
)
def test_ranks(mode, kind, size, tmp_path):
    """Nothing is collective; a rank that raises ends alone; DDP averages the gradients that it averages of a twin."""
    command = [sys.executable, "-m", "tests.scripts.twin_ranks", mode, kind, str(size)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in ranks]
    for process, output in zip(ranks, outputs, strict=True):
        fails = mode == "raise" and process is ranks[1]
        assert process.returncode == int(fails), output[-3000:]
        assert ("all equal" in output) != fails and ("Interrupted" in output) == fails
