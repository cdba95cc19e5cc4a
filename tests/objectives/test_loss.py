"""What a loss keeps of its metrics: sums over units, however they were given, and no gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.objectives.loss import Loss

numbers = st.floats(-1e3, 1e3, width=32)


@given(st.lists(numbers, min_size=1, max_size=20))
def test_one_number_a_unit_and_their_mean_are_the_same_metric(values: list[float]) -> None:
    """Up to rounding: twenty float32 numbers of up to 1e3 add up to within 20 * 2e4 * 2^-24 < 0.03."""
    metric = torch.tensor(values)
    loss = Loss(torch.zeros(len(values)), "tokens", {"single": metric, "mean": metric.mean()})
    assert float(loss.metrics["single"]) == pytest.approx(sum(values), abs=0.03)
    assert float(loss.metrics["mean"]) == pytest.approx(sum(values), abs=0.03)


def test_a_metric_holds_no_gradient_and_its_loss_does() -> None:
    logprobs = torch.tensor([-0.5, -2.0], requires_grad=True)
    loss = Loss(-logprobs, "tokens", {"logprob": logprobs})
    assert loss.per_unit.requires_grad
    assert not loss.metrics["logprob"].requires_grad
