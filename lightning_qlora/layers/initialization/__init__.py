"""Initial values of LoRA adapters, and the 4-bit base that belongs to them."""
