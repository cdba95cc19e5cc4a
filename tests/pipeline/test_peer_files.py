"""Files that other tools train on are trained on as they are: every row is used or reported, and the loss falls."""

from pathlib import Path

import pytest
import torch

from luthier.models.load import load
from luthier.pipeline.run import run_recipe
from luthier.recipe import parse_recipe
from luthier.training.callbacks import read_metrics

DATA = Path(__file__).parents[3] / "shared" / "data"
TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"

RECIPE = """\
model: {model}
output: {output}
dtype: fp32
stages:
  - sft: {{data: {data}, chat_template: {template}, max_length: 6000, batch_size: 2, max_steps: 10,
      learning_rate: 0.01, schedule: constant, adapter: none}}
"""


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("alpaca_en", "none"),
        pytest.param("gsm8k_train", "none", marks=pytest.mark.slow),
        pytest.param("glaive_toolcall_en", "none", marks=pytest.mark.slow),
        pytest.param("glaive_toolcall_en", TEMPLATES / "qwen25.jinja", marks=pytest.mark.slow),
    ],
)
def test_a_peers_file_trains_without_conversion(
    name: str, template: str | Path, chat_model: Path, tmp_path: Path
) -> None:
    """The model's own template knows no tools, so calls and results take the plain form; qwen25 has turns for them."""
    data = DATA / f"{name}.jsonl"
    if not data.exists():
        pytest.skip(f"{data} is not here")
    run = tmp_path / "run"
    recipe = RECIPE.format(model=chat_model, output=run, data=data, template=template)
    (summary,) = run_recipe(parse_recipe(recipe))
    rows, used = len(data.read_text(encoding="utf-8").strip().split("\n")), summary.counts["sequences"]
    assert rows == summary.counts["rows"] == used + summary.counts["dropped_long"] + summary.counts["bad"]
    assert (summary.counts["bad"], used > 0.9 * rows) == (0, True)
    losses = [line["loss"] for line in read_metrics(run / "00-sft" / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 1
    model = load(str(run / "model"))
    assert torch.isfinite(model.network(torch.tensor([model.tokenizer.encode("What is 2 + 2?")])).logits).all()
