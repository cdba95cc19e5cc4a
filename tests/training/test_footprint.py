"""What a step is said to hold is what it holds: the same count on tensors with values and without."""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from luthier.data.batches import collate
from luthier.models.recompute import checkpoint_layers
from luthier.training.footprint import Footprint, LiveBytes, step_footprint
from luthier.training.run import Run

RunOf = Callable[..., Run]


def footprint(run: Run, num_rows: int = 8) -> Footprint:
    return step_footprint(run.state, collate(run.plan.items[:num_rows]), run.objective)


def test_bytes_are_counted_from_an_operation_to_the_release_of_its_result() -> None:
    with LiveBytes() as counter:
        kept = torch.ones(100)  # 400 bytes
        (kept + 1).sum()  # another 400, and 4 of the sum beside it
    assert (counter.live, counter.peak) == (400, 804)
    del kept
    assert counter.live == 0


def test_views_and_work_in_place_take_nothing() -> None:
    with LiveBytes() as counter:
        x = torch.zeros(64)
        x.view(8, 8).t().add_(1)
    assert counter.peak == x.nbytes


def test_without_values_a_step_counts_the_same_as_with_them(run_of: RunOf) -> None:
    real = footprint(run_of())
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert footprint(run_of()) == real


def test_gradients_and_moments_follow_from_the_number_of_trained_parameters(run_of: RunOf) -> None:
    run = run_of()
    trained = list(run.state.trained().values())
    found, num_parameters = footprint(run), sum(p.numel() for p in trained)
    assert found.gradients == 4 * num_parameters
    assert found.optimizer == 8 * num_parameters + 4 * len(trained)  # two moments each, and AdamW's count of steps
    assert found.weights == sum(p.nbytes for p in run.state.network.parameters()) + sum(
        b.nbytes for b in run.state.network.buffers()
    )
    assert found.masters == 0


def test_a_model_trained_in_bf16_has_masters_of_twice_its_size(run_of: RunOf) -> None:
    network = run_of().state.network.to(torch.bfloat16).requires_grad_(True)
    run = run_of(network=network)
    assert footprint(run).masters == 2 * sum(p.nbytes for p in network.parameters())


def test_recomputed_layers_hold_less(run_of: RunOf) -> None:
    run = run_of()
    kept = footprint(run).activations
    checkpoint_layers(run.state.network, 1)
    assert footprint(run).activations < kept


@pytest.mark.parametrize("num_rows", [1, 2, 4])
def test_activations_grow_with_the_tokens(run_of: RunOf, num_rows: int) -> None:
    run = run_of()
    assert footprint(run, num_rows).activations < footprint(run, 2 * num_rows).activations
