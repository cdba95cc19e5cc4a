"""Settings of policy stages: each method is its paper's, and what would have no effect or no sense is refused."""

import pytest

from luthier.errors import RecipeError
from luthier.recipe import dump_recipe, parse_recipe
from luthier.recipe.flags import flags_of
from luthier.recipe.policy import OnPolicy
from luthier.recipe.policy_methods import POLICY, Row
from luthier.recipe.settings import settings_from
from luthier.recipe.stages import STAGE_SETTINGS

PAPERS = {
    "ppo": ("value", "whitened", "token", 0.2, 0.2, "tokens", 0.05, "reward", 1, 4, False),
    "grpo": ("group_mean", "group_std", "token", 0.2, 0.2, "sequences", 0.04, "loss", 8, 1, False),
    "dr_grpo": ("group_mean", "none", "token", 0.2, 0.2, "constant", 0.0, "loss", 8, 1, False),
    "dapo": ("group_mean", "group_std", "token", 0.2, 0.28, "tokens", 0.0, "loss", 8, 1, True),
    "gspo": ("group_mean", "group_std", "sequence", 3e-4, 4e-4, "sequences", 0.0, "loss", 8, 1, False),
    "rloo": ("leave_one_out", "none", "none", None, None, "sum", 0.05, "reward", 4, 1, False),
    "reinforce_pp": ("none", "whitened", "token", 0.2, 0.2, "tokens", 0.01, "reward", 1, 1, False),
}

REFUSED = {  # the word, what is set, the field that is named, and the mend
    "clip_without_ratio": ("grpo", {"ratio": "none"}, "ratio", "set clip_low and clip_high to none"),
    "epochs_without_ratio": ("rloo", {"rollout_epochs": 2}, "ratio", "rollout_epochs to 1"),
    "minibatches_without_ratio": ("rloo", {"minibatches": 2}, "ratio", "minibatches"),
    "group_of_one": ("grpo", {"group_size": 1}, "group_size", "give 2 or more"),
    "leave_one_out_of_one": ("rloo", {"group_size": 1}, "group_size", "give 2 or more"),
    "scale_of_others": ("grpo", {"baseline": "batch_mean"}, "scale", "choose whitened"),
    "scale_of_tokens": ("reinforce_pp", {"scale": "group_std"}, "scale", "choose whitened"),
    "value_without_head": ("grpo", {"baseline": "value", "scale": "whitened"}, "baseline", "the stage ppo"),
    "head_without_use": ("ppo", {"baseline": "none"}, "baseline", "the stage reinforce_pp"),
    "gamma_of_groups": ("grpo", {"gamma": 0.9}, "gamma", "set gamma: 1"),
    "dual_clip_inside": ("grpo", {"dual_clip": 1.1}, "dual_clip", "over that"),
    "dual_clip_of_nothing": ("grpo", {"dual_clip": 3.0, "clip_high": None}, "dual_clip", "set clip_high"),
    "no_room": ("grpo", {"max_new_tokens": 64, "max_length": 64}, "max_new_tokens", "raise it"),
    "margin": ("dapo", {"max_new_tokens": 64, "length_margin": 65}, "length_margin", "max_new_tokens or less"),
    "no_reference": ("grpo", {"adapter": None}, "beta", "set beta: 0"),
    "target_in_loss": ("grpo", {"target_kl": 6.0}, "target_kl", "kl_in: reward"),
    "target_without_weight": ("ppo", {"target_kl": 6.0, "beta": 0.0}, "target_kl", "beta over 0"),
    "bound_of_nothing": ("dapo", {"max_kl": 0.1, "eval_fraction": 0.5}, "max_kl", "set beta over 0"),
    "no_way_back": ("grpo", {"max_kl": 0.1}, "max_kl", "give eval_data or eval_fraction"),
    "one_never_differs": ("ppo", {"dynamic_sampling": True}, "dynamic_sampling", "raise group_size"),
    "untaught_tokens": ("grpo", {"adapter": {"new_tokens": ["<a>"]}}, "adapter.new_tokens", "in an sft stage"),
    "critic_of_nothing": ("ppo", {"value_trunk": "own", "adapter": None, "beta": 0}, "value_trunk", "choose shared"),
    "critic_recomputed": ("ppo", {"value_trunk": "own", "gradient_checkpointing": 1}, "value_trunk", "choose shared"),
    "pushed": (
        *("grpo", {"adapter": "ia3", "server": {"url": "http://h/v1", "model": "m", "kind": "vllm"}}),
        *("server.push", "type lora"),
    ),
}


