"""Deferred logits against the real ones: losses and gradients of everything a training step may do with logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_qlora import convert
from lightning_qlora.dtypes.instance_method import instance_method, remove
from lightning_qlora.kernels import reference
from lightning_qlora.logits import piecewise_cross_entropy
from lightning_qlora.logits.deferred_head import (
    DeferredForward,
    defer_logits,
    defer_output_embeddings,
    output_embeddings,
    saved_bytes,
)
from lightning_qlora.logits.deferred_logits import DeferredLogits
from lightning_qlora.survey.parts import Parts

V = 97
H = 64
HEADS = ("frozen", "bias", "trained", "4-bit")


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(piecewise_cross_entropy, "PIECE_ELEMENTS", 5 * V)


def made_head(kind, deferred=False):
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=kind == "bias")
    if kind == "4-bit":
        model = nn.Sequential(head)
        convert(model, r=4, target_modules=["0"], lora_dropout=0.0)
        head.lora_B.data.normal_(std=0.1)
    else:
        head.requires_grad_(kind == "trained")
    if deferred:
        defer_logits(head)
    return head


def deferring(kind):
    return made_head(kind, deferred=True)


def hidden_states():
    return torch.randn(3, 7, H, generator=torch.Generator().manual_seed(1))


def both(kind, function, dtype=torch.float32, in_checkpoint=False):
    """Result, gradient of the hidden states and of the head, with deferred and with real logits."""
    results = []
    for defers in (True, False):
        head = made_head(kind, defers).to(dtype)
        hidden = hidden_states().to(dtype).requires_grad_()

        def call(hidden, head=head, defers=defers):
            logits = head(hidden)
            assert isinstance(logits, DeferredLogits) is defers
            return function(logits)

        result = checkpoint(call, hidden, use_reentrant=False) if in_checkpoint else call(hidden)
        result.float().square().sum().backward()
        trained = [p.grad for p in head.parameters() if p.requires_grad]
        results.append([result.detach(), hidden.grad, *trained])
    return results


def assert_same(results, relative=1e-5, absolute=1e-6):
    """Of deferred and of real logits; the absolute error is a share of the largest value."""
    for ours, expected in zip(*results, strict=True):
        largest = expected.float().abs().max().item()
        assert_close(ours, expected, rtol=relative, atol=absolute * largest)


def labels(*shape, ignored=-100):
    made = torch.randint(0, V, shape, generator=torch.Generator().manual_seed(2))
    made.view(-1)[::3] = ignored
    return made


def loss_of(rows, *weight, **arguments):
    return F.cross_entropy(rows, labels(rows.shape[0]), *weight, **arguments)


WEIGHT = torch.rand(V, generator=torch.Generator().manual_seed(3))
LOSSES = {
    "view": lambda z: loss_of(z.view(-1, V)),
    "view of -1": lambda z: loss_of(z.view(21, -1)),
    "reshape": lambda z: loss_of(z.reshape((-1, V))),
    "flatten": lambda z: loss_of(z.flatten(0, 1)),
    "flatten by name": lambda z: loss_of(z.flatten(end_dim=1)),
    "float": lambda z: loss_of(z.float().contiguous().view(-1, V)),
    "to": lambda z: loss_of(z.to(torch.float32).to("cpu").view(-1, V)),
    "shifted": lambda z: loss_of(z[..., :-1, :].contiguous().view(-1, V)),
    "rows": lambda z: loss_of(z[:, 1:].reshape(-1, V)),
    "last": lambda z: loss_of(z[:, -1]),
    "mask": lambda z: loss_of(z[torch.arange(21).view(3, 7) % 2 == 0]),
    "index": lambda z: loss_of(z[torch.tensor([0, 2, 0])].view(-1, V)),
    "index of rows": lambda z: loss_of(z.view(-1, V)[torch.tensor([[0, 2, 0]])].view(-1, V)),
    "softcap": lambda z: loss_of((torch.tanh(z / 3) * 3).view(-1, V)),
    "scale": lambda z: loss_of(0.25 * z.view(-1, V) * 2),
    "sum": lambda z: loss_of(z.view(-1, V), reduction="sum"),
    "ignore_index": lambda z: F.cross_entropy(z.view(-1, V), labels(21, ignored=0), ignore_index=0),
    "by keyword": lambda z: F.cross_entropy(input=z.view(-1, V), target=labels(21)),
    "module": lambda z: nn.CrossEntropyLoss()(z.view(-1, V), labels(21)),
    "two losses": lambda z: loss_of(z.view(-1, V)) + loss_of(z[:, 0]),
}
REAL = {
    "sum": lambda z: 1e-2 * z.square().sum(),
    "log_softmax": lambda z: -F.log_softmax(z, -1)[..., 3].mean(),
    "kl": lambda z: F.kl_div(F.log_softmax(z.float(), -1), torch.full((3, 7, V), 1 / V), reduction="batchmean"),
    "classes in the middle": lambda z: F.cross_entropy(z.transpose(1, 2), labels(3, 7)),
    "probabilities": lambda z: F.cross_entropy(z.view(-1, V), torch.full((21, V), 1 / V)),
    "a part of the vocabulary": lambda z: F.cross_entropy(z[..., :50].reshape(-1, 50), labels(21).clamp(-100, 49)),
    "a part by three indices": lambda z: F.cross_entropy(z[:, -1, :50], labels(3).clamp(-100, 49)),
    "one logit": lambda z: z[0, 1, 5].square(),
    "a mask of logits": lambda z: z[torch.arange(21 * V).view(3, 7, V) % 5 == 0].square().sum(),
    "one dimension": lambda z: 1e-2 * z.view(-1).square().sum(),
    "a new dimension": lambda z: 1e-2 * z[:, None].square().sum(),
    "metric, then loss": lambda z: z.argmax(-1).float().sum() * 0 + loss_of(z.view(-1, V)),
    "loss, then metric": lambda z: loss_of(z.view(-1, V)) + 0 * z.argmax(-1).float().sum(),
    "masked in place": lambda z: loss_of(z.masked_fill_(torch.arange(V) == 5, -9.0).view(-1, V)),
    "none": lambda z: loss_of(z.view(-1, V), reduction="none"),
    "smoothing": lambda z: loss_of(z.view(-1, V), label_smoothing=0.1),
    "weight": lambda z: loss_of(z.view(-1, V), WEIGHT),
    "checkpoint": lambda z: checkpoint(lambda z: z.square().mean(), z, use_reentrant=False),
    "new data": lambda z: setattr(z, "data", z.data / 2) or loss_of(z.view(-1, V)),
    "stack": lambda z: torch.stack([z, z]).mean(),
    "asked to have a gradient, which they have": lambda z: loss_of(z.requires_grad_().view(-1, V)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_in_pieces_is_the_loss_and_no_logits_are_made(name, monkeypatch):
    monkeypatch.setattr(DeferredLogits, "computed", lambda *_: pytest.fail("the logits were computed"))
    for kind in HEADS:
        assert_same(both(kind, LOSSES[name]))


@pytest.mark.parametrize("name", REAL)
def test_anything_else_gets_the_real_logits(name):
    for kind in HEADS:
        assert_same(both(kind, REAL[name]))


@pytest.mark.parametrize("kind", HEADS)
def test_bf16_and_autocast(kind):
    def loss(z):
        return loss_of(z.float().view(-1, V))

    assert_same(both(kind, loss, torch.bfloat16), 3e-2, 3e-2)
    results = []
    for defers in (True, False):
        head = made_head(kind, defers)
        hidden = hidden_states().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(hidden)
            assert logits.dtype is torch.bfloat16
            value = loss_of(logits.view(-1, V))
        later = loss_of(logits.view(-1, V), reduction="sum")
        (value + later).backward()
        results.append([value.detach(), later.detach(), hidden.grad])
    assert results[0][0].dtype is results[1][0].dtype is torch.float32
    assert_same(results, 5e-2, 5e-2)


def test_a_4_bit_weight_times_logits_has_their_gradient():
    assert_same(both("frozen", lambda z: (layer_of_rows().weight @ z.view(-1, V)).square().mean()))


def layer_of_rows():
    model = nn.Sequential(nn.Linear(21, H))
    torch.manual_seed(2)
    nn.init.normal_(model[0].weight)
    convert(model, r=4, target_modules=["0"])
    return model[0]


def test_an_autograd_function_gets_values_and_its_gradient_reaches_the_hidden_states():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z.mul(z).sum()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad * ctx.saved_tensors[0]

    assert_same(both("trained", Square.apply), relative=1e-4)

    class Constant(Square):
        @staticmethod
        def backward(ctx, grad):
            return None

    assert_same(both("trained", lambda z: Constant.apply(z) + z[:, 0].mean()))


def test_code_below_torch_function_gets_values():
    for kind in HEADS:
        head = deferring(kind)
        logits = head(hidden_states().requires_grad_())
        for readable, expected in ((logits, logits + 0), (head.weight, head.weight + 0)):
            with torch._C.DisableTorchFunctionSubclass():
                assert torch.equal(readable + 0, expected)


def test_backward_twice_and_a_second_derivative():
    head = deferring("frozen")
    hidden = torch.randn(4, H, requires_grad=True)
    loss = F.cross_entropy(head(hidden), labels(4, ignored=1))
    loss.backward(retain_graph=True)
    first = hidden.grad.clone()
    loss.backward()
    assert_close(hidden.grad, 2 * first)
    grad = torch.autograd.grad(F.cross_entropy(head(hidden), labels(4, ignored=1)), hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"does not require grad|second derivative"):
        grad.sum().backward()


def test_all_labels_ignored_is_nan_without_a_gradient_as_in_torch_and_an_empty_batch_too():
    head = deferring("frozen")
    hidden = torch.randn(4, H, requires_grad=True)
    loss = F.cross_entropy(head(hidden), torch.full((4,), -100))
    loss.backward()
    assert loss.isnan() and not hidden.grad.any()
    assert F.cross_entropy(head(hidden[:0]), torch.zeros(0, dtype=torch.long)).isnan()


def test_real_logits_where_nothing_trains_and_of_a_single_row():
    head = deferring("frozen")
    x = torch.randn(2, H, requires_grad=True)
    with torch.no_grad():
        assert type(head(x)) is torch.Tensor
    assert type(head(x.detach())) is torch.Tensor
    assert type(head(x[0])) is torch.Tensor and isinstance(head(x), DeferredLogits)


def test_dropout_of_the_adapter_is_drawn_once_for_all_that_read_the_logits():
    """In pieces, and at each read without a gradient, another mask was drawn."""
    head = made_head("4-bit", deferred=True)
    head.lora_dropout = 0.5
    hidden = torch.randn(21, H, requires_grad=True)
    torch.manual_seed(5)
    logits = head(hidden)
    loss = loss_of(logits)
    loss.backward()
    with torch.no_grad():
        metric = loss_of(logits.float() + 0)
        assert torch.equal(logits + 0, logits + 0)
    torch.manual_seed(5)
    a, b = (p.detach().clone().requires_grad_() for p in (head.lora_A, head.lora_B))
    dropped = reference.dropout(hidden.detach(), 0.5, torch.randint(1 << 62, (1,)))
    expected = loss_of(hidden.detach() @ head.decode().T + head.scaling * dropped @ a.T @ b.T)
    expected.backward()
    ours = loss, metric, head.lora_A.grad, head.lora_B.grad
    assert_close(ours, (expected, expected, a.grad, b.grad))
    assert saved_bytes(head) == 0 and isinstance(head.eval()(hidden), DeferredLogits)  # no dropout, so it defers


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_metric_without_gradient_does_not_take_the_gradient_from_the_loss(mode):
    def function(z):
        with mode():
            metric = loss_of(z.float().view(-1, V)) + z.argmax(-1).float().mean()
        assert not metric.requires_grad
        return loss_of(z.view(-1, V)) * metric.item()

    assert_same(both("trained", function))


def write_item(z):
    z[:, :, 3:5] = -9.0


WRITES = {
    "item": write_item,
    "in place": lambda z: z.mul_(0.5),
    "data": lambda z: write_item(z.data),
    "operator": lambda z: z.__imul__(2),
}


@pytest.mark.parametrize("in_checkpoint", [False, True])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_is_written_to_the_logits_stays(write, in_checkpoint):
    def function(z):
        flat = z.view(-1, V)
        write(z)
        return loss_of(flat)

    assert_same(both("trained", function, in_checkpoint=in_checkpoint))


def test_the_logits_call_a_hook_with_their_gradient_and_keep_it_if_they_are_asked_to():
    grads = []
    for defers in (True, False):
        z = made_head("trained", defers)(hidden_states())
        flat = z.view(-1, V)
        z.register_hook(lambda grad: grads.append(2 * grad))
        z.retain_grad()
        loss_of(flat).backward()
        grads.append(2 * z.grad)
    for grad in grads[1:]:
        assert_close(grad, grads[0])


def asks_to_keep(z, loss, hidden):
    z.retain_grad()
    loss.backward()
    return [z.grad, hidden.grad]


def asks_for_inputs(z, loss, hidden):
    loss.backward(inputs=[z, hidden])
    return [z.grad, hidden.grad]


def asks_autograd(z, loss, hidden):
    return torch.autograd.grad(loss, [z, hidden])


def asks_autograd_alone(z, loss, hidden):
    return torch.autograd.grad(loss, z)


def asks_by_hook(z, loss, hidden):
    """It changes the gradient, too."""
    grads = []
    z.register_hook(lambda grad: grads.append(grad) or 3 * grad)
    loss.backward()
    return [*grads, hidden.grad]


def asks_before_a_metric(z, loss, hidden):
    z.retain_grad()
    assert z.argmax(-1).shape == (3, 7)
    loss.backward()
    return [z.grad, hidden.grad]


def asks_after_a_metric(z, loss, hidden):
    assert z.softmax(-1).argmax(-1).shape == (3, 7)
    return asks_by_hook(z, loss, hidden)


def asks_for_two_losses(z, loss, hidden):
    """Another loss of the real logits, before or after the question."""
    loss = loss + 1e-3 * z.float().logsumexp(-1).square().mean()
    z.retain_grad()
    (loss + 1e-3 * z[:, 2].square().mean()).backward()
    return [z.grad, hidden.grad]


ASKS = [value for name, value in globals().items() if name.startswith("asks_")]


@pytest.mark.parametrize("kind", ["trained", "4-bit"])
@pytest.mark.parametrize("ask", ASKS, ids=lambda ask: ask.__name__)
def test_a_gradient_of_the_logits_that_is_asked_for_after_the_loss(ask, kind):
    """Whatever the loss computed of them."""
    forms = ("view", "shifted", "softcap", "mask", "two losses", "sum", "smoothing", "kl")
    for name in forms if kind == "trained" else forms[:2]:
        for dtype in (torch.float32, torch.bfloat16):
            results = []
            for defers in (True, False):
                head = made_head(kind, defers).to(dtype)
                hidden = hidden_states().to(dtype).requires_grad_()
                z = head(hidden)
                found = ask(z, (LOSSES | REAL)[name](z), hidden)
                results.append([*found, *(p.grad for p in head.parameters() if p.grad is not None)])
            assert_same(results, *((1e-5, 1e-6) if dtype is torch.float32 else (5e-2, 3e-2)))


def test_a_gradient_of_logits_within_a_checkpoint():
    for ask in (lambda z: z.retain_grad(), lambda z: None):
        grads = []
        for defers in (True, False):
            later = []

            def call(hidden, defers=defers, later=later, ask=ask):
                z = made_head("frozen", defers)(hidden)
                ask(z)
                loss = loss_of(z.view(-1, V))
                later.append(z)
                return loss

            loss = checkpoint(call, hidden_states().requires_grad_(), use_reentrant=False)
            later[0].retain_grad()
            loss.backward()
            grads.append(later[0].grad)
        assert_close(*grads)


def test_a_loss_scale_for_fp16_acts_before_the_gradient_is_rounded():
    head = made_head("frozen").half()
    defer_logits(head)
    target = torch.randint(0, V, (2048,))
    x = torch.randn(2048, H, generator=torch.Generator().manual_seed(1))
    ours = x.half().requires_grad_()
    exact = x.half().float().requires_grad_()
    (F.cross_entropy(head(ours).float(), target) * 65536).backward()
    F.cross_entropy(F.linear(exact, head.weight.float()), target).backward()
    assert_close(ours.grad.float() / 65536, exact.grad, rtol=0.02, atol=0.02 * exact.grad.abs().max())


@pytest.mark.parametrize("change", [lambda head, _: head.weight.mul_(2), lambda _, hidden: hidden.add_(1)])
def test_logits_are_refused_after_the_weight_or_the_input_changed(change):
    head = deferring("trained")
    hidden = torch.randn(4, H) + 0
    z = head(hidden)
    with torch.no_grad():
        change(head, hidden)
    with pytest.raises(RuntimeError, match="can't be computed any more"):
        z.sum()


def test_a_functional_call_never_uses_another_weight_than_the_given_one():
    head = deferring("trained")
    hidden = torch.randn(4, H)
    other = torch.randn(V, H, requires_grad=True)
    assert torch.equal(torch.func.functional_call(head, {"weight": other}, (hidden,)), hidden @ other.T)
    z = torch.func.functional_call(head, {"weight": nn.Parameter(other)}, (hidden,))
    with pytest.raises(RuntimeError, match="can't be computed any more"):
        F.cross_entropy(z, labels(4, ignored=1))
    grad = torch.func.grad(lambda w: torch.func.functional_call(head, {"weight": w}, (hidden,)).square().sum())(other)
    assert grad.shape == other.shape


def test_tracing_and_offloading_hooks_get_real_logits():
    head = deferring("trained")
    hidden = torch.randn(4, H)
    traced = torch.jit.trace(head, hidden)
    assert torch.equal(traced(hidden), head(hidden) + 0)
    plain = head.forward
    head.forward = lambda x: plain(x)  # as accelerate does, which takes the weight away afterwards
    assert type(head(hidden)) is torch.Tensor


def test_a_loss_without_gradient_computes_none(monkeypatch):
    head = deferring("trained")
    z = head(torch.randn(4, H))
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        loss = F.cross_entropy(z, labels(4, ignored=1))
    assert not loss.requires_grad


@pytest.mark.parametrize(("elements", "rows"), [(5 * V, [5, 3]), (V // 2, [1] * 8)])
def test_rows_whose_label_is_ignored_are_not_multiplied(elements, rows, monkeypatch):
    monkeypatch.setattr(piecewise_cross_entropy, "PIECE_ELEMENTS", elements)
    compute = DeferredLogits.compute
    seen = []
    monkeypatch.setattr(
        DeferredLogits, "compute", lambda self, piece, *_: seen.append(len(piece)) or compute(self, piece)
    )
    head = deferring("frozen")
    loss_of(head(torch.randn(12, H, requires_grad=True))).backward()
    assert seen == rows


class Own(nn.Linear):
    pass


class NoHead(nn.Module):
    """As transformers' models without a head."""

    def get_output_embeddings(self):
        raise NotImplementedError


