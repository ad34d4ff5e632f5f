"""Turns oneDNN off when torch is imported, as on a processor for which it has no products of 16-bit matrices."""

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder

INSTRUCTIONS = ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_vnni_supported", "_is_amx_tile_supported")


class _WithoutOneDNN(Loader):
    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        module.backends.mkldnn.set_flags(False)
        for name in INSTRUCTIONS:
            if hasattr(module.cpu, name):
                setattr(module.cpu, name, lambda: False)


class _Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        spec.loader = _WithoutOneDNN(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
