"""Questions about the Python standard library of this machine, answered with its docstrings."""

import ast
import hashlib
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from smollm2 import load_tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

IGNORE = -100  # label that cross entropy and torchmetrics ignore
NOT_A_LIBRARY = {"idlelib", "lib2to3", "test", "turtledemo"}  # programs that are installed with Python
INSTRUCTION = "You are the documentation of Python's standard library. Answer in one short paragraph."


class Pair(NamedTuple):
    """One question about one public name, and the first paragraph of its docstring."""

    name: str
    question: str
    answer: str

    @property
    def random_number(self) -> int:
        """Make a number from the name: the same on every machine."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16)

    @property
    def held_out(self) -> bool:
        """Whether the pair is for validation: always the same tenth of the names."""
        return self.random_number % 10 == 0


def source_files() -> Iterator[tuple[str, Path]]:
    """Yield name and file of every public module of the standard library that is written in Python."""
    root = Path(sysconfig.get_path("stdlib"))
    for top in sorted(sys.stdlib_module_names - NOT_A_LIBRARY):
        for file in [root / f"{top}.py", *sorted((root / top).rglob("*.py"))]:
            parts = file.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if file.is_file() and not any(part.startswith("_") or part in ("test", "tests") for part in parts):
                yield ".".join(parts), file


def documented(node: ast.AST, name: str) -> Iterator[Pair]:
    """Yield a pair for every public function and class below `node`, methods included."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or child.name.startswith("_"):
            continue
        full = f"{name}.{child.name}"
        is_class = isinstance(child, ast.ClassDef)
        answer = " ".join((ast.get_docstring(child) or "").split("\n\n")[0].split())
        if 20 <= len(answer) <= 300 and answer[0].isupper() and answer[-1] == ".":  # prose, not a signature or a table
            yield Pair(full, f"What is `{full}`?" if is_class else f"What does `{full}` do?", answer)
        if is_class:
            yield from documented(child, full)


def read_pairs() -> list[Pair]:
    """Collect the pairs of this machine, sorted by name; an answer that occurs twice is used once.

    The source files are parsed and not imported, so no code of the standard library runs.
    """
    pairs: dict[str, Pair] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some old files contain invalid escape sequences
        for module, file in source_files():
            for pair in documented(ast.parse(file.read_bytes()), module):
                pairs.setdefault(pair.answer.lower(), pair)
    return sorted(pairs.values())


def prompt_for(question: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Format the question with the chat template of the model, up to the beginning of the answer."""
    turns = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def encode(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Tokenize a pair; only the answer and the end-of-turn token have labels."""
    prompt = tokenizer(prompt_for(pair.question, tokenizer), add_special_tokens=False).input_ids
    answer = tokenizer(pair.answer + tokenizer.eos_token, add_special_tokens=False).input_ids
    return {"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer}


def pad(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Stack examples to [batch, longest], padded on the right; padding is masked and has no label."""
    longest = max(len(example["input_ids"]) for example in examples)

    def stack(rows: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])

    return {
        "input_ids": stack([example["input_ids"] for example in examples], 0),
        "attention_mask": stack([[1] * len(example["input_ids"]) for example in examples], 0),
        "labels": stack([example["labels"] for example in examples], IGNORE),
    }


class DocstringQA(LightningDataModule):
    """Question-answer pairs from the docstrings of the standard library.

    Args:
        base: Hub name or folder of the model whose tokenizer is used. Default: SmolLM2-135M-Instruct.
        batch_size: Pairs in a batch.
        held_out: Largest number of pairs for validation.
        seed: Seed of the order of the training pairs.
    """

    def __init__(self, base: str | None = None, batch_size: int = 16, held_out: int = 128, seed: int = 0) -> None:
        super().__init__()
        self.base, self.batch_size, self.held_out, self.seed = base, batch_size, held_out, seed
        self.pairs: list[Pair] = []
        self.train: list[dict[str, list[int]]] = []
        self.val: list[dict[str, list[int]]] = []

    def setup(self, stage: str) -> None:
        if self.pairs:
            return
        tokenizer = load_tokenizer(self.base)
        self.pairs = read_pairs()
        held_out = sorted((pair for pair in self.pairs if pair.held_out), key=lambda pair: pair.random_number)
        self.train = [encode(pair, tokenizer) for pair in self.pairs if not pair.held_out]
        self.val = [encode(pair, tokenizer) for pair in held_out[: self.held_out]]

    def train_dataloader(self) -> DataLoader:
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, self.batch_size, shuffle=True, generator=order, collate_fn=pad, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size, collate_fn=pad)
