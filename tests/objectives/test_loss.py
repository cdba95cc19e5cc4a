"""What a loss keeps of its metrics: a sum and how many numbers it is of, however they were given, and no gradient."""

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
    for name in ("single", "mean"):
        total, number = loss.kept[name].tolist()
        assert total == pytest.approx(sum(values), abs=0.03)
        assert number == len(values)


@given(st.lists(numbers, max_size=20), st.integers(1, 30))
def test_a_metric_counts_its_own_numbers_and_not_the_units(values: list[float], num_units: int) -> None:
    total, number = Loss(torch.zeros(num_units), "sequences", {"some": torch.tensor(values)}).kept["some"].tolist()
    assert total == pytest.approx(sum(values), abs=0.03)
    assert number == len(values)


@given(st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=20))
def test_a_masked_metric_counts_what_the_mask_says(pairs: list[tuple[float, bool]]) -> None:
    """Such as rewards of the desirable answers, of which a batch may hold none."""
    values, mask = (torch.tensor(column) for column in zip(*pairs, strict=True))
    total, number = Loss(torch.zeros(len(pairs)), "sequences", {"some": (values, mask)}).kept["some"].tolist()
    assert total == pytest.approx(sum(value for value, counts in pairs if counts), abs=0.03)
    assert number == sum(counts for _, counts in pairs)


@pytest.mark.parametrize(("given", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_sums_are_of_float32_at_least(given: torch.dtype, wide: torch.dtype) -> None:
    """A thousand ones add up to a thousand, which bfloat16, with 8 bits, would not count to."""
    loss = Loss(torch.zeros(1000), "tokens", {"ones": torch.ones(1000, dtype=given)})
    assert loss.kept["ones"].dtype == wide
    assert loss.kept["ones"].tolist() == [1000.0, 1000.0]


def test_a_metric_holds_no_gradient_and_its_loss_does() -> None:
    logprobs = torch.tensor([-0.5, -2.0], requires_grad=True)
    loss = Loss(-logprobs, "tokens", {"logprob": logprobs})
    assert loss.per_unit.requires_grad
    assert not loss.kept["logprob"].requires_grad
