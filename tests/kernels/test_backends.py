import pytest
import torch

from lightning_qlora.kernels import backends, eager

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forget():
    backends._backends.clear()
    yield
    backends._backends.clear()


@pytest.fixture
def kernels():
    pytest.importorskip("triton")
    from lightning_qlora.kernels import triton

    return triton


def test_a_gpu_gets_the_kernels_after_one_trial_launch_and_one_check_and_a_cpu_the_eager_path(monkeypatch, kernels):
    tried = []
    checked = []
    monkeypatch.setattr(backends, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "check_launch", tried.append)
    monkeypatch.setattr(
        backends, "verdict", lambda *arguments: checked.append(arguments) or dict.fromkeys(backends.OPS)
    )
    made = backends.backend(CUDA)
    assert made is backends.backend(CUDA) and made.can_group is kernels.can_group and not made.failures
    assert (tried, checked) == ([CUDA], [(CUDA, False)])
    assert backends.failures(CUDA, repeat=True) == {} and checked[1] == (CUDA, True)
    assert backends.describe(CUDA) == "Triton kernels"
    assert backends.backend(torch.device("cpu")).kernels is eager


def test_an_op_whose_kernels_fail_the_check_is_eager_alone_and_one_warning_names_card_and_op(
    monkeypatch, kernels, recwarn
):
    monkeypatch.setattr(kernels, "check_launch", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    found = dict.fromkeys(backends.OPS) | {"grouped_linear": "differs by 1", "quantize": "no result after 120 s"}
    monkeypatch.setattr(backends, "verdict", lambda device, repeat: found)
    made = backends.backend(CUDA)
    assert made.failures == {op: why for op, why in found.items() if why}
    assert made.can_group is eager.can_group, "experts run one by one"
    assert [str(warning.message) for warning in recwarn] == [
        "NVIDIA H100 (cuda:0): plain torch computes quantize, grouped_linear, because the Triton kernels fail. The "
        "results are right, and slower. quantize: no result after 120 s; grouped_linear: differs by 1. "
        "`lightning-qlora doctor --check` checks them again."
    ]
    assert backends.describe(CUDA) == "Triton kernels, quantize in plain torch, grouped_linear in plain torch"


@pytest.mark.parametrize("reason", ["No module named 'triton'", "libtriton.so: undefined symbol: x"])
@pytest.mark.parametrize("is_launch", [False, True], ids=["import", "first launch"])
def test_a_device_without_triton_gets_the_eager_path_and_a_warning_with_the_reason(
    monkeypatch, recwarn, kernels, reason, is_launch
):
    """A launch fails in a container without a C compiler, or on a card that Triton does not support."""

    def fail(name):
        raise ImportError(reason)

    if is_launch:
        monkeypatch.setattr(kernels, "check_launch", fail)
    else:
        monkeypatch.setattr(backends, "import_module", fail)
    other = torch.device("cuda", 1)
    assert [backends.backend(device).kernels for device in (CUDA, CUDA, other)] == [eager] * 3
    assert [str(warning.message) for warning in recwarn] == [
        f"Triton kernels do not run on {device} (ImportError: {reason}), so 4-bit layers run in eager PyTorch there. "
        "The results are the same, but a matmul takes several passes over memory. Install Triton (for CUDA `pip "
        "install triton`, on Windows `triton-windows`) and a C compiler (or set the variable CC)."
        for device in (CUDA, other)
    ]
    assert backends.describe(CUDA) == "plain torch" and backends.failures(CUDA) == {}


def test_a_first_use_inside_a_capture_is_refused_and_the_next_one_checks(monkeypatch, kernels, recwarn):
    monkeypatch.setattr(kernels, "check_launch", lambda device: None)
    monkeypatch.setattr(backends, "verdict", lambda device, repeat: dict.fromkeys(backends.OPS))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(backends.scratch, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="Run the module there once before the capture"):
        backends.backend(CUDA)
    monkeypatch.setattr(backends.scratch, "is_capturing", lambda device: False)
    assert backends.backend(CUDA).kernels is kernels and not recwarn.list


@pytest.mark.parametrize("where", ["check_launch", "verdict"])
@pytest.mark.parametrize("full", [1, 2], ids=["once", "also after torch gave back what it keeps"])
def test_a_first_use_on_a_full_card_does_not_lose_the_kernels(monkeypatch, kernels, recwarn, where, full):
    """The driver loads kernels outside of torch's allocator."""
    calls = []

    def check(name, error):
        if where == name:
            calls.append(name)
            if len(calls) <= full:
                raise error

    def check_launch(device):
        check("check_launch", RuntimeError("Triton Error [CUDA]: out of memory"))

    def verdict(device, repeat):
        check("verdict", torch.OutOfMemoryError("no memory for the check"))
        return dict.fromkeys(backends.OPS)

    monkeypatch.setattr(kernels, "check_launch", check_launch)
    monkeypatch.setattr(backends, "verdict", verdict)
    if full == 2:
        with pytest.raises(RuntimeError, match="memory"):
            backends.backend(CUDA)
    assert backends.backend(CUDA).kernels is kernels
    assert not backends.failures(CUDA) and not recwarn.list


def test_the_trial_launch_raises_what_the_driver_raises(kernels):
    """Here there is no GPU, or one on which it runs."""
    if torch.cuda.is_available():
        return kernels.check_launch(CUDA)
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA|HIP"):
        kernels.check_launch(CUDA)
    return None


def test_a_type_of_device_that_nobody_tried_is_checked_once_and_a_warning_ends_in_what_to_do():
    """Apple's GPU, which this machine does not have: here every op fails, as torch says."""
    if torch.backends.mps.is_available():
        pytest.skip("has one")
    mps = torch.device("mps")
    with pytest.warns(UserWarning, match="mps") as warnings:
        backends.backend(mps)
    (warning,) = warnings
    text = str(warning.message)
    assert text.startswith("mps: torch has not all that 4-bit layers need, or computes other values (quantize: ")
    assert all(f"; {op}: " in text for op in backends.OPS[1:] if not op.startswith("grouped"))
    assert text.endswith('). This package was never run on such a device. Use accelerator="cpu"')
    assert backends.backend(mps).kernels is eager  # without another warning: they are errors in the tests
    assert backends.describe(mps) == "plain torch"


def test_a_type_of_device_on_which_all_is_right_has_no_warning(monkeypatch):
    """In a thread of its own, which has none of torch's modes."""
    monkeypatch.setattr(backends, "UNTRIED", ("cpu",))
    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu"):
        assert backends.backend(torch.device("cpu")).kernels is eager


def test_a_cpu_without_kernels_has_none_to_check_again():
    cpu = torch.device("cpu")
    assert backends.failures(cpu, repeat=True) == {}
    assert backends.backend(cpu).kernels is eager
    assert backends.describe(cpu) == eager.path()
