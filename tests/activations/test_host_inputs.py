"""Inputs of recomputed blocks on the host: the values of True, bit for bit, with a stand-in for a card's copies.

A copy happens when something waits for it. Until then its target is NaN, and so is host memory that was given back.
"""

import gc
from collections import Counter

import pytest
import torch
from torch import nn

from lightning_qlora import convert, estimate_memory
from lightning_qlora.activations import activation_budget, host_inputs, token_tiles
from lightning_qlora.activations.device_memory import HostCopies, Memory
from lightning_qlora.activations.gradient_checkpointing import budget_of
from tests.toys import ARGUMENTS, LLAMA, assert_equal, ids, perturb, toy

pytest.importorskip("transformers")


class LateCopies(HostCopies):
    copied = 0  # bytes

    def start(self, pairs):
        pairs = [*pairs]
        for target, _ in pairs:
            target.fill_(torch.nan)
        return pairs

    def wait(self, event):
        for target, source in event:
            target.copy_(source)
            LateCopies.copied += target.nbytes
        event.clear()


@pytest.fixture(autouse=True)
def card(monkeypatch):
    monkeypatch.setattr(host_inputs, "HostCopies", LateCopies)
    monkeypatch.setattr(host_inputs, "is_on_card", lambda x: True)
    monkeypatch.setattr(host_inputs, "LEAST", 1)
    monkeypatch.setattr(host_inputs, "CHUNK", 512)
    LateCopies.copied = 0


def converted(name="llama", setting="offload", dtype=torch.float32, **changes):
    module = toy(name, **changes).to(dtype).train()
    module.config.use_cache = False
    convert(module, **ARGUMENTS, gradient_checkpointing=setting)
    return perturb(module)


def step(module, tokens=12):
    module.zero_grad()
    torch.manual_seed(0)
    tokens = ids(columns=tokens)
    loss = module(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


def host(module):
    return budget_of(module.modules()).host


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_true_bit_for_bit_and_each_byte_is_copied_once_each_way(dtype):
    module = converted(dtype=dtype, num_hidden_layers=4)
    for tokens in (12, 24, 6):
        LateCopies.copied = 0
        assert_equal(step(module, tokens), step(converted(setting=True, dtype=dtype, num_hidden_layers=4), tokens))
        assert LateCopies.copied == 2 * 4 * 2 * tokens * 64 * dtype.itemsize
    assert "of inputs wait on the host" in str(budget_of(module.modules()))


def test_with_tiles_gradients_are_those_of_tiles_alone(monkeypatch):
    monkeypatch.setattr(token_tiles, "LEAST_ROWS", 8)
    expected = converted()
    host(expected)._takes = lambda x: False
    assert_equal(step(converted()), step(expected))


def test_several_forward_passes_before_a_backward_pass():
    module = converted(num_hidden_layers=3)
    expected = converted(setting=True, num_hidden_layers=3)
    gradients = []
    for model in (module, expected):
        model.zero_grad()
        first, second = (model(input_ids=ids(columns=n), labels=ids(columns=n)).loss for n in (12, 8))
        first.backward(retain_graph=True)
        (2 * second).backward()
        first.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert_equal(*gradients)


def fail(*_):
    raise ZeroDivisionError


def failing_backward(module, _, output):
    (output[0] if isinstance(output, tuple) else output).register_hook(fail)


def one_of_300_steps(module, number):
    """A batch that is longer or shorter than the last one; without a backward pass, with an error, or an evaluation."""
    tokens = ids(columns=4 + 4 * (number % 5))
    module.train(number % 4 != 1)
    if number % 11 == 3:
        handle = module.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            module(input_ids=tokens)
        handle.remove()
    if number % 13 == 5:
        handle = module.model.layers[1].register_forward_hook(failing_backward)
        loss = module(input_ids=tokens, labels=tokens).loss
        handle.remove()
        with pytest.raises(ZeroDivisionError):
            loss.backward()
    with torch.no_grad():
        module(input_ids=tokens)
    loss = module(input_ids=tokens, labels=tokens).loss
    if number % 7:
        loss.backward()
    module.zero_grad()


def living():
    """How many objects of each class live that steps make."""
    gc.collect()
    kinds = (torch.Tensor, host_inputs._Waiting)
    objects = [each for each in gc.get_objects() if type(each) in kinds]
    return Counter(type(each).__name__ for each in objects)


@pytest.mark.parametrize(
    ("setting", "least_rows", "steps"),
    [
        ("offload", 1024, 26),
        *(
            pytest.param(*each, 300, marks=pytest.mark.slow)
            for each in [("offload", 1024), ("offload", 8), ("auto", 8)]
        ),
    ],
)
def test_nothing_leaks(setting, least_rows, steps, monkeypatch):
    monkeypatch.setattr(token_tiles, "LEAST_ROWS", least_rows)
    available = [10**9]
    monkeypatch.setattr(activation_budget, "memory_of", lambda *_, **__: Memory(10**6, 2 * 10**6, available[0]))
    module = converted(setting=setting, num_hidden_layers=3)
    lived = None
    for number in range(steps):
        available[0] = [10**9, 2_200_000, 1][number % 3]  # room for all activations, for some, for none
        one_of_300_steps(module, number)
        if number == 12:
            lived, held = living(), host(module).nbytes
    assert living() == lived and host(module).used == 0 and host(module).nbytes <= 2 * held
    if setting == "offload" and least_rows == 1024:
        assert_equal(step(module.train()), step(converted(setting=True, num_hidden_layers=3)))


def test_auto_offloads_until_a_step_has_measured_what_fits(monkeypatch):
    monkeypatch.setattr(activation_budget, "memory_of", lambda *_, **__: Memory(10**6, 2 * 10**6, 10**9))
    module = converted(setting="auto", num_hidden_layers=4)
    expected = step(converted(setting=True, num_hidden_layers=4))
    copied = []
    for _ in range(2):
        LateCopies.copied = 0
        assert_equal(step(module), expected)
        copied.append(LateCopies.copied)
    assert copied == [2 * 4 * 2 * 12 * 64 * 4, 0] and budget_of(module.modules()).kept_blocks == 4


def test_without_room_on_the_host_inputs_stay_on_the_device(monkeypatch):
    module = converted(num_hidden_layers=4)
    monkeypatch.setattr(host_inputs, "free_on_host", lambda: 0)
    assert_equal(step(module), step(converted(setting=True, num_hidden_layers=4)))
    assert LateCopies.copied == 0 and host(module).is_full


class Changing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        y = self.layer(x)
        x.add_(1)
        return y


def test_a_block_that_changes_its_input_is_an_error():
    module = nn.Sequential(*(Changing() for _ in range(2)))
    convert(module, **ARGUMENTS, gradient_checkpointing="offload")
    with pytest.raises(RuntimeError, match="changed its input in place"):
        module(torch.randn(4, 64))


def test_plan_counts_inputs_on_the_host_and_the_device_has_two():
    import transformers

    config = transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": 12, "max_position_embeddings": 4096})
    of_each = {}
    for setting in (True, "offload"):
        of_each[setting] = estimate_memory(config, 1, 1024, r=4, lora_dropout=0.0, gradient_checkpointing=setting)
    inputs = 1024 * 64 * 2
    less = of_each[True].parts["activations"] - of_each["offload"].parts["activations"]
    assert 8 * inputs < less < 14 * inputs
    assert of_each[True].host_bytes == 0 and 12 * inputs <= of_each["offload"].host_bytes <= 13 * inputs
    assert "in host memory" in str(of_each["offload"])
