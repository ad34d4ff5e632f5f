"""QLoRALinear and what it is made of."""
