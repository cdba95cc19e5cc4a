"""A policy stage's own parts of a run: who samples answers, who gives rewards, and who warns of what goes wrong."""

import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from luthier.adapters.inject import DEFAULT_NAME
from luthier.adapters.switch import adapter_names, delete_adapter
from luthier.models.load import Model
from luthier.models.merge import merge_into
from luthier.models.save import save
from luthier.models.values import remove_value_head, without_value_head
from luthier.pipeline.live import store_adapter
from luthier.pipeline.prompts import PreparedPrompts
from luthier.pipeline.python_rewards import Functions
from luthier.pipeline.rollout_memory import weights_of
from luthier.pipeline.rollouts import RolloutPlan
from luthier.recipe.policy import OnPolicy
from luthier.recipe.rewards import parts_of
from luthier.recipe.rollout_servers import Push
from luthier.rollout.engine import LocalEngine
from luthier.rollout.pushing import check_updates
from luthier.rollout.requests import Engine, Request, Sample, Sampling
from luthier.rollout.rewards import rewarder_of
from luthier.rollout.scoring import Failure
from luthier.rollout.server_engine import ServerEngine, server_engine
from luthier.training.callbacks import Metrics
from luthier.training.run import Run

__all__ = ["on_rollouts", "remove_others"]

logger = logging.getLogger(__name__)

_ROLLOUTS_IN_A_ROW = 3  # with rewards that go with the length, before a warning


def on_rollouts(run: Run, prepared: PreparedPrompts, model: Model, folder: Path, *, functions: Functions) -> None:
    """Gives the run rollouts as its plan. functions: that the reward means. Raises RecipeError for rewards, servers or
    weights that cannot be had, and AdapterError for a reward model's adapter that does not fit.
    """
    settings = run.settings
    assert isinstance(settings, OnPolicy), "only policies learn on prompts"
    plan = RolloutPlan(
        settings,
        prepared,
        model,
        folder,
        engine=_engine(settings, model, folder),
        rewarder=rewarder_of(parts_of(settings.reward), functions=functions, model=model),
        room=run.room,
        oldest_step=run.checkpoints.oldest_step if run.checkpoints else lambda: 0,
    )
    run.plan = plan
    run.evaluation = plan.evaluation if prepared.held_out and settings.eval_every else None
    run.callbacks = [*run.callbacks, Warner(settings)]


def remove_others(network: PreTrainedModel) -> None:
    """Takes off what stands beside the policy while it learns: a value head, a critic's adapter, reward models'."""
    remove_value_head(network)
    for name in adapter_names(network):
        if name != DEFAULT_NAME:
            delete_adapter(network, name)


def _engine(settings: OnPolicy, model: Model, folder: Path) -> Engine:
    if settings.server is not None:
        check_updates(settings.server)
        return _Pushed(server_engine(settings.server, model.tokenizer), settings.server.push, model, folder / "pushed")
    return LocalEngine(model, weights=weights_of(settings, model.network), max_rows=settings.rollout_rows)


@dataclass(slots=True)
class _Pushed:
    """A server that is sent the policy as it is each time before it is asked, where it can take it."""

    engine: ServerEngine
    what: Push | None
    model: Model
    folder: Path
    version: int = field(default=0, init=False)

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[tuple[Sample, ...] | Failure]:
        """As the server's engine. Raises what storing and pushing raise."""
        if self.what is not None:
            self.version += 1
            place = self.folder / f"version-{self.version}"
            _store(self.model, place, merged=self.what == "weights")
            self.engine.push(place, self.version)
            for earlier in self.folder.glob("version-*"):
                if earlier != place:
                    shutil.rmtree(earlier)
        return self.engine.sample(requests, sampling)


def _store(model: Model, place: Path, *, merged: bool) -> None:
    """Writes the policy's adapter, or the whole policy."""
    if not merged:
        store_adapter(model, place)
    elif DEFAULT_NAME not in adapter_names(model.network):
        with without_value_head(model.network):
            save(model, place)
    else:
        with tempfile.TemporaryDirectory() as folder:
            store_adapter(model, Path(folder))
            merge_into(model.source, Path(folder), place, tokenizer=model.tokenizer)


class Warner:
    """Says once what a run's numbers mean where they go wrong: an entropy that falls to nothing, rewards for length."""

    def __init__(self, settings: OnPolicy) -> None:
        self.settings = settings
        self.steps_per_rollout = settings.minibatches * settings.rollout_epochs
        self.told: set[str] = set()
        self.in_a_row = 0

    def on_start(self, step: int, num_steps: int) -> None:
        """Nothing to prepare."""

    def on_metrics(self, metrics: Metrics) -> None:
        """Looks at the numbers of a step."""
        entropy = metrics.get("entropy")
        if entropy is not None and entropy < self.settings.min_entropy:
            self._warn(
                f"step {metrics['step']}: the policy's entropy is {entropy:.3f} nats a token, under min_entropy, so it "
                "hardly tries anything new; raise temperature, entropy_weight or clip_high, or lower learning_rate"
            )
        correlation = metrics.get("rewards/length_correlation")
        if correlation is None or metrics["step"] % self.steps_per_rollout:
            return
        self.in_a_row = self.in_a_row + 1 if abs(correlation) > self.settings.max_length_correlation else 0
        if self.in_a_row >= _ROLLOUTS_IN_A_ROW:
            self._warn(
                f"step {metrics['step']}: rewards go with the answers' length (correlation {correlation:.2f}), so that "
                "may be what is learned; look at rollouts/*/answers.jsonl"
            )

    def on_end(self) -> None:
        """Nothing to close."""

    def _warn(self, sentence: str) -> None:
        kind = sentence.partition(": ")[2][:20]
        if kind not in self.told:
            self.told.add(kind)
            logger.warning("%s", sentence)
