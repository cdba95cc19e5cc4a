"""TRL's preference trainers and our stages give the same loss, gradients and metrics on the same tokens and weights.

TRL makes the tokens: it is handed conversations, and our groups are built of what its collator would hand its model.
Both compute one step over all rows in float32 and learn nothing of it. What agrees does to 1e-5, numbers above one to
1e-5 of themselves, gradients to 1e-5 of the largest: sums of other order, over padded rows there and a stream here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    TrainerCallback,
)

from luthier.adapters.peft_format import load_adapter
from luthier.data.batches import cut
from luthier.data.examples import Origin
from luthier.data.sequences import TokenGroup, TokenSequence
from luthier.models.fuse import fuse
from luthier.models.load import load
from luthier.models.rewards import load_reward
from luthier.models.trainable import freeze_base
from luthier.objectives.preference import PAIR_LOSSES
from luthier.pipeline.reference import with_reference
from luthier.pipeline.stages import STAGES
from luthier.recipe.stages import STAGE_SETTINGS
from luthier.training.loop import step_gradients

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own

Row = dict[str, Any]
MakeTrainer = Callable[..., Any]

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
LOGPS = ("logps/chosen", "logps/rejected")


def row(prompt: str, chosen: str, rejected: str) -> Row:
    answers = {"chosen": chosen, "rejected": rejected}
    return {
        "prompt": [{"role": "user", "content": prompt}],
        **{kind: [{"role": "assistant", "content": answer}] for kind, answer in answers.items()},
    }


ROWS = [
    row("What is 2 + 2?", "4.", "It is 5, I think."),
    row("Name a colour.", "Blue, mostly.", "Blue, never!"),  # tokens that both answers begin with are trained too
    row("Hi", "Hello! How can I help?", "No."),
    row("Is water wet?", "Yes, in most senses.", "Yes"),
]
FEEDBACK = [
    {"prompt": ROWS[i]["prompt"], "completion": ROWS[i][kind], "label": kind == "chosen"}
    for i, kind in enumerate(("chosen", "rejected", "chosen", "chosen"))
]


@dataclass
class Step:
    """What one step told of itself by name, and its gradients by parameter."""

    told: dict[str, float]
    gradients: dict[str, Tensor] = field(default_factory=dict)


class KeepGradients(TrainerCallback):
    """Copies a step's gradients before the optimizer drops them."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        named = given["model"].named_parameters()
        self.kept = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}


