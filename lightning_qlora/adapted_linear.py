"""AdaptedLinear: a 4-bit weight with a LoRA adapter beside it, where the adapter starts and what it adds."""

import torch
from torch import Tensor, nn

from lightning_qlora import dora, starts
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.kernels import ops
from lightning_qlora.packed_linear import PackedLinear
from lightning_qlora.sharded import like, whole

ADAPTER = ("lora_A", "lora_B", "lora_magnitude_vector")  # the parameters that train


class AdaptedLinear(PackedLinear):
    """Holds beside a 4-bit weight what trains: A, B, and with DoRA the magnitudes of the rows.

    Attributes:
        lora_A: [r, in], fp32; computed in the compute type.
        lora_B: [out, r], fp32.
        lora_magnitude_vector: [out], fp32, with DoRA (see `dora`); None without.
        scaling: The factor s.
        config: The arguments of the conversion.
        full_name: The layer's name at conversion, from which its start is seeded.
        dense_weight: The weight [out, in] as it came, in host memory, while a "calibrated" start waits for inputs.
        input_rms: The input sizes [in] that a "calibrated" start was made from.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude_vector: nn.Parameter | None
    scaling: float
    config: QLoRAConfig
    full_name: str
    dense_weight: Tensor | None
    input_rms: Tensor | None

    def start(self, weight: Tensor, device: torch.device | None = None) -> None:
        """Quantize a dense weight and put the adapter where it starts from that weight."""
        rows = self._as_rows(weight.detach())
        begin = starts.start(rows.to(device or rows.device), self.config, self.full_name)
        self.set_packed_weight(begin.base)
        if self.config.start == "calibrated":
            self.dense_weight = rows.cpu()
        self.set_adapter(begin.lora_a, begin.lora_b)

    def set_adapter(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """Write values into the adapter; with DoRA the magnitudes become the rows' norms, which change nothing."""
        self.write("lora_A", lora_a)
        self.write("lora_B", lora_b)
        self.set_magnitudes()

    def set_magnitudes(self) -> None:
        """With DoRA: make the magnitudes the rows' norms; without it, have none."""
        if self.config.use_dora:
            self.write("lora_magnitude_vector", self.row_norm())
        else:
            self.register_parameter("lora_magnitude_vector", None)

    def write(self, name: str, value: Tensor) -> None:
        """Give a parameter of the adapter this value; it is made if there is none."""
        held = self._parameters.get(name)
        if held is None:
            self.register_parameter(name, nn.Parameter(value.to(self.packed.device)))
        elif held.shape != value.shape:
            held.data = value.to(self.packed.device)  # another rank; the same parameter, for what holds it
        else:
            with torch.no_grad():
                getattr(self, name).copy_(like(value, held))

    def quantize_weight(self, weight: Tensor, device: torch.device | None = None) -> None:
        """Quantize a dense weight, shaped as this layer's `weight` is, and hold it in place of the one before."""
        config = self.config
        dense = self._as_rows(weight.detach()).to(device or weight.device)
        self.set_packed_weight(ops.quantize(dense, config.quant_type, config.block_size, config.double_quant))

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [p for name in ADAPTER if (p := self._parameters.get(name)) is not None]

    @property
    def r(self) -> int:
        """Rank of the adapter."""
        return self.lora_A.shape[0]

    def delta(self) -> Tensor:
        """What the adapter adds to the weight: s B A, with DoRA g (W + s B A) - W; fp32, shaped as the dense weight."""
        product = self.scaling * (whole(self.lora_B).detach().float() @ whole(self.lora_A).detach().float())
        if self.lora_magnitude_vector is None:
            return product
        base = ops.dequantize(self.whole_bytes, torch.float32)
        return self.gain().detach().unsqueeze(1) * (base + product) - base

    def row_norm(self) -> Tensor:
        """||W + s B A|| of every row, [out], fp32."""
        weight = self.whole_bytes
        if self._base_squares is None or self._base_squares.device != weight.packed.device:
            self._base_squares = dora.row_squares(weight)
        return dora.row_norm(weight, self._base_squares, whole(self.lora_A), whole(self.lora_B), self.scaling)

    def gain(self) -> Tensor:
        """DoRA's factor g of every output: the magnitude over the row's norm, which counts as a constant; [out]."""
        assert self.lora_magnitude_vector is not None
        return whole(self.lora_magnitude_vector) / self.row_norm().clamp_min(torch.finfo(torch.float32).tiny)
