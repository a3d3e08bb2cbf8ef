"""The emulation finds bugs: planted ones in the sine filter's kernels make its self-test fail."""

import shutil
import subprocess

import pytest
from cuda_backends import ROOT

OPTIONS = ["-std=c++20", "-fno-strict-aliasing", "-DTORCH_SPE_CUDA_EMULATION"]
SANITIZERS = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

# What to replace in which file of csrc/cuda, the first time it stands after an anchor.
BUGS = {
    "none": None,
    "none, with sanitizers": None,
    "dropped barrier of the forward kernel": (
        "encode/sine/general_forward.h", "// One barrier is enough", "__syncthreads();", ""),
    "dropped barrier of the backward kernel": (
        "encode/sine/general_input_gradient.h", "sine_input_gradient_kernel(",
        "__syncthreads();  // the basis before", "//"),
    "barrier that some threads leave out": (
        "encode/sine/general_weight_gradient.h", "sine_weight_gradient_kernel(", "__syncthreads();",
        "if (threadIdx.x < 64) __syncthreads();"),
    "missing wait for a copy": (
        "encode/sine/general_forward.h", "sine_forward_kernel(", "copy_async_wait();", ""),
    "store beyond the last position": (
        "encode/sine/general_forward.h", "sine_forward_kernel(", "n >= p.length", "n > p.length"),
    "wrong row of the result's fragment": (
        "tile_product.h", "for_each(", "8 * (e / 2)", "4 * (e / 2)"),
    "wrong row of an operand's fragment": (
        "tile_product.h", "multiply_16_bit(", "const int low = lane % 8 + lane / 8 % 2 * 8",
        "const int low = lane % 8 + lane / 16 * 8"),
    "misaligned rows for ldmatrix": (
        "tile_product.h", "constexpr int kPadding", "? 8", "? 4"),
    "dropped barrier between the stages of products in registers": (
        "encode/sine/steps_forward.h", "sine_steps_forward_kernel(",
        "__syncthreads();  // this stage", "//"),
    "missing wait for a stage": (
        "encode/sine/steps_input_gradient.h",
        "sine_steps_input_gradient_kernel(", "copy_async_wait();", ""),
    "dropped barrier before the sums of warps": (
        "encode/sine/steps_input_gradient.h",
        "sine_steps_input_gradient_kernel(", "__syncthreads();  // the sums of the last", "//"),
    "dropped barrier between tiles of tokens": (
        "encode/sine/steps_weight_gradient.h",
        "sine_steps_weight_gradient_kernel(", "__syncthreads();  // this tile", "//"),
    "tokens and features of an operand exchanged": (
        "encode/sine/steps_forward.h", "sine_steps_forward_kernel(", "a[i / 2][i % 2 + 2 * e]",
        "a[i / 2][2 * (i % 2) + e]"),
    "cosines and sines of an operand exchanged": (
        "encode/sine/steps_weight_gradient.h",
        "sine_steps_weight_gradient_kernel(", "a[2 * e + 1]", "a[3 - 2 * e]"),
}  # fmt: skip
# Found by AddressSanitizer, with which one takes 20 s; the others take 5, most of it compilation.
SANITIZED = (
    "none, with sanitizers",
    "store beyond the last position",
    "misaligned rows for ldmatrix",
)
# `make test` plants one of each other kind.
QUICK = ("none", "dropped barrier of the forward kernel", "wrong row of the result's fragment")
# Types that the self-test does not run, left out so that it compiles in half the time.
UNUSED = {
    "runtime.h": (
        "    case core::DType::kFloat64:\n      return function(double{});\n"
        "    case core::DType::kFloat16:\n      return function(core::Half{});\n",
        "    default:\n      return;\n",
    ),
    "tiles.h": (
        "  if (dtype == core::DType::kFloat32 && allow_tf32) return function(float{}, Tf32{});\n",
        "  (void)allow_tf32;\n",
    ),
}


def replace(path, anchor, old, new):
    before, found, after = path.read_text().partition(anchor)
    assert found, f"{path.name} has no {anchor}"
    assert old in after, f"{path.name} has no {old} after {anchor}"
    path.write_text(before + found + after.replace(old, new, 1))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.exhaustive) for n in BUGS]
)
def test_planted_bug(name, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    kernels = tmp_path / "csrc" / "cuda"
    for file, (old, new) in UNUSED.items():
        replace(kernels / file, "#pragma once", old, new)
    if BUGS[name] is not None:
        file, anchor, old, new = BUGS[name]
        replace(kernels / file, anchor, old, new)
    emulation = ROOT / "tests" / "cuda_emulation"
    program = tmp_path / "selftest"
    options = [*OPTIONS, *(SANITIZERS if name in SANITIZED else ["-O1"])]
    subprocess.run(
        ["g++", *options, f"-I{tmp_path}/csrc", f"-I{kernels}", f"-I{emulation}",
         emulation / "selftest.cpp", emulation / "cuda_emulation.cpp", "-o", program],
        check=True,
    )  # fmt: skip
    result = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    if BUGS[name] is None:
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout == "good\n"
    else:
        assert result.returncode != 0, "not caught"
