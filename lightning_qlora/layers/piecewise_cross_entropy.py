"""Cross entropy of deferred logits in pieces of rows: neither the logits nor their gradient exist as a whole.

With one number as the result, the gradient of a piece is computed together with its loss, so that each piece is
multiplied once. It is scaled in the backward pass, in fp32: a loss scale for fp16 acts before anything is rounded.
torch's `F.linear_cross_entropy(options=...)` does the same with less memory, but in bf16 its loss was 2% off (10.69 for
10.918, torch 2.13), and it takes a weight, so that a head in 4 bits could not use it.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

PIECE_ELEMENTS = 1 << 24  # logits in a piece: 64 MiB in fp32


def piecewise_cross_entropy(logits: Any, target: Tensor, options: dict[str, Any], reduction: str) -> Tensor:
    """`F.cross_entropy` of `DeferredLogits` [rows, vocabulary] and the index of the right class, [rows].

    `options` are weight, ignore_index and label_smoothing.
    """
    records, inputs = torch.is_grad_enabled(), logits.parameters()
    loss: Tensor = _PiecewiseCrossEntropy.apply(logits, target, options, reduction, records, *inputs)  # type: ignore[no-untyped-call]
    return loss


class _PiecewiseCrossEntropy(torch.autograd.Function):
    """The same as a function of the parameters of the logits, which get the gradients."""

    @staticmethod
    def forward(
        ctx: Any, logits: Any, target: Tensor, options: dict[str, Any], reduction: str, records: bool, *_: Tensor
    ) -> Tensor:
        ctx.logits, ctx.target, ctx.options, ctx.needed = logits, target, options, ctx.needs_input_grad[5:]
        ctx.total, losses = None, torch.zeros(len(target), dtype=torch.float32, device=target.device)
        if reduction == "none":
            ctx.rng_state = torch.get_rng_state()  # the seeds of adapter dropout
            _run(logits, target, options, (), losses=losses)
            result = losses
        else:
            ctx.save_for_backward(*_run(logits, target, options, ctx.needed if records else (), losses=losses))
            result = losses.sum()
        if reduction == "mean":
            weight, kept = options["weight"], target != options["ignore_index"]
            ctx.total = kept.sum() if weight is None else (weight[torch.where(kept, target, 0)] * kept).sum()
            result = result / ctx.total  # NaN without a row that counts, as in torch
        return result.to(torch.float32 if torch.is_autocast_enabled(target.device.type) else logits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.float()
        if grad.dim():
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(ctx.rng_state)
                grads = _run(ctx.logits, ctx.target, ctx.options, ctx.needed, factors=grad)
        else:
            if ctx.total is not None:
                grad = torch.where(ctx.total == 0, 0.0, grad / ctx.total)
            grads = [value if value is None else value * grad for value in ctx.saved_tensors]
        return None, None, None, None, None, *grads


def _run(
    logits: Any, target: Tensor, options: dict[str, Any], needed: tuple[bool, ...],
    factors: Tensor | None = None, losses: Tensor | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """Piece by piece: write the losses, and return the gradients of sum(factors * losses).

    `needed` says which of the logits' parameters need a gradient; empty: none. `factors`: None means ones.
    """
    hidden, parameters = logits.hidden.detach(), logits.parameters()[1:]
    needs_hidden, *needs_others = needed or [False] * (1 + len(parameters))
    trained = [p for p, is_needed in zip(parameters, needs_others, strict=True) if is_needed]
    of_hidden = torch.zeros_like(hidden) if needs_hidden else None
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in trained]
    for rows in _pieces(target, options["ignore_index"], logits.shape[-1]):
        piece = hidden[rows].requires_grad_(needs_hidden)
        with torch.set_grad_enabled(bool(needed)):
            made = logits.compute(piece)
        with torch.autocast(hidden.device.type, enabled=False):
            of_rows, grad = _losses_and_gradient(made.detach(), target[rows], **options)
        if losses is not None:
            losses[rows] = of_rows
        if not needed:
            continue
        if factors is not None:
            grad *= factors[rows].unsqueeze(1)
        grad = grad.to(made.dtype)
        grads = list(torch.autograd.grad(made, [*([piece] if needs_hidden else []), *trained], grad))
        del made, grad  # before the next piece is made
        if of_hidden is not None:
            of_hidden[rows] = grads.pop(0)
        for total, value in zip(sums, grads, strict=True):
            total += value
    of_trained = iter(total.to(p.dtype) for total, p in zip(sums, trained, strict=True))
    return [of_hidden, *(next(of_trained) if is_needed else None for is_needed in needs_others)]


def _losses_and_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Cross entropy of every row and its gradient [rows, vocabulary], fp32, in one buffer of the size of the logits.

    With p = softmax(z), class weights w, n classes, h = (1 - smoothing) w[y] and s = smoothing / n:

        loss = (h + s sum(w)) logsumexp(z) - h z[y] - s sum_c w[c] z[c]
        gradient = (h + s sum(w)) p - h onehot(y) - s w

    `F.cross_entropy` and its gradient take 1.7 (bf16) to 1.9 (fp32) times the memory of a piece, and more time.
    """
    z = logits.to(torch.float32, copy=True)
    z -= z.amax(dim=1, keepdim=True)
    w = z.new_ones(z.shape[1]) if weight is None else weight.float()
    kept = (target != ignore_index).unsqueeze(1)
    label = torch.where(kept, target.unsqueeze(1), 0)
    h, s = (1 - label_smoothing) * kept * w[label], label_smoothing / len(w) * kept
    scale, dot = h + s * w.sum(), h * z.gather(1, label)
    if label_smoothing:
        dot += s * z.mv(w).unsqueeze(1)
    z.exp_()
    total = z.sum(dim=1, keepdim=True)
    loss = scale * total.log() - dot
    z *= scale / total
    if label_smoothing:
        z.addr_(s.squeeze(1), w, alpha=-1)
    z.scatter_add_(1, label, -h)
    return loss.squeeze(1), z


def _pieces(target: Tensor, ignore_index: int, vocabulary: int) -> list[Any]:
    """The rows of each piece; those with an ignored label are left out where their number is known without waiting."""
    size = max(1, PIECE_ELEMENTS // vocabulary)
    if target.device.type == "cpu" and not isinstance(target, FakeTensor):
        return [rows for rows in torch.split((target != ignore_index).nonzero().squeeze(1), size) if len(rows)]
    return [slice(start, start + size) for start in range(0, len(target), size)]
