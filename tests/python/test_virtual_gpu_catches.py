"""The virtual GPU finds bugs: planted ones in PTX make it report an error, or results are wrong."""

import re
import shutil
import subprocess
import sys

import pytest
from cuda_backends import VIRTUAL_GPU

RUN = r"""
import sys
import torch
import torch_spe
torch.set_num_threads(1)
torch.ops.load_library(sys.argv[1])
from torch_spe import reference
vgpu, ops = torch.ops.torch_spe_virtual_gpu, torch.ops.torch_spe
dtype = getattr(torch, sys.argv[2])
g = torch.Generator().manual_seed(0)
normal = lambda *s: torch.randn(*s, generator=g)
if sys.argv[3] == "sine":
    x, w = normal(3, 70, 1, 24).to(dtype), normal(1, 24, 6, 40) / 8
    f = torch.rand(1, 24, 3, generator=g) / 2
    run = lambda: ops.sine_filter(x, f, w)
    right = reference.sine_filter(x.double(), f.double(), w.double())
elif sys.argv[3] == "phasor":
    x, w = normal(8, 70, 1, 16).to(dtype), normal(1, 16, 16, 2)
    f = torch.rand(1, 16, 16, generator=g) / 2
    run = lambda: ops.phasor_filter(x, f, w)
    right = reference.phasor_filter(x.double(), f.double(), w.double())
else:
    q, k, v = (normal(1, 150, 1, 16).to(dtype) for _ in range(3))
    run = lambda: ops.linear_attention(q, k, v, "elu", True)[0]
    right = reference.linear_attention(q.double(), k.double(), v.double(), "elu", True)[0]
vgpu.enable(True)
got = run()
error = float((got.double() - right).abs().max() / right.abs().max())
print("ERROR", error)
"""


def replace(pattern, by):
    return lambda text: re.subn(pattern, by, text, flags=re.M)


def remove(pattern):
    return replace(pattern, "")


def nothing(text):
    return text, 1


# Name, operator, type, change of all PTX, and what must be reported: words of an error, ERROR for a
# wrong result.
CASES = [
    ("nothing", "sine", "float32", nothing, None),
    ("nothing", "sine", "bfloat16", nothing, None),
    ("nothing", "phasor", "bfloat16", nothing, None),
    ("nothing", "attention", "bfloat16", nothing, None),
    ("barriers removed", "sine", "float32", remove(r"^\s*bar\.sync\s+0;"), "hazard"),
    ("barriers removed", "attention", "bfloat16", remove(r"^\s*bar\.sync\s+0;"), "hazard"),
    ("barriers removed", "sine", "bfloat16", remove(r"^\s*bar\.sync\s+0;"), "hazard"),
    ("waits for copies removed", "sine", "bfloat16", remove(r"^\s*cp\.async\.wait_all;"),
     "asynchronous"),
    ("a barrier for half a warp", "attention", "bfloat16",
     replace(r"^(\s*)bar\.sync\s+0;", r"\1setp.lt.u32 %p1, %tid.x, 7;\n\1@%p1 bar.sync 0;"),
     "some lanes"),
    ("a barrier for one warp", "attention", "bfloat16",
     replace(r"^(\s*)bar\.sync\s+0;", r"\1setp.lt.u32 %p1, %tid.x, 32;\n\1@%p1 bar.sync 0;"),
     "barrier|hazard"),
    ("operands of bf16 read as f16", "sine", "bfloat16",
     replace(r"m16n8k16\.row\.col\.f32\.bf16\.bf16", "m16n8k16.row.col.f32.f16.f16"), "ERROR"),
    ("registers of A exchanged", "attention", "bfloat16",
     replace(r"(mma\.[\w.]+ \{[^}]*\}, \{)(%\w+), (%\w+),", r"\1\3, \2,"), "ERROR"),
    ("halves of pairs exchanged", "phasor", "bfloat16",
     replace(r"(cvt\.rn\.bf16x2\.f32\s+%\w+), (%\w+), (%\w+);", r"\1, \3, \2;"), "ERROR"),
    ("a matrix transposed", "sine", "bfloat16",
     replace(r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans", "ldmatrix.sync.aligned.m8n8.x4"),
     "ERROR"),
    ("shared memory too far", "sine", "float32",
     replace(r"(st\.shared\.f32\s+\[%\w+)\]", r"\1+200000]"), "of shared memory"),
    ("misaligned access", "sine", "float32",
     replace(r"(ld\.shared\.f32\s+%\w+, \[%\w+)\]", r"\1+2]"), "not a multiple"),
    ("a store beyond the output", "sine", "float32",
     replace(r"(st\.global\.f32\s+\[%\w+)\]", r"\1+1048576]"), "after the end"),
    ("a load beyond an input", "attention", "bfloat16",
     replace(r"(ld\.global\.v4\.u32\s+\{[^}]*\}, \[%\w+)\]", r"\1+1048576]"), "after the end"),
    ("rounding removed", "attention", "float32",
     replace(r"cvt\.rna\.tf32\.f32|fma\.rn\.f32(\s+%\w+, %\w+, %\w+), %\w+;", r"mul.f32\1;"),
     "ERROR"),
]  # fmt: skip
ALLOWED = {"float32": 1e-5, "bfloat16": 5e-2}
# `make test` plants some of each kind; each is a process of its own.
QUICK = {
    ("nothing", "attention"),
    ("barriers removed", "attention"),
    ("waits for copies removed", "sine"),
    ("a barrier for half a warp", "attention"),
    ("operands of bf16 read as f16", "sine"),
    ("misaligned access", "sine"),
    ("a store beyond the output", "sine"),
}


def named(case):
    return pytest.param(
        case,
        marks=() if case[:2] in QUICK else pytest.mark.exhaustive,
        id=f"{case[0]} ({case[1]}, {case[2]})",
    )


@pytest.mark.skipif(not VIRTUAL_GPU.exists(), reason="the virtual GPU is not built")
@pytest.mark.parametrize("case", [named(case) for case in CASES])
def test_planted_bug(case, tmp_path):
    _, operator, dtype, change, wanted = case
    changes = 0
    for path in VIRTUAL_GPU.parent.glob("*.ptx"):
        text, count = change(path.read_text())
        changes += count
        (tmp_path / path.name).write_text(text)
    assert changes > 0
    library = tmp_path / VIRTUAL_GPU.name
    shutil.copy(VIRTUAL_GPU, library)
    done = subprocess.run(
        [sys.executable, "-c", RUN, library, dtype, operator],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    message = "".join(re.findall(r"^RuntimeError.*", done.stderr, re.M))
    result = re.search(r"^ERROR (\S+)", done.stdout, re.M)
    assert result or message, done.stderr
    wrong = result is not None and not float(result.group(1)) <= ALLOWED[dtype]
    if wanted is None:
        assert not message
        assert not wrong, result.group()
    elif wanted == "ERROR":
        assert wrong or message
    else:
        assert re.search(wanted, message), message or result.group()


@pytest.mark.skipif(not VIRTUAL_GPU.exists(), reason="the virtual GPU is not built")
def test_every_kernel_can_be_decoded():
    program = """
import sys, torch, torch_spe
torch.ops.load_library(sys.argv[1])
sys.exit(torch.ops.torch_spe_virtual_gpu.check_kernels() or None)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, VIRTUAL_GPU], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
