"""New tokens in a recipe: encoded as one id, trained alone of all rows, and part of whatever the run leaves behind."""

import json
from pathlib import Path

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

import luthier
from luthier.cli.generate import command
from luthier.data.templates import stop_token_ids
from luthier.errors import AdapterError, RecipeError
from luthier.models.adapted import load_adapted
from luthier.models.load import load
from luthier.models.merge import merge_into
from luthier.models.sources import resolve
from luthier.pipeline.plan import plan_stage
from luthier.pipeline.run import run_recipe
from luthier.pipeline.train import train
from luthier.pipeline.verify_loss import verify_loss
from luthier.pipeline.verify_resume import verify_resume
from luthier.pipeline.verify_template import verify_template
from luthier.recipe import LoRA, Recipe, parse_recipe
from luthier.recipe.training import SFT

TOKENS = ("<plan>", "of two")


@pytest.fixture(params=["tied", "untied", "spare rows"])
def base(request: pytest.FixtureRequest, chat_model: Path, tmp_path: Path) -> Path:
    """The tiny chat model with its output layer tied or not, or with three rows more than its tokenizer has tokens."""
    model, folder = LlamaForCausalLM.from_pretrained(chat_model), tmp_path / "base"
    model.config.tie_word_embeddings = request.param != "untied"
    built = LlamaForCausalLM(model.config)
    built.load_state_dict(model.state_dict(), strict=False)
    if request.param == "spare rows":
        built.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)
    built.save_pretrained(folder)
    AutoTokenizer.from_pretrained(chat_model).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    chats = [{"question": f"{i} <plan>?", "answer": f"of two <plan> {i}."} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in chats))
    return path


