"""What the columns of preference rows mean: pairs, rankings, single answers with a verdict, and prompts alone.

A prompt stands in a column of its own, or the answers are whole dialogues that begin with it: what they begin with in
common is the prompt, and only turns of the assistant, with results of tools between them, may follow. A row that
prefers nothing is refused: equal answers, an empty one, one alone, prompts that differ.
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from luthier.data.conversations import chat, conversation, joined, list_of, text_of, text_or_turns, turns_of
from luthier.data.examples import Example, Feedback, Message, Preference, Prompt, Steps
from luthier.data.strict_json import describe
from luthier.errors import DataError

__all__ = [
    "dialogues",
    "feedback",
    "feedback_messages",
    "preference",
    "prompt",
    "prompt_messages",
    "ranking",
    "sharegpt_feedback",
    "sharegpt_preference",
    "sharegpt_prompt",
    "steps",
]

_Turns = list[Message]
_Row = Mapping[str, Any]

_TRANSCRIPT = "\n\nHuman:"
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_VERDICTS = {"1": True, "true": True, "desirable": True, "0": False, "false": False, "undesirable": False}


def preference(row: _Row) -> Example:
    """A prompt, the better answer and the worse one: texts, messages, or dialogues that begin with the prompt."""
    return _preference(_prompt(row), _chosen_and_rejected(row), row, _pair_scores(row))


def sharegpt_preference(row: _Row) -> Example:
    """ShareGPT conversations that end with a question, the better answer to it and the worse one."""
    prompt = turns_of("conversations", row["conversations"])
    return _preference(prompt, _chosen_and_rejected(row), row, _pair_scores(row))


def dialogues(row: _Row) -> Example:
    """Two whole dialogues, as messages or as HH-RLHF's text with "Human:" and "Assistant:" before each turn."""
    for name in ("chosen", "rejected"):
        value = row[name]
        if not isinstance(value, list) and not (isinstance(value, str) and value.startswith(_TRANSCRIPT)):
            raise DataError(
                f'"{name}" is {describe(value)}, not a dialogue (a list of turns, or text with "Human:" and '
                '"Assistant:" before each turn); an answer alone needs a column "prompt"'
            )
    return _preference(None, _chosen_and_rejected(row), row, _pair_scores(row))


def ranking(row: _Row) -> Example:
    """A prompt and several answers: with `scores`, the highest is the best; with `ranks`, the lowest; else the first.

    Equal scores or ranks say that neither answer is preferred to the other. Ranks become scores: minus the rank.
    """
    given = list_of('"responses"', row["responses"])
    answers = {f"answer {i}": _turns(f"answer {i} of responses", one) for i, one in enumerate(given, start=1)}
    if len(answers) < 2:
        raise DataError(f'"responses" holds {len(answers) or "no"} answer, and only two or more can be compared')
    scores = _ranking_scores(row, len(answers))
    if scores is None:
        return _preference(_prompt(row), answers, row, None)
    if len(set(scores)) == 1:
        raise DataError("all answers are scored or ranked alike, so none is preferred")
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    names = list(answers)
    best_first = {names[i]: answers[names[i]] for i in order}
    return _preference(_prompt(row), best_first, row, tuple(scores[i] for i in order))


def feedback(row: _Row) -> Example:
    """A prompt, an answer, and whether that is desirable: texts or messages."""
    prompt, (answer,) = _parted(_prompt(row), {'"completion"': _turns("completion", row["completion"])})
    return _feedback([*prompt, *answer], row)


def feedback_messages(row: _Row) -> Example:
    """OpenAI messages that end with an answer, and whether that is desirable."""
    return _feedback(turns_of("messages", row["messages"]), row)


def sharegpt_feedback(row: _Row) -> Example:
    """ShareGPT conversations that end with an answer, and whether that is desirable."""
    return _feedback(turns_of("conversations", row["conversations"]), row)


def steps(row: _Row) -> Example:
    """A prompt, the steps of an answer as texts, and a label for each, whether it is right."""
    asked = chat([*_prompt(row), Message("assistant", "-")], system=row.get("system"), tools=row.get("tools"))
    said = [text_of(f"step {i}", one) for i, one in enumerate(list_of('"completions"', row["completions"]), start=1)]
    labels = list_of('"labels"', row["labels"])
    if not said or len(said) != len(labels):
        raise DataError(f"there are {len(said)} steps and {len(labels)} labels; each step needs one")
    return Steps(asked.messages[:-1], tuple(said), tuple(map(_verdict, labels)), asked.tools)


