"""What holds for all tests."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Test processes run side by side, one a core, and tiny tensors take ten times as long on contended threads."""
    torch.set_num_threads(1)
