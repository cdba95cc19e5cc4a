"""Each format's rows become the preference or feedback that they mean, and a row that prefers nothing is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.examples import Chat, Example, Feedback, Message, Preference, Prompt, Steps, ToolCall
from luthier.data.formats import FORMATS, Task, check_names, recognise, to_example
from luthier.data.reading import read_examples
from luthier.errors import DataError

ASK, GOOD, BAD = Message("user", "Why?"), Message("assistant", "So."), Message("assistant", "No.")
PAIR = Preference((ASK,), ((GOOD,), (BAD,)))
RULE = Message("system", "Be brief.")


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def spoken(role: str, value: str) -> dict[str, str]:
    return {"from": role, "value": value}


QUESTION, RIGHT, WRONG = turn("user", "Why?"), turn("assistant", "So."), turn("assistant", "No.")
HUMAN, GPT = spoken("human", "Why?"), spoken("gpt", "So.")
CALL = turn("assistant", "", tool_calls=[{"function": {"name": "find", "arguments": "{}"}}])
CALLED, FOUND = Message("assistant", "", (ToolCall("find", {}),)), Message("tool", "[]")
PROMPT_AND_PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
START = "\n\nHuman: Why?\n\nAssistant:"

MEANINGS: list[tuple[str, dict[str, Any], Example]] = [
    ("preference", PROMPT_AND_PAIR, PAIR),
    ("preference", {"prompt": [QUESTION], "chosen": [RIGHT], "rejected": [WRONG]}, PAIR),
    ("preference", {"prompt": QUESTION, "chosen": RIGHT, "rejected": WRONG, "messages": [QUESTION, RIGHT]}, PAIR),
    ("preference", {"question": "Why?", "chosen": GPT, "rejected": "No.", "id": 7}, PAIR),
    ("preference", {"prompt": "Why?", "chosen": [QUESTION, RIGHT], "rejected": [QUESTION, WRONG]}, PAIR),
    ("preference", {"prompt": START, "chosen": f"{START} So.", "rejected": f"{START} No."}, PAIR),
    ("preference", PROMPT_AND_PAIR | {"system": "Be brief."}, Preference((RULE, ASK), PAIR.answers)),
    (
        "preference",
        {"instruction": "Add", "input": "1 2", "chosen": "So.", "rejected": "No."},
        Preference((Message("user", "Add\n\n1 2"),), PAIR.answers),
    ),
    (
        "preference",
        {"prompt": "Why?", "chosen": [QUESTION, CALL, turn("tool", "[]"), RIGHT], "rejected": [QUESTION, WRONG]},
        Preference((ASK,), ((CALLED, FOUND, GOOD), (BAD,))),
    ),
    (
        "preference",
        PROMPT_AND_PAIR | {"score_chosen": 8, "score_rejected": "2.5"},
        Preference((ASK,), PAIR.answers, scores=(8.0, 2.5)),
    ),
    ("preference", PROMPT_AND_PAIR | {"margin": 3}, Preference((ASK,), PAIR.answers, scores=(3.0, 0.0))),
    ("preference", PROMPT_AND_PAIR | {"chosen_score": 4, "rejected_score": 4}, PAIR),
    ("sharegpt_preference", {"conversations": [HUMAN], "chosen": GPT, "rejected": spoken("gpt", "No.")}, PAIR),
    ("sharegpt_preference", {"conversation": [QUESTION], "chosen": RIGHT, "rejected": "No."}, PAIR),
    ("dialogues", {"chosen": [QUESTION, RIGHT], "rejected": [QUESTION, WRONG]}, PAIR),
    ("dialogues", {"chosen": f"{START} So.", "rejected": f"{START} No."}, PAIR),
    (
        "dialogues",
        {
            "chosen": f"{START} So.\n\nHuman: Why?\n\nAssistant: So.",
            "rejected": f"{START} So.\n\nHuman: Why?\n\nAssistant: No.",
        },
        Preference((ASK, GOOD, ASK), PAIR.answers),
    ),
    (
        "dialogues",
        {"chosen": f"{START} So.\n\nAssistant: Yes.", "rejected": f"{START} So."},
        Preference((ASK,), ((Message("assistant", "So.\n\nYes."),), (GOOD,))),
    ),
    ("ranking", {"prompt": "Why?", "responses": ["So.", "No."]}, PAIR),
    (
        "ranking",
        {"prompt": "Why?", "answers": ["a", "b", "c"], "scores": [1, 3, 2]},
        Preference((ASK,), tuple((Message("assistant", text),) for text in "bca"), scores=(3.0, 2.0, 1.0)),
    ),
    (
        "ranking",
        {"prompt": "Why?", "completions": [[turn("assistant", "a")], "b", "c"], "ranks": [2, 1, 2]},
        Preference((ASK,), tuple((Message("assistant", text),) for text in "bac"), scores=(-1.0, -2.0, -2.0)),
    ),
    (
        "steps",
        {"prompt": "Why?", "completions": ["a", "b"], "labels": [True, 0]},
        Steps((ASK,), ("a", "b"), (True, False)),
    ),
    (
        "steps",
        {"question": "Why?", "steps": ["a"], "labels": ["false"], "system": "Be brief."},
        Steps((RULE, ASK), ("a",), (False,)),
    ),
    ("feedback", {"prompt": "Why?", "completion": "So.", "label": True}, Feedback(Chat((ASK, GOOD)), True)),
    ("feedback", {"prompt": "Why?", "response": [QUESTION, WRONG], "label": 0}, Feedback(Chat((ASK, BAD)), False)),
    ("feedback", {"instruction": "Why?", "output": "So.", "kto_tag": "True"}, Feedback(Chat((ASK, GOOD)), True)),
    ("feedback_messages", {"messages": [QUESTION, RIGHT], "label": 1.0}, Feedback(Chat((ASK, GOOD)), True)),
    (
        "sharegpt_feedback",
        {"conversations": [HUMAN, GPT], "label": "undesirable", "system": "Be brief."},
        Feedback(Chat((RULE, ASK, GOOD)), False),
    ),
]


@pytest.mark.parametrize(("name", "row", "meaning"), MEANINGS)
def test_a_row_is_recognised_and_becomes_the_example_it_means(name: str, row: dict[str, Any], meaning: Example) -> None:
    assert recognise(row, FORMATS[name].task) == recognise(row, None) == name
    assert to_example(row, name) == meaning


PROMPTS: list[tuple[str, dict[str, Any], Prompt]] = [
    ("prompt", {"prompt": "Why?", "answer": "So."}, Prompt((ASK,))),
    ("prompt", {"instruction": "Why?", "input": "", "system": "Be brief."}, Prompt((RULE, ASK))),
    ("prompt", {"question": [QUESTION, RIGHT]}, Prompt((ASK,))),
    ("prompt_messages", {"messages": [QUESTION]}, Prompt((ASK,))),
    ("prompt_messages", {"messages": [QUESTION, RIGHT, QUESTION, WRONG]}, Prompt((ASK, GOOD, ASK))),
    ("sharegpt_prompt", {"conversations": [HUMAN, GPT], "tools": ""}, Prompt((ASK,))),
]


@pytest.mark.parametrize(("name", "row", "meaning"), PROMPTS)
def test_a_prompt_waits_for_an_answer_and_keeps_its_row(name: str, row: dict[str, Any], meaning: Prompt) -> None:
    assert recognise(row, "ask") == name
    assert to_example(row, name) == replace(meaning, row=row)


def test_a_prompt_alone_lacks_something_for_other_tasks() -> None:
    assert recognise({"prompt": "Why?"}, None) == "prompt"
    for task in ("imitate", "prefer", "judge"):
        with pytest.raises(DataError, match='"prompt" fit no known format'):
            recognise({"prompt": "Why?"}, task)


def test_every_format_of_preferences_has_a_row_that_shows_its_meaning() -> None:
    shown = {name for name, _, _ in [*MEANINGS, *PROMPTS]}
    assert shown == {name for name, known in FORMATS.items() if known.task != "imitate"}


@pytest.mark.parametrize(("name", "row", "meaning"), MEANINGS)
def test_no_row_that_prefers_or_judges_is_taken_for_an_example_to_imitate(
    name: str, row: dict[str, Any], meaning: Example
) -> None:
    stage = {"judge": "kto", "prefer": "dpo", "grade": "process_reward"}[FORMATS[name].task]
    with pytest.raises(DataError, match=f"train on it with {stage}"):
        recognise(row)


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        ("prefer", {"question": "x", "answer": "y"}, '"question", "answer" is an example to imitate; .* with sft'),
        ("prefer", {"messages": [], "label": True}, "is an answer with a verdict"),
        ("judge", PROMPT_AND_PAIR, "is a preference pair"),
        ("judge", {"Frage": "x"}, r'"Frage" fit no known format: feedback \(prompt or instruction, completion'),
        ("prefer", {"image": "a.png", **PROMPT_AND_PAIR}, '"image" is a picture with text'),
    ],
)
def test_a_row_of_another_task_names_the_stage_that_takes_it(task: Task, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        recognise(row, task)


def test_a_row_that_fits_two_tasks_is_for_the_one_that_is_asked_for() -> None:
    row = PROMPT_AND_PAIR | {"completion": "So.", "label": True}
    assert (recognise(row, "prefer"), recognise(row, "judge")) == ("preference", "feedback")


def test_a_format_of_another_task_cannot_be_named() -> None:
    check_names("ranking", {"responses": "answers"}, "prefer")
    with pytest.raises(DataError, match=r'"ranking" is of another task: .* train on it with dpo'):
        check_names("ranking", {}, "imitate")
    with pytest.raises(DataError, match=r'format "rankings" is not known; is "ranking" meant\?'):
        check_names("rankings", {}, "prefer")
    with pytest.raises(DataError, match=r'maps "choosen", which is no column; is "chosen" meant\?'):
        check_names(None, {"choosen": "better"}, "prefer")


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("preference", PROMPT_AND_PAIR | {"rejected": "So. "}, '"chosen" and "rejected" are equal'),
        ("preference", PROMPT_AND_PAIR | {"chosen": " "}, '"chosen" is empty'),
        ("preference", PROMPT_AND_PAIR | {"chosen": []}, '"chosen" does not end with a turn of the assistant'),
        ("preference", PROMPT_AND_PAIR | {"rejected": None}, 'has no "rejected"'),
        ("preference", PROMPT_AND_PAIR | {"chosen": [QUESTION, RIGHT]}, '"chosen" is a whole dialogue, but not every'),
        ("preference", PROMPT_AND_PAIR | {"prompt": [QUESTION, RIGHT]}, "the prompt ends with a turn of the assistant"),
        ("preference", PROMPT_AND_PAIR | {"prompt": [turn("system", "x")]}, "no turn of the user asks"),
        ("preference", PROMPT_AND_PAIR | {"chosen": QUESTION}, '"chosen" is a whole dialogue'),
        ("preference", PROMPT_AND_PAIR | {"chosen": [turn("tool", "x"), RIGHT]}, 'begins with a turn of the tool'),
        ("preference", PROMPT_AND_PAIR | {"chosen_score": 1}, 'only "chosen_score" is there'),
        ("preference", PROMPT_AND_PAIR | {"chosen_score": 1, "rejected_score": 2}, '"rejected" is better, 1 against 2'),
        ("preference", PROMPT_AND_PAIR | {"margin": -1}, '"rejected" is better'),
        ("preference", PROMPT_AND_PAIR | {"margin": "wide"}, '"margin" is the text "wide", not a number'),
        (
            "preference",
            {"prompt": "How?", "chosen": [QUESTION, RIGHT], "rejected": [QUESTION, WRONG]},
            'the dialogues begin otherwise than "prompt" says',
        ),
        ("sharegpt_preference", {"conversations": [HUMAN, GPT], "chosen": "a", "rejected": "b"}, "prompt ends with"),
        ("dialogues", {"chosen": "So.", "rejected": "No."}, '"chosen" is the text "So.", not a dialogue .* "prompt"'),
        ("dialogues", {"chosen": f"{START} So.", "rejected": START}, 'turn 2 of "rejected" is empty'),
        ("dialogues", {"chosen": [QUESTION, RIGHT], "rejected": [turn("user", "x"), RIGHT]}, "prompts differ: turn 1"),
        (
            "dialogues",
            {"chosen": [QUESTION, RIGHT], "rejected": [QUESTION, WRONG, QUESTION, RIGHT]},
            """the prompts differ: turn 3 of "rejected" is the user's""",
        ),
        ("dialogues", {"chosen": [QUESTION, RIGHT], "rejected": [QUESTION, RIGHT]}, "are equal"),
        ("ranking", {"prompt": "Why?", "responses": ["a"]}, "holds 1 answer, and only two or more"),
        ("ranking", {"prompt": "Why?", "responses": []}, "holds no answer"),
        ("ranking", {"prompt": "Why?", "responses": "a"}, '"responses" is not valid JSON'),
        ("ranking", {"prompt": "Why?", "responses": ["a", "b", "a"]}, "answer 1 and answer 3 are equal"),
        ("ranking", {"prompt": "Why?", "responses": ["a", ""]}, '"answer 2 of responses" is empty'),
        ("ranking", {"prompt": "Why?", "responses": ["a", "b"], "scores": [1]}, "holds 1 values for 2 answers"),
        ("ranking", {"prompt": "Why?", "responses": ["a", "b"], "ranks": [1, 1]}, "alike, so none is preferred"),
        ("ranking", {"prompt": "Why?", "responses": ["a", "b"], "ranks": [1, True]}, 'value 2 of "ranks" is true'),
        ("feedback", {"prompt": "Why?", "completion": "So."}, 'has no "label" or "kto_tag"'),
        ("feedback", {"prompt": "Why?", "completion": "So.", "label": "good"}, '"label" is the text "good"; it'),
        ("feedback", {"prompt": "Why?", "completion": "So.", "label": 2}, '"label" is the number 2'),
        ("feedback", {"prompt": "Why?", "completion": "So.", "label": [1]}, '"label" is a list'),
        ("feedback", {"prompt": "Why?", "completion": "", "label": 1}, '"completion" is empty'),
        ("feedback_messages", {"messages": [RIGHT], "label": True}, "no turn of the user asks"),
        ("feedback_messages", {"messages": [QUESTION, RIGHT, RIGHT], "label": 1}, "the prompt ends with a turn"),
        ("feedback_messages", {"messages": [QUESTION], "label": True}, "no turn is the assistant's"),
        ("prompt", {"prompt": ""}, '"prompt" is empty'),
        ("prompt_messages", {"messages": [RIGHT]}, "no turn of the user asks"),
        ("prompt_messages", {"messages": [turn("tool", "x"), QUESTION]}, "a tool answers before"),
    ],
)  # fmt: skip
def test_a_row_that_prefers_nothing_is_refused_with_the_reason(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        to_example(row, name)


names = st.sampled_from(["a", "b", "c"])
exchanges = st.lists(st.tuples(names, names), max_size=3)


@given(shared=exchanges, question=names, answers=st.permutations(["x", "y"]))
def test_the_prompt_of_two_dialogues_is_all_that_they_share(
    shared: list[tuple[str, str]], question: str, answers: list[str]
) -> None:
    start = [turn for pair in shared for turn in (Message("user", pair[0]), Message("assistant", pair[1]))]
    prompt = [*start, Message("user", question)]
    spoken = [
        "".join(f"\n\n{'Human' if said.role == 'user' else 'Assistant'}: {said.content}" for said in prompt)
        + f"\n\nAssistant: {answer}"
        for answer in answers
    ]
    expected = Preference(tuple(prompt), tuple((Message("assistant", answer),) for answer in answers))
    assert to_example({"chosen": spoken[0], "rejected": spoken[1]}, "dialogues") == expected


def test_bad_rows_are_counted_and_quarantined_with_their_reasons(tmp_path: Path) -> None:
    rows = [PROMPT_AND_PAIR, PROMPT_AND_PAIR | {"rejected": "So."}, PROMPT_AND_PAIR | {"chosen": ""}, PROMPT_AND_PAIR]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    reading = read_examples(str(path), task="prefer", on_error="skip", quarantine=tmp_path / "bad.jsonl")
    assert (reading.num_rows, len(reading.examples), len(reading.bad)) == (4, 2, 2)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "bad.jsonl").read_text("utf-8").splitlines()]
    assert ["equal" in reasons[0], "empty" in reasons[1]] == [True, True]