def recipe(base: Path, rows: Path, output: Path, tokens: tuple[str, ...] = TOKENS, extra: str = "") -> Recipe:
    adapter = f"{{type: lora, r: 2, new_tokens: {json.dumps(tokens)}}}"
    settings = f"data: {rows}, adapter: {adapter}, epochs: 2, batch_size: 4, learning_rate: 1e-2, save_every: 2{extra}"
    return parse_recipe(f"model: {base}\noutput: {output}\ndtype: fp32\nstages:\n  - sft: {{{settings}}}\n")


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_run_trains_the_new_rows_and_no_other(base: Path, rows: Path, tmp_path: Path) -> None:
    run_recipe(recipe(base, rows, tmp_path / "run"))
    before, after = weights(base), weights(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(base)
    new = [len(tokenizer), len(tokenizer) + 1]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in before:
            kept = [i for i in range(len(before[name])) if i not in new]
            assert torch.equal(after[name][kept], before[name][kept])
            mean = before[name][: new[0]].mean(0)
            assert all(float((after[name][i] - mean).abs().max()) > 1e-4 for i in new)
            assert len(after[name]) == max(len(before[name]), new[-1] + 1)
    assert after.keys() == before.keys()


def test_what_is_merged_reads_and_says_what_base_and_adapter_do(base: Path, rows: Path, tmp_path: Path) -> None:
    """Logits to 1e-5 in float32: one product instead of two."""
    run_recipe(recipe(base, rows, tmp_path / "run"))
    live = load_adapted(str(base), tmp_path / "run" / "00-sft" / "adapter")
    merged = load(str(tmp_path / "run" / "model"))
    text = "say <plan> of two"
    ids = live.tokenizer(text).input_ids
    assert merged.tokenizer(text).input_ids == ids
    assert set(live.tokenizer.convert_tokens_to_ids(list(TOKENS))) <= set(ids)
    with torch.no_grad():
        found = [model.network(torch.tensor([ids], device=model.device)).logits for model in (live, merged)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    assert merged.config.vocab_size == found[0].shape[-1] == len(merged.network.get_input_embeddings().weight)


def test_a_merge_of_the_folder_alone_is_certified_with_the_new_tokens(base: Path, rows: Path, tmp_path: Path) -> None:
    run_recipe(recipe(base, rows, tmp_path / "run"))
    merged = merge_into(resolve(str(base)), tmp_path / "run" / "00-sft" / "adapter", tmp_path / "merged", verify=True)
    assert merged.certificate is not None
    assert merged.certificate.kl < 1e-9 < merged.certificate.kl_of_base
    tokenizer = AutoTokenizer.from_pretrained(merged.folder)
    assert [len(tokenizer.encode(token)) for token in TOKENS] == [1, 1]
    assert (merged.folder / "model.safetensors").read_bytes() == (
        tmp_path / "run" / "model" / "model.safetensors"
    ).read_bytes()


def test_new_tokens_stand_over_a_quantized_base(base: Path, rows: Path, tmp_path: Path) -> None:
    run_recipe(recipe(base, rows, tmp_path / "run", extra=", quantize_base: nf4"))
    adapter = tmp_path / "run" / "00-sft" / "adapter"
    merged = merge_into(resolve(str(base)), adapter, tmp_path / "merged", verify=True)
    assert merged.certificate is not None
    assert merged.certificate.kl < 1e-9


def test_loss_resume_and_plan_hold_with_new_tokens(base: Path, rows: Path, tmp_path: Path) -> None:
    plan = recipe(base, rows, tmp_path / "run")
    assert verify_loss(plan, num_sequences=4).largest_difference < 1e-12
    assert verify_resume(plan).num_steps == 4
    planned, _ = plan_stage("sft", plan.stages[0].settings, str(base))
    _, summary = train("sft", plan.stages[0].settings, load(str(base)), tmp_path / "again")
    assert planned.parts["optimizer"] == pytest.approx(2 * 4 * summary.trained_parameters, rel=0.01)


def test_what_is_trained_is_served_with_new_tokens(chat_model: Path, rows: Path, tmp_path: Path) -> None:
    proof = verify_template(recipe(chat_model, rows, tmp_path / "run"))
    assert proof.num_compared == proof.num_turns == 12


def test_the_model_in_memory_has_the_tokens_and_saves_them(base: Path, rows: Path, tmp_path: Path) -> None:
    model = luthier.load(str(base))
    settings = recipe(base, rows, tmp_path / "run").stages[0].settings
    luthier.sft(model, data=rows, adapter=settings.adapter, epochs=1, output=tmp_path / "run")
    ids = model.tokenizer("<plan>").input_ids
    saved = luthier.load(str(luthier.save(model, tmp_path / "saved")))
    assert saved.tokenizer("<plan>").input_ids == ids
    with torch.no_grad():
        found = [m.network(torch.tensor([ids], device=m.device)).logits for m in (model, saved)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    with pytest.raises(RecipeError, match='"<plan>" is in the vocabulary already; leave it out'):
        luthier.sft(model, data=rows, adapter=settings.adapter, epochs=1, output=tmp_path / "twice")


def test_generate_encodes_new_tokens_with_the_adapters_tokenizer(base: Path, rows: Path, tmp_path: Path) -> None:
    run_recipe(recipe(base, rows, tmp_path / "run"))
    adapter = tmp_path / "run" / "00-sft" / "adapter"
    arguments = ["3 <plan>?", "--model", str(base), "--adapter", str(adapter), "--max-new-tokens", "4"]
    done = CliRunner().invoke(command("generate"), arguments, catch_exceptions=False)
    assert done.exit_code == 0
    (adapter / "tokenizer_config.json").unlink()  # the settings have the tokens too
    again = CliRunner().invoke(command("generate"), arguments, catch_exceptions=False)
    assert again.output == done.output


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (("<|im_end|>",), 'new_tokens: "<|im_end|>" is in the vocabulary already; leave it out'),
        (("a",), 'new_tokens: "a" is in the vocabulary already; leave it out'),
    ],
)
def test_a_token_that_exists_is_refused(
    tokens: tuple[str, ...], sentence: str, chat_model: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=sentence.replace("|", r"\|")):
        run_recipe(recipe(chat_model, rows, tmp_path / "run", tokens))


def test_tied_layers_that_are_stored_twice_both_get_the_rows(chat_model: Path, rows: Path, tmp_path: Path) -> None:
    """Some files hold the output layer's weight although it is the embedding's."""
    model = LlamaForCausalLM.from_pretrained(chat_model)
    model.config.tie_word_embeddings = True
    AutoTokenizer.from_pretrained(chat_model).save_pretrained(tmp_path / "base")
    model.config.save_pretrained(tmp_path / "base")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    run_recipe(recipe(tmp_path / "base", rows, tmp_path / "run"))
    merged = weights(tmp_path / "run" / "model")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert len(merged["lm_head.weight"]) == len(state["lm_head.weight"]) + 2


def test_known_tokens_are_merged_where_they_were_trained(base: Path, tmp_path: Path) -> None:
    """PEFT trains them in the embedding alone unless both layers are named or tied."""
    network = LlamaForCausalLM.from_pretrained(base)
    theirs = peft.get_peft_model(network, peft.LoraConfig(r=2, trainable_token_indices=[7], target_modules=["v_proj"]))
    for name, parameter in theirs.named_parameters():
        if "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged = load(str(merge_into(resolve(str(base)), tmp_path / "adapter", tmp_path / "merged").folder))
    with torch.no_grad():
        found = [m(torch.tensor([[3, 7, 9]], device=m.device)).logits.cpu() for m in (theirs, merged.network)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_a_base_model_learns_a_template_whose_markers_are_new(chat_model: Path, rows: Path, tmp_path: Path) -> None:
    """The merged model's generation stops where its answers now end."""
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|done|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    adapter = LoRA(r=2, new_tokens=("<|turn|>", "<|done|>"))
    settings = {"data": str(rows), "model": str(chat_model), "dtype": "fp32", "max_steps": 2}
    stage = SFT(**settings, adapter=adapter, chat_template=str(template))
    model = load(str(chat_model))
    prepared, _ = train("sft", stage, model, tmp_path / "run")
    done = model.tokenizer.convert_tokens_to_ids("<|done|>")
    assert all(done in one.token_ids[one.trained] for one in prepared.train)
    merged = load(str(merge_into(model.source, tmp_path / "run" / "adapter", tmp_path / "merged").folder))
    assert done in merged.network.generation_config.eos_token_id
    assert done in stop_token_ids(merged.tokenizer)


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(
    chat_model: Path, rows: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    LlamaForCausalLM.from_pretrained(chat_model).save_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match=r"cannot be trained, for the model has \d+ rows"):
        run_recipe(recipe(tmp_path / "base", rows, tmp_path / "run"))
