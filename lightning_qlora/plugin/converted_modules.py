"""ConvertedModules: the modules that a plugin converted, of which a Trainer has one, and Fabric may have several."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_qlora.conversion.report import ConversionReport, say
from lightning_qlora.dtypes.full_precision import autocast_type, hold, in_type
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.plugin.audit import Audit
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.records import record_rounded
from lightning_qlora.tensors.held_types import advice_on_types


@dataclass
class _Converted:
    report: ConversionReport
    device: str  # the kind of device that it is on
    audit: Audit
    has_observers: bool = True  # whether adapters may wait for inputs


class ConvertedModules:
    """The modules, which are not kept alive; copies and pickles of the plugin have none."""

    def __init__(self) -> None:
        self._converted = WeakKeyDictionary[nn.Module, _Converted]()

    def __reduce__(self) -> Any:
        return type(self), ()

    @property
    def last(self) -> nn.Module | None:
        return next(reversed([*self._converted]), None)

    def layers(self) -> Iterator[LoRALayer]:
        if self.last is not None:
            yield from _layers(self.last)

    def add(self, module: nn.Module, report: ConversionReport, again: bool) -> ConversionReport:
        """Add a module that was converted, and return its report; `again`: that of its first conversion here."""
        previous = self._converted.pop(module, None)
        if again and previous is not None:
            report = previous.report
        device = next((layer.packed.device.type for layer in _layers(module)), "cpu")
        self._converted[module] = _Converted(report, device, Audit(report))
        return report

    def use(self, module: nn.Module) -> None:
        """Make a converted module the last one again: a callback of its run ran another module."""
        if module in self._converted:
            self._converted[module] = self._converted.pop(module)

    def advise(self, error: BaseException) -> None:
        """Say what to do about an error in a run of the last module, if it comes from what conversion changed."""
        if self.last is not None:
            advice = advice_on_types(error, self.last)
            if advice is not None and sys.version_info >= (3, 11):
                error.add_note(f"QLoRA: {advice}")
            elif advice is not None:
                say(advice)

    def audit(self, optimizer: Optimizer) -> None:
        """Check, between a backward pass and the step of an optimizer, that what it holds trains."""
        for module, converted in self._converted.items():
            converted.audit.before_step(module, optimizer)

    def observers(self) -> Iterator[tuple[Any, list[Any]]]:
        """What computes adapters in the first step (`Calibration`), with the observers of the layers that wait."""
        groups: dict[int, list[Any]] = {}
        for module, converted in self._converted.items():
            if converted.has_observers:
                found = [layer.input_observer for layer in _layers(module) if layer.input_observer is not None]
                converted.has_observers = bool(found)
                for observer in dict.fromkeys(found):
                    groups.setdefault(id(observer.report), []).append(observer)
        for observers in groups.values():
            yield observers[0].report, [*dict.fromkeys(observers)]

    def _hold_what_moved(self) -> None:
        """Hold what Fabric moved, after its conversion, in the type that its new device should compute in."""
        for module in [*self._converted]:
            converted: _Converted = self._converted[module]
            layer = next(_layers(module), None)
            if layer is None or layer.packed.device.type == converted.device:
                continue
            converted.device = layer.packed.device.type
            parts = Parts.of(module, wrappers=())
            held = hold(parts.modules, layer.config.compute_dtype, layer.packed.device)
            record_rounded(parts.named)
            if held != converted.report.held:
                converted.report.held = held
                converted.report.count(parts)
                rank_zero_info(f"QLoRA: moved to {layer.packed.device}. {converted.report.summary()}")

    def autocast(self, last_alone: bool) -> AbstractContextManager[Any]:
        """Autocast around a forward pass or a step: of what trains in full in 16 bits, or of fp32 weights in bf16.

        Fabric does not say whose forward pass it is: each of several modules enters its own autocast where they differ.
        `last_alone`: the others were of earlier Trainers.
        """
        if not last_alone:
            self._hold_what_moved()
        dtypes = {module: _autocast_dtype(module) for module in self._converted}
        if last_alone:
            dtypes = {module: dtype for module, dtype in dtypes.items() if module is self.last}
        if len({*dtypes.values()}) > 1:
            for module, dtype in dtypes.items():
                if dtype is not None:
                    in_type(module).autocast = dtype
            return nullcontext()
        dtype = next(iter(dtypes.values()), None)
        if dtype is None:
            return nullcontext()
        # Without the cache of casts: an optimizer may step within a training step.
        return torch.autocast(_device_type(self.last), dtype, cache_enabled=False)


def _layers(module: nn.Module) -> Iterator[LoRALayer]:
    return (part for part in module.modules() if isinstance(part, LoRALayer))


def _device_type(module: nn.Module | None) -> str:
    assert module is not None
    return next(module.parameters()).device.type


def _autocast_dtype(module: nn.Module) -> torch.dtype | None:
    """The type that a module computes in under autocast; None: without.

    Without in fp16: 4-bit layers have a power of two there, and the products of other layers could overflow.
    """
    if (of_16_bits := autocast_type(module)) is not None:
        return of_16_bits
    dtypes = {layer.weight_dtype for layer in _layers(module)}
    if dtypes != {torch.float32}:
        return None
    layer = next(_layers(module))
    dtype = layer.compute_dtype(layer.packed.device)
    return dtype if dtype is torch.bfloat16 else None
