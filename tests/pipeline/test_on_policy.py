"""Policy stages as whole runs: every method learns, what fails costs no more than itself, and guards hold."""

import inspect
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from trl.trainer import grpo_trainer

import luthier as lt
from luthier.adapters.inject import adapted_layers
from luthier.cli.plan import command
from luthier.errors import DataError, RecipeError, TrainingError
from luthier.models.adapted import load_adapted
from luthier.models.load import load
from luthier.models.weights import weights_hash
from luthier.pipeline.on_policy import Warner
from luthier.pipeline.run import run_recipe
from luthier.pipeline.verify_loss import verify_loss
from luthier.pipeline.verify_resume import verify_resume
from luthier.recipe.document import Recipe
from luthier.recipe.policy import GRPO
from luthier.recipe.policy_methods import POLICY
from luthier.training.callbacks import read_metrics

REWARDS = """
import time

def length(prompt, answer, row):
    return min(len(answer), 6)

def moody(prompt, answer, row):
    if row["number"] == 1:
        raise ValueError("no idea")
    if row["number"] == 2:
        return float("nan")
    while row["number"] == 3:
        time.sleep(9)
    return len(answer)

def broken(prompt, answer, row):
    raise KeyError("answer")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with prompts and rewards."""
    rows = [{"prompt": f"What is {i}?", "number": i} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_of(word: str, base: Path, **more: Any) -> Recipe:
    stage = {
        **{"data": "prompts.jsonl", "reward": {"type": "length", "aim": 6}, "max_new_tokens": 8, "batch_size": 2},
        **{"adapter": {"type": "lora", "r": 4}, "learning_rate": 1e-2, "epochs": 99, "max_steps": 3},
        **{"group_size": min(4, POLICY[word].group_size), **more},
    }
    return Recipe.model_validate({"model": str(base), "output": "run", "dtype": "fp32", "stages": [{word: stage}]})


def told(word: str = "grpo") -> list[dict[str, Any]]:
    return read_metrics(Path("run") / f"00-{word}" / "metrics.jsonl")


def answers_of(word: str = "grpo", number: int = 0, folder: str = "run") -> list[dict[str, Any]]:
    path = Path(folder) / f"00-{word}" / "rollouts" / f"{number:06d}" / "answers.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("word", POLICY)
@pytest.mark.usefixtures("place")
def test_a_method_raises_its_reward_and_leaves_an_adapter_and_a_model(word: str, speaker: Path) -> None:
    """To say "ababab" where "ab", "abab" and "ababab" were taught: from a mean of 2/3, by 0.15 at least."""
    epochs, batch_size = POLICY[word].rollout_epochs, 3 if POLICY[word].group_size > 1 else 8
    steps = 8 * epochs // (2 if word == "ppo" else 1)
    (summary,) = run_recipe(recipe_of(word, speaker, max_steps=steps, batch_size=batch_size))
    rewards = [line["reward"] for line in told(word)]
    assert summary.steps == len(rewards) == steps
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.15
    tuned = load_adapted(str(speaker), Path("run") / f"00-{word}" / "adapter").network
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert not torch.equal(tuned(ids).logits, load(str(speaker)).network(ids).logits)
    names = load_file(f"run/00-{word}/adapter/adapter_model.safetensors").keys()
    assert all("lora_" in name for name in names), "no critic and no value head"
    assert Path("run/model/config.json").exists()


@pytest.mark.parametrize("trunk", ["own", "shared"])
@pytest.mark.usefixtures("place")
def test_policy_reference_critic_and_reward_model_are_one_set_of_weights(trunk: str, speaker: Path) -> None:
    """A reward model's adapter beside the policy's gives what the same reward model by itself gives, in every step."""
    pairs = [{"prompt": f"What is {i}?", "chosen": "ababab", "rejected": "ab"} for i in range(8)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    trained = {"data": "pairs.jsonl", "batch_size": 4, "max_steps": 4, "adapter": {"type": "lora", "r": 2}}
    stages = [{"reward": {**trained, "learning_rate": 1e-2}}]
    run_recipe(Recipe.model_validate({"model": str(speaker), "output": "rm", "dtype": "fp32", "stages": stages}))
    adapter = {"type": "model", "adapter": "rm/00-reward/adapter"}
    found = []
    for part in (adapter, {**adapter, "model": str(speaker)}):
        run_recipe(recipe_of("ppo", speaker, reward=part, value_trunk=trunk, batch_size=4, max_steps=8))
        names = load_file("run/00-ppo/adapter/adapter_model.safetensors").keys()
        assert [name for name in names if "lora_" not in name] == []
        found.append([line["reward"] for line in told("ppo")])
        shutil.rmtree("run")
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert len(set(found[0])) > 1


@pytest.mark.usefixtures("place")
def test_a_function_of_the_calling_program_is_a_reward_and_edited_it_is_another_run(speaker: Path) -> None:
    def longer(prompt: list[dict[str, Any]], answer: str, row: dict[str, Any]) -> float:
        return float(len(answer) + row["number"] - row["number"])

    def shorter(prompt: list[dict[str, Any]], answer: str, row: dict[str, Any]) -> float:
        return -float(len(answer))

    given: dict[str, Any] = {"data": "prompts.jsonl", "max_new_tokens": 8, "group_size": 4, "batch_size": 2}
    given |= {"max_steps": 2, "adapter": {"type": "lora", "r": 4}}
    first = lt.grpo(lt.load(str(speaker)), reward=[longer, {"type": "length", "aim": 6}], **given)
    rows = answers_of(folder="runs/grpo")
    assert all(row["parts"]["longer"] == len(row["answer"]) for row in rows)
    again = lt.grpo(lt.load(str(speaker)), reward=[longer, {"type": "length", "aim": 6}], **given)
    assert replace(again, seconds=first.seconds) == first
    assert lt.grpo(lt.load(str(speaker)), reward=shorter, **given).folder == "runs/grpo-2/00-grpo"
    with pytest.raises(RecipeError, match="longer is a function of the program that began this run"):
        run_recipe(lt.load_recipe("runs/grpo/recipe.yaml"))


@pytest.mark.usefixtures("place")
def test_metrics_bear_the_names_that_trl_gives_them(speaker: Path) -> None:
    run_recipe(recipe_of("grpo", speaker, max_steps=1, eval_fraction=0.25))
    first, line, _ = told()
    source = inspect.getsource(grpo_trainer)
    theirs = {
        *("reward", "reward_std", "frac_reward_zero_std", "entropy", "kl", "rewards/length/mean", "rewards/length/std"),
        *("completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio"),
        *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
        *("sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean"),
    }
    assert theirs <= line.keys()
    assert [name for name in theirs if f'"{name}"' not in source and not name.startswith("rewards/")] == []
    assert {f"eval_{name}" for name in theirs if name.startswith("reward")} <= first.keys()
    assert first["eval_loss"] == -first["eval_reward"]


@pytest.mark.usefixtures("place")
def test_a_reward_that_raises_loops_or_gives_nan_costs_its_answers_alone(
    speaker: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reward = {"function": "rewards.py:moody", "timeout_seconds": 0.2}
    (summary,) = run_recipe(recipe_of("grpo", speaker, reward=reward, batch_size=8, group_size=2, max_steps=1))
    assert summary.steps == 1
    rows = answers_of()
    failed = {row["prompt"]: row["parts"]["function"] for row in rows if row["reward"] is None}
    assert failed.keys() == {"What is 1?", "What is 2?", "What is 3?"}
    assert failed["What is 1?"].startswith("raised ValueError")
    assert failed["What is 2?"].startswith("returned nan")
    assert failed["What is 3?"].startswith("timed out")
    assert [line["rewards/failed"] for line in told()] == [6 / 16]
    assert "6 of 16 answers have no reward" in caplog.text


@pytest.mark.usefixtures("place")
def test_a_reward_that_fails_for_all_stops_the_run(speaker: Path) -> None:
    with pytest.raises(TrainingError, match=r"no answer could be scored \(function: raised KeyError 8\)"):
        run_recipe(recipe_of("grpo", speaker, reward="rewards.py:broken"))
    assert not Path("run/model").exists()
    with pytest.raises(RecipeError, match="defines no function"):
        run_recipe(recipe_of("grpo", speaker, reward="rewards.py:missing"))


def test_a_prompt_that_leaves_no_room_is_dropped_and_counted_or_refused(place: Path, speaker: Path) -> None:
    """29 tokens fit with 8 more into 37; the long one does not."""
    rows = [*(place / "prompts.jsonl").read_text().splitlines(), json.dumps({"prompt": "What is it? " * 3})]
    (place / "prompts.jsonl").write_text("\n".join(rows))
    (summary,) = run_recipe(recipe_of("grpo", speaker, max_length=37, max_steps=1))
    assert summary.counts["dropped_long"] == 1
    assert summary.counts["sequences"] == 8
    with pytest.raises(DataError, match=r"prompts.jsonl:9: a prompt of \d+ tokens leaves no room .* as 1 prompts do"):
        run_recipe(recipe_of("grpo", speaker, max_length=37, on_long="error", max_steps=1, seed=2, resume=False))
    with pytest.raises(DataError, match="no prompt of 9 rows is left to learn on; raise max_length"):
        run_recipe(recipe_of("grpo", speaker, max_length=36, resume=False))


@pytest.mark.usefixtures("place")
def test_held_out_prompts_are_never_trained_on_and_the_best_reward_is_kept(speaker: Path) -> None:
    (summary,) = run_recipe(recipe_of("grpo", speaker, eval_fraction=0.25, eval_every=1, max_steps=6))
    evaluations = {line["step"]: line["eval_reward"] for line in told() if "eval_reward" in line}
    asked = {row["prompt"] for number in range(6) for row in answers_of(number=number)}
    assert summary.counts["held_out"] == 2
    assert len(asked) == 6
    best = max(evaluations, key=lambda step: (evaluations[step], -step))
    assert evaluations[best] > evaluations[0]
    assert Path("run/00-grpo/checkpoints/best").readlink().name == f"step-{best:08d}"
    assert summary.best_eval_loss == -evaluations[best]


def test_prompts_to_evaluate_on_are_taken_out_of_those_to_learn_on(place: Path, speaker: Path) -> None:
    (place / "held_out.jsonl").write_text(json.dumps({"prompt": "What is 0?", "number": 0}))
    (summary,) = run_recipe(recipe_of("grpo", speaker, eval_data="held_out.jsonl", max_steps=2, eval_every=1))
    assert summary.counts["sequences"] == 7
    assert "What is 0?" not in {row["prompt"] for number in range(2) for row in answers_of(number=number)}


@pytest.mark.usefixtures("place")
def test_a_policy_that_goes_too_far_ends_and_goes_back_to_its_best(
    speaker: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"max_kl": 0.1, "eval_fraction": 0.25, "eval_every": 2, "max_steps": 30}
    (summary,) = run_recipe(recipe_of("grpo", speaker, **given))
    lines = [line for line in told() if "kl" in line]
    assert [line["kl"] > 0.1 for line in lines] == [False] * (summary.steps - 1) + [True]
    assert summary.steps < 30
    assert "over max_kl 0.1; the training ends" in caplog.text
    assert "going back to the best checkpoint" in caplog.text
    best = load_file("run/00-grpo/checkpoints/best/state.safetensors")
    saved = load_file("run/00-grpo/adapter/adapter_model.safetensors")
    kept = {tuple(t.flatten().tolist()) for name, t in best.items() if name.startswith("parameter/")}
    assert {tuple(tensor.flatten().tolist()) for tensor in saved.values()} == kept


def test_what_goes_wrong_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """Rewards that go with the length only after three rollouts of two steps in a row."""
    warner = Warner(GRPO(data="a", reward="exact", rollout_epochs=2))
    said = []
    for step, correlation in enumerate([0.9, 0.9, -0.9, -0.9, 0.1, 0.1] + [0.9] * 8, start=1):
        warner.on_metrics(
            {"step": step, "entropy": 0.01 if step > 3 else 1.0, "rewards/length_correlation": correlation}
        )
        said.append(len(caplog.records))
    assert said == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2]
    assert "step 4: the policy's entropy is 0.010" in caplog.records[0].message
    assert "step 12: rewards go with the answers' length (correlation 0.90)" in caplog.records[1].message


class FakeServer:
    """Says letters drawn by the request's seed, as vLLM or SGLang, and takes adapters or models. Dead, it drops all."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.dies_at, self.num_asked = answer, 10**9, 0
        self.loaded: list[tuple[str, bytes]] = []
        self.models: list[tuple[str, list[str]]] = []

    def play(self, request: dict[str, Any]) -> Any:
        if "lora_path" in request:
            self.loaded.append(
                (request["lora_name"], Path(request["lora_path"], "adapter_model.safetensors").read_bytes())
            )
        if "model_path" in request:
            folder = Path(request["model_path"])
            self.models.append((weights_hash(folder), sorted(load_file(folder / "model.safetensors"))))
        if "sampling_params" in request:
            return self.answer([json.dumps([self.generated(one) for one in request["sampling_params"]]).encode()])
        if "prompt" not in request:
            return self.answer([b'{"success": true}'])
        self.num_asked += 1
        if self.num_asked > self.dies_at:
            return self.answer([], dropped=True)
        choices = [self.choice(request["seed"] + number, number) for number in range(request["n"])]
        return self.answer([json.dumps({"object": "text_completion", "choices": choices}).encode()])

    def generated(self, asked: dict[str, Any]) -> dict[str, Any]:
        said = self.choice(asked["sampling_seed"], 0)
        ids = said["token_ids"]
        meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": [[-2.0, i, None] for i in ids]}
        return {"text": said["text"], "output_ids": ids, "meta_info": {**meta, "completion_tokens": len(ids)}}

    def choice(self, seed: int, number: int) -> dict[str, Any]:
        letters = random.Random(seed).randint(1, 6)
        ids = [64] * letters + [257]
        logprobs = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": [-2.0] * len(ids)}
        said = {"index": number, "text": "a" * letters, "finish_reason": "stop"}
        return {**said, "token_ids": ids, "logprobs": {**logprobs, "text_offset": [], "top_logprobs": []}}


def served(url: str, **more: Any) -> dict[str, Any]:
    return {"url": url, "model": "base", "kind": "vllm", "retries": 0, "parallel": 1, "timeout_seconds": 9, **more}


def test_a_server_that_dies_in_the_middle_leaves_a_run_that_goes_on(
    place: Path, speaker: Path, serve: Callable[..., Any], answer: Any
) -> None:
    """It dies within the third rollout of two prompts: one prompt fails alone. In the fourth, nothing is answered."""
    fake = FakeServer(answer)
    server = serve(fake.play)
    recipe = recipe_of("grpo", speaker, server=served(server.url), max_steps=5, save_every=1)
    fake.dies_at = 5
    with pytest.raises(TrainingError, match="no prompt was answered"):
        run_recipe(recipe)
    assert [line["rollout/failed"] for line in told()] == [0, 0, 0.5]
    assert Path("run/00-grpo/checkpoints/last").readlink().name == "step-00000003"
    fake.dies_at = 10**9
    (summary,) = run_recipe(recipe)
    assert summary.steps == 5
    assert [line["rollout/failed"] for line in told()] == [0, 0, 0.5, 0, 0]


def test_a_server_is_sent_each_policy_before_it_is_asked(
    place: Path, speaker: Path, serve: Callable[..., Any], answer: Any
) -> None:
    fake = FakeServer(answer)
    run_recipe(recipe_of("grpo", speaker, server=served(serve(fake.play).url)))
    names, files = zip(*fake.loaded, strict=True)
    assert names == ("luthier-1", "luthier-2", "luthier-3")
    assert len(set(files)) == 3
    assert [path.name for path in Path("run/00-grpo/pushed").iterdir()] == ["version-3"]


@pytest.mark.parametrize(("word", "given"), [("grpo", {}), ("ppo", {"adapter": None, "beta": 0.0})])
def test_a_server_that_reads_whole_models_is_sent_the_policy_merged(
    word: str, given: dict[str, Any], place: Path, speaker: Path, serve: Callable[..., Any], answer: Any
) -> None:
    """First what the stage starts from; without its value head."""
    fake = FakeServer(answer)
    server = served(serve(fake.play).url, kind="sglang", push="weights")
    run_recipe(recipe_of(word, speaker, server=server, rollout_epochs=1, **given))
    hashes, names = zip(*fake.models, strict=True)
    assert len(set(hashes)) == 3
    assert hashes[0] == weights_hash(speaker)
    assert names == (sorted(load_file(speaker / "model.safetensors")),) * 3


@pytest.mark.usefixtures("place")
def test_a_server_that_is_never_sent_the_policy_is_refused(speaker: Path) -> None:
    with pytest.raises(RecipeError, match="allow_stale"):
        run_recipe(recipe_of("grpo", speaker, server=served("http://127.0.0.1:9/v1", push=None)))


def test_a_plan_counts_all_answers_of_the_longest_prompts(place: Path, speaker: Path) -> None:
    """A prompt of 29 tokens and 8 answers of 64 are 541 tokens; of more than fits, as much as fits. Sampling stores a
    byte for each of 2 (32 (32 + 16 + 16 + 32) + 3 * 32 * 64) + 258 * 32 weights; its keys take less than a step does.
    """
    arguments = ["grpo", "--model", str(speaker), "--data", "prompts.jsonl", "--reward", "length", "--reward.aim", "9"]
    arguments += ["--max-new-tokens", "64", "--batch-size", "2", "--rollout-weights", "int8", "--json"]
    for tokens, largest in (("2000", 2 * 541), ("300", 300)):
        run = CliRunner().invoke(command("plan"), [*arguments, "--micro-batch-tokens", tokens], catch_exceptions=False)
        printed = json.loads(run.output)
        assert printed["largest_tokens"] == largest
        assert printed["parts"]["rollout"] == 26_688
        assert printed["fits"]


@pytest.mark.usefixtures("place")
def test_from_python_a_stage_leaves_the_model_ready_and_a_failure_leaves_it_as_it_was(speaker: Path) -> None:
    given = {"data": "prompts.jsonl", "max_new_tokens": 8, "batch_size": 4, "max_steps": 2, "value_trunk": "own"}
    model = lt.load(str(speaker))
    before = set(model.network.state_dict())
    with pytest.raises(TrainingError):
        lt.ppo(model, reward="rewards.py:broken", output="failed", **given)
    assert set(model.network.state_dict()) == before
    lt.ppo(model, reward="rewards.py:length", output="run", **given)
    assert {name for layer in adapted_layers(model.network).values() for name in layer.adapters} == {"default"}
    assert not any("value_head" in name for name in model.network.state_dict())
    lt.save(model, "saved")
    assert not model.network.training


@pytest.mark.parametrize("word", ["grpo", "ppo"])
@pytest.mark.usefixtures("place")
def test_promises_are_shown_on_a_recipe_of_a_policy(word: str, speaker: Path) -> None:
    recipe = recipe_of(word, speaker, batch_size=2)
    proof = verify_loss(recipe, num_sequences=4)
    assert proof.largest_difference < 1e-9
    assert verify_resume(recipe).resumed_after == 2
