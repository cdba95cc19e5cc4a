"""Every architecture that runs on Luthier's attention sees through its window what transformers lets it see."""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from luthier.kernels.streams import Segments
from luthier.models.attention import ATTENTION, RAGGED, register_attention, supports_ragged

Factory = Callable[..., PreTrainedModel]

WINDOW, LENGTHS = 8, (24, 11)
KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
MIXED = {"sliding_window": WINDOW, **KINDS}
WINDOWED = {
    **{name: MIXED for name in ("cohere2", "exaone4", "gemma3_text", "olmo3")},
    **{name: {"use_sliding_window": True, **MIXED} for name in ("qwen2", "qwen2_moe", "qwen3", "smollm3")},
    **{name: {"sliding_window": WINDOW} for name in ("mistral", "mixtral", "phi3", "starcoder2")},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": WINDOW},
}
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "pad_token_id": 0}


@pytest.fixture
def tiny(network: Factory) -> Factory:
    def build(name: str, **settings: object) -> PreTrainedModel:
        register_attention()
        built = network(name, **(SIZES | WINDOWED[name] | settings))
        assert supports_ragged(built.config)
        built.set_attn_implementation(ATTENTION)
        return built

    return build


@pytest.mark.parametrize("name", sorted(WINDOWED))
@torch.no_grad()
def test_windowed_rows_and_streams_of_them_equal_transformers_own(tiny: Factory, name: str) -> None:
    """To 1e-5: float32 sums of other order, over two layers."""
    model = tiny(name)
    ids = torch.randint(97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    stream = model(ids, position_ids=positions, segments=Segments.alone(LENGTHS), use_cache=False).logits
    alone = [model(row, use_cache=False).logits for row in ids.split(LENGTHS, dim=1)]
    model.set_attn_implementation("eager")
    expected = [model(row, use_cache=False).logits for row in ids.split(LENGTHS, dim=1)]
    torch.testing.assert_close(torch.cat(alone, 1), torch.cat(expected, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(stream, torch.cat(expected, 1), rtol=0, atol=1e-5)
    wide = tiny(name, sliding_window=100)(ids[:, : LENGTHS[0]], use_cache=False).logits
    assert not torch.allclose(wide, expected[0], atol=1e-4)  # or the above would show nothing


def test_no_architecture_with_a_window_is_left_out() -> None:
    with_window = {name for name in RAGGED if hasattr(AutoConfig.for_model(name), "sliding_window")}
    assert with_window == set(WINDOWED)
