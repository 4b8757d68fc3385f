"""Grouped low-rank products: every token of a batch has an adapter of its own, or none."""

from importlib.util import find_spec

import torch

from lorafold_adapters.kernels.reference import Kernels, Reference

__all__ = ["Kernels", "Reference", "kernels_for"]


def kernels_for(device: torch.device) -> Kernels | None:
    """Triton's on a GPU, if it is installed; None where batched products of torch do better."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from lorafold_adapters.kernels.triton_products import TritonProducts

    return TritonProducts()
