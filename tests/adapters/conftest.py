"""What the tests against PEFT's classes share."""

from collections.abc import Callable

import peft
import pytest
import torch
from torch import nn

from luthier.adapters.inject import adapter_parameters

IDS = torch.arange(1, 25).view(2, 12)

Compare = Callable[[nn.Module, peft.PeftModel], None]


@pytest.fixture
def same_as_pefts() -> Compare:
    """Holds a model with our adapter against PEFT's: the same logits, and each parameter's gradient, to 1e-5 of the
    largest: float32 sums of another order. No gradient of PEFT's is left over.
    """

    def compare(mine: nn.Module, theirs: peft.PeftModel) -> None:
        torch.testing.assert_close(mine(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)
        for model in (mine, theirs):
            model(input_ids=IDS, labels=IDS).loss.backward()
        expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
        largest = max(float(grad.abs().max()) for grad in expected.values())
        for name, parameter in adapter_parameters(mine).items():
            path, _, word = name.partition(".adapters.default.")
            peer = expected.pop(f"base_model.model.{path}.{word}.default")
            torch.testing.assert_close(parameter.grad, peer, rtol=0, atol=1e-5 * largest)
        assert not expected

    return compare
