import copy
import pickle
from collections import defaultdict

import pytest
import torch

from lightning_qlora.optim.paged_state import PagedState, tensors_in


class Recorder:
    def __init__(self, entries=()):
        self.written = []
        self.reads = 0
        self.state = PagedState(lambda param, value: self.written.append(value), self.read, dict(entries))

    def read(self):
        self.reads += 1


@pytest.fixture
def param():
    return torch.nn.Parameter(torch.zeros(2))


def test_every_way_to_set_a_value_pages_it(param):
    recorder = Recorder({param: {"a": 1}})
    entry = recorder.state[param]
    entry["b"] = 2
    entry.update({"c": 3}, d=4)
    assert entry.setdefault("e", 5) == 5
    assert entry.setdefault("e", 6) == 5
    entry |= {"f": 7}
    recorder.state["not a parameter"] = [8]
    recorder.state[torch.nn.Parameter(torch.zeros(1))]["missing"] = 9
    recorder.state |= {"another": 10}
    assert recorder.written == [1, 2, 3, 4, 5, 7, [8], 9, 10]
    assert entry == {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 7}
    assert [*recorder.state.values()] == [entry, [8], {"missing": 9}, 10]


READS = [
    lambda values, key: values[key],
    lambda values, key: values.get(key),
    lambda values, key: dict(values.items()),
    lambda values, key: list(values.values()),
    lambda values, key: values.setdefault(key),
    lambda values, key: copy.deepcopy(values),
    lambda values, key: copy.copy(values),
    lambda values, key: values.copy(),
    lambda values, key: {**values},
    lambda values, key: dict(values),
    lambda values, key: {} | values,
    lambda values, key: values | {},
    lambda values, key: {}.update(values),
    lambda values, key: values.pop(key),
    lambda values, key: values.popitem(),
]


def test_every_way_to_read_a_value_waits(param):
    for number, read in enumerate(READS):
        recorder = Recorder({param: {"a": 1}})
        entry = recorder.state[param]
        for values, key in ((entry, "a"), (recorder.state, param)):
            recorder.reads = 0
            read(values, key)
            assert recorder.reads > 0, number


def test_a_popped_entry_is_gone_and_a_missing_one_is_an_error(param):
    state = Recorder({param: {"a": 1}}).state
    assert state[param].pop("a") == 1
    assert state[param].pop("a", None) is None
    assert state[param].get("a", 5) == 5
    assert state[param].setdefault("b") is None
    assert state[param].popitem() == ("b", None)
    with pytest.raises(KeyError):
        state[param].pop("a")
    assert state.pop("nobody", 3) == 3
    assert "nobody" not in state
    assert state.popitem() == (param, {})


def test_it_behaves_like_the_state_torch_makes(param):
    recorder = Recorder()
    state = recorder.state
    assert isinstance(state, defaultdict) and len(state[param]) == 0 and param in state
    assert state.get("nobody") is None and "nobody" not in state
    assert {"a": 0} | state == {"a": 0, param: {}} and state | {"a": 0} == {param: {}, "a": 0}
    state[param]["step"] = torch.zeros(())
    assert recorder.written == [], "the step counter is not paged"


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, PagedState.copy, lambda state: pickle.loads(pickle.dumps(state))]
)
def test_copies_are_plain(param, duplicate):
    state = Recorder({param: {"a": torch.ones(3)}}).state
    plain = duplicate(state)
    assert type(plain) is defaultdict
    assert type(next(iter(plain.values()))) is dict
    assert next(iter(plain.values()))["a"].sum() == 3


def test_tensors_in_finds_them_and_skips_parameters(param):
    a, b, c = (torch.zeros(size) for size in (1, 2, 3))
    tensors = list(tensors_in({"x": [a, (b, None, 3.0)], "y": {"z": c}, "p": param}))
    assert [id(t) for t in tensors] == [id(a), id(b), id(c)]


def test_tensors_in_opens_tensor_subclasses():
    from torch.testing._internal.two_tensor import TwoTensor

    a = torch.zeros(4)
    b = torch.ones(4)
    assert [id(t) for t in tensors_in(TwoTensor(a, b))] == [id(a), id(b)]
    assert list(tensors_in(torch.nn.Parameter(TwoTensor(a, b)))) == []
