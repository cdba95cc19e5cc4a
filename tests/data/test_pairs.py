"""Of a group exactly the answers are trained, behind the ids that a server is fed; what they share is there once."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from luthier.data.encoding import encode
from luthier.data.examples import Chat, Example, Feedback, Message, Origin, Preference, Prompt, Steps, Text, ToolCall
from luthier.data.limits import limit
from luthier.data.masks import encode_chat, encode_prompt
from luthier.data.pairs import (
    encode_feedback,
    encode_for_reward,
    encode_preference,
    encode_steps,
    num_prompt,
    with_mismatched,
)
from luthier.data.sequences import TokenGroup, TokenSequence, sequences_of
from luthier.errors import DataError, TemplateError

HERE = Path(__file__).parent / "chat_templates"
ORIGIN = Origin("rows.jsonl", 7)
SPECIAL = {  # the first one is BOS, the last one ends a turn
    "chatml": "<|im_start|> <|im_end|>",
    "llama3": "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
    "mistral_v3": "<s> [INST] [/INST] </s>",
    "qwen3": "<|im_start|> <|im_end|>",
    "gemma": "<bos> <start_of_turn> <end_of_turn>",
}
each_family = pytest.mark.parametrize("name", SPECIAL)
words = st.text(st.sampled_from("ab .\n?é<|>"), min_size=1, max_size=12).filter(str.strip)


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL[name].split())
    first, *_, stop = SPECIAL[name].split()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=first, eos_token=stop)
    tokenizer.chat_template = (HERE / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


def said(*texts: str) -> tuple[Message, ...]:
    """User and assistant in turns."""
    return tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))


def preference(prompt: tuple[Message, ...], *answers: str) -> Preference:
    return Preference(prompt, tuple((Message("assistant", text),) for text in answers))


def trained_text(sequence: TokenSequence, name: str) -> str:
    return str(tokenizer_of(name).decode(sequence.token_ids[sequence.trained]))


@each_family
@settings(max_examples=40, deadline=None)
@given(
    prompt=st.lists(words, min_size=1, max_size=3).filter(lambda turns: len(turns) % 2 == 1),
    answers=st.lists(words, min_size=2, max_size=4, unique_by=str.strip),
)
def test_each_answer_is_what_a_chat_of_its_own_would_train(name: str, prompt: list[str], answers: list[str]) -> None:
    """Prefix and rest put together are the sequence of the chat, and before the answer stands what a server is fed."""
    tokenizer, turns = tokenizer_of(name), said(*prompt)
    group = encode_preference(preference(turns, *answers), ORIGIN, tokenizer)
    fed = encode_prompt(Chat(turns), tokenizer)
    shared = group.sequences[0].token_ids[: group.num_shared]
    assert group.num_shared >= len(fed)
    for answer, sequence in zip(answers, group.sequences, strict=True):
        (alone,) = encode_chat(Chat((*turns, Message("assistant", answer))), ORIGIN, tokenizer, train_on="last")
        rebuilt = np.concatenate([shared, sequence.token_ids[group.num_shared :]])
        assert np.array_equal(rebuilt, alone.token_ids)
        assert np.array_equal(sequence.trained, alone.trained)
        assert sequence.token_ids[: num_prompt(sequence)].tolist() == fed
        assert sequence.trained[len(fed) :].all()
        assert answer.strip() in trained_text(sequence, name)
        assert trained_text(sequence, name).endswith(SPECIAL[name].split()[-1])


@each_family
def test_what_the_answers_share_is_trained_alike_in_each(name: str) -> None:
    group = encode_preference(preference(said("q"), "same words", "same worlds", "same"), ORIGIN, tokenizer_of(name))
    first, *others = (sequence.trained[: group.num_shared] for sequence in group.sequences)
    assert first.any()
    assert all(np.array_equal(first, other) for other in others)


def test_answers_keep_their_order_and_their_scores() -> None:
    example = Preference(said("q"), tuple((Message("assistant", text),) for text in "ba"), scores=(2.0, 1.0))
    group = encode_preference(example, ORIGIN, tokenizer_of("chatml"))
    assert [trained_text(one, "chatml") for one in group.sequences] == ["b<|im_end|>", "a<|im_end|>"]
    assert (group.scores, group.origin, group.desirable) == ((2.0, 1.0), ORIGIN, None)


def test_no_turn_of_the_prompt_is_trained_whatever_it_says_of_itself() -> None:
    turns = (Message("user", "q", trained=True), Message("assistant", "one", trained=True), Message("user", "r"))
    answers = ((Message("assistant", "two", trained=False),), (Message("assistant", "three"),))
    group = encode_preference(Preference(turns, answers), ORIGIN, tokenizer_of("chatml"))
    assert [trained_text(one, "chatml") for one in group.sequences] == ["two<|im_end|>", "three<|im_end|>"]


def test_all_turns_of_an_answer_with_tools_are_trained_and_results_are_not() -> None:
    call = Message("assistant", "", (ToolCall("find", {}),))
    used = (call, Message("tool", "found it"), Message("assistant", "So."))
    group = encode_preference(
        Preference(said("q"), (used, (Message("assistant", "No."),))), ORIGIN, tokenizer_of("chatml")
    )
    text = trained_text(group.sequences[0], "chatml")
    assert "find" in text
    assert text.endswith("So.<|im_end|>")
    assert "found it" not in text
    assert "found it" in tokenizer_of("chatml").decode(group.sequences[0].token_ids)


def test_an_answer_whose_turns_the_template_shows_anew_is_refused() -> None:
    """This template drops a word of every turn but the last."""
    backend = tokenizer_of("chatml").backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    last = "{% if loop.last %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% else %}"
    shorter = "{{ '<|im_start|>' + m.role + '\n' + m.content.replace('hm ', '') + '<|im_end|>\n' }}{% endif %}"
    opening = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + last + shorter + "{% endfor %}" + opening
    answer = (Message("assistant", "hm a"), Message("tool", "b"), Message("assistant", "c"))
    with pytest.raises(TemplateError, match=r"rows\.jsonl:7: .*keep the last turn of each answer"):
        encode_preference(Preference(said("q"), (answer, (Message("assistant", "d"),))), ORIGIN, tokenizer)


@each_family
def test_thinking_that_a_template_drops_later_is_trained_in_an_answer(name: str) -> None:
    example = preference(said("q", "<think>\nhm\n</think>\n\none", "r"), "<think>\nso\n</think>\n\nyes", "no")
    group = encode_preference(example, ORIGIN, tokenizer_of(name))
    assert "so" in trained_text(group.sequences[0], name)
    assert "one" not in trained_text(group.sequences[0], name)


@each_family
def test_a_reward_model_reads_what_the_template_writes(name: str) -> None:
    tokenizer, turns = tokenizer_of(name), [{"role": "user", "content": "q"}]
    group = encode_for_reward(preference(said("q"), "yes", "no"), ORIGIN, tokenizer)
    for sequence, text in zip(group.sequences, ["yes", "no"], strict=True):
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": text}])["input_ids"]
        assert sequence.token_ids.tolist() == whole
        assert text in trained_text(sequence, name)
        assert "q" not in trained_text(sequence, name)


def test_a_reward_is_read_off_the_last_token_that_is_not_padding() -> None:
    """Mistral's template writes nothing behind the end of a turn, with which some models pad too."""
    tokenizer = tokenizer_of("mistral_v3")
    whole, bare = (
        encode_for_reward(preference(said("q"), "yes", "no"), ORIGIN, tokenizer, padding_id=padding).sequences[0]
        for padding in (None, tokenizer.eos_token_id)
    )
    assert whole.token_ids[:-1].tolist() == bare.token_ids.tolist()
    assert whole.token_ids[-1] == tokenizer.eos_token_id


