"""Tensor parallelism: each rank of a group holds a part of a 4-bit weight, with the bytes of one device.

    columns    y_i = x W_i^T + bias_i + s (drop(x) A^T) B_i^T             W and B split by outputs, A whole
    rows       y = sum_i x_i W_i^T + s (drop(x)_i A_i^T) B^T + bias       W and A split by inputs, B whole

The names are those of `ColwiseParallel` and `RowwiseParallel`, which count in W^T (Shoeybi et al. 2019, Megatron-LM,
section 3). A plan of torch or transformers brings x to the layout that a layer needs, and sums y. Here the gradients of
x and A (columns) or B (rows) are summed over the ranks.

The scales of a rank's weight are computed in fp32 for each call: the second-level scales stay whole on every rank,
because each belongs to 256 blocks, which are no whole rows. Each rank draws its own dropout mask for its columns.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from lightning_qlora.checks import KEEP_DENSE
from lightning_qlora.kernels import ops
from lightning_qlora.layers.lora_layer import ADAPTER, LoRALayer
from lightning_qlora.layers.packed_layer import BASE, to_parameters
from lightning_qlora.quantization.packed_weight import PackedBytes
from lightning_qlora.tensors.dtensor import local

SPLIT_EXPERTS = (
    "experts in 4 bits can't be split over ranks by tensor or expert parallelism. Leave them out of the plan, use "
    f"fully_shard, or {KEEP_DENSE}."
)
WHOLE = Replicate()
BY_OUTPUTS = dict.fromkeys(("packed", "absmax", *ADAPTER[1:], "bias"), Shard(0))
BY_INPUTS = dict.fromkeys(("packed", "absmax", "lora_A"), Shard(1))


class Split(NamedTuple):
    """How the weight of a layer is split over the ranks of a mesh with one dimension."""

    mesh: DeviceMesh
    by_inputs: bool
    shape: tuple[int, int]  # of the part of one rank, [out, in]

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

    def block_numbers(self, block_size: int, device: torch.device) -> Tensor:
        out = self.shape[0]
        blocks = self.shape[1] // block_size
        if self.by_inputs:
            per_row = blocks * self.mesh.size()
            first = self.rank * blocks
        else:
            per_row = blocks
            first = self.rank * out * blocks
        rows = torch.arange(out, device=device)[:, None] * per_row
        return (first + rows + torch.arange(blocks, device=device)).view(-1)

    @torch.no_grad()
    def weight_of_rank(self, layer: LoRALayer) -> PackedBytes:
        """The weight of this rank with fp32 scales; it decodes to the bits of its part of the whole."""
        packed, absmax, nested = (local(layer._parameters[name]) for name in BASE)
        weight = PackedBytes(packed, absmax, nested, self.shape, layer.quant_type, layer.block_size)
        if nested.numel():
            absmax = ops.scales(weight, self.block_numbers(layer.block_size, absmax.device)).view(torch.uint8)
            weight = weight._replace(absmax=absmax, nested=absmax[:0])
        return weight

    def linear(self, layer: LoRALayer, x: Tensor, bias: Tensor | None) -> Tensor:
        """`QLoRALinear.linear` of this rank: x and the result are DTensors, or local tensors."""
        parameters = layer._parameters
        if isinstance(parameters["lora_A"], DTensor) and not isinstance(x, DTensor):
            raise RuntimeError(
                f"{layer.full_name}: is split over ranks, and its weight was multiplied by a plain tensor. Call the "
                "layer itself, whose plan distributes the input, or leave the layer out of the plan."
            )
        bias = local(bias)
        if self.by_inputs:
            if self.rank:
                bias = None  # one rank adds it
            rank = self.rank
            parts = BY_INPUTS
            of_gradient = None
        else:
            rank = 0
            parts = BY_OUTPUTS
            of_gradient = [Partial()]
        values = [(name, parameters[name]) for name in layer.parameter_names]
        adapter = [local(value) if name in parts else _summed_gradient(value) for name, value in values]
        matrix = layer.matrix_class(self.weight_of_rank(layer), *adapter)
        if not isinstance(x, DTensor):
            return layer.compute(x, matrix, bias, rank)
        y: Tensor = layer.compute(x.to_local(grad_placements=of_gradient), matrix, bias, rank)
        placement: Placement = Shard(y.dim() - 1)
        if self.by_inputs:
            placement = Partial()
        return DTensor.from_local(y, self.mesh, [placement])


def unknown_style(style: str) -> str:
    return (
        f"a 4-bit layer is split by ColwiseParallel or RowwiseParallel (colwise, rowwise), not by {style}. Remove it "
        f"from the plan, or {KEEP_DENSE}."
    )


def split(layer: LoRALayer, mesh: DeviceMesh, by_inputs: bool) -> Split:
    """Let each rank of a mesh keep its part of a layer that every rank has, by inputs or by outputs.

    Raises:
        ValueError: If a block would belong to two ranks, or the adapter can't be split.
    """
    out, inputs = layer._shape
    ranks = mesh.size()
    size = layer.block_size
    if by_inputs and layer.matrix_class.reads_weight:
        raise ValueError(
            f"{layer.full_name}: DoRA can't be split by inputs (RowwiseParallel), because it needs the norm of whole "
            "rows at every step. Set use_dora=False, or leave the layer out of the plan."
        )
    if layer.input_observer is not None:
        layer.input_observer.refuse_split()
    if by_inputs:
        side = "inputs"
        step = size * ranks
        shape = (out, inputs // ranks)
        placements = BY_INPUTS
    else:
        side = "outputs"
        step = size
        shape = (out // ranks, inputs)
        placements = BY_OUTPUTS
    sizes = ""
    if inputs % step:
        sizes = f"{inputs} inputs, which must be a multiple of {step}"
    elif not by_inputs and out % ranks:
        sizes = f"{out} outputs"
    if sizes:
        raise ValueError(
            f"{layer.full_name}: can't be split over {ranks} ranks by {side} in blocks of "
            f"{size}: it has {sizes}. Choose another number of ranks or block_size, leave the layer out of the plan, "
            f"or {KEEP_DENSE}."
        )
    to_parameters(layer)
    for name, parameter in layer._parameters.items():
        if parameter is None or isinstance(parameter, DTensor):
            continue
        placement: Placement = placements.get(name, WHOLE)
        # Without communication; `clone`: the memory of the whole is freed.
        part = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=None).to_local().clone()
        whole = DTensor.from_local(part, mesh, [placement])
        own = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        nn.Module.register_parameter(layer, name, own)  # the layer itself refuses other styles
    return Split(mesh, by_inputs, shape)


def _summed_gradient(parameter: Any) -> Any:
    """A parameter that every rank has whole; its gradient is summed over the ranks."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.redistribute(placements=[WHOLE]).to_local(grad_placements=[Partial()])
