"""What the library holds for CUDA, and ptxas' report of its kernels."""

import os
import re
import struct
from pathlib import Path

import pytest
import torch

import torch_spe
from torch_spe import _C

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("TORCH_SPE_BUILD_DIR", ROOT / "build" / "cmake")).resolve()
LIBRARY = Path(torch_spe.__file__).parent / "libtorch_spe.so"
INFO = _C.build_info()
FATBIN = 0xBA55ED50
REGISTERS, THREADS = 65536, 128  # of a multiprocessor, and of a block of ours

needs_cuda_build = pytest.mark.skipif(INFO["cuda"] is None, reason="the build is for the CPU only")


def architectures():
    """Names of build_info split into (number, whether it is PTX)."""
    for name in INFO["cuda_architectures"]:
        number = int(name.removesuffix("+PTX").rstrip("af").replace(".", ""))
        yield number, False
        if name.endswith("+PTX"):
            yield number, True


def embedded_code(library):
    """The set of (architecture, whether it is PTX) of each CUDA fat binary inside a library."""
    data = library.read_bytes()
    magic = struct.pack("<I", FATBIN)
    at = data.find(magic)
    while at >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, at)
        found, entry, end = set(), at + header, at + header + size
        while entry < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, entry)
            (number,) = struct.unpack_from("<I", data, entry + 28)
            found.add((number, kind == 1))
            entry += entry_header + entry_size
        yield found
        at = data.find(magic, max(end, at + 4))


@needs_cuda_build
def test_the_library_holds_code_for_every_architecture():
    binaries = list(embedded_code(LIBRARY))
    assert binaries
    for found in binaries:
        assert found == set(architectures())


def reports():
    """Per object file, ptxas' lines for each kernel: (architecture, name, properties)."""
    for path in sorted(BUILD.glob("CMakeFiles/kernels_cuda.dir/**/*.ptxas")):
        kernels = []
        for part in path.read_text().split("Compiling entry function")[1:]:
            name, number = re.match(r" '(\S+)' for 'sm_(\d+)", part).groups()
            stack, stores, loads = map(int, re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
            ).groups())  # fmt: skip
            registers = int(re.search(r"Used (\d+) registers", part)[1])
            static = re.search(r"(\d+) bytes smem", part)
            kernels.append((int(number), name, {
                "stack": stack, "spills": stores + loads, "registers": registers,
                "static shared memory": int(static[1]) if static else 0,
            }))  # fmt: skip
        yield path, kernels


@needs_cuda_build
def test_ptxas_reports_no_spills():
    wanted = {number for number, is_ptx in architectures() if not is_ptx}
    found = list(reports())
    if not found:
        pytest.skip(f"needs the build tree {BUILD}")
    for path, kernels in found:
        assert {number for number, _, _ in kernels} == wanted, path
        for number, name, properties in kernels:
            where = f"{name} for sm_{number}: {properties}"
            assert properties["spills"] == 0, where
            assert properties["stack"] == 0, where
            assert properties["registers"] * THREADS * 2 <= REGISTERS, where  # two blocks at once
            # Shared memory is dynamic: the emulation refuses more than a block can have.
            assert properties["static shared memory"] == 0, where


def test_every_operator_has_an_answer_to_cuda_tensors():
    names = [
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("torch_spe::")
    ]
    assert len(names) >= 11
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name


@pytest.mark.skipif(INFO["cuda"] is not None, reason="the build has CUDA kernels")
def test_a_cpu_build_refuses_cuda_tensors():
    # Without a GPU there are no CUDA tensors: the operator that the dispatcher would call is asked.
    x = torch.randn(1, 4, 1, 2)
    freqs, weight = torch.rand(1, 2, 1), torch.randn(1, 2, 2, 3)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(ValueError, match="TORCH_SPE_CUDA=1"):
        torch.ops.torch_spe.sine_filter.default.redispatch(keys, x, freqs, weight)
