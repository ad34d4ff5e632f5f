"""Every private name of another library that the package uses is there, and an error names the version if it is not."""

import pytest

from lightning_qlora import upstream_changes, upstream_names
from lightning_qlora.upstream_names import check_names, missing_names, used_attributes, used_names


def test_the_installed_versions_have_every_name():
    pytest.importorskip("transformers")
    assert len(used_names()) > 30
    assert not missing_names(("torch", "lightning", "transformers", "peft", "huggingface_hub"))


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from torch._subclasses.fake_tensor import FakeTensor\n", [("torch._subclasses.fake_tensor", "FakeTensor")]),
        ("    from lightning.fabric.wrappers import _Module as M, _O\n", [("lightning.fabric.wrappers", "_Module")]),
        ("from torch.utils import (\n    _pytree,  # _no\n    data,\n)\n", [("torch.utils", "_pytree")]),
        ("x = torch._C._autograd.hooks()\n", [("torch", "_C._autograd.hooks")]),
        ('@replaces("transformers.models:Model.load")\n', [("transformers.models", "Model.load")]),
        ("from torch import nn\nx = torch.nn.Linear\nself._torch = module._buffers\n", []),
    ],
)
def test_what_is_found_in_a_source(source, names):
    found = list(upstream_names._names_in(source))
    assert [each for each in found if each in names] == names
    assert names or not found


def test_private_attributes_of_their_objects_are_listed():
    assert {"_buffers", "_parameters"} <= used_attributes().keys()


@pytest.fixture
def newer_torch(monkeypatch):
    """As with a torch that is not the tested one and lacks a name."""
    monkeypatch.setattr(upstream_names, "tested_versions", lambda: {"torch": "2.0.1"})
    names = {("torch", "_C._gone"): ["kernels/a.py"], ("torch", "nn.Linear"): ["b.py"]}
    monkeypatch.setattr(upstream_names, "used_names", lambda: names)
    check_names.cache_clear()
    yield
    check_names.cache_clear()


@pytest.mark.usefixtures("newer_torch")
def test_a_name_that_is_gone_is_an_error_with_the_versions_before_anything_is_changed():
    message = r"^torch \S+ lacks what lightning_qlora needs: torch\._C\._gone \(in kernels/a\.py\)\. .*'torch==2\.0\.1'"
    with pytest.raises(ImportError, match=message):
        upstream_changes.make_changes("lightning", "torch")


@pytest.mark.usefixtures("newer_torch")
def test_a_package_that_is_not_installed_has_no_version_to_check(monkeypatch):
    monkeypatch.setattr(upstream_names, "tested_versions", lambda: {})
    check_names("no_such_package")
