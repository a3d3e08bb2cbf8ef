"""The example for torchrun on two processes: losses do not depend on how ranks divide the work."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import error
from ranks import run_on_ranks
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from distributed.train import parse, train

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.cpu_only
SIZES = "--batch 4 --length 31 --width 16 --heads 2 --layers 2 --report 100 --steps "
NOISY = " --position sine"


def losses(arguments):
    return train(parse(("--device cpu " + SIZES + arguments).split()))


def gradients(arguments):
    """The gradients of the first step: losses under AdamW would be the same with any factor."""
    found = []

    def keep(optimizer, *arguments):
        groups = [group["params"] for group in optimizer.param_groups]
        grads = [p.grad for params in groups for p in params if p.grad is not None]
        found.extend(g.full_tensor() if isinstance(g, DTensor) else g.clone() for g in grads)

    hook = register_optimizer_step_pre_hook(keep)
    try:
        losses("1 " + arguments)
    finally:
        hook.remove()
    return found


def compare_gradients(arguments, expected):
    got = gradients(arguments)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert error(a, b) < 1e-4, arguments


def run_on_two(folder, expected, expected_gradients):
    sequence = losses("6 --sequence-ranks 2")
    assert sequence == pytest.approx(expected, rel=1e-4)
    compare_gradients("", expected_gradients)  # sequences of a batch on each rank
    for parallel in ("ddp", "fsdp"):
        common = f" --parallel {parallel} --activation-checkpointing"
        checkpoint = f" --checkpoint {folder}/{parallel}"
        got = losses(f"4 --sequence-ranks 2 {common}{checkpoint}")
        assert got == pytest.approx(expected[:4], rel=1e-4)
        compare_gradients(f"--sequence-ranks 2 {common}", expected_gradients)
        low = losses(f"2 --sequence-ranks 2 --bfloat16 {common}")
        assert low == pytest.approx(expected[:2], rel=0.02)
        assert low != got[:2]
    # Dropout is each rank's own: a run repeats itself. Noise is one, also along four pieces: below.
    noisy = losses("2 --sequence-ranks 2" + NOISY)
    assert noisy != pytest.approx(expected[:2], rel=1e-4)
    dropped = [losses("2 --sequence-ranks 2 --dropout 0.1" + NOISY) for _ in range(2)]
    assert dropped[0] == dropped[1]
    assert dropped[0] != pytest.approx(noisy, rel=1e-4)
    if dist.get_rank() == 0:
        torch.save(noisy, f"{folder}/noisy.pt")


def run_on_four(expected, expected_gradients, noisy):
    """Two sequences' ranks in each of two rows: a mesh of two dimensions. Then all in one row."""
    for parallel in ("ddp", "fsdp"):
        common = f"--sequence-ranks 2 --parallel {parallel}"
        assert losses(f"2 {common}") == pytest.approx(expected, rel=1e-4)
        compare_gradients(common, expected_gradients)
    assert losses("2 --sequence-ranks 4" + NOISY) == pytest.approx(noisy, rel=1e-4)


@contextlib.contextmanager
def group_of_one(folder):
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{folder}")
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_two_processes_and_resume_on_one(tmp_path):
    with group_of_one(tmp_path / "alone"):
        expected, expected_gradients = losses("6"), gradients("")
    run_on_ranks(run_on_two, 2, tmp_path, str(tmp_path), expected, expected_gradients)
    with group_of_one(tmp_path / "one"):
        for parallel in ("ddp", "fsdp"):
            resumed = losses(f"6 --parallel {parallel} --checkpoint {tmp_path}/{parallel}")
            assert resumed == pytest.approx(expected[4:], rel=1e-4)
    (tmp_path / "four").mkdir()
    noisy = torch.load(tmp_path / "noisy.pt")
    run_on_ranks(run_on_four, 4, tmp_path / "four", expected[:2], expected_gradients, noisy)


def start_with_torchrun(ranks, arguments):
    """The losses that the script prints, by step."""
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    sizes = SIZES.replace("--report 100", "--report 1")
    done = subprocess.run(
        [*command, str(ranks), ROOT / "examples/distributed/train.py",
         *(sizes + arguments).split()],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"^step (\d+): loss (\S+)$", done.stdout, re.MULTILINE)
    return {int(step): float(loss) for step, loss in printed}


@pytest.mark.long
@pytest.mark.parametrize(("backend", "ranks"), [("gloo-cpu", (4, 2)), ("nccl-cuda", (2, 2))])
def test_started_by_torchrun_and_resumed(backend, ranks, tmp_path):
    """On fewer ranks, with gloo; NCCL wants a GPU for each rank."""
    device = backend.partition("-")[2]
    if device == "cuda" and torch.cuda.device_count() < max(ranks):
        pytest.skip(f"needs {max(ranks)} GPUs")
    options = f" --device {device} --sequence-ranks 2 --parallel fsdp --checkpoint {tmp_path}/model"
    got = start_with_torchrun(ranks[0], "2" + options)
    assert sorted(got) == [1, 2]
    resumed = start_with_torchrun(ranks[1], "4" + options)
    assert sorted(resumed) == [3, 4]  # the steps before are not made again
    with group_of_one(tmp_path / "one"):
        expected = losses("4")
    assert list((got | resumed).values()) == pytest.approx(expected, rel=1e-3)
