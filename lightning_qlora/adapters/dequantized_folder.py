"""Folders in a published 8- or 4-bit format, read as the dense folder that they stand for.

transformers' quantizer of the format has the operation that dequantizes the tensors of a weight:

    layers.0.up_proj.weight, .weight_scale_inv        layers.0.up_proj.weight
    layers.0.experts.down_proj_blocks, _scales        layers.0.experts.down_proj

What that operation does wrong is corrected here (transformers 5.24, integrations/finegrained_fp8.py and
compressed_tensors.py):

    blocks of FP8        it divides a weight into as many equal blocks as there are scales. The last blocks of a weight
                         of 576 rows have 64 (DeepSeek-V3, inference/kernel.py, weight_dequant), so it refuses that
                         weight, and decodes one of 192 rows with blocks of 96.
    compressed experts   it leaves out the scale of the tensor (NVFP4) and the zero point (asymmetric INT4), and knows
                         no INT8. As single layers, which they are in the files, it reads them correctly.
"""

from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from math import ceil, gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.files.safetensors_folder import TensorEntry, WeightFolder, read_config

CANNOT_DEQUANTIZE = (
    "transformers can dequantize MXFP4, FP8 and GGUF while it loads from 5.22 on, compressed-tensors from 5.23 on, and "
    "no GPTQ, AWQ or 8 bits of bitsandbytes: install that version, or use a folder of the model in 16 bits."
)
AGAIN = "Copy or download the folder again."
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # in a safetensors header


def can_compose() -> bool:
    """Whether transformers has dequantizing operations that can stand in front of others: from 5.22 on."""
    if find_spec("transformers") is None or find_spec("transformers.core_model_loading") is None:
        return False
    return hasattr(import_module("transformers.quantizers.base").HfQuantizer, "get_load_operations")


def takes_dequantize(stored: dict[str, Any]) -> bool:
    """Whether transformers can dequantize the format of a `quantization_config` while it loads."""
    kinds: Any = import_module("transformers.quantizers.auto").AUTO_QUANTIZATION_CONFIG_MAPPING
    kind = kinds.get(stored.get("quant_method"))
    return can_compose() and kind is not None and "dequantize" in signature(kind).parameters


