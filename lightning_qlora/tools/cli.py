"""`lightning-qlora`: plan, inspect, merge, export, doctor.

A command imports what it runs, so that help and mistakes are answered without torch.
"""

import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_qlora.checks import install
from lightning_qlora.config import Base, MergeDtype
from lightning_qlora.tools.output import print_json, say, show
from lightning_qlora.tools.plan import plan

if TYPE_CHECKING:
    from lightning_qlora.adapters.adapter import Adapter

# Errors that the user can correct are shown on one line. Any other error is a bug of ours and shows its traceback.
EXPECTED = (ValueError, TypeError, OSError, ImportError)
FLAGS = ("--check", "--json", "--trust_remote_code")  # true without a value
BOOLEANS = ("true", "false", "yes", "no", "on", "off")  # of YAML, by which jsonargparse reads values


def inspect(path: str, weights_only: bool = True, json: bool = False) -> None:
    """Show the adapter in a checkpoint or an adapter folder.

    Args:
        path: A Lightning checkpoint, or a PEFT adapter folder.
        weights_only: As in torch.load. False also reads checkpoints whose hyperparameters are not plain values, which
            can run code of whoever wrote the file.
        json: Print JSON.
    """
    from lightning_qlora.adapters.base_compatibility import trained_on
    from lightning_qlora.layers.names import last_part

    adapter = _adapter(path, weights_only, "quantized")
    tensors = [*adapter.saved.values(), *(tensor for state in adapter.layers.values() for tensor in state.values())]
    content = {
        "base": adapter.config["base_model_name_or_path"] or "unknown",
        "trained on": trained_on(adapter.quantization),
        "layers": ", ".join(f"{name} x{count}" for name, count in Counter(map(last_part, adapter.layers)).items()),
        "rank": ", ".join(map(str, sorted(set(map(adapter.rank, adapter.layers))))),
        "modules_to_save": ", ".join(adapter.saved) or "nothing",
        "weights": f"{sum(tensor.numel() for tensor in tensors):,}",
    }
    if json:
        print_json(content)
    else:
        show(list(content.items()))


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
        say(f"lightning-qlora: warning: {source} has no tokenizer, so {output} has none: copy one there", sys.stderr)
    if json:
        print_json({"output": output, "base_model": source, "adapter": adapter, "files": files})
        return
    say(f"{output}: {source} with {adapter} merged; {len(files)} files, {sum(files.values()) / 1e6:,.1f} MB")


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
    from lightning_qlora.adapters.base_compatibility import required_base, trained_on
    from lightning_qlora.adapters.peft_folder import write_adapter

    adapter = _adapter(checkpoint, weights_only, base)
    requirement = required_base(adapter.quantization)
    if requirement:
        say(f"lightning-qlora: warning: {requirement}", sys.stderr)
    write_adapter(adapter, output)
    base_model = adapter.config["base_model_name_or_path"] or "a base that is not named"
    say(f"{output}: {len(adapter.layers)} layers for {base_model}")
    say(f"trained on: {trained_on(adapter.quantization)}")


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
            show([(name, text)])
    if json:
        print_json({"checks": checks, "environment": environment()})
    else:
        show(list(environment().items()))
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
            text = " ".join(message.split())
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
        say(f"lightning-qlora: error: {' '.join(str(error).split())}", sys.stderr)
        raise SystemExit(1) from None


def _adapter(path: str, weights_only: bool, base: Base) -> "Adapter":
    from lightning_qlora.adapters.peft_folder import read_adapter
    from lightning_qlora.checkpoints.from_checkpoint import read_adapter_from_checkpoint
    from lightning_qlora.files.lightning_checkpoint import is_shards

    if os.path.isdir(path) and not is_shards(path):
        return read_adapter(path, base)
    return read_adapter_from_checkpoint(path, weights_only, base)
