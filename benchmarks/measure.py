"""Time, peak memory and the machine's own limits."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import torch_spe


@dataclass
class Machine:
    """What the machine can do, measured in the same run as everything that is compared with it."""

    name: str
    threads: int
    gflops: float  # of a large matrix product: float32 on the CPU, of the type measured on a GPU
    gbytes: float  # of a large copy, bytes read plus bytes written
    instruction_set: str = ""  # of the CPU kernels that were used


def machine(device: str, dtype: torch.dtype) -> Machine:
    """Measure the limits of `device`."""
    n, dtype = (2048, torch.float32) if device == "cpu" else (8192, dtype)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**26, device=device)
    target = torch.empty_like(source)
    repeats = 7 if device == "cpu" else 20
    product = statistics.median(times(lambda: a @ b, device, repeats))
    copy = statistics.median(times(lambda: target.copy_(source), device, repeats))
    return Machine(
        processor() if device == "cpu" else torch.cuda.get_device_name(),
        torch.get_num_threads(),
        2 * n**3 / product / 1e9,
        2 * source.nbytes / copy / 1e9,
        torch_spe.build_info()["instruction_set"],
    )


# What changes what is measured.
VARIABLES = (
    *("TORCH_SPE_CPU_CAPABILITY", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS"),
    *("ONEDNN_MAX_CPU_ISA", "GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_CONF"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE"),
)


def provenance(module: str) -> dict:
    """Where results come from: date, command with its variables, commit, processor and torch."""
    here = Path(__file__).resolve().parent
    found = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": str(datetime.date.today()),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "commit": found.stdout.strip() or torch_spe.__version__,
        "processor": processor(),
        "instruction set": torch_spe.build_info()["instruction_set"],
        "torch": torch.__version__,
    }


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")


def write(file: Path, content: dict) -> None:
    """Write JSON, in a folder that need not exist."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")


def times(
    function: Callable[[], object], device: str, repeats: int, warm_up: bool = True
) -> list[float]:
    """Seconds of each call, after one that does not count unless all is warm.

    On a GPU one number, the mean: all calls are one burst between two events, since waiting for
    each would add the time of a launch. So the host prepares a call while the GPU is still at the
    one before, as when a model runs; where the host is the slower of the two, the time is its own.
    """
    if warm_up:
        function()
    if device != "cpu":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        return [begin.elapsed_time(end) / 1e3 / repeats]
    result = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        result.append(time.perf_counter() - begin)
    return result


def burst(seconds: float, device: str) -> int:
    """How many calls that take about `seconds` each are timed in a row."""
    if device == "cpu":
        return max(1, min(10, int(0.2 / seconds)))
    return max(1, min(100, int(0.01 / seconds)))


def free_memory(device: str) -> float:
    """Bytes that tensors may take on a GPU; the CPU's are not counted."""
    if device == "cpu":
        return float("inf")
    gc.collect()
    torch.cuda.empty_cache()
    return 0.9 * torch.cuda.mem_get_info()[0]


def peak_memory(function: Callable[[], object], device: str) -> int:
    """Bytes that a call needs at its peak beyond what was allocated before, results included."""
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    return _cpu_peak(function)


def _cpu_peak(function: Callable[[], object]) -> int:
    """Growth of the resident set."""
    page = 4096
    statm = Path("/proc/self/statm")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * page

    # Memory that malloc keeps for later would be used without showing.
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    # The kernel keeps the peak itself; writing 5 here resets it. Where that is not allowed, sample.
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident()
        result = function()
        status = Path("/proc/self/status").read_text()
        del result
        high = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(high.split()[1]) * 1024 - before
    except OSError:
        pass
    before = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = function()
    done.set()
    watcher.join()
    del result
    return peak - before
