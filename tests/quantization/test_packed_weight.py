import json
import re
from dataclasses import fields

import pytest
import torch

from lightning_qlora import PackedWeight, quantize
from lightning_qlora.kernels import ops
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.lora_linear import lora_linear
from lightning_qlora.quantization.codebooks import codebook
from lightning_qlora.quantization.packed_weight import PackedBytes, check_bytes

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_entries_are_the_keys_and_bytes_that_linear4bit_writes(quant_type, double_quant, dtype):
    weight = torch.randn(96, 64).to(dtype)
    layer = bnb.nn.Linear4bit(64, 96, bias=False, quant_type=quant_type, compress_statistics=double_quant)
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type=quant_type, compress_statistics=double_quant
    )
    expected = layer.to("cpu").state_dict()
    ours = quantize(weight, quant_type, 64, double_quant).bnb_state_dict()
    assert set(ours) == set(expected)
    for key, value in expected.items():
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(96, 64), (5, 7), (1, 64), (64, 1), (7,), (3, 4, 5)])
def test_bitsandbytes_loads_the_entries_and_they_come_back_as_they_were(double_quant, shape):
    value = quantize(torch.randn(shape), double_quant=double_quant)
    entries = value.bnb_state_dict("fc.weight")
    packed = entries["fc.weight"]
    for variant in (
        {},
        {"fc.weight": packed.view(-1).view(torch.float16)},  # bitsandbytes' option quant_storage
        {"fc.weight.quant_map": entries["fc.weight.quant_map"].double() + 5e-7},  # of another math library
    ):
        again = PackedWeight.from_bnb_state_dict({**entries, **variant}, "fc.weight")
        assert_equal(again, value)
        assert torch.equal(again.dequantize(), value.dequantize()) and again.dequantize().shape == shape
    del entries["fc.weight.quant_map"]
    assert_equal(PackedWeight.from_bnb_state_dict(entries, "fc.weight"), value)
    stats = {key.removeprefix("fc.weight."): tensor for key, tensor in entries.items() if key != "fc.weight"}
    stats["quant_map"] = codebook("nf4").levels
    theirs = bnb.nn.Params4bit.from_prequantized(packed, stats, device="cpu")
    if shape[-1] % 64 == 0:  # bitsandbytes decodes other widths wrongly on the CPU
        decoded = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
        assert torch.equal(decoded.view(shape), value.dequantize())


def assert_equal(one, other):
    for field in fields(PackedWeight):
        ours, theirs = (getattr(value, field.name) for value in (one, other))
        assert torch.equal(ours, theirs) if torch.is_tensor(ours) else ours == theirs, field.name