def verdicts(*texts: str) -> list[TokenGroup]:
    examples = [Feedback(Chat(said(f"q{i}", text)), i % 2 == 0) for i, text in enumerate(texts)]
    return [encode_feedback(one, Origin("kto.jsonl", i), tokenizer_of("chatml")) for i, one in enumerate(examples)]


def test_feedback_trains_its_last_turn_and_keeps_its_verdict() -> None:
    group = encode_feedback(Feedback(Chat(said("q", "one", "r", "two")), False), ORIGIN, tokenizer_of("chatml"))
    assert [trained_text(one, "chatml") for one in group.sequences] == ["two<|im_end|>"]
    assert (group.desirable, group.mismatched) == (False, None)


@given(texts=st.lists(words, min_size=2, max_size=7), seed=st.integers(0, 9))
@settings(deadline=None)
def test_every_answer_stands_once_behind_another_rows_prompt(texts: list[str], seed: int) -> None:
    groups = verdicts(*(f"{i} {text}" for i, text in enumerate(texts)))
    paired = [(group.sequences[0], group.mismatched) for group in with_mismatched(groups, seed=seed, max_length=999)]
    others = [trained_text(other, "chatml") for _, other in paired if other is not None]
    assert sorted(others) == sorted(trained_text(own, "chatml") for own, _ in paired)
    for own, other in paired:
        assert other is not None
        prompt = num_prompt(own)
        assert np.array_equal(other.token_ids[:prompt], own.token_ids[:prompt])
        assert (num_prompt(other), other.origin) == (prompt, own.origin)
        assert trained_text(other, "chatml") != trained_text(own, "chatml")


