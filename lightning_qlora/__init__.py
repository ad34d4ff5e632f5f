"""QLoRA for every LightningModule in one argument: `Trainer(plugins=QLoRAPrecision())`."""

from lightning_qlora.adapters import load_adapter, save_adapter
from lightning_qlora.checkpoint import load_from_checkpoint
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.convert import convert
from lightning_qlora.kernels.ops import quantize
from lightning_qlora.linear import QLoRALinear
from lightning_qlora.linear_state import CheckpointMismatchError
from lightning_qlora.loading import save_quantized
from lightning_qlora.loraplus import loraplus_groups
from lightning_qlora.memory import MemoryEstimate, estimate_memory
from lightning_qlora.merging import merge
from lightning_qlora.paging import PagedAdamW, PagedAdamW8bit, PagedOptimizer
from lightning_qlora.precision import QLoRAPrecision
from lightning_qlora.quantize.packed import PackedWeight
from lightning_qlora.report import ConversionReport

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
    "estimate_memory",
    "load_adapter",
    "load_from_checkpoint",
    "loraplus_groups",
    "merge",
    "quantize",
    "save_adapter",
    "save_quantized",
]
