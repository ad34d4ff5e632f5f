import copy
import pickle
from collections import defaultdict

import pytest
import torch

from lightning_qlora.paging.state import PagedState, tensors_in


class Recorder:
    def __init__(self):
        self.seen = []

    def page(self, param, value):
        self.seen.append(value)


@pytest.fixture
def pages():
    return Recorder()


@pytest.fixture
def param():
    return torch.nn.Parameter(torch.zeros(2))


def test_every_way_to_put_a_value_in_pages_it(pages, param):
    state = PagedState(pages, {param: {"a": 1}})
    entry = state[param]
    entry["b"] = 2
    entry.update({"c": 3}, d=4)
    assert entry.setdefault("e", 5) == 5
    assert entry.setdefault("e", 6) == 5
    entry |= {"f": 7}
    state["not a parameter"] = [8]
    state[torch.nn.Parameter(torch.zeros(1))]["missing"] = 9
    assert pages.seen == [1, 2, 3, 4, 5, 7, [8], 9]


def test_the_step_counter_is_left_alone(pages, param):
    state = PagedState(pages, {})
    state[param]["step"] = torch.zeros(())
    assert pages.seen == []


def test_it_behaves_like_the_state_torch_makes(pages, param):
    state = PagedState(pages, {})
    assert isinstance(state, defaultdict)
    assert len(state[param]) == 0
    assert param in state
    assert state.get("nobody") is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda state: pickle.loads(pickle.dumps(state))])
def test_copies_are_plain(pages, param, duplicate):
    state = PagedState(pages, {param: {"a": torch.ones(3)}})
    plain = duplicate(state)
    assert type(plain) is defaultdict
    assert type(next(iter(plain.values()))) is dict
    assert next(iter(plain.values()))["a"].sum() == 3


def test_tensors_in_finds_them_and_skips_parameters(param):
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    found = list(tensors_in({"x": [a, (b, None, 3.0)], "y": {"z": c}, "p": param}))
    assert [id(t) for t in found] == [id(a), id(b), id(c)]


def test_tensors_in_opens_tensor_subclasses():
    from torch.testing._internal.two_tensor import TwoTensor

    a, b = torch.zeros(4), torch.ones(4)
    assert [id(t) for t in tensors_in(TwoTensor(a, b))] == [id(a), id(b)]
