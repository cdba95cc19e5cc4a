"""Which servers a recipe may let sample, and what they can be sent."""

from typing import Any

import pytest

from luthier.errors import RecipeError
from luthier.recipe.rollout_servers import PUSHABLE, RolloutServer, ServerKind
from luthier.recipe.settings import branches, settings_from
from luthier.rollout.server_kinds import SERVERS

HERE = {"url": "http://localhost:8000/v1", "model": "m"}


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ({"kind": "llama_cpp"}, "^push: llama_cpp takes nothing while it runs; set push: none$"),
        ({"kind": "openai", "push": "weights"}, "^push: openai takes nothing while it runs; set push: none$"),
        ({"kind": "vllm", "push": "weights"}, "^push: vllm takes adapter while it runs; set push: adapter$"),
        (
            {"kind": "vllm", "server_folder": "/x"},
            "^server_folder: is another name of shared_folder; add shared_folder$",
        ),
        ({"kind": "vllm", "adapter_name": "../x"}, "^adapter_name: expected letters, digits"),
        ({"kind": "ollama"}, "^kind: "),
        ({}, "^kind: is required"),
    ],
)
def test_a_server_that_makes_no_sense_is_said_at_its_field(written: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        settings_from(RolloutServer, HERE | written)


@pytest.mark.parametrize(
    "written",
    [{"kind": "vllm"}, {"kind": "sglang", "push": "weights"}, {"kind": "llama_cpp", "push": "none"}],
)
def test_settings_survive_their_own_dump(written: dict[str, Any]) -> None:
    settings = settings_from(RolloutServer, HERE | written)
    assert settings_from(RolloutServer, settings.model_dump()) == settings


def test_every_kind_of_server_is_spoken_to_and_known_to_take_something_or_nothing() -> None:
    assert set(SERVERS) == set(PUSHABLE) == set(branches(ServerKind)[0].__args__)
