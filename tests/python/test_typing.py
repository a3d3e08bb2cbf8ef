"""Types of the public interface: a user's script is right for the checker and for Python."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_typed_script_runs():
    output = subprocess.check_output(
        [sys.executable, "tests/typing/user.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "python")},
        text=True,
    )
    assert output.splitlines()[0] == "operators (1, 8, 2, 4)"


@pytest.mark.long
def test_package_and_script_are_typed():
    checked = subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert re.search(r"no issues found in \d{2,} source files", checked.stdout)
