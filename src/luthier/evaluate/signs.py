"""What answers look like when a training has gone wrong: empty, in loops, of tokens at random, without an end.

Each sign is a rule with one number, between what real text was measured to have and what broken text has. On 54 pieces
of 64 to 256 tokens (chats, web pages, sums, code, medicine, Shakespeare, German, Arabic, Chinese; SmolLM2-135M's
tokens) at most 34% of the 4-grams were repeated, and the model gave a token 5.4 nats at most in the mean. Of loops over
a word or a sentence 67% were; tokens at random took 12 nats and more, shuffled tokens 8.6, shuffled words and random
letters 5.6 to 8. A model that is asked greedily is judged by most of its answers, not by one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["SIGNS", "Answered", "nats_bound", "repeated_share", "signs_in"]

_GRAM = 4
_MOST_REPEATED = 0.5
_MOST_OF_UNIFORM = 0.6  # of ln(vocabulary), which a draw from all tokens alike costs a model that expects such draws
_FEWEST_TOKENS = 16  # of an answer, to say anything of how it goes on


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer. num_tokens: with the one that ended it. finished: it ended by itself. repeated: `repeated_share`.
    nats: a token, by the untrained model; None where that cannot be asked.
    """

    text: str
    num_tokens: int
    finished: bool
    repeated: float
    nats: float | None


def repeated_share(token_ids: Sequence[int]) -> float:
    """1 - |distinct 4-grams| / |4-grams|        seq-rep-4 of Welleck et al. 2020, section 3; 0 where there are none"""
    grams = [tuple(token_ids[i : i + _GRAM]) for i in range(len(token_ids) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def nats_bound(vocabulary_nats: float) -> float:
    """The nats a token over which text is as good as random to a model. vocabulary_nats: ln of its number of tokens."""
    return _MOST_OF_UNIFORM * vocabulary_nats


SIGNS: dict[str, str] = {
    "empty": "are empty, so the model has learned to stop at once; look for empty answers with `luthier data preview`, "
    "and lower learning_rate",
    "repeats": "go round in loops, so the model has collapsed, or learned rows that repeat themselves; lower "
    "learning_rate or epochs, and in preference stages raise beta",
    "gibberish": "are to the untrained model as unlikely as random tokens, so the weights are spoiled, if the rows are "
    "not in a language that it does not know; lower learning_rate or epochs, or set dtype: fp32",
    "never ends": "are cut off at watch.max_new_tokens, which nine of ten rows stay under, so where to stop is not "
    "learned; look with `luthier data preview` whether rows end where they should, and train longer",
}
"""What to say of most answers where they have a sign: its cause and its mend."""


def signs_in(answers: Sequence[Answered], *, vocabulary_nats: float, ends_expected: bool) -> set[str]:
    """The signs that most of the answers have, by their names in SIGNS.

    vocabulary_nats: ln of the vocabulary's size. ends_expected: whether answers are meant to be shorter than they may.
    """
    bound = nats_bound(vocabulary_nats)
    rules: dict[str, Callable[[Answered], bool]] = {
        "empty": lambda one: not one.text.strip(),
        "repeats": lambda one: one.num_tokens >= _FEWEST_TOKENS and one.repeated > _MOST_REPEATED,
        "gibberish": lambda one: one.num_tokens >= _FEWEST_TOKENS and one.nats is not None and not one.nats <= bound,
        "never ends": lambda one: ends_expected and not one.finished,
    }
    return {name for name, rule in rules.items() if sum(map(rule, answers)) > len(answers) / 2}
