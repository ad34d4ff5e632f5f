"""The weights of a base folder with an adapter added to them, one at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.adapters.adapter import Adapter
from lightning_qlora.adapters.base_compatibility import BITS, check_bits, is_base_changed, refuse_base
from lightning_qlora.adapters.folder_layers import AdaptedTensor
from lightning_qlora.adapters.model_folder import ModelFolder
from lightning_qlora.config import Base, QLoRAConfig
from lightning_qlora.kernels.ops import quantize
from lightning_qlora.layers.fingerprint import fingerprint_of_weight
from lightning_qlora.layers.layer_state import CheckpointMismatchError
from lightning_qlora.layers.names import named
from lightning_qlora.quantization.packed_weight import PackedWeight


class MergedWeights:
    """Adds an adapter to the weights of a folder.

    With base="quantized" a dense weight is quantized and decoded first, as in training.
    """

    def __init__(self, folder: ModelFolder, adapter: Adapter, base: Base) -> None:
        self.folder, self.adapter, self.base = folder, adapter, base

    def of_tensor(self, key: str, adapted: AdaptedTensor | None) -> Iterator[tuple[str, Tensor, torch.dtype]]:
        """Each layer in a tensor of the folder, its sum [out, in] in fp32, and the type of its base.

        A 4-bit weight without an adapter (None) is only decoded.
        """
        if self.folder.is_packed(key):
            with named(self.folder.file_of[key]):
                weight = PackedWeight.from_bnb_state_dict(self.folder.entries_of(key), key)
            name, rows = key.removesuffix(".weight"), weight.dequantize()
            if adapted is not None:
                (name,) = adapted.layers
                if self.adapter.base_fingerprints.get(name) not in (None, fingerprint_of_weight(weight)):
                    refuse_base(self.adapter, name)
                bits = (weight.quant_type, weight.block_size, weight.nested_absmax is not None)
                check_bits(self.adapter, name, dict(zip(BITS, bits, strict=True)))
                rows = self._sum(rows, name, key)
            yield name, rows, weight.dtype
        elif adapted is not None:
            for name, dense in adapted.split(self.folder.tensors([key])[key]).items():
                yield name, *self._from_dense(dense.contiguous(), name, key)

    def _from_dense(self, dense: Tensor, name: str, key: str) -> tuple[Tensor, torch.dtype]:
        if (own := self.adapter.bases.get(name)) is not None:
            return self._sum(own.dequantize(), name, key), own.dtype
        if is_base_changed(self.adapter):
            refuse_base(self.adapter, name)
        rows = self.quantized(dense, key).dequantize() if self.base == "quantized" else dense
        return self._sum(rows, name, key), dense.dtype

    def quantization(self) -> dict[str, Any]:
        """How the base was quantized in training; the defaults if the adapter does not say."""
        known = self.adapter.quantization or {}
        return {name: known.get(name, getattr(QLoRAConfig, name)) for name in BITS}

    def quantized(self, rows: Tensor, key: str, **changed: Any) -> PackedWeight:
        """The 4-bit weight as in training; an error names the file."""
        with named(self.folder.where(key)):
            return quantize(rows, **self.quantization() | changed)

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
