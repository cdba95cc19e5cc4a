"""Tiny runs: a network from a configuration and a seed, rows of random tokens, and the Run over them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapters.inject import inject
from luthier.data.batches import StepPlan, TokenBatch
from luthier.data.examples import Origin
from luthier.data.sequences import TokenSequence
from luthier.models.attention import ATTENTION, register_attention
from luthier.models.score import score
from luthier.objectives.language import language_modelling
from luthier.objectives.loss import Loss
from luthier.recipe.adapters import LoRA
from luthier.recipe.training import Training
from luthier.training.optimizers import make_optimizer
from luthier.training.precision import Precision, float32_masters
from luthier.training.run import Run
from luthier.training.state import Progress, TrainState

RUN_FIELDS = ("checkpoints", "eval_items", "callbacks", "adapters", "objective")


def make_network(*, dropout: float = 0.0) -> LlamaForCausalLM:
    """Frozen, with a LoRA on every linear layer, in training mode."""
    register_attention()
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_implementation=ATTENTION)
    network = LlamaForCausalLM(config).requires_grad_(False)
    inject(network, LoRA(r=4, dropout=dropout), seed=0)
    return network.train()


def make_rows(count: int = 20, *, seed: int = 0) -> list[TokenSequence]:
    """Of 4 to 16 random tokens, half of them trained, the last always."""
    draw = np.random.default_rng(seed)
    rows = []
    for line in range(count):
        num_tokens = int(draw.integers(4, 17))
        trained = draw.random(num_tokens) < 0.5
        trained[-1] = True
        ids = draw.integers(97, size=num_tokens, dtype=np.int32)
        rows.append(TokenSequence(ids, trained, Origin("rows.jsonl", line)))
    return rows


def objective(network: torch.nn.Module, batch: TokenBatch) -> Loss:
    scores = score(network, batch)
    return language_modelling(scores.logprobs, batch.weights, scores.entropy)


def make_run(**given: Any) -> Run:
    """A Run over 20 rows in steps of 8: settings and fields of Run by name; `dropout` of its adapter, or a `network`
    of its own and the weights that its masters start from, `stored`.
    """
    network = given.pop("network", None) or make_network(dropout=given.pop("dropout", 0.0))
    precision = Precision(float32_masters(network, given.pop("stored", None)))
    rows = given.pop("rows", None) or make_rows()
    fields = {name: given.pop(name) for name in RUN_FIELDS if name in given}
    defaults = {"data": "rows.jsonl", "batch_size": 8, "learning_rate": 1e-2, "warmup_ratio": 0.0, "epochs": 2}
    settings = Training.model_validate(defaults | given)
    return Run(
        state=TrainState(network, make_optimizer(network, settings, precision), Progress(), precision),
        plan=StepPlan(rows, settings.batch_size, settings.epochs, settings.seed, settings.max_steps),
        settings=settings,
        micro_batch_tokens=settings.micro_batch_tokens,
        **{"objective": objective} | fields,
    )


def break_steps(run: Run, steps: Sequence[int]) -> None:
    """From now on the losses of these steps, counted from 0, are not numbers."""
    sound = run.objective

    def objective(network: torch.nn.Module, batch: TokenBatch) -> Loss:
        loss = sound(network, batch)
        factor = float("nan") if network.training and run.state.progress.step in steps else 1.0
        return language_modelling(-loss.per_unit * factor, batch.weights, loss.per_unit.detach())

    run.objective = objective


@pytest.fixture(scope="session")
def broken() -> Callable[[Run, Sequence[int]], None]:
    return break_steps


@pytest.fixture(scope="session")
def run_of() -> Callable[..., Run]:
    return make_run


@pytest.fixture(scope="session")
def rows_of() -> Callable[..., list[TokenSequence]]:
    return make_rows
