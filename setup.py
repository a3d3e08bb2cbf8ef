"""Builds the compiled part of torch_spe with CMake. Everything else stands in pyproject.toml."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NO_TORCH = """
torch_spe is compiled against the PyTorch that you use, and there is none in this environment.

  pip install torch                                     # unless you have it
  pip install setuptools cmake ninja pybind11
  pip install --no-build-isolation .

Without --no-build-isolation pip builds in an empty environment that does not see your torch.
"""

# A source distribution needs no torch; everything that ends in an installation does. Said before pip downloads anything.
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "dist_info", "editable_wheel", "install"}
if BUILDS & set(sys.argv) and importlib.util.find_spec("torch") is None:
    sys.exit(NO_TORCH)


class CMakeBuild(build_ext):
    """Configures, builds and installs the component `python` of CMakeLists.txt."""

    def run(self):
        build = Path(os.environ.get("TORCH_SPE_BUILD_DIR", ROOT / "build" / "cmake")).resolve()
        prefix = ROOT / "python" if self.inplace else Path(self.build_lib).resolve()
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            "-DTORCH_SPE_PYTHON=ON",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DPYTHON_EXECUTABLE={sys.executable}",
            f"-DTORCH_SPE_TORCH_DIR={Path(importlib.util.find_spec('torch').origin).parent}",
            f"-Dpybind11_DIR={self._pybind11_dir()}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        for command in (
            configure,
            ["cmake", "--build", str(build)],
            ["cmake", "--install", str(build), "--component", "python", "--prefix", str(prefix)],
        ):
            try:
                subprocess.run(command, check=True)
            except FileNotFoundError:
                sys.exit("torch_spe is built with CMake and Ninja: pip install cmake ninja")
            except subprocess.CalledProcessError as error:
                sys.exit(f"{' '.join(command[:2])} failed with status {error.returncode}; its message is above")

    @staticmethod
    def _pybind11_dir():
        try:
            import pybind11
        except ImportError:
            sys.exit("torch_spe is built with pybind11: pip install pybind11")
        return pybind11.get_cmake_dir()

    def get_outputs(self):
        return []


setup(ext_modules=[Extension("torch_spe._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
