"""TRL's GRPO and RLOO trainers and our objective give the same advantages, losses, metrics and gradients.

TRL is handed recorded answers, with the log-probabilities that an engine claims for them, by its own hook for rollouts;
from there on its numbers are its own: advantages, log-probabilities before the update and by the reference, importance
ratios, and after the policy has moved the loss. Ours are made of a plain forward pass over one answer after the other,
in float32, and cut in two micro-batches. What agrees does to 1e-5, gradients to 1e-5 of the largest: sums of other
order, over padded rows there and a flat vector here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from luthier.objectives.advantages import group_advantages, soft_length_penalty
from luthier.objectives.policy import Rollouts, Surrogate, kl_estimates, policy_gradient

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own

MakeTrainer = Callable[..., Any]
GROUP_SIZE, LONGEST, CAP = 4, 9, 1.5
REWARDS = (1.0, 0.25, -0.5, 2.0, 0.0, 1.0, 0.75, None)
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
CLIPS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


@dataclass(frozen=True)
class Recorded:
    """A rollout: token ids of each prompt and answer, and log p of the answer's as the engine told it."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[float]]

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """TRL's hook for rollouts."""
        fields = ("prompt_ids", "completion_ids", "logprobs")
        return {name: [list(row) for row in getattr(self, name)] for name in fields}


@dataclass(frozen=True)
class Networks:
    """The policy before the first update and now, and the reference."""

    old: LlamaForCausalLM
    now: LlamaForCausalLM
    reference: LlamaForCausalLM


def moved(network: LlamaForCausalLM, seed: int, scale: float) -> LlamaForCausalLM:
    """The same network with noise on its weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return network


def network_in(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def networks(chat_model: Path) -> Networks:
    """Log-ratios of some tenths of a nat."""
    old = moved(network_in(chat_model), 1, 0.05)
    now = moved(moved(network_in(chat_model), 1, 0.05), 2, 0.02)
    return Networks(old, now, network_in(chat_model))


@pytest.fixture(scope="module")
def recorded(chat_model: Path, networks: Networks) -> Recorded:
    """Random tokens; answers 1 to 9 tokens long, every second one ended. The engine is half a nat off, or mute."""
    generator = torch.Generator().manual_seed(3)
    end = AutoTokenizer.from_pretrained(chat_model).eos_token_id
    prompts = [torch.randint(0, 250, (size,), generator=generator).tolist() for size in (3, 5)]
    answers = [torch.randint(0, 250, (size,), generator=generator).tolist() for size in (4, 1, 9, 6, 2, 7, 5, 3)]
    answers = [[*answer[:-1], end] if i % 2 else answer for i, answer in enumerate(answers)]
    repeated = [prompts[group] for group in GROUPS.tolist()]
    with torch.no_grad():
        known = [scored(networks.old, *pair)[0] for pair in zip(repeated, answers, strict=True)]
    noisy = [logprobs + 0.5 * torch.randn(logprobs.shape, generator=generator) for logprobs in known]
    noisy[2][4] = nan
    return Recorded(repeated, answers, [row.tolist() for row in noisy])


@pytest.fixture
def trainer_of(chat_model: Path, tmp_path: Path) -> MakeTrainer:
    """TRL's trainer of this name, with a policy of its own and the chat model for a reference."""

    def make(name: str, settings: Mapping[str, Any], network: LlamaForCausalLM, **further: Any) -> Any:
        trl = pytest.importorskip("trl", minversion="1.16")
        datasets = pytest.importorskip("datasets")
        policy = network_in(chat_model).train()
        policy.load_state_dict(network.state_dict())
        arguments = getattr(trl, f"{name}Config")(
            output_dir=str(tmp_path),
            per_device_train_batch_size=len(REWARDS),
            num_generations=GROUP_SIZE,
            max_completion_length=LONGEST,
            report_to="none",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            **settings,
        )
        data = datasets.Dataset.from_list([{"prompt": "Hi"}])
        tokenizer = AutoTokenizer.from_pretrained(chat_model)
        trainer = getattr(trl, f"{name}Trainer")(
            policy, given_rewards, args=arguments, train_dataset=data, processing_class=tokenizer, **further
        )
        trainer.current_gradient_accumulation_steps = 1  # which its training loop would set
        return trainer

    return make


def given_rewards(score: list[float | None], **columns: Any) -> list[float | None]:
    """A reward function as TRL calls them: each row says its own."""
    return score


