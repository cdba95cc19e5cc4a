"""A model behind a server as judge: it may reason, and ends with a verdict in a stated form."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from luthier.evaluate.judging_prompt import judging_messages
from luthier.evaluate.verdicts import Outcome, Question, Verdict
from luthier.rollout.asking import LastLine, ask_all
from luthier.rollout.endpoint import Endpoint
from luthier.rollout.scoring import Failure

__all__ = ["ServerJudge"]

_FORM = (
    "Think in a few sentences if you need to. Then end with a line that is exactly one of these three, with nothing "
    "behind it:\nVERDICT: A\nVERDICT: B\nVERDICT: TIE"
)
_VERDICT = re.compile(r"VERDICT: (A|B|TIE)")
_OUTCOMES: dict[str, Outcome] = {"A": "first", "B": "second", "TIE": "tie"}


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
        found = ask_all(
            self.endpoint,
            [judging_messages(question, criteria=self.criteria, form=_FORM) for question in questions],
            LastLine(_read, "no verdict"),
            max_new_tokens=self.max_new_tokens,
            parallel=self.parallel,
            most_failures=self.most_failures,
        )
        return [Verdict("failed", one) if isinstance(one, Failure) else one for one in found]


def _read(line: str) -> Verdict | None:
    found = _VERDICT.fullmatch(line)
    return Verdict(_OUTCOMES[found[1]]) if found else None