def test_which_answer_a_row_is_compared_with_depends_on_the_seed_alone() -> None:
    texts = [[f"{start}{i}" for i in range(9)] for start in "ab"]
    orders = [
        [trained_text(other, "chatml")[1:] for group in with_mismatched(verdicts(*some), seed=seed, max_length=99)
         if (other := group.mismatched) is not None]
        for some, seed in ((texts[0], 3), (texts[1], 3), (texts[0], 4))
    ]  # fmt: skip
    assert orders[0] == orders[1] != orders[2]


def test_another_rows_answer_is_held_to_the_limit() -> None:
    groups = verdicts("a" * 40, "b")
    long = with_mismatched(groups, seed=0, max_length=30)[1].mismatched
    assert long is not None
    assert (len(long), set(trained_text(long, "chatml"))) == (30, {"a"})


def test_one_row_alone_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="only one row"):
        with_mismatched(verdicts("a"), seed=0, max_length=9)


def pair(better: str, worse: str) -> TokenGroup:
    return encode_preference(preference(said("q"), better, worse), ORIGIN, tokenizer_of("chatml"))


def test_a_group_is_dropped_where_any_answer_is_too_long() -> None:
    short, long = pair("a", "b"), pair("a", "b" * 99)
    limited = limit([short, long], 50, "drop")
    assert (limited.kept, limited.dropped, limited.cut) == ([short], [ORIGIN], [])
    with pytest.raises(DataError, match=r"rows\.jsonl:7: longer than max_length 50"):
        limit([short, long], 50, "error")


@given(st.text("ab", min_size=1, max_size=9), st.text("ab", min_size=1, max_size=9), st.integers(0, 12))
def test_cut_answers_keep_a_trained_token_each_and_still_differ(better: str, worse: str, room: int) -> None:
    group = pair(f"{better}1", f"{worse}2")
    length = num_prompt(group.sequences[0]) + room
    limited = limit([group], length, "truncate")
    ends = {one.token_ids[:length].tobytes() for one in group.sequences}
    assert (len(limited.kept), len(limited.dropped)) == ((1, 0) if len(ends) == 2 else (0, 1))
    for one in sequences_of(limited.kept):
        assert 0 < one.num_trained <= room
        assert len(one) <= length


@pytest.mark.parametrize(
    ("example", "kind"),
    [
        (Text("Once."), TokenSequence),
        (Chat(said("q", "a")), TokenSequence),
        (preference(said("q"), "a", "b"), TokenGroup),
        (Feedback(Chat(said("q", "a")), True), TokenGroup),
        (Prompt(said("q")), TokenSequence),
        (Steps(said("q"), ("a", "b"), (True, False)), TokenGroup),
    ],
)
def test_every_kind_of_example_becomes_an_item_with_its_origin(example: Example, kind: type) -> None:
    (item,) = encode(example, ORIGIN, tokenizer_of("chatml"), train_on="assistant")
    assert isinstance(item, kind)
    assert item.origin == ORIGIN


@each_family
def test_a_steps_label_stands_at_its_line_break_behind_what_is_served(name: str) -> None:
    example = Steps(said("q"), ("one", "two <|im_end|>", "three"), (True, False, True))
    group = encode_steps(example, ORIGIN, tokenizer_of(name))
    (sequence,) = group.sequences
    assert group.correct == example.correct
    prompt = encode_prompt(Chat(said("q")), tokenizer_of(name))
    assert sequence.token_ids[: len(prompt)].tolist() == prompt
    ends = np.flatnonzero(sequence.trained) + 1
    pieces = np.split(sequence.token_ids, [len(prompt), *ends[:-1]])[1:]
    assert [tokenizer_of(name).decode(piece) for piece in pieces] == [f"{step}\n" for step in example.steps]
    cut = limit([group], int(ends[1]), "truncate").kept[0]
    assert isinstance(cut, TokenGroup)
    assert cut.correct == (True, False)
