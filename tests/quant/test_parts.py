"""A weight is worked through in parts on a CPU and nearly at once on a GPU, to the same bits."""

import pytest
import torch

from luthier.quant import int8, nf4
from luthier.quant.linear import QUANTIZERS
from luthier.quant.parts import weights_at_once


@pytest.mark.parametrize("scheme", sorted(QUANTIZERS))
def test_the_size_of_the_parts_changes_no_bit(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    whole = QUANTIZERS[scheme].of(weight)
    for module in (int8, nf4):
        monkeypatch.setattr(module, "weights_at_once", lambda device: 256)
    parts = QUANTIZERS[scheme].of(weight)
    assert all(torch.equal(*pair) for pair in zip(whole, parts, strict=True))
    dense = [stored.dense(weight.shape, weight.dtype) for stored in (whole, parts)]
    monkeypatch.undo()
    assert torch.equal(whole.dense(weight.shape, weight.dtype), dense[1])


def test_a_gpu_takes_a_large_layer_in_few_launches() -> None:
    """Of 4,096 x 14,336 weights; parts are whole blocks of 64."""
    at_once = {kind: weights_at_once(torch.device(kind)) for kind in ("cpu", "cuda")}
    assert at_once["cuda"] >= 4096 * 14336 > at_once["cpu"]
    assert all(weights % nf4.BLOCK == 0 for weights in at_once.values())
