"""A model behind a server as judge: it may reason, and ends with a verdict in a stated form.

A reply without that form is asked for once more, and then the question has failed. When many questions in a row got
no reply at all, the rest is not asked: a server that is down would cost its timeouts for each of them.
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Lock

from luthier.data.examples import Message
from luthier.evaluate.judging_prompt import judging_messages
from luthier.evaluate.verdicts import Outcome, Question, Verdict
from luthier.rollout.endpoint import WRONG_JSON, Endpoint
from luthier.rollout.scoring import Failure

__all__ = ["ServerJudge"]

_FORM = (
    "Think in a few sentences if you need to. Then end with a line that is exactly one of these three, with nothing "
    "behind it:\nVERDICT: A\nVERDICT: B\nVERDICT: TIE"
)
_REMINDER = "\n\nThis is asked again because the last reply ended without such a line. Write that line alone."
_VERDICT = re.compile(r"VERDICT: (A|B|TIE)")
_OUTCOMES: dict[str, Outcome] = {"A": "first", "B": "second", "TIE": "tie"}
_NO_VERDICT = "no verdict"
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class ServerJudge:
    """parallel: questions asked at the same time. most_failures: in a row without any reply, before it is given up."""

    endpoint: Endpoint
    criteria: str
    max_new_tokens: int = 512
    parallel: int = 4
    most_failures: int = 16

    def compare(self, questions: Sequence[Question]) -> list[Verdict]:
        """One verdict for each question, in their order, whatever the server does."""
        patience = _Patience(self.most_failures)
        with ThreadPoolExecutor(self.parallel, thread_name_prefix="judge") as pool:
            return list(pool.map(partial(self._judge, patience), questions))

    def _judge(self, patience: "_Patience", question: Question) -> Verdict:
        if patience.is_lost:
            return Verdict("failed", Failure("not asked", f"{patience.most} questions in a row got no reply"))
        task, asked = judging_messages(question, criteria=self.criteria, form=_FORM)
        verdict = self._ask([task, asked])
        if _is_nonsense(verdict):
            verdict = self._ask([task, Message("user", asked.content + _REMINDER)])
        patience.note(replied=verdict.failure is None or _is_nonsense(verdict))
        return verdict

    def _ask(self, messages: Sequence[Message]) -> Verdict:
        reply = self.endpoint.reply(messages, max_new_tokens=self.max_new_tokens)
        if isinstance(reply, Failure):
            return Verdict("failed", reply)
        last = (reply.text.strip().splitlines() or [""])[-1].strip()
        if found := _VERDICT.fullmatch(last):
            return Verdict(_OUTCOMES[found[1]])
        cut = f"cut off after {self.max_new_tokens} tokens; " if reply.finish_reason == "length" else ""
        return Verdict("failed", Failure(_NO_VERDICT, f"{cut}it ends with {last[-_SHOWN_CHARACTERS:]!r}"))


@dataclass(slots=True)
class _Patience:
    """How many questions in a row got no reply, over all threads."""

    most: int
    num_failures: int = 0
    lock: Lock = field(default_factory=Lock)

    @property
    def is_lost(self) -> bool:
        return self.num_failures >= self.most

    def note(self, *, replied: bool) -> None:
        with self.lock:
            self.num_failures = 0 if replied else self.num_failures + 1


def _is_nonsense(verdict: Verdict) -> bool:
    """Whether there was a reply, but no verdict in it."""
    return verdict.failure is not None and verdict.failure.reason in (_NO_VERDICT, WRONG_JSON)
