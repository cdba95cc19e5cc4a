"""A judge behind a server: whatever the server does, every question ends as a verdict, and no key is shown."""

import logging
import random
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from luthier.data.examples import Message
from luthier.evaluate.server_judge import ServerJudge
from luthier.evaluate.verdicts import JudgeReport, Question, compare_both_orders
from luthier.rollout.endpoint import Endpoint

KEY = "sk-very-secret-0123456789"
ASKED = (Message("user", "Name a colour."),)
BETTER_FIRST, BETTER_SECOND = Question(ASKED, "good red", "stone"), Question(ASKED, "stone", "good red")
EQUAL = Question(ASKED, "good red", "good blue")

Start = Callable[[Callable[[dict[str, Any]], Any]], Any]


def judge(
    url: str, *, waits: list[float] | None = None, timeout_seconds: float = 10.0, retries: int = 2
) -> ServerJudge:
    """A judge whose pauses are noted and not made."""
    endpoint = Endpoint(
        url,
        "judge",
        key=KEY,
        timeout_seconds=timeout_seconds,
        retries=retries,
        sleep=(waits if waits is not None else []).append,
        jitter=random.Random(0),
    )
    return ServerJudge(endpoint, "The better answer is good.")


def shown(request: dict[str, Any], letter: str) -> str:
    """The answer that the judge is shown in this place."""
    text = request["messages"][-1]["content"]
    found = re.search(rf"<answer_{letter}_(\w+)>\n(.*?)\n</answer_{letter}_\1>", text, re.DOTALL)
    assert found is not None
    return found[2]


def fair(request: dict[str, Any]) -> str:
    """Prefers what is good."""
    good = ["good" in shown(request, letter) for letter in "AB"]
    letter = "TIE" if good[0] == good[1] else "A" if good[0] else "B"
    return f"Let me see.\nVERDICT: {letter}\n"


def only_failure(url: str, **options: Any) -> tuple[str, str]:
    """Reason and detail of the one question that was asked."""
    (verdict,) = judge(url, **options).compare([BETTER_FIRST])
    assert verdict.outcome == "failed"
    assert verdict.failure is not None
    return verdict.failure.reason, verdict.failure.detail


def test_a_fair_judge_decides_in_both_orders(serve: Start) -> None:
    server = serve(fair)
    verdicts, report = compare_both_orders(judge(server.url), [BETTER_FIRST, BETTER_SECOND, EQUAL])
    assert [verdict.outcome for verdict in verdicts] == ["first", "second", "tie"]
    assert report == JudgeReport(num_asked=3, num_decided=2, num_ties=1)
    assert len(server.requests) == 6


def test_a_judge_that_always_prefers_the_first_place_decides_nothing(serve: Start) -> None:
    server = serve(lambda request: "VERDICT: A")
    _, report = compare_both_orders(judge(server.url), [BETTER_FIRST, BETTER_SECOND, EQUAL])
    assert report == JudgeReport(num_asked=3, num_ties=3, num_flips=3)
    assert str(report) == "3 compared: 0 decided, 3 ties (3 by a flip), 0 failed"


def test_the_request_is_what_the_protocol_wants(serve: Start) -> None:
    server = serve(fair)
    judge(f"{server.url}").compare([BETTER_FIRST])
    (request,), (headers,) = server.requests, server.headers
    assert {name: request[name] for name in ("model", "temperature", "max_tokens")} == {
        "model": "judge",
        "temperature": 0.0,
        "max_tokens": 512,
    }
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert headers["Authorization"] == f"Bearer {KEY}"


def test_questions_are_asked_at_the_same_time(serve: Start) -> None:
    """Each of the first four waits for the other three: asked one by one, they would never be answered."""
    together = threading.Barrier(4)

    def wait(request: dict[str, Any]) -> str:
        together.wait(timeout=10)
        return fair(request)

    verdicts = judge(serve(wait).url).compare([BETTER_FIRST] * 4)
    assert [verdict.outcome for verdict in verdicts] == ["first"] * 4


