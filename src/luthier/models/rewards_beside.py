"""A reward model on another model's body, so that one set of weights serves both.

Its adapter stands beside those that the model carries, frozen and switched off but for the time that it gives rewards,
and its head beside the output layer.
"""

from collections.abc import Sequence
from pathlib import Path

from luthier.adapters.inject import adapted_layers
from luthier.adapters.peft_format import read_adapter
from luthier.adapters.switch import adapter_names, adapters_on, delete_adapter
from luthier.data.examples import Chat
from luthier.errors import AdapterError
from luthier.models.adapted import put_on
from luthier.models.heads import trains_head, with_head_beside
from luthier.models.load import Model
from luthier.models.rewards import rewards
from luthier.models.score import evaluating

__all__ = ["RewardsBeside"]


class RewardsBeside:
    """Called with conversations, the reward of each, as `rewards` has it."""

    def __init__(self, model: Model, adapter: Path | str, *, name: str = "reward") -> None:
        """adapter: one that was trained with its head, on the weights that the model has below its adapters. name:
        which it gets on the model, followed by a number where that is taken.

        Raises AdapterError for an adapter without a head, and what `put_on` raises, with the model as it was.
        """
        saved = read_adapter(Path(adapter))
        if not trains_head(saved.settings):
            raise AdapterError(f"{adapter}: was trained without a head, so it gives no rewards; see `luthier reward`")
        carried = adapter_names(model.network)
        self.name = next(one for i in range(len(carried) + 1) if (one := f"{name}-{i}" if i else name) not in carried)
        self.model = with_head_beside(model)
        put_on(self.model, saved, name=self.name)
        for place in adapted_layers(self.model.network).values():
            if self.name in place.adapters:
                place.adapters[self.name].requires_grad_(False)
                place.active = tuple(one for one in place.active if one != self.name)

    def __call__(self, chats: Sequence[Chat]) -> list[float]:
        """Raises what `rewards` raises."""
        with evaluating(self.model.network), adapters_on(self.model.network, self.name):
            return rewards(self.model, chats)

    def close(self) -> None:
        """Takes the adapter off the model, where it is still on."""
        if self.name in adapter_names(self.model.network):
            delete_adapter(self.model.network, self.name)
