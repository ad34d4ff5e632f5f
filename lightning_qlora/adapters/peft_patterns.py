"""Regular expressions from a file of someone else: refused if Python's `re` could run for years with them."""

import sys
from collections.abc import Callable, Collection, Iterable
from importlib import import_module
from typing import Any

from lightning_qlora.checks import check_dict, check_patterns

# The parser of `re`, which has no public name.
_parser: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
LONGEST = 4000  # characters of an expression
MOST_WAYS = 10**7  # in which `re` may match the expressions of a file with one name; it tries about as many in a second
MOST_FOR_ALL = 10**8  # with all names


def check_patterns_of_file(name: str, patterns: Any, check: Callable[[str, Any], None]) -> None:
    """`checks.check_patterns`, and raise ValueError if an expression is too long to compile."""
    check_dict(name, patterns)
    if (longest := max(map(len, patterns), default=0)) > LONGEST:
        raise ValueError(f"{name}: a pattern of {longest} characters is longer than {LONGEST}.")
    check_patterns(name, patterns, check)


def check_few_ways(argument: str, patterns: Iterable[str], names: Collection[str]) -> None:
    """Raise ValueError if `re` may try too many ways to match patterns with the names of layers, as (a+)+$."""
    total, length = 0, max(map(len, names), default=0)
    for pattern in patterns:
        total += _ways(_parser.parse(pattern), length)
        if total > MOST_WAYS or total * len(names) > MOST_FOR_ALL:
            raise ValueError(
                f"{argument}: {pattern[:80]!r} may take years to match. Write the names of the layers in the file; or "
                "if you trust a checkpoint, convert the module with lightning_qlora.convert and these arguments, and "
                "call its load_state_dict."
            )


def _ways(parts: Iterable[tuple[Any, Any]], length: int) -> int:
    """A bound for the number of ways in which `re` can match a sequence of parts, at most MOST_WAYS + 1."""
    ways, repetitions = 1, 0
    for part in parts:
        word, value = str(part[0]), part[1]
        if word == "BRANCH":
            ways *= sum(_ways(branch, length) for branch in value[1])
        elif word == "GROUPREF_EXISTS":
            ways *= sum(_ways(branch, length) for branch in value[1:] if branch is not None)
        elif word in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
            ways *= _ways(value[-1], length)
        elif word == "ATOMIC_GROUP":
            ways *= _ways(value, length)
        elif word.endswith("_REPEAT"):
            least, most = (min(int(bound), length) for bound in value[:2])
            repetitions += most > least
            # n repetitions of single characters share one name: of n^k ways to split it, one of k! is in order.
            ways = ways * (most - least + 1) // max(repetitions, 1) * _ways(value[2], length) ** most
        ways = min(ways, MOST_WAYS + 1)
    return ways
