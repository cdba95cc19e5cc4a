"""`luthier chat`: a conversation in the terminal. End of input (Ctrl-D) or /quit ends it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from luthier.cli.generate import load_with_adapter, sampling_options
from luthier.data.examples import Chat, Message
from luthier.rollout.generate import answer
from luthier.rollout.requests import Sampling

__all__ = ["command"]


def command(word: str) -> click.Command:
    """The command `chat`."""

    @click.command(word, help="Talk with a model; /quit ends it.")
    @sampling_options
    def chat(model: str, adapter: Path | None, rank: int | None, system: str | None, **sampling: Any) -> None:
        loaded = load_with_adapter(model, adapter, rank)
        messages: tuple[Message, ...] = (Message("system", system),) if system else ()
        for line in _lines():
            messages = (*messages, Message("user", line))
            text = answer(loaded, Chat(messages), Sampling(**sampling))
            messages = (*messages, Message("assistant", text))
            click.echo(text)

    return chat


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line:
            yield line
