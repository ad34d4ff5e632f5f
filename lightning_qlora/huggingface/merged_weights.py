"""The weights of a base folder with an adapter added to them, one at a time."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_qlora.adapters.adapter import Adapter
from lightning_qlora.adapters.base_compatibility import BITS, required_base
from lightning_qlora.adapters.model_folder import ModelFolder
from lightning_qlora.config import Base, QLoRAConfig
from lightning_qlora.kernels.ops import quantize
from lightning_qlora.layers.fingerprint import fingerprint_of_weight
from lightning_qlora.layers.layer_state import CheckpointMismatchError
from lightning_qlora.quantization.packed_weight import PackedWeight


class MergedWeights:
    """Adds an adapter to weights, [out, in]; a weight whose layer has no adapter (name None) stays as it is.

    With base="quantized" a dense weight is quantized and decoded first, as in training.
    """

    def __init__(self, folder: ModelFolder, adapter: Adapter, base: Base) -> None:
        self.folder, self.adapter, self.base = folder, adapter, base

    def from_packed(self, state: dict[str, Tensor], name: str | None, key: str) -> tuple[Tensor, torch.dtype]:
        """The sum, and the type of the base, from bitsandbytes' entries."""
        try:
            weight = PackedWeight.from_bnb_state_dict(state, key)
        except ValueError as error:
            raise ValueError(f"{self.folder.file_of[key]}: {error}") from error
        if name is None:
            return weight.dequantize(), weight.dtype
        self._check_bits(name, weight)
        return self._sum(weight.dequantize(), name, key), weight.dtype

    def from_dense(self, dense: Tensor, name: str, key: str) -> tuple[Tensor, torch.dtype]:
        """The same from a dense weight, or from the weight that the adapter has with it."""
        if (own := self.adapter.bases.get(name)) is not None:
            return self._sum(own.dequantize(), name, key), own.dtype
        if (self.adapter.quantization or {}).get("base_changed"):
            self._refuse_base()
        rows = self.quantized(dense, key).dequantize() if self.base == "quantized" else dense
        return self._sum(rows, name, key), dense.dtype

    def quantization(self) -> dict[str, Any]:
        """How the base was quantized in training; the defaults if the adapter does not say."""
        known = self.adapter.quantization or {}
        return {name: known.get(name, getattr(QLoRAConfig, name)) for name in BITS}

    def quantized(self, rows: Tensor, key: str, **changed: Any) -> PackedWeight:
        """The 4-bit weight as in training; an error names the file."""
        try:
            return quantize(rows, **self.quantization() | changed)
        except ValueError as error:
            raise ValueError(f"{self.folder.where(key)}: {error}") from error

    def _sum(self, rows: Tensor, name: str, key: str) -> Tensor:
        """W + s B A in fp32, [out, in]; with DoRA times m / ||W + s B A||, where m are the magnitudes."""
        layer = self.adapter.layers[name]
        if tuple(rows.shape) != (layer.lora_B.shape[0], layer.lora_A.shape[1]):
            raise CheckpointMismatchError(
                f"{self.folder.where(key)} has {rows.shape[0]} outputs and {rows.shape[1]} inputs, the "
                f"adapter {self.adapter.source} is for {layer.lora_B.shape[0]} and {layer.lora_A.shape[1]}."
            )
        total = rows.float() + self.adapter.scaling(name) * (layer.lora_B.float() @ layer.lora_A.float())
        if layer.magnitude is not None:
            total *= (layer.magnitude.float() / total.norm(dim=1))[:, None]
        return total

    def _check_bits(self, name: str, weight: PackedWeight) -> None:
        """Refuse 4-bit weights on which the adapter was not trained."""
        if self.adapter.base_fingerprints.get(name) not in (None, fingerprint_of_weight(weight)):
            self._refuse_base()
        here = (weight.quant_type, weight.block_size, weight.nested_absmax is not None)
        need = required_base(self.adapter.quantization)
        if need is not None and here != tuple(self.quantization()[key] for key in BITS):
            there = ", ".join(f"{key}={value}" for key, value in zip(BITS, here, strict=True))
            raise ValueError(f"{self.adapter.source}: {self.folder.folder} has {name} in {there}. {need}")

    def _refuse_base(self) -> NoReturn:
        raise ValueError(
            f"{self.adapter.source}: the initialization of these adapters changed the 4-bit weights that they fit, so "
            f"they do not fit {self.folder.folder}. Merge the Lightning checkpoint, which holds these weights, or pass "
            "the folder that save_quantized wrote as base_model."
        )
