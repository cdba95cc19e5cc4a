"""The divergence of two distributions by chunks is the one by definition, whatever happens to the logits."""

import pytest
import torch

from luthier.kernels.divergence import linear_divergence
from luthier.kernels.logprobs import HeadOptions


@pytest.mark.parametrize("options", [HeadOptions(), HeadOptions(scale=0.5, softcap=3.0)], ids=["plain", "capped"])
def test_chunks_give_the_divergence_by_definition(options: HeadOptions) -> None:
    torch.manual_seed(0)
    hidden, other = torch.randn(2, 50, 8, dtype=torch.float64)
    weight, bias = torch.randn(31, 8, dtype=torch.float64), torch.randn(31, dtype=torch.float64)
    few = HeadOptions(options.scale, options.softcap, chunk_bytes=4 * 31 * 7)
    found = linear_divergence(hidden, other, (weight, weight), (bias, None), few)
    p, q = (h @ weight.T for h in (hidden, other))
    p, q = (options.scale * logits for logits in (p + bias, q))
    if options.softcap is not None:
        p, q = (options.softcap * torch.tanh(logits / options.softcap) for logits in (p, q))
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(
        -1
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (found > 0).all()


def test_a_distribution_is_no_distance_from_itself() -> None:
    hidden, weight = torch.randn(5, 8), torch.randn(31, 8)
    assert torch.equal(linear_divergence(hidden, hidden, (weight, weight), (None, None), HeadOptions()), torch.zeros(5))
