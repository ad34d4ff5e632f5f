"""Writes models in the 8- and 4-bit formats that are published, from the formats' specifications, and decodes them.

None of this uses transformers or compressed-tensors, whose operations the tests compare with it.

    mxfp4     OCP Microscaling Formats 1.0: 32 values of E2M1 with a scale of E8M0; the layout of gpt-oss
    fp8       DeepSeek-V3: E4M3 with an fp32 scale for 128 x 128 weights, the last blocks smaller
    ct-fp8    compressed-tensors `float-quantized`: E4M3 with a scale for each row
    ct-int4   compressed-tensors `pack-quantized`: 4-bit integers with a scale for a group of a row
    ct-uint4  the same with a zero point for each group, itself packed along the rows
    ct-int8   compressed-tensors `int-quantized`: integers with a scale for each row
    ct-nvfp4  compressed-tensors `nvfp4-pack-quantized`: 16 values of E2M1 with an E4M3 scale, and one for the tensor
"""

import json

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat([E2M1, -E2M1])  # the fourth bit is the sign
GROUP = 32  # of ct-int4


def nearest_e2m1(values):
    return (values[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)


def two_in_a_byte(codes):
    return codes[..., 0::2] | codes[..., 1::2] << 4


def mxfp4(weight):
    """[..., in] -> the tensors of the file, and the values that they stand for."""
    blocks = weight.float().unflatten(-1, (-1, 32))
    exponent = blocks.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - 2  # 2: the largest exponent of E2M1
    codes = nearest_e2m1(blocks / exponent.exp2()[..., None])
    dense = (E2M1[codes.long()] * exponent.exp2()[..., None]).flatten(-2)
    return {"_blocks": two_in_a_byte(codes), "_scales": (exponent + 127).to(torch.uint8)}, dense


def by_blocks(weight, size):
    """[rows, columns] -> [row blocks, size, column blocks, size], zeros behind the last row and column."""
    rows, columns = weight.shape
    whole = pad(weight.float(), (0, -columns % size, 0, -rows % size))
    return whole.unflatten(0, (-1, size)).unflatten(2, (-1, size))


def fp8(weight, size=128):
    blocks = by_blocks(weight, size)
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-9) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    rows, columns = weight.shape
    dense = (codes.float() * scale[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
    codes = codes.view(torch.uint8).flatten(2).flatten(0, 1)[:rows, :columns].contiguous().view(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale_inv": scale}, dense


def ct_fp8(weight):
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale": scale}, codes.float() * scale.float()


def ct_int8(weight):
    scale = (weight.float().abs().amax(1, keepdim=True) / 127.5).bfloat16()
    codes = (weight.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {".weight": codes, ".weight_scale": scale}, codes.float() * scale.float()


def eight_in_an_int32(values):
    """[rows, n] from -8 to 7 -> [rows, n / 8], the first in the lowest bits, each plus 8."""
    packed = ((values + 8).to(torch.int64).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def ct_int4(weight):
    groups = weight.float().unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(-1) / 7.5).bfloat16()
    values = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    packed = eight_in_an_int32(values.flatten(1))
    dense = (values * scale.float()[..., None]).flatten(1)
    return {".weight_packed": packed, ".weight_scale": scale, ".weight_shape": torch.tensor(weight.shape)}, dense


def ct_uint4(weight):
    groups = weight.float().unflatten(1, (-1, GROUP))
    low = groups.amin(-1).clamp(max=0)
    high = groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).bfloat16()
    zero = (-8 - low / scale.float()).round().clamp(-8, 7)
    values = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(-8, 7)
    parts = {
        ".weight_packed": eight_in_an_int32(values.flatten(1)),
        ".weight_scale": scale,
        ".weight_zero_point": eight_in_an_int32(zero.T).T,
        ".weight_shape": torch.tensor(weight.shape),
    }
    return parts, ((values - zero[..., None]) * scale.float()[..., None]).flatten(1)


def ct_nvfp4(weight):
    groups = weight.float().unflatten(1, (-1, 16))
    whole = 448 * 6 / groups.abs().amax().reshape(1)
    scale = (groups.abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
    step = scale.float()[..., None] / whole
    codes = nearest_e2m1(groups / step)
    packed = two_in_a_byte(codes.flatten(1))
    dense = (E2M1[codes.long()] * step).flatten(1)
    return {".weight_packed": packed, ".weight_scale": scale, ".weight_global_scale": whole}, dense


def _compressed(format, **weights):
    symmetric = {"symmetric": True, "dynamic": False, "observer": "minmax", **weights}
    group = {"targets": ["Linear"], "weights": symmetric, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "format": format}},
        "ignore": ["lm_head"],
    }


ENCODERS = {
    "mxfp4": mxfp4,
    "fp8": fp8,
    "ct-fp8": ct_fp8,
    "ct-int8": ct_int8,
    "ct-int4": ct_int4,
    "ct-uint4": ct_uint4,
    "ct-nvfp4": ct_nvfp4,
}
CONFIGS = {
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "ct-fp8": _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "ct-int8": _compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
    "ct-uint4": _compressed(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=False
    ),
    "ct-int4": _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP),
    "ct-nvfp4": _compressed(
        "nvfp4-pack-quantized",
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        scale_dtype="torch.float8_e4m3fn",
    ),
}


def encode(model, name, folder):
    """Write a model in a format; the dense tensors that the files stand for, by the keys of a folder in 16 bits.

    As published: linear layers and experts are quantized; embeddings, norms, routers and the output embedding are not.
    """
    model.bfloat16().save_pretrained(folder)
    path = folder / "model.safetensors"
    written = {}
    dense = load_file(path)
    for key, value in list(dense.items()):
        of_experts = "experts" in key and value.ndim == 3
        linear = key.endswith("_proj.weight") or (key.endswith("a_proj_with_mqa.weight"))
        if (name == "mxfp4" and of_experts) or (name != "mxfp4" and linear and value.ndim == 2):
            rows = value.mT if name == "mxfp4" else value  # gpt-oss has [experts, in, out] in 16 bits
            parts, made = ENCODERS[name](rows)
            written |= {key.removesuffix(".weight") + part: tensor.contiguous() for part, tensor in parts.items()}
            dense[key] = (made.mT if name == "mxfp4" else made).bfloat16().contiguous()
        else:
            written[key] = value
    save_file(written, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = CONFIGS[name]
    (folder / "config.json").write_text(json.dumps(config))
    return dense


def encode_gguf(model, kind, path):
    """Write a Llama with llama.cpp's own encoder; the weights that the file stands for, by parameter."""
    import gguf

    config = model.config
    kind = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(str(path), config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "0", "t0", *(f"x{i}" for i in range(config.vocab_size - 3))])
    writer.add_token_merges(["t 0"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    dense = {}
    for key, value in model.state_dict().items():
        value = value.float()
        target = names.get_name(key, try_suffixes=(".weight",))
        leaf = key.rpartition("self_attn.")[2]
        if leaf in heads:  # llama.cpp has their rows in another order
            value = value.unflatten(0, (heads[leaf], 2, -1)).transpose(1, 2).flatten(0, 2)
        if value.ndim == 2:
            packed = gguf.quants.quantize(value.numpy(), kind)
            writer.add_tensor(target, packed, raw_dtype=kind)
            value = torch.from_numpy(gguf.quants.dequantize(packed, kind))
        else:
            writer.add_tensor(target, value.numpy())
        if leaf in heads:
            value = value.unflatten(0, (heads[leaf], -1, 2)).transpose(1, 2).flatten(0, 2)
        dense[key] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense
