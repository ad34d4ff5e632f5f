"""What the check of a backend finds, in backends of plain torch that are wrong on purpose."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from lightning_qlora.kernels import eager, reference, scratch
from tests.kernels import verify

CPU = torch.device("cpu")
RIGHT = {op: lambda *given, op=op: verify.function_of(eager, op)(*given) for op in verify.OPS} | {
    "grouped_linear": reference.grouped_linear,
    "grouped_linear_backward": reference.grouped_linear_backward,
}


def fault(op, wrong, **others):
    kernels = SimpleNamespace(**RIGHT | {op: wrong, "can_group": lambda *_: True} | others)
    return verify.fault(kernels, CPU, op)


@pytest.mark.parametrize("op", verify.OPS)
def test_nothing_is_found_in_what_is_right(op):
    calls = []
    right = RIGHT[op]
    assert fault(op, lambda *arguments: calls.append(1) or right(*arguments)) is None
    assert len(calls) == len(list(verify.cases(op)))


def scaled(op, by):
    """The op with results that are too large."""

    def wrong(*arguments):
        result = RIGHT[op](*arguments)
        return result * by if isinstance(result, torch.Tensor) else tuple(each * by for each in result)

    return wrong


def one_element(op, by):
    """The op with an error in the largest element of its result."""

    def wrong(*arguments):
        result = RIGHT[op](*arguments)
        largest = result.abs().argmax()
        result.view(-1)[largest] *= by
        return result

    return wrong


def differs(by, limit, case):
    return f"differs from the reference by {by} of the largest value, limit {limit}, with {case}"


X = "float32 [70, 515]"  # the case of lora_project that is first wrong


@pytest.mark.parametrize(
    ("op", "wrong", "text"),
    [
        # All elements off: the bound of the norm is half of that of an element. Only exact ops have none.
        ("lora_project", scaled("lora_project", 1 + 9e-4), None),
        ("lora_project", scaled("lora_project", 1 + 1.1e-3), differs("0.0011", "0.002", X)),
        ("lora_project", one_element("lora_project", 1 + 9e-4), None),
        ("lora_project", one_element("lora_project", 1 + 2.2e-3), differs("0.0022", "0.002", X)),
        ("dequantize", one_element("dequantize", 1 + 1e-6), differs("9.9e-07", "0", "uint8 [9216]")),
        ("lora_project", scaled("lora_project", torch.nan), differs("nan", "0.002", X)),
        (
            "lora_project",
            lambda x, lora: RIGHT["lora_project"](x, lora).double(),
            f"gives torch.float64 [70, 8] and not torch.float32 [70, 8], with {X}",
        ),
        (
            "dequantize",
            lambda *arguments: RIGHT["dequantize"](*arguments).T,
            "gives torch.float32 [256, 72] and not torch.float32 [72, 256], with uint8 [9216]",
        ),
        ("rows_to_half", lambda *_: 1 / 0, "ZeroDivisionError: division by zero, with float32 [13, 700]"),
        ("take_out", lambda sums, *_: sums.zero_(), differs("1", "0.002", "float32 [70, 75]")),
    ],
)
def test_what_is_wrong_is_described(op, wrong, text):
    assert fault(op, wrong) == text


def test_experts_that_run_one_by_one_on_a_card_are_no_fault():
    given = []
    assert fault("grouped_linear", None, can_group=lambda *arguments: given.append(arguments)) is None
    assert [type(argument).__name__ for argument in given[0]] == ["Tensor", "PackedBytes", "LoRA"]
    assert type(given[-1][0]).__name__ == "Half"


def of_case(op, number, wrong):
    """What is found in one case of an op."""
    arguments = next(islice(verify.cases(op), number, None))
    return verify.fault_in(arguments, SimpleNamespace(**{op: wrong}), CPU, op, [])


@pytest.mark.parametrize(("number", "limit"), [(0, 2e-3), (1, 2e-2), (5, 4e-3), (6, 4e-3)])
def test_the_limit_is_that_of_the_type(number, limit):
    """fp32, bf16, fp16, and fp32 beside the fp16 of a `Half`."""
    assert of_case("lora_project", number, one_element("lora_project", 1 + 0.7 * limit)) is None
    assert f"limit {limit:g}" in of_case("lora_project", number, one_element("lora_project", 1 + 1.4 * limit))


@pytest.mark.parametrize("is_after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "allocate",
    [
        lambda x: torch.empty(8),
        lambda x: x.new_empty(8),
        lambda x: torch.empty_like(x[:8]),
        lambda x: torch.zeros(8),
        lambda x: x.new_zeros(8),
        lambda x: torch.zeros_like(x[:8]),
        lambda x: scratch.scratch((8,), torch.float32, CPU, "shares"),
        lambda x: x,
    ],
    ids=["empty", "new_empty", "empty_like", "zeros", "new_zeros", "zeros_like", "scratch", "argument"],
)
def test_a_write_beside_a_tensor_is_found(allocate, is_after):
    def wrong(weight, dtype):
        result = RIGHT["dequantize"](weight, dtype)
        memory = allocate(weight.packed)
        place = memory.storage_offset() + (memory.numel() if is_after else -1)
        memory.as_strided((1,), (1,), place)[0] = 1
        return result

    scratch.scratch((8,), torch.float32, CPU, "shares")  # a buffer of before is not used
    assert fault("dequantize", wrong) == "writes past the end of a tensor, with uint8 [9216]"


def test_new_memory_is_nan_or_zero():
    filled = []
    fault("rows_to_half", lambda *_: filled.extend([torch.empty(2), torch.zeros(2)]))
    assert filled[0].isnan().all() and not filled[1].any()
