"""Checks of arguments and of values in configs and files.

TypeError: the wrong type; ValueError: a value that is not allowed. The message has the argument's name, its value, and
what is allowed.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Sized
from numbers import Real
from typing import Any

NOT_FINITE = "holds NaN or Inf"
DIVERGED = "The training diverged, or the file is damaged: use one that was saved earlier."
DAMAGED = "The file is damaged: copy it again, or save it again."
KEEP_DENSE = "name the layers in exclude_modules, which keeps them dense and frozen"
TRAIN_IN_FULL = "name the modules in modules_to_save, which trains them in full"


def shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int of more than 4300 digits
        return f"{type(value).__name__} of thousands of digits"
    if len(text) > 200:
        return f"{text[:200]}... ({len(text)} characters)"
    return text


def one_line(error: Exception) -> str:
    """Type and message of an error, on one line; both ends of a long message, as what to do often stands last."""
    text = " ".join(str(error).split())
    if len(text) > 500:
        text = f"{text[:250]} ... {text[-250:]}"
    return f"{type(error).__name__}: {text}"


def first_of(names: Iterable[str], count: int) -> str:
    every = list(names)
    text = ", ".join(every[:count])
    if len(every) > count:
        text += ", ..."
    return text


def check_finite(name: str, values: Any, advice: str) -> None:
    low, high = values.aminmax()  # needs no tensor of the size of `values`
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(f"{name} {NOT_FINITE}. {advice}")


def check_converted(module: Any, layers: Sized) -> None:
    if not layers:
        raise ValueError(
            f"{type(module).__name__} has no adapter. Convert it first: Trainer.fit and fabric.setup do so with "
            "plugins=QLoRAPrecision(), or call lightning_qlora.convert(module)."
        )


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`, and of the same type (1 is not True)."""
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        words = ", ".join(map(repr, allowed))
        raise ValueError(f"{name}={shown(value)}: must be one of {words}.")


class RemovedStartError(ValueError):
    """A value of `init_lora_weights` that earlier versions had."""


def check_initialization(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if isinstance(value, str) and value.lower().startswith(("loftq", "pissa")):
        raise RemovedStartError(
            f"{name}={shown(value)}: was taken out, because training ends behind 'calibrated', which has as many bytes "
            "and keeps the plain 4-bit base. Use 'calibrated' or 'default'; merge a file that has it with the version "
            "that wrote it, or export it there for the base in 16 bits (lightning-qlora export --base float)."
        )
    check_choice(name, value, allowed)


def check_token_indices(name: str, value: Any) -> None:
    lists = [value]
    if isinstance(value, dict):
        check_dict(name, value)
        lists = list(value.values())
    for indices in lists:
        _check(isinstance(indices, list) and indices != [], name, value, "a list of indices, or a dict of such lists")
        for index in indices:
            check_integer(f"index in {name}", index, at_least=0)
        if len(set(indices)) < len(indices):
            raise ValueError(f"{name}={shown(value)}: an index stands in a list more than once. Name it once.")


def check_bool(name: str, value: Any) -> None:
    _check(isinstance(value, bool), name, value, "True or False")


def check_auto(name: str, value: Any) -> None:
    _check(isinstance(value, (bool, str)), name, value, "True, False or 'auto'")
    check_choice(name, value, (True, False, "auto"))


UNITS = {"": 1, **{f"{letter}B": 1000**power for power, letter in enumerate("KMG", 1)}}
UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMG", 1)}


def parse_memory(name: str, text: str) -> int:
    """Bytes of a text such as 24GiB (24 * 2^30), 24GB (24 * 10^9) or 24000000000; ValueError for other texts."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?b)?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ValueError(f"{name}={text!r}: must be a number with a unit, such as 24GiB, or a number of bytes.")
    count = int(float(match[1]) * UNITS[(match[2] or "").upper()])
    if count < UNITS["MB"]:
        raise ValueError(f"{name}={text!r} is {count} bytes. Give a unit, such as 24GiB.")
    return count


def memory_limit(value: int | str) -> int:
    return parse_memory("gradient_checkpointing", str(value))


def check_gradient_checkpointing(name: str, value: Any) -> None:
    allowed = "True, False, 'auto', 'offload', or bytes such as '8GiB'"
    _check(isinstance(value, (bool, int, str)), name, value, allowed)
    if not isinstance(value, bool) and value not in ("auto", "offload"):
        try:
            memory_limit(value)
        except ValueError as error:
            raise ValueError(f"{name}={shown(value)}: must be {allowed}.") from error


def check_module(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a module; this does not import torch."""
    _check(hasattr(value, "named_modules"), name, value, "a torch.nn.Module: build or load it first")


def check_string(name: str, value: Any) -> None:
    _check(isinstance(value, str), name, value, "a string")


def check_integer(name: str, value: Any, at_least: float = -math.inf) -> None:
    _check(isinstance(value, int) and not isinstance(value, bool), name, value, "an integer")
    if value < at_least:
        raise ValueError(f"{name}={shown(value)}: must be an integer >= {at_least}.")


def check_number(
    name: str, value: Any, at_least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> None:
    _check(isinstance(value, Real) and not isinstance(value, bool), name, value, "a number")
    if not (at_least <= value < below and value > above):  # also refuses NaN
        limits = {">=": at_least, ">": above, "<": below}
        words = [f"{sign} {limit}" for sign, limit in limits.items() if math.isfinite(limit)]
        raise ValueError(f"{name}={shown(value)}: must be a finite number {' and '.join(words)}".rstrip() + ".")


def check_names(name: str, value: Any, or_regex: bool = False) -> None:
    allowed = "a list of non-empty names"
    if or_regex:
        allowed += ", or a regular expression"
        if isinstance(value, str):
            check_regex(name, value)
            return
    is_list = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
    _check(is_list, name, value, allowed)


def check_regex(name: str, value: str) -> None:
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name}={shown(value)}: not a valid regular expression ({error}).") from error


def check_dict(name: str, value: Any) -> None:
    is_dict = isinstance(value, dict) and all(isinstance(key, str) and key for key in value)
    _check(is_dict, name, value, "a dict whose keys are non-empty strings")


def check_patterns(name: str, value: Any, check: Callable[[str, Any], None]) -> None:
    check_dict(name, value)
    for pattern, item in value.items():
        check_regex(name, pattern)
        check(f"{name}[{shown(pattern)}]", item)


def _check(good: bool, name: str, value: Any, allowed: str) -> None:
    if not good:
        raise TypeError(f"{name}={shown(value)}: must be {allowed}.")


def install(extra: str) -> str:
    """The command that installs an extra of this package, which is on no package index yet."""
    return f'pip install ".[{extra}]" in a clone of the repository'


def refuse_unknown_arguments(names: Iterable[str], allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    for name in names:
        if name not in allowed:
            raise TypeError(f"{name}: there is no such argument here; {_answer(name, allowed)}")


def _answer(name: str, allowed: list[str]) -> str:
    similar = difflib.get_close_matches(name, allowed, 1)
    return f"did you mean {similar[0]}?" if similar else f"the arguments are {', '.join(allowed)}."