def test_a_server_that_says_nothing_is_given_up_after_the_repetitions(serve: Start, answer: Any) -> None:
    server = serve(lambda request: answer([b"{}"], pause_seconds=30))
    assert only_failure(server.url, timeout_seconds=0.1) == ("timed out", "no reply within 0.1 seconds")
    assert len(server.requests) == 3


def test_a_reply_that_drips_is_timed_as_a_whole(serve: Start, answer: Any) -> None:
    """Each byte comes well within the limit, all fifty do not."""
    server = serve(lambda request: answer([b" "] * 50, pause_seconds=0.05))
    assert only_failure(server.url, timeout_seconds=0.2, retries=0)[0] == "timed out"


def test_the_pause_that_the_server_asks_for_is_made(serve: Start, answer: Any) -> None:
    answers = iter([answer([b""], status=429, headers={"Retry-After": "7"}), "VERDICT: A"])
    waits: list[float] = []
    (verdict,) = judge(serve(lambda request: next(answers)).url, waits=waits).compare([BETTER_FIRST])
    assert (verdict.outcome, waits) == ("first", [7.0])


def test_the_pause_may_be_a_date(serve: Start, answer: Any) -> None:
    """HTTP dates have whole seconds."""
    moment = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    answers = iter([answer([b""], status=503, headers={"Retry-After": moment}), "VERDICT: B"])
    waits: list[float] = []
    judge(serve(lambda request: next(answers)).url, waits=waits).compare([BETTER_FIRST])
    assert 50 < waits[0] <= 60


def test_a_pause_of_an_hour_is_not_made(serve: Start, answer: Any) -> None:
    server, waits = serve(lambda request: answer([b""], status=429, headers={"Retry-After": "3600"})), []
    assert only_failure(server.url, waits=waits) == ("HTTP 429", "the server asks to wait for 3600 seconds")
    assert (len(server.requests), waits) == (1, [])


def test_pauses_grow_and_are_jittered(serve: Start, answer: Any) -> None:
    """1, 2 and 4 seconds, times a half to three halves."""
    server, waits = serve(lambda request: answer([b'{"error": "overloaded"}'], status=500)), []
    assert only_failure(server.url, waits=waits, retries=3) == ("HTTP 500", '{"error": "overloaded"}')
    assert len(server.requests) == 4
    assert all(0.5 * 2**i <= wait <= 1.5 * 2**i for i, wait in enumerate(waits))
    assert [wait / 2**i for i, wait in enumerate(waits)] != [1.0] * 3


def test_a_question_that_the_server_refuses_is_not_repeated(serve: Start, answer: Any) -> None:
    server = serve(lambda request: answer([b"no such\n model"], status=404))
    assert only_failure(server.url) == ("HTTP 404", "no such model")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "text", ["", "A", "verdict: a", "VERDICT: C", "VERDICT: A or B", "VERDICT: A\nor not", "I refuse."]
)
def test_a_reply_without_a_verdict_is_asked_for_once_more(serve: Start, text: str) -> None:
    server = serve(lambda request: text)
    assert only_failure(server.url)[0] == "no verdict"
    first, second = (request["messages"][-1]["content"] for request in server.requests)
    assert second.startswith(first)
    assert second != first


def test_the_second_reply_may_hold_the_verdict(serve: Start) -> None:
    answers = iter(["Both are nice.", "VERDICT: B"])
    (verdict,) = judge(serve(lambda request: next(answers)).url).compare([BETTER_FIRST])
    assert verdict.outcome == "second"


def test_a_reply_that_was_cut_off_says_so(serve: Start, answer: Any) -> None:
    body = b'{"choices": [{"message": {"content": "I think that"}, "finish_reason": "length"}]}'
    reason, detail = only_failure(serve(lambda request: answer([body])).url)
    assert (reason, detail) == ("no verdict", "cut off after 512 tokens; it ends with 'I think that'")


