"""The emulation finds bugs: planted ones in the sine filter's kernels make its self-test fail."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["-std=c++20", "-O1", "-g1", "-fno-strict-aliasing", "-fsanitize=address,undefined",
           "-fno-sanitize-recover=all", "-DTORCH_SPE_CUDA_EMULATION"]  # fmt: skip

# What to replace in which file of csrc/cuda, the first time it stands after an anchor.
BUGS = {
    "none": None,
    "dropped barrier of the forward kernel": (
        "sine_filter.cu", "// One barrier is enough", "__syncthreads();", ""),
    "dropped barrier of the backward kernel": (
        "sine_filter.cu", "backward_data_kernel(", "__syncthreads();  // the basis before", "//"),
    "divergent barrier": (
        "sine_filter.cu", "backward_weight_kernel(", "__syncthreads();",
        "if (threadIdx.x < 64) { __syncthreads(); } else { __syncthreads(); }"),
    "barrier that some threads leave out": (
        "sine_filter.cu", "backward_weight_kernel(", "__syncthreads();",
        "if (threadIdx.x < 64) __syncthreads();"),
    "missing wait for a copy": (
        "sine_filter.cu", "forward_kernel(", "copy_async_wait();", ""),
    "store beyond the last position": (
        "sine_filter.cu", "forward_kernel(", "n >= p.length", "n > p.length"),
    "tile too small by one row": (
        "sine_filter.cu", "struct ForwardShared", "2 * kProducts", "2 * kProducts - 8"),
    "uninitialised rows of a tile": (
        "tiles.h", "copy_tile(", "from[column + e].bits", "to[e].bits"),
    "wrong row of the result's fragment": (
        "tile_product.h", "for_each(", "8 * (e / 2)", "4 * (e / 2)"),
    "wrong row of an operand's fragment": (
        "tile_product.h", "multiply_16_bit(", "const int low = lane % 8 + lane / 8 % 2 * 8",
        "const int low = lane % 8 + lane / 16 * 8"),
    "misaligned rows for ldmatrix": (
        "tile_product.h", "constexpr int kPadding", "? 8", "? 4"),
    "missing part of a sum": (
        "tiles.h", "sum_parts_kernel(", "part < count", "part + 1 < count"),
}  # fmt: skip


def plant(folder, bug):
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    if bug is None:
        return
    name, anchor, old, new = bug
    path = folder / "csrc" / "cuda" / name
    before, found, after = path.read_text().partition(anchor)
    assert found, f"{name} has no {anchor}"
    assert old in after, f"{name} has no {old} after {anchor}"
    path.write_text(before + found + after.replace(old, new, 1))


def selftest(folder, bug):
    """Compile the self-test with a bug and run it; return its status and output."""
    plant(folder, bug)
    emulation = ROOT / "tests" / "cuda_emulation"
    includes = [f"-I{folder}/csrc", f"-I{folder}/csrc/cuda", f"-I{emulation}"]
    program = folder / "selftest"
    subprocess.run(["g++", *OPTIONS, *includes, emulation / "selftest.cpp",
                    emulation / "cuda_emulation.cpp", "-o", program],
                   check=True, capture_output=True, text=True)  # fmt: skip
    result = subprocess.run([program], capture_output=True, text=True, timeout=300)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    with ThreadPoolExecutor(2) as pool:
        tasks = {
            name: pool.submit(selftest, tmp_path_factory.mktemp("bug"), bug)
            for name, bug in BUGS.items()
        }
        return {name: task.result() for name, task in tasks.items()}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug(results, name):
    status, output = results[name]
    if name == "none":
        assert status == 0, output
        assert output == "good\n"
    else:
        assert status != 0, "not caught"
