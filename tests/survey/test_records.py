"""Frozen values in checkpoints, however code writes to them: the module that loads one equals the one that saved it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_qlora import CheckpointMismatchError, convert
from lightning_qlora.tensors.fingerprint import checksum, fingerprint
from tests.conftest import fingerprints
from tests.toys import assert_equal


def thaw_step_and_freeze(p):
    p.requires_grad_(True)
    p.grad = torch.randn_like(p)
    torch.optim.SGD([p], lr=0.01).step()
    p.requires_grad_(False)
    p.grad = None


def through_numpy(p):
    p.data.view(-1).numpy()[3] += 0.5


def two_assignments(p):
    value = p.data
    p.data = torch.randn_like(value)
    value.add_(0.25)
    p.data = value  # the same address


def an_assignment_after_a_cast(p):
    p.data = p.data.to(torch.bfloat16).to(p.dtype)


WRITES = {
    "ema": lambda p: p.data.mul_(0.99).add_(0.01 * torch.randn_like(p)),
    "copy_": lambda p: p.data.copy_(torch.randn_like(p)),
    "init": lambda p: nn.init.constant_(p.data, 3),
    "index": lambda p: p.data.__setitem__(slice(1, 2), 7.0),
    "numpy": through_numpy,
    "assignments": two_assignments,
    "assignment after a cast": an_assignment_after_a_cast,
    "optimizer": thaw_step_and_freeze,
    "detach": lambda p: p.detach().neg_(),
    "set_": lambda p: p.data.set_(torch.randn_like(p)),
}


def student_and_teacher(dtype=torch.float32):
    """A frozen teacher head beside a student, as in DINO."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    teacher = copy.deepcopy(student).requires_grad_(False).to(dtype)
    return nn.ModuleDict({"student": student, "teacher": teacher})


def converted(dtype=torch.float32, change=0.0):
    module = student_and_teacher(dtype)
    module["teacher"][0].weight.data += change
    convert(module, r=4, target_modules=["student.0"])
    return module


@pytest.mark.parametrize(
    ("write", "dtype"), [*((name, torch.float32) for name in WRITES), ("ema", torch.float64), ("numpy", torch.float64)]
)
def test_frozen_values_are_saved_whatever_wrote_them(write, dtype):
    source, plain, again = converted(dtype), student_and_teacher(dtype), converted(dtype)
    torch.manual_seed(1)
    names = ("teacher.0.weight", "teacher.1.bias", "student.1.weight")
    for name in names:
        for module in (source, plain):
            with torch.random.fork_rng():
                WRITES[write](module.get_parameter(name))
    again.load_state_dict(source.state_dict())
    assert_equal(*([module.get_parameter(name) for name in names] for module in (again, plain)))
    assert "teacher.0.bias" in fingerprints(source.state_dict())  # nothing wrote to it


def test_a_write_that_a_16_bit_type_would_round_away_is_saved_from_a_module_held_in_fp32():
    """Each step of a moving average is smaller than the last bit of bf16."""
    source = converted(torch.bfloat16)
    teacher = source["teacher"].float()
    assert "teacher.0.weight" in fingerprints(source.state_dict())
    teacher[0].weight.data.mul_(1 + 1e-5)
    assert torch.equal(source.state_dict()["teacher.0.weight"], teacher[0].weight)


def test_frozen_values_are_compared_after_a_cast_to_a_wider_type():
    same, again, other = (converted(torch.bfloat16, change).float() for change in (0, 0, 1))
    state = same.state_dict()
    assert "teacher.0.weight" in fingerprints(state)
    again.load_state_dict(state)
    with pytest.raises(CheckpointMismatchError, match=r"teacher\.0\.weight"):
        other.load_state_dict(state)


def test_values_that_a_cast_rounded_are_saved():
    source = converted()
    source["teacher"].bfloat16()
    assert source.state_dict()["teacher.0.weight"].dtype is torch.bfloat16