def prompt(row: _Row) -> Example:
    """A prompt, to be answered: a text or messages."""
    return _waiting(_prompt(row), row)


def prompt_messages(row: _Row) -> Example:
    """OpenAI messages, to be answered; an answer that they end with is left out."""
    return _waiting(turns_of("messages", row["messages"]), row)


def sharegpt_prompt(row: _Row) -> Example:
    """ShareGPT conversations, to be answered; an answer that they end with is left out."""
    return _waiting(turns_of("conversations", row["conversations"]), row)


def _waiting(turns: _Turns, row: _Row) -> Prompt:
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    _check_prompt(turns)
    asked = conversation(turns, system=row.get("system"), tools=row.get("tools"))
    return Prompt(asked.messages, asked.tools)


def _preference(
    prompt: _Turns | None, answers: Mapping[str, _Turns], row: _Row, scores: tuple[float, ...] | None
) -> Preference:
    prompt, parted = _parted(prompt, answers)
    _check_prompt(prompt)
    said: dict[Any, str] = {}
    for name, answer in zip(answers, parted, strict=True):
        first = said.setdefault(_words(answer), name)
        if first != name:
            raise DataError(f"{first} and {name} are equal, so neither is preferred; drop the row")
    chats = [chat([*prompt, *answer], system=row.get("system"), tools=row.get("tools")) for answer in parted]
    asked = chats[0].messages[: -len(parted[0])]
    return Preference(asked, tuple(map(tuple, parted)), chats[0].tools, scores)


def _feedback(turns: _Turns, row: _Row) -> Feedback:
    spoken = chat(turns, system=row.get("system"), tools=row.get("tools"))
    _check_prompt(spoken.messages[:-1])
    return Feedback(spoken, _verdict(row["label"]))


def _check_prompt(prompt: Sequence[Message]) -> None:
    if not any(turn.role == "user" for turn in prompt):
        raise DataError("no turn of the user asks for an answer")
    if prompt[-1].role == "assistant":
        raise DataError("the prompt ends with a turn of the assistant, so it asks for no answer; drop that turn")


def _parted(prompt: _Turns | None, answers: Mapping[str, _Turns]) -> tuple[_Turns, list[_Turns]]:
    """The prompt and the answers apart; where the answers are dialogues, what they begin with is the prompt.

    Raises DataError where the dialogues begin differently, or otherwise than `prompt` says.
    """
    given = list(answers.values())
    whole = [any(turn.role in ("system", "user") for turn in turns) for turns in given]
    if any(whole) and not all(whole):
        raise DataError(f"{list(answers)[whole.index(True)]} is a whole dialogue, but not every answer is")
    if not any(whole):
        _check_answers(answers, 0)
        return prompt or [], given
    num_shared = _num_shared(given)
    _check_answers(answers, num_shared)
    shared, rest = given[0][:num_shared], [turns[num_shared:] for turns in given]
    if prompt is None or _holds(shared, prompt):
        return shared, rest
    if _holds(prompt[-num_shared:], shared):
        return prompt, rest
    raise DataError('the dialogues begin otherwise than "prompt" says; keep the prompt once, or make both alike')


def _num_shared(given: Sequence[_Turns]) -> int:
    """How many turns all dialogues begin with, up to and without a turn of the assistant."""
    same = 0
    for turns in zip(*given, strict=False):
        if any(turn != turns[0] for turn in turns):
            break
        same += 1
    while same and given[0][same - 1].role == "assistant":
        same -= 1
    return same


def _check_answers(answers: Mapping[str, _Turns], start: int) -> None:
    """From `start` on only the assistant speaks, and tools that it called."""
    for name, turns in answers.items():
        answer = turns[start:]
        if not answer or answer[-1].role != "assistant":
            raise DataError(f"{name} does not end with a turn of the assistant")
        spoken = [i for i, turn in enumerate(answer, start=start + 1) if turn.role in ("system", "user")]
        if spoken:
            raise DataError(
                f"the prompts differ: turn {spoken[0]} of {name} is the {turns[spoken[0] - 1].role}'s and comes after "
                "the turns that the dialogues share; only the last answer may differ"
            )
        if answer[0].role != "assistant":
            raise DataError(f"{name} begins with a turn of the {answer[0].role}, not of the assistant")


