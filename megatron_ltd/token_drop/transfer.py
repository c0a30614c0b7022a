"""Copies from the host to the device that the host does not wait for."""

import torch


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a tensor on the host. Only copies from pinned memory run in the background."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
