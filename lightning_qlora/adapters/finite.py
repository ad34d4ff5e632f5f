"""Adapters with NaN or Inf are not saved and not merged: the model would compute NaN, and readers refuse the file."""

from itertools import chain
from typing import Any

import torch
from torch import nn

from lightning_qlora.layers.dtensor import is_sharded, local, of_all_ranks
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.layers.trainable_tokens import token_adapters


def check_finite(module: nn.Module) -> None:
    """Raise ValueError if an adapter of a module holds NaN or Inf; all ranks of a sharded module must call it."""
    layers: dict[str, Any] = adapted_layers(module) | token_adapters(module)
    parameters = {name: list(layer.adapter_parameters()) for name, layer in layers.items()}
    bad = [name for name in layers if not all(torch.isfinite(local(p.detach())).all() for p in parameters[name])]
    if any(map(is_sharded, chain.from_iterable(parameters.values()))):
        bad = list(dict.fromkeys(chain.from_iterable(of_all_ranks(bad))))
    if bad:
        trainer = vars(module).get("_trainer")
        step = ""
        if trainer is not None:
            step = f" after step {trainer.global_step}"
        raise ValueError(
            f"{bad[0] or type(module).__name__}: its adapter holds NaN or Inf{step}, as those of {len(bad)} of "
            f"{len(layers)} layers: the training diverged. Nothing was written, and earlier files stay. Go on from an "
            "earlier checkpoint, with a smaller learning rate, or compute_dtype='bf16' in place of fp16; look for NaN "
            "in the batches."
        )
