"""Preference losses equal their papers' formulas, written here once more in plain numbers, and keep their laws."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from math import exp, log
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from luthier.objectives.loss import Loss
from luthier.objectives.preference import (
    PAIR_LOSSES,
    Answers,
    Verdicts,
    cpo,
    dpo,
    kto,
    orpo,
    simpo,
)
from luthier.recipe.preference import DPO, PairLoss

Answer = tuple[float, float, int]  # log p, log p by the reference, tokens
Pair = tuple[Answer, Answer]  # the better answer and the worse


def s(x: float) -> float:
    return 1 / (1 + exp(-x))


# Of c and r, log p / p_reference of the better answer and of the worse; with b for beta and e for label smoothing.
PAPERS: dict[str, Callable[[float, float, float, float], float]] = {
    "sigmoid": lambda c, r, b, e: -(1 - e) * log(s(b * c - b * r)) - e * log(s(b * r - b * c)),
    "sigmoid_norm": lambda c, r, b, e: PAPERS["sigmoid"](c, r, b, e),
    "hinge": lambda c, r, b, e: max(0.0, 1 - (b * c - b * r)),
    "ipo": lambda c, r, b, e: (c - r - 1 / (2 * b)) ** 2,
    "robust": lambda c, r, b, e: ((1 - e) * -log(s(b * c - b * r)) - e * -log(s(b * r - b * c))) / (1 - 2 * e),
    "exo_pair": lambda c, r, b, e: sum(p * log(p / q) for p, q in ((s(b * c - b * r), 1 - e), (s(b * r - b * c), e))),
    "nca_pair": lambda c, r, b, e: -log(s(b * c)) - sum(0.5 * log(s(-b * ratio)) for ratio in (c, r)),
    "bco_pair": lambda c, r, b, e: -log(s(b * c)) - log(s(-b * r)),
    "sppo_hard": lambda c, r, b, e: (c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2,
    "apo_zero": lambda c, r, b, e: 1 - s(b * c) + s(b * r),
    "apo_down": lambda c, r, b, e: s(b * c) + 1 - s(b * c - b * r),
    "discopop": lambda c, r, b, e: (
        (1 - s((b * c - b * r) / 0.05)) * -log(s(b * c - b * r)) + s((b * c - b * r) / 0.05) * exp(b * r - b * c)
    ),
}
OF_MEANS = ("ipo", "sigmoid_norm")
OF_THE_MARGIN = ("discopop", "exo_pair", "hinge", "robust", "sigmoid")
MONOTONE = ("apo_zero", "bco_pair", "hinge", "robust", "sigmoid", "sigmoid_norm")

# Every objective of pairs, with settings at which none of its terms is absent.
FAMILIES: dict[str, Callable[[Answers], Loss]] = {
    **{name: partial(dpo, loss_type=name, beta=0.1, label_smoothing=0.1, sft_weight=0.2) for name in PAIR_LOSSES},
    "cpo": partial(cpo, beta=0.1, label_smoothing=0.1),
    "orpo": partial(orpo, beta=0.1),
    "simpo": partial(simpo, beta=2.0, gamma=1.0),
}

# Within 20 nats, so that the plain formulas' exp(-z / 0.05) does not overflow at beta 0.5.
answer = st.tuples(st.floats(-20, -0.01), st.floats(-20, -0.01), st.integers(1, 60))
pairs = st.lists(st.tuples(answer, answer), min_size=1, max_size=4)
betas = st.sampled_from([0.05, 0.1, 0.5])
smoothings = st.sampled_from([0.001, 0.1, 0.4])


def answers_of(pairs: list[Pair], dtype: torch.dtype = torch.float64) -> Answers:
    logps, reference, tokens = torch.tensor([answer for pair in pairs for answer in pair], dtype=dtype).T
    return Answers(logps, tokens, torch.arange(2 * len(pairs)).view(-1, 2), reference)


def gradient(objective: Callable[[Answers], Loss], answers: Answers) -> Tensor:
    """Of the sum of the losses in the answers' log-probabilities, [pairs, 2]."""
    logps = answers.logps.clone().requires_grad_()
    objective(replace(answers, logps=logps)).per_unit.sum().backward()
    assert logps.grad is not None
    return logps.grad.view(-1, 2)


