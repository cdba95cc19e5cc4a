"""What a chat template understands, found out by letting it render small conversations.

Templates differ in whether they know a system turn, tools, and how an assistant's turn ends; their source does not say
so reliably. Here each is asked: a word that comes back out of the rendering was understood. A template that
loses, changes or reorders plain words, or renders the same conversation in two ways, is refused at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from luthier.data.markers import TextEncoder, added_tokens, any_of, text_encoder
from luthier.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Dialect", "Turn", "apply_template", "dialect_of"]

Turn = dict[str, Any]  # one message as templates expect it: role, content, tool_calls...

_SYSTEM, _RESULT = "Probe of the system", "Probe of a result"
_QUESTION, _ANSWER, _SECOND_QUESTION, _SECOND_ANSWER = "First Question", "First Answer", "Next Question", "Next Answer"
_TOOL_WORDS = ("probe_tool", "Probe of a tool", "Probe of a value", _RESULT)
_TOOL = {
    "type": "function",
    "function": {
        "name": _TOOL_WORDS[0],
        "description": _TOOL_WORDS[1],
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "any"}},
            "required": ["key"],
        },
    },
}
_CALL = {
    "id": "call00000",
    "type": "function",
    "function": {"name": _TOOL_WORDS[0], "arguments": {"key": _TOOL_WORDS[2]}},
}


@dataclass(frozen=True, slots=True, eq=False)
class Dialect:
    """One tokenizer with its chat template, and what the template was found to understand.

    knows_tools: tool descriptions, calls and results all appear; knowing only some of them counts as knowing none.
    stops: the markers that end an assistant's turn, the plain answer's first; empty if the template writes none.
    default_system: what the template puts into the system turn where a conversation has none.
    """

    tokenizer: PreTrainedTokenizerBase
    encoder: TextEncoder
    knows_system: bool
    knows_tools: bool
    stops: tuple[str, ...]
    default_system: str

    @property
    def stop_ids(self) -> frozenset[int]:
        """The token ids of `stops`."""
        return frozenset(self.encoder.markers[stop] for stop in self.stops)


def dialect_of(tokenizer: PreTrainedTokenizerBase) -> Dialect:
    """What this tokenizer's template understands; probed once for each template and vocabulary.

    Raises TemplateError if there is no template, or if it loses or changes the words of a plain conversation.
    """
    return _probe(tokenizer, repr(tokenizer.chat_template), len(tokenizer))


def apply_template(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], tools: Sequence[dict[str, Any]], *, generation: bool
) -> str:
    """The template's own rendering; whatever it raises becomes a TemplateError."""
    try:
        text = tokenizer.apply_chat_template(
            list(turns), tools=list(tools) or None, tokenize=False, add_generation_prompt=generation
        )
    except Exception as error:  # a template is foreign code and may raise anything
        raise TemplateError(f"the chat template refuses this conversation: {error}") from error
    return str(text)


@lru_cache(maxsize=16)
def _probe(tokenizer: PreTrainedTokenizerBase, template: str, num_tokens: int) -> Dialect:
    if tokenizer.chat_template is None:
        raise TemplateError("the tokenizer has no chat template; give the model one, or train on plain text")
    _check_exchange(tokenizer)
    _check_generation_prompt(tokenizer)
    knows_system, knows_tools = _knows_system(tokenizer), _knows_tools(tokenizer)
    stops = _stops(tokenizer, knows_tools)
    asked = apply_template(tokenizer, _asked(knows_system), (), generation=False)
    prompt = apply_template(tokenizer, _asked(knows_system), (), generation=True)
    opening = any_of(added_tokens(tokenizer)).search(prompt.removeprefix(asked))
    written = "\n".join([asked, opening[0] if opening else "", *stops])
    default_system = _default_system(tokenizer) if knows_system else ""
    return Dialect(
        tokenizer, text_encoder(tokenizer, written=written), knows_system, knows_tools, stops, default_system
    )


def _check_exchange(tokenizer: PreTrainedTokenizerBase) -> None:
    words = (_QUESTION, _ANSWER, _SECOND_QUESTION, _SECOND_ANSWER)
    turns = [_turn("assistant" if i % 2 else "user", text) for i, text in enumerate(words)]
    text = apply_template(tokenizer, turns, (), generation=False)
    if text != apply_template(tokenizer, turns, (), generation=False):
        raise TemplateError("the chat template renders the same conversation differently each time; remove what varies")
    position = 0
    for word in words:
        found = text.find(word, position)
        if found < 0:
            raise TemplateError(f"the chat template loses, changes or moves a message ({word!r}); mend the template")
        position = found + len(word)


def _check_generation_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    """Without a generation prompt only an answer without a header (Mistral's, Llama 2's) can follow the question."""
    asked, prompt = (apply_template(tokenizer, _asked(False), (), generation=wanted) for wanted in (False, True))
    answered = apply_template(tokenizer, [*_asked(False), _turn("assistant", _ANSWER)], (), generation=False)
    header = answered.removeprefix(asked).partition(_ANSWER)[0]
    if asked == prompt and any_of(added_tokens(tokenizer)).search(header):
        raise TemplateError(f"the chat template has no generation prompt, though answers begin with {header!r}; add it")


def _knows_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    return _shows(tokenizer, _asked(True), (), [_SYSTEM])


def _knows_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    result = _turn("tool", _RESULT) | {"name": _TOOL_WORDS[0], "tool_call_id": _CALL["id"]}
    return _shows(tokenizer, [*_called(), result], [_TOOL], _TOOL_WORDS)


def _shows(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], tools: list[dict[str, Any]] | tuple[()], words: Sequence[str]
) -> bool:
    try:
        text = apply_template(tokenizer, turns, tools, generation=True)
    except TemplateError:
        return False
    return all(word in text for word in words)


def _stops(tokenizer: PreTrainedTokenizerBase, knows_tools: bool) -> tuple[str, ...]:
    markers = any_of(added_tokens(tokenizer))
    answered = apply_template(tokenizer, [*_asked(False), _turn("assistant", _ANSWER)], (), generation=False)
    stops = markers.findall(answered.rpartition(_ANSWER)[2])[:1]
    if knows_tools:
        called = apply_template(tokenizer, _called(), [_TOOL], generation=False)
        ending = markers.findall(called.rpartition(_TOOL_WORDS[2])[2])
        stops += [] if set(stops) & set(ending) else ending[-1:]
    return tuple(stops)


def _default_system(tokenizer: PreTrainedTokenizerBase) -> str:
    before, _, rest = apply_template(tokenizer, _asked(True), (), generation=False).partition(_SYSTEM)
    between = rest.partition(_QUESTION)[0]
    bare = apply_template(tokenizer, _asked(False), (), generation=False).partition(_QUESTION)[0]
    if len(bare) <= len(before + between) or not (bare.startswith(before) and bare.endswith(between)):
        return ""
    return bare[len(before) : len(bare) - len(between)].strip()


def _asked(system: bool) -> list[Turn]:
    return [_turn("system", _SYSTEM)] * system + [_turn("user", _QUESTION)]


def _called() -> list[Turn]:
    return [*_asked(False), _turn("assistant", "") | {"tool_calls": [_CALL]}]


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}
