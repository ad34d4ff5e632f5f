"""The prepared launches that the functions of the kernels keep."""

from importlib import import_module
from pkgutil import iter_modules

from benchmarks import products
from lightning_qlora.kernels import backends
from lightning_qlora.kernels import triton as kernels

MODULES = {name: import_module(f"{kernels.__name__}.{name}") for _, name, _ in iter_modules(kernels.__path__)}


def forget_launches() -> None:
    """They hold kernels that were compiled for one card, or that a test replaced."""
    for module in (*MODULES.values(), products):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    for backend in backends._backends.values():
        backend.plans.clear()
