"""Adapters with NaN or Inf are not saved and not merged: they compute NaN, and no file with them can be loaded."""

from typing import Any

import torch
from torch import nn

from lightning_qlora.layers.dtensor import is_sharded, local, of_all_ranks
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.layers.trainable_tokens import token_adapters


def check_finite(module: nn.Module) -> None:
    """Raise ValueError if an adapter of a module holds NaN or Inf; of a sharded module all ranks must call it."""
    layers: dict[str, Any] = adapted_layers(module) | token_adapters(module)
    parameters = [(name, p) for name, layer in layers.items() for p in layer.adapter_parameters()]
    bad = list(dict.fromkeys(name for name, p in parameters if not torch.isfinite(local(p.detach())).all()))
    if any(is_sharded(p) for _, p in parameters):
        bad = list(dict.fromkeys(name for of_rank in of_all_ranks(bad) for name in of_rank))
    if bad:
        trainer = vars(module).get("_trainer")
        step = "" if trainer is None else f" after step {trainer.global_step}"
        raise ValueError(
            f"{bad[0] or type(module).__name__}: its adapter holds NaN or Inf{step}, as those of {len(bad)} of "
            f"{len(layers)} layers: the training diverged. Nothing was written, and earlier files stay. Go on from an "
            "earlier checkpoint, with a smaller learning rate, or compute_dtype='bf16' in place of fp16; look for NaN "
            "in the batches."
        )
