"""QLoRA for every LightningModule in one argument: `Trainer(plugins=QLoRAPrecision())`."""

from lightning_qlora.adapters.merge import merge
from lightning_qlora.adapters.save_load import load_adapter, save_adapter
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.huggingface.bnb_checkpoint import save_quantized
from lightning_qlora.kernels.ops import quantize
from lightning_qlora.layers.disable_adapter import disable_adapter
from lightning_qlora.layers.qlora_linear import QLoRALinear
from lightning_qlora.layers.state_dict import CheckpointMismatchError
from lightning_qlora.optim.adamw import PagedAdamW, PagedAdamW8bit
from lightning_qlora.optim.callback import PagedOptimizer
from lightning_qlora.optim.loraplus import loraplus_groups
from lightning_qlora.quantization.packed_weight import PackedWeight
from lightning_qlora.tools.memory_estimate import MemoryEstimate, estimate_memory
from lightning_qlora.training.convert import convert
from lightning_qlora.training.load_from_checkpoint import load_from_checkpoint
from lightning_qlora.training.precision import QLoRAPrecision
from lightning_qlora.training.report import ConversionReport

__version__ = "0.1.0"
__all__ = [
    "CheckpointMismatchError",
    "ConversionReport",
    "MemoryEstimate",
    "PackedWeight",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedOptimizer",
    "QLoRAConfig",
    "QLoRALinear",
    "QLoRAPrecision",
    "convert",
    "disable_adapter",
    "estimate_memory",
    "load_adapter",
    "load_from_checkpoint",
    "loraplus_groups",
    "merge",
    "quantize",
    "save_adapter",
    "save_quantized",
]
