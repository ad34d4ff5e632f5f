import json

import pytest
import torch

from lightning_qlora import PackedWeight, quantize
from lightning_qlora.kernels import ops
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.lora_linear import lora_linear
from lightning_qlora.quantization.packed_weight import PackedBytes

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
@pytest.mark.parametrize("shape", [(96, 64), (5, 7)])
def test_bitsandbytes_loads_the_entries_and_they_come_back_as_they_were(double_quant, shape):
    value = quantize(torch.randn(shape), double_quant=double_quant)
    entries = value.bnb_state_dict("fc.weight")
    again = PackedWeight.from_bnb_state_dict(entries, "fc.weight")
    assert torch.equal(again.packed, value.packed)
    assert again.bnb_state_dict("fc.weight").keys() == entries.keys()
    assert (again.offset, again.shape, again.dtype) == (value.offset, value.shape, value.dtype)
    stats = {key.removeprefix("fc.weight."): tensor for key, tensor in entries.items() if key != "fc.weight"}
    theirs = bnb.nn.Params4bit.from_prequantized(entries["fc.weight"], stats, device="cpu")
    if shape[1] % 64 == 0:  # bitsandbytes decodes other widths wrongly on the CPU
        decoded = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
        assert torch.equal(decoded.view(shape), value.dequantize())


def test_bytes_count_codes_scales_and_second_level():
    value = quantize(torch.randn(256, 512))
    blocks = 256 * 512 // 64
    assert value.nbytes == 256 * 512 // 2 + blocks + 4 * (blocks // 256) + 4
    assert value.nbytes * 8 / (256 * 512) == pytest.approx(4.127, abs=1e-3)


def test_any_number_of_dimensions_keeps_its_shape():
    for shape in [(7,), (3, 4, 5), (2, 3, 64)]:
        weight = torch.randn(shape)
        assert quantize(weight).dequantize().shape == shape


def test_damaged_entries_are_refused_by_name():
    entries = quantize(torch.randn(8, 64)).bnb_state_dict("fc.weight")
    with pytest.raises(ValueError, match=r"fc\.weight: must hold 256 values.*got 255"):
        PackedWeight.from_bnb_state_dict({**entries, "fc.weight": entries["fc.weight"][:-1]}, "fc.weight")
    with pytest.raises(ValueError, match="not a bitsandbytes 4-bit weight"):
        PackedWeight.from_bnb_state_dict({"fc.weight": entries["fc.weight"]}, "fc.weight")


META = "weight.quant_state.bitsandbytes__nf4"


def with_meta(**changes):
    def change(entries):
        meta = {**json.loads(bytes(entries[META].tolist())), **changes}
        meta = {key: value for key, value in meta.items() if value is not None}
        entries[META] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)

    return change


def with_entry(key, function):
    def change(entries):
        value = function(entries.pop(f"weight.{key}"))
        if value is not None:
            entries[f"weight.{key}"] = value

    return change


DAMAGED = {
    "short nested_absmax": (with_entry("nested_absmax", lambda t: t[:-1]), "nested_absmax: must hold 3 values.*got 2"),
    "long nested_absmax": (with_entry("nested_absmax", lambda t: t.repeat(2)), "nested_absmax: must hold 3 values"),
    "type of nested_absmax": (with_entry("nested_absmax", lambda t: t.half()), "nested_absmax.*of torch.float16"),
    "NaN in nested_absmax": (with_entry("nested_absmax", lambda t: t * torch.nan), "nested_absmax: holds NaN or Inf"),
    "no nested_absmax": (with_entry("nested_absmax", lambda t: None), "nested_absmax: must hold 3 .*no such entry"),
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
    "shape of floats": (with_meta(shape=[8.0, 4128]), "shape=.*must be a list of positive integers"),
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


def test_ops_refuse_second_level_scales_of_another_number_or_type():
    good = quantize(torch.randn(8, 4128)).to_bytes()
    for nested in (good.nested[:-4], good.nested[:1], good.nested.repeat(2), good.nested.to(torch.int16)):
        with pytest.raises(ValueError, match="16 of second-level scales, all uint8"):
            ops.dequantize(good._replace(nested=nested), torch.float32)
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


def test_a_layer_with_one_output_or_one_input_comes_back():
    for shape in ((1, 64), (64, 1)):
        packed = quantize(torch.randn(shape))
        again = PackedWeight.from_bnb_state_dict(packed.bnb_state_dict())
        assert again.shape == shape and torch.equal(again.dequantize(), packed.dequantize())
