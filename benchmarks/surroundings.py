"""A training step under allocators and numbers of threads: ``python -m benchmarks.surroundings``.

The step is that of the default encoder layer (width 512, 8 heads, causal, B = 4, N = 1024) on the
CPU. Each row is a process of its own: seconds on the clock and of the processor, and page faults,
the least of some steps. ``--instruction-set avx2`` lowers that of this library, PyTorch and MKL.
docs/benchmarks.md, "Threads and memory on the CPU", shows the results.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import measure

KEEPS = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296"
ALLOCATORS = {
    "glibc": {},
    "glibc that keeps its memory": {"GLIBC_TUNABLES": KEEPS},
    "the same with huge pages": {"GLIBC_TUNABLES": f"glibc.malloc.hugetlb=1:{KEEPS}"},
    "tcmalloc": {"LD_PRELOAD": "tcmalloc_minimal"},
    "jemalloc": {"LD_PRELOAD": "jemalloc"},
    "jemalloc that keeps its memory": {
        "LD_PRELOAD": "jemalloc",
        "MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1",
    },
}
WAITS = {"actively": {}, "passively": {"OMP_WAIT_POLICY": "passive"}}
AVX2 = {
    "TORCH_SPE_CPU_CAPABILITY": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def step(threads: int, repeats: int) -> dict:
    """Least wall-clock and processor milliseconds, and page faults, of a step of this process."""
    import torch

    from torch_spe import SPETransformerEncoderLayer, build_info

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layer = SPETransformerEncoderLayer(512, 8, batch_first=True)
    x = torch.randn(4, 1024, 512, requires_grad=True)
    steps = []
    for _ in range(repeats + 1):
        before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        layer(x, is_causal=True).sum().backward()
        layer.zero_grad()
        x.grad = None
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        steps.append((seconds * 1e3, used * 1e3, after.ru_minflt - before.ru_minflt))
    columns = zip(*steps[1:], strict=True)
    found = dict(zip(("ms", "processor ms", "page faults"), map(min, columns), strict=True))
    return {**found, "instruction set": build_info()["instruction_set"]}


def measured(threads: int, repeats: int, variables: dict[str, str]) -> dict | None:
    """The same in a process with these variables; None where there is no such allocator."""
    variables = dict(variables)
    if "LD_PRELOAD" in variables:
        library = ctypes.util.find_library(variables["LD_PRELOAD"])
        if library is None:
            return None
        variables["LD_PRELOAD"] = library
    command = [sys.executable, "-m", "benchmarks.surroundings", "--step", str(threads)]
    output = subprocess.run(
        [*command, "--repeats", str(repeats)],
        env={**os.environ, **variables},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return json.loads(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="steps of each process")
    parser.add_argument("--instruction-set", choices=("avx2",), help="a lower one than there is")
    parser.add_argument("--step", type=int, metavar="THREADS", help="measure this process alone")
    parser.add_argument("--output", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(step(arguments.step, arguments.repeats)))
        return
    lower = AVX2 if arguments.instruction_set == "avx2" else {}
    cores = len(os.sched_getaffinity(0))
    work = [("glibc", t, w) for t in sorted({1, cores, 2 * cores}) for w in WAITS]
    work += [(name, 1, "actively") for name in ALLOCATORS if name != "glibc"]
    rows = []
    for allocator, threads, waits in work:
        variables = {**ALLOCATORS[allocator], **WAITS[waits], **lower}
        # With more threads than cores a step takes many times as long.
        repeats = arguments.repeats if threads <= cores else 1
        found = measured(threads, repeats, variables)
        if found is None:
            print(f"{allocator}: not installed")
            continue
        rows.append({"allocator": allocator, "threads": threads, "waits": waits, **found})
        print(
            f"{allocator:32}{threads} threads, wait {waits:10}{found['ms']:8.0f} ms, of the "
            f"processor {found['processor ms']:6.0f}, {found['page faults']:.0f} page faults",
            flush=True,
        )
    if arguments.output:
        os.environ.update(lower)
        content = {**measure.provenance("benchmarks.surroundings"), "cores": cores, "rows": rows}
        content["instruction set"] = rows[0]["instruction set"]
        measure.write(arguments.output, content)


if __name__ == "__main__":
    main()
