"""What a run's numbers say: each sign on a curve that has it, none on healthy noisy ones, and once in a run."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.training.callbacks import Metrics
from luthier.training.diagnosis import Diagnosis, is_flat, learns_by_heart, rises, swings
from luthier.training.spikes import is_spike

Curve = list[float]
SIGNS = (is_flat, rises, swings)


def noisy(values: Sequence[float], noise: float, seed: int = 0) -> Curve:
    """The values, each off by up to the share `noise`."""
    drawn = np.random.default_rng(seed).uniform(1 - noise, 1 + noise, len(values))
    return [float(value) for value in np.asarray(values) * drawn]


def flat() -> Curve:
    return noisy([2.0] * 120, 0.03)


def rising() -> Curve:
    return noisy([3 - i / 40 for i in range(60)] + [2.5] * 30, 0.05)


def swinging() -> Curve:
    return noisy([2 + math.sin(i / 6) for i in range(200)], 0.05)


@pytest.mark.parametrize(("curve", "sign"), [(flat(), is_flat), (rising(), rises), (swinging(), swings)])
def test_each_sign_is_seen_in_its_curve(curve: Curve, sign: Callable[[Curve], bool]) -> None:
    assert sign(curve)
    assert not is_flat(curve) or sign is is_flat


@given(
    num_steps=st.integers(30, 400),
    start=st.floats(0.5, 8),
    left=st.floats(0, 0.6),
    pace=st.floats(0.1, 1.0),
    noise=st.floats(0, 0.15),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_healthy_curve_has_no_sign_at_any_step(
    num_steps: int, start: float, left: float, pace: float, noise: float, seed: int
) -> None:
    """start * (left + (1 - left) exp(-t / (pace * num_steps))), looked at when the run looks."""
    clean = [start * (left + (1 - left) * math.exp(-t / (pace * num_steps))) for t in range(num_steps)]
    losses = noisy(clean, noise, seed)
    for end in range(5, num_steps + 1, 5):
        assert not rises(losses[:end])
        assert not swings(losses[:end])
    for end in range(num_steps // 3, num_steps + 1, num_steps // 3):
        assert not is_flat(losses[:end])


def test_a_curve_that_has_fallen_and_stays_low_is_no_flat_one() -> None:
    assert not is_flat(noisy([2.0] * 40 + [1.0] * 400, 0.05))
    assert is_flat(noisy([1.0] * 400, 0.05))
    assert not is_flat([1.0] * 29)
    assert not is_flat(noisy([2.0] * 60, 0.8)), "too much noise to say"


def test_a_loss_that_leaps_at_once_has_risen_though_it_comes_back() -> None:
    assert rises([5.0, *noisy([90 - i for i in range(40)], 0.05)])


def test_one_rise_is_no_swinging_and_one_bad_row_no_rise() -> None:
    assert not swings(rising())
    bump = [2.0] * 50 + [9.0] + [2.0] * 50
    assert not any(sign(noisy(bump, 0.05)) for sign in (rises, swings))


def test_rows_are_learned_by_heart_where_only_the_training_loss_falls() -> None:
    trained = [math.nan, 2.0, 1.5, 1.0, 0.5, 0.2]
    held_out = [2.2, 1.8, 1.7, 1.8, 1.9, 2.0]
    assert learns_by_heart(held_out, trained)
    assert not learns_by_heart(held_out[:-1], trained[:-1]), "twice is not three times"
    assert not learns_by_heart(held_out, [math.nan, 2.0, 1.5, 1.5, 1.6, 1.7]), "then it diverges"
    assert not learns_by_heart([2.2, 1.8, 1.7, 1.71, 1.72, 1.72], trained), "within the margin"
    assert not learns_by_heart([5, 50, 40, 30], [math.nan, 90, 60, 40]), "then it has diverged and comes back"
    assert learns_by_heart([2.0, 2.1, 2.2, 2.3], [math.nan, 1.9, 1.5, 1.0]), "from the start"


@given(left=st.floats(0, 0.9), seed=st.integers(0, 2**32 - 1))
def test_a_held_out_loss_that_falls_and_settles_is_none_of_that(left: float, seed: int) -> None:
    held_out = noisy([2 * (left + (1 - left) * math.exp(-i)) for i in range(20)], 0.005, seed)
    assert not any(learns_by_heart(held_out[:end], [2.0 - i / 20 for i in range(end)]) for end in range(1, 21))


def test_a_spike_is_ten_times_what_is_usual() -> None:
    usual = noisy([1.0] * 40, 0.5)
    assert is_spike(20.0, usual)
    assert not is_spike(5.0, usual)
    assert not is_spike(20.0, usual[:19]), "too early to say"
    assert not is_spike(0.5, noisy([1.0] * 40 + [0.01] * 60, 0.1)), "less than what the run began with"


@given(st.lists(st.floats(0.3, 2.9), min_size=1, max_size=80))
def test_norms_within_ten_times_of_each_other_never_spike(norms: Curve) -> None:
    assert not any(is_spike(norms[i], norms[:i]) for i in range(len(norms)))


def lines(losses: Sequence[float], norms: Sequence[float] | None = None) -> list[Metrics]:
    norms = norms or [1.0] * len(losses)
    return [
        {"step": i + 1, "loss": loss, "grad_norm": norm, "learning_rate": 1e-4}
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True))
    ]


def said(told: Sequence[Metrics], tmp_path: Path, caplog: pytest.LogCaptureFixture, *, falls: bool = True) -> list[str]:
    diagnosis = Diagnosis(tmp_path / "metrics.jsonl", falls=falls)
    diagnosis.on_start(0, len(told))
    for line in told:
        diagnosis.on_metrics(line)
    diagnosis.on_end()
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        (flat(), "has not fallen since the start"),
        (rising(), "stays over what it was"),
        (swinging()[15:], "goes up and down"),
        ([2.0, math.nan, math.nan], "step 2: the loss is nan: the weights have grown"),
        ([math.inf, 2.0], "step 1: the loss is inf before anything was trained"),
    ],
)
def test_a_sign_is_said_once_with_its_mend(
    losses: Curve, sentence: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = said(lines(losses), tmp_path, caplog)
    assert sum(sentence in line for line in found) == 1
    assert all("learning_rate" in line or "dtype: fp32" in line for line in found)
    caplog.clear()
    of_policy = said(lines(losses), tmp_path, caplog, falls=False)
    assert of_policy == [line for line in found if "the loss is" in line]


def test_what_is_wrong_with_a_gradient_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    norms = [*noisy([1.0] * 30, 0.3), 50.0, math.inf, 60.0]
    found = said(lines(noisy(np.geomspace(3, 1, 33).tolist(), 0.01), norms), tmp_path, caplog)
    assert ["usual" in line for line in found] == [True, False]
    assert "but its gradient inf" in found[1]


def test_a_scale_that_is_sought_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = [line | {"loss_scale": 2.0**16} for line in lines([2.0, 1.9], [math.inf, math.inf])]
    assert said(told, tmp_path, caplog) == []
    assert len(said([told[0] | {"loss": math.nan}], tmp_path, caplog)) == 1


def test_overfitting_is_said_of_evaluations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[Metrics] = [{"step": 0, "eval_loss": 2.2}]
    losses = np.geomspace(2, 0.1, 40).tolist()
    for step, line in enumerate(lines(losses), start=1):
        told += [line, *([{"step": step, "eval_loss": 1.5 + step / 100}] if step % 5 == 0 else [])]
    (sentence,) = said(told, tmp_path, caplog)
    assert "step 20: the held-out loss has risen from 1.550 to 1.700" in sentence


def test_a_run_that_goes_on_knows_what_was_and_says_nothing_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    losses = noisy(np.geomspace(3, 1, 60).tolist(), 0.03) + noisy([1.0] * 120, 0.03)
    path = tmp_path / "metrics.jsonl"
    for earlier, expected in [(losses[:60], 0), (flat()[:60], 1)]:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines(earlier)))
        caplog.clear()
        diagnosis = Diagnosis(path)
        diagnosis.on_start(60, 180)
        for line in lines([*earlier, *losses[60:]])[60:]:
            diagnosis.on_metrics(line)
        assert ("flat" in diagnosis.told) == bool(expected)
        assert not caplog.records or expected == 0, "the sign was said before"
