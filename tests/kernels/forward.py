def forward(backend, x, weight, bias, lora_a, lora_b, scaling, p, seed):
    """y and drop(x) A^T, by the two functions of a backend."""
    xa = backend.lora_project(x, lora_a, p, seed)
    y = x.new_empty(len(x), weight.shape[0])
    backend.linear_into(y, x, xa, weight, bias, lora_b, scaling)
    return y, xa
