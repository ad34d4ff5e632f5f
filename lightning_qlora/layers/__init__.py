"""What a linear layer becomes."""
