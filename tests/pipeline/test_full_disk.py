"""A disk that gets full costs a sentence, and with room again the run ends as one that always had it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("full_disk.py")

RECIPE = """\
model: {model}
output: run
dtype: fp32
stages:
  - pretrain: {{data: {folder}/text.jsonl, max_length: 32, batch_size: 4, epochs: 1, learning_rate: 0.01,
      eval_fraction: 0.2, eval_every: 2, save_every: 2, adapter: {{r: 4, dropout: 0.1}}}}
  - sft: {{data: {folder}/rows.jsonl, batch_size: 4, epochs: 1, learning_rate: 0.01, save_every: 1, adapter: none}}
"""

Fill = Callable[..., dict[str, str]]


@pytest.fixture
def fill(chat_model: Path, tmp_path: Path) -> Fill:
    def fill(what: str, *sizes: int) -> dict[str, str]:
        """Runs the driver, which compares; returns the sentence by the size that was too small."""
        texts = [json.dumps({"text": f"{i} and {i} is {i + i}. " * 5}) for i in range(12)]
        rows = [json.dumps({"question": f"{i}?", "answer": f"{i}{i}."}) for i in range(24)]
        for name, lines in {"text.jsonl": texts, "rows.jsonl": rows}.items():
            (tmp_path / name).write_text("\n".join(lines))
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(RECIPE.format(model=chat_model, folder=tmp_path))
        command = [sys.executable, str(DRIVER), str(recipe), what, *map(str, sizes)]
        if what == "disk" and os.geteuid():
            command = ["unshare", "--user", "--map-root-user", "--mount", *command]
        environment = {**os.environ, "LUTHIER_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return fill


def can_mount(place: Path) -> bool:
    as_root = [] if not os.geteuid() else ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("mount") is None or (as_root and shutil.which("unshare") is None):
        return False
    mount = f"mount -t tmpfs luthier-test {place} && umount {place}"
    return subprocess.run([*as_root, "sh", "-c", mount], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_a_checkpoint_that_finds_no_room_costs_a_sentence(fill: Fill) -> None:
    (sentence,) = fill("file", 50_000).values()
    assert sentence.startswith(
        "luthier: run/00-pretrain/checkpoints/step-00000002: cannot be written (File too large; "
    )
    assert "MB are wanted" in sentence
    assert sentence.endswith("make room, or lower keep_last, and run again, which goes on from the checkpoint before")


@pytest.mark.slow
def test_whatever_finds_no_room_costs_a_sentence(fill: Fill) -> None:
    """The recipe, the metrics, a tokenizer, a checkpoint, a merged model, the checkpoint of a whole model."""
    sentences = fill("file", 600, 2_000, 5_000, 12_000, 50_000, 100_000, 200_000)
    assert len(sentences) == 7
    assert len({sentence.partition(": cannot")[0] for sentence in sentences.values()}) >= 4


@pytest.mark.slow
def test_a_disk_that_is_full_costs_a_sentence(fill: Fill, tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("takes the right to mount a file system")
    sizes = [20_480, 65_536, 122_880, 180_224, 241_664, 380_928, 442_368, 860_160, 1_298_432]
    assert len(fill("disk", *sizes)) == len(sizes)


def test_metrics_that_find_no_room_are_named(tmp_path: Path) -> None:
    """/dev/full takes nothing, as a full disk, and names no file by itself."""
    code = (
        "from pathlib import Path\nfrom luthier.training.callbacks import MetricsFile\n"
        "file = MetricsFile(Path('metrics.jsonl'))\nfile.on_start(0, 1)\nfile.file.close()\n"
        "file.file = open('/dev/full', 'a')\nfile.on_metrics({'step': 1})\n"
    )
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "No space left on device: 'metrics.jsonl'" in done.stderr
