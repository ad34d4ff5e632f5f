"""PEFT's folder."""
