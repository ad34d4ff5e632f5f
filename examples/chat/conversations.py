"""Conversations as training examples: the model's chat template, with labels on the answers only."""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from docstring_qa import read_pairs
from lightning.pytorch import LightningDataModule
from smollm2 import load_tokenizer
from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler

IGNORE = -100  # label that the loss ignores
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
Messages = list[dict[str, str]]
Example = dict[str, list[int]]


def read(path: str | None) -> Iterator[Messages]:
    """Yield the conversations of a JSONL file or of a hub data set; None: questions about Python's standard library."""
    rows: Iterable[dict[str, Any]]
    if path is None:
        rows = ({"instruction": pair.question, "output": pair.answer} for pair in read_pairs())
    elif Path(path).is_file():
        rows = map(json.loads, filter(str.strip, Path(path).read_text(encoding="utf-8").splitlines()))
    else:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise FileNotFoundError(f"{path}: no such file. To read it from the hub: pip install datasets") from error
        rows = load_dataset(path, split="train")
    for row in rows:
        if "messages" in row:  # OpenAI's form
            yield row["messages"]
        elif "conversations" in row:  # ShareGPT's form
            yield [message(turn, path) for turn in row["conversations"]]
        elif "instruction" in row:  # Alpaca's form
            question = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
            yield [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
        else:
            raise ValueError(
                f"{path}: a row has {', '.join(row)}; expected `messages`, `conversations`, or `instruction` and "
                "`output`."
            )


def message(turn: dict[str, str], path: str | None) -> dict[str, str]:
    """A turn of ShareGPT's form in OpenAI's."""
    role = ROLES.get(turn.get("from", ""))
    if role is None or "value" not in turn:
        raise ValueError(
            f"{path}: a turn of `conversations` has {turn}; expected `from`, one of {', '.join(ROLES)}, and `value`. "
            "Write such a row as `messages`, with the roles that the model's chat template has."
        )
    return {"role": role, "content": turn["value"]}


def encode(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    """Tokenize a conversation; only what the model has to write has labels: the answers and their end-of-turn tokens.

    An answer is what the template adds to the prompt of a generation. Some templates write an earlier answer in another
    way when others follow (Qwen3 removes its thoughts). Then each answer is an example of its own, with the
    conversation before it as the model will see it.
    """

    def render(count: int, **options: bool) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, **options)

    turns = [
        (render(index, add_generation_prompt=True), render(index + 1))
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    for prompt, text in turns:
        if not text.startswith(prompt):
            raise ValueError(f"The chat template does not begin with its prompt {prompt!r} when it has the answer.")
    if turns and all(turns[-1][1].startswith(text) for _, text in turns):
        yield label(turns[-1][1], turns, tokenizer)
    else:
        for turn in turns:
            yield label(turn[1], [turn], tokenizer)


def label(text: str, turns: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Tokenize a text; the tokens that begin between a prompt and the end of its answer have labels."""
    spans = [(len(prompt), len(answered.rstrip())) for prompt, answered in turns]  # "\n" after the end of turn is input
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return {
        "input_ids": tokens.input_ids,
        "labels": [
            token if any(start <= at < end for start, end in spans) else IGNORE
            for token, (at, _) in zip(tokens.input_ids, tokens.offset_mapping, strict=True)
        ],
    }


def packs(examples: list[Example], tokens: int) -> list[list[Example]]:
    """Collect examples, in their order, into packs of at most so many tokens."""
    packed, size = [], tokens
    for example in examples:
        size += len(example["input_ids"])
        if size > tokens:
            packed.append([])
            size = len(example["input_ids"])
        packed[-1].append(example)
    return packed


class Order(Sampler):
    """The order of a sampler with a seed for each epoch, which a run that resumes there has too."""

    def __init__(self, sampler: RandomSampler | LengthGroupedSampler, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:  # Lightning calls it
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator.manual_seed(self.seed + self.epoch)
        yield from self.sampler


class Batches(DataLoader):
    """Batches of which a run that resumes within an epoch gets those that are left: Lightning saves the state."""

    taken = (0, 0)  # the epoch, and how many batches of it
    before = (0, 0)  # of the run that was interrupted

    def state_dict(self) -> dict[str, tuple[int, int]]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, tuple[int, int]]) -> None:
        self.before = state["taken"]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in super().__iter__():
            epoch, count = self.taken
            self.taken = (self.sampler.epoch, count + 1 if epoch == self.sampler.epoch else 1)
            if self.taken > self.before:
                yield batch


class Conversations(LightningDataModule):
    """Conversations from a file or the hub, in batches of similar lengths or in packs.

    Args:
        path: JSONL file or hub name. Default: questions about Python's standard library.
        base: Hub name or folder of the model, for its tokenizer and chat template.
        batch_size: Examples in a batch; a pack has up to batch_size x max_length tokens.
        max_length: Tokens after which an example is cut; examples without an answer before it are left out.
        pack: Whether a batch is one row of examples without padding, with position_ids that begin at 0 in each.
        held_out: Conversations for validation; a tenth of all if these are fewer.
        seed: Seed of the split and of the order.
    """

    def __init__(
        self, path: str | None = None, base: str | None = None, batch_size: int = 4, max_length: int = 512,
        pack: bool = False, held_out: int = 64, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.path, self.base, self.batch_size, self.max_length = path, base, batch_size, max_length
        self.pack, self.held_out, self.seed = pack, held_out, seed

    def setup(self, stage: str) -> None:
        tokenizer = load_tokenizer(self.base)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE)
        conversations = list(read(self.path))
        random.Random(self.seed).shuffle(conversations)
        held_out = min(self.held_out, len(conversations) // 10)
        self.val, self.train = (
            [example for messages in part for example in self.examples(messages, tokenizer)]
            for part in (conversations[:held_out], conversations[held_out:])
        )
        if not self.train:
            raise ValueError(
                f"{self.path}: of {len(conversations)} conversations none has an answer in its first "
                f"{self.max_length} tokens. Set data.max_length, or look at the data."
            )

    def examples(self, messages: Messages, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
        for example in encode(messages, tokenizer):
            cut = {key: values[: self.max_length] for key, values in example.items()}
            if any(token != IGNORE for token in cut["labels"]):
                yield cut

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator()  # the batches draw nothing from that of dropout
        if self.pack:
            rows = packs(self.train, self.batch_size * self.max_length)
            order = Order(RandomSampler(rows, generator=generator), self.seed)
            return Batches(rows, None, sampler=order, generator=generator, collate_fn=DataCollatorWithFlattening())
        lengths = [len(example["input_ids"]) for example in self.train]
        order = Order(LengthGroupedSampler(self.batch_size, lengths=lengths, generator=generator), self.seed)
        return Batches(self.train, self.batch_size, sampler=order, generator=generator, collate_fn=self.pad)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size, collate_fn=self.pad)
