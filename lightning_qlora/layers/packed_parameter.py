"""PackedParameter: the bytes of a 4-bit weight, which arithmetic over `parameters()` averages or refuses.

    e.mul_(0.99).add_(p, alpha=0.01)        an average by hand (BYOL, MoCo, DINO, SAC), or torch's AveragedModel

Two networks on the same base have the same bytes, and the average of equal weights is the weight. So an operation on
bytes computes one number instead, its result as a multiple of the weight (the share): here 0.99, and then 1. Only the
share 1 can be written to a parameter, and no byte changes. Any other arithmetic is an error that says which parameters
to skip. torch alone raises a type error for most of it, and rounds the bytes in the rest, which gives other weights.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_qlora.kernels.lora_linear import PLAIN

SKIP = (
    "4-bit weights are codes, so arithmetic on them gives other weights. Two networks with the same 4-bit weights can "
    "be averaged (e.mul_(m).add_(p, alpha=1 - m)); a copy that the module froze is dense, unless target_modules names "
    "its layers. For all else skip them: `if parameter.is_floating_point()`."
)
SCALE = {"mul", "rmul", "imul", "multiply", "div", "truediv", "itruediv", "true_divide", "divide", "neg", "negative"}
SUM = {"add", "radd", "iadd", "sub", "rsub", "isub", "subtract", "lerp", "addcdiv"}
NEAR = 1e-5  # of a share to 1: m and 1 - m may be fp32
unfinished: list["_Weight"] = []  # scaled in place; a sum must follow


class _Weight:
    """The bytes of one parameter, and the share of its weight that operations in place have left."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.share = data, torch.ones((), dtype=torch.float64, device="cpu")
        self._equal: list[Any] = []  # what `is_equal` found last

    def is_equal(self, other: "_Weight") -> bool:
        """Whether two parameters have the same bytes; they are read again only if one changed."""
        key = [of for data in (self.data, other.data) for of in (data.data_ptr(), data._version, data.shape)]
        if self._equal[:-1] != key:
            self._equal = [*key, torch.equal(self.data, other.data.to(self.data.device))]
        return bool(self._equal[-1])

    def check(self, finished: bool) -> None:
        """After an operation in place: the share must be 1, or may become 1 in the next one."""
        if self in unfinished:
            unfinished.remove(self)
        if abs(float(self.share) - 1) < NEAR:
            self.share.fill_(1)
            return
        unfinished.append(self)
        if finished:
            refuse_unfinished()


def refuse_unfinished() -> NoReturn:
    """Raise for weights that were scaled and not averaged; their bytes never changed."""
    _refuse(f"A 4-bit weight was set to {float(unfinished[-1].share):g} times itself. {SKIP}")


def _refuse(message: str) -> NoReturn:
    for weight in unfinished:
        weight.share.fill_(1)
    unfinished.clear()
    raise RuntimeError(message)


class _Arithmetic:
    """What PackedParameter, its `data` and multiples of it have in common."""

    _qlora_weight: _Weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            with PLAIN():
                return func(*args, **kwargs)
        name: str = getattr(func, "__name__", "")
        has_multiple = name != "__get__" and any(isinstance(value, Multiple) for value in tree_leaves((args, kwargs)))
        calculates = name.removeprefix("_foreach").strip("_") in SCALE | SUM
        if name.startswith("_foreach") and (calculates or has_multiple):
            return _one_by_one(name.removeprefix("_foreach_"), args, kwargs)
        if has_multiple and func == Tensor.data.__set__:  # type: ignore[attr-defined]
            func, name = Tensor.copy_, "copy_"
        if calculates or (has_multiple and name == "copy_"):
            return _calculate(func, name, args, kwargs)
        if has_multiple:
            _refuse(f"{name}: {SKIP}")
        with PLAIN():
            try:
                made = func(*args, **kwargs)
            except (RuntimeError, NotImplementedError) as error:
                if type(error) not in (RuntimeError, NotImplementedError):  # memory, for example
                    raise
                raise RuntimeError(f"{name}: {error}. {SKIP}") from error
            if name == "__set__":  # of `data`: the module moved
                vars(args[0]).pop("_qlora_weight", None)
            if func in ALIASES and isinstance(args[0], (PackedParameter, _Bytes)):
                made = made.as_subclass(_Bytes)
                made._qlora_weight = _weight(args[0])
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Files and other processes get plain tensors."""
        with PLAIN():
            data = self.as_subclass(Tensor)  # type: ignore[attr-defined]
            return (nn.Parameter(data, False) if isinstance(self, nn.Parameter) else data).__reduce_ex__(protocol)


class PackedParameter(_Arithmetic, nn.Parameter):
    """A frozen uint8 parameter; see the top of this file."""


class _Bytes(_Arithmetic, Tensor):
    """`data` of a PackedParameter: the same bytes, in the same memory."""


class Multiple(_Arithmetic, Tensor):
    """A multiple of a 4-bit weight: its share, fp64 without dimensions."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{float(_share(self)):g} * (a 4-bit weight)"


ALIASES = {Tensor.data.__get__, Tensor.detach, torch.detach}  # type: ignore[attr-defined]


def _weight(value: Any) -> _Weight:
    """The weight of an operand, made at the first use."""
    if "_qlora_weight" not in vars(value):
        with PLAIN():
            value._qlora_weight = _Weight(value.data)
    weight: _Weight = value._qlora_weight
    return weight


def _share(value: Any) -> Any:
    """What an operand is in a calculation with shares."""
    with PLAIN():
        if isinstance(value, Multiple):
            return value.as_subclass(Tensor)
        if isinstance(value, _Arithmetic):
            return _weight(value).share
        return value.detach().to("cpu", torch.float64) if isinstance(value, Tensor) else value


def _calculate(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """The same with the shares of the weights: `name` is mul, mul_, __rmul__, add, ..."""
    operands = [value for value in tree_leaves((args, kwargs)) if isinstance(value, _Arithmetic)]
    weight = _weight(operands[0])
    if name.strip("_") in SCALE:
        factors = [value for value in args if value is not operands[0]]
        allowed = len(operands) == 1 and not any(isinstance(value, Tensor) and value.numel() > 1 for value in factors)
    elif name == "add" and type(args[1]) is int and not args[1]:  # the start of sum()
        return args[0]
    else:
        allowed = len(operands) == 2 and all(isinstance(value, _Arithmetic) for value in args[:2])
    if not allowed:
        _refuse(f"{name}: {SKIP}")
    if not weight.is_equal(_weight(operands[-1])):
        _refuse(
            f"{name}: two networks are averaged whose 4-bit weights differ, so their average is no 4-bit weight. "
            "Convert both from the same model, or average the adapters alone: `if parameter.is_floating_point()`."
        )
    with PLAIN():
        made = func(*tree_map(_share, args), **tree_map(_share, kwargs))
        if made is weight.share:  # in place
            weight.check(finished=len(operands) == 2)
            return args[0]
        made = made.as_subclass(Multiple)
    made._qlora_weight = weight
    return made


def _one_by_one(name: str, args: Any, kwargs: Any) -> Any:
    """A function of lists of tensors (`torch._foreach_mul_`) as one of each tensor."""
    count = len(args[0])
    columns = [value if isinstance(value, (list, tuple)) else [value] * count for value in args]
    made = [getattr(Tensor, name)(*each, **kwargs) for each in zip(*columns, strict=True)]
    return None if name.endswith("_") else made
