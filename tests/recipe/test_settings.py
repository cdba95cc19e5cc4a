"""How values may be written, which defaults follow from others, and what is fixed once made."""

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from luthier.data.formats import FORMATS
from luthier.errors import RecipeError
from luthier.recipe import ADAPTER_SETTINGS, SFT, LoRA, Pretrain, settings_from
from luthier.recipe.preference import DPO, KTO, Reward
from luthier.recipe.problems import nearest
from luthier.recipe.rounds import RLAIF, IterativeDPO


def test_the_language_of_recipes_needs_no_torch() -> None:
    code = "import sys, luthier.recipe; print([name for name in ('torch', 'numpy', 'click') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_data_alone_makes_settings() -> None:
    settings = SFT(data="qa.jsonl")
    assert (settings.model, settings.output, settings.adapter) == ("smollm2-135m", "runs/sft", LoRA())
    assert Pretrain(data="docs").output == "runs/pretrain"


def test_settings_are_fixed_once_made() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SFT(data="a").epochs = 5  # type: ignore[misc]


def test_the_learning_rate_follows_from_what_is_trained() -> None:
    assert [SFT(data="a").learning_rate, SFT(data="a", adapter=None).learning_rate] == [2e-4, 2e-5]
    assert [Pretrain(data="a").learning_rate, Pretrain(data="a", adapter=None).learning_rate] == [1e-4, 1e-5]
    assert SFT(data="a", learning_rate=3e-3).learning_rate == 3e-3


def test_alpha_follows_from_the_rank() -> None:
    assert [LoRA(r=4).alpha, LoRA(r=64).alpha, LoRA(r=64, alpha=8).alpha] == [8, 128, 8]
    assert LoRA(r=64, rs_scaling=True).alpha == 16


def test_evaluation_is_every_epoch_where_there_is_data_for_it() -> None:
    assert SFT(data="a").eval_every is None
    assert SFT(data="a", eval_data="b").eval_every == "epoch"
    assert SFT(data="a", eval_fraction=0.1).eval_every == "epoch"
    assert SFT(data="a", eval_fraction=0.1, eval_every=None).eval_every is None


def test_only_the_wsd_schedule_has_a_decay() -> None:
    assert SFT(data="a", schedule="wsd").decay_ratio == 0.1
    assert SFT(data="a", schedule="linear").decay_ratio is None


@pytest.mark.parametrize(("written", "layers"), [(True, 1), (False, 0), ("on", 1), ("off", 0), ("3", 3), (4, 4)])
def test_gradient_checkpointing_is_a_switch_or_a_number_of_layers(written: object, layers: int) -> None:
    settings = settings_from(SFT, {"data": "a", "gradient_checkpointing": written})
    assert settings.gradient_checkpointing == layers
    assert type(settings.gradient_checkpointing) is int


def test_gradient_checkpointing_can_be_selective() -> None:
    assert (
        settings_from(SFT, {"data": "a", "gradient_checkpointing": "selective"}).gradient_checkpointing == "selective"
    )


@pytest.mark.parametrize("nothing", [None, "none", "no", "off", False])
def test_nothing_can_be_said_in_many_ways(nothing: object) -> None:
    settings = settings_from(SFT, {"data": "a", "adapter": nothing, "max_grad_norm": nothing, "save_every": nothing})
    assert (settings.adapter, settings.max_grad_norm, settings.save_every) == (None, None, None)


def test_only_none_is_nothing_where_text_is_meant() -> None:
    settings = settings_from(SFT, {"data": "none", "eval_data": "no", "chat_template": "none"})
    assert (settings.data, settings.eval_data, settings.chat_template) == ("none", "no", None)


def test_zero_is_not_nothing() -> None:
    with pytest.raises(RecipeError, match=r"^early_stopping: expected at least 1, got 0$"):
        settings_from(SFT, {"data": "a", "early_stopping": 0})


@pytest.mark.parametrize("written", ["lora", {}, {"r": 16}, {"type": "lora"}, LoRA()])
def test_an_adapter_can_be_a_word_or_fields(written: object) -> None:
    assert settings_from(SFT, {"data": "a", "adapter": written}).adapter == LoRA()


