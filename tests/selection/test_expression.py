"""Regular expressions match the names that `re` says, and none takes long."""

import re
import signal
import sys
from contextlib import suppress

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_qlora.selection import expression
from lightning_qlora.selection.expression import Expression, Steps
from lightning_qlora.selection.patterns import Patterns

NAMES = [f"model.layers.{n}.{part}_proj" for n in range(12) for part in ("self_attn.q", "self_attn.v", "mlp.up")]
HONEST = (
    r".*q_proj", r"(.*\.)?(.*q_proj)$", r".*layers.*self.*(q|v)_proj", r"(?:\w+\.)*(q|v)_proj",
    r"(?i)MODEL\..*UP_PROJ",
    r"^(?!.*self).*up_proj", r"model\.layers\.(?:[0-4]|1[01])\.mlp\.up_proj", r"(.+)\.(\w+)\.[qv]_proj\b",
    r".*(?<=q)_proj",
    r"(?:model|layers|\d+|self_attn|mlp|\.)+q_proj", r"(?s:.){5,40}_proj", r"(\w+)\.layers\.(\d)\.\w+\.(?:q|v)_proj",
)  # fmt: skip
OPENINGS = ("(", "(?:", "(?i:", "(?-i:", "(?=", "(?!")
ATOMS = (
    *("a", "b", ".", "[ab]", r"\w", r"\.", "[^a]", r"\d", "A"),
    *("^", "$", r"\b", r"\B", r"\A", r"\Z", "(?<=a)", "(?<!b)", "(?!)"),
)
REPEATS = ("", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0,2}?", "{2,}")
HOSTILE = (
    "(a+)+b", "([a-z]|[a-z]+)+!", "(a|aa)+$", "(.*)*b", "(?:a?){30}a{30}b", "a?" * 40 + "a" * 40 + "b", ".*" * 30 + "b",
    "(" * 30 + "a*" + ")*" * 30 + "b", "(?=(a+)+b)" * 9, "(a{1,1000}){1,1000}b", "(" + "|".join(["a"] * 50) + ")*b",
    "(?:a{2}|a{3}|a{5}){0,99999}b", "(a*)*(a*)*(a*)*b", r"(\w*\w*)*-", "(?:(?!b)a+)*b", "((a{0,9}){0,9}){0,9}b",
    r"(a*)*\1", "(?:a|(?:a|(?:a|(?:a|a*!)*!)*!)*!)*",
)  # fmt: skip


def texts(atoms):
    pieces = st.tuples(atoms, st.sampled_from(REPEATS)).map(lambda pair: f"(?:{pair[0]}){pair[1]}")
    branches = st.lists(pieces, max_size=3).map("".join)
    return st.lists(branches, min_size=1, max_size=3).map("|".join)


def groups(inner):
    return st.tuples(st.sampled_from(OPENINGS), inner).map(lambda pair: f"{pair[0]}{pair[1]})")


EXPRESSIONS = texts(st.sampled_from(ATOMS) | groups(texts(st.sampled_from(ATOMS))))


@pytest.fixture
def without_re(monkeypatch):
    """Every expression is matched by the places that it can be at."""
    monkeypatch.setattr(expression, "MANY", -1)


@given(st.sampled_from(("", "(?i)", "(?s)", "(?m)", "(?a)")), EXPRESSIONS, st.text("abA.1\né", max_size=5))
def test_places_are_those_of_re(flags, text, name):
    compiled = re.compile(flags + text)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        expected = compiled.fullmatch(name) is not None
    except TimeoutError:
        assume(False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    before, expression.MANY = expression.MANY, -1
    try:
        assert Expression(flags + text, Steps()).matches(name) == expected
    finally:
        expression.MANY = before


@pytest.fixture(autouse=True)
def _alarm():
    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("text", HONEST)
@pytest.mark.parametrize("many", [-1, expression.MANY])
def test_usual_expressions_match_the_same_names_in_both_ways(text, many, monkeypatch):
    monkeypatch.setattr(expression, "MANY", many)
    if r"\1" not in text:
        asked = Expression(text, Steps())
        assert [asked.matches(name) for name in NAMES] == [bool(re.fullmatch(text, name)) for name in NAMES]
        assert any(map(asked.matches, NAMES))


@pytest.mark.parametrize("text", HOSTILE)
def test_no_expression_takes_long(text, monkeypatch):
    """Counted, not measured: `re` would take years for most of these."""
    monkeypatch.setattr(expression, "MOST_STEPS", 50_000)
    steps = Steps(50_000)
    names = ("a" * 30, "a" * 100, "a" * 29 + "c")
    if text == HOSTILE[-1] or "1" in text[-2:]:
        with pytest.raises(ValueError, match=r"takes too long|may take too long"):
            [Expression(text, steps).matches(name) for name in names]
    else:
        expected = [text == "(a|aa)+$" and "c" not in name for name in names]
        assert [Expression(text, steps).matches(name) for name in names] == expected


@pytest.mark.parametrize(
    "text",
    [
        ".*" * 2000 + "!", "(?i:.*)" * 500 + "!", "(?=.*" * 20 + "x" + ")" * 20, r"(\w|.|[a-z]|\S)*!|" * 30 + "x",
        "(?:$|^|\\b|\\B|.)*!" * 9, "x" * 50_000,
    ],
    ids=lambda text: text[:9],
)  # fmt: skip
def test_a_step_is_a_small_piece_of_work(text, monkeypatch):
    """Calls of functions, counted: each pattern takes as many steps for a name as Python has to call some for it."""
    steps = Steps(50_000)
    expressions = [Expression(text, steps) for _ in range(2)]
    calls = []
    sys.setprofile(lambda frame, event, _: calls.append(1) if event == "call" else None)
    try:
        with suppress(ValueError):  # it takes too long
            for number in range(20):
                expressions[number % 2].matches("model.layers.10.self_attn.q_proj" + "a" * number)
    finally:
        sys.setprofile(None)
    assert len(calls) < 6 * (50_000 - steps._left)


def test_groups_in_groups_are_refused():
    with pytest.raises(ValueError, match="has too many groups in groups"):
        Expression("(a|" * 300 + ")*" * 300, Steps()).matches("a" * 40)


def test_a_usual_expression_may_be_asked_for_any_number_of_layers():
    patterns = Patterns(r"(?:\w+\.)*(q|v)_proj")
    before = patterns._steps._left
    assert all(patterns.match([f"model.layers.{number}.mlp.experts.{number}.q_proj"]) for number in range(300))
    assert patterns._steps._left >= before


def test_references_are_left_to_re_if_they_have_few_paths():
    assert Expression(r"(\w+)\.\1", Steps()).matches("ab.ab")
    assert not Expression(r"(\w+)\.\1", Steps()).matches("ab.aa")
    for text in (r"(a*)*\1", r"(?:(a)|b)*(?(1)c|d)(a+)+"):
        with pytest.raises(ValueError, match="may take too long"):
            Expression(text, Steps()).matches("a" * 30)


def test_the_steps_are_those_of_all_patterns_and_names_together():
    patterns = Patterns({"(a|aa)+x": 1, "(a|aa)+y": 2})
    patterns._steps._left = 20_000
    names = ["a" * 60 + str(number) for number in range(1000)]
    with pytest.raises(ValueError, match="takes too long"):
        patterns.value(names, None)
