"""A judge whose verdicts are written down as they come: an interrupted judging asks only for what it has not heard.

A judge that reads is slow, or costs money. What failed is not written down, so it is asked for again.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from luthier.errors import CheckpointError
from luthier.evaluate.verdicts import Judge, Outcome, Question, Verdict
from luthier.files import write_whole

__all__ = ["AT_A_TIME", "Remembered"]

AT_A_TIME = 32  # questions, between two writes


class Remembered:
    """The same judge, with its verdicts in a file of JSON lines: a question's digest and its outcome."""

    def __init__(self, judge: Judge, path: Path) -> None:
        self.judge, self.path = judge, path

    def compare(self, questions: Sequence[Question]) -> list[Verdict]:
        """One verdict for each question, in their order; equal questions are asked once."""
        verdicts, digests = self._read(), [_digest(question) for question in questions]
        asked = zip(digests, questions, strict=True)
        waiting = list({digest: question for digest, question in asked if digest not in verdicts}.items())
        with self.path.open("a", encoding="utf-8") as file:
            for start in range(0, len(waiting), AT_A_TIME):
                some = waiting[start : start + AT_A_TIME]
                heard = self.judge.compare([question for _, question in some])
                for (digest, _), verdict in zip(some, heard, strict=True):
                    verdicts[digest] = verdict
                    if verdict.outcome != "failed":
                        file.write(_line(digest, verdict))
                file.flush()
        return [verdicts[digest] for digest in digests]

    def _read(self) -> dict[str, Verdict]:
        """What was heard before. A last line that a kill cut short is dropped, also from the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        verdicts = dict(self._verdict(number, line) for number, line in enumerate(text.split("\n")[:-1], start=1))
        write_whole(self.path, "".join(_line(digest, verdict) for digest, verdict in verdicts.items()))
        return verdicts

    def _verdict(self, number: int, line: str) -> tuple[str, Verdict]:
        try:
            match json.loads(line):
                case {"question": str(digest), "outcome": str(outcome)} if outcome in get_args(Outcome):
                    return digest, Verdict(cast(Outcome, outcome))
        except ValueError:
            pass
        raise CheckpointError(f"{self.path}:{number}: this line is damaged; delete it, and the judge is asked again")


def _line(digest: str, verdict: Verdict) -> str:
    return json.dumps({"question": digest, "outcome": verdict.outcome}) + "\n"


def _digest(question: Question) -> str:
    """Of all that a judge reads; the order of the answers is part of it."""
    said = ascii((question.prompt, question.first, question.second))
    return hashlib.sha256(said.encode()).hexdigest()