def rolled_out(trainer: Any) -> dict[str, Tensor]:
    """What TRL makes of one rollout, before the first update."""
    rows = [{"prompt": f"Prompt {g}", "score": r} for g, r in zip(GROUPS.tolist(), REWARDS, strict=True)]
    made: dict[str, Tensor] = trainer._generate_and_score_completions(rows)
    return made


def trl_step(trainer: Any, inputs: dict[str, Tensor], now: LlamaForCausalLM) -> tuple[float, dict[str, Tensor]]:
    """The loss of the moved policy, and its gradients."""
    trainer.model.load_state_dict(now.state_dict())
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return float(loss), gradients_of(trainer.model)


def gradients_of(network: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def scored(network: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> tuple[Tensor, Tensor]:
    """log p of each of the answer's tokens, and the entropy there: [tokens] each."""
    logits = network(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, torch.tensor(answer)[:, None])[:, 0], entropy


def rollouts_of(recorded: Recorded, networks: Networks, advantages: Tensor, dropped: tuple[int, ...]) -> list[Rollouts]:
    """Two micro-batches, of three and of five answers. dropped: answers whose tokens are no targets."""
    return [_rollouts(recorded, networks, advantages, dropped, part) for part in (range(3), range(3, len(REWARDS)))]


def _rollouts(
    recorded: Recorded, networks: Networks, advantages: Tensor, dropped: tuple[int, ...], part: range
) -> Rollouts:
    kept = [i for i in part if i not in dropped]
    pairs = [(recorded.prompt_ids[i], recorded.completion_ids[i]) for i in kept]
    lengths = torch.tensor([len(answer) for _, answer in pairs])
    logprobs, entropy = (torch.cat(each) for each in zip(*(scored(networks.now, *p) for p in pairs), strict=True))
    with torch.no_grad():
        old, reference = (
            torch.cat([scored(network, *p)[0] for p in pairs]) for network in (networks.old, networks.reference)
        )
    return Rollouts(
        logprobs=logprobs,
        advantages=advantages[kept].repeat_interleave(lengths),
        sequence=(torch.tensor(kept) - part[0]).repeat_interleave(lengths),
        num_sequences=len(part),
        old=old,
        sampled=torch.tensor([x for i in kept for x in recorded.logprobs[i]]),
        reference=reference,
        entropy=entropy,
    )


def our_step(
    parts: list[Rollouts], surrogate: Surrogate, now: LlamaForCausalLM
) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """The loss as the loop divides it, its gradients and metrics."""
    now.zero_grad()
    losses = [policy_gradient(part, surrogate) for part in parts]
    loss = torch.cat([each.per_unit for each in losses]).sum() / sum(len(each.per_unit) for each in losses)
    loss.backward()
    sums = {name: torch.stack([each.kept[name] for each in losses]).sum(0) for name in losses[0].kept}
    return float(loss), gradients_of(now), {name: float(total / number) for name, (total, number) in sums.items()}


def hold_gradients_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert largest > 1e-4
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}")


# By name: TRL's settings and ours.
CLIP = {"clip_low": 0.2, "clip_high": 0.2}
TOKENS, SEQUENCES = Surrogate("token", "tokens", **CLIP), Surrogate("token", "sequences", **CLIP)
PLAIN_KL, CORRECTED = {"use_bias_correction_kl": False}, {"kl_weight": 0.3, "kl_corrected": True}
GSPO = {"importance_sampling_level": "sequence", "loss_type": "grpo"}
CASES: dict[str, tuple[dict[str, Any], Surrogate]] = {
    "grpo": ({"loss_type": "grpo"}, SEQUENCES),
    "grpo with kl": ({"loss_type": "grpo", "beta": 0.3, **PLAIN_KL}, replace(SEQUENCES, kl_weight=0.3)),
    "grpo with its kl corrected": ({"loss_type": "grpo", "beta": 0.3}, replace(SEQUENCES, **CORRECTED)),
    "grpo clipped twice": ({"loss_type": "grpo", "delta": 1.3}, replace(SEQUENCES, dual_clip=1.3)),
    "grpo with entropy": ({"loss_type": "bnpo", "entropy_coef": 0.1}, replace(TOKENS, entropy_weight=0.1)),
    "bnpo": ({"loss_type": "bnpo"}, TOKENS),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, replace(TOKENS, clip_high=0.28)),
    "dapo with kl": ({"loss_type": "dapo", "beta": 0.3, **PLAIN_KL}, replace(TOKENS, kl_weight=0.3)),
    "dr_grpo": ({"loss_type": "dr_grpo"}, Surrogate("token", "constant", **CLIP, length=LONGEST)),
    "dr_grpo with kl": (
        {"loss_type": "dr_grpo", "beta": 0.3, **PLAIN_KL},
        Surrogate("token", "constant", **CLIP, length=LONGEST, kl_weight=0.3),
    ),
    "gspo": (
        GSPO | {"epsilon": 3e-4, "epsilon_high": 4e-4},
        Surrogate("sequence", "sequences", clip_low=3e-4, clip_high=4e-4),
    ),
    "gspo with kl": (
        GSPO | {"epsilon": 0.1, "beta": 0.3, **PLAIN_KL},
        Surrogate("sequence", "sequences", 0.1, 0.1, kl_weight=0.3),
    ),
    "gspo with its kl corrected": (
        GSPO | {"epsilon": 0.1, "beta": 0.3},
        Surrogate("sequence", "sequences", 0.1, 0.1, **CORRECTED),
    ),
    "gspo by tokens": (GSPO | {"loss_type": "dapo", "epsilon": 0.1}, Surrogate("sequence", "tokens", 0.1, 0.1)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_later_update_equals_trls(case: str, networks: Networks, recorded: Recorded, trainer_of: MakeTrainer) -> None:
    """The policy has moved since the rollout, so far that some ratios are clipped and some are not."""
    settings, surrogate = CASES[case]
    trainer = trainer_of("GRPO", {"num_iterations": 2, "beta": 0.0} | settings, networks.old, rollout_func=recorded)
    inputs = rolled_out(trainer)
    loss, gradients = trl_step(trainer, inputs, networks.now)
    parts = rollouts_of(recorded, networks, inputs["advantages"], ())
    our_loss, our_gradients, told = our_step(parts, surrogate, networks.now)
    assert our_loss == pytest.approx(loss, rel=1e-5, abs=1e-5)
    hold_gradients_equal(our_gradients, gradients)
    for name in (*CLIPS, "entropy", *(["kl"] if surrogate.kl_weight else [])):
        assert told[name] == pytest.approx(trainer._metrics["train"][name][-1], rel=1e-5, abs=1e-5), name
    assert 0 < told["clip_ratio/region_mean"] < 1


@pytest.mark.parametrize("case", ["grpo with kl", "grpo with its kl corrected", "dapo", "dr_grpo", "gspo"])
def test_the_first_update_equals_trls(
    case: str, networks: Networks, recorded: Recorded, trainer_of: MakeTrainer
) -> None:
    """Where neither side has log-probabilities from before it."""
    settings, surrogate = CASES[case]
    trainer = trainer_of("GRPO", {"beta": 0.0} | settings, networks.now, rollout_func=recorded)
    inputs = rolled_out(trainer)
    assert "old_per_token_logps" not in inputs
    loss, gradients = trl_step(trainer, inputs, networks.now)
    parts = [replace(part, old=None) for part in rollouts_of(recorded, networks, inputs["advantages"], ())]
    our_loss, our_gradients, _ = our_step(parts, surrogate, networks.now)
    assert our_loss == pytest.approx(loss, rel=1e-5, abs=1e-5)
    hold_gradients_equal(our_gradients, gradients)


@pytest.mark.parametrize("case", ["grpo with kl", "dapo with kl", "gspo with kl"])
def test_the_engines_mismatch_is_corrected_as_trl_does(
    case: str, networks: Networks, recorded: Recorded, trainer_of: MakeTrainer
) -> None:
    """TRL corrects for vLLM alone, and is told that the answers are vLLM's and that it has the current weights."""
    settings, surrogate = CASES[case]
    settings = settings | {
        **{"num_iterations": 2, "vllm_importance_sampling_mode": "token_truncate"},
        "vllm_importance_sampling_clip_max": CAP,
    }
    trainer = trainer_of("GRPO", settings, networks.old, rollout_func=recorded)
    trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
    inputs = rolled_out(trainer)
    ratios = inputs["importance_sampling_ratio"][inputs["completion_mask"].bool()]
    assert 0.1 < float((ratios == CAP).float().mean()) < 0.5
    loss, gradients = trl_step(trainer, inputs, networks.now)
    parts = rollouts_of(recorded, networks, inputs["advantages"], ())
    our_loss, our_gradients, told = our_step(parts, replace(surrogate, importance_cap=CAP), networks.now)
    assert our_loss == pytest.approx(loss, rel=1e-5, abs=1e-5)
    hold_gradients_equal(our_gradients, gradients)
    for name in ("sampling/importance_sampling_ratio/mean", "sampling/sampling_logp_difference/mean"):
        assert told[name] == pytest.approx(trainer._metrics["train"][name][-1], rel=1e-5), name


@pytest.mark.parametrize("case", ["grpo with kl", "dapo with kl", "dr_grpo with kl", "gspo with kl"])
def test_answers_that_were_cut_off_are_left_out_as_trl_does(
    case: str, networks: Networks, recorded: Recorded, trainer_of: MakeTrainer
) -> None:
    """Their tokens are no targets; where the unit is the answer, they still count."""
    settings, surrogate = CASES[case]
    settings = settings | {"num_iterations": 2, "mask_truncated_completions": True}
    trainer = trainer_of("GRPO", settings, networks.old, rollout_func=recorded)
    inputs = rolled_out(trainer)
    assert inputs["completion_mask"].any(1).tolist() == [False, True] * 4
    loss, gradients = trl_step(trainer, inputs, networks.now)
    parts = rollouts_of(recorded, networks, inputs["advantages"], (0, 2, 4, 6))
    our_loss, our_gradients, _ = our_step(parts, surrogate, networks.now)
    assert our_loss == pytest.approx(loss, rel=1e-5, abs=1e-5)
    hold_gradients_equal(our_gradients, gradients)


@pytest.mark.parametrize(("scale", "ours"), [("group", "group_std"), ("batch", "batch_std"), ("none", "none")])
def test_advantages_of_groups_equal_trls(
    scale: str, ours: str, networks: Networks, recorded: Recorded, trainer_of: MakeTrainer
) -> None:
    """One answer of the second group could not be scored."""
    theirs = rolled_out(trainer_of("GRPO", {"scale_rewards": scale}, networks.old, rollout_func=recorded))
    rewards = torch.tensor([nan if reward is None else reward for reward in REWARDS])
    found = group_advantages(rewards, GROUPS, baseline="group_mean", scale=ours)
    torch.testing.assert_close(found, theirs["advantages"], rtol=1e-5, atol=1e-5)


def test_rloos_advantages_and_first_gradients_equal_trls(
    chat_model: Path, networks: Networks, trainer_of: MakeTrainer
) -> None:
    """TRL samples the answers, takes the KL off the rewards, and clips whole answers' ratios, which are 1 here."""
    torch.manual_seed(4)
    trainer = trainer_of("RLOO", {"beta": 0.3}, networks.now)
    inputs = rolled_out(trainer)
    _, gradients = trl_step(trainer, inputs, networks.now)
    prompts, answers = (
        [row[mask.bool()].tolist() for row, mask in zip(inputs[f"{kind}_ids"], inputs[f"{kind}_mask"], strict=True)]
        for kind in ("prompt", "completion")
    )
    sampled = Recorded(prompts, answers, [[0.0] * len(answer) for answer in answers])
    rewards = torch.tensor([nan if reward is None else reward for reward in REWARDS])
    with torch.no_grad():
        of_each = [
            kl_estimates(scored(networks.now, *pair)[0], scored(networks.reference, *pair)[0], "k1").sum()
            for pair in zip(prompts, answers, strict=True)
        ]
    found = group_advantages(rewards - 0.3 * torch.stack(of_each), GROUPS, baseline="leave_one_out", scale="none")
    torch.testing.assert_close(found, inputs["advantages"], rtol=1e-5, atol=1e-5)
    _, ours, _ = our_step(rollouts_of(sampled, networks, found, ()), Surrogate("none", "sum"), networks.now)
    hold_gradients_equal(ours, gradients)


def test_the_charge_for_length_equals_trls() -> None:
    rewards = pytest.importorskip("trl.rewards")
    lengths = list(range(0, 120, 7))
    theirs = rewards.get_soft_overlong_punishment(100, 20)(completion_ids=[[0] * length for length in lengths])
    assert soft_length_penalty(torch.tensor(lengths), longest=100, margin=20).tolist() == pytest.approx(theirs)