def means(loss: Loss) -> dict[str, float]:
    return {name: float(value[0] / value[1]) for name, value in loss.kept.items()}


def test_a_recipe_knows_exactly_the_losses_of_pairs() -> None:
    assert get_args(PairLoss) == tuple(PAIR_LOSSES) == tuple(sorted(PAPERS))


@pytest.mark.parametrize("name", PAIR_LOSSES)
@given(pairs, betas, smoothings)
def test_a_loss_of_pairs_equals_its_papers_formula(name: str, pairs: list[Pair], beta: float, e: float) -> None:
    """To 1e-9, for the plain formulas cancel; their logs of sigmoids lose digits at margins of 20."""
    expected = []
    for (chosen, chosen_reference, n), (rejected, rejected_reference, m) in pairs:
        c, r = chosen - chosen_reference, rejected - rejected_reference
        expected.append(PAPERS[name](c / n, r / m, beta, e) if name in OF_MEANS else PAPERS[name](c, r, beta, e))
    loss = dpo(answers_of(pairs), name, beta=beta, label_smoothing=e)
    assert loss.unit == "pairs"
    assert loss.per_unit.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(pairs, betas, st.sampled_from([0.0, 0.5, 1.6]))
def test_simpo_equals_its_papers_formula(pairs: list[Pair], beta: float, gamma: float) -> None:
    """Meng et al. 2024, eq. 6: no reference model, and means of tokens."""
    expected = [-log(s(beta / n * chosen - beta / m * rejected - gamma)) for (chosen, _, n), (rejected, _, m) in pairs]
    without_reference = replace(answers_of(pairs), reference=None)
    losses = simpo(without_reference, beta=beta, gamma=gamma).per_unit
    assert losses.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(pairs, betas, st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 1.0]))
def test_cpo_equals_its_papers_formula(pairs: list[Pair], beta: float, e: float, weight: float) -> None:
    """Xu et al. 2024, eq. 5: DPO with a uniform reference, and the better answer imitated, here a token."""
    expected = [PAPERS["sigmoid"](c, r, beta, e) - weight * c / n for (c, _, n), (r, _, _) in pairs]
    without_reference = replace(answers_of(pairs), reference=None)
    losses = cpo(without_reference, beta=beta, label_smoothing=e, sft_weight=weight).per_unit
    assert losses.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(pairs, betas, st.sampled_from([0.0, 1.0]))
def test_orpo_equals_its_papers_formula(pairs: list[Pair], beta: float, weight: float) -> None:
    """Hong et al. 2024, eq. 4, 6 and 7. To 1e-9: 1 - p of a mean log p of -2e-4 has 12 digits left."""
    expected = []
    for (chosen, _, n), (rejected, _, m) in pairs:
        odds = [exp(mean) / (1 - exp(mean)) for mean in (chosen / n, rejected / m)]
        expected.append(-weight * chosen / n - beta * log(s(log(odds[0] / odds[1]))))
    losses = orpo(replace(answers_of(pairs), reference=None), beta=beta, sft_weight=weight).per_unit
    assert losses.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        **dict.fromkeys(("sigmoid", "sigmoid_norm", "robust"), log(2)),
        **{"hinge": 1.0, "apo_down": 1.0, "apo_zero": 1.0, "ipo": 25.0, "sppo_hard": 50.0},
        **{"bco_pair": 2 * log(2), "nca_pair": 2 * log(2), "discopop": 0.5 + 0.5 * log(2)},
        "exo_pair": -log(2) - 0.5 * log(0.1 * 0.9),
    }.items(),
)
def test_a_policy_that_is_the_reference_starts_at_a_known_loss(name: str, expected: float) -> None:
    """At beta 0.1 and e 0.1: s(0) = 1/2, and 1 / (2 beta) = 5."""
    at_reference = answers_of([((-3.0, -3.0, 2), (-40.0, -40.0, 9))])
    losses = dpo(at_reference, name, beta=0.1, label_smoothing=0.1).per_unit
    assert losses.tolist() == pytest.approx([expected])


