"""Many questions to a model behind a server, each of which ends with a line in a stated form.

A reply without that line is asked for once more, and then the question has failed. When many questions in a row got no
reply at all, the rest is not asked: a server that is down would cost its timeouts for each of them. Texts of others
stand between tags that they cannot write.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from luthier.data.examples import Message
from luthier.recipe.servers import Server
from luthier.rollout.endpoint import WRONG_JSON, Endpoint, key_from
from luthier.rollout.patience import Patience
from luthier.rollout.scoring import Failure
from luthier.rollout.workers import workers

__all__ = ["LastLine", "ask_all", "between_tags", "conversation_text", "endpoint_of", "mark_of"]

_REMINDER = "\n\nThis is asked again because the last reply ended without such a line. Write that line alone."
_SHOWN_CHARACTERS = 80

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LastLine(Generic[T]):
    """How a reply ends. read: what the line says, or None. missing: the reason of a Failure without one."""

    read: Callable[[str], T | None]
    missing: str


def endpoint_of(settings: Server, environment: Mapping[str, str]) -> Endpoint:
    """The server by its settings. Raises RecipeError for a key that is not there."""
    return Endpoint(
        settings.url,
        settings.model,
        key=None if settings.api_key_env is None else key_from(environment, settings.api_key_env),
        timeout_seconds=settings.timeout_seconds,
        retries=settings.retries,
    )


def ask_all(
    endpoint: Endpoint,
    questions: Sequence[tuple[Message, Message]],
    line: LastLine[T],
    *,
    max_new_tokens: int,
    parallel: int,
    most_failures: int = 16,
) -> list[T | Failure]:
    """What the last line of the reply to each question says, in their order, whatever the server does.

    questions: a system and a user turn each. parallel: asked at the same time. most_failures: in a row without any
    reply, before the server is given up.
    """
    patience = Patience(most_failures)
    ask = partial(_ask_patiently, partial(_ask, endpoint, line, max_new_tokens), line.missing, patience)
    with workers(parallel, "judge") as pool:
        return list(pool.map(ask, questions))


def _ask_patiently(
    ask: Callable[[Sequence[Message]], T | Failure], missing: str, patience: Patience, question: tuple[Message, Message]
) -> T | Failure:
    if patience.is_lost:
        return Failure("not asked", f"{patience.most} questions in a row got no reply")
    found = ask(question)
    if _is_nonsense(found, missing):
        task, asked = question
        found = ask([task, Message("user", asked.content + _REMINDER)])
    patience.note(replied=not isinstance(found, Failure) or _is_nonsense(found, missing))
    return found


def _ask(endpoint: Endpoint, line: LastLine[T], max_new_tokens: int, messages: Sequence[Message]) -> T | Failure:
    reply = endpoint.reply(messages, max_new_tokens=max_new_tokens)
    if isinstance(reply, Failure):
        return reply
    last = (reply.text.strip().splitlines() or [""])[-1].strip()
    found = line.read(last)
    if found is not None:
        return found
    cut = f"cut off after {max_new_tokens} tokens; " if reply.finish_reason == "length" else ""
    return Failure(line.missing, f"{cut}it ends with {last[-_SHOWN_CHARACTERS:]!r}")


def _is_nonsense(found: object, missing: str) -> bool:
    """Whether there was a reply, but nothing to read in it."""
    return isinstance(found, Failure) and found.reason in (missing, WRONG_JSON)


def conversation_text(prompt: Sequence[Message]) -> str:
    """The turns with their roles, and the calls of tools in them."""
    return "\n\n".join(map(_turn, prompt))


def mark_of(*texts: str) -> str:
    """Eight hexadecimal digits, made of the texts so that none of them can hold them on purpose."""
    return hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()[:8]


def between_tags(texts: Mapping[str, str], mark: str) -> str:
    """Each text by its name, between tags that end in the mark."""
    return "\n\n".join(f"<{name}_{mark}>\n{text}\n</{name}_{mark}>" for name, text in texts.items())


def _turn(message: Message) -> str:
    calls = [json.dumps({"name": call.name, "arguments": call.arguments}) for call in message.tool_calls]
    return "\n".join([f"{message.role}: {message.content}", *calls])
