"""`lightning-qlora`: plan, inspect, merge, export, doctor."""

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_qlora.adapters.float_base import for_float_base
from lightning_qlora.adapters.folder import Adapter, read_adapter, vllm_objections, write_adapter
from lightning_qlora.checkpoint_adapter import adapter_of_checkpoint
from lightning_qlora.checkpoint_file import is_shards
from lightning_qlora.config import Onto, QuantType
from lightning_qlora.files import resolve_model
from lightning_qlora.linear_state import CheckpointMismatchError
from lightning_qlora.memory import OptimizerName, estimate_memory
from lightning_qlora.merging.folder import FolderDtype, merge_folder
from lightning_qlora.starts.since_start import belongs_to
from lightning_qlora.writing import check_free

# What a user can mend: shown as one line. Anything else is a mistake of ours and shows its trace.
EXPECTED = (ValueError, TypeError, OSError, ImportError, CheckpointMismatchError)


def plan(
    model: str,
    batch_size: int = 1,
    sequence_length: int = 512,
    optimizer: OptimizerName = "adamw",
    r: int = 64,
    quant_type: QuantType = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    target_modules: str | list[str] = "all-linear",
    modules_to_save: list[str] | None = None,
    use_dora: bool = False,
    gradient_checkpointing: bool = False,
    paged_optimizer: bool | Literal["auto"] = "auto",
) -> None:
    """Say what memory a run would take, without loading the model.

    Args:
        model: Folder or hub name of a transformers model; its config.json is all that is read.
        batch_size: Sequences a step.
        sequence_length: Tokens a sequence.
        optimizer: Optimizer whose state is counted.
        r: Rank of the adapters.
        quant_type: 4-bit data type of the frozen weights.
        double_quant: Quantize the block scales again, to 8 bits.
        block_size: Weights that share one scale.
        target_modules: Layers to convert, as in QLoRAPrecision.
        modules_to_save: Modules to train in full.
        use_dora: Learn the magnitude of every output row as well.
        gradient_checkpointing: Recompute activations in the backward pass.
        paged_optimizer: Page optimizer state to host memory.
    """
    estimate = estimate_memory(
        model,
        batch_size=batch_size,
        sequence_length=sequence_length,
        optimizer=optimizer,
        r=r,
        quant_type=quant_type,
        double_quant=double_quant,
        block_size=block_size,
        target_modules=target_modules,
        modules_to_save=modules_to_save or [],
        use_dora=use_dora,
        gradient_checkpointing=gradient_checkpointing,
        paged_optimizer=paged_optimizer,
    )
    print(estimate)


def inspect(path: str, weights_only: bool = True) -> None:
    """Say what is in a checkpoint, an adapter folder or a model folder.

    Args:
        path: A Lightning checkpoint, PEFT's adapter folder, or a model's folder or hub name.
        weights_only: False also reads checkpoints with hyperparameters of other classes than plain values, and can run
            code of whoever wrote the file.
    """
    from lightning_qlora.inspection import inspect_path

    _show(inspect_path(path, weights_only))


def merge(
    adapter: str,
    output: str,
    base: str | None = None,
    dtype: FolderDtype = "auto",
    onto: Onto = "decoded",
    prefix: str | None = None,
    weights_only: bool = True,
) -> None:
    """Fold an adapter into its base model and write that as a folder of safetensors, tensor by tensor.

    Args:
        adapter: PEFT's adapter folder, or a Lightning checkpoint.
        output: A folder that does not exist yet, or is empty.
        base: Folder or hub name of the base model; by default what the adapter names.
        dtype: Type of the written weights; "auto" is the base's. "4bit" loses quality.
        onto: The base's weights decoded from 4 bits, as they were in training, or the float weights as they are.
        prefix: Name of the base model in the LightningModule, where a checkpoint does not say it.
        weights_only: False also reads checkpoints with hyperparameters of other classes than plain values, and can run
            code of whoever wrote the file.
    """
    check_free(Path(output))
    found = _adapter(adapter, prefix, weights_only)
    source = base or found.base_model
    if not source:
        raise ValueError(f"{adapter}: names no base model. Pass it: --base FOLDER.")
    folder = resolve_model(source)
    if onto == "float":
        found = for_float_base(found, folder)
    merge_folder(folder, found, output, dtype, onto)
    print(f"{output}: {source} with {adapter} folded in")


def export(
    checkpoint: str,
    output: str,
    onto: Onto = "decoded",
    base: str | None = None,
    prefix: str | None = None,
    max_lora_rank: int = 512,
    weights_only: bool = True,
) -> None:
    """Write the adapter of a Lightning checkpoint as a PEFT folder, and say which base it is for and if vLLM takes it.

    Args:
        checkpoint: A checkpoint of the Trainer, ModelCheckpoint or Fabric.
        output: Folder to write adapter_config.json and adapter_model.safetensors to.
        onto: The base it will be put on: in 4 bits, as in training, or "float", in 16 or 32 bit. They differ for
            adapters that started from the error of quantization; for "float" those take twice the rank.
        base: Folder or hub name of the base model, for "float"; by default what the checkpoint names.
        prefix: Name of the base model in the LightningModule, where the checkpoint does not say it.
        max_lora_rank: What vLLM will be started with.
        weights_only: False also reads checkpoints with hyperparameters of other classes than plain values, and can run
            code of whoever wrote the file.
    """
    adapter = _adapter(checkpoint, prefix, weights_only)
    if onto == "float":
        adapter = for_float_base(adapter, base)
    elif need := belongs_to(adapter.quantization):
        warnings.warn(need, stacklevel=2)
    write_adapter(adapter, output)
    print(f"{output}: {len(adapter.layers)} layers for {adapter.base_model or 'a base that is not named'}")
    objections = vllm_objections(adapter, max_lora_rank)
    print("vLLM takes it" if not objections else "vLLM does not take it: " + " ".join(objections))


def doctor() -> None:
    """Look at versions, devices, kernels and paging, and run a self-test; exit code 1 if something is wrong."""
    from lightning_qlora.doctor import environment, examine

    well = True
    for name, found, good in examine():
        _show([(name, found if good else f"{found}  <-- wrong")])
        well = well and good
    _show(list(environment().items()))
    if not well:
        raise SystemExit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit code 0 if all went well, 1 if not, 2 if the arguments are wrong."""
    try:
        from jsonargparse import auto_cli
    except ImportError:
        raise SystemExit("lightning-qlora: jsonargparse is missing: pip install 'lightning-qlora[cli]'") from None
    signal.signal(signal.SIGTERM, _ended)
    warnings.showwarning = _one_line
    commands: list[Any] = [plan, inspect, merge, export, doctor]
    try:
        auto_cli(commands, args=None if arguments is None else list(arguments), prog="lightning-qlora")
    except EXPECTED as error:
        print(f"lightning-qlora: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None


def _adapter(path: str, prefix: str | None, weights_only: bool) -> Adapter:
    if os.path.isdir(path) and not is_shards(path):
        return read_adapter(path)
    return adapter_of_checkpoint(path, prefix, weights_only)


def _show(lines: list[tuple[str, str]]) -> None:
    for name, value in lines:
        print(f"{name:30} {value}")


def _ended(*_: Any) -> None:
    raise SystemExit(143)  # so that a half-written folder is removed


def _one_line(message: Any, *_: Any, **__: Any) -> None:
    print(f"lightning-qlora: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
