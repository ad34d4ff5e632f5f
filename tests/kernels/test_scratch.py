import weakref
from contextlib import nullcontext
from threading import Thread, active_count, get_ident

import pytest
import torch
from torch import nn

from lightning_qlora import convert
from lightning_qlora.kernels import eager, reference, scratch
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.quantization.codebooks import dynamic_map

CARDS = [torch.device("cuda", index) for index in (0, 1)]
FLOATS = torch.float32


@pytest.fixture
def made(monkeypatch):
    """The buffers that are allocated: a stand-in for the card, whose tensors are here, full of ones."""
    made = []
    monkeypatch.setattr(torch, "empty", lambda *a, device, **k: made.append(torch.ones(*a, **k)) or made[-1])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    scratch.release()
    yield made
    scratch.release()


def in_a_thread(function, *arguments):
    results = []
    thread = Thread(target=lambda: results.append(function(*arguments)))
    thread.start()
    thread.join()
    return results[0]


def test_each_thread_device_stream_and_purpose_has_a_buffer(made, monkeypatch):
    """Kernels of two streams run at the same time; those of one stream run one after the other."""
    first = scratch.scratch((8,), FLOATS, CARDS[0], "shares")
    assert scratch.scratch((4,), FLOATS, CARDS[0], "shares").data_ptr() == first.data_ptr() and len(made) == 1
    scratch.scratch((8,), FLOATS, CARDS[1], "shares")
    scratch.scratch((8,), FLOATS, CARDS[0], "dropped")
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 8)
    scratch.scratch((8,), FLOATS, CARDS[0], "shares")
    in_a_thread(scratch.scratch, (8,), FLOATS, CARDS[0], "shares")
    assert len(made) == len({buffer.data_ptr() for buffer in made}) == 5


def test_a_captured_graph_gets_memory_of_its_own(made, monkeypatch):
    """Its replays would use a buffer that was freed or whose counters are not zero; sums are not set to zero."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    card = CARDS[0]
    ones = [scratch.scratch((4,), torch.int32, card, "shares", 2) for _ in range(2)]
    assert ones[0] is not ones[1] and ones[0].data_ptr() == made[0].data_ptr() and ones[1].tolist() == [0, 0, 1, 1]
    captured = [decode(card) for _ in range(2)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    others = [scratch.scratch((4,), torch.int32, card, "shares", 2) for _ in range(2)]
    assert others[0] is others[1] and all(others[0] is not one for one in ones)
    assert [(one.dtype, one.shape) for one in (*ones, others[0])] == 3 * [(torch.int32, (4,))]
    assert len({*captured, decode(card)}) == 3


def test_what_is_kept_is_not_in_the_memory_of_graphs_that_a_thread_allocates(made, monkeypatch):
    """As torch.compile's "reduce-overhead" runs a graph before it captures it: kept memory of graphs is an error."""
    stand_in = torch.empty
    streams = []
    threads = []
    monkeypatch.setattr(torch, "empty", lambda *a, **k: threads.append(get_ident()) or stand_in(*a, **k))
    monkeypatch.setattr(torch, "tensor", lambda *a, device, **k: threads.append(get_ident()) or torch.ones(256))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: streams.append(stream) or nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the caller's on {device}")
    card = CARDS[1]
    decode(card)
    scratch.scratch((4,), torch.int32, card, "shares", 2)
    dynamic_map.__wrapped__(device=card)
    assert len(threads) == 3 and get_ident() not in threads
    assert streams == 3 * ["the caller's on cuda:1"]  # kernels of this stream come after the zeros
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    decode(card)
    assert threads[3:] == [get_ident()]


