import pytest
import torch

from lightning_qlora import PackedWeight, quantize
from lightning_qlora.kernels import eager, ops
from lightning_qlora.quantize.packed import PackedBytes

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
    with pytest.raises(ValueError, match=r"fc\.weight: a weight of shape \[8, 64\].*got 255"):
        PackedWeight.from_bnb_state_dict({**entries, "fc.weight": entries["fc.weight"][:-1]}, "fc.weight")
    with pytest.raises(ValueError, match="not a bitsandbytes 4-bit weight"):
        PackedWeight.from_bnb_state_dict({"fc.weight": entries["fc.weight"]}, "fc.weight")


@pytest.mark.parametrize("double_quant", [True, False])
def test_bytes_at_any_place_of_a_larger_tensor_are_read(double_quant):
    value = quantize(torch.randn(96, 64), double_quant=double_quant)
    held, x = value.to_bytes(), torch.randn(3, 64)
    lora_a, lora_b = torch.randn(4, 64), torch.randn(96, 4)
    expected = ops.lora_linear(x, held, None, lora_a, lora_b, 1.0)
    for offset in range(1, 5):
        moved = [torch.cat([part.new_zeros(offset), part.reshape(-1)])[offset:] for part in held[:3]]
        askew = PackedBytes(*moved, *held[3:])
        assert torch.equal(ops.lora_linear(x, askew, None, lora_a, lora_b, 1.0), expected)
        assert torch.equal(PackedWeight.from_bytes(askew, torch.float32).dequantize(), value.dequantize())
        assert torch.equal(eager.dequantize_into(torch.empty(96 * 64), askew), value.dequantize().view(-1))
