"""The process in which one rule runs: a line of JSON in, a line of JSON out.

The first line says which rule and what it may use; each further one is an answer. The pipes are moved out of the way of
standard input and output, so what the rule prints goes to standard error and what it reads is empty. `isolated.py` is
the other end.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from luthier.data.examples import Message
from luthier.errors import RecipeError
from luthier.recipe.rewards import REWARD_SETTINGS
from luthier.rollout.rules import rule_of
from luthier.rollout.scoring import Answered, Failure, Rule, Score, function_from, guarded, rule_by

__all__ = ["main"]

_GRACE_SECONDS = 5.0  # after which a call ends by itself, should nobody be left who would stop it
_DETAIL_CHARACTERS = 500


def main() -> None:
    """Serves one rule until its input ends."""
    requests, replies = _private_pipes()
    task = json.loads(requests.readline())
    _be_modest(int(task["memory_bytes"]))
    try:
        rule = _rule(task)
    except RecipeError as error:
        _say(replies, {"refused": str(error)})
        return
    _say(replies, {"ready": True})
    for line in requests:
        signal.setitimer(signal.ITIMER_REAL, task["timeout_seconds"] + _GRACE_SECONDS)
        score = guarded(rule, _answered(json.loads(line)))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _say(replies, _plain(score))


def _private_pipes() -> tuple[IO[bytes], IO[bytes]]:
    requests, replies = os.dup(0), os.dup(1)  # which no further process inherits
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return os.fdopen(requests, "rb"), os.fdopen(replies, "wb")


def _be_modest(memory_bytes: int) -> None:
    """Memory has a limit, and where it is short for all, this process goes first."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = memory_bytes if most == resource.RLIM_INFINITY else min(memory_bytes, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
    with suppress(OSError):  # Linux alone knows of it
        Path("/proc/self/oom_score_adj").write_text("1000")


def _rule(task: Mapping[str, Any]) -> Rule:
    if "function" in task:
        return rule_by(function_from(task["function"]))
    return rule_of(REWARD_SETTINGS[task["reward"]["type"]].model_validate(task["reward"]))


def _answered(line: Mapping[str, Any]) -> Answered:
    prompt = tuple(Message(turn["role"], turn["content"]) for turn in line["prompt"])
    return Answered(prompt, line["answer"], line["row"])


def _plain(score: Score) -> dict[str, object]:
    if isinstance(score, Failure):
        return {"reason": score.reason, "detail": score.detail[:_DETAIL_CHARACTERS]}
    return {"number": score}


def _say(replies: IO[bytes], what: Mapping[str, object]) -> None:
    sys.stdout.flush()
    replies.write(json.dumps(what).encode() + b"\n")
    replies.flush()
