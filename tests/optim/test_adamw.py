import pytest
import torch

from lightning_qlora.optim.adamw import PagedAdamW
from tests.optim.stand_in import assert_all_paged
from tests.optim.test_optimizer_pages import assert_equal_parameters, model, train


def test_paged_equals_unpaged_by_itself(stand_in):
    paged = model()
    optimizer = PagedAdamW(paged.parameters(), lr=1e-2)
    train(paged, optimizer, 6)
    assert_all_paged(stand_in, optimizer, least=4)
    plain = model()
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0), 6)
    assert_equal_parameters(plain, paged)


def test_no_parameters_is_torchs_error():
    for parameters in ([], iter([])):
        with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
            PagedAdamW(parameters)
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an iterable"):
        PagedAdamW(torch.zeros(2))


def test_a_learning_rate_that_changed_is_loaded_and_defaults_are_those_of_the_paper():
    params = [torch.nn.Parameter(torch.ones(300))]
    saved, other = (PagedAdamW(params, lr=1e-2) for _ in range(2))
    saved.param_groups[0].update(lr=5e-4, weight_decay=0.3)
    other.load_state_dict(saved.state_dict())
    assert (other.param_groups[0]["lr"], other.param_groups[0]["weight_decay"]) == (5e-4, 0.3)
    assert PagedAdamW(params).defaults == torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0).defaults
    assert PagedAdamW(params, amsgrad=True).defaults["amsgrad"]
