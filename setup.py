"""Builds the compiled part of torch_spe with CMake. Everything else stands in pyproject.toml."""

import importlib.util
import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NO_TORCH = """
torch_spe is compiled against the PyTorch that you use; this build does not see any.

  pip install torch                            # unless you have it
  pip install .

With a tool that builds in an environment elsewhere, such as uv:

  pip install "setuptools>=77" "cmake>=3.26" ninja
  pip install --no-build-isolation .
"""


def _package_folders():
    """Return where the interpreter finds packages, also those that are hidden, in its order."""
    own = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    # An environment of its own sees what belongs to the base, and to the user, if it was made so.
    user = [site.getusersitepackages()] if sys.base_prefix in site.PREFIXES else []
    first = [*user, *own] if sys.prefix == sys.base_prefix else [*own, *user]
    return [*first, *site.getsitepackages()]


def _torch_folder():
    """Return the folder of the torch in use, or None.

    The environment in which pip builds is that of the interpreter, with its packages hidden: torch
    is where they are, and only its headers and libraries are needed.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None:
        return Path(spec.origin).parent
    folders = (Path(folder) / "torch" for folder in _package_folders())
    return next((folder for folder in folders if (folder / "version.py").is_file()), None)


# A source distribution needs no torch; everything that ends in an installation does. Said before
# pip downloads torch as a dependency.
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "dist_info", "editable_wheel", "install"}
if BUILDS & set(sys.argv) and _torch_folder() is None:
    sys.exit(NO_TORCH)


def _instruction_sets():
    """Return TORCH_SPE_INSTRUCTION_SETS; "native" becomes the best of this machine."""
    wanted = os.environ.get("TORCH_SPE_INSTRUCTION_SETS", "")
    if wanted != "native":
        return wanted
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        return "avx512"
    return "avx2" if {"avx2", "fma"} <= flags else "baseline"


class FreshBuild(build_py):
    """Starts from an empty folder: otherwise a wheel would also hold modules since removed."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Configures, builds and installs the component `python` of CMakeLists.txt.

    TORCH_SPE_BUILD_DIR is the folder of objects, by default build/cmake; CMAKE_ARGS are more
    arguments for CMake. TORCH_SPE_CUDA=1 demands the CUDA kernels and 0 leaves them out; by default
    they are built when there is an nvcc that fits torch, for TORCH_CUDA_ARCH_LIST.
    TORCH_SPE_INSTRUCTION_SETS chooses those of the CPU kernels: some of "avx2 avx512", or "native"
    for the best of this machine; by default all.
    """

    def run(self):
        build = Path(os.environ.get("TORCH_SPE_BUILD_DIR") or ROOT / "build" / "cmake").resolve()
        prefix = ROOT / "python" if self.inplace else Path(self.build_lib).resolve()
        self._configure(build)
        self._run("cmake", "--build", build, "--target", "python")
        self._run("cmake", "--install", build, "--component", "python", "--prefix", prefix)

    def _configure(self, build):
        arguments = [
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            "-DCMAKE_INSTALL_MESSAGE=LAZY",
            "-DTORCH_SPE_PYTHON=ON",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DTORCH_SPE_TORCH_DIR={_torch_folder()}",
            f"-DTORCH_SPE_CUDA={os.environ.get('TORCH_SPE_CUDA', 'AUTO')}",
            f"-DTORCH_SPE_INSTRUCTION_SETS={_instruction_sets()}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        # CMake remembers what it found for another Python or torch: then it must look again, and
        # keeps objects that both configurations have in common. Ninja runs CMake when only CMake
        # files changed.
        configured = build / "configured.json"
        variables = ("TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CUDACXX")
        cuda = [os.environ.get(name) for name in variables]
        cuda.append(shutil.which("nvcc", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin"))
        versions = [sys.version, (_torch_folder() / "version.py").read_text()]
        state = json.dumps([arguments, versions, cuda])
        if configured.is_file() and configured.read_text() == state:
            return
        configured.unlink(missing_ok=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        self._run("cmake", *arguments)
        configured.write_text(state)

    def _run(self, *command):
        # Tools from PyPI lie beside the interpreter, also when its environment is not activated.
        path = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")
        for tool in ("cmake", "ninja"):
            if shutil.which(tool, path=path) is None:
                sys.exit(f"{tool} is missing, with which torch_spe is built: pip install {tool}")
        command = [shutil.which(command[0], path=path), *map(str, command[1:])]
        status = subprocess.run(command, check=False, env={**os.environ, "PATH": path}).returncode
        if status != 0:
            sys.exit(f"{' '.join(command[:2])} failed with status {status}; its message is above")

    def get_outputs(self):
        return []


setup(
    ext_modules=[Extension("torch_spe._C", sources=[])],
    cmdclass={"build_py": FreshBuild, "build_ext": CMakeBuild},
)
