"""The example for torchrun on two processes: losses do not depend on how ranks divide the work."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from distributed.train import parse, train

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.cpu_only
SIZES = "--batch 4 --length 31 --width 16 --heads 2 --layers 2 --report 100 --steps "


def losses(arguments):
    return train(parse(("--device cpu " + SIZES + arguments).split()))


def run_on_two(folder):
    expected = losses("6")
    sequence = losses("6 --sequence-ranks 2")
    assert sequence == pytest.approx(expected, rel=1e-4)
    for parallel in ("ddp", "fsdp"):
        common = f" --parallel {parallel} --activation-checkpointing"
        checkpoint = f" --checkpoint {folder}/{parallel}"
        got = losses(f"4 --sequence-ranks 2 {common}{checkpoint}")
        assert got == pytest.approx(expected[:4], rel=1e-4)
        low = losses(f"2 --sequence-ranks 2 --bfloat16 {common}")
        assert low == pytest.approx(expected[:2], rel=0.02)
        assert low != got[:2]
    # Noise and dropout: other values on each rank, and no rank waits for another.
    assert losses("2 --sequence-ranks 2 --position sine --dropout 0.1") != expected[:2]
    if dist.get_rank() == 0:
        torch.save(expected, f"{folder}/expected.pt")


def run_on_four(expected):
    """Two sequences' ranks in each of two rows: a mesh of two dimensions."""
    for parallel in ("ddp", "fsdp"):
        got = losses(f"2 --sequence-ranks 2 --parallel {parallel}")
        assert got == pytest.approx(expected, rel=1e-4)


def test_two_processes_and_resume_on_one(tmp_path):
    run_on_ranks(run_on_two, 2, tmp_path, str(tmp_path))
    expected = torch.load(tmp_path / "expected.pt")
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/one")
    try:
        for parallel in ("ddp", "fsdp"):
            resumed = losses(f"6 --parallel {parallel} --checkpoint {tmp_path}/{parallel}")
            assert resumed == pytest.approx(expected[4:], rel=1e-4)
    finally:
        dist.destroy_process_group()
    (tmp_path / "four").mkdir()
    run_on_ranks(run_on_four, 4, tmp_path / "four", expected[:2])


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
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/one")
    try:
        expected = losses("4")
    finally:
        dist.destroy_process_group()
    assert list((got | resumed).values()) == pytest.approx(expected, rel=1e-3)
