"""Run C++ tests and random calls of the operators under AddressSanitizer and UBSan.

Builds the library without CUDA in build/sanitize, by default for the baseline instruction set
alone, whose kernels are the same source with shorter vectors; the fuzz test then runs with the
sanitizers preloaded. ThreadSanitizer is not among them: GCC's OpenMP runtime is not compiled for
it, so that it sees no barriers and reports races between two loops of one parallel region. The
tests that want the same bits with any number of threads stand in its place.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# torch's own objects are compiled without sanitizers. Python's memory at its end is not a leak of
# ours; the operators make no allocation that outlives a call.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_container_overflow=0:check_initialization_order=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def run(*command, **variables):
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")
    shown = [str(part) for part in command]
    print(f"\n$ {' '.join(shown[:6])}{' ...' if len(shown) > 6 else ''}", flush=True)
    environment = {**os.environ, "PATH": path, **variables}
    return subprocess.run(shown, cwd=ROOT, env=environment).returncode == 0


def runtime(*names):
    """Paths of the sanitizers' libraries, for LD_PRELOAD: Python itself does not load them."""
    compiler = os.environ.get("CXX", "c++")
    return " ".join(
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in (*names, "libstdc++.so")
    )


def preloaded():
    """Variables with which a program runs code that is compiled with the sanitizers."""
    return {"LD_PRELOAD": runtime("libasan.so", "libubsan.so"), **OPTIONS}


def build(folder, instruction_sets):
    """Build library, Python module and C++ tests, and return where the package lies."""
    package = folder / "package"
    built = run(
        *(sys.executable, "setup.py", "--quiet", "build", "--build-lib", package),
        TORCH_SPE_BUILD_DIR=str(folder),
        TORCH_SPE_CUDA="0",
        TORCH_SPE_INSTRUCTION_SETS=instruction_sets,
        CMAKE_ARGS="-DCMAKE_BUILD_TYPE=RelWithDebInfo -DTORCH_SPE_SANITIZE=address,undefined "
        "-DTORCH_SPE_TESTS=ON",
    )
    if not built or not run("cmake", "--build", folder, "--target", "torch_spe_tests"):
        return None
    return package


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200, help="random calls of each operator")
    parser.add_argument(
        "--instruction-sets", default="baseline", help="as TORCH_SPE_INSTRUCTION_SETS of setup.py"
    )
    parser.add_argument("tests", nargs="*", default=["tests/python/test_fuzz.py"])
    arguments = parser.parse_args()
    folder = ROOT / "build" / "sanitize"
    package = build(folder, arguments.instruction_sets)
    if package is None:
        return 1
    programs = run(folder / "torch_spe_tests", "--gtest_brief=1", **OPTIONS)
    python = run(
        *(sys.executable, "-m", "pytest", "-x", "-n", "auto", "--dist", "worksteal"),
        *("-p", "no:cacheprovider", "-o", f"pythonpath={package}", *arguments.tests),
        **preloaded(),
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(package),
        TORCH_SPE_FUZZ_CALLS=str(arguments.calls),
    )
    return 0 if programs and python else 1


if __name__ == "__main__":
    sys.exit(main())
