"""The server that a recipe may let answer in rollouts, and how an updated model gets there.

Only what is true of every server of a kind is refused here; whether the one at an address answers is found out when it
is asked.
"""

import re
from typing import Annotated, Literal, Self

from annotated_types import Ge
from pydantic import AfterValidator, model_validator

from luthier.recipe.problems import Problem, Problems
from luthier.recipe.servers import Address, KeyVariable, Seconds
from luthier.recipe.settings import Count, Settings, Word

__all__ = ["PUSHABLE", "LogprobsMode", "Push", "RolloutServer", "ServerKind"]

ServerKind = Literal["vllm", "sglang", "llama_cpp", "openai"]
Push = Literal["adapter", "weights"]
LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]

PUSHABLE: dict[ServerKind, tuple[Push, ...]] = {
    "vllm": ("adapter",),
    "sglang": ("adapter", "weights"),
    "llama_cpp": (),  # POST /lora-adapters only weighs adapters that the server was started with
    "openai": (),
}
"""What a server of each kind can take while it runs."""


def _name(name: str) -> str:
    """It becomes a part of a path."""
    if re.fullmatch(r"\w[\w.-]*", name):
        return name
    raise ValueError(f'expected letters, digits, ".", "_" and "-", got "{name}"')


class RolloutServer(Settings):
    """A model behind a server samples the answers."""

    url: Address
    """The server's address up to /v1; what lies beside /v1 is found from there."""

    model: Word
    """The model's name there. It must be the model that is trained, with the same tokens."""

    kind: ServerKind
    """vllm, sglang, llama_cpp, or openai for any other: that one gives text without tokens, which is encoded anew."""

    api_key_env: KeyVariable | None = None
    """The environment variable that holds the key; none for a server without keys."""

    timeout_seconds: Seconds = 600.0
    """How long all answers to one prompt may take."""

    retries: Annotated[int, Ge(0)] = 3
    """How often a prompt is sent again after a timeout, a lost connection, or the statuses 408, 429 and 5xx."""

    parallel: Count = 16
    """Requests under way at the same time."""

    logprobs_mode: LogprobsMode = "raw_logprobs"
    """What vLLM was started with as --logprobs-mode. With raw_logprobs, log-probabilities are known at temperature 1
    (and 0) alone, with processed_logprobs only where top_k, top_p, min_p and repetition_penalty cut nothing."""

    push: Push | None = "adapter"
    """What is sent after each update: adapter (vllm, sglang; LoRA only), weights (sglang: the whole model), or none."""

    allow_stale: bool = False
    """Train on answers of a server that is never updated: from the second update on they are another model's."""

    adapter_name: Annotated[Word, AfterValidator(_name)] = "luthier"
    """What adapters are called there, with their version behind it. Two runs on one server need two names."""

    shared_folder: Word | None = None
    """A folder that this machine and the server's share; what is pushed is copied there. None on the same machine."""

    server_folder: Word | None = None
    """The path of shared_folder on the server's machine, where it is another."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        takes = PUSHABLE[self.kind]
        if self.push is not None and self.push not in takes:
            can, mend = " or ".join(takes) or "nothing", (*takes, "none")[0]
            raise Problems([Problem(("push",), f"{self.kind} takes {can} while it runs; set push: {mend}")])
        if self.server_folder is not None and self.shared_folder is None:
            raise Problems([Problem(("server_folder",), "is another name of shared_folder; add shared_folder")])
        return self
