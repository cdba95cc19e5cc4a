"""What is trained is what is served, shown on the user's own conversations and on a set of awkward ones.

At every trained turn the training example must begin with exactly the ids that a server feeds, and its trained part
must end with a token that stops generation. The same prompts then go through the saved model: loaded by Luthier, and
its tokenizer by transformers alone, as any other tool would. The last is left out where a message spells a turn
marker, which transformers reads as the marker and Luthier as words.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from luthier.adapters.new_tokens import with_tokens
from luthier.data.examples import Chat, Origin
from luthier.data.markers import CUT
from luthier.data.masks import TrainOn, encode_chat, encode_prompt
from luthier.data.reading import read_examples
from luthier.data.sequences import TokenSequence
from luthier.data.templates import conversation_of, stop_token_ids
from luthier.errors import TemplateError, VerificationError
from luthier.models.load import load
from luthier.models.save import save
from luthier.pipeline.verify_conversations import AWKWARD
from luthier.recipe.document import Recipe
from luthier.recipe.training import SFT

__all__ = ["TemplateProof", "verify_template"]

_MOST_CHATS = 200
_SHOWN = 8  # tokens before and after a difference

Chats = Sequence[tuple[Origin, Chat]]


@dataclass(frozen=True, slots=True)
class TemplateProof:
    """What was compared. num_compared: prompts that transformers alone encoded too; num_with_markers: left out there.

    stop_tokens: what ends a turn, as text. refused: conversations that the template cannot show, with the reason;
    training on them would be refused in the same words.
    """

    num_conversations: int
    num_turns: int
    num_compared: int
    num_with_markers: int
    stop_tokens: tuple[str, ...]
    refused: tuple[str, ...]


@dataclass(slots=True)
class _Check:
    """The tokenizers that must agree, and what was counted so far. eos_ids: where the saved model stops generating."""

    trained: PreTrainedTokenizerBase
    loaded: PreTrainedTokenizerBase
    plain: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    train_on: TrainOn
    num_turns: int = 0
    num_compared: int = 0
    refused: list[str] = field(default_factory=list)


def verify_template(source: Recipe | str, *, saved: Path | None = None) -> TemplateProof:
    """Compares training examples, served prompts and the saved model, for a recipe's chats or the built-in ones.

    source: a recipe, whose first `sft` stage names template and data, or the name of a model. saved: the folder of a
    model that was saved before; by default the model is saved into a temporary one.
    Raises VerificationError with the first difference as text.
    """
    settings = _settings(source)
    model = load(source.model if isinstance(source, Recipe) else source, dtype="bf16")
    if settings is not None and settings.adapter is not None:
        model.tokenizer = with_tokens(model.tokenizer, settings.adapter.new_tokens)
    if settings is not None and settings.chat_template is not None:
        model.tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        place = saved or save(model, Path(folder) / "model")
        check = _Check(
            trained=model.tokenizer,
            loaded=load(str(place), dtype="bf16").tokenizer,
            plain=AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False),
            eos_ids=_eos_ids(place),
            train_on=settings.train_on if settings else "assistant",
        )
    chats = _chats(settings)
    for origin, chat in chats:
        _check_chat(check, origin, chat)
    return _proof(check, len(chats))


def _settings(source: Recipe | str) -> SFT | None:
    stages = source.stages if isinstance(source, Recipe) else ()
    return next((stage.settings for stage in stages if isinstance(stage.settings, SFT)), None)


def _chats(settings: SFT | None) -> Chats:
    """The recipe's conversations, or the built-in ones where it has none."""
    if settings is None:
        return AWKWARD
    reading = read_examples(settings.data, format=settings.format, columns=settings.columns, on_error=settings.on_error)
    return [(o, e) for o, e in reading.examples if isinstance(e, Chat)][:_MOST_CHATS] or AWKWARD


def _eos_ids(folder: Path) -> frozenset[int]:
    """Where others' tools stop generating with this model, as they read it from the folder."""
    known = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    return frozenset(known if isinstance(known, list) else [known]) - {None}


