"""Multiple-choice tasks: read the items, and choose the answer with the largest log-likelihood per byte.

A line of TASK.jsonl has one context, or one context for each choice (partial scoring, as in WinoGrande):

    {"context": "Question: ...\\nAnswer:", "choices": [" one", " two"], "gold": 0}
    {"contexts": ["... so Sarah", "... so Maria"], "choices": [" left.", " left."], "gold": 1}

A row of a batch holds one item: the tokens that all its choices begin with, then the rest of each choice. A rest
attends to itself and to the common tokens, so the log-likelihoods are those of separate rows, with fewer tokens.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORM = 'A line is {"context": TEXT, "choices": [TEXT, TEXT, ...], "gold": INDEX}, or has "contexts": [TEXT, TEXT, ...].'
PADDING = -1


class Item(NamedTuple):
    """One question: a context and a continuation for each choice, and the index of the right choice."""

    contexts: list[str]
    choices: list[str]
    gold: int


class Row(NamedTuple):
    """An item as tokens: those that all choices begin with, then the rest of each choice.

    Attributes:
        tokens, positions: Each token, and its place in the text that it belongs to.
        parts: 0 for a common token, k + 1 for one of choice k.
        sources, targets: For each choice: where the logits of its scored tokens are in the row, and those tokens.
    """

    tokens: list[int]
    positions: list[int]
    parts: list[int]
    sources: list[list[int]]
    targets: list[list[int]]


def read_tasks(folder: str | Path, limit: int | None = None) -> dict[str, list[Item]]:
    """Task name -> its first `limit` items, from every TASK.jsonl of a folder.

    Raises:
        ValueError: If there is no task, or a line is not as above: names file, line and reason of the first five.
    """
    files = sorted(Path(folder).glob("*.jsonl"))
    if not files:
        raise ValueError(f"--data {folder}: has no TASK.jsonl. {FORM}")
    tasks = {}
    wrong = []
    for file in files:
        items = []
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
            if line.strip():
                try:
                    items.append(parse(line))
                except ValueError as error:
                    wrong.append(f"{file}, line {number}: {error}")
        if len(items) < 2 and not wrong:
            wrong.append(f"{file}: has {len(items)} items, and a standard error needs two.")
        tasks[file.stem] = items[:limit]
    if wrong:
        more = f"\n... and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError("\n".join(wrong[:5]) + f"{more}\n{FORM}")
    return tasks


def parse(line: str) -> Item:
    """An item from a line of JSON; other keys than those above are ignored."""
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(item, dict):
        raise ValueError(f"is not a JSON object: {line[:60]}")
    choices = item.get("choices")
    gold = item.get("gold")
    if not _texts(choices) or len(choices) < 2 or not all(choices):
        raise ValueError(f"choices={choices!r}: must be two or more texts, none of them empty")
    if ("context" in item) == ("contexts" in item):
        raise ValueError("must have either context or contexts")
    contexts = item["contexts"] if "contexts" in item else [item["context"]] * len(choices)
    if not _texts(contexts) or len(contexts) != len(choices):
        raise ValueError("context must be a text, and contexts a list with one text for each choice")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise ValueError(f"gold={gold!r}: must be an integer from 0 to {len(choices) - 1}")
    return Item(contexts, choices, gold)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def encode(item: Item, tokenizer: PreTrainedTokenizerBase, longest: int) -> Row:
    """The row of an item. Tokens are scored from the first one that the context alone does not have."""
    first = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    texts = [context + choice for context, choice in zip(item.contexts, item.choices, strict=True)]
    encoded = tokenizer(texts + item.contexts, add_special_tokens=False).input_ids
    # Without a context nothing predicts the first token, except a special token in front of it.
    front = [] if all(encoded[len(texts) :]) else first
    whole, contexts = ([front + ids for ids in part] for part in (encoded[: len(texts)], encoded[len(texts) :]))
    if max(map(len, whole)) > longest:
        raise ValueError(f"an item has more tokens than the model has positions ({longest}): {texts[0][:60]!r} ...")
    common = common_length(*whole)
    row = Row(whole[0][:common], list(range(common)), [0] * common, [], [])
    for choice, (ids, context) in enumerate(zip(whole, contexts, strict=True)):
        scored = common_length(ids, context)
        offset = len(row.tokens) - common
        row.sources.append([at if at < common else at + offset for at in range(scored - 1, len(ids) - 1)])
        row.targets.append(ids[scored:])
        row.tokens.extend(ids[common:])
        row.positions.extend(range(common, len(ids)))
        row.parts.extend([choice + 1] * (len(ids) - common))
    return row


def common_length(*lists: list[int]) -> int:
    """How many elements the lists begin with in common."""
    return next((at for at, each in enumerate(zip(*lists, strict=False)) if len(set(each)) > 1), min(map(len, lists)))


@torch.inference_mode()
def log_likelihoods(model: PreTrainedModel, rows: list[Row]) -> list[list[float]]:
    """For each row the log-likelihood of each choice, in nats."""
    size = max(len(row.tokens) for row in rows)
    device = model.device

    def stack(lists: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([each + [filler] * (size - len(each)) for each in lists], device=device)

    parts = stack([row.parts for row in rows], PADDING)
    seen = (parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])
    hidden = model.base_model(
        input_ids=stack([row.tokens for row in rows], 0),
        position_ids=stack([row.positions for row in rows], 0),
        attention_mask=seen.tril()[:, None],
        use_cache=False,
    ).last_hidden_state
    sources = torch.tensor([i * size + at for i, row in enumerate(rows) for each in row.sources for at in each])
    targets = torch.tensor([token for row in rows for each in row.targets for token in each])
    head = model.get_output_embeddings()
    flat = hidden.flatten(0, 1)
    losses = [  # in pieces: the logits of a whole batch take more memory than the model
        F.cross_entropy(head(flat[at]).float(), token, reduction="none")
        for at, token in zip(sources.to(device).split(512), targets.to(device).split(512), strict=True)
    ]
    values = iter((-torch.cat(losses)).cpu().split([len(each) for row in rows for each in row.targets]))
    return [[next(values).double().sum().item() for _ in row.targets] for row in rows]


def batches(rows: list[Row], tokens: int) -> Iterator[list[int]]:
    """Indices of rows of similar length, the longest first, at most `tokens` with padding (or one row)."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].tokens))
    while order:
        count = max(1, tokens // len(rows[order[0]].tokens))
        yield order[:count]
        order = order[count:]


def correct(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[Item], tokens: int = 1024
) -> list[int]:
    """For each item 1 if the choice with the largest log-likelihood per byte is the right one, else 0."""
    longest = getattr(model.config, "max_position_embeddings", None) or 10**9
    rows = [encode(item, tokenizer, longest) for item in items]
    result = [0] * len(items)
    for chosen in batches(rows, tokens):
        for index, scores in zip(chosen, log_likelihoods(model, [rows[i] for i in chosen]), strict=True):
            item = items[index]
            each = [score / len(choice.encode()) for score, choice in zip(scores, item.choices, strict=True)]
            result[index] = int(max(range(len(each)), key=each.__getitem__) == item.gold)
    return result
