"""Learning rates step by step, against numbers worked out by hand and against transformers' own schedules."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from luthier.recipe.training import Training
from luthier.training.schedules import learning_rate_at

SCHEDULES = ["constant", "cosine", "linear", "wsd"]


def settings(schedule: str, *, warmup_ratio: float = 0.0, **others: float) -> Training:
    return Training(data="rows", learning_rate=1.0, schedule=schedule, warmup_ratio=warmup_ratio, **others)


def rates(num_steps: int, chosen: Training) -> list[float]:
    return [learning_rate_at(step, num_steps, chosen) for step in range(num_steps)]


def test_a_warm_up_rises_by_equal_parts_and_the_first_step_learns() -> None:
    """Warm-up of 4 steps: fifths, and the fifth step has the whole rate."""
    assert rates(10, settings("constant", warmup_ratio=0.4)) == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 6])


def test_linear_falls_by_equal_parts_and_would_reach_zero_after_the_last_step() -> None:
    assert rates(4, settings("linear")) == pytest.approx([1, 0.75, 0.5, 0.25])


def test_cosine_falls_along_half_a_wave() -> None:
    """(1 + cos(pi x)) / 2 at x = 0, 1/4, 1/2, 3/4."""
    half = math.sqrt(0.5) / 2
    assert rates(4, settings("cosine")) == pytest.approx([1, 0.5 + half, 0.5, 0.5 - half])


def test_wsd_stays_and_then_falls_over_the_last_part() -> None:
    assert rates(10, settings("wsd", decay_ratio=0.4)) == pytest.approx([*[1.0] * 7, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("schedule", "theirs"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
def test_after_the_warm_up_rates_are_transformers_own(schedule: str, theirs: object) -> None:
    """Their first step has the rate 0, so that of our warm-up is one part ahead."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = theirs(optimizer, num_warmup_steps=6, num_training_steps=20)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(20, settings(schedule, warmup_ratio=0.3))[6:] == pytest.approx(expected[6:])


@given(
    schedule=st.sampled_from(SCHEDULES), num_steps=st.integers(1, 200), warmup_ratio=st.floats(0, 0.9), data=st.data()
)
def test_rates_are_positive_rise_once_and_never_pass_the_highest(
    schedule: str, num_steps: int, warmup_ratio: float, data: st.DataObject
) -> None:
    found = rates(num_steps, settings(schedule, warmup_ratio=warmup_ratio))
    warmup = math.ceil(warmup_ratio * num_steps)
    assert all(0 < rate <= 1 for rate in found)
    assert found[:warmup] == sorted(found[:warmup])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    step = data.draw(st.integers(0, num_steps - 1))
    assert learning_rate_at(step, num_steps, settings(schedule, warmup_ratio=warmup_ratio)) == found[step]
