"""Whether a regular expression matches a whole name, in a number of steps that is bounded: files of others have some.

Python's `re` tries one path after the other, of which "(a+)+b" has 2^n for n letters. Where an expression may have many
paths, all positions that it can be at are kept as the bits of one number, and each part of the expression moves them:

    text a a b     positions 0 1 2 3     "a*" moves 0001, the start, to 0111; then "b" moves that to 1000, the end
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from lightning_qlora.checks import shown

try:
    from re import _compiler, _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_compile as _compiler
    import sre_parse as _parser

MANY = 2_000  # paths; with fewer `re` is quicker
PATHS_OF_A_STEP = 40  # which take as long as a step, as do LETTERS_OF_A_STEP
LETTERS_OF_A_STEP = 4
MOST_STEPS = 1_000_000  # about 1 s, and for each name the steps that usual expressions take
STEPS_OF_A_NAME = 200
# Parts that match one character.
CHARACTERS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
REPEATS = ("MAX_REPEAT", "MIN_REPEAT")


class Steps:
    def __init__(self, left: int = MOST_STEPS) -> None:
        self._left = left

    def add(self) -> None:
        self._left += STEPS_OF_A_NAME

    def take(self, text: str, count: int = 1) -> None:
        self._left -= count
        if self._left < 0:
            raise ValueError(f"{shown(text)}: this regular expression takes too long. Use a simpler one.")


class Expression:
    """A regular expression, as `re.compile(text).fullmatch`."""

    def __init__(self, text: str, steps: Steps) -> None:
        self.text = text
        self._steps = steps
        self._compiled = re.compile(text)
        self._tree = _parser.parse(text)
        self._flags = self._tree.state.flags
        self._paths: dict[int, int] = {}  # by the length of a name
        self._tests: dict[tuple[int, int], Any] = {}  # a part and its flags -> `re`'s test of it
        self._matching: dict[tuple[int, int, str], bool] = {}  # with a character
        self._name = ""
        self._where: dict[str, int] = {}  # the places of each character in the name
        self._characters_of: dict[tuple[int, int], int] = {}  # a part and its flags -> their places in the name

    def matches(self, name: str) -> bool:
        try:
            return self._matches(name)
        except RecursionError:
            raise ValueError(f"{shown(self.text)}: this regular expression has too many groups in groups.") from None

    def _matches(self, name: str) -> bool:
        if len(name) not in self._paths:
            self._steps.take(self.text, len(self.text) // LETTERS_OF_A_STEP)
            self._paths[len(name)] = paths(self._tree, len(name))
        count = self._paths[len(name)]
        if count <= MANY:
            self._steps.take(self.text, 1 + count // PATHS_OF_A_STEP)
            return self._compiled.fullmatch(name) is not None
        self._steps.take(self.text, 1 + len(name) // LETTERS_OF_A_STEP)
        self._name = name
        self._where = {}
        self._characters_of = {}
        for place, character in enumerate(name):
            self._where[character] = self._where.get(character, 0) | 1 << place
        return bool(self._sequence(self._tree, 1, self._flags) >> len(name) & 1)

    def _sequence(self, parts: Any, places: int, flags: int) -> int:
        self._steps.take(self.text)
        for part in parts:
            if not places:
                return 0
            places = self._part(part, places, flags)
        return places

    def _part(self, part: Any, places: int, flags: int) -> int:
        """The places after a part of the expression, from the places before it."""
        self._steps.take(self.text)
        kind, value = part
        name = kind.name
        if name in CHARACTERS:
            return (places & self._characters(part, flags)) << 1
        if name in REPEATS:
            least, most, parts = value
            return self._repeat(least, most, parts, places, flags)
        if name == "SUBPATTERN":
            _, added, removed, parts = value
            return self._sequence(parts, places, flags & ~removed | added)
        if name == "BRANCH":
            after = 0
            for parts in value[1]:
                after |= self._sequence(parts, places, flags)
            return after
        if name in ("ASSERT", "ASSERT_NOT"):
            direction, parts = value
            self._steps.take(self.text, 2 * places.bit_count())
            found = _places(place for place in _bits(places) if self._looks(direction, parts, place, flags))
            return found if name == "ASSERT" else places & ~found
        if name == "AT":
            test = self._test(part, flags)
            self._steps.take(self.text, places.bit_count())
            return _places(place for place in _bits(places) if test.match(self._name, place))
        if name == "FAILURE":
            return 0
        raise ValueError(
            f"{shown(self.text)}: this regular expression may take too long: it repeats what has choices, and refers "
            "to what it matched before. Use a simpler one."
        )

    def _characters(self, part: Any, flags: int) -> int:
        """The places of the name that have a character which the part matches."""
        kind, value = part
        if kind.name == "LITERAL" and not flags & re.IGNORECASE:
            return self._where.get(chr(value), 0)
        if (id(part), flags) not in self._characters_of:
            self._steps.take(self.text, len(self._where) // LETTERS_OF_A_STEP)
            places = 0
            for character, its_places in self._where.items():
                key = (id(part), flags, character)
                if key not in self._matching:
                    self._matching[key] = self._test(part, flags).fullmatch(character) is not None
                if self._matching[key]:
                    places |= its_places
            self._characters_of[id(part), flags] = places
        return self._characters_of[id(part), flags]

    def _repeat(self, least: int, most: int, parts: Any, places: int, flags: int) -> int:
        rounds = 2 * len(self._name) + 2  # after which more rounds reach nothing else
        for _ in range(min(least, rounds)):
            places = self._sequence(parts, places, flags)
        if len(parts) == 1 and parts[0][0].name in CHARACTERS and most - least >= len(self._name):
            self._steps.take(self.text, 2)
            return _along(self._characters(parts[0], flags), places, len(self._name))
        new = places
        for _ in range(min(most - least, rounds)):
            new = self._sequence(parts, new, flags) & ~places
            if not new:
                break
            places |= new
        return places

    def _looks(self, direction: int, parts: Any, place: int, flags: int) -> bool:
        """Whether what an assertion has matches after a place, or before it."""
        if direction > 0:
            return self._sequence(parts, 1 << place, flags) != 0
        width, _ = parts.getwidth()
        return place >= width and bool(self._sequence(parts, 1 << place - width, flags) >> place & 1)

    def _test(self, part: Any, flags: int) -> Any:
        key = (id(part), flags)
        if key not in self._tests:
            parts = _parser.SubPattern(_parser.State(), [part])
            self._tests[key] = _compiler.compile(parts, flags)
        return self._tests[key]


def paths(parts: Sequence[Any], length: int) -> int:
    """At most how many paths `re` has through parts of an expression, in a name of this length; capped."""
    count = 1
    for kind, value in parts:
        name = kind.name
        if name == "BRANCH":
            count *= sum(paths(branch, length) for branch in value[1])
        elif name == "SUBPATTERN":
            count *= paths(value[3], length)
        elif name in ("ASSERT", "ASSERT_NOT"):
            count *= paths(value[1], length)
        elif "REPEAT" in name:
            least, most, repeated = value
            inner = paths(repeated, length)
            times = min(most, length + 1)
            count *= 1 + max(times - least, 0) if inner == 1 else (1 + inner) ** min(times, MANY.bit_length())
        elif name == "ATOMIC_GROUP":
            count *= paths(value, length)
        elif name in ("GROUPREF", "GROUPREF_IGNORE"):  # a text that was matched before
            count *= 1 + length
        elif not (name in CHARACTERS or name in ("AT", "FAILURE")):
            return MANY + 1
        if count > MANY:
            return MANY + 1
    return count


def _along(matching: int, places: int, length: int) -> int:
    """The places that are reached from `places` by any number of characters that match, each by powers of two."""
    width = 1
    while width <= length:
        places |= (places & matching) << width
        matching &= matching >> width
        width *= 2
    return places


def _places(bits: Iterable[int]) -> int:
    return sum(1 << bit for bit in bits)


def _bits(places: int) -> list[int]:
    return [place for place in range(places.bit_length()) if places >> place & 1]