def _check_chat(check: _Check, origin: Origin, chat: Chat) -> None:
    try:
        sequences = encode_chat(chat, origin, check.trained, train_on=check.train_on)
    except TemplateError as error:
        check.refused.append(str(error))
        return
    places = _trained_places(chat, check.train_on)
    for index, place in enumerate(places):
        prompt = Chat(chat.messages[:place], chat.tools)
        served = encode_prompt(prompt, check.trained)
        where = f"{origin}, message {place + 1}"
        _check_trained(check, sequences[index if len(sequences) > 1 else 0], served, where)
        _check_saved(check, prompt, served, where)
        check.num_turns += 1


def _trained_places(chat: Chat, train_on: TrainOn) -> list[int]:
    """Which messages are trained answers. Where all is trained, what comes before the last one is no prompt."""
    said = [i for i, message in enumerate(chat.messages) if message.role == "assistant"]
    if train_on == "all":
        return said[-1:] if said[-1:] == [len(chat.messages) - 1] else []
    usual = said if train_on == "assistant" else said[-1:]
    chosen = {i: i in usual if chat.messages[i].trained is None else chat.messages[i].trained for i in said}
    return [i for i, trained in chosen.items() if trained]


def _check_trained(check: _Check, sequence: TokenSequence, served: Sequence[int], where: str) -> None:
    ids, start = sequence.token_ids.tolist(), len(served)
    _same_ids(ids[:start], served, check.trained, f"{where}: the training example", "the served prompt")
    untrained = np.flatnonzero(~sequence.trained[start:])
    end = start + int(untrained[0]) if len(untrained) else len(ids)
    if end == start or ids[end - 1] not in stop_token_ids(check.trained):
        text = check.trained.decode(ids[start:end])
        raise VerificationError(f"{where}: what is trained does not end with an end of turn: {text!r}")
    if ids[end - 1] not in check.eos_ids:
        token = check.trained.decode([ids[end - 1]])
        raise VerificationError(
            f"{where}: the answer ends with {token!r}, but the saved generation_config stops only at "
            f"{sorted(check.eos_ids)}; add {ids[end - 1]} to its eos_token_id, or save the model again"
        )


def _check_saved(check: _Check, prompt: Chat, served: Sequence[int], where: str) -> None:
    _same_ids(encode_prompt(prompt, check.loaded), served, check.trained, f"{where}: the saved model", "training")
    conversation = conversation_of(prompt, check.trained)
    if CUT in conversation.render(conversation.turns, generation=True):
        return
    ids = check.plain.apply_chat_template(
        list(conversation.turns),
        tools=list(conversation.tools) or None,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
    )
    _same_ids(list(ids), served, check.trained, f"{where}: the saved tokenizer in transformers", "training")
    check.num_compared += 1


def _same_ids(
    found: Sequence[int], wanted: Sequence[int], tokenizer: PreTrainedTokenizerBase, ours: str, theirs: str
) -> None:
    if list(found) == list(wanted):
        return
    shared = min(len(found), len(wanted))
    at = next((i for i in range(shared) if found[i] != wanted[i]), shared)
    before, here, there = (
        tokenizer.decode(list(ids))
        for ids in (wanted[max(0, at - _SHOWN) : at], found[at:][:_SHOWN], wanted[at:][:_SHOWN])
    )
    raise VerificationError(
        f"{ours} differs from {theirs} at token {at}: after {before!r} it has {here!r} and not {there!r}"
    )


def _proof(check: _Check, num_chats: int) -> TemplateProof:
    if not check.num_turns:
        reason = check.refused[0] if check.refused else "no conversation has a trained turn"
        raise VerificationError(f"nothing could be compared: {reason}")
    return TemplateProof(
        num_conversations=num_chats - len(check.refused),
        num_turns=check.num_turns,
        num_compared=check.num_compared,
        num_with_markers=check.num_turns - check.num_compared,
        stop_tokens=tuple(str(check.trained.decode([i])) for i in sorted(stop_token_ids(check.trained))),
        refused=tuple(check.refused),
    )
