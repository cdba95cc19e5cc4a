"""What all adapters' settings share, and those of adapters that sit on linear layers."""

import json
from typing import Annotated, ClassVar, Literal, Self

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import model_validator

from luthier.recipe.problems import Problem, Problems
from luthier.recipe.settings import Names, Settings, Word

__all__ = ["AnyAdapter", "Dropout", "OnLinear", "Positive"]

Positive = Annotated[float, Gt(0)]
Dropout = Annotated[float, Ge(0), Lt(1)]


class AnyAdapter(Settings):
    """What every adapter knows."""

    type: str
    """Which adapter it is."""

    new_tokens: tuple[Word, ...] = ()
    """Tokens that are added to the vocabulary; their rows of embedding and output layer alone are trained."""

    trainable_token_indices: tuple[Annotated[int, Ge(0)], ...] = ()
    """Tokens of the vocabulary whose rows of embedding and output layer are trained, by number. With new_tokens it says
    their numbers, which follow from the tokenizer."""

    modules_to_save: tuple[Word, ...] = ()
    """Modules that are trained whole besides, by the end of their names (`lm_head`), and saved with the adapter."""

    rate_ratio: ClassVar[float] = 1.0  # by which a stage's usual learning rate is multiplied

    @model_validator(mode="after")
    def _name_tokens_once(self) -> Self:
        found = []
        for field in ("new_tokens", "trainable_token_indices"):
            values = getattr(self, field)
            twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
            if twice is not None:
                found.append(Problem((field,), f"{json.dumps(twice)} stands there twice; leave one out"))
        if self.new_tokens and len(self.trainable_token_indices) not in (0, len(self.new_tokens)):
            found.append(Problem(("trainable_token_indices",), "are not as many as new_tokens; leave it out"))
        if found:
            raise Problems(found)
        return self


class OnLinear(AnyAdapter):
    """What adapters of linear layers know."""

    target_modules: Literal["all-linear"] | Names = "all-linear"
    """Which linear layers are adapted, by the end of their names; `all-linear` is all but the output layer."""

    layers_to_transform: Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(1)] | None = None
    """The numbers of the blocks that are adapted, from 0 on; all where not given."""
