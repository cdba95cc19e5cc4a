"""Whose run a folder holds, and when two functions count as the same."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import RecipeError
from luthier.pipeline.claim import claim, claimed_by, digest_of_code, give_back, goes_on
from luthier.recipe import SFT, Pretrain, dump_recipe, recipe_of

SOURCE = """
def made(beta):
    def inner(x):
        return [beta * y for y in x if y in {1, 2, "a", "b"}]
    return inner

def plain(x, scale=2.0, *, power=1):
    return sum((lambda y: scale * y ** power)(y) for y in x)

def recursive():
    def again(x):
        return again(x - 1) if x else 0
    return again

class Objective:
    def __call__(self, x):
        return x
"""


def defined(source: str = SOURCE) -> dict[str, Any]:
    """The functions as another process would make them: anew."""
    names: dict[str, Any] = {"__name__": "user"}
    exec(source, names)
    return names


SAME: dict[str, Callable[[dict[str, Any]], object]] = {
    "closure": lambda names: names["made"](0.1),
    "defaults and a lambda": lambda names: names["plain"],
    "partial": lambda names: partial(names["plain"], scale=3.0),
    "closes over itself": lambda names: names["recursive"](),
    "object": lambda names: names["Objective"](),
}


@pytest.mark.parametrize("make", SAME.values(), ids=SAME.keys())
def test_a_function_made_anew_is_the_same(make: Callable[[dict[str, Any]], object]) -> None:
    assert digest_of_code(make(defined())) == digest_of_code(make(defined()))


@pytest.mark.parametrize(
    ("edit", "name"),
    [
        (("{1, 2", "{1, 3"), "made"),
        (("scale=2.0", "scale=2.5"), "plain"),
        (("power=1", "power=2"), "plain"),
        (("** power", "** -power"), "plain"),
        (("x - 1", "x - 2"), "recursive"),
    ],
)
def test_an_edited_function_is_another(edit: tuple[str, str], name: str) -> None:
    edited = SOURCE.replace(*edit)
    assert edited != SOURCE
    assert digest_of_code(defined()[name]) != digest_of_code(defined(edited)[name])


def test_what_is_closed_over_and_bound_counts() -> None:
    names = defined()
    closures = [names["made"](beta) for beta in (0.1, 0.2, {"a": 1}, {"a": 2}, [1], [2])]
    functions = [*closures, names["plain"], partial(names["plain"], scale=3.0), partial(names["plain"], scale=4.0)]
    assert len({digest_of_code(function) for function in functions}) == len(functions)


def test_a_folder_is_claimed_and_given_back_unless_there_is_a_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert claimed_by(output) is None
    claim(output, "mine")
    assert claimed_by(output) == "mine"
    give_back(output)
    assert claimed_by(output) is None
    claim(output, "mine")
    (output / "00-sft" / "checkpoints" / "step-00000001").mkdir(parents=True)
    give_back(output)
    assert claimed_by(output) == "mine"


RUN = dump_recipe(recipe_of("sft", SFT(data="a", learning_rate=0.1)))


@pytest.mark.parametrize(
    ("edit", "same"),
    [
        (("output: runs/sft", "output: elsewhere"), True),
        (("keep_last: 2", "keep_last: 1"), True),
        (("on_error: stop", "on_error: skip"), True),
        (("learning_rate: 0.1", "learning_rate: 0.2"), False),
        (("seed: 42", "seed: 43"), False),
        (("data: a", "data: b"), False),
        (("model:", "# objective: 1\nmodel:"), False),
        (("- sft:", "- pretrain:"), False),
    ],
)
def test_a_run_goes_on_where_all_that_decides_its_numbers_is_equal(edit: tuple[str, str], same: bool) -> None:
    edited = RUN.replace(*edit)
    assert edited != RUN
    assert goes_on(edited, RUN) is same
    assert goes_on(RUN, edited) is same


def test_a_run_that_begins_anew_may_have_other_settings_but_no_other_stages() -> None:
    anew = RUN.replace("resume: true", "resume: false").replace("learning_rate: 0.1", "learning_rate: 0.2")
    assert goes_on(anew, RUN)
    assert not goes_on(RUN, anew)
    assert not goes_on(anew, dump_recipe(recipe_of("pretrain", Pretrain(data="a"))))


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="choose another output"):
        claim(tmp_path / "file" / "run", "mine")
