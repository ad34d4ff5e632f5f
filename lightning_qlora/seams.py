"""Every place where Lightning, torch or transformers offers no hook and something of theirs is changed.

One function each, with the upstream file, why, and what upstream change would remove it. Nothing here has an effect on
a run without this package's plugin, callback or layers.
"""

from typing import Any

from torch import nn


def keep_encoder_layers_on_the_module_path(module: nn.Module) -> None:
    """Keep nn.TransformerEncoderLayer from its fused inference path, which reads weights and never calls the layers.

    Upstream: torch/nn/modules/transformer.py, TransformerEncoderLayer.forward and TransformerEncoder.forward: the
    condition `activation_relu_or_gelu`. On that path adapters would be left out of evaluation, in silence.
    Removed by: upstream checking that `linear1` and `linear2` are plain nn.Linear.
    """
    for layer in module.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            layer.activation_relu_or_gelu = 0


def let_teardown_pass_by(trainer: Any) -> None:
    """Keep teardown from moving a module that can't be moved, because its weights are on the meta device.

    Upstream: lightning/pytorch/strategies/strategy.py, Strategy.teardown, calls `lightning_module.cpu()` after any
    error; "Cannot copy out of meta tensor" would be all that a user sees of our error that names the layer.
    Removed by: upstream not letting an error of teardown hide the one that led to it.
    """
    trainer.strategy._lightning_module = None


def restore_checkpoint_after_conversion() -> None:
    """Let Lightning restore weights after `convert_module` where the precision plugin asks for it.

    Upstream: lightning/pytorch/trainer/trainer.py, Trainer._run: on one device and under DDP weights are restored
    before Strategy.setup calls convert_module; adapters can only be restored after it. Strategies say by the property
    `restore_checkpoint_after_setup` (pytorch/strategies/strategy.py) which order they want; a precision plugin can't.
    Removed by: Precision having that property too.
    """
    from lightning.pytorch.strategies import Strategy

    original: Any = Strategy.restore_checkpoint_after_setup
    if getattr(original.fget, "asks_the_plugin", False):
        return

    def fget(strategy: Strategy) -> bool:
        return original.fget(strategy) or getattr(strategy.precision_plugin, "restore_after_setup", False)

    fget.asks_the_plugin = True  # type: ignore[attr-defined]
    Strategy.restore_checkpoint_after_setup = property(fget)  # type: ignore[method-assign, assignment]
