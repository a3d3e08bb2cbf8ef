"""Fixtures of several test files."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Many small calls: on a busy machine threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
