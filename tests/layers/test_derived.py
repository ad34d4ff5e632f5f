"""Classes that are derived from those of the user, put on and taken off in any order."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from lightning_qlora import convert, merge
from lightning_qlora.dtypes.instance_method import METHODS
from lightning_qlora.layers.derived import Derived, derive, original_class, restore


class Doubled(Derived):
    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(Derived):
    @classmethod
    def _derived_members(cls, before):
        return {"__name__": f"Shifted{before.__name__}", "shift": 1.0}

    def forward(self, x):
        return super().forward(x) + self.shift


class Negated(Derived):
    def forward(self, x):
        return -super().forward(x)


class Mine(nn.Linear):
    pass


MIXINS = {Doubled: lambda y: 2 * y, Shifted: lambda y: y + 1, Negated: lambda y: -y}
COPIES = {"itself": lambda m: m, "copy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", [nn.Linear, Mine])
def test_mixins_are_added_and_removed_in_any_order(kind, copied):
    x = torch.randn(2, 4)
    for added in itertools.permutations(MIXINS):
        for removed in itertools.permutations(MIXINS):
            layer = kind(4, 4)
            expected = layer(x)
            for mixin in added:
                derive(mixin, layer)
                derive(mixin, layer)  # a second time changes nothing
            derived = type(layer)
            layer = copied(layer)
            assert type(layer) is derived  # each class is made once
            left = list(added)
            for mixin in removed:
                y = expected
                for each in left:
                    y = MIXINS[each](y)
                assert torch.equal(layer(x), y)
                assert original_class(type(layer)) is kind and isinstance(layer, kind)
                restore(layer, mixin)
                left.remove(mixin)
            assert type(layer) is kind and torch.equal(layer(x), expected)


def test_a_class_that_a_library_derives_stays_in_a_copy():
    """As fully_shard does."""
    layer = nn.Linear(4, 4)
    derive(Doubled, layer)
    layer.__class__ = type("Sharded", (type(layer),), {})
    assert type(copy.deepcopy(layer)) is type(layer)


def test_a_class_that_conversion_derived_is_not_called():
    model = nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 64), Mine(64, 64))
    convert(model, r=2, trainable_token_indices={"0": [1]})
    for part in model:
        with pytest.raises(
            TypeError, match=r"^\w+\(\.\.\.\): is no class to call\. lightning_qlora\.convert\(module\) makes"
        ):
            type(part)(64, 64)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_all_that_conversion_adds_is_removed_by_merge(copied):
    """A head in 4 bits whose logits are deferred, an embedding with rows that train, and a norm that trains in fp32."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(300, 64)
            self.norm = nn.LayerNorm(64)
            self.mine = Mine(64, 64)
            self.lm_head = nn.Linear(64, 300)

    globals()["Model"] = Model
    Model.__qualname__ = "Model"
    model = Model().bfloat16()
    before = {name: type(part) for name, part in model.named_modules()}
    convert(
        model, r=4, modules_to_save=["norm"], target_modules=["mine", "lm_head"], lora_dropout=0.0,
        trainable_token_indices={"embedding": [1, 2]},
    )  # fmt: skip
    model = copied(model)
    after = {name: type(part) for name, part in model.named_modules()}
    assert {name for name in before if after[name] is not before[name]} == {"embedding", "mine", "lm_head"}
    assert all(original_class(after[name]) is before[name] for name in before)
    assert any(METHODS in vars(part) for part in model.modules())
    merge(model)
    assert not any(METHODS in vars(part) or "forward" in vars(part) for part in model.modules())
    assert {name: type(part) for name, part in model.named_modules()} == before
