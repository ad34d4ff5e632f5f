"""Which activations a step keeps for its backward pass."""
