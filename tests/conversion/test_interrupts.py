"""A conversion that is interrupted at any statement, and called again, ends as an uninterrupted one."""

import copy
import re
import sys
import weakref
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_qlora
from lightning_qlora import QLoRAPrecision, convert, merge, save_adapter
from lightning_qlora.conversion import outside_copies
from lightning_qlora.dtypes.instance_method import METHODS
from lightning_qlora.layers.packed_layer import BASE, PackedLayer
from lightning_qlora.layers.qlora_linear import QLoRALinear, adapted_layers
from lightning_qlora.survey.records import RECORDS, was_merged
from lightning_qlora.tensors.held_types import TYPES
from tests.conftest import Classifier, loader
from tests.toys import assert_equal, perturb

PACKAGE = str(Path(lightning_qlora.__file__).parent)
TOKENS = torch.arange(40).view(2, 20)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts = 3
        self.up = nn.Parameter(torch.randn(3, 48, 32) / 6)
        self.down = nn.Parameter(torch.randn(3, 32, 48) / 7)

    def forward(self, x):
        return sum(torch.relu(x @ self.up[i].T) @ self.down[i].T for i in range(3))


@pytest.fixture(autouse=True)
def no_copies(monkeypatch):
    """The states that the tests keep are copies of weights outside of the module, which the report would name."""
    monkeypatch.setattr(outside_copies, "_search", lambda known: ([], {}, []))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """What a conversion can change: layers, biases, experts, tokens, what trains in full, a teacher, logits."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.experts = Experts()
        self.teacher = nn.Linear(32, 64)
        self.teacher.load_state_dict(self.blocks[0].up.state_dict())
        self.norm = nn.LayerNorm(32)
        self.register_buffer("scale", torch.ones(32))
        self.small = nn.Linear(32, 2)
        self.lm_head = nn.Linear(32, 160, bias=False)

    def forward(self, tokens):
        x = self.frozen(self.embed(tokens)) * self.scale
        for block in self.blocks:
            x = block(x)
        x = self.norm(self.experts(x))
        return self.lm_head(x).float().square().mean() + self.small(x).mean() + self.teacher(x).square().mean()


ARGUMENTS = {
    "r": 4,
    "modules_to_save": ["blocks.1.norm"],
    "trainable_token_indices": {"embed": [1, 5]},
    "gradient_checkpointing": True,
    "deferred_logits": True,
}
CASES = {
    "bf16": {},
    "fp32": {},
    "held in fp32": {"compute_dtype": "fp16"},
    "calibrated": {"init_lora_weights": "calibrated"},
    "dora": {"use_dora": True, "use_rslora": True},
    "frozen": {},
    "second stage": {},
    "adapter": {"adapter": "FOLDER", "trainable_token_indices": None, "modules_to_save": []},
}


def model_of(case):
    torch.manual_seed(0)
    model = Model()
    if case == "frozen":
        model.requires_grad_(False)
    if case == "second stage":
        blocks = model.blocks
        model.blocks = blocks[:1]
        convert(model, **ARGUMENTS | {"modules_to_save": ["norm"]})
        model.blocks.append(blocks[1])
    return model if case in ("fp32", "second stage") else model.bfloat16()


@cache
def arguments_of(case, folder):
    arguments = ARGUMENTS | CASES[case]
    if case == "adapter":
        convert(source := model_of(case), r=4)
        save_adapter(perturb(source), folder)
        arguments["adapter"] = str(folder)
    return arguments


def state_of(module):
    """All that conversion and merging change in a module."""
    state = {}
    for name, part in module.named_modules():
        attributes = vars(part)
        state |= {f"{name}.{key}": buffer for key, buffer in part._buffers.items()}
        for key, parameter in part._parameters.items():
            if parameter is not None:
                state[f"{name}.{key}"] = parameter.detach()
                state[f"{name}.{key} {parameter.requires_grad}"] = torch.zeros(())
        if isinstance(part, PackedLayer):
            state |= {f"{name}.{key}": getattr(part, key) for key in BASE}
        methods = [
            (type(each), each.name, *map(vars(each).get, ("autocast", "in_fp32")))
            for each in attributes.get(METHODS, ())
        ]
        own = sorted(key for key in attributes if key.startswith("_qlora") or key == "forward")
        hooks = [key for key, value in attributes.items() if "hooks" in key and value]
        values = [attributes.get(key) for key in (RECORDS, TYPES, "is_unfinished", "weight_dtype")]
        words = (str(type(part)), [*part._parameters], [*part._modules], methods, own, hooks, *values)
        state[f"{name} {words}"] = torch.zeros(())
    return state


def finish(model, arguments):
    """Convert, train one step without an optimizer, merge: the state after each, and the report."""
    report = str(convert(model, **arguments))
    states = [state_of(model)]
    torch.manual_seed(1)
    model.train()(TOKENS).backward()
    states.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    merge(model)
    states.append(state_of(model))
    return states, re.sub(r" in [\d.]+ s\n", "\n", report)


class Interrupt(BaseException):
    pass


def trace_lines(function, stop=None):
    """Call a function; returns the lines of the package that it ran, and raises before the one of this number."""
    lines = []

    def local(frame, event, _):
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines) - 1 == stop:
                raise Interrupt
        return local

    def start(frame, event, _):
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(start)
    try:
        function()
    finally:
        sys.settrace(before)
    return lines


def places_in(function):
    """The numbers of lines to interrupt at, of each the first and another."""
    counts = Counter()
    numbers = []
    for number, line in enumerate(trace_lines(function)):
        counts[line] += 1
        if counts[line] in (1, 3):
            numbers.append(number)
    return numbers


def expected(case, arguments):
    """The numbers of lines to interrupt at, and the end of an uninterrupted conversion."""
    convert(model_of(case), **arguments)  # what happens once in a process
    model = model_of(case)
    return places_in(lambda: convert(model, **arguments)), *finish(model_of(case), arguments)


def check_interrupts(case, folder, choose):
    arguments = arguments_of(case, folder)
    numbers, states, report = expected(case, arguments)
    for number in choose(numbers):
        model = model_of(case)
        with pytest.raises(Interrupt):
            trace_lines(lambda model=model: convert(model, **arguments), number)
        has_ended = adapted_layers(model) and not any(layer.is_unfinished for layer in adapted_layers(model).values())
        ours, text = finish(model, arguments)
        for state, other in zip(ours, states, strict=True):
            assert state.keys() == other.keys(), number
            assert_equal(state, other)
        assert has_ended or text == report, number


@pytest.mark.parametrize("case", CASES)
def test_a_conversion_that_was_interrupted_and_called_again_is_equal(case, tmp_path):
    check_interrupts(case, tmp_path, lambda numbers: numbers[5 :: len(numbers) // 4])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_conversion_can_be_interrupted_at_every_statement(case, tmp_path):
    check_interrupts(case, tmp_path, lambda numbers: numbers)


def check_interrupted_merges(case, folder, choose):
    converted = model_of(case)
    convert(converted, **arguments_of(case, folder))
    perturb(converted).eval()
    in_fp32 = converted.norm.weight.dtype is torch.float32
    copies = [copy.deepcopy(converted) for _ in range(3)]
    merge(copies[0])  # what happens once in a process
    numbers = places_in(lambda: merge(copies[1]))
    other = state_of(merge(copies[2]))
    for number in choose(numbers):
        model = copy.deepcopy(converted)
        with pytest.raises(Interrupt):
            trace_lines(lambda model=model: merge(model), number)
        torch.testing.assert_close(model(TOKENS), converted(TOKENS), rtol=1e-4 if in_fp32 else 0.25, atol=0.01)
        if not was_merged(model):
            merge(model)
        state = state_of(model)
        assert state.keys() == other.keys(), number
        for key, value in state.items():  # in 16 bits each merge rounds at random
            exact = value.dtype is torch.float32
            tolerance = 1e-6 if exact else 0.02
            torch.testing.assert_close(value.float(), other[key].float(), rtol=tolerance, atol=tolerance)


MERGED = ["fp32", "bf16", "dora", "second stage"]


@pytest.mark.parametrize("case", MERGED)
def test_a_merge_that_was_interrupted_and_called_again_is_equal(case, tmp_path):
    check_interrupted_merges(case, tmp_path, lambda numbers: numbers[5 :: len(numbers) // 6])


@pytest.mark.slow
@pytest.mark.parametrize("case", MERGED)
def test_a_merge_can_be_interrupted_at_many_statements(case, tmp_path):
    check_interrupted_merges(case, tmp_path, lambda numbers: numbers[::5])


def test_each_weight_is_freed_before_the_next_layer_is_quantized(monkeypatch):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []
    initialize = QLoRALinear.initialize

    def count(layer, *arguments):
        alive.append(sum(weight() is not None for weight in weights))
        initialize(layer, *arguments)

    monkeypatch.setattr(QLoRALinear, "initialize", count)
    convert(model, r=4)
    assert alive == [4, 3, 2, 1]


def test_a_module_is_merged_after_an_interrupted_conversion():
    model = model_of("bf16")
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    weight = model.lm_head.weight
    weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^lm_head: .*NaN or Inf"):
        convert(model, r=4, target_modules=["all-linear", "lm_head"])
    assert len(adapted_layers(model)) == 7 and model.lm_head.weight is weight and model.norm.weight.requires_grad
    merge(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains
    assert model(TOKENS).isnan()


def test_layers_of_an_interrupted_conversion_stay_as_they_are_if_the_next_call_excludes_them():
    model = model_of("bf16")
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^lm_head: .*NaN or Inf"):
        convert(model, r=4, target_modules=["all-linear", "lm_head"])
    with pytest.warns(UserWarning, match=r"was converted before, with r=4 and not 2, and stays so"):
        report = convert(model, r=2, exclude_modules=["blocks.0.up"], modules_to_save=["blocks.1"])
    assert {"blocks.0.up", "blocks.1.up"} < {*report.converted}
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"blocks.0.up.lora_A", "blocks.1.up.lora_B", "blocks.1.norm.weight"} < trains
    assert not {"blocks.0.up.bias", "blocks.1.up.bias"} & trains


def test_a_fit_that_is_interrupted_in_its_conversion_can_be_started_again(trainer):
    def run(stop):
        torch.manual_seed(0)
        module = Classifier()
        run = trainer(plugins=QLoRAPrecision(r=4), max_epochs=1)
        if stop is not None:
            with pytest.raises(Interrupt):
                trace_lines(lambda: run.fit(module, loader()), stop)
            run = trainer(plugins=QLoRAPrecision(r=4), max_epochs=1)
        torch.manual_seed(1)
        run.fit(module, loader())
        return module

    straight = run(None)
    for stop in (2500, 4000, 5000):
        resumed = run(stop)
        assert resumed.losses == straight.losses
        assert_equal(state_of(resumed), state_of(straight))
