"""docs/layers.md runs."""

import re
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.cpu_only
PAGE = Path(__file__).resolve().parents[2] / "docs" / "layers.md"


def test_the_page_runs():
    torch.manual_seed(0)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(block, names)
