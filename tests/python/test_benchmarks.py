"""The benchmarks time nothing of which the results differ, whichever implementation fits."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.__main__ import check
from benchmarks.cases import Case, Implementation


def does_not_fit():
    raise torch.OutOfMemoryError


def case_of(**runs):
    implementations = [Implementation(name, run, []) for name, run in runs.items()]
    return Case("square", {"N": 2}, 1.0, 1.0, implementations)


def test_implementations_that_agree_are_timed():
    case = case_of(a=lambda: (torch.ones(2),), b=lambda: (torch.ones(2) * (1 + 1e-7),))
    check(case, torch.float32)
    assert not any(i.left_out for i in case.implementations)


@pytest.mark.parametrize("wrong", ["a", "b"])
def test_implementations_that_differ_are_named(wrong):
    runs = {name: lambda name=name: (torch.full((2,), 1.0 + (name == wrong)),) for name in "ab"}
    with pytest.raises(SystemExit, match=r"square .*a and b differ by .*nothing was timed"):
        check(case_of(**runs), torch.float32)


def test_others_are_compared_when_the_first_does_not_fit():
    case = case_of(a=does_not_fit, b=lambda: (torch.ones(2),), c=lambda: (torch.zeros(2),))
    with pytest.raises(SystemExit, match="b and c differ"):
        check(case, torch.float32)
    assert [i.left_out for i in case.implementations] == ["out of memory", "", ""]
