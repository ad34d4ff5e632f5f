"""Calls as a type checker reads them; `make lint` runs mypy on this file, and nothing runs the file.

A wrong call that is no error to mypy has a comment that mypy reports as unused.
"""

import torch
from torch import nn

from lightning_qlora import ConversionReport, QLoRALinear, QLoRAPrecision, convert, estimate_memory, merge, quantize

model = nn.Sequential(nn.Linear(64, 64))
report: ConversionReport = convert(model, r=16, lora_alpha=32, compute_dtype=torch.bfloat16)
convert(module=model, quant_type="fp4", target_modules=["0"], init_lora_weights="gaussian", lora_dropout=0)
convert(model, rank=16)  # type: ignore[call-arg]
convert(model, r="16")  # type: ignore[arg-type]
convert(model, quant_type="nf3")  # type: ignore[arg-type]
convert(model, checkpoint="all")  # type: ignore[arg-type]

total: int = estimate_memory(model, batch_size=2, optimizer="adamw8bit", r=16).total
estimate_memory(model, optimizer="adam")  # type: ignore[arg-type]
estimate_memory(model, use_dora="yes")  # type: ignore[arg-type]

plugin = QLoRAPrecision(r=16, compute_dtype="bf16", rank_pattern={"0": 8})
plugin = QLoRAPrecision(compute_dtype=torch.float16, modules_to_save=["head"], deferred_logits=False)
QLoRAPrecision(lora_r=16)  # type: ignore[call-arg]
QLoRAPrecision(paged_optimizer="always")  # type: ignore[arg-type]

dense: nn.Sequential = merge(model, dtype="bf16")
size: int = quantize(torch.zeros(64, 64)).nbytes
layer = model[0]
assert isinstance(layer, QLoRALinear)
adapter: nn.Parameter = layer.lora_A
