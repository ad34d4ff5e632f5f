"""`lightning-qlora`: plan, inspect, merge, export, doctor.

A command imports what it runs, so that help and mistakes are answered without torch.
"""

import inspect as signatures
import json as json_format
import logging
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from lightning_qlora.checks import OTHER_ARGUMENTS, check_integer, install, parse_memory
from lightning_qlora.config import Base, DeviceName, MergeDtype, OptimizerName, QLoRAConfig, StrategyName
from lightning_qlora.texts import printable

if TYPE_CHECKING:
    from lightning_qlora.peft.adapter import Adapter

# Errors that the user can correct are shown on one line. Any other error is a bug of ours and shows its traceback.
EXPECTED = (ValueError, TypeError, OSError, ImportError)
FLAGS = ("--check", "--json", "--trust_remote_code")  # true without a value
BOOLEANS = ("true", "false", "yes", "no", "on", "off")  # of YAML, by which jsonargparse reads values
WRAPPED: Any = {"subsequent_indent": 31 * " ", "break_long_words": False, "break_on_hyphens": False}


def _with_arguments_of_config(command: Any) -> Any:
    """Give a command the arguments of QLoRAConfig. jsonargparse could find them itself, but would import torch."""
    parameters = [p for p in signatures.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    for parameter in signatures.signature(QLoRAConfig).parameters.values():
        parameters.append(parameter.replace(kind=signatures.Parameter.KEYWORD_ONLY))
    command.__signature__ = signatures.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    # Python 3.13 and newer remove the indentation of docstrings themselves.
    of_config, of_command = (signatures.cleandoc(each.__doc__ or "") for each in (QLoRAConfig, command))
    descriptions = re.split(r"\n(?:Args|Raises):\n", of_config)[1]
    command.__doc__ = re.sub(r"    \*\*arguments: .*", lambda _: descriptions.strip("\n"), of_command)
    return command


@_with_arguments_of_config
def plan(
    model: str,
    batch_size: int = 1,
    sequence_length: int | Literal["longest"] = 512,
    optimizer: OptimizerName = "adamw",
    gpu_memory: str | None = None,
    host_memory: str | None = None,
    devices: int = 1,
    strategy: StrategyName = "fsdp",
    device: DeviceName = "gpu",
    gpu: str | None = None,
    json: bool = False,
    **arguments: Any,
) -> None:
    """Estimate the memory of a training run without loading the model.

    Args:
        model: Folder or hub name of a transformers model; only its config.json is read.
        batch_size: Sequences per step.
        sequence_length: Tokens per sequence; "longest": find the longest that fits on the GPU, for
            gradient_checkpointing true, auto and offload, whatever that argument says.
        optimizer: Optimizer whose state is counted.
        gpu_memory: Memory of a GPU, 24GiB for a card of 24 GB (24GB is 7% less): also say whether the run fits, and
            else what to change; with gradient_checkpointing=auto also how many blocks keep their activations.
        host_memory: With "longest", free memory of the host, of which a run takes half at most; by default there is
            enough.
        devices: Number of devices: also say what each holds.
        strategy: Strategy on several devices.
        device: "gpu", or "cpu": this machine's CPU, which may hold a 16-bit model in fp32.
        gpu: A card such as T4, V100 or RTX4090: its memory, and whether it has bf16. Others are planned by gpu_memory.
        json: Print JSON.
        **arguments: The arguments of `QLoRAPrecision`.
    """
    from lightning_qlora.tools.cards import find_card
    from lightning_qlora.tools.memory_estimate import PlannedRun, both_units, bytes_on_each, fits

    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it logs errors that we raise
    if find_spec("transformers") is not None:
        import transformers

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its hints are about running a model, and none runs
    check_integer("devices", devices, at_least=1)
    memory = None
    card = None
    if gpu is not None:
        card = find_card(gpu, device)
        memory = card.memory
    if gpu_memory is not None:
        memory = parse_memory("gpu_memory", gpu_memory)
    config = QLoRAConfig(**arguments)
    if devices > 1 and strategy == "fsdp":
        # The output embedding is in shards, and ranks that share blocks recompute all of them.
        config = replace(config, deferred_logits=False, gradient_checkpointing=bool(config.gradient_checkpointing))
    if sys.stderr.isatty():
        _say(f"Running a step of {model} without weights ...", sys.stderr)
    in_short = isinstance(sequence_length, str)
    run = PlannedRun(model, optimizer, config, device=device, card=card, in_short=in_short)
    if isinstance(sequence_length, str):
        host = None if host_memory is None else parse_memory("host_memory", host_memory)
        _plan_longest(run, batch_size, memory, host, devices, strategy, json)
        return
    estimate = run.estimate(batch_size, sequence_length, memory)
    needed = bytes_on_each(run, estimate, devices, strategy)
    answer = None
    if memory is not None:
        answer = "It is not known whether it fits: the activations could not be counted."
        if estimate.counted_activations:
            answer = fits(needed, memory, config)
    if json:
        totals = {"total": estimate.total, "device": estimate.device, "on_each_device": needed, "fits": answer}
        _print_json({**vars(estimate), **totals})
        return
    print(estimate)
    if devices > 1:
        print(f"Each of {devices} devices ({strategy}) needs {both_units(needed)}.")
    if answer is not None:
        print(answer)


def _plan_longest(
    run: Any, batch_size: int, memory: int | None, host: int | None, devices: int, strategy: StrategyName, json: bool
) -> None:
    from lightning_qlora.tools.longest_sequence import longest_sequences
    from lightning_qlora.tools.memory_estimate import both_units, usable_bytes

    if memory is None and run.device == "gpu":
        raise ValueError("sequence_length='longest': on which card? Pass gpu=RTX4090 or gpu_memory=24GiB.")
    available = run.available(None) if memory is None else usable_bytes(memory)
    if host is not None:
        run.host_memory = host / 2 / devices
    rows = longest_sequences(run, batch_size, available, devices, strategy)
    if json:
        _print_json({"available": available, "longest": [row._asdict() for row in rows]})
        return
    print(f"The longest sequence for {both_units(available)}, batch_size={batch_size}:")
    for row in rows:
        print(row)


def inspect(path: str, weights_only: bool = True, json: bool = False) -> None:
    """Show the content of a checkpoint, an adapter folder or a model folder.

    Args:
        path: A Lightning checkpoint, a PEFT adapter folder, or the folder or hub name of a model.
        weights_only: As in torch.load. False also reads checkpoints whose hyperparameters are not plain values, which
            can run code of whoever wrote the file.
        json: Print JSON.
    """
    from lightning_qlora.tools.inspect_path import inspect_path

    lines = inspect_path(path, weights_only)
    if json:
        _print_json(dict(lines))
    else:
        _show(lines)


def merge_adapter(
    adapter: str,
    output: str,
    base_model: str | None = None,
    dtype: MergeDtype = "auto",
    base: Base = "quantized",
    weights_only: bool = True,
    trust_remote_code: bool = False,
    json: bool = False,
) -> None:
    """Merge an adapter into its base model and write the result as a folder that transformers loads.

    Args:
        adapter: PEFT's adapter folder, or a Lightning checkpoint.
        output: A folder that does not exist yet, or is empty.
        base_model: Folder or hub name of the base model, or a GGUF file; by default what the adapter names.
        dtype: Type of the written weights; "auto" is the base's.
        base: Weights that the adapter is added to: decoded from 4 bits ("quantized"), as in training, or as they are.
        weights_only: False also reads checkpoints with hyperparameters of other classes than plain values, and can run
            code of whoever wrote the file.
        trust_remote_code: Run the code of a model that transformers does not have, as in `from_pretrained`.
        json: Print JSON.
    """
    from lightning_qlora.files.folder_writer import check_free
    from lightning_qlora.files.hub import resolve_model
    from lightning_qlora.tools.merge_folder import merge_folder

    if not sys.stderr.isatty():
        import transformers

        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    check_free(Path(output))
    values = _adapter(adapter, weights_only, base)
    source = base_model or values.config["base_model_name_or_path"]
    if not source:
        raise ValueError(f"{adapter}: names no base model. Pass it: --base_model FOLDER.")
    folder = resolve_model(source, download=base_model is not None)
    merge_folder(folder, values, output, dtype, base, trust_remote_code)
    files = {path.name: path.stat().st_size for path in sorted(Path(output).iterdir())}
    reads_text = "vocab_size" in (Path(output) / "config.json").read_text(encoding="utf-8")
    if reads_text and not any(re.search("token|vocab|piece", name) for name in files):
        _say(f"lightning-qlora: warning: {source} has no tokenizer, so {output} has none: copy one there", sys.stderr)
    if json:
        _print_json({"output": output, "base_model": source, "adapter": adapter, "files": files})
        return
    _say(f"{output}: {source} with {adapter} merged; {len(files)} files, {sum(files.values()) / 1e6:,.1f} MB")


def export(
    checkpoint: str,
    output: str,
    base: Base = "quantized",
    weights_only: bool = True,
) -> None:
    """Write the adapter of a Lightning checkpoint as a PEFT folder; say what it was trained on.

    Args:
        checkpoint: A checkpoint of the Trainer, ModelCheckpoint or Fabric.
        output: Folder to write adapter_config.json and adapter_model.safetensors to.
        base: The base model that the adapter will be used with: in 4 bits ("quantized"), as in training, or in 16 or 32
            bits ("float"). They differ only for adapters that were initialized from the weight or its quantization
            error: for "float" the initial values are subtracted, which doubles the rank.
        weights_only: False also reads checkpoints with hyperparameters of other classes than plain values, and can run
            code of whoever wrote the file.
    """
    from lightning_qlora.peft.base_compatibility import required_base, trained_on
    from lightning_qlora.peft.peft_folder import write_adapter

    adapter = _adapter(checkpoint, weights_only, base)
    requirement = required_base(adapter.quantization)
    if requirement:
        _say(f"lightning-qlora: warning: {requirement}", sys.stderr)
    write_adapter(adapter, output)
    base_model = adapter.config["base_model_name_or_path"] or "a base that is not named"
    _say(f"{output}: {len(adapter.layers)} layers for {base_model}")
    _say(f"trained on: {trained_on(adapter.quantization)}")


def doctor(check: bool = False, json: bool = False) -> None:
    """Show versions, devices, kernels and paging, and run a self-test. The exit code is 1 if something is wrong.

    Args:
        check: Compare the Triton kernels with plain torch again, and store which ops fall back.
        json: Print JSON.
    """
    from lightning_qlora.tools.doctor import environment, examine

    checks = {}
    for name, text, good in examine(check):
        checks[name] = {"found": text, "good": good}
        if not good:
            text += "  <-- wrong"
        if not json:
            _show([(name, text)])
    if json:
        _print_json({"checks": checks, "environment": environment()})
    else:
        _show(list(environment().items()))
    if not all(check["good"] for check in checks.values()):
        raise SystemExit(1)


def _for_jsonargparse(arguments: list[str]) -> list[str]:
    """The arguments with --gpu-memory as --gpu_memory, and --json as --json true."""
    result = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):  # there may be none
        argument = re.sub(r"^--[\w-]+", lambda name: f"--{name[0][2:].replace('-', '_')}", argument)
        result.append(argument)
        if argument in FLAGS and following.lower() not in BOOLEANS:
            result.append("true")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 success, 1 error, 2 wrong arguments."""
    try:
        from jsonargparse import ArgumentParser, auto_cli
    except ImportError:
        raise SystemExit(f"lightning-qlora: jsonargparse is missing: {install('cli')}") from None

    class Parser(ArgumentParser):
        def error(self, message: str, *_: Any) -> Any:
            program = self.prog.replace(" [options]", "")
            text = _plain(message)
            required = re.search(r"required: (\w+)\.", text)  # jsonargparse's main parser says it, not the command's
            if required and required[1] in commands:
                program = f"{program} {required[1]}"
                text = text.replace(f"{required[1]}.", "")
            self.exit(2, f"lightning-qlora: error: {text}\n{program} --help lists the arguments.\n")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that incomplete folders are deleted
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for paths that are not valid UTF-8
    commands: dict[str, Any] = {
        # jsonargparse asks the package for a function's name: `merge` would import torch
        "plan": plan,
        "inspect": inspect,
        "merge": merge_adapter,
        "export": export,
        "doctor": doctor,
    }
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        auto_cli(
            commands,
            args=_for_jsonargparse(list(arguments)),
            prog="lightning-qlora",
            version=sys.modules["lightning_qlora"].__version__,
            allow_abbrev=False,
            parser_class=Parser,
        )
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if not isinstance(error, EXPECTED) and type(error).__name__ != "CheckpointMismatchError":  # which imports torch
            raise
        _say(f"lightning-qlora: error: {' '.join(str(error).split())}", sys.stderr)
        raise SystemExit(1) from None


def _adapter(path: str, weights_only: bool, base: Base) -> "Adapter":
    from lightning_qlora.checkpoints.from_checkpoint import read_adapter_from_checkpoint
    from lightning_qlora.files.lightning_checkpoint import is_shards
    from lightning_qlora.peft.peft_folder import read_adapter

    if os.path.isdir(path) and not is_shards(path):
        return read_adapter(path, base)
    return read_adapter_from_checkpoint(path, weights_only, base)


def _say(text: str, stream: TextIO | None = None) -> None:
    """Print a line that may have texts of a file in it."""
    print(printable(text), file=stream, flush=True)


def _show(lines: list[tuple[str, str]]) -> None:
    width = shutil.get_terminal_size().columns
    for name, value in lines:
        text = printable(f"{name:30} {value}")
        if sys.stdout.isatty() and len(text) > width > 60:  # a file or a pipe gets whole lines
            text = textwrap.fill(text, width, **WRAPPED)
        print(text)


def _print_json(values: Any) -> None:
    print(json_format.dumps(values, indent=2, default=str))


def _plain(message: str) -> str:
    """A message of jsonargparse in one line, with our names for arguments of other libraries."""
    message = " ".join(message.split())
    hints = [f"{name}: {OTHER_ARGUMENTS[name]}." for name in re.findall(r"--(\w+)", message) if name in OTHER_ARGUMENTS]
    if hints:
        message += "."
    return " ".join([message, *hints])
