"""One turn of the assistant as it is served: what the model is fed, and what it then has to write.

The template renders the conversation up to the turn, with the generation prompt, and with the turn; the difference is
the answer. Three kinds of template need more: those that show earlier turns otherwise once they are answered, those
that open `<think>` in the prompt, and those that drop the thinking from every answer. A template that loses or changes
words, or whose prompt and answer do not fit together, is refused with the reason.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data.dialects import Turn
from luthier.data.markers import CUT
from luthier.data.templates import Conversation
from luthier.errors import TemplateError

__all__ = ["ServedTurn", "check_decoded", "serve"]

_STAND_IN: tuple[Turn, ...] = ({"role": "user", "content": "?"},)
_THINK, _END_THINK = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class ServedTurn:
    """One turn as text with cuts. `answer` ends with the end-of-turn token; `prompt_ids` are what a server feeds."""

    turn: Turn
    prompt: str
    answer: str
    prompt_ids: list[int]

    @property
    def text(self) -> str:
        """Prompt and answer."""
        return self.prompt + self.answer


def serve(conversation: Conversation, place: int) -> ServedTurn:
    """The assistant's turn at `place` as it is served. Raises TemplateError if the template defeats that."""
    dialect, turn = conversation.dialect, conversation.turns[place]
    if not dialect.stops:
        raise TemplateError("the chat template writes no end-of-turn token after an answer; add eos_token to it")
    history = conversation.turns[:place]
    if not history:
        raise TemplateError("the conversation begins with the assistant, so no prompt comes before it; drop the turn")
    prompt = conversation.render(history, generation=True)
    _check_prompt(prompt, history)
    answer = _answer(conversation, history, prompt, turn)
    if answer is None:  # some templates show earlier turns otherwise once they are answered: ask for this turn alone
        answer = _answer(conversation, _STAND_IN, conversation.render(_STAND_IN, generation=True), turn)
    if answer is None:
        raise TemplateError(_difference(prompt, conversation.render([*history, turn])))
    return ServedTurn(turn, prompt, answer, dialect.encoder.encode(prompt))


def _answer(conversation: Conversation, history: Sequence[Turn], prompt: str, turn: Turn) -> str | None:
    """What the model has to write behind `prompt`, end-of-turn included; None if the rendering does not show it."""
    full = conversation.render([*history, turn])
    if full.startswith(prompt):
        written = full[len(prompt) :]
        ends = [found + len(stop) for stop in conversation.dialect.stops if (found := written.find(stop)) >= 0]
        if ends and _says(written[: min(ends)], turn):
            return written[: min(ends)]
    thought = _thinking(prompt, full, turn)
    return None if thought is None else thought + conversation.dialect.stops[0]


def _thinking(prompt: str, full: str, turn: Turn) -> str | None:
    """The words of a turn with its thinking, where the template opens `<think>` in the prompt or drops it from answers.

    The model then writes the thinking from where the prompt left off; an answer without any closes it at once.
    """
    content: str = turn["content"].strip()
    opened = prompt.rstrip().endswith(_THINK)
    header = prompt.rpartition(_THINK)[0] if opened else prompt
    if "tool_calls" in turn or not (opened or _END_THINK in content) or not full.startswith(header):
        return None
    if content.rpartition(_END_THINK)[2].strip() not in full[len(header) :]:
        return None
    if not opened:
        return content
    return content.removeprefix(_THINK).lstrip("\n") if _END_THINK in content else f"\n{_END_THINK}\n\n{content}"


def _check_prompt(prompt: str, history: Sequence[Turn]) -> None:
    """Everything that was said to the assistant stands in its prompt, the user's turns in their order."""
    position = 0
    for turn in history:
        words = turn["content"].strip()
        if turn["role"] == "user":
            position = prompt.find(words, position)
            found, position = position >= 0, position + len(words)
        else:
            found = turn["role"] == "assistant" or any(form in prompt for form in _written_forms(words))
        if not found:
            raise TemplateError(
                f"the chat template loses, changes or moves words of the {turn['role']}: {_short(words)}"
            )


def _says(text: str, turn: Turn) -> bool:
    """Whether the text holds the turn's words in their order, and the name and argument values of its calls."""
    position = 0
    for words in _words(turn):
        if (position := text.find(words, position)) < 0:
            return False
        position += len(words)
    calls = [call["function"] for call in turn.get("tool_calls", ())]
    wanted = [value for call in calls for value in (call["name"], *_leaves(call["arguments"]))]
    return all(any(form in text for form in _written_forms(value)) for value in wanted)


def _words(turn: Turn) -> list[str]:
    """What a turn says, cut at its thinking tags, round which templates set white space of their own."""
    return [part.strip() for part in re.split(f"{_THINK}|{_END_THINK}", turn["content"])]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def _written_forms(value: Any) -> tuple[str, ...]:
    """A value as it is, and as JSON writes it between its quotes."""
    return (str(value), *(json.dumps(value, ensure_ascii=ascii_only).strip('"') for ascii_only in (False, True)))


def check_decoded(text: str, turn: Turn) -> None:
    """Raises TemplateError unless the decoded answer holds the turn's words, white space and Unicode form aside."""
    decoded = _letters(text)
    for words in _words(turn):
        if _letters(words.replace(CUT, "")) not in decoded:
            raise TemplateError(
                f"the tokenizer loses words of the answer {_short(words)}: it decodes to {_short(text)}"
            )


def _letters(text: str) -> str:
    text = text.replace("▁", " ")  # SentencePiece writes a space so, and cannot tell the two apart
    return "".join(unicodedata.normalize("NFKC", text).split())


def _difference(prompt: str, full: str) -> str:
    pairs = zip(prompt, full, strict=False)
    same = next((i for i, (fed, shown) in enumerate(pairs) if fed != shown), min(len(prompt), len(full)))
    if same < len(prompt):
        where = f"after the prompt's {_short(prompt[max(0, same - 20) : same])} comes {_short(full[same:])}"
        return f"the chat template does not continue its generation prompt with the answer: {where}; mend the template"
    return f"the chat template does not write the answer's words and its end-of-turn token: {_short(full[same:])}"


def _short(text: str) -> str:
    text = text.replace(CUT, "")
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