def test_one_name_is_a_list_of_one() -> None:
    settings = settings_from(SFT, {"data": "a", "report_to": "tensorboard", "adapter": {"target_modules": "q_proj"}})
    assert settings.report_to == ("tensorboard",)
    assert settings.adapter == LoRA(target_modules=("q_proj",))


def test_numbers_may_come_as_text() -> None:
    assert settings_from(SFT, {"data": "a", "learning_rate": "2e-5", "epochs": "2"}) == SFT(
        data="a", learning_rate=2e-5, epochs=2
    )


def test_wrong_settings_from_python_are_said_in_the_same_words() -> None:
    with pytest.raises(ValidationError, match=r'lr: unknown field; .*; adapter\.rank: unknown field; did you mean "r"'):
        SFT.model_validate({"data": "a", "lr": 1, "adapter": {"rank": 1}})


def test_settings_made_wrong_in_python_are_a_recipe_error() -> None:
    with pytest.raises(RecipeError, match=r'^rank: unknown field; did you mean "r"\?$'):
        LoRA(rank=16)  # type: ignore[call-arg]
    with pytest.raises(
        RecipeError, match=r"^epochs: expected at least 1, got 0\nadapter\.r: expected at least 1, got 0$"
    ):
        SFT(data="a", adapter={"r": 0}, epochs=0)  # type: ignore[arg-type]


def test_settings_survive_json() -> None:
    settings = SFT(data=("a", "b"), adapter=LoRA(r=3), gradient_checkpointing=2)
    assert settings_from(SFT, json.loads(settings.model_dump_json())) == settings


@pytest.mark.parametrize(
    ("word", "meant"),
    [("lr", "learning_rate"), ("Batch-Size", "batch_size"), ("num_epochs", "epochs"), ("zzz", None), ("rank", None)],
)
def test_the_nearest_name_is_found_by_spelling_and_by_what_peers_say(word: str, meant: str | None) -> None:
    assert nearest(word, ["learning_rate", "batch_size", "epochs"]) == meant


def test_the_formats_are_those_that_data_reads() -> None:
    further = {"judge": {"type": "local", "model": "m"}}
    for task, kind in (("imitate", SFT), ("prefer", DPO), ("prefer", Reward), ("judge", KTO), ("ask", IterativeDPO)):
        given = {"data": "a", **(further if kind is IterativeDPO else {})}
        names = [name for name, known in FORMATS.items() if known.task == task]
        for name in names:
            assert settings_from(kind, {**given, "format": name}).format == name
        with pytest.raises(RecipeError) as caught:
            settings_from(kind, {**given, "format": ""})
        assert str(caught.value).count('"') == 2 * len(names) + 2


def test_adapters_are_known_by_their_type() -> None:
    assert all(kind.model_construct().type == name for name, kind in ADAPTER_SETTINGS.items())


def test_a_judge_that_reads_is_asked_of_rlaif() -> None:
    with pytest.raises(RecipeError, match="judge: is required"):
        settings_from(RLAIF, {"data": "a"})
    with pytest.raises(RecipeError, match="iterative_dpo"):
        settings_from(RLAIF, {"data": "a", "judge": {"type": "rule", "function": "judge.py:score"}})
    assert settings_from(RLAIF, {"data": "a", "judge": {"type": "local", "model": "m"}}).judge.type == "local"


def test_what_has_no_effect_on_a_preference_is_refused() -> None:
    for given, message in (
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing: hinge knows none"),
        ({"loss_type": "exo_pair", "label_smoothing": 0}, "label_smoothing: exo_pair needs one"),
        ({"max_kl": 0.1}, "max_kl: is measured at evaluations"),
        ({"max_kl": 0.1, "eval_fraction": 0.1, "adapter": "none"}, "max_kl: is measured by switching the adapter off"),
    ):
        with pytest.raises(RecipeError, match=message):
            settings_from(DPO, {"data": "a", **given})
    assert settings_from(DPO, {"data": "a", "loss_type": "exo_pair"}).label_smoothing == 1e-3
