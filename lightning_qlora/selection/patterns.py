"""Patterns of names, as in PEFT: one matcher for all arguments, and entries of adapter_config.json, that name layers.

"layers[.]1[.].*_proj"           a text: a regular expression for the whole name
["q_proj", "mlp.up_proj"]        a list: name endings
{"mlp.up_proj": 8, "^head": 4}   a dict: each key is a name ending, or a regular expression for one
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import regex

from lightning_qlora.checks import shown
from lightning_qlora.layers.names import name_endings, outer_names

SECONDS = 1.0  # of the thread, that the expressions of an argument may take: files of others have some
SECONDS_OF_A_NAME = 1e-3  # in addition; usual expressions take a hundredth of it


class Patterns:
    """The patterns of one argument. Names and endings are looked up, however many there are; expressions are tried."""

    def __init__(self, patterns: str | Iterable[str] | None) -> None:
        self._patterns: Any = patterns
        self.texts = [patterns] if isinstance(patterns, str) else list(patterns or ())
        self._names: dict[str, str] = {}
        self._endings: dict[str, str] = {}
        self._expressions: dict[str, Any] = {}  # compiled
        self._seconds = SECONDS
        self._order = {text: number for number, text in enumerate(self.texts)}
        for text in self._order:
            if isinstance(patterns, str):
                self._expressions[text] = _compiled(text)
            elif isinstance(patterns, Mapping):
                self._add_key(text)
            else:
                self._endings[text] = text

    def _add_key(self, key: str) -> None:
        """As PEFT matches keys (peft/utils/other.py, get_pattern_key)."""
        escaped = key.removeprefix("^")
        literal = re.sub(r"\\(.)", r"\1", escaped)
        place = self._endings if escaped == key else self._names
        if literal and re.escape(literal) == escaped and literal not in place:
            place[literal] = key
        else:
            self._expressions[key] = _compiled(rf"(.*\.)?({key})$")

    def of_name(self, name: str) -> Iterator[str]:
        if name in self._names:
            yield self._names[name]
        if self._endings:
            yield from (self._endings[ending] for ending in name_endings(name) if ending in self._endings)
        self._seconds += SECONDS_OF_A_NAME
        yield from (text for text in self._expressions if self._matches(text, name))

    def _matches(self, text: str, name: str) -> bool:
        start = time.thread_time()
        try:
            return self._expressions[text].fullmatch(name, timeout=max(self._seconds, 0)) is not None
        except TimeoutError:
            raise ValueError(f"{shown(text)}: this regular expression takes too long. Use a simpler one.") from None
        finally:
            self._seconds -= time.thread_time() - start

    def match(self, names: Iterable[str]) -> bool:
        return self.first(names) is not None

    def match_outer(self, names: Iterable[str]) -> bool:
        return self.match(outer for name in names for outer in outer_names(name) if outer or not name)

    def first(self, names: Iterable[str]) -> str | None:
        if not self.texts:
            return None
        matching = {text for name in names for text in self.of_name(name)}
        return min(matching, key=self._order.__getitem__, default=None)

    def value(self, names: Iterable[str], default: Any) -> Any:
        key = self.first(names)
        return default if key is None else self._patterns[key]


def _compiled(text: str) -> Any:
    """As `re.compile`, of which `fullmatch` has no end: "(a|aa)+b" has 2^n paths through n letters."""
    try:
        return regex.compile(text)
    except (regex.error, RecursionError) as error:  # of too many groups in groups
        raise ValueError(
            f"{shown(text)}: this regular expression can't be used ({error}). Use a simpler one."
        ) from None
