"""Adapters of a module to PEFT's folder and back."""

from lightning_qlora.adapters.module import adapter_of, load_adapter, save_adapter

__all__ = ["adapter_of", "load_adapter", "save_adapter"]
