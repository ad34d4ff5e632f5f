"""Output embeddings that return deferred logits in training: which layers they are, and their forward pass."""

from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_qlora.dtypes.full_precision import InType
from lightning_qlora.dtypes.instance_method import OfTraining, add, has_other_forward, instance_method
from lightning_qlora.layers.derived import original_class
from lightning_qlora.layers.kinds import is_packed
from lightning_qlora.layers.names import without_numbers
from lightning_qlora.layers.with_adapter import DISABLED
from lightning_qlora.logits.deferred_logits import DeferredLogits, Source
from lightning_qlora.survey.parts import OUTPUT_EMBEDDINGS, Parts, is_wide
from lightning_qlora.tensors.held_types import types_before
from lightning_qlora.tensors.values import is_plain


class DeferredForward(OfTraining):
    """The forward pass of an output embedding: deferred logits where autograd records, else the real ones."""

    def call(self, input: Tensor) -> Tensor:
        """Input [..., in] -> logits [..., out]."""
        head: Any = self.module
        if input.is_nested or input.layout is not torch.strided:
            return self.original(input)  # type: ignore[no-any-return]
        if torch.compiler.is_compiling() or not _can_defer(head, input):
            if type(input) is Tensor:
                # With the strides of a slice, as `x[:, -1:]` has them, torch takes a product that is 15 times slower.
                input = input.reshape(-1, input.shape[-1]).view(input.shape)
            return self.original(input)  # type: ignore[no-any-return]
        device = input.device.type
        dtype = head.weight_dtype if getattr(head, "is_held", False) else input.dtype
        own = instance_method(head, InType)
        if own is not None and own.autocast is not None:
            dtype = own.autocast
        elif torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return DeferredLogits(input, Source(input, head, self), dtype).attached()

    def add_to_report(self, report: Any, name: str) -> None:
        report.deferred_logits[name] = saved_bytes(self.module)


def _can_defer(head: Any, input: Tensor) -> bool:
    """Whether autograd alone records the call, something trains in it, and the head keeps its parameters after it."""
    return (
        DISABLED not in vars(head)
        and torch.is_grad_enabled()
        and not (head.training and _has_dropout(head))
        and is_plain(input)
        and input.dim() >= 2
        # FSDP, and hooks that replace `forward` (accelerate's offloading), take the parameters away after the call.
        and "_is_fsdp_managed_module" not in vars(head)
        and not has_other_forward(head)
        # Parameters of other types are sharded (DTensor), or belong to one call of torch.func.functional_call.
        and all(p is None or is_plain(p, nn.Parameter) for p in head._parameters.values())
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and (input.requires_grad or any(p.requires_grad for p in head.parameters()))
    )


def _has_dropout(head: Any) -> bool:
    """Whether the adapter of a head drops inputs: pieces, and each reader of the logits, would draw other masks."""
    return getattr(head, "lora_dropout", 0.0) > 0


def defer_logits(head: nn.Module) -> None:
    """Make an output embedding (an nn.Linear, in 4 bits or not) return deferred logits in training, in place."""
    if instance_method(head, DeferredForward) is None:
        add(DeferredForward(head))


def output_embeddings(parts: Parts) -> dict[str, Any]:
    """Name -> plain linear layer, in 4 bits or not, that computes the logits of a vocabulary.

    These are what `get_output_embeddings` of a model in the module returns, layers with a name in OUTPUT_EMBEDDINGS,
    and, outside of such models, a linear layer with as many outputs as an nn.Embedding has rows, unless its name and
    that of another one differ only in a number.
    """
    in_models: set[int] = set()
    for part in parts.modules:
        if parts.heads_of_models and callable(getattr(part, "get_output_embeddings", None)):
            in_models |= {id(layer) for layer in part.modules()}
    outside = {name: layer for name, layer in parts.named if id(layer) not in in_models}
    sizes = {layer.num_embeddings for layer in outside.values() if isinstance(layer, nn.Embedding)}
    fitting = {name: layer for name, layer in outside.items() if _is_plain(layer) and layer.out_features in sizes}
    repeated = Counter(map(without_numbers, fitting))
    single = {name for name in fitting if repeated[without_numbers(name)] == 1}
    heads = {name: layer for name, layer in parts.named if name in single or id(layer) in parts.output_embeddings}
    return {name: layer for name, layer in heads.items() if _is_plain(layer)}


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes what nn.Linear computes, and is of no class of the user's."""
    return original_class(type(layer)) is nn.Linear or is_packed(layer)


def check_output_embeddings(parts: Parts) -> None:
    if not output_embeddings(parts):
        raise ValueError(
            f"deferred_logits=True: {type(parts.root).__name__} has no output embedding: no get_output_embeddings() "
            f"that returns an nn.Linear, no nn.Linear named {', '.join(OUTPUT_EMBEDDINGS)}, and none with as many "
            "outputs as an nn.Embedding has rows. Give the layer one of these names, or pass deferred_logits='auto' or "
            "False."
        )


def defer_output_embeddings(parts: Parts, setting: bool | Literal["auto"], sharded: bool = False) -> dict[str, int]:
    """Make the output embeddings of a converted module return deferred logits in training; with "auto" the wide ones.

    Returns name -> 0 for those that are not deferred because a strategy shards the parameters.
    """
    chosen = output_embeddings(parts) if setting else {}
    if setting == "auto":
        chosen = {name: head for name, head in chosen.items() if is_wide(head)}
    if sharded:
        return dict.fromkeys(chosen, 0)
    for head in chosen.values():
        defer_logits(head)
    return {}


def saved_bytes(head: Any) -> int:
    """Bytes of 1,000 rows of logits, of their log-softmax in fp32, and of its gradient in fp32; 0 with dropout.

    Formula: 1000 * out_features * (bytes of the weight's type + 4 + 4).
    """
    if _has_dropout(head):
        return 0
    dtype: torch.dtype = head.weight.dtype
    if head.weight.requires_grad:  # in fp32, it computes in its type before
        dtype = types_before(head).get("weight", dtype)
    return 1000 * int(head.out_features) * (dtype.itemsize + 8)
