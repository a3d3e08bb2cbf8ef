"""Run tests, format and lint checks, and end with one summary. `make test` calls it.

A part that fails does not keep the others from running. Arguments go to pytest. With --long also
the long tests, and those of the kernels under sanitizers and for lower instruction sets, which is
what continuous integration runs. With --all all combinations of parameters too, more random calls,
and PTX for a second architecture. With --fix, rewrites the sources in the project style instead.

TORCH_SPE_CHECK_BEGIN_BY, in seconds since 1970, is when the last part that --long adds may begin:
machines of continuous integration differ by a factor of two, and end what takes too long. What is
left out counts as skipped.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import sanitize

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("TORCH_SPE_BUILD_DIR") or ROOT / "build" / "cmake").resolve()
CPP_FOLDERS = ("csrc", "tests", "examples")
CPP_SUFFIXES = {".cpp", ".h", ".cu", ".cuh"}


# A process for each core, with one thread each.
PARALLEL = ("-n", "auto", "--dist", "worksteal")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
CPU_TESTS = tuple(
    f"tests/python/test_{name}.py"
    for name in (
        *("linear_attention", "decay", "sine_attention", "sine_filter", "sine_features"),
        *("phasor_filter", "conv_filter", "codes", "noise", "noise_kinds", "state"),
        *("generation", "fuzz"),
    )
)
CUDA_TESTS = ("tests/python/test_cuda_kernels.py", "tests/python/test_cuda_decay.py")


class Result(NamedTuple):
    name: str
    passed: int
    failed: int
    skipped: int


def run(*command, **variables):
    """Run one command of this environment, with more variables; return whether it succeeded."""
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")
    shown = [str(part) for part in command]
    print(f"\n$ {' '.join(shown[:6])}{' ...' if len(shown) > 6 else ''}", flush=True)
    environment = {**os.environ, "PATH": path, **variables}
    return subprocess.run(shown, cwd=ROOT, env=environment).returncode == 0


def check(name, *command):
    passed = run(*command)
    return Result(name, int(passed), int(not passed), 0)


def count(name, succeeded, report):
    """Count the cases of a JUnit report. Failing without a failed case (a crash) counts too."""
    total = failed = skipped = 0
    if report.is_file():
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            total += int(suite.get("tests", 0))
            failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            skipped += int(suite.get("skipped", 0)) + int(suite.get("disabled", 0))
    passed = total - failed - skipped
    if not succeeded or passed == 0:
        failed = max(failed, 1)
    return Result(name, passed, failed, skipped)


def has_nvcc():
    folder = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return bool(shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(folder, "bin")))


def cpp_tests(report, level):
    options, targets = ["-DTORCH_SPE_TESTS=ON"], ()
    if level:
        targets = ("--target", "all", "torch_spe_emulated_sanitized")
    if level == "all" and has_nvcc():
        options.append("-DTORCH_SPE_VIRTUAL_GPU=80 90")
    # One process, not one for each test as with ctest, which would mostly load torch. Its threads
    # wait without spinning, which takes ten times as long where others use the processors too.
    succeeded = (
        run("cmake", *options, BUILD)
        and run("cmake", "--build", BUILD, *targets)
        and run(
            *(BUILD / "torch_spe_tests", f"--gtest_output=xml:{report}", "--gtest_brief=1"),
            OMP_WAIT_POLICY="passive",
        )
    )
    return count("C++ tests", succeeded, report)


def python_tests(report, arguments, level):
    variables = {}
    if level:
        variables["TORCH_SPE_TEST_LEVEL"] = level
        arguments = ["-rs", *arguments]  # what is skipped, and why
    if level == "all":
        variables["TORCH_SPE_FUZZ_CALLS"] = os.environ.get("TORCH_SPE_FUZZ_CALLS", "4000")
    succeeded = run(
        *(sys.executable, "-m", "pytest", f"--junitxml={report}", *PARALLEL, *arguments),
        **ONE_THREAD,
        **variables,
    )
    return count("Python tests", succeeded, report)


def lower_instruction_sets():
    """Those below the one that the tests run with, best first."""
    command = "import torch_spe; print(torch_spe.build_info()['instruction_set'])"
    used = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    names = ["avx512", "avx2", "baseline"]
    used = used.stdout.strip()
    return names[names.index(used) + 1 :] if used in names else []


def older_processor_tests(name, report):
    """The CPU kernels as compiled for a lower instruction set."""
    succeeded = run(
        *(sys.executable, "-m", "pytest", f"--junitxml={report}", *PARALLEL),
        *("-p", "no:cacheprovider", *CPU_TESTS),
        **ONE_THREAD,
        TORCH_SPE_CPU_CAPABILITY=name,
    )
    return count(name, succeeded, report)


def more_cuda_tests(name, executor, report, **variables):
    """As many runs of the CUDA kernels as in `make test`, in another way."""
    succeeded = run(
        *(sys.executable, "-m", "pytest", f"--junitxml={report}", *PARALLEL),
        *("-p", "no:cacheprovider", *CUDA_TESTS, "-k", executor),
        **ONE_THREAD,
        **variables,
    )
    return count(name, succeeded, report)


def older_gpu_tests(name, report):
    """What nvcc makes of the CUDA kernels for compute_80; `make test` runs those for compute_90."""
    return more_cuda_tests(name, "virtual_gpu", report, TORCH_SPE_VIRTUAL_GPU="80")


def sanitized_emulation_tests(name, report):
    """The emulated kernels under AddressSanitizer and UBSan."""
    return more_cuda_tests(
        *(name, "emulated", report),
        TORCH_SPE_EMULATION="libtorch_spe_emulated_sanitized.so",
        TORCH_SPE_SCHEDULES="random:2",
        **sanitize.preloaded(),
    )


def sanitizers(name, _report):
    """The C++ tests and random calls under AddressSanitizer and UBSan."""
    return check(name, sys.executable, "scripts/sanitize.py")


def more_parts(level):
    """What --long and --all add after the Python tests: names, and functions of name and report."""
    if not level:
        return []
    parts = [("sanitized CUDA", sanitized_emulation_tests)]
    parts += [(name, older_processor_tests) for name in lower_instruction_sets()]
    if level == "all" and has_nvcc():
        parts.append(("compute_80", older_gpu_tests))
    return [*parts, ("sanitizers", sanitizers)]


def may_begin():
    return time.time() < float(os.environ.get("TORCH_SPE_CHECK_BEGIN_BY", "inf"))


def left_out(name):
    print(f"\n{name}: left out, as no time is left (TORCH_SPE_CHECK_BEGIN_BY)", flush=True)
    return Result(name, 0, 0, 1)


def cpp_sources():
    files = (path for folder in CPP_FOLDERS for path in (ROOT / folder).rglob("*"))
    return sorted(path.relative_to(ROOT) for path in files if path.suffix in CPP_SUFFIXES)


def main(arguments):
    sources = cpp_sources()
    ruff = (sys.executable, "-m", "ruff")
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    if arguments == ["--fix"]:
        fixed = [
            run("clang-format", "-i", *sources),
            run(*ruff, "check", "--fix", "."),
            run(*ruff, "format", "."),
        ]
        return 0 if all(fixed) else 1

    level = "all" if "--all" in arguments else "long" if "--long" in arguments else ""
    arguments = [argument for argument in arguments if argument not in ("--all", "--long")]
    with tempfile.TemporaryDirectory() as reports:
        results = [
            cpp_tests(Path(reports) / "cpp.xml", level),
            python_tests(Path(reports) / "python.xml", arguments, level),
            check("clang-format", "clang-format", "--dry-run", "-Werror", *sources),
            check("ruff format", *ruff, "format", "--check", "."),
            check("ruff check", *ruff, "check", "."),
        ]
        for name, part in more_parts(level):
            report = Path(reports) / f"{name}.xml"
            results.append(part(name, report) if may_begin() else left_out(name))
    print(f"\n{'':14}{'passed':>8}{'failed':>8}{'skipped':>9}")
    for result in results:
        print(f"{result.name:14}{result.passed:8}{result.failed:8}{result.skipped:9}")
    passed = sum(result.passed for result in results)
    failed = sum(result.failed for result in results)
    print(f"\n{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
