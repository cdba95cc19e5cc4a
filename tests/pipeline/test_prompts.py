"""What stands in for answers that are not there yet has as many tokens as these can have."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.examples import Origin
from luthier.data.sequences import TokenSequence
from luthier.pipeline.prompts import answered


def stand_in(prompt: int, answer: int) -> TokenSequence:
    trained = np.arange(prompt + answer) >= prompt
    return TokenSequence(np.full(prompt + answer, 7, dtype=np.int32), trained, Origin("prompts.jsonl", 1))


@given(prompt=st.integers(1, 40), answer=st.integers(1, 30), count=st.integers(1, 9))
def test_a_group_has_the_prompt_once_and_each_answer_whole(prompt: int, answer: int, count: int) -> None:
    group = answered(stand_in(prompt, answer), count)
    assert len(group.sequences) == count
    assert len(group) == prompt + count * answer
    assert group.num_trained == count * answer


@given(prompt=st.integers(1, 40), answer=st.integers(1, 30), count=st.integers(1, 9), most_tokens=st.integers(2, 400))
def test_a_bounded_group_is_full_where_answers_could_fill_it(
    prompt: int, answer: int, count: int, most_tokens: int
) -> None:
    """And else it is whole."""
    group = answered(stand_in(prompt, answer), count, most_tokens=most_tokens)
    whole = prompt + count * answer
    assert len(group) == min(most_tokens, whole)
    assert group.num_trained <= count * answer
    assert len({tuple(one.token_ids) for one in group.sequences}) == len(group.sequences)