@pytest.mark.parametrize(
    "body",
    [
        b"<html>hello</html>",
        b"",
        b"{}",
        b"[]",
        b"\xff\xfe",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": null}}]}',
        b'{"choices": {"message": 1}}',
        b"[" * 100_000,
        b'{"choices": NaN}',
    ],
)
def test_a_reply_that_is_no_reply_is_asked_for_once_more(serve: Start, answer: Any, body: bytes) -> None:
    server = serve(lambda request: answer([body]))
    assert only_failure(server.url)[0] == "wrong JSON"
    assert len(server.requests) == 2


@pytest.mark.parametrize("fault", [{"dropped": True}, {"num_missing": 10}], ids=["at once", "within the body"])
def test_a_connection_that_drops_is_tried_again(serve: Start, answer: Any, fault: dict[str, Any]) -> None:
    server = serve(lambda request: answer([b'{"choices"'], **fault))
    assert only_failure(server.url)[0] == "no connection"
    assert len(server.requests) == 3


def test_when_the_server_is_down_the_rest_is_not_asked(serve: Start) -> None:
    server = serve(fair)
    server.stop()
    waits: list[float] = []
    _, report = compare_both_orders(judge(server.url, waits=waits), [BETTER_FIRST] * 100)
    assert report.num_asked == sum(report.failed.values()) == 100
    assert report.failed["not asked"] >= 80
    assert len(waits) <= 2 * 20  # two repetitions of sixteen questions, and of those that were under way


def test_failures_that_end_do_not_stop_the_rest(serve: Start, answer: Any) -> None:
    """Every fifth request is refused, far more than sixteen in all."""
    turns, lock = iter(range(10_000)), threading.Lock()

    def play(request: dict[str, Any]) -> Any:
        with lock:
            refused = next(turns) % 5 == 0
        return answer([b""], status=400) if refused else fair(request)

    verdicts = judge(serve(play).url).compare([BETTER_FIRST] * 150)
    assert sum(verdict.outcome == "failed" for verdict in verdicts) == 30
    assert all(verdict.outcome in ("first", "failed") for verdict in verdicts)


def test_nothing_is_lost_with_a_server_that_does_everything_wrong(serve: Start, answer: Any) -> None:
    """What a question meets is a function of its text, so the counts are known: each fault meets every sixth."""
    faults = [fair, "VERDICT: A", "hm", answer([b"?"]), answer([b""], status=500), answer([b""], dropped=True)]

    def play(request: dict[str, Any]) -> Any:
        number = int(re.findall(r"\d+", "".join(shown(request, letter) for letter in "AB"))[0])
        fault = faults[number % 6]
        return fault(request) if callable(fault) else fault

    questions = [Question(ASKED, f"good {i}", "stone") for i in range(24)]
    verdicts, report = compare_both_orders(judge(serve(play).url, retries=0), questions)
    failed = {"no verdict": 4, "wrong JSON": 4, "HTTP 500": 4, "no connection": 4}
    assert report == JudgeReport(num_asked=24, num_decided=4, num_ties=4, num_flips=4, failed=failed)
    assert [verdict.outcome for verdict in verdicts[:3]] == ["first", "tie", "failed"]


@pytest.mark.parametrize("status", [200, 302, 400, 401, 403, 500])
def test_no_key_is_shown_whatever_the_server_does_with_it(
    serve: Start, answer: Any, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """The server says the key back, as some do in their error messages."""
    caplog.set_level(logging.DEBUG)
    elsewhere = serve(fair)
    headers = {"Location": f"{elsewhere.url}/chat/completions"} if status == 302 else {}
    server = serve(lambda request: answer([f"wrong key {KEY}!".encode()], status=status, headers=headers))
    asked = judge(server.url)
    verdicts = asked.compare([BETTER_FIRST])
    assert verdicts[0].outcome == "failed"
    assert KEY not in f"{verdicts!r} {asked!r} {asked.endpoint!r} {caplog.text}"
    assert elsewhere.requests == []