def test_bytes_count_codes_scales_and_second_level():
    weight = torch.randn(256, 512)
    codes, blocks = 256 * 512 // 2, 256 * 512 // 64
    for double_quant, count in ((True, codes + blocks + 4 * (blocks // 256) + 4), (False, codes + 4 * blocks)):
        value = quantize(weight, double_quant=double_quant)
        assert value.nbytes == count
        text = f"nf4, block_size=64, double_quant={double_quant}, torch.float32, {count:,} bytes"
        assert repr(value) == f"PackedWeight([256, 512], {text}, cpu)"
        moved = value.to(torch.device("meta"))
        assert repr(moved) == f"PackedWeight([256, 512], {text}, meta)"
        tensors = value.to_bytes().to(torch.device("meta"))[:3]
        parts = [*tensors, moved.absmax, *([moved.nested_absmax] if double_quant else [])]
        assert {tensor.device.type for tensor in parts} == {"meta"}
        assert sum(tensor.nbytes for tensor in tensors) == count


META = "weight.quant_state.bitsandbytes__nf4"


def with_meta(**changes):
    def change(entries):
        meta = {**json.loads(bytes(entries[META].tolist())), **changes}
        meta = {key: value for key, value in meta.items() if value is not None}
        entries[META] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)

    return change


def with_entry(key, function):
    def change(entries):
        name = f"weight.{key}" if key else "weight"
        value = function(entries.pop(name))
        if value is not None:
            entries[name] = value

    return change


DAMAGED = {
    "short codes": (with_entry(None, lambda t: t[:-1]), r"weight: must hold 16512 values of torch\.uint8; got 16511"),
    "no codes": (with_entry(None, lambda t: None), r"expected 'weight', 'weight\.absmax' and one 'weight\.quant_state"),
    "no absmax": (with_entry("absmax", lambda t: None), r"4-bit weight.*, got \['weight', 'weight\.nested_absmax', "),
    "short absmax": (with_entry("absmax", lambda t: t[:-1]), r"absmax: must hold 516 values of torch\.uint8; got 515"),
    "short nested_absmax": (with_entry("nested_absmax", lambda t: t[:-1]), "nested_absmax: must hold 3 values.*got 2"),
    "long nested_absmax": (with_entry("nested_absmax", lambda t: t.repeat(2)), "nested_absmax: must hold 3 values"),
    "type of nested_absmax": (with_entry("nested_absmax", lambda t: t.half()), "nested_absmax.*of torch.float16"),
    "NaN in nested_absmax": (with_entry("nested_absmax", lambda t: t * torch.nan), "nested_absmax: holds NaN or Inf"),
    "no nested_absmax": (
        with_entry("nested_absmax", lambda t: None),
        r"nested_absmax: must hold 3 .*got no such entry\.",
    ),
    "type of absmax": (with_entry("absmax", lambda t: t.float()), r"absmax: must hold .* torch\.uint8"),
    "quant_map": (with_entry("quant_map", lambda t: t.flip(0)), "quant_map: is not the table"),
    "size of quant_map": (with_entry("quant_map", lambda t: t[:4]), "quant_map: is not the table"),
    "nested_quant_map": (with_entry("nested_quant_map", lambda t: t * 2), "nested_quant_map: is not the table"),
    "offset NaN": (with_meta(nested_offset=float("nan")), "nested_offset=nan"),
    "offset Inf": (with_meta(nested_offset=float("inf")), "nested_offset=inf"),
    "offset text": (with_meta(nested_offset="0"), "nested_offset='0'"),
    "no offset": (with_meta(nested_offset=None), r"absmax: must hold .*float32"),
    "nested_blocksize": (with_meta(nested_blocksize=128), "nested_blocksize=128: must be one of 256"),
    "nested_dtype": (with_meta(nested_dtype="float16"), "nested_dtype='float16'"),
    "quant_type": (with_meta(quant_type="fp4"), "quant_type='fp4', which is not the one in its name"),
    "blocksize": (with_meta(blocksize=63), "blocksize=63"),
    "dtype": (with_meta(dtype="load"), "dtype='load'"),
    "shape": (with_meta(shape=[-8, -4128]), r"shape=\[-8, -4128\]: must be"),
    "shape with 0": (with_meta(shape=[8, 0]), r"shape=\[8, 0\]: must be a list of positive integers"),
    "no list": (with_meta(shape=8), "shape=8: must be a list of positive integers"),
    "empty shape": (with_meta(shape=[]), r"shape=\[\]: must be a list of positive integers"),
    "shape of floats": (with_meta(shape=[8.0, 4128]), r"shape=\[8\.0, 4128\]: must be a list of positive integers"),
    "no shape": (with_meta(shape=None), "must be the bytes of a JSON object.*'shape'"),
    "JSON": (with_entry(META.removeprefix("weight."), lambda t: t[:-1]), "must be the bytes of a JSON object"),
    "no bytes": (with_entry(META.removeprefix("weight."), lambda t: t.int() + 256), "must be the bytes of a JSON"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_entries_that_contradict_each_other_are_refused(change, message):
    entries = quantize(torch.randn(8, 4128)).bnb_state_dict()  # 516 scales, 3 second-level scales
    change(entries)
    with pytest.raises((ValueError, TypeError), match=message) as error:
        PackedWeight.from_bnb_state_dict(entries)
    assert "\n" not in str(error.value)


def test_scales_that_are_not_finite_are_refused():
    entries = quantize(torch.randn(8, 64), double_quant=False).bnb_state_dict()
    entries["weight.absmax"][3] = torch.inf
    with pytest.raises(ValueError, match=r"weight\.absmax: holds NaN or Inf"):
        PackedWeight.from_bnb_state_dict(entries)


def test_ops_refuse_bytes_of_another_number_or_type_and_on_two_devices():
    good = quantize(torch.randn(8, 4128)).to_bytes()
    expected = "A 4-bit weight [8, 4128] in blocks of 64 has 16512 bytes of codes, 516 of scales and 16 of second-level"
    for nested in (good.nested[:-4], good.nested[:1], good.nested.repeat(2), good.nested.to(torch.int16)):
        sizes = f"16512 torch.uint8, 516 torch.uint8, {nested.numel()} {nested.dtype}"
        with pytest.raises(ValueError, match=re.escape(f"{expected} scales, all uint8; got {sizes}.")):
            ops.dequantize(good._replace(nested=nested), torch.float32)
    for name, devices in (
        ("packed", "codes on meta, its scales on cpu and its second-level scales on cpu"),
        ("absmax", "codes on cpu, its scales on meta and its second-level scales on cpu"),
        ("nested", "codes on cpu, its scales on cpu and its second-level scales on meta"),
    ):
        with pytest.raises(ValueError, match=f"A 4-bit weight has its {devices}. Move all to one device"):
            check_bytes(good._replace(**{name: getattr(good, name).to("meta")}))
    with pytest.raises(ValueError, match="block_size=0"):
        ops.dequantize(good._replace(block_size=0), torch.float32)


@pytest.mark.parametrize("double_quant", [True, False])
def test_bytes_at_any_place_of_a_larger_tensor_are_read(double_quant):
    value = quantize(torch.randn(96, 64), double_quant=double_quant)
    packed = value.to_bytes()
    x = torch.randn(3, 64)
    lora_a = torch.randn(4, 64)
    lora_b = torch.randn(96, 4)
    expected = lora_linear(x, packed, None, LoRA(lora_a, lora_b))
    for offset in range(1, 5):
        moved = [torch.cat([part.new_zeros(offset), part.reshape(-1)])[offset:] for part in packed[:3]]
        misaligned = PackedBytes(*moved, *packed[3:])
        assert torch.equal(lora_linear(x, misaligned, None, LoRA(lora_a, lora_b)), expected)
        assert torch.equal(PackedWeight.from_bytes(misaligned, torch.float32).dequantize(), value.dequantize())
        assert torch.equal(misaligned.dequantize_into(torch.empty(96 * 64)), value.dequantize().view(-1))
