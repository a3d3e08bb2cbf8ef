"""The benchmarks time nothing of which the results differ, whichever implementation fits."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_spe

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import measure, pieces, surroundings
from benchmarks.__main__ import check, measure_case
from benchmarks.cases import CHUNK, LAYERS, Case, Implementation, decay, layer
from benchmarks.communication import Machine as Link
from benchmarks.communication import Model, count, state_messages, step_seconds
from benchmarks.communication import main as main_of_communication
from benchmarks.decode import decode
from benchmarks.measure import Machine


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


def test_bytes_to_move_are_known_when_the_first_does_not_fit():
    x = torch.ones(1000, requires_grad=True)
    case = case_of(torch_spe=does_not_fit, other=lambda: (x * 2,))
    for implementation in case.implementations:
        implementation.inputs = [x]
    case.implementations[1].rated = True
    machine = Machine("a machine", 1, 1.0, 1.0)  # that moves 1 GB/s
    absent, row = measure_case(case, "cpu", 0.01, machine)
    assert absent["forward left out"] == "out of memory"
    for direction, moved in (("forward", 8000), ("forward+backward", 3 * 4000 + 2 * 4000)):
        found = row[f"{direction} share of the bandwidth"] * row[f"{direction} ms"] * 1e6
        assert found == pytest.approx(moved)


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.long)])
def test_every_form_of_a_decay_is_checked_and_timed(causal):
    case = decay(1, 40, "cpu", torch.float32, causal, heads=2, features=8, values=8)
    check(case, torch.float32)
    rows = measure_case(case, "cpu", 0.001, Machine("a machine", 1, 1.0, 1.0))
    names = [row["implementation"].removeprefix("torch_spe, log_decay ") for row in rows]
    assert names == ["torch_spe", "[H]", "[B, N, H]", "[H, R]", "[B, N, H, R]"]
    assert all(row["forward+backward ratio"] > 0 for row in rows)
    case.implementations[-1].run = lambda: (torch.zeros(1, 40, 2, 8),)
    with pytest.raises(SystemExit, match="materializing reference differ"):
        check(case, torch.float32)


@pytest.mark.long
def test_layers_are_timed_with_and_without_a_decay():
    case = layer(1, 16, "cpu", torch.float32, model=32, heads=2)
    rows = measure_case(case, "cpu", 0.001, Machine("a machine", 1, 1.0, 1.0))
    assert {"torch_spe", "(torch_spe, exact sines, no decay)"} <= set(LAYERS)
    assert not any("forward left out" in row for row in rows)
    assert [row["implementation"] for row in rows][: len(LAYERS)] == list(LAYERS)


@pytest.mark.long
def test_steps_of_generation_are_timed():
    case = decode(1, 20, "cpu", torch.float32, model=16, heads=2)
    machine = Machine("a machine", 1, 1.0, 1.0)
    rows = measure_case(case, "cpu", 0.01, machine)
    assert all("forward ms" in row for row in rows)
    assert len(rows) == len(case.implementations)


@pytest.mark.parametrize("ranks", [4, 16])
def test_bytes_that_ranks_send_are_counted(ranks):
    model = Model(width=32, heads=2)
    messages, pieces = state_messages(ranks)
    assert messages == pieces == {4: 3, 16: 5}[ranks]
    # The rank in the middle sends in every step but, with doubling, the last one backward.
    sent = 4 * pieces * model.state, 4 * (pieces - (ranks > 8)) * model.state
    assert count(ranks, ranks // 2 - 1, True, model) == sent
    state = model.state - model.heads  # no shares
    sent = 2 * 4 * state * (ranks - 1) // ranks
    assert count(ranks, 1, False, model, position="exact") == (sent, sent)
    times = step_seconds(ranks, 1000, model, Link())
    assert times[0] > times[1] > 0
    assert times[2] >= times[3] > 0


def test_exchanges_are_timed(tmp_path, capsys):
    main_of_communication(["--time", "--ranks", "2", "--repeats", "1", "--output",
                           str(tmp_path / "times.json")])  # fmt: skip
    (row,) = json.loads((tmp_path / "times.json").read_text())["rows"]
    assert row["ranks"] == 2
    assert min(row["all_gather_least"], row["doubling_median"]) > 0
    assert "| 2 |" in capsys.readouterr().out


def test_executed_products_of_attention():
    header = Path(__file__).resolve().parents[2] / "csrc/cpu/attention/segments.h"
    assert f"kChunk = {CHUNK};" in header.read_text()
    case = decay(1, 128, "cpu", torch.float32)
    # Forward of a token and head: weights and values of half of 64 tokens, the state twice.
    assert case.executed == 128 * 8 * (2 * 64 * 64 / 2 * 2 + 2 * 2 * 64 * 64)
    assert decay(1, 128, "cpu", torch.float32, causal=False).executed == 0
    row = measure_case(case, "cpu", 0.1, Machine("", 1, 100.0, 10.0))[0]
    for direction, work in (
        ("forward", case.executed), ("forward+backward", case.executed + case.executed_backward)
    ):  # fmt: skip
        share = row[f"{direction} share executed"]
        assert share * 100e9 * row[f"{direction} ms"] / 1e3 == pytest.approx(work)


def test_results_say_where_they_come_from(monkeypatch):
    monkeypatch.setenv("TORCH_SPE_CPU_CAPABILITY", "avx2")
    monkeypatch.setattr(sys, "argv", ["main", "attention", "--length", "8"])
    found = measure.provenance("benchmarks")
    assert found["command"] == "python -m benchmarks attention --length 8"
    assert found["environment"]["TORCH_SPE_CPU_CAPABILITY"] == "avx2"
    assert found["instruction set"] == torch_spe.build_info()["instruction_set"]
    assert found["commit"]


@pytest.mark.parametrize("name", pieces.INSTRUCTION_SETS)
def test_the_pieces_of_kernels_compile_as_the_kernels_do(name):
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("another architecture")
    flags = pieces.options(name)
    assert "-O3" in flags
    assert f"-m{name}{'f' if name == 'avx512' else ''}" in flags
    root = Path(pieces.__file__).parent
    csrc = root.parent / "csrc"
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-fopenmp", "-fsyntax-only", "-Wall"]
    command += [*flags, f"-DTORCH_SPE_ISA={name}", f"-I{csrc}", f"-I{csrc / 'cpu'}"]
    subprocess.run([*command, "-Werror", str(root / "pieces.cpp")], check=True)


def test_a_step_is_measured_in_a_process_with_its_variables():
    found = surroundings.measured(1, 1, {"TORCH_SPE_CPU_CAPABILITY": "baseline"})
    assert found["instruction set"] == "baseline"
    assert found["ms"] > 0
    assert found["processor ms"] > 0
    assert surroundings.measured(1, 1, {"LD_PRELOAD": "no_such_allocator"}) is None
