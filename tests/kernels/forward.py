from lightning_qlora.kernels.lora import LoRA


def forward(backend, x, weight, bias, *lora):
    """y and drop(x) A^T, by the two functions of a backend."""
    lora = LoRA(*lora)
    xa = backend.lora_project(x, lora)
    y = x.new_empty(len(x), weight.shape[0])
    backend.linear_into(y, x, xa, weight, bias, lora)
    return y, xa
