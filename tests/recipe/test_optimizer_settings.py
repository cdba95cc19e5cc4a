"""An optimizer's settings are worked out with it, and refused without it."""

import pytest
from pydantic import ValidationError

from luthier.recipe.training import SFT


def test_embeddings_keep_wide_moments_by_default_where_others_do_not() -> None:
    found = {name: SFT(data="rows.jsonl", optimizer=name).stable_embedding for name in ("adamw", "adam8bit")}
    assert found == {"adamw": None, "adam8bit": True}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stable_embedding": False}, "adamw keeps all in four bytes"),
        ({"optimizer": "adam8bit", "stable_embedding": None}, "adam8bit needs yes or no"),
        ({"layer_decay": 0.0}, "more than 0"),
        ({"layer_decay": 1.5}, "layer_decay: expected"),
    ],
)
def test_what_would_have_no_effect_or_no_sense_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SFT.model_validate({"data": "rows.jsonl"} | given)
