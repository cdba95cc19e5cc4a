"""Ranks that change while a run goes on: AdaLoRA's shrink to their budget, DyLoRA's are drawn, and both resume."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.adalora import AdaLoRA
from luthier.adapters.dylora import set_rank
from luthier.adapters.inject import adapter_parameters, inject
from luthier.adapters.peft_format import load_adapter, save_adapter
from luthier.data.batches import TokenBatch, cut
from luthier.data.sequences import TokenSequence
from luthier.models.attention import ATTENTION, register_attention
from luthier.objectives.loss import Loss
from luthier.recipe import adapters as recipe
from luthier.training.checkpoints import Checkpoints
from luthier.training.loop import evaluate_loss, fit, train_step
from luthier.training.run import Run

RowsOf = Callable[..., list[TokenSequence]]
RunOf = Callable[..., Run]
Learnt = Callable[..., tuple[Run, float, Callable[[], float]]]
ADALORA = recipe.AdaLoRA(target_r=2, init_r=4, prune_every=2, dropout=0.1)
DYLORA = recipe.DyLoRA(r=8, min_r=1, alpha=8, dropout=0.1)
NUM_LAYERS, NUM_STEPS = 14, 20
IDS = torch.arange(24)[None]


def base() -> LlamaForCausalLM:
    register_attention()
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_implementation=ATTENTION)
    return LlamaForCausalLM(config).requires_grad_(False)


@pytest.fixture
def begun(run_of: RunOf) -> Callable[..., Run]:
    def begun(settings: recipe.AnyAdapter, *, num_steps: int = NUM_STEPS, learning_rate: float = 1e-2) -> Run:
        """A run over 20 rows, not yet begun."""
        network = base()
        adapters = inject(network, settings, seed=0)
        run = run_of(network=network.train(), epochs=100, max_steps=num_steps, learning_rate=learning_rate)
        return replace(run, adapters=adapters)

    return begun


def kept(run: Run) -> list[int]:
    """The ranks left in each layer."""
    return [int(adapter.kept.sum()) for adapter in run.adapters if isinstance(adapter, AdaLoRA)]


@torch.no_grad()
def logits(network: nn.Module) -> Tensor:
    result: Tensor = network.eval()(IDS).logits
    return result


def test_adaloras_ranks_shrink_to_the_budget_and_so_does_its_file(begun: Callable[..., Run], tmp_path: Path) -> None:
    """56 ranks in 14 layers, of which 28 shall be left; chosen at even steps from 4 to 14. At step t there remain
    28 + 28 (1 - (t - 2) / 12)^3, rounded down: 44, 36, 31, 29, 28, 28.
    """
    run, sums = begun(ADALORA), []
    for _ in range(NUM_STEPS):
        train_step(run)
        sums.append(sum(kept(run)))
    assert sums == [56] * 3 + [44] * 2 + [36] * 2 + [31] * 2 + [29] * 2 + [2 * NUM_LAYERS] * 9
    assert len(set(kept(run))) > 1
    save_adapter(run.state.network, tmp_path, base_model="base")
    loaded = base()
    load_adapter(loaded, tmp_path)
    assert [p.shape[0] for n, p in adapter_parameters(loaded).items() if n.endswith("lora_E")] == kept(run)
    torch.testing.assert_close(logits(loaded), logits(run.state.network), rtol=0, atol=1e-6)


def test_a_file_written_before_the_last_choice_holds_all_that_still_learns(
    begun: Callable[..., Run], tmp_path: Path
) -> None:
    """Step 9 follows a choice of ranks, and lets those that were set to zero grow again."""
    run = begun(ADALORA, learning_rate=0.2)
    for _ in range(9):
        train_step(run)
    assert sum(kept(run)) < 4 * NUM_LAYERS
    save_adapter(run.state.network, tmp_path, base_model="base")
    loaded = base()
    load_adapter(loaded, tmp_path)
    torch.testing.assert_close(logits(loaded), logits(run.state.network), rtol=0, atol=1e-6)


def test_a_missed_last_choice_is_made_up_for(begun: Callable[..., Run]) -> None:
    """The loss of step 14, when the ranks were to be chosen for good, is not finite, so that the step is left out;
    before it they were chosen at step 10, when 29 could stay.
    """
    run = begun(ADALORA.model_copy(update={"prune_every": 5}))
    sound = run.objective

    def unsound(network: nn.Module, batch: TokenBatch) -> Loss:
        loss = sound(network, batch)
        return replace(loss, per_unit=loss.per_unit * float("nan")) if run.state.progress.step == 13 else loss

    run.objective = unsound
    fit(run)
    assert sum(kept(run)) == 2 * NUM_LAYERS


@pytest.mark.parametrize("settings", [ADALORA, DYLORA], ids=["adalora", "dylora"])
@pytest.mark.parametrize("stop_at", [3, 9, 13, 16])
def test_a_run_that_was_stopped_ends_as_the_one_that_was_not(
    begun: Callable[..., Run], settings: recipe.AnyAdapter, stop_at: int, tmp_path: Path
) -> None:
    """Bit for bit, with what the importance of ranks was when it was stopped."""
    whole = begun(settings)
    fit(whole)
    stopped = begun(settings)
    for _ in range(stop_at):
        train_step(stopped)
    place = Checkpoints(tmp_path, keep_last=1, fingerprint="one")
    place.save(stopped.state)
    resumed = begun(settings)
    found = place.latest()
    assert found is not None
    place.load(found, resumed.state)
    fit(resumed)
    tensors, expected = resumed.state.tensors(), whole.state.tensors()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())


@pytest.fixture
def learnt(begun: Callable[..., Run], rows_of: RowsOf) -> Learnt:
    def learnt(settings: recipe.AnyAdapter, *, num_steps: int = 60) -> tuple[Run, float, Callable[[], float]]:
        """A run that is over, the loss before it, and what measures the loss now."""
        run, batches = begun(settings, num_steps=num_steps, learning_rate=1e-2), cut(rows_of(), None)

        def loss() -> float:
            return evaluate_loss(run.state.network, batches, run.objective)

        before = loss()
        fit(run)
        return run, before, loss

    return learnt


def test_dylora_learns_at_every_rank(learnt: Learnt) -> None:
    """The output layer is frozen at |w| = 0.11 a token, so that logits can grow to 0.6 and the loss fall by as much."""
    run, before, loss = learnt(DYLORA)
    losses = []
    for rank in range(1, 9):
        set_rank(run.state.network, rank)
        losses.append(loss())
    assert max(losses) < before - 0.02
    assert losses[-1] < before - 0.2
    assert len(set(losses)) == 8


def test_dylora_is_better_with_rank(learnt: Learnt) -> None:
    """From the loss before, through ranks 1, 2, 4 and 8, it falls by 0.14, 0.09, 0.14 and 0.08 after 150 steps; 0.03
    leaves room for another rounding on the way.
    """
    run, before, loss = learnt(DYLORA.model_copy(update={"dropout": 0.0}), num_steps=150)
    losses = [before]
    for rank in (1, 2, 4, 8):
        set_rank(run.state.network, rank)
        losses.append(loss())
    assert all(higher < lower - 0.03 for lower, higher in pairwise(losses))


def test_adalora_learns(learnt: Learnt) -> None:
    _, before, loss = learnt(ADALORA)
    assert loss() < before - 0.05
