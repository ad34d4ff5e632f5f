r"""PEFT's patterns from a file of someone else: matched in bounded time, where Python's `re` can run for years.

PEFT matches a key of `rank_pattern` or `alpha_pattern` as `re.match(rf"(.*\.)?({key})$", name)` (peft/utils/other.py,
get_pattern_key). Here the set of all places where a part of the expression can end is computed part by part, so nothing
is tried twice and the result is that of `re`.
"""

import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from typing import Any, NoReturn

from lightning_qlora.checks import check_dict, check_patterns

# The parser and the compiler of `re`, which have no public names.
_parser: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_compiler: Any = import_module("re._compiler" if sys.version_info >= (3, 11) else "sre_compile")
STEPS = 20_000  # parts of an expression that are tried for one name
LONGEST = 4000  # characters of an expression
MOST_WAYS = 10**7  # in which `re` may match an expression; it tries about as many in a second
MOST_PATTERNS = 100  # expressions in one file; names, of which there may be one for each layer, do not count


class PatternError(ValueError):
    """A pattern that cannot be matched in bounded time."""


def check_patterns_of_file(name: str, patterns: Any, check: Callable[[str, Any], None]) -> None:
    """`checks.check_patterns`, and raise PatternError if an expression is too long, or if there are too many."""
    check_dict(name, patterns)
    if (longest := max(map(len, patterns), default=0)) > LONGEST:
        raise PatternError(f"{name}: a pattern of {longest} characters is longer than {LONGEST}.")
    if (count := sum(not _is_quick(pattern) for pattern in patterns)) > MOST_PATTERNS:
        raise PatternError(
            f"{name}: {count} regular expressions are more than {MOST_PATTERNS}. Write the names of the layers instead."
        )
    check_patterns(name, patterns, check)


def fits_peft_pattern(name: str, pattern: str) -> bool:
    """Whether PEFT's pattern names a layer; PatternError if it has flags or look-around, or needs over `STEPS`."""
    if _is_quick(pattern):
        return _compiled(pattern).match(name) is not None
    matcher, parsed = _Matcher(name, pattern), _parsed(pattern)
    if parsed.state.flags & ~re.UNICODE:
        matcher.refuse()
    return bool(matcher.ends(parsed, {0}))


def _is_quick(pattern: str) -> bool:
    """Whether `re` has only one way to match a pattern: it has no repetitions and no alternatives."""
    return not set(pattern) & set("*+?{|(")


def _whole(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(_whole(pattern))


@cache
def _parsed(pattern: str) -> Any:
    try:
        return _parser.parse(_whole(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(f"{pattern[:80]!r}: not a valid regular expression ({error}).") from error


_SINGLES: dict[str, re.Pattern[str]] = {}  # a character or a place in an expression, as `re` parsed and compiled it


def check_few_ways(argument: str, pattern: str, length: int) -> None:
    """Raise PatternError if `re` may try too many ways to match a pattern with a name of this length, as (a+)+$."""
    if _ways(_parser.parse(pattern), length) > MOST_WAYS:
        raise PatternError(
            f"{argument}: {pattern[:80]!r} may take years to match. If you trust the file, convert the module with "
            "lightning_qlora.convert and these arguments, and call its load_state_dict."
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


class _Matcher:
    def __init__(self, name: str, pattern: str) -> None:
        self.name, self.pattern, self.steps = name, pattern, 0

    def ends(self, parts: Iterable[tuple[Any, Any]], starts: set[int]) -> set[int]:
        """Where a sequence of parts can end if it starts at one of these places."""
        for part in parts:
            self.steps += 1 + len(starts)
            if self.steps > STEPS:
                self.refuse()
            word, value = str(part[0]), part[1]
            if word == "BRANCH":
                starts = set().union(*(self.ends(branch, starts) for branch in value[1]))
            elif word == "SUBPATTERN" and not value[1] and not value[2]:
                starts = self.ends(value[3], starts)
            elif word in ("MAX_REPEAT", "MIN_REPEAT"):
                least, most, body = value
                starts = self.repeated(least, int(most), body, starts)
            elif word in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):  # one character, or a place
                if repr(part) not in _SINGLES:
                    _SINGLES[repr(part)] = _compiler.compile(_parser.SubPattern(_parsed(self.pattern).state, [part]))
                single = _SINGLES[repr(part)]
                starts = {found.end() for i in starts if (found := single.match(self.name, i))}
            else:
                self.refuse()
        return starts

    def repeated(self, least: int, most: int, body: Any, starts: set[int]) -> set[int]:
        for _ in range(min(least, len(self.name) + 1)):  # after that many, only empty repetitions are left
            starts = self.ends(body, starts)
        found, new, count = set(starts), starts, least
        while new and count < most:
            new = self.ends(body, new) - found
            found |= new
            count += 1
        return found

    def refuse(self) -> NoReturn:
        raise PatternError(
            f"{self.pattern[:80]!r}: takes too long to match, or has flags, look-around or back-references. Write the "
            "names of the layers instead."
        )