class Model(nn.Module):
    """It says which layer is its head."""

    def __init__(self):
        super().__init__()
        self.words, self.out, self.side = nn.Embedding(99, 8), nn.Linear(8, 99), nn.Linear(8, 99)

    def get_output_embeddings(self):
        return self.out


def words(size=99, **layers):
    return nn.ModuleDict({"words": nn.Embedding(size, 8), **layers})


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (words(out=nn.Linear(8, 99), other=nn.Linear(8, 98)), ["out"]),
        (words(out1=nn.Linear(8, 99), out2=nn.Linear(8, 99), out=nn.Linear(8, 99)), ["out"]),
        (words(out=Own(8, 99), lm_head=Own(8, 9)), []),
        (nn.ModuleDict({"lm_head": nn.Linear(8, 9), "head": nn.Linear(8, 9)}), ["lm_head"]),
        (words(out=nn.Linear(8, 99), model=NoHead()), ["out"]),
        (words(50, model=Model(), out=nn.Linear(8, 50), side=nn.Linear(8, 99)), ["model.out", "out"]),
    ],
)
def test_which_layers_are_output_embeddings(module, names):
    assert [*output_embeddings(Parts.of(module))] == names


def test_auto_defers_those_with_four_times_as_many_outputs_as_inputs():
    for outputs, setting, dtype, saved in (
        (32, "auto", torch.float32, {"out": 1000 * 32 * 12}),
        (32, "auto", torch.bfloat16, {"out": 1000 * 32 * 10}),
        (31, "auto", torch.float32, {}),
        (31, True, torch.float32, {"out": 1000 * 31 * 12}),
        (32, False, torch.float32, {}),
    ):
        module = words(outputs, out=nn.Linear(8, outputs)).to(dtype)
        parts = Parts.of(module)
        assert defer_output_embeddings(parts, setting, sharded=True) == dict.fromkeys(saved, 0)
        assert defer_output_embeddings(parts, setting) == {}
        deferred = {name: saved_bytes(part) for name, part in parts.named if instance_method(part, DeferredForward)}
        assert deferred == saved
        for part in module.modules():
            remove(part, DeferredForward)
        assert type(module["out"]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_type_of_the_logits_of_a_head_that_trains_in_full_in_a_bf16_module(dtype):
    heads = []
    for setting in (True, False):
        torch.manual_seed(0)
        module = nn.ModuleDict({"words": nn.Embedding(V, H), "own": nn.Linear(H, H), "lm_head": nn.Linear(H, V)})
        convert(module.bfloat16(), r=4, modules_to_save=["lm_head"], deferred_logits=setting)
        heads.append(module["lm_head"])
    assert isinstance(heads[0](hidden_states()), DeferredLogits) and heads[0].weight.dtype is torch.float32
    ours, expected = (head(hidden_states().to(dtype)) for head in heads)
    assert ours.dtype is expected.dtype is torch.bfloat16
    assert torch.equal(ours + 0, expected)
    assert saved_bytes(heads[0]) == 1000 * V * (2 + 8)