def _holds(turns: _Turns, wanted: _Turns) -> bool:
    """Whether the wanted turns stand among the others one after another, white space at their ends aside."""
    said, asked = ([(turn.role, turn.content.strip()) for turn in some] for some in (turns, wanted))
    return any(said[i : i + len(asked)] == asked for i in range(len(said) - len(asked) + 1))


def _words(answer: _Turns) -> Any:
    """What an answer says, to compare it: white space at the ends of turns is none of it."""
    calls = [[(call.name, repr(call.arguments)) for call in turn.tool_calls] for turn in answer]
    return tuple((turn.role, turn.content.strip(), *called) for turn, called in zip(answer, calls, strict=True))


def _prompt(row: _Row) -> _Turns:
    prompt = row["prompt"]
    if isinstance(prompt, str) and "input" in row:
        prompt = joined(text_of('"prompt"', prompt), text_of('"input"', row["input"], may_be_empty=True))
    if isinstance(prompt, str) and prompt.startswith(_TRANSCRIPT):
        return _transcript("prompt", prompt.rstrip().removesuffix("\n\nAssistant:"))
    return text_or_turns("prompt", prompt, role="user")


def _chosen_and_rejected(row: _Row) -> dict[str, _Turns]:
    return {f'"{name}"': _turns(name, row[name]) for name in ("chosen", "rejected")}


def _turns(column: str, value: Any) -> _Turns:
    if isinstance(value, str) and value.startswith(_TRANSCRIPT):
        return _transcript(column, value)
    return text_or_turns(column, value, role="assistant")


def _transcript(column: str, text: str) -> _Turns:
    """The turns of HH-RLHF's text; what one speaker says in a row is one turn."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", text_of(f'"{column}"', text))
    spoken = zip(parts[::2], map(str.strip, parts[1::2]), strict=True)
    turns = []
    for number, (speaker, said) in enumerate(groupby(spoken, key=lambda turn: turn[0]), start=1):
        words = "\n\n".join(words for _, words in said if words)
        turns.append(Message(_SPEAKERS[speaker], text_of(f'turn {number} of "{column}"', words)))
    return turns


def _pair_scores(row: _Row) -> tuple[float, ...] | None:
    """Both scores, or the margin and 0; none where they are equal, since the pair itself says which is better."""
    names = [name for name in ("chosen_score", "rejected_score") if name in row]
    if len(names) == 1:
        raise DataError(f'of "chosen_score" and "rejected_score" only "{names[0]}" is there')
    if names:
        better, worse = (_number(f'"{name}"', row[name]) for name in names)
    else:
        better, worse = _number('"margin"', row.get("margin", 0)), 0.0
    if better < worse:
        raise DataError(f'the scores say that "rejected" is better, {better:g} against {worse:g}; swap or drop the row')
    return None if better == worse else (better, worse)


def _ranking_scores(row: _Row, num_answers: int) -> list[float] | None:
    name, sign = ("scores", 1.0) if "scores" in row else ("ranks", -1.0)
    if name not in row:
        return None
    values = list_of(f'"{name}"', row[name])
    if len(values) != num_answers:
        raise DataError(f'"{name}" holds {len(values)} values for {num_answers} answers')
    return [sign * _number(f'value {i} of "{name}"', value) for i, value in enumerate(values, start=1)]


def _number(where: str, value: Any) -> float:
    """A number, or the one that a text spells (CSV knows texts alone)."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where} is {describe(value)}, not a number")
    return number


def _verdict(value: Any) -> bool:
    """true or false; 1, 0 and the words of peers' files mean the same."""
    word = str(int(value)) if isinstance(value, float) and value in (0, 1) else str(value).strip().lower()
    if word not in _VERDICTS:
        raise DataError(f'"label" is {describe(value)}; it must be true (desirable) or false (undesirable)')
    return _VERDICTS[word]