@pytest.mark.parametrize(
    ("file", "task", "name"),
    [
        ("dpo_en_sharegpt.jsonl", "prefer", "sharegpt_preference"),
        ("kto_en_sharegpt.jsonl", "judge", "feedback_messages"),
        ("alpaca_eval_prefs/train.jsonl", "prefer", "preference"),
        ("qa_feedback/train.jsonl", "prefer", "preference"),
        ("persona_prefs/train.jsonl", "prefer", "preference"),
    ],
)
def test_the_peers_files_are_read_as_they_are(shared_data: Path, file: str, task: Task, name: str) -> None:
    """Every row is used, and its answers are the words of the file."""
    path = shared_data / file
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    reading = read_examples(str(path), task=task)
    assert reading.formats == {str(path): name}
    assert reading.num_rows == len(reading.examples) == len(rows)
    for row, (_, example) in zip(rows, reading.examples, strict=True):
        if isinstance(example, Preference):
            assert [answer[-1].content for answer in example.answers] == [words(row["chosen"]), words(row["rejected"])]
        elif isinstance(example, Feedback):
            assert (example.chat.messages[-1].content, example.desirable) == (words(row["messages"][-1]), row["label"])


def words(answer: Any) -> str:
    return answer if isinstance(answer, str) else answer.get("value") or answer["content"]


