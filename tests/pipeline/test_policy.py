"""What a policy stage computes: one step's gradient, what is known before it, and what each model of it may change."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.adapters.inject import adapter_parameters
from luthier.adapters.switch import activate, adapters_off
from luthier.data.batches import TokenBatch, collate
from luthier.data.sequences import TokenGroup, sequences_of
from luthier.models.load import Model, load
from luthier.models.score import evaluating, hidden_states, score
from luthier.models.values import values_at
from luthier.objectives.advantages import group_advantages
from luthier.pipeline.known import known_of
from luthier.pipeline.policy import CRITIC, Scored, advantages, critic_on, guard_of, surrogate_of
from luthier.pipeline.prepare import prepare_data, prepare_network
from luthier.pipeline.rollouts import RolloutPlan
from luthier.pipeline.train import make_run
from luthier.recipe.policy import OnPolicy
from luthier.recipe.policy_methods import POLICY
from luthier.recipe.settings import settings_from
from luthier.recipe.stages import STAGE_SETTINGS
from luthier.training.loop import step_gradients, train_step
from luthier.training.run import Run

WIDE = 10**6  # tokens, in which a step is not cut


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {i}?"}) + "\n" for i in range(6)))
    return path


def settings_of(word: str, base: Path | str, data: Path, **more: object) -> Any:
    usual = {"model": str(base), "data": str(data), "reward": {"type": "length", "aim": 6}, "dtype": "fp32", "seed": 1}
    small = {"max_new_tokens": 8, "batch_size": 3, "epochs": 9, "adapter": {"r": 4}, "learning_rate": 1e-2}
    return settings_from(STAGE_SETTINGS[word], {**usual, **small, **more})


def begun(settings: OnPolicy, folder: Path, *, micro_batch_tokens: int = WIDE) -> tuple[Run, Model]:
    """A run whose policy is no longer its reference."""
    model = load(settings.model)
    prepared = prepare_data(settings, model, folder)
    adapters = prepare_network(settings, model)
    generator = torch.Generator().manual_seed(7)
    for parameter in adapter_parameters(model.network).values():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    run = make_run(
        *(settings.method, settings, model, prepared, folder),
        adapters=adapters,
        micro_batch_tokens=micro_batch_tokens,
    )
    return run, model


def plan_of(run: Run) -> RolloutPlan:
    assert isinstance(run.plan, RolloutPlan)
    return run.plan


def gradients(run: Run, micro_batches: Sequence[TokenBatch]) -> dict[str, Tensor]:
    network = run.state.network
    step_gradients(network, micro_batches, run.objective)
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return found


def answers_in(run: Run, step: int) -> list[TokenGroup]:
    return [item for item in run.plan.step(step) if isinstance(item, TokenGroup)]


def column(groups: Sequence[TokenGroup], name: str) -> Tensor:
    return torch.cat([torch.from_numpy(one.columns[name]) for one in sequences_of(groups)])


@pytest.mark.parametrize("word", POLICY)
def test_a_steps_gradient_does_not_depend_on_how_it_is_cut(
    word: str, speaker: Path, data: Path, tmp_path: Path
) -> None:
    """In float64, so that only 1e-9 is left to the order of summation; the smallest bound splits groups in pieces."""
    more = {"value_trunk": "own"} if word == "ppo" else {}
    run, model = begun(settings_of(word, speaker, data, entropy_weight=0.01, **more), tmp_path)
    plan_of(run).step(0)
    model.network.double()
    wanted = gradients(run, run.cut(0))
    assert len(run.cut(0)) == 1
    assert any(gradient.any() for gradient in wanted.values())
    for tokens in (40, 80):
        run.state.progress.micro_batch_tokens = tokens
        assert len(run.cut(0)) > (3 if tokens == 40 and POLICY[word].group_size > 1 else 1)
        found = gradients(run, run.cut(0))
        assert found.keys() == wanted.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-9, msg=name)


def test_on_policy_the_ratio_is_one_and_the_gradient_is_that_of_the_advantages(
    speaker: Path, data: Path, tmp_path: Path
) -> None:
    """The gradient of min(r A, clip(r) A) at r = 1 is A times that of log p (Schulman et al. 2017, section 3)."""
    run, model = begun(settings_of("dr_grpo", speaker, data, importance_cap=None), tmp_path)
    groups = answers_in(run, 0)
    batch = collate(groups)
    assert "old" not in batch.columns
    loss = run.objective(model.network, batch)
    assert [loss.kept[f"clip_ratio/{side}_mean"][0].item() for side in ("low", "high", "region")] == [0, 0, 0]
    wanted = -(score(model.network, batch).logprobs * batch.columns["advantages"]).sum() / 8 / batch.count("sequences")
    wanted.backward()
    plain = {name: p.grad.clone() for name, p in model.network.named_parameters() if p.grad is not None}
    model.network.zero_grad(set_to_none=True)
    for name, gradient in gradients(run, [batch]).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("word", ["grpo", "dr_grpo", "rloo"])
def test_advantages_of_answers_are_those_of_the_rewards_that_people_read(
    word: str, speaker: Path, data: Path, tmp_path: Path
) -> None:
    """Of answers.jsonl, which has the groups in their order."""
    run, _ = begun(settings_of(word, speaker, data, beta=0), tmp_path)
    groups = sorted(answers_in(run, 0), key=lambda group: group.sequences[0].token_ids.tobytes())
    rows = [json.loads(line) for line in (tmp_path / "rollouts/000000/answers.jsonl").read_text().splitlines()]
    size, row = len(groups[0].sequences), POLICY[word]
    rewards = torch.tensor([line["reward"] for line in rows])
    assert row.baseline in ("group_mean", "leave_one_out")
    assert row.scale in ("group_std", "none")
    wanted = group_advantages(*(rewards, torch.arange(len(rows)) // size), baseline=row.baseline, scale=row.scale)
    found = torch.tensor([one.columns["advantages"][0] for group in groups for one in group.sequences])
    assert found.sort().values.tolist() == pytest.approx(wanted.sort().values.tolist(), abs=1e-6)
    assert all((one.columns["advantages"] == one.columns["advantages"][0]).all() for one in sequences_of(groups))


def test_what_is_known_of_a_rollout_is_of_its_own_policy_in_all_its_steps(
    speaker: Path, data: Path, tmp_path: Path
) -> None:
    """Two minibatches and two epochs: every answer is learned from once an epoch, while the policy moves."""
    run, model = begun(settings_of("grpo", speaker, data, minibatches=2, rollout_epochs=2), tmp_path)
    run.plan.step(0)
    start = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    seen: list[list[TokenGroup]] = []
    for step in range(4):
        seen.append(answers_in(run, step))
        train_step(run)
    moved = max(float((p.detach() - start[name]).abs().max()) for name, p in model.network.named_parameters())
    assert moved > 1e-3
    for one, other in ((seen[0], seen[1]), (seen[2], seen[3])):
        assert len({group.sequences[0].token_ids.tobytes() for group in (*one, *other)}) == 6
    for name, parameter in model.network.named_parameters():
        parameter.data.copy_(start[name])
    with evaluating(model.network):
        for groups in seen:
            old = score(model, collate(groups)).logprobs
            torch.testing.assert_close(column(groups, "old"), old, rtol=1e-5, atol=1e-5)
            with adapters_off(model.network):
                reference = score(model, collate(groups)).logprobs
            torch.testing.assert_close(column(groups, "reference"), reference, rtol=1e-5, atol=1e-5)
            assert float((old - reference).abs().max()) > 1e-2


def test_what_the_engine_sampled_with_is_the_policy_at_its_temperature(
    speaker: Path, data: Path, tmp_path: Path
) -> None:
    """To 1e-2 with weights in fp16, to 1e-4 with dense ones."""
    for weights, bound in (("dense", 1e-4), ("auto", 1e-2)):
        settings = settings_of("grpo", speaker, data, temperature=0.7, rollout_weights=weights)
        run, model = begun(settings, tmp_path / weights)
        groups = answers_in(run, 0)
        with evaluating(model.network):
            known = score(model, collate(groups), temperature=0.7).logprobs
        assert float((column(groups, "sampled") - known).abs().max()) < bound


def by_hand(rewards: list[float], values: list[float], gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """Of one answer: advantages from its end backwards (Schulman et al. 2016, eq. 16), and returns."""
    found, following, later = [0.0] * len(values), 0.0, 0.0
    for t in reversed(range(len(values))):
        later = rewards[t] + gamma * following - values[t] + gamma * lam * later
        found[t], following = later, values[t]
    return found, [a + v for a, v in zip(found, values, strict=True)]


@pytest.mark.parametrize("whiten", [False, True])
def test_ppo_expects_and_rewards_as_its_papers_do(whiten: bool, chat_model: Path, data: Path) -> None:
    """Two answers, of two tokens and of three: KL at every token, the score at the last; rewards 1 and 3 divided by
    their deviation sqrt(2) around their mean 2 become 2 -+ 1/sqrt(2).
    """
    settings = settings_of("ppo", chat_model, data, gamma=0.9, lam=0.8, whiten_rewards=whiten)
    kl, values = [0.1, -0.2, 0.3, 0.0, 0.5], [0.5, 1.0, -0.5, 0.25, 2.0]
    scored = Scored(
        *(torch.tensor([1.0, 3.0]), torch.tensor([0, 1]), torch.tensor([0, 0, 1, 1, 1])),
        *(torch.tensor(kl), torch.tensor(values)),
    )
    ends = [2 - 0.5**0.5, 2 + 0.5**0.5] if whiten else [1.0, 3.0]
    rewards = [-0.05 * k for k in kl]
    rewards[1] += ends[0]
    rewards[4] += ends[1]
    parts = [by_hand(rewards[part], values[part], 0.9, 0.8) for part in (slice(0, 2), slice(2, 5))]
    raw = torch.tensor([a for part in parts for a in part[0]])
    found = advantages(settings, scored, beta=0.05)
    assert found["returns"].tolist() == pytest.approx([r for part in parts for r in part[1]], abs=1e-5)
    wanted = (raw - raw.mean()) / raw.std()
    assert found["advantages"].tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


def test_without_a_baseline_each_token_has_what_is_still_to_come(chat_model: Path, data: Path) -> None:
    """REINFORCE++: r - beta times the KL from the token on, less the mean, over the deviation; beta 0.5."""
    settings = settings_of("reinforce_pp", chat_model, data)
    kl = torch.tensor([0.2, 0.4, 0.6])
    scored = Scored(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]), torch.tensor([0, 0, 1]), kl)
    raw = torch.tensor([1 - 0.5 * 0.6, 1 - 0.5 * 0.4, 2 - 0.5 * 0.6])
    found = advantages(settings, scored, beta=0.5)
    assert found.keys() == {"advantages"}
    assert found["advantages"].tolist() == pytest.approx(((raw - raw.mean()) / raw.std()).tolist(), abs=1e-5)


def test_a_divergence_in_the_loss_takes_nothing_off_the_rewards(chat_model: Path, data: Path) -> None:
    scored = Scored(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([9.0, 0.0]))
    in_loss = advantages(settings_of("grpo", chat_model, data, scale="none"), scored, beta=0.5)
    in_reward = advantages(settings_of("grpo", chat_model, data, scale="none", kl_in="reward"), scored, beta=0.5)
    assert in_loss["advantages"].tolist() == [-0.5, 0.5]
    assert in_reward["advantages"].tolist() == [-2.75, 2.75]
    assert surrogate_of(settings_of("grpo", chat_model, data)).kl_weight == 0.04
    assert surrogate_of(settings_of("grpo", chat_model, data, kl_in="reward")).kl_weight == 0.0


def test_a_critic_with_its_own_trunk_leaves_the_policy_alone_and_both_learn(
    speaker: Path, data: Path, tmp_path: Path
) -> None:
    settings = settings_of("ppo", speaker, data, value_trunk="own", rollout_epochs=1)
    run, model = begun(settings, tmp_path)
    groups = answers_in(run, 0)
    of_critic = {name: p for name, p in model.network.named_parameters() if f".{CRITIC}." in name}
    of_policy = {n: p for n, p in adapter_parameters(model.network).items() if n not in of_critic}
    assert len(of_critic) == len(of_policy) > 0
    with evaluating(model.network):
        before = score(model, collate(groups)).logprobs
        with critic_on(model.network):
            assert not torch.equal(score(model, collate(groups)).logprobs, before)
        kept = {name: p.detach().clone() for name, p in of_critic.items()}
        for parameter in of_critic.values():
            parameter.data.mul_(3)
        assert torch.equal(score(model, collate(groups)).logprobs, before)
        for name, parameter in of_critic.items():
            parameter.data.copy_(kept[name])
    start = {name: p.detach().clone() for name, p in run.state.trained().items()}
    for _ in range(2):  # the value head starts at zero, so its trunk moves from the second step on
        train_step(run)
    still = [name for name, p in run.state.trained().items() if torch.equal(p, start[name])]
    assert still == []


@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_the_value_loss_reaches_the_trunk_that_it_reads(trunk: str, speaker: Path, data: Path, tmp_path: Path) -> None:
    """Its gradient alone, from half of the squared error by plain autograd, beside that of a run without advantages."""
    settings = settings_of("ppo", speaker, data, value_trunk=trunk, value_clip=None, value_weight=1.0, beta=0)
    run, model = begun(settings, tmp_path)
    nn.init.constant_(model.network.get_submodule("value_head").weight, 0.1)
    batch = collate(answers_in(run, 0))
    batch.columns["advantages"].zero_()
    found = {name: g for name, g in gradients(run, [batch]).items() if g.any()}
    if trunk == "own":
        activate(model.network, CRITIC)
    values = values_at(model.network, hidden_states(model.network, batch)[batch.target_index])
    (0.5 * (values - batch.columns["returns"]).square().mean()).backward()
    wanted = {name: p.grad for name, p in model.network.named_parameters() if p.grad is not None and p.grad.any()}
    assert found.keys() == wanted.keys()
    assert all((f".{CRITIC}." in name) == (trunk == "own") for name in found if "value_head" not in name)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_weight_of_the_entropy_raises_it(speaker: Path, data: Path, tmp_path: Path) -> None:
    """By rewards that are all equal, so that nothing else teaches."""
    entropies = []
    for weight in (0.0, 0.1):
        same = {"reward": {"type": "length", "maximum": 999}, "beta": 0, "entropy_weight": weight}
        run, _ = begun(settings_of("grpo", speaker, data, **same), tmp_path / str(weight))
        entropies.append([train_step(run)["entropy"] for _ in range(6)])
    without, with_weight = entropies
    assert with_weight[0] == without[0]
    assert with_weight[-1] > 1.5 * without[-1]


def test_only_what_is_asked_for_is_computed_before_learning(chat_model: Path, data: Path, tmp_path: Path) -> None:
    wanted = {
        ("grpo", 0.0, 1): set(),
        ("grpo", 0.04, 1): {"reference"},
        ("grpo", 0.0, 2): {"old"},
        ("rloo", 0.05, 1): {"old", "reference"},
        ("ppo", 0.05, 4): {"old", "reference", "values"},
    }
    for (word, beta, epochs), names in wanted.items():
        run, model = begun(settings_of(word, chat_model, data, beta=beta, rollout_epochs=epochs), tmp_path)
        group = next(iter(plan_of(run).prepared.train))
        assert not isinstance(group, TokenGroup)
        settings = plan_of(run).settings
        assert known_of(model.network, [TokenGroup((group,))], settings, micro_batch_tokens=WIDE).keys() == names


def test_the_guard_speaks_where_the_policy_is_too_far(chat_model: Path, data: Path) -> None:
    guard = guard_of(settings_of("grpo", chat_model, data, max_kl=0.5, eval_fraction=0.5))
    assert guard is not None
    assert guard({"kl": 0.5}) is None
    assert guard({"loss": 9.0}) is None
    assert "over max_kl 0.5" in str(guard({"kl": 0.51}))
    assert guard_of(settings_of("grpo", chat_model, data)) is None
