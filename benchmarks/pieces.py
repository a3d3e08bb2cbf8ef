"""What the CPU kernels consist of, each part on its own: ``python -m benchmarks.pieces``.

Compiles ``pieces.cpp`` with the kernels' sources for each instruction set that the machine has, and
runs it on one thread. docs/method.md, "What limits the CPU", says what follows from it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from pathlib import Path

from benchmarks import measure

ROOT = Path(__file__).resolve().parent.parent
INSTRUCTION_SETS = ("avx2", "avx512")


def options(instruction_set: str) -> list[str]:
    """How the library compiles the kernels for an instruction set."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = []
    for name in ("KERNEL_OPTIONS", f"OPTIONS_{instruction_set}"):
        found += re.search(rf"set\({name} (.*)\)", text)[1].split()
    return found


def run(instruction_set: str, runs: int) -> list[dict]:
    """Compile and run the parts; return rows of name, batch and the best value of all runs."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "pieces"
        subprocess.run(
            [
                *(os.environ.get("CXX", "c++"), "-std=c++20", "-fopenmp"),
                *options(instruction_set),
                *(f"-DTORCH_SPE_ISA={instruction_set}", f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/cpu"),
                *(str(ROOT / "benchmarks" / "pieces.cpp"), "-o", str(program)),
            ],
            check=True,
        )
        best: dict[tuple[str, int], float] = {}
        for _ in range(runs):
            output = subprocess.run([program], check=True, stdout=subprocess.PIPE, text=True).stdout
            for line in output.splitlines():
                name, batch, value = line.split("|")
                key, better = (name, int(batch)), max if name.endswith("rate") else min
                best[key] = better(best.get(key, float(value)), float(value))
        for (name, batch), value in best.items():
            print(f"{instruction_set:8}{name:50}{batch:>4}{value:10.3f}", flush=True)
        return [{"part": part, "B": b, "value": value} for (part, b), value in best.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="of which the best value is kept")
    parser.add_argument("--output", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    rows = {name: run(name, arguments.runs) for name in INSTRUCTION_SETS if name in flags}
    if arguments.output:
        measure.write(arguments.output, {**measure.provenance("benchmarks.pieces"), "rows": rows})


if __name__ == "__main__":
    main()