@given(pairs, betas)
def test_dpos_gradient_is_its_papers(pairs: list[Pair], beta: float) -> None:
    """Rafailov et al. 2023, section 4: -beta s(r_rejected - r_chosen), and the opposite for the rejected answer."""
    found = gradient(partial(dpo, loss_type="sigmoid", beta=beta), answers_of(pairs))
    pulls = [beta * s(beta * (r - r_ref) - beta * (c - c_ref)) for (c, c_ref, _), (r, r_ref, _) in pairs]
    torch.testing.assert_close(found, torch.tensor([[-pull, pull] for pull in pulls], dtype=torch.float64))


@given(pairs, betas)
def test_orpos_gradient_is_its_papers(pairs: list[Pair], beta: float) -> None:
    """Hong et al. 2024, eq. 8 to 10: -beta / (1 + odds_c / odds_r) / (1 - p_c) in the better answer's mean."""
    found = gradient(partial(orpo, beta=beta, sft_weight=0.0), answers_of(pairs))
    expected = []
    for (chosen, _, n), (rejected, _, m) in pairs:
        c, r = exp(chosen / n), exp(rejected / m)
        pull = beta / (1 + c / (1 - c) / (r / (1 - r)))
        expected.append([-pull / (1 - c) / n, pull / (1 - r) / m])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", MONOTONE)
@given(pairs, betas)
def test_a_likelier_better_answer_never_costs_more(name: str, pairs: list[Pair], beta: float) -> None:
    """Nor a likelier worse one less; the other losses aim at a finite margin or reward."""
    found = gradient(partial(dpo, loss_type=name, beta=beta, label_smoothing=0.0), answers_of(pairs))
    assert bool((found[:, 0] <= 0).all())
    assert bool((found[:, 1] >= 0).all())


@pytest.mark.parametrize("name", OF_THE_MARGIN)
@given(pairs, st.floats(-5, 5))
def test_what_both_answers_gain_counts_for_nothing(name: str, pairs: list[Pair], shift: float) -> None:
    """The partition function of a prompt cancels (Rafailov et al. 2023, eq. 6)."""
    before = answers_of(pairs)
    after = replace(before, logps=before.logps + shift)
    both = [dpo(each, name, beta=0.1, label_smoothing=0.1).per_unit for each in (before, after)]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm"])
@given(pairs, smoothings)
def test_smoothing_is_symmetric(name: str, pairs: list[Pair], e: float) -> None:
    """A share e of wrong labels costs what a share 1 - e costs with every pair turned round."""
    turned = [(rejected, chosen) for chosen, rejected in pairs]
    loss = partial(dpo, loss_type=name, beta=0.1)
    there = loss(answers_of(pairs), label_smoothing=e).per_unit
    torch.testing.assert_close(there, loss(answers_of(turned), label_smoothing=1 - e).per_unit)


@given(pairs, smoothings)
def test_robust_dpo_is_unbiased(pairs: list[Pair], e: float) -> None:
    """Over labels of which a share e is turned round, its mean is the loss of DPO on the right ones."""
    right, turned = answers_of(pairs), answers_of([(rejected, chosen) for chosen, rejected in pairs])
    robust = partial(dpo, loss_type="robust", beta=0.1, label_smoothing=e)
    mean = (1 - e) * robust(right).per_unit + e * robust(turned).per_unit
    torch.testing.assert_close(mean, dpo(right, "sigmoid", beta=0.1).per_unit)


