from itertools import cycle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

from lightning_qlora import quantize
from lightning_qlora.config import QUANT_TYPES
from lightning_qlora.kernels import ops, reference
from lightning_qlora.quantization import blockwise
from lightning_qlora.quantization.codebooks import codebook
from tests.conftest import every_pair

bnb = pytest.importorskip("bitsandbytes.functional")

BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TYPES = ["nf4", "fp4"]


def ties(x):
    """Values exactly on the midpoints between levels, in blocks whose scale is one."""
    values = codebook("nf4").bounds[x.view(torch.int32) % 15]
    values.view(-1)[::32] = 1.0
    return values


CONTENTS = {  # each made of normal values
    "normal": lambda x: x,
    "heavy tails": lambda x: x**5,
    "ties": ties,
    "half zeros": lambda x: x * (torch.arange(x.numel()) >= x.numel() // 2).view(x.shape),
    "zeros": torch.zeros_like,
    "equal": lambda x: torch.full_like(x, 0.3),
    "denormals": lambda x: x * 1e-40,
    "large": lambda x: x * 1e4,
}
SHAPES = [(64, 64), (37, 101), (33, 96), (1, 1), (1, 77), (77, 1), (130, 720), (513, 515)]


def assert_like_bitsandbytes(weight, block_size, quant_type, double_quant):
    """Codes, scales and decoded values, bit for bit, of the backend of a CPU and of plain torch.

    bitsandbytes gets a one-row view: its CPU decode is wrong for widths that are no multiple of the block.
    """
    packed, state = bnb.quantize_4bit(
        weight.reshape(1, -1), blocksize=block_size, quant_type=quant_type, compress_statistics=double_quant
    )
    with torch.compiler.set_stance("force_eager"):  # it compiles its decoding for each shape and type
        decoded = bnb.dequantize_4bit(packed, state).view(weight.shape)
    ours = quantize(weight, quant_type, block_size, double_quant)
    assert torch.equal(ours.packed, packed)
    assert torch.equal(ours.absmax, state.absmax)
    if double_quant:
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert ours.offset == state.offset.item()
    plain = reference.quantize(weight, quant_type, block_size, double_quant)
    for ours_part, part in zip(ours.to_bytes()[:3], plain[:3], strict=True):
        assert torch.equal(ours_part.view(-1), part)
    values = ours.dequantize()
    assert torch.equal(ops.dequantize(plain, weight.dtype), values)
    # bitsandbytes' AVX-512 conversion to bf16 turns subnormal values into zero.
    subnormal = (values.abs() < torch.finfo(values.dtype).tiny) & (values.dtype == torch.bfloat16)
    assert torch.equal(values.masked_fill(subnormal & (decoded == 0), 0), decoded)


def test_bytes_and_values_are_those_of_bitsandbytes():
    generator = torch.Generator().manual_seed(1)
    kinds = cycle(every_pair(DTYPES, TYPES, [True, False]))
    cases = every_pair(SHAPES, BLOCK_SIZES, [*CONTENTS.values()])
    for (shape, block_size, content), (dtype, *kind) in zip(cases, kinds, strict=False):
        weight = content(torch.randn(shape, generator=generator)).to(dtype)
        assert_like_bitsandbytes(weight, block_size, *kind)


@example((4, 4), 32, torch.bfloat16, ("fp4", False), 0, "denormals")
@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 90), st.integers(1, 300)),
    st.sampled_from(BLOCK_SIZES),
    st.sampled_from(DTYPES),
    st.tuples(st.sampled_from(TYPES), st.booleans()),
    st.integers(0, 2**30),
    st.sampled_from([*CONTENTS]),
)
def test_bytes_and_values_are_those_of_bitsandbytes_for_any_shape(shape, block_size, dtype, kind, seed, content):
    weight = CONTENTS[content](torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)
    assert_like_bitsandbytes(weight, block_size, *kind)


def test_bytes_of_a_large_matrix_are_those_of_bitsandbytes_on_one_thread(set_threads):
    """More than 32,768 scales: torch's mean, which bitsandbytes takes, depends on the thread count there."""
    set_threads(1)
    assert_like_bitsandbytes(torch.randn(1051, 1003), 32, "nf4", True)


@example(2**24 + 77, 0)  # longer groups in the sum
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200_000), st.integers(0, 2**30))
def test_the_mean_of_the_scales_does_not_depend_on_threads_and_is_torchs_on_one(numel, seed):
    values = torch.rand(numel, generator=torch.Generator().manual_seed(seed)) + 0.01
    threads = torch.get_num_threads()
    means = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            means.append(blockwise.mean_in_fixed_order(values).item())
        torch.set_num_threads(1)
        expected = values.mean().item()
    finally:
        torch.set_num_threads(threads)
    assert means[0] == means[1] == means[2]
    # To the bit on x86, where torch sums in this order; elsewhere its order is another one.
    assert means[0] == expected or (torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_decoding_is_bit_equal_to_a_decoder_written_element_by_element(quant_type):
    weight = torch.randn(13, 37)
    value = quantize(weight, quant_type, 32)
    levels = codebook(quant_type).levels
    nested = bnb.create_dynamic_map()
    expected = []
    for place in range(weight.numel()):
        byte = int(value.packed.view(-1)[place // 2])
        code = byte >> 4 if place % 2 == 0 else byte & 15
        block = place // 32
        scale = nested[int(value.absmax[block])] * value.nested_absmax[block // 256]
        scale = scale + torch.tensor(value.offset)
        expected.append(levels[code] * scale)
    assert torch.equal(value.dequantize(torch.float32).view(-1), torch.stack(expected))


def test_the_nearest_level_is_chosen():
    """Against brute force over all 16 levels, for the type bitsandbytes can't quantize."""
    weight = torch.randn(64, 64)
    value = quantize(weight, "int4", 64, double_quant=False)
    scales = weight.view(-1, 64).abs().amax(1, keepdim=True)
    distance = (weight.view(-1, 64, 1) / scales[..., None] - codebook("int4").levels).abs()
    chosen = value.dequantize().view(-1, 64)
    assert torch.allclose((weight.view(-1, 64) - chosen).abs() / scales, distance.amin(-1), atol=1e-6)


def test_wrong_arguments_are_named():
    weight = torch.randn(4, 64)
    for bad in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(ValueError, match="NaN or Inf"):
            quantize(weight.masked_fill(torch.arange(64) == 5, bad))
    for wrong, arguments, message in (
        (weight, {"block_size": 100}, "block_size=100"),
        (weight, {"quant_type": "nf8"}, "quant_type='nf8'"),
        (weight, {"double_quant": 1}, "double_quant=1: must be True or False"),
        (weight.double(), {}, "can be quantized, not torch.float64"),
        (torch.arange(64), {}, "can be quantized, not torch.int64"),
        ("a weight", {}, "can be quantized, not str"),
        (torch.empty(4, 4, device="meta"), {}, "meta"),
        (torch.empty(0, 4), {}, r"has shape \[0, 4\] and no element"),
        (torch.full((2, 64), 3e38), {}, r"If its memory has no values yet .* Else pass double_quant=False"),
    ):
        with pytest.raises(TypeError if "can be" in message or "True" in message else ValueError, match=message):
            quantize(wrong, **arguments)
