"""`luthier generate`: one answer to each prompt, from the command line or from standard input, a line each."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from luthier.data.examples import Chat, Message
from luthier.errors import AdapterError
from luthier.models.adapted import load_adapted
from luthier.models.load import Model, load
from luthier.rollout.generate import answers
from luthier.rollout.requests import Sampling

__all__ = ["command", "load_with_adapter", "sampling_options"]

_OPTIONS: tuple[Callable[[Callable[..., None]], object], ...] = (
    click.option("--model", default="smollm2-135m", show_default=True, help="The model that answers."),
    click.option("--adapter", type=click.Path(path_type=Path), help="An adapter's folder, PEFT layout."),
    click.option("--rank", type=click.IntRange(1), help="The rank to serve at, of a DyLoRA. [default: as saved]"),
    click.option("--system", help="The system message."),
    click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(1)),
    click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0 is greedy."),
    click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True)),
    click.option("--seed", default=42, show_default=True, type=click.IntRange(0)),
)


def sampling_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options that `generate` and `chat` share."""
    for option in _OPTIONS[::-1]:
        option(function)  # click notes its options on the function itself
    return function


def load_with_adapter(name: str, adapter: Path | None, rank: int | None) -> Model:
    """The model, with an adapter on it if one is named. Raises AdapterError for a rank without an adapter."""
    if adapter is not None:
        return load_adapted(name, adapter, rank=rank)
    if rank is not None:
        raise AdapterError("--rank is an adapter's; give --adapter too")
    return load(name)


def command(word: str) -> click.Command:
    """The command `generate`."""

    @click.command(word, help="Answer prompts, given as arguments or on standard input, a line each.")
    @click.argument("prompts", nargs=-1)
    @sampling_options
    def generate(
        prompts: tuple[str, ...],
        model: str,
        adapter: Path | None,
        rank: int | None,
        system: str | None,
        **sampling: Any,
    ) -> None:
        asked = list(prompts) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
        before = (Message("system", system),) if system else ()
        chats = [Chat((*before, Message("user", prompt))) for prompt in asked]
        for text in answers(load_with_adapter(model, adapter, rank), chats, Sampling(**sampling)):
            click.echo(text)

    return generate
