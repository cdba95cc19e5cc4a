"""Settings of making examples by sampling: prompts are answered several times, and only good answers are kept.

With `keep: all` it is rejection sampling, with `keep: best` best-of-n. What one stage learns from rewards step by step
is here had at once and without training: the answers are a file that an sft stage learns from.
"""

from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt, Le
from pydantic import Field, model_validator

from luthier.recipe.problems import Problem, Problems
from luthier.recipe.rewards import RewardSettings
from luthier.recipe.rollout_servers import RolloutServer
from luthier.recipe.rounds import PromptFormat
from luthier.recipe.settings import Count, Names, Settings, Word
from luthier.recipe.training import DType, OnError, Seed

__all__ = ["AnswerSampling", "AnsweringServer"]

_Positive = Annotated[float, Gt(0)]
_OF_PUSHING = ("allow_stale", "adapter_name", "shared_folder", "server_folder")


class AnsweringServer(RolloutServer):
    """A model behind a server answers, as it is."""

    model: Word
    """The model's name there. It must have the tokens and the chat template of the model that is named outside."""

    push: None = None
    """Nothing is sent: nothing is learned meanwhile."""

    @model_validator(mode="after")
    def _is_left_as_it_is(self) -> Self:
        given = [name for name in _OF_PUSHING if name in self.model_fields_set]
        if given:
            raise Problems([Problem((name,), "has no effect where nothing is sent; leave it out") for name in given])
        return self


class AnswerSampling(Settings):
    """How prompts are answered, and which answers are kept."""

    model: Word = "smollm2-135m"
    """The model that answers: an alias, a hub id, a folder or a .gguf file."""

    data: Word | Names
    """Files, folders or patterns with prompts; relative ones start at the current folder."""

    reward: RewardSettings
    """What gives an answer its number: exact, numeric, math, regex, tags, json, length, code, model, judge, a function
    (`rewards.py:score`), or a list of these with weights."""

    format: PromptFormat | None = None
    """The format of the rows, which are prompts; recognised from the columns where it is not named."""

    columns: dict[Word, Word] = Field(default={})
    """Which column stands for a name of the format: `prompt: question` reads the column `question` as the prompt."""

    output: Word = "picked.jsonl"
    """The file of the answers that are kept, as messages; all answers go to a folder beside it."""

    num_answers: Count = 8
    """Answers to each prompt."""

    keep: Literal["all", "best"] = "best"
    """Which answers are kept: of each prompt the best one, the first of equals, or all that reach min_reward, each
    text once."""

    min_reward: float | None = None
    """The lowest reward of an answer that is kept."""

    keep_truncated: bool = False
    """Keeps answers that were cut off at max_new_tokens too; they teach to stop in the middle of a sentence."""

    max_new_tokens: Count = 256
    """The longest answer, in tokens."""

    temperature: _Positive = 1.0
    """How freely answers are sampled."""

    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """The share of the probability, the most likely tokens first, that answers are sampled from."""

    top_k: Annotated[int, Ge(0)] = 0
    """Only so many of the most likely tokens are sampled from; 0 for all."""

    min_p: Annotated[float, Ge(0), Le(1)] = 0.0
    """Only tokens with this share of the most likely one's probability are sampled from."""

    repetition_penalty: _Positive = 1.0
    """Makes tokens that were there already less likely when sampling."""

    stop: tuple[Word, ...] = ()
    """Texts that end an answer, and stand in it."""

    seed: Seed = 42
    """Decides, with a prompt's place, the draws."""

    batch_size: Count = 32
    """Prompts that are answered, scored and written down together; an interruption loses no more."""

    server: AnsweringServer | None = None
    """A server that samples the answers; by default the model does."""

    rollout_weights: Literal["auto", "dense", "fp16", "int8"] = "auto"
    """How weights are stored while sampling on a CPU: fp16 halves what a token reads, int8 quarters it and is less
    exact; auto is fp16 where that can be had, else dense."""

    rollout_rows: Count = 64
    """Answers in the making at once."""

    dtype: DType = "bf16"
    """The type of the weights."""

    on_error: OnError = "stop"
    """What a row that does not fit does: ends the command, or is skipped, counted and put into quarantine.jsonl."""

    @model_validator(mode="after")
    def _agree_on_keeping(self) -> Self:
        if self.keep == "all" and self.min_reward is None:
            raise Problems([Problem(("min_reward",), "keep: all keeps what reaches it; give one, or choose best")])
        return self