@pytest.fixture(scope="module")
def policy(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with other weights: far enough from the first for log-ratios of several nats."""
    network, folder = network_in(chat_model), tmp_path_factory.mktemp("models") / "policy"
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(chat_model).save_pretrained(folder)
    return folder


@pytest.fixture
def trainer_of(chat_model: Path, tmp_path: Path) -> MakeTrainer:
    """TRL's trainer of this name, for one step over all rows. cut: into so many forward passes. further: its own."""

    def make(
        name: str,
        model: PreTrainedModel,
        rows: Sequence[Row],
        settings: dict[str, Any],
        *,
        cut: int = 1,
        **further: Any,
    ) -> Any:
        pytest.importorskip("trl", minversion="1.16")
        datasets = pytest.importorskip("datasets")
        home = pytest.importorskip({"CPO": "trl.experimental.cpo", "ORPO": "trl.experimental.orpo"}.get(name, "trl"))
        arguments = getattr(home, f"{name}Config")(
            output_dir=str(tmp_path),
            per_device_train_batch_size=len(rows) // cut,
            gradient_accumulation_steps=cut,
            max_steps=1,
            logging_steps=1,
            learning_rate=0.0,
            max_grad_norm=0.0,
            max_length=512,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            disable_tqdm=True,
            **settings,
        )
        data, tokenizer = datasets.Dataset.from_list(list(rows)), AutoTokenizer.from_pretrained(chat_model)
        return getattr(home, f"{name}Trainer")(
            model, args=arguments, train_dataset=data, processing_class=tokenizer, **further
        )

    return make


def network_in(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trl_step(trainer: Any) -> Step:
    keep = KeepGradients()
    trainer.add_callback(keep)
    trainer.train()
    return Step(dict(trainer.state.log_history[0]), keep.kept)


def our_step(
    network: PreTrainedModel,
    word: str,
    settings: dict[str, Any],
    groups: Sequence[TokenGroup],
    *,
    reference: PreTrainedModel | None = None,
    micro_batch_tokens: int | None = None,
) -> Step:
    """One step of the stage of this word, its reference's log-probabilities computed beforehand."""
    method = STAGES[word].method(STAGE_SETTINGS[word].model_validate({"data": "rows.jsonl", **settings}))
    batches = cut(groups, micro_batch_tokens)
    if reference is not None:
        batches = with_reference(reference, batches)
    if method.prepare is not None:
        batches = method.prepare(network, batches)
    told = step_gradients(network, batches, method.objective)
    return Step(told, {name: p.grad for name, p in network.named_parameters() if p.grad is not None})


def fused_network(folder: Path) -> PreTrainedModel:
    """Ours, as a run trains it."""
    network = load(str(folder), device="cpu").network
    fuse(network)
    return network


def sequences(ids: Tensor, present: Tensor, trained: Tensor) -> list[TokenSequence]:
    """Rows of TRL's batch without their padding, [rows, tokens] each."""
    return [
        TokenSequence(own[kept].numpy().astype(np.int32), mask[kept].bool().numpy(), Origin("rows", line))
        for line, (own, kept, mask) in enumerate(zip(ids, present.bool(), trained, strict=True))
    ]


def collated(trainer: Any) -> dict[str, Tensor]:
    batch: dict[str, Tensor] = trainer.data_collator(list(trainer.train_dataset))
    return batch


def pairs_of(batch: dict[str, Tensor]) -> list[TokenGroup]:
    """Of DPO's rows, chosen answers before rejected ones."""
    answers = sequences(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    half = len(answers) // 2
    return [TokenGroup(pair) for pair in zip(answers[:half], answers[half:], strict=True)]


def labelled_pairs_of(batch: dict[str, Tensor]) -> list[TokenGroup]:
    """Of CPO's and ORPO's rows, where -100 labels what is no answer."""
    chosen, rejected = (
        sequences(batch[f"{kind}_input_ids"], batch[f"{kind}_attention_mask"], batch[f"{kind}_labels"] != -100)
        for kind in ("chosen", "rejected")
    )
    return [TokenGroup(pair) for pair in zip(chosen, rejected, strict=True)]


def feedback_of(batch: dict[str, Tensor]) -> list[TokenGroup]:
    """Of KTO's rows, with TRL's own mismatched answers."""
    own = sequences(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    other: Sequence[TokenSequence | None] = [None] * len(own)
    if "KL_input_ids" in batch:
        other = sequences(batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"])
    return [
        TokenGroup((answer,), desirable=bool(label), mismatched=mismatched)
        for answer, mismatched, label in zip(own, other, batch["label"], strict=True)
    ]


def hold_equal(ours: Step, theirs: Step, names: Iterable[str]) -> None:
    """The losses, the named metrics and all gradients."""
    for name in ("loss", *names):
        assert ours.told[name] == pytest.approx(theirs.told[name], rel=1e-5, abs=1e-5), name
    hold_gradients_equal(ours.gradients, theirs.gradients)


def hold_gradients_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert largest > 1e-4
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("word", "loss_type"), [*(("dpo", name) for name in PAIR_LOSSES), ("ipo", "ipo")])
def test_direct_losses_equal_trls(
    word: str, loss_type: str, policy: Path, chat_model: Path, trainer_of: MakeTrainer
) -> None:
    """Smoothed where TRL heeds it: its sigmoid losses do not."""
    smoothing = {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust") else {}
    named = {"loss_type": loss_type, **smoothing}
    trainer = trainer_of("DPO", network_in(policy), ROWS, {"beta": 0.5, **named}, ref_model=network_in(chat_model))
    settings = {"beta": 0.5, **(named if word == "dpo" else {})}
    groups = pairs_of(collated(trainer))
    ours = our_step(fused_network(policy), word, settings, groups, reference=fused_network(chat_model))
    hold_equal(ours, trl_step(trainer), (*REWARDS, *LOGPS))


def test_imitation_beside_dpo_equals_trls(policy: Path, chat_model: Path, trainer_of: MakeTrainer) -> None:
    """Of one pair: TRL averages it over the tokens of a batch, we over those of each answer."""
    both = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}
    trainer = trainer_of("DPO", network_in(policy), ROWS[:1], both, ref_model=network_in(chat_model))
    groups, reference = pairs_of(collated(trainer)), fused_network(chat_model)
    ours = our_step(fused_network(policy), "dpo", {"sft_weight": 0.3}, groups, reference=reference)
    hold_equal(ours, trl_step(trainer), (*REWARDS, *LOGPS))


def test_a_step_cut_into_four_equals_trls(policy: Path, chat_model: Path, trainer_of: MakeTrainer) -> None:
    """TRL's mean of means is the mean where every forward pass has as many pairs; ours are cut otherwise."""
    trainer = trainer_of("DPO", network_in(policy), ROWS, {"beta": 0.5}, ref_model=network_in(chat_model), cut=4)
    groups, reference = pairs_of(collated(trainer)), fused_network(chat_model)
    ours = our_step(fused_network(policy), "dpo", {"beta": 0.5}, groups, reference=reference, micro_batch_tokens=200)
    assert 1 < len(cut(groups, 200)) < 4
    hold_equal(ours, trl_step(trainer), (*REWARDS, *LOGPS))


def test_a_reference_that_is_the_model_without_its_adapter_equals_trls(
    chat_model: Path, tmp_path: Path, trainer_of: MakeTrainer
) -> None:
    """PEFT's LoRA with a B that is not zero, read from its file; both sides switch it off for the reference."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    trainer = trainer_of("DPO", network_in(chat_model), ROWS, {"beta": 0.5}, peft_config=config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    trainer.model.save_pretrained(tmp_path / "adapter")
    network = fused_network(chat_model)
    load_adapter(network, tmp_path / "adapter")
    freeze_base(network)
    settings = {"beta": 0.5, "cache_reference": False}
    ours, theirs = our_step(network, "dpo", settings, pairs_of(collated(trainer))), trl_step(trainer)
    theirs.gradients = {named_as_ours(name): gradient for name, gradient in theirs.gradients.items()}
    hold_equal(ours, theirs, (*REWARDS, *LOGPS))


def named_as_ours(name: str) -> str:
    """`base_model.model.X.lora_A.default.weight` is `X.adapters.default.lora_A` here."""
    path, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
    return f"{path}.adapters.default.lora_{rest[0]}"


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("loss_type", ["apo_zero_unpaired", "kto"])
def test_losses_of_feedback_equal_trls(
    loss_type: str, turned: bool, policy: Path, chat_model: Path, trainer_of: MakeTrainer
) -> None:
    """With TRL's mismatched answers. Policy and reference change places, so that once the baseline is cut off at 0; our
    step is cut in two, whose baseline is of both.
    """
    start, reference = (chat_model, policy) if turned else (policy, chat_model)
    settings = {"loss_type": loss_type, "beta": 0.5, "desirable_weight": 1.1, "undesirable_weight": 0.7}
    trainer = trainer_of("KTO", network_in(start), FEEDBACK, settings, ref_model=network_in(reference))
    groups = feedback_of(collated(trainer))
    network, other = fused_network(start), fused_network(reference)
    ours, theirs = (
        our_step(network, "kto", settings, groups, reference=other, micro_batch_tokens=150),
        trl_step(trainer),
    )
    assert len(cut(groups, 150)) == 2
    assert (theirs.told["kl"] > 0) == (loss_type == "kto" and turned)
    hold_equal(ours, theirs, ("rewards/chosen", "rewards/rejected", *LOGPS, "kl"))


SIMPO = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7}


@pytest.mark.parametrize(
    ("word", "trls", "settings", "rows"),
    [
        ("cpo", {"cpo_alpha": 0.0}, {"sft_weight": 0.0}, ROWS),
        ("cpo", {"cpo_alpha": 0.0, "label_smoothing": 0.1}, {"sft_weight": 0.0, "label_smoothing": 0.1}, ROWS),
        ("cpo", {"cpo_alpha": 0.3}, {"sft_weight": 0.3}, ROWS[:1]),
        ("simpo", SIMPO | {"cpo_alpha": 0.0}, {"beta": 2.0, "gamma": 0.7}, ROWS),
        ("simpo", SIMPO | {"cpo_alpha": 0.3}, {"beta": 2.0, "gamma": 0.7, "sft_weight": 0.3}, ROWS[:1]),
    ],
    ids=["cpo", "cpo smoothed", "cpo imitating", "simpo", "simpo imitating"],
)
def test_losses_without_a_reference_equal_trls(
    word: str, trls: dict[str, Any], settings: dict[str, Any], rows: list[Row], policy: Path, trainer_of: MakeTrainer
) -> None:
    """Imitation is compared on one pair: TRL averages it over the tokens of a batch, we over those of each answer.
    logps/chosen of TRL's SimPO are means a token, ours sums as everywhere, so they are compared for CPO alone.
    """
    trainer = trainer_of("CPO", network_in(policy), rows, trls)
    ours = our_step(fused_network(policy), word, settings, labelled_pairs_of(collated(trainer)))
    imitation = ("nll_loss",) if settings.get("sft_weight") else ()
    hold_equal(ours, trl_step(trainer), (*REWARDS, *(LOGPS if word == "cpo" else ()), *imitation))


def test_orpos_odds_ratio_equals_trls(policy: Path, trainer_of: MakeTrainer) -> None:
    """TRL imitates prompt and answer together, averaged over the tokens of a batch; we imitate the answer, as its paper
    says, a pair at a time. So its imitation is taken off: of the loss, which logs it, and of the gradients by those at
    beta 0, where nothing else is left. logps are means a token in TRL's ORPO, and not compared.
    """
    there = [trainer_of("ORPO", network_in(policy), ROWS, {"beta": beta}) for beta in (0.5, 0.0)]
    groups = labelled_pairs_of(collated(there[0]))
    ours = our_step(fused_network(policy), "orpo", {"beta": 0.5, "sft_weight": 0.0}, groups)
    whole, imitation = (trl_step(trainer) for trainer in there)
    assert imitation.told["loss"] == pytest.approx(whole.told["nll_loss"])
    whole.told["loss"] -= whole.told["nll_loss"]
    whole.gradients = {name: gradient - imitation.gradients[name] for name, gradient in whole.gradients.items()}
    hold_equal(ours, whole, (*REWARDS, "log_odds_ratio", "log_odds_chosen"))


def test_orpos_imitation_is_the_mean_over_pairs_of_transformers_loss(policy: Path, trainer_of: MakeTrainer) -> None:
    """Of the better answers alone, each a mean over its tokens; by the labels that TRL gives them."""
    batch = collated(trainer_of("ORPO", network_in(policy), ROWS, {}))
    network = network_in(policy)
    inputs = zip(batch["chosen_input_ids"], batch["chosen_attention_mask"], batch["chosen_labels"], strict=True)
    losses = [network(input_ids=i[None], attention_mask=a[None], labels=n[None]).loss for i, a, n in inputs]
    torch.stack(losses).mean().backward()
    expected = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    with_it, without = (
        our_step(fused_network(policy), "orpo", {"sft_weight": weight}, labelled_pairs_of(batch))
        for weight in (1.0, 0.0)
    )
    nll = float(torch.stack(losses).mean())
    assert with_it.told["nll_loss"] == pytest.approx(nll, rel=1e-5)
    assert with_it.told["loss"] - without.told["loss"] == pytest.approx(nll, rel=1e-5)
    added = {name: gradient - without.gradients[name] for name, gradient in with_it.gradients.items()}
    hold_gradients_equal(added, expected)


@pytest.mark.parametrize("center", [None, 0.1])
@pytest.mark.parametrize("margins", [None, (1.0, 0.5, 2.0, 0.25)])
def test_a_reward_models_step_equals_trls(
    center: float | None, margins: tuple[float, ...] | None, policy: Path, tmp_path: Path, trainer_of: MakeTrainer
) -> None:
    """TRL's words for rewards/accuracies and rewards/margins are accuracy and margin; of rewards it logs their mean."""
    torch.manual_seed(0)
    network = LlamaForSequenceClassification.from_pretrained(policy, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(network.score.weight)
    network.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(policy).save_pretrained(tmp_path / "model")
    rows = ROWS if margins is None else [{**row, "margin": margin} for row, margin in zip(ROWS, margins, strict=True)]
    trainer = trainer_of("Reward", network, rows, {"center_rewards_coefficient": center})
    batch = collated(trainer)
    everything = sequences(batch["input_ids"], batch["attention_mask"], batch["attention_mask"].cumsum(1) > 1)
    pairs = zip(everything[:4], everything[4:], margins or [None] * 4, strict=True)
    groups = [TokenGroup((a, b), scores=None if m is None else (m, 0.0)) for a, b, m in pairs]
    fuse(ours_network := load_reward(str(tmp_path / "model"), device="cpu").network)
    given = {"center_rewards": center or 0.0, "margins": margins is not None}
    ours, theirs = our_step(ours_network, "reward", given, groups), trl_step(trainer)
    theirs.told |= {"rewards/accuracies": theirs.told["accuracy"], "rewards/margins": theirs.told["margin"]}
    hold_equal(ours, theirs, ("rewards/accuracies", "rewards/margins"))
    both = ours.told["rewards/chosen"] + ours.told["rewards/rejected"]
    assert both == pytest.approx(2 * theirs.told["mean_reward"], rel=1e-5, abs=1e-5)
