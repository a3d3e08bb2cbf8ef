"""The examples in the docstrings run and print what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["", ".attention", ".functional", ".modules", ".noise"])
def test_examples(name):
    result = doctest.testmod(importlib.import_module(f"torch_spe{name}"))
    assert result.attempted > 0
    assert result.failed == 0
