"""8-bit optimizers of torchao and bitsandbytes: paged, and resumed."""

import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

import lightning_qlora
from lightning_qlora import QLoRAPrecision
from lightning_qlora.optim.paged_state import tensors_in
from tests.optim.runs import HAS_CXX, Regression, fit, parameters
from tests.optim.stand_in import assert_all_paged
from tests.optim.test_optimizer_pages import assert_equal_parameters, attached, model, train
from tests.toys import assert_equal


def of_torchao(params, **options):
    return pytest.importorskip("torchao.optim").AdamW8bit(params, lr=1e-2, **options)


def of_bitsandbytes(params, **options):
    return pytest.importorskip("bitsandbytes.optim").AdamW8bit(params, lr=1e-2, **options)


class ReadToCPU(TorchCheckpointIO):
    """Lightning's, with a device in place of a function, which torch refuses for tensor subclasses as torchao's."""

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return super().load_checkpoint(path, "cpu", weights_only)


NEEDS_CXX = pytest.mark.skipif(not HAS_CXX, reason="no C++ compiler")
KINDS = pytest.mark.parametrize("kind", [pytest.param(of_torchao, marks=NEEDS_CXX), of_bitsandbytes])


@KINDS
def test_paged_equals_unpaged_and_state_moves_between_both(stand_in, kind, tmp_path):
    plain, paged = model(), model()
    reference, optimizer = kind(plain.parameters()), attached(kind(paged.parameters()))
    train(plain, reference, 4)
    train(paged, optimizer, 2)
    assert_all_paged(stand_in, optimizer, least=4)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = attached(kind(paged.parameters()))
    resumed.load_state_dict(saved)
    train(paged, resumed, 2, start=2)
    assert_all_paged(stand_in, resumed, least=4)
    assert_equal_parameters(plain, paged)
    unpaged = kind(paged.parameters())
    unpaged.load_state_dict(resumed.state_dict())
    theirs, ours = ([*tensors_in(optimizer.state_dict()["state"])] for optimizer in (unpaged, resumed))
    assert_equal(theirs, ours)


@KINDS
def test_a_run_of_the_plugin_resumes_bit_for_bit(kind, tmp_path):
    def run(**options):
        optimizers = []

        def make(params):
            optimizers.append(kind([p for p in params if p.requires_grad]))
            return optimizers[0]

        module = Regression(make)
        plugin = QLoRAPrecision(r=16, lora_dropout=0.0, modules_to_save=["net.2"])  # a weight large enough for 8 bits
        fit(module, plugins=[plugin, ReadToCPU()], **options)
        assert sum(tensor.dtype == torch.uint8 for tensor in tensors_in(optimizers[0].state)) == 2
        return parameters(module)

    straight = run()
    run(epochs=1, save=tmp_path / "half.ckpt")
    assert torch.equal(run(ckpt_path=tmp_path / "half.ckpt"), straight)


def test_the_removed_name_says_what_to_use():
    with pytest.raises(ImportError, match=r"torchao\.optim\.AdamW8bit or bitsandbytes\.optim\.AdamW8bit"):
        _ = lightning_qlora.PagedAdamW8bit
