"""Perplexity of SmolLM2-135M before any training step, for each start, on text files of your own.

python -m benchmarks.starts TEST_TEXT CALIBRATION_TEXT [--windows 8] [--r 64] [--starts ...]

Windows of 512 tokens from the beginning of each text; weights in fp32. WikiText-2's test.txt and valid.txt lie in
github.com/pytorch/examples under word_language_model/data/wikitext-2; their @-@ and spaced punctuation is joined again.
"""

import argparse
import copy
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_qlora import calibrate, convert

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from smollm2 import load_model, load_tokenizer

SIZE = 512
STARTS: dict[str, dict[str, Any]] = {
    "default": {},
    "calibrated": {"init_lora_weights": "calibrated"},
    "calibrated, 2 x 128 tokens": {"init_lora_weights": "calibrated"},
}


def windows(
    path: str | None, count: int, tokenizer: PreTrainedTokenizerBase | None = None, odd: bool = False
) -> Tensor:
    """The first tokens of a text, [count, 512]; without a file, of the even (or odd) pages of Python's manual."""
    if path is None:
        text = "\n".join(topics[name] for name in sorted(topics)[odd::2])[: 12 * count * SIZE]
    else:
        text = re.sub(r" @(.)@ ", r"\1", Path(path).read_text(encoding="utf-8")[: 60 * count * SIZE])
        text = re.sub(r"([(\[]) ", r"\1", re.sub(r" ([.,;:!?)\]'])", r"\1", text))
    tokens: Tensor = (tokenizer or load_tokenizer())(text, return_tensors="pt").input_ids[0]
    if len(tokens) < count * SIZE:
        raise ValueError(
            f"{path or 'pydoc_data.topics'}: has {len(tokens)} tokens, and {count} windows need {count * SIZE}."
        )
    return tokens[: count * SIZE].view(count, SIZE)


def feed(model: nn.Module, rows: Tensor) -> None:
    """Forward passes as in training: those that a calibration counts."""
    for row in rows:
        model(row[None])


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor) -> float:
    model.eval()
    losses = [model(row[None], labels=row[None]).loss.double() for row in rows]
    return float(torch.stack(losses).mean().exp())


def results(options: argparse.Namespace) -> Iterator[tuple[str, float, float]]:
    """Name, perplexity, seconds of conversion and start."""
    dense = load_model(options.base, torch.float32)
    tokenizer = load_tokenizer(options.base)
    test = windows(options.test, options.windows, tokenizer)
    seen = windows(options.calibration, 8, tokenizer)
    yield "float", perplexity(dense, test), 0.0
    for name in options.starts:
        model = copy.deepcopy(dense).train()
        began = time.perf_counter()
        report = convert(model, r=options.r, **STARTS[name])
        if report.calibration is not None:
            rows = seen[0].view(4, 128)[:2] if "2 x 128" in name else seen
            feed(model, rows)
            calibrate(model)
        seconds = time.perf_counter() - began
        yield name, perplexity(model, test), seconds


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test")
    parser.add_argument("calibration")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--base", help="hub name or folder of another model")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    print("| start | perplexity | seconds |\n| --- | --- | --- |")
    for name, value, seconds in results(parser.parse_args(args)):
        print(f"| {name} | {value:.2f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