@given(pairs)
def test_robust_without_wrong_labels_is_dpo(pairs: list[Pair]) -> None:
    both = [dpo(answers_of(pairs), name, beta=0.1).per_unit for name in ("robust", "sigmoid")]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize(
    ("name", "chosen", "rejected"),
    [("ipo", 8.0, -2.0), ("sppo_hard", 5.0, -5.0), ("exo_pair", 10 * log(9), 0.0)],
)
def test_bounded_losses_are_least_where_they_aim_at(name: str, chosen: float, rejected: float) -> None:
    """At beta 0.1 and e 0.1: a mean margin of 5, rewards of 0.5 and -0.5, and s(z) = 0.9. Tokens are 2 and 2."""
    aimed = answers_of([((-50.0 + chosen, -50.0, 2), (-50.0 + rejected, -50.0, 2))])
    objective = partial(dpo, loss_type=name, beta=0.1, label_smoothing=0.1)
    assert objective(aimed).per_unit.tolist() == pytest.approx([0.0], abs=1e-12)
    torch.testing.assert_close(gradient(objective, aimed), torch.zeros(1, 2, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_are_finite_for_any_answer(name: str) -> None:
    """In float32, for log p of an answer from -1e4 to -1e-6, whatever the reference thinks of it."""
    extremes = list(product([-1e4, -500.0, -3.0, -1e-6], repeat=4))
    answers = answers_of([((c, i, 1), (r, j, 30)) for c, r, i, j in extremes], torch.float32)
    assert bool(FAMILIES[name](answers).per_unit.isfinite().all())
    assert bool(gradient(FAMILIES[name], answers).isfinite().all())


@pytest.mark.parametrize("near", [-1e-7, -1e-8, -1e-30, 0.0])
def test_orpo_is_finite_where_an_answer_is_certain(near: float) -> None:
    """float32 has exp(x) = 1 from -6e-8 on, where odds are infinite as written."""
    answers = answers_of([((near, 0.0, 1), (-3.0, 0.0, 2)), ((-3.0, 0.0, 2), (near, 0.0, 1))], torch.float32)
    assert bool(FAMILIES["orpo"](answers).per_unit.isfinite().all())
    assert bool(gradient(FAMILIES["orpo"], answers).isfinite().all())


@pytest.mark.parametrize("name", FAMILIES)
def test_pairs_of_a_ranking_cost_what_they_cost_alone(name: str) -> None:
    ranked: list[Answer] = [(-3.0, -5.0, 2), (-7.0, -6.0, 4), (-9.0, -6.5, 3)]
    order = [(0, 1), (0, 2), (1, 2)]
    alone = FAMILIES[name](answers_of([(ranked[i], ranked[j]) for i, j in order]))
    three = answers_of([(ranked[0], ranked[1]), (ranked[2], ranked[2])])
    together = FAMILIES[name](replace(three, pairs=torch.tensor(order)))
    torch.testing.assert_close(together.per_unit, alone.per_unit)
    assert means(together) == pytest.approx(means(alone))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_loss_of_pairs_is_finite_with_a_recipes_defaults(name: str) -> None:
    settings = DPO.model_validate({"data": "pairs.jsonl", "loss_type": name})
    answers = answers_of([((-3.0, -5.0, 2), (-7.0, -6.0, 4))])
    loss = dpo(answers, name, beta=settings.beta, label_smoothing=settings.label_smoothing)
    assert bool(loss.per_unit.isfinite().all())


@pytest.mark.parametrize("name", PAIR_LOSSES)
@given(pairs)
def test_any_loss_can_add_imitation_of_the_better_answer(name: str, pairs: list[Pair]) -> None:
    """Minus its mean log p a token, and told as nll_loss, a mean over pairs."""
    loss = partial(dpo, answers_of(pairs), name, beta=0.1, label_smoothing=0.1)
    plain, added = loss(), loss(sft_weight=0.25)
    nll = torch.tensor([-chosen / n for (chosen, _, n), _ in pairs], dtype=torch.float64)
    torch.testing.assert_close(added.per_unit - plain.per_unit, 0.25 * nll, rtol=1e-9, atol=1e-9)
    assert means(added)["nll_loss"] == pytest.approx(float(nll.mean()))
    assert "nll_loss" not in plain.kept


@pytest.mark.parametrize("name", FAMILIES)
def test_pairs_are_told_of_by_the_usual_names(name: str) -> None:
    usual = {f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")}
    further = {"orpo": {"nll_loss", "log_odds_chosen", "log_odds_ratio"}, "simpo": set()}.get(name, {"nll_loss"})
    loss = FAMILIES[name](answers_of([((-3.0, -5.0, 2), (-7.0, -6.0, 4))]))
    assert set(loss.kept) == usual | {"rewards/margins", "rewards/accuracies"} | further


def test_rewards_are_beta_times_log_ratios() -> None:
    """A pair with equal rewards is not right: of three one is."""
    tied: Pair = ((-4.0, -5.0, 2), (-5.0, -6.0, 4))
    loss = dpo(
        answers_of([((-3.0, -5.0, 2), (-7.0, -6.0, 4)), ((-8.0, -5.0, 2), (-7.0, -7.0, 4)), tied]), "hinge", beta=0.5
    )
    expected = {
        **{"rewards/chosen": 0.5 * (2 - 3 + 1) / 3, "rewards/rejected": 0.5 * (-1 + 0 + 1) / 3},
        **{"rewards/margins": 0.5 * (3 - 3 + 0) / 3, "rewards/accuracies": 1 / 3},
        **{"logps/chosen": -15 / 3, "logps/rejected": -19 / 3},
    }
    assert means(loss) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("simpo", (2.0 * -1.5, 2.0 * -1.75)), ("cpo", (0.1 * -3.0, 0.1 * -7.0)), ("orpo", (0.1 * -1.5, 0.1 * -1.75))],
)
def test_rewards_without_a_reference_are_of_log_probabilities(name: str, expected: tuple[float, float]) -> None:
    """beta times log p: its mean a token in SimPO and ORPO, its sum in CPO."""
    told = means(FAMILIES[name](answers_of([((-3.0, 0.0, 2), (-7.0, 0.0, 4))])))
    assert (told["rewards/chosen"], told["rewards/rejected"]) == pytest.approx(expected)
    assert told["rewards/margins"] == pytest.approx(expected[0] - expected[1])


Verdict = tuple[float, float, int, bool]  # log p, log p by the reference, tokens, desirable
verdicts = st.lists(
    st.tuples(st.floats(-20, -0.01), st.floats(-20, -0.01), st.integers(1, 60), st.booleans()), min_size=1, max_size=5
)


def verdicts_of(rows: list[Verdict], baseline: float | None = None, dtype: torch.dtype = torch.float64) -> Verdicts:
    logps, reference, tokens, desirable = torch.tensor(rows, dtype=dtype).T
    told = None if baseline is None else torch.tensor(baseline, dtype=dtype)
    return Verdicts(logps, tokens, reference, desirable.bool(), told)


@given(verdicts, betas, st.sampled_from([0.0, 0.7, 12.0]))
def test_kto_equals_its_papers_formula(rows: list[Verdict], beta: float, baseline: float) -> None:
    """Ethayarajh et al. 2024, eq. 7: lambda_y - v, v = lambda_D s(beta (r - z0)) or lambda_U s(beta (z0 - r))."""
    expected = []
    for logp, reference, _, desirable in rows:
        gained = logp - reference - baseline
        expected.append(1.1 - 1.1 * s(beta * gained) if desirable else 0.7 - 0.7 * s(-beta * gained))
    loss = kto(verdicts_of(rows, baseline), "kto", beta=beta, desirable_weight=1.1, undesirable_weight=0.7)
    assert loss.unit == "sequences"
    assert loss.per_unit.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(verdicts, betas)
def test_unpaired_apo_zero_has_no_baseline(rows: list[Verdict], beta: float) -> None:
    """D'Oosterlinck et al. 2024, eq. 7, one answer at a time: 1 - s(r) of a desirable one, s(r) of another."""
    expected = [1 - s(beta * (p - q)) if desirable else s(beta * (p - q)) for p, q, _, desirable in rows]
    for baseline in (None, 3.0):
        loss = kto(verdicts_of(rows, baseline), "apo_zero_unpaired", beta=beta)
        assert loss.per_unit.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert means(loss)["kl"] == 0


@pytest.mark.parametrize("loss", ["apo_zero_unpaired", "kto"])
def test_an_answers_verdict_says_which_way_it_is_drawn(loss: str) -> None:
    """Up where it is desirable, down where it is not, and not at all where its kind weighs nothing."""
    rows = [(-3.0, -5.0, 2, True), (-9.0, -6.0, 3, False)]
    for weight in (1.0, 0.0):
        verdicts = verdicts_of(rows, 0.5)
        logps = verdicts.logps.clone().requires_grad_()
        kto(replace(verdicts, logps=logps), loss, beta=0.1, undesirable_weight=weight).per_unit.sum().backward()
        assert logps.grad is not None
        assert logps.grad.sign().tolist() == [-1.0, weight]


@pytest.mark.parametrize("loss", ["apo_zero_unpaired", "kto"])
def test_feedback_costs_something_finite_for_any_answer(loss: str) -> None:
    """In float32, for log p of an answer from -1e4 to -1e-6, whatever the reference thinks of it."""
    extremes = list(product([-1e4, -500.0, -1e-6], [-1e4, -1e-6], [7], [True, False]))
    verdicts = verdicts_of(extremes, 1e4, torch.float32)
    logps = verdicts.logps.clone().requires_grad_()
    losses = kto(replace(verdicts, logps=logps), loss, beta=0.1, sft_weight=0.2).per_unit
    losses.sum().backward()
    assert logps.grad is not None
    assert bool(losses.isfinite().all() and logps.grad.isfinite().all())


@pytest.mark.parametrize("loss", ["apo_zero_unpaired", "kto"])
@given(verdicts)
def test_feedback_can_add_imitation_of_desirable_answers(loss: str, rows: list[Verdict]) -> None:
    """Minus their mean log p a token, and told as nll_loss, a mean over them alone."""
    plain, added = (kto(verdicts_of(rows), loss, beta=0.1, sft_weight=w) for w in (0.0, 0.25))
    nll = [-logp / n if desirable else 0.0 for logp, _, n, desirable in rows]
    assert (added.per_unit - plain.per_unit).tolist() == pytest.approx([0.25 * each for each in nll], abs=1e-9)
    assert added.kept["nll_loss"].tolist() == pytest.approx([sum(nll), sum(row[3] for row in rows)])
    assert "nll_loss" not in plain.kept


def test_each_kind_of_feedback_is_averaged_over_itself() -> None:
    """Two desirable answers of three; where there is none of a kind, there are no numbers to average."""
    rows = [(-3.0, -5.0, 2, True), (-6.0, -5.0, 4, True), (-9.0, -6.0, 3, False)]
    loss = kto(verdicts_of(rows, 0.25), "kto", beta=0.5)
    assert means(loss) == pytest.approx(
        {"rewards/chosen": 0.25, "rewards/rejected": -1.5, "logps/chosen": -4.5, "logps/rejected": -9.0, "kl": 0.25}
    )
    of_one_kind = kto(verdicts_of(rows[:2]), "kto", beta=0.5).kept
    assert of_one_kind["rewards/rejected"].tolist() == of_one_kind["logps/rejected"].tolist() == [0.0, 0.0]
