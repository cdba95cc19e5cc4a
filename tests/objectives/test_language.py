"""The language-modelling loss: one number a trained token, unreduced."""

import torch

from luthier.objectives.language import language_modelling


def test_each_token_costs_its_negative_logprob_times_its_weight() -> None:
    loss = language_modelling(torch.tensor([-0.5, -2.0]), torch.tensor([1.0, 0.25]), torch.tensor([0.1, 0.3]))
    assert loss.per_unit.tolist() == [0.5, 0.5]
    assert loss.unit == "tokens"


def test_entropy_is_told_as_a_sum_and_how_many_tokens_it_is_of() -> None:
    loss = language_modelling(torch.zeros(2), torch.ones(2), torch.tensor([0.25, 0.5]))
    assert {name: value.tolist() for name, value in loss.kept.items()} == {"entropy": [0.75, 2.0]}


def test_the_gradient_is_minus_the_weight() -> None:
    logprobs = torch.tensor([-0.5, -2.0], requires_grad=True)
    language_modelling(logprobs, torch.tensor([1.0, 0.25]), torch.zeros(2)).per_unit.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1.0, -0.25]