class Dequantize:
    """The operation of a transformers quantizer, with what it does wrong corrected; a ConversionOps."""

    def __init__(self, operation: Any) -> None:
        self.operation, self.hf_quantizer = operation, operation.hf_quantizer

    def convert(self, input_dict: dict[str, Any], **arguments: Any) -> dict[str, Any]:
        """Pattern, or word for a tensor of one layer, -> tensor or list of tensors; to dense weights."""
        for key, tensors in input_dict.items():
            stored = str(_list(tensors)[0].dtype)
            if stored.startswith("torch.float8") and key.endswith("weight") and f"{key}_" not in "\n".join(input_dict):
                raise ValueError(f"is {stored.removeprefix('torch.')} without a scale. {AGAIN}")
        of_one_layer = not any("." in key for key in input_dict)
        if hasattr(self.hf_quantizer, "compressor") and not of_one_layer:
            return self._each_alone(input_dict, arguments)
        block = getattr(self.hf_quantizer.quantization_config, "weight_block_size", None)
        for key, scales in input_dict.items() if block else ():
            name = key.removesuffix("_scale_inv")
            if name != key and name in input_dict:
                pairs = zip(_list(input_dict[name]), _list(scales), strict=True)
                input_dict = {**input_dict, key: [_equal_blocks(weight, scale, block) for weight, scale in pairs]}
        return self.operation.convert(input_dict, **arguments)  # type: ignore[no-any-return]

    def of_experts(self) -> "Dequantize":
        """The operation for a single expert: compressed-tensors may have another scheme for them."""
        if not hasattr(self.hf_quantizer, "compressor"):
            return self
        upstream = import_module("transformers.integrations.compressed_tensors")
        scheme = upstream.get_experts_scheme(self.hf_quantizer.compressor.quantization_config)
        return Dequantize(type(self.operation)(self.hf_quantizer, scheme))

    def _each_alone(self, input_dict: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
        operation, made = self.of_experts(), dict[str, Any]()
        for name in dict.fromkeys(key.rpartition(".")[0] for key in input_dict):
            stored = {key.removeprefix(f"{name}."): _list(v) for key, v in input_dict.items() if key.startswith(name)}
            experts = (dict(zip(stored, tensors, strict=True)) for tensors in zip(*stored.values(), strict=True))
            made[f"{name}.weight"] = [next(iter(operation.convert(e, **arguments).values())) for e in experts]
        return made


def _equal_blocks(weight: Tensor, scales: Tensor, block: Any) -> Tensor:
    """Scales of blocks that divide the weight: of the greatest size that also divides a block of the format."""
    sizes = weight.shape[-2:]
    if scales.shape[-2:] != tuple(ceil(size / whole) for size, whole in zip(sizes, block, strict=False)):
        return scales
    for dim, size, whole in zip((-2, -1), sizes, block, strict=True):
        if (part := gcd(size, whole)) != whole:
            scales = scales.repeat_interleave(whole // part, dim).narrow(dim, 0, size // part)
    return scales


def _list(value: Any) -> list[Tensor]:
    return value if isinstance(value, list) else [value]


class DequantizedFolder(WeightFolder):
    """A folder in a published format, with the entries of the dense folder that it stands for; raises as that.

    Attributes:
        method: transformers' name of the format.
        dtype: Type of the dense weights, that of the model.
        parameter_of: Key -> parameter of the model that it becomes, and whether with others (experts).
    """

    def __init__(self, folder: Path, model: nn.Module, quantizer: Any) -> None:
        self.folder, self.stored, self.model = folder, WeightFolder(folder), model
        method = quantizer.quantization_config.quant_method
        self.method = str(getattr(method, "value", method))
        self.dtype = next(model.parameters()).dtype
        self.parameter_of = dict[str, tuple[str, bool]]()
        loading = import_module("transformers.core_model_loading")
        quantizer.preprocess_model(model)
        conversions = quantizer.update_weight_conversions([], model)
        renamings = [entry for entry in conversions if isinstance(entry, loading.WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, loading.WeightConverter)]
        self.operation = Dequantize(converters[0].operations[0])
        self.parts = dict[str, dict[str, str]]()  # key -> word of the format -> key in the files; of dense ones {}
        for key in self.stored.entries:
            dense, word = loading.rename_source_key(key, renamings, converters)
            self.parts.setdefault(dense, {})[word] = key
        for dense, parts in list(self.parts.items()):
            if len(parts) == 1:
                (key,) = self.parts.pop(dense).values()
                if key.endswith(".weight") and (kind := self.stored.entries[key].dtype).startswith("F8"):
                    raise ValueError(f"{self.stored.file_of[key]}: {key!r} is {kind} without a scale. {AGAIN}")
                self.parts[key] = {}
        self.file_of = {key: self.stored.file_of[min(parts.values(), default=key)] for key, parts in self.parts.items()}
        self.entries = {key: self._entry(key, parts) for key, parts in self.parts.items()}

    def tensors(self, keys: list[str]) -> dict[str, Tensor]:
        """Read weights to the CPU, dequantized one after another."""
        return {key: self._dense(key) if self.parts[key] else self.stored.tensors([key])[key] for key in keys}

    def _dense(self, key: str) -> Tensor:
        parts = self.parts[key]
        stored = self.stored.tensors(list(parts.values()))
        name, of_experts = self.parameter_of.get(key, (next(self.model.named_parameters())[0], False))
        operation = self.operation.of_experts() if of_experts else self.operation
        made = operation.convert(
            {word: stored[part] for word, part in parts.items()}, model=self.model, full_layer_name=name,
            source_patterns=list(parts), target_patterns=[key],
        )  # fmt: skip
        return next(iter(made.values())).detach()  # type: ignore[no-any-return]

    def _entry(self, key: str, parts: dict[str, str]) -> TensorEntry:
        """Type and shape of the dense weight, without reading it."""
        entry = {word.rpartition("_")[2]: self.stored.entries[part] for word, part in parts.items()}
        if not parts:
            return self.stored.entries[key]
        if "blocks" in entry:  # MXFP4 of gpt-oss: [experts, out, blocks, 16 bytes]
            experts, rows, blocks, size = entry["blocks"].shape
            shape: tuple[int, ...] = (experts, blocks * size * 2, rows)
        elif "shape" in entry:
            shape = tuple(self.stored.tensors([parts["weight_shape"]])[parts["weight_shape"]].tolist())
        elif "packed" in entry:  # two values in a byte
            *rows_of, columns = entry["packed"].shape
            shape = (*rows_of, columns * 2)
        else:
            shape = entry["weight"].shape
        return TensorEntry(NAMES[self.dtype], shape)


def open_dense(folder: Path, model: nn.Module) -> WeightFolder:
    """A folder of safetensors as it is, or if it is in a published format, as the dense one that it stands for.

    `model` is its model, on the meta device. Raises as `WeightFolder`; also ValueError if transformers can't dequantize
    the format.
    """
    stored = published_format(read_config(folder))
    if stored is None:
        return WeightFolder(folder)
    method = stored.get("quant_method")
    if not takes_dequantize(stored):
        raise ValueError(f"{folder}: is in {method!r}. {CANNOT_DEQUANTIZE}")
    try:
        auto = import_module("transformers.quantizers.auto").AutoHfQuantizer
        quantizer = auto.from_config({**stored, "dequantize": True}, pre_quantized=True)
        quantizer.validate_environment()
    except ImportError as error:
        raise ValueError(f"{folder}: is in {method!r}, and a package for it is missing. {error}") from error
    return DequantizedFolder(folder, model, quantizer)


def published_format(config: dict[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` of a config.json in another format than bitsandbytes' 4 bits; None if there is none."""
    text = config.get("text_config")
    stored = config.get("quantization_config") or (text or {}).get("quantization_config")
    return stored if isinstance(stored, dict) and not stored.get("load_in_4bit") else None