def test_hh_dialogues_are_used_or_reported_row_by_row(shared_data: Path) -> None:
    """Used is a row whose two dialogues both end with words of the assistant, and whose human says the same in both."""
    path = shared_data / "hh_harmless_pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    usable = [i for i, row in enumerate(rows, start=1) if humans(row["chosen"]) == humans(row["rejected"])]
    usable = [
        i for i in usable if all(rows[i - 1][name].rstrip()[-10:] != "Assistant:" for name in ("chosen", "rejected"))
    ]
    reading = read_examples(str(path), task="prefer", on_error="skip")
    assert reading.num_rows == len(rows) == len(reading.examples) + len(reading.bad)
    assert [origin.line for origin, _ in reading.examples] == usable
    assert {bad.reason.split(" is ")[-1] for bad in reading.bad} <= {"empty"}


def humans(dialogue: str) -> list[str]:
    """What the human says, turn by turn."""
    return [part.partition("\n\nAssistant:")[0] for part in re.split(r"\n\nHuman:", dialogue)]


@pytest.fixture
def shared_data() -> Path:
    folder = Path(__file__).parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the data folder ../shared/data beside the checkout")
    return folder


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"completions": ["a", "b"], "labels": [True]}, "there are 2 steps and 1 labels"),
        ({"completions": [], "labels": []}, "there are 0 steps"),
        ({"completions": ["a", " "], "labels": [1, 1]}, "step 2 is empty"),
        ({"completions": "a", "labels": [1]}, '"completions" is'),
        ({"completions": ["a"], "labels": [7]}, '"label" is'),
    ],
)
def test_steps_without_a_label_each_are_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        to_example({"prompt": "Why?", **row}, "steps")
