"""The C kernels for CPUs: source (`c/`), compilation when first needed (`build`), calls with tensors (`library`)."""