def test_the_fingerprint_is_that_of_files_which_were_saved_before():
    halves = torch.arange(70007.0).half().view(7, -1)[:, 1:]
    numbers = fingerprint(halves), fingerprint(torch.arange(300_001).to(torch.uint8))
    assert numbers == (0x703A6AD51B33F1DD, 0x2320980532255A05)
    assert fingerprint(torch.arange(5.0), torch.zeros(0), torch.tensor(True)) == 0x4442B79D31406843
    assert fingerprint(torch.tensor([1 + 2j]), torch.tensor(0.1, dtype=torch.float64)) == 0x3B2BC68987299560
    assert checksum(torch.arange(5.0)) == "0be77359eb9c13be"
    assert fingerprint(torch.arange(5.0), torch.zeros(3, device="meta")) == 0


def test_the_fingerprint_sees_signs_of_single_columns_and_changes_of_all_words_at_once():
    x = torch.randn(512, 512)
    for columns in (slice(1, 2), slice(0, 1), slice(1, None, 2), slice(None)):
        other = x.clone()
        other[:, columns] *= -1
        assert fingerprint(x) != fingerprint(other)
    for size in (64, 1 << 19):
        data = torch.arange(size).to(torch.uint8)
        assert fingerprint(data) not in (fingerprint(~data), fingerprint(data.flip(0)))


def test_the_fingerprint_of_parts_of_tensors_in_any_order_of_memory():
    x = torch.randn(300, 700)
    for y in (x, x.double() / 3):
        for part in (y[1:], y[:, 1:], y.T, y.flatten()[1:], y[:0], y[:, 1], y[0, :1].expand(64)):
            assert fingerprint(part) == fingerprint(part.clone()) == fingerprint(part.double().contiguous())
    assert fingerprint(x.double() + 1e-12) != fingerprint(x)
    assert fingerprint(x + 0j) != fingerprint(x + 1e-3j)


class Operands(TorchDispatchMode):
    """The bytes of all operands of all ops that read or write values."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            leaves = tree_leaves((args, kwargs))
            self.bytes += sum(each.nbytes for each in leaves if isinstance(each, torch.Tensor))
        return func(*args, **(kwargs or {}))


def test_a_save_reads_frozen_values_once():
    """A fingerprint is five passes over them, three of these with a result in memory: 19 times their bytes in bf16."""
    module = nn.Sequential(nn.Embedding(1 << 15, 64), nn.Linear(64, 64)).bfloat16()
    convert(module, r=4, target_modules=["1"])
    with Operands() as operands:
        module.state_dict()
    assert operands.bytes < 22 * module[0].weight.nbytes


def test_a_checkpoint_fits_a_module_in_which_more_trains_if_the_base_is_the_same():
    source, same, other = converted(), student_and_teacher(), student_and_teacher()
    other["student"][1].bias.data.add_(1)
    for module in (same, other):
        convert(module, r=4, target_modules=["student.0"], modules_to_save=["student.1"])
    same.load_state_dict(source.state_dict())
    with pytest.raises(CheckpointMismatchError, match=r"student\.1\.bias: .* another base weight"):
        other.load_state_dict(source.state_dict())


def test_a_state_of_some_parameters_makes_no_other_change_a_part_of_the_base():
    """A head's state, loaded with strict=False after code wrote to a frozen value."""
    source, plain, target = converted(), student_and_teacher(), converted()
    part = {"teacher.1.bias": torch.randn(64)}
    for module in (source, plain):
        module["teacher"][0].weight.data.mul_(0.5)
        module.load_state_dict(part, strict=False)
    state = source.state_dict()
    assert {"teacher.0.weight", "teacher.1.bias"} <= state.keys() and "teacher.0.bias" not in state
    target.load_state_dict(state)
    assert_equal(target["teacher"].state_dict(), plain["teacher"].state_dict())


def test_what_a_full_checkpoint_brought_is_in_later_checkpoints():
    source = student_and_teacher()
    source["teacher"][0].weight.data += 1
    convert(source, r=4, target_modules=["student.0"], checkpoint="full")
    module = converted()
    keys = module.state_dict().keys()
    module.load_state_dict(source.state_dict())
    assert torch.equal(module["teacher"][0].weight, source["teacher"][0].weight)
    state = module.state_dict()
    assert state.keys() - keys == {"teacher.0.weight"}  # the rest is what conversion saw
    again = converted()
    again.load_state_dict(state)
    assert torch.equal(again["teacher"][0].weight, source["teacher"][0].weight)
