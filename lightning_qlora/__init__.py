"""QLoRA for every LightningModule in one argument: `Trainer(plugins=QLoRAPrecision())`.

The package is imported when one of its names is first used, so that the command line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_qlora.lightning_copies import inherit_from_copies

if TYPE_CHECKING:
    from lightning_qlora.adapters.load import load_adapter as load_adapter
    from lightning_qlora.adapters.merge import merge as merge
    from lightning_qlora.adapters.save import save_adapter as save_adapter
    from lightning_qlora.calibration.calibration import calibrate as calibrate
    from lightning_qlora.config import QLoRAConfig as QLoRAConfig
    from lightning_qlora.conversion.convert import convert as convert
    from lightning_qlora.conversion.load_from_checkpoint import load_from_checkpoint as load_from_checkpoint
    from lightning_qlora.conversion.report import ConversionReport as ConversionReport
    from lightning_qlora.huggingface.sharded.load_weights import load_weights as load_weights
    from lightning_qlora.kernels.ops import quantize as quantize
    from lightning_qlora.layers.disable_adapter import disable_adapter as disable_adapter
    from lightning_qlora.layers.layer_state import CheckpointMismatchError as CheckpointMismatchError
    from lightning_qlora.layers.packed_layer import to_parameters as to_parameters
    from lightning_qlora.layers.qlora_linear import QLoRALinear as QLoRALinear
    from lightning_qlora.optim.adamw import PagedAdamW as PagedAdamW
    from lightning_qlora.optim.loraplus import loraplus_groups as loraplus_groups
    from lightning_qlora.optim.pager import PagedOptimizer as PagedOptimizer
    from lightning_qlora.plugin.precision import QLoRAPrecision as QLoRAPrecision
    from lightning_qlora.quantization.packed_weight import PackedWeight as PackedWeight
    from lightning_qlora.tools.memory_estimate import MemoryEstimate as MemoryEstimate
    from lightning_qlora.tools.memory_estimate import estimate_memory as estimate_memory

__version__ = "0.1.0"
_PLACES = {
    "CheckpointMismatchError": "layers.layer_state",
    "ConversionReport": "conversion.report",
    "MemoryEstimate": "tools.memory_estimate",
    "PackedWeight": "quantization.packed_weight",
    "PagedAdamW": "optim.adamw",
    "PagedOptimizer": "optim.pager",
    "QLoRAConfig": "config",
    "QLoRALinear": "layers.qlora_linear",
    "QLoRAPrecision": "plugin.precision",
    "calibrate": "calibration.calibration",
    "convert": "conversion.convert",
    "disable_adapter": "layers.disable_adapter",
    "estimate_memory": "tools.memory_estimate",
    "load_adapter": "adapters.load",
    "load_from_checkpoint": "conversion.load_from_checkpoint",
    "load_weights": "huggingface.sharded.load_weights",
    "loraplus_groups": "optim.loraplus",
    "merge": "adapters.merge",
    "quantize": "kernels.ops",
    "save_adapter": "adapters.save",
    "to_parameters": "layers.packed_layer",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name == "PagedAdamW8bit":
        raise ImportError(
            "PagedAdamW8bit was removed. Use torchao.optim.AdamW8bit or bitsandbytes.optim.AdamW8bit: the plugin pages "
            "their state, and PagedOptimizer does so without it."
        )
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "QLoRAConfig":  # the command line asks for it
        for package in ("torch", "lightning"):
            import_module(f"{__name__}.upstream_names").check_names(package)
        import_module(f"{__name__}.plugin.precision")  # its changes to Lightning answer files of ours everywhere
    value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    if name in ("PagedOptimizer", "QLoRAPrecision"):
        return inherit_from_copies(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
