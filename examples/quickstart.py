"""Fine-tune SmolLM2-135M-Instruct in 4 bits on the docstrings of this machine's standard library.

    python examples/quickstart.py [--fast] [--base HUB_NAME_OR_FOLDER] [--output FOLDER] [--trainer.max_steps 100 ...]

quickstart.yaml defines the run; this file measures it. Writes summary.json and training.png to the output folder.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Waiting threads must sleep: threads that spin make a run several times slower on cores shared with other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from causal_lm import CausalLM
from cli import CLI, configs
from docstring_qa import DocstringQA, prompt_for
from lightning.pytorch import Callback, Trainer
from picture import draw
from smollm2 import find_model, load_tokenizer

from lightning_qlora import QLoRALinear, __version__

SAMPLES = ("shutil.move", "calendar.monthrange", "threading.main_thread")  # questions to print, if they are held out


class Recorder(Callback):
    """Record the loss and the duration of every step, and the size of the optimizer state."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.optimizer_bytes = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: CausalLM, outputs: dict[str, Any], *_: Any) -> None:
        self.losses.append(outputs["loss"].item())  # waits for the device, so that the time below is correct on a GPU
        self.seconds.append(time.perf_counter() - self.start)

    def on_train_end(self, trainer: Trainer, module: CausalLM) -> None:
        states = (state for optimizer in trainer.optimizers for state in optimizer.state.values())
        self.optimizer_bytes = sum(bytes_of(state.values()) for state in states)


def main(args: list[str] | None = None) -> dict[str, Any]:
    options, overrides = parse(args)
    output = Path(options.output)
    began = time.perf_counter()
    for message in ("does not have many workers", "LeafSpec"):
        warnings.filterwarnings("ignore", f".*{message}.*")

    if options.base:
        overrides.append(f"--model.base={options.base}")
    recorder = Recorder()
    cli = CLI(
        CausalLM,
        DocstringQA,
        args=[*configs(options.fast), f"--trainer.default_root_dir={output}", *overrides],
        trainer_defaults={"callbacks": [recorder]},
        save_config_callback=None,
        run=False,
    )
    trainer, model, data = cli.trainer, cli.model, cli.datamodule

    before = trainer.validate(model, data, verbose=False)[0]["perplexity"]  # in 4 bits already, with B = 0
    samples = [pair for pair in data.pairs if pair.held_out and pair.name in SAMPLES]
    questions = [pair.question for pair in samples]
    answers_before = ask(trainer, model, questions)
    trainer.fit(model, data)
    after = trainer.validate(model, data, verbose=False)[0]["perplexity"]
    answers_after = ask(trainer, model, questions)

    report = trainer.precision_plugin.report
    linears = [layer for layer in model.modules() if isinstance(layer, QLoRALinear)]
    summary = {
        "perplexity_before": before,
        "perplexity_after": after,
        "trainable_parameters": report.trainable_parameters,
        "total_parameters": report.total_parameters,
        "linear_bytes_before": sum(2 * layer.in_features * layer.out_features for layer in linears),  # as bf16
        "linear_bytes_after": sum(layer.packed_weight.nbytes for layer in linears),
        "adapter_bytes": bytes_of(p for p in model.parameters() if p.requires_grad),
        "optimizer_bytes": recorder.optimizer_bytes,
        "peak_memory_bytes": peak_memory(trainer.strategy.root_device),
        "steps": trainer.global_step,
        "seconds_per_step": statistics.mean(recorder.seconds),
        "quantize_seconds": report.seconds,
        "total_seconds": time.perf_counter() - began,
        "adapter_checkpoint": str(trainer.checkpoint_callback.best_model_path),
        "samples": [
            {"question": pair.question, "docstring": pair.answer, "before": first, "after": second}
            for pair, first, second in zip(samples, answers_before, answers_after, strict=True)
        ],
        "losses": recorder.losses,
        "held_out_pairs": len(data.val),
        "seed": cli.config["seed_everything"],
        **machine(trainer, model),
    }
    write(output / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))
    write(output / "training.png", lambda path: draw(summary, path))
    show(summary, output)
    show_what_next(summary, output, options.base)
    return summary


