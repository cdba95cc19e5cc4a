"""How much of a weight is quantized or made dense at once: as much as its processor works through fastest."""

import torch

__all__ = ["weights_at_once"]

IN_CACHE = 2**20
WORTH_A_LAUNCH = 2**26  # a GPU waits for each launch; this takes under 1 GB of temporary memory


def weights_at_once(device: torch.device) -> int:
    """A number of weights, a multiple of 64."""
    return IN_CACHE if device.type == "cpu" else WORTH_A_LAUNCH
