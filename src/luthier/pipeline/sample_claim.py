"""What a sampling is made of, in words and digests that stand beside its output.

Answers follow from the model, the prompts' tokens and how they are sampled; rewards from what gives them and from the
prompts' rows; what is kept of both, from the choice. Of a server only its model's name is known.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from luthier.data.examples import Prompt
from luthier.models.load import Model
from luthier.pipeline.live import carries_adapter, start_digest
from luthier.pipeline.reward_hashes import reward_hashes
from luthier.recipe.rewards import AnyReward, parts_of
from luthier.recipe.sampling import AnswerSampling
from luthier.rollout.requests import Request

__all__ = ["answers_made_of", "choice_made_of", "rewards_made_of"]

_CHOICE = {"keep", "keep_truncated", "min_reward"}
_SAMPLING = {
    *("num_answers", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "seed"),
    *("dtype", "rollout_weights"),
}


def answers_made_of(settings: AnswerSampling, model: Model, requests: Sequence[Request]) -> dict[str, Any]:
    """Raises AdapterError for a model with several adapters, or one that does not apply as a whole."""
    return settings.model_dump(mode="json", include=_SAMPLING) | {
        "model": _model(settings, model),
        "data": _digest(request.prompt_ids.tobytes() for request in requests),
    }


def rewards_made_of(settings: AnswerSampling, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Raises ModelError where a reward model cannot be found."""
    rows = _digest(repr(prompt).encode() for prompt in prompts)
    return {"reward": [_part(part) for part in parts_of(settings.reward)], "rows": rows}


def choice_made_of(settings: AnswerSampling) -> dict[str, Any]:
    """What decides which answers are kept."""
    return settings.model_dump(mode="json", include=_CHOICE)


def _model(settings: AnswerSampling, model: Model) -> str:
    if settings.server is not None:
        return f"{settings.server.model} on a server"
    return start_digest(model) if carries_adapter(model) else model.source.weights_hash


def _part(part: AnyReward) -> Any:
    """A part of a reward by its settings, with digests of what these name."""
    return part.model_dump(mode="json") | {"made_of": list(reward_hashes(part).values())}


def _digest(pieces: Iterable[bytes]) -> str:
    """Of all pieces, each in its length."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(f"{len(piece)} ".encode() + piece)
    return digest.hexdigest()