@pytest.mark.parametrize("is_captured", [True, False])
def test_no_memory_of_a_graph_is_kept_and_the_values_are_the_same(monkeypatch, is_captured):
    """Memory of a graph that outlives its capture is an error of torch; `release` frees at once."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    convert(net, r=4, lora_dropout=0.0)
    inputs = [torch.randn(80, 64, requires_grad=True), *(p for p in net.parameters() if p.requires_grad)]

    def step():
        y = net(inputs[0])
        return y.detach(), *torch.autograd.grad(y.square().sum(), inputs)

    expected = step()
    scratch.release()
    memory = []
    new_memory = scratch.Buffer.__init__

    def record(buffer, *arguments):
        new_memory(buffer, *arguments)
        memory.append(weakref.ref(buffer.memory))

    monkeypatch.setattr(scratch.Buffer, "__init__", record)
    if is_captured:
        monkeypatch.setattr(scratch, "CAPTURED", 0)
    assert all(map(torch.equal, step(), expected))
    assert len(memory) == (4 if is_captured else 1)
    if not is_captured:
        scratch.release()
    assert all(each() is None for each in memory)


def decode(card=CARDS[0], shape=(2, 3), then=lambda: None):
    """The address of the buffer in which a weight is decoded; `then` comes before it is given back."""
    with scratch.lend(shape, FLOATS, card) as buffer:
        assert buffer.matrix.shape == shape and buffer.matrix.T.equal(buffer.transposed)
        then()
    return buffer.matrix.data_ptr()


def test_the_threads_of_both_passes_have_one_buffer_for_decoded_weights(made):
    """All kernels that read it were launched on the same stream before it is given back."""
    forward = decode()
    assert in_a_thread(decode) == in_a_thread(decode, CARDS[0], (3, 2)) == decode() == forward
    assert len(made) == 1
    assert decode(CARDS[1]) != forward


def test_a_thread_that_decodes_before_another_one_has_multiplied_gets_a_second_buffer(made, monkeypatch):
    """On one stream the second weight would replace the first one, before the product reads it."""
    others = []
    first = decode(then=lambda: others.append(in_a_thread(decode)))
    assert others[0] != first and len(made) == 2
    assert in_a_thread(decode) in (first, others[0]) and len(made) == 2
    streams = iter([1, 2, 1, 2])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: next(streams))
    places = [in_a_thread(decode) for _ in range(4)]
    assert places[:2] == places[2:] and places[0] != places[1] and len(made) == 4


def test_buffers_of_threads_that_ended_are_freed_with_the_next_call(made):
    """As many as a pool of threads had at the same time would stay."""
    decode(then=lambda: in_a_thread(lambda: decode(then=lambda: in_a_thread(decode))))
    assert len(made) == 3
    buffers = [weakref.ref(made.pop()) for _ in range(3)]
    decode()
    assert not made and sum(buffer() is not None for buffer in buffers) <= active_count()


def test_a_larger_weight_replaces_the_buffer_and_an_error_keeps_it(made, monkeypatch):
    small = decode()
    assert decode(shape=(4, 4)) == decode() and len(made) == 2
    weight = reference.quantize(torch.randn(4, 4), "nf4", 64, True)
    plan = eager.plan(torch.ones(80, 4), LoRA(torch.ones(1, 4), torch.ones(4, 1)))
    monkeypatch.setattr(plan, "device", CARDS[0])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        plan.add_product(torch.ones(80, 4), torch.ones(80, 5), weight, transposed=True)
    assert decode() == made[-1].data_ptr() and len(made) == 2
    scratch.release()
    decode()
    assert [buffer.numel() for buffer in made] == [6, 16, 6] and small == made[0].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_that_compute_at_the_same_time_get_what_each_gets_alone(dtype):
    """Layers of two sizes, forward and backward, in four threads."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(256, size), nn.Linear(size, 256)).to(dtype) for size in (512, 320)]
    for net in nets:
        convert(net, r=4, lora_dropout=0.0)
    inputs = [torch.randn(80, 256).to(dtype).requires_grad_() for _ in nets]

    def step(number):
        results = []
        for _ in range(4):
            y = nets[number % 2](inputs[number % 2])
            results.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), [inputs[number % 2]])))
        return results

    expected = [step(number)[0] for number in range(2)]
    results = {}
    threads = [Thread(target=lambda number=number: results.update({number: step(number)})) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        for result in results[number]:
            assert all(map(torch.equal, result, expected[number % 2]))


def test_decoding_inside_of_a_product_does_not_change_what_is_multiplied(monkeypatch):
    """A layer that a mode of torch calls in another one's product."""
    weights = [reference.quantize(torch.randn(64, 64), "nf4", 64, True) for _ in range(2)]
    x = torch.randn(80, 64)
    plan = eager.plan(x, LoRA(torch.empty(4, 64), torch.empty(64, 4)))
    ours, inner = torch.zeros(2, 80, 64)
    multiply = plan.product

    def product(*given, **options):
        monkeypatch.setattr(plan, "product", multiply)
        plan.add_product(inner, x, weights[1], transposed=True)
        multiply(*given, **options)

    monkeypatch.setattr(plan, "product", product, raising=False)
    plan.add_product(ours, x, weights[0], transposed=True)
    for result, weight in zip((ours, inner), weights, strict=True):
        assert torch.equal(result, x @ reference.dequantize(weight, torch.float32).T)
