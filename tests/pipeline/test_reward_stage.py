"""The reward stage: it learns, and leaves a model that Luthier and transformers read alike."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import luthier as lt
from luthier.errors import ModelError
from luthier.pipeline.run import run_recipe
from luthier.recipe.document import Recipe
from luthier.training.callbacks import Callback, read_metrics

CHATS = [
    [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": answer}]
    for i in range(3)
    for answer in ("It is a number.", "Who knows??")
]


def recipe_of(base: Path, folder: Path, **more: object) -> Recipe:
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"{i} is a number.", "rejected": "Who knows " + "?" * (i % 5 + 1)}
        for i in range(24)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {"data": str(folder / "pairs.jsonl"), "batch_size": 4, "epochs": 6, "eval_fraction": 0.25, **more}
    return Recipe.model_validate(
        {"model": str(base), "output": str(folder / "run"), "dtype": "fp32", "stages": [{"reward": stage}]}
    )


@pytest.mark.parametrize("adapter", [{"type": "lora", "r": 4}, None], ids=["lora", "full"])
def test_a_reward_model_tells_held_out_pairs_apart_and_loads_in_transformers(
    chat_model: Path, tmp_path: Path, adapter: object
) -> None:
    run_recipe(recipe_of(chat_model, tmp_path, adapter=adapter, learning_rate=5e-3))
    lines = read_metrics(tmp_path / "run" / "00-reward" / "metrics.jsonl")
    first, *_, last = [line for line in lines if "eval_loss" in line]
    assert last["eval_rewards/accuracies"] == 1
    assert last["eval_loss"] < first["eval_loss"]
    ours = lt.rewards(lt.load_reward(str(tmp_path / "run" / "model")), CHATS)
    assert all(better > worse for better, worse in zip(ours[::2], ours[1::2], strict=True))
    folder = tmp_path / "run" / "model"
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.apply_chat_template(CHATS, padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        expected = theirs(**batch).logits[:, 0]
    torch.testing.assert_close(torch.tensor(ours), expected, rtol=0, atol=1e-5)


def test_a_bfloat16_reward_model_is_trained_whole_and_trained_on(chat_model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(chat_model, tmp_path, adapter=None, max_steps=2)
    twice = Recipe.model_validate(
        {
            "model": str(chat_model),
            "output": str(tmp_path / "twice"),
            "dtype": "bf16",
            "stages": [
                {stage.word: stage.settings.model_dump(exclude={"model", "output", "dtype"})}
                for stage in recipe.stages * 2
            ],
        }
    )
    run_recipe(twice)
    first, second = (lt.load_reward(str(tmp_path / "twice" / name)) for name in ("00-reward/model", "model"))
    assert first.source.weights_hash != second.source.weights_hash
    assert lt.rewards(second, CHATS) != lt.rewards(first, CHATS)


def test_a_process_reward_model_tells_right_steps_from_wrong_ones(chat_model: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Add {i}.", "completions": ["It is right.", "No way?", "It is so."], "labels": [True, False, True]}
        for i in range(16)
    ]
    data = tmp_path / "steps.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = lt.load(str(chat_model))
    given = {"adapter": lt.LoRA(r=4), "learning_rate": 5e-3, "epochs": 8, "batch_size": 4, "eval_fraction": 0.25}
    lt.process_reward(model, data=data, output=tmp_path / "run", **given)  # type: ignore[attr-defined]
    *_, last = [
        line for line in read_metrics(tmp_path / "run" / "00-process_reward" / "metrics.jsonl") if "eval_loss" in line
    ]
    assert last["eval_rewards/accuracies"] == 1
    lt.save(model, tmp_path / "saved")
    judge = lt.load_reward(str(tmp_path / "saved"))
    asked = [{"role": "user", "content": "Add 99."}]
    right, wrong, so = lt.step_rewards(judge, asked, ["It is right.", "No way?", "It is so."])
    assert right > 0 > wrong
    assert so > 0
    assert lt.step_rewards(judge, asked, ["It is right."]) == pytest.approx([right], abs=1e-5), (
        "later steps change nothing"
    )


def test_a_later_stage_does_not_take_a_reward_model_for_a_language_model(chat_model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(chat_model, tmp_path, max_steps=1)
    run_recipe(recipe)
    with pytest.raises(ModelError, match="load_reward"):
        lt.load(str(tmp_path / "run" / "model"))


def test_from_python_the_network_gets_a_head_and_is_saved_with_it(chat_model: Path, tmp_path: Path) -> None:
    settings = recipe_of(chat_model, tmp_path, max_steps=2).stages[0].settings
    model = lt.load(str(chat_model))
    lt.reward(model, data=settings.data, adapter=lt.LoRA(r=4), max_steps=2, output=str(tmp_path / "py"))  # type: ignore[attr-defined]
    live = lt.rewards(model, CHATS)
    lt.save(model, tmp_path / "saved")
    kept = lt.rewards(lt.load_reward(str(tmp_path / "saved")), CHATS)
    torch.testing.assert_close(torch.tensor(live), torch.tensor(kept), rtol=0, atol=1e-5)


def test_a_reward_stage_that_fails_leaves_the_language_model(
    chat_model: Path, tmp_path: Path, stop_at: Callable[[int], Callback]
) -> None:
    settings = recipe_of(chat_model, tmp_path, max_steps=2).stages[0].settings
    model = lt.load(str(chat_model))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        before = model.network(ids).logits
    with pytest.raises(KeyboardInterrupt):
        lt.reward(model, data=settings.data, callbacks=[stop_at(1)], output=str(tmp_path / "py"))  # type: ignore[attr-defined]
    with torch.no_grad():
        assert torch.equal(model.network(ids).logits, before)