def settings_of(word: str, **more: object) -> OnPolicy:
    settings = settings_from(STAGE_SETTINGS[word], {"data": "prompts.jsonl", "reward": "exact", **more})
    assert isinstance(settings, OnPolicy)
    return settings


@pytest.mark.parametrize("word", PAPERS)
def test_a_method_is_what_its_paper_says(word: str) -> None:
    """ppo: GAE on a value head, ratios within 0.2 (Schulman et al. 2017, eq. 7), 4 epochs a batch, advantages whitened
    and KL 0.05 in the reward (Ouyang et al. 2022 take 0.02; TRL's PPOConfig 0.05). grpo: eq. 3 of Shao et al. 2024 has
    1/G sum 1/|o| sum, z-scores in the group and beta 0.04 in the loss. dr_grpo: neither of the two divisions (Liu et
    al. 2025, section 3.1), no KL. dapo: eq. 8 of Yu et al. 2025, mean over tokens, 0.2 and 0.28, dynamic sampling and
    overlong filtering, no KL. gspo: section 5.1 of Zheng et al. 2025, 3e-4 and 4e-4. rloo: leave one out, the
    sequence's log-probability, KL in the reward (Ahmadian et al. 2024). reinforce_pp: one answer, KL in each token's
    reward, whitened over the batch, PPO's clip (Hu et al. 2025).
    """
    assert POLICY[word] == Row(*PAPERS[word])
    settings, row = settings_of(word), POLICY[word]
    names = [name for name in Row.__dataclass_fields__ if name != "filtered"]
    assert {name: getattr(settings, name) for name in names} == {name: getattr(row, name) for name in names}
    assert settings.mask_truncated == settings.dynamic_sampling == row.filtered


def test_every_method_has_a_row_and_a_stage() -> None:
    stages = {word for word, kind in STAGE_SETTINGS.items() if issubclass(kind, OnPolicy)}
    assert stages == POLICY.keys() == PAPERS.keys()
    assert {word: settings_of(word).method for word in stages} == {word: word for word in stages}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_names_the_field_and_the_mend(case: str) -> None:
    word, given, field, mend = REFUSED[case]
    with pytest.raises(RecipeError) as caught:
        settings_of(word, **given)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{field}: ")
    assert mend in line


@pytest.mark.parametrize("word", PAPERS)
def test_help_shows_the_defaults_that_settings_have(word: str) -> None:
    """So a user reads from `luthier ppo --help` what makes the method."""
    settings = settings_of(word)
    shown = {flag.path[0]: flag.default for flag in flags_of(type(settings)) if len(flag.path) == 1}
    assert {name: shown[name] for name in ("group_size", "beta", "clip_low", "clip_high", "baseline", "scale")} == {
        name: getattr(settings, name) for name in ("group_size", "beta", "clip_low", "clip_high", "baseline", "scale")
    }
    assert shown["rollout_epochs"] == settings.rollout_epochs
    assert shown["dynamic_sampling"] is settings.dynamic_sampling


@pytest.mark.parametrize("word", PAPERS)
def test_a_recipe_of_a_policy_written_back_is_the_recipe(word: str) -> None:
    """Of every way to give a reward, and with a server."""
    reward = "[{type: length, aim: 9, name: short}, {function: 'r.py:f', weight: 2.0}, math]"
    server = "{url: http://h/v1, model: m, kind: sglang, push: weights}"
    stage = f"{word}: {{data: p.jsonl, reward: {reward}, server: {server}, stop: ['</a>', 'x y'], top_k: 5}}"
    recipe = parse_recipe(f"stages: [{{{stage}}}]")
    assert parse_recipe(dump_recipe(recipe)) == recipe
    assert recipe.stages[0].settings.reward[1].weight == 2.0  # type: ignore[attr-defined]


def test_what_a_row_says_may_be_set_otherwise() -> None:
    settings = settings_of("grpo", clip_high=0.28, aggregate="tokens", beta=0, group_size=4, dynamic_sampling=True)
    assert (settings.clip_low, settings.clip_high, settings.aggregate) == (0.2, 0.28, "tokens")
    assert (settings.beta, settings.group_size, settings.mask_truncated) == (0.0, 4, False)


def test_a_rate_for_an_adapter_is_twenty_times_that_for_the_whole_model() -> None:
    assert settings_of("grpo").learning_rate == 2e-5
    assert settings_of("grpo", adapter=None, beta=0).learning_rate == 1e-6
