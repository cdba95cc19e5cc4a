"""Each verification holds on a tiny model, and fails when its promise is broken."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.cli.verify import command
from luthier.data.batches import TokenBatch
from luthier.errors import VerificationError
from luthier.models.load import load
from luthier.objectives.loss import Loss
from luthier.pipeline.methods import next_tokens
from luthier.pipeline.prepare import prepare_network
from luthier.pipeline.verify_conversations import AWKWARD
from luthier.pipeline.verify_loss import verify_loss
from luthier.pipeline.verify_resume import verify_resume
from luthier.pipeline.verify_template import verify_template
from luthier.recipe import Recipe, parse_recipe
from luthier.training.checkpoints import Checkpoints
from luthier.training.optimizers import make_optimizer
from luthier.training.state import Progress, TrainState

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A two-layer model with a byte-level tokenizer and a ChatML template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
        pad_token_id=fast.eos_token_id,
    )
    folder = tmp_path / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe_text(base: Path, tmp_path: Path) -> str:
    """Answers of one to twelve words, so that tokens a sequence differ; dropout, so that resuming has draws to hold."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": f"{i}?", "answer": "word " * i + "."}) + "\n" for i in range(1, 13))
    )
    return (
        f"model: {base}\noutput: {tmp_path / 'run'}\ndtype: fp32\nstages:\n"
        f"  - sft: {{data: {rows}, batch_size: 4, learning_rate: 0.01, adapter: {{r: 4, dropout: 0.1}}}}\n"
    )


@pytest.fixture
def recipe(recipe_text: str) -> Recipe:
    return parse_recipe(recipe_text)


def mean_of_its_own(network: nn.Module, batch: TokenBatch) -> Loss:
    """The mistake: a mean over whatever lies in the micro-batch."""
    loss = next_tokens(network, batch)
    return Loss(loss.per_unit / len(loss.per_unit), unit=loss.unit)


def spoil(recipe: Recipe, folder: Path, name: str) -> None:
    """Changes one number of the first tensor that is named so, and saves it as a whole checkpoint."""
    settings, model = recipe.stages[0].settings, load(recipe.model)
    prepare_network(settings, model)
    state = TrainState(model.network, make_optimizer(model.network, settings), Progress())
    last = (folder / "checkpoints" / "last").resolve()
    fingerprint = json.loads((last / "progress.json").read_text())["fingerprint"]
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=2, fingerprint=fingerprint)
    checkpoints.load(last, state)
    next(tensor for key, tensor in state.tensors().items() if key.startswith(name)).view(-1)[0] += 1e-3
    checkpoints.save(state)


def test_every_cut_of_a_step_gives_the_same_gradient_and_averaging_means_does_not(recipe: Recipe) -> None:
    proof = verify_loss(recipe)
    assert proof.num_sequences == 8
    assert [result.num_micro_batches for result in proof.cuts] == [1, 2, 8, 1]
    assert proof.largest_difference < 1e-12
    assert proof.averaged.difference > 0.01
    assert proof.averaged.loss != pytest.approx(proof.cuts[0].loss, rel=1e-4)


def test_the_adapter_takes_part_with_all_its_parameters(recipe: Recipe) -> None:
    """With B at zero A would have no gradient, and its share of the comparison would be empty."""
    seen: dict[str, bool] = {}

    def watched(network: nn.Module, batch: TokenBatch) -> Loss:
        seen.update({name: bool(p.any()) for name, p in network.named_parameters() if p.requires_grad})
        return next_tokens(network, batch)

    verify_loss(recipe, objective=watched)
    assert len(seen) == 2 * 2 * 7
    assert all(seen.values())


def test_an_objective_that_divides_by_its_own_micro_batch_is_found(recipe: Recipe) -> None:
    with pytest.raises(VerificationError, match=r"two micro-batches differs .* leave the division to the loop"):
        verify_loss(recipe, objective=mean_of_its_own)


def test_an_objective_without_a_gradient_proves_nothing(recipe: Recipe) -> None:
    def flat(network: nn.Module, batch: TokenBatch) -> Loss:
        loss = next_tokens(network, batch)
        return Loss(loss.per_unit * 0, unit=loss.unit)

    with pytest.raises(VerificationError, match="differs from the whole step's by nan"):
        verify_loss(recipe, objective=flat)


def test_a_stopped_run_ends_as_the_uninterrupted_one(recipe: Recipe) -> None:
    proof = verify_resume(recipe, num_steps=4)
    assert (proof.num_steps, proof.resumed_after) == (4, 2)
    assert proof.num_parameters == 2 * 2 * 7
    assert proof.num_optimizer_tensors == 3 * proof.num_parameters  # step, mean, mean of squares


@pytest.mark.parametrize("name", ["parameter/", "optimizer/exp_avg_sq/"])
def test_a_checkpoint_that_was_altered_is_found(recipe: Recipe, name: str) -> None:
    with pytest.raises(VerificationError, match=r"(parameter|optimizer)/.* differs after going on"):
        verify_resume(recipe, while_stopped=lambda folder: spoil(recipe, folder, name))


def test_a_run_that_begins_anew_does_not_count_as_resumed(recipe: Recipe) -> None:
    def damage(folder: Path) -> None:
        path = folder / "checkpoints" / "last" / "state.safetensors"
        save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)

    with pytest.raises(VerificationError, match="went on from step 0 and not from its checkpoint of step 2"):
        verify_resume(recipe, while_stopped=damage)


def test_a_run_of_one_step_is_refused(recipe: Recipe) -> None:
    with pytest.raises(VerificationError, match="cannot be stopped half way"):
        verify_resume(recipe, num_steps=1)


def test_awkward_conversations_are_served_as_they_are_trained(base: Path) -> None:
    proof = verify_template(str(base))
    assert proof.num_conversations == len(AWKWARD) == 12
    assert proof.num_turns == 19
    assert proof.num_with_markers == 2
    assert (proof.stop_tokens, proof.refused) == (("<|im_end|>",), ())


def test_a_recipes_own_conversations_are_compared(recipe: Recipe) -> None:
    proof = verify_template(recipe)
    assert (proof.num_conversations, proof.num_turns, proof.num_compared) == (12, 12, 12)


def test_a_saved_model_with_another_template_is_found(base: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    shutil.copytree(base, saved)
    (saved / "chat_template.jinja").write_text(CHATML.replace("assistant\n", "assistant:\n"))
    with pytest.raises(
        VerificationError, match=r"conversation:1, message 2: the saved model differs .* has ':.*' and not"
    ):
        verify_template(str(base), saved=saved)


def test_a_saved_model_that_does_not_stop_at_the_end_of_a_turn_is_found(base: Path, tmp_path: Path) -> None:
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    with pytest.raises(VerificationError, match=r"ends with '<\|im_end\|>', but .* stops only at \[7\]"):
        verify_template(str(base), saved=base)


def test_a_template_that_cannot_be_trained_on_is_refused_with_its_reason(base: Path) -> None:
    (base / "chat_template.jinja").write_text(CHATML.replace("m['content']", "m['content'] | upper"))
    with pytest.raises(VerificationError, match="nothing could be compared: conversation:1: "):
        verify_template(str(base))


def test_the_command_prints_each_proof(recipe_text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text)
    texts = []
    for word in ("loss", "resume", "template"):
        result = CliRunner().invoke(command("verify"), [word, str(path)], catch_exceptions=False)
        texts.append(result.output)
    assert "means averaged" in texts[0]
    assert "bit for bit" in " ".join(texts[1].split())
    assert "ends with <|im_end|>" in " ".join(texts[2].split())