def parse(args: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into the options of this script and those of LightningCLI."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="4 steps instead of 40")
    parser.add_argument("--base", help="hub name or folder of a causal language model with a chat template")
    parser.add_argument("--output", default="outputs/quickstart", help="folder for the results")
    return parser.parse_known_args(args)


@torch.inference_mode()
def ask(trainer: Trainer, model: CausalLM, questions: list[str]) -> list[str]:
    """Generate an answer to each question with greedy decoding."""
    if not questions:
        return []
    tokenizer = load_tokenizer(model.hparams.base)
    tokenizer.padding_side = "left"  # so that all answers begin at the same position
    prompts = [prompt_for(question, tokenizer) for question in questions]
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    model.eval().to(trainer.strategy.root_device)  # the Trainer moves the model to the CPU after every run
    tokens = model.model.generate(**batch.to(model.device), max_new_tokens=40, do_sample=False)
    answers = tokenizer.batch_decode(tokens[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    model.train()  # as before
    return [answer.strip() for answer in answers]


def bytes_of(values: Iterable[Any]) -> int:
    """Return the size of all tensors among the values, in bytes."""
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def peak_memory(device: torch.device) -> int | None:
    """Return the peak of GPU memory, or of the resident memory of this process, which includes libraries; in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(trainer: Trainer, model: CausalLM) -> dict[str, Any]:
    """Describe the machine and the versions of the measurement."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {package: version(package) for package in ("lightning", "torch", "transformers")}
    return {
        "device": f"{device.type}: {name}, {torch.get_num_threads()} CPU threads",
        "weights_dtype": str(model.model.dtype).removeprefix("torch."),
        "versions": {"lightning_qlora": __version__, **versions, "python": platform.python_version()},
    }


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Write a temporary file and rename it, so that no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_stem(f".{path.stem}.{os.getpid()}")
    save(temporary)
    temporary.replace(path)


def show(summary: dict[str, Any], output: Path) -> None:
    """Print the measurements and the answers."""
    perplexities = [f"{summary[f'perplexity_{when}']:.1f}" for when in ("before", "after")]
    megabytes = [f"{summary[f'linear_bytes_{when}'] / 1e6:.1f} MB" for when in ("before", "after")]
    print("\nQLoRA quickstart\n")
    print(f"{'':22}{'before':>12}{'after':>12}")
    print(f"{'held-out perplexity':22}{perplexities[0]:>12}{perplexities[1]:>12}")
    print(f"{'linear layers':22}{megabytes[0]:>12}{megabytes[1]:>12}\n")
    for sample in summary["samples"]:
        print(f"{sample['question']}\n  docstring: {sample['docstring']}")
        print(f"  before:    {sample['before']}\n  after:     {sample['after']}\n")
    print(
        f"{summary['trainable_parameters']:,} of {summary['total_parameters']:,} parameters trained, "
        f"{summary['steps']} steps of {summary['seconds_per_step']:.2f} s, {summary['total_seconds']:.0f} s in total"
        f"{peak_text(summary['peak_memory_bytes'])}.\n"
        f"Adapters: {summary['adapter_checkpoint']}\nsummary.json and training.png: {output}"
    )


def peak_text(size: int | None) -> str:
    """Say how much memory was used at most, if it is known."""
    return "" if size is None else f"; peak memory {size / 1e9:.2f} GB, Python and its libraries included"


def show_what_next(summary: dict[str, Any], output: Path, base: str | None) -> None:
    """Print the commands that merge the adapter and ask the merged model."""
    source = find_model(base)
    model = Path(source["pretrained_model_name_or_path"], source.get("gguf_file", "")) if base is None else base
    command = Path(sys.executable).with_name("lightning-qlora")
    merged, script = output / "merged", os.path.relpath(Path(__file__).with_name("ask.py"))
    question = "What does shutil.move do in Python?"
    print(
        f"\nMerge the adapter into the model, then ask it:\n\n"
        f"  {command} merge {summary['adapter_checkpoint']} {merged} --base_model {model}\n"
        f"  {sys.executable} {script} {merged} {question!r}\n\n"
        "Next: your own LightningModule with plugins=QLoRAPrecision() (docs/tutorial.md), your own conversations "
        "(docs/chat.md), a server (docs/serve.md)."
    )


if __name__ == "__main__":
    main()
