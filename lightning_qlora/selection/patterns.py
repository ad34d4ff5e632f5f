"""Patterns of names, as in PEFT: one matcher for all arguments, and entries of adapter_config.json, that name layers.

"layers[.]1[.].*_proj"           a text: a regular expression for the whole name
["q_proj", "mlp.up_proj"]        a list: name endings
{"mlp.up_proj": 8, "^head": 4}   a dict: each key is a name ending, or a regular expression for one
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning_qlora.layers.names import name_endings, outer_names


class Patterns:
    """The patterns of one argument. Names and endings are looked up, however many there are; expressions are tried."""

    def __init__(self, patterns: str | Iterable[str] | None) -> None:
        self._patterns: Any = patterns
        self.texts = [patterns] if isinstance(patterns, str) else list(patterns or ())
        self._names: dict[str, str] = {}
        self._endings: set[str] = set()
        self._expressions: dict[str, re.Pattern[str]] = {}
        self._order = {text: number for number, text in enumerate(self.texts)}
        for text in self._order:
            if isinstance(patterns, str):
                self._expressions[text] = re.compile(text)
            elif not isinstance(patterns, Mapping) or re.escape(text) == text:
                self._endings.add(text)
            elif text == "^" + re.escape(name := re.sub(r"\\(.)", r"\1", text[1:])):
                self._names.setdefault(name, text)
            else:
                self._expressions[text] = re.compile(rf"(.*\.)?({text})$")  # as PEFT matches keys (get_pattern_key)

    def of_name(self, name: str) -> Iterator[str]:
        if name in self._names:
            yield self._names[name]
        if self._endings:
            yield from (ending for ending in name_endings(name) if ending in self._endings)
        yield from (text for text, expression in self._expressions.items() if expression.fullmatch(name))

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
