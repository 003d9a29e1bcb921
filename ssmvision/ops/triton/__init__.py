"""The slot for Triton kernels (CUDA and ROCm). Nothing here imports triton until a GPU tensor asks for it."""


def load() -> None:
    """Make the kernels ready.

    Raises:
        NotImplementedError: Always, as yet: scans on GPU tensors run on the reference backend, with a warning.
    """
    raise NotImplementedError("Triton kernels are not written yet")
