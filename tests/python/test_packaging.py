"""Wheel, source distribution, C++ package, and what one is told when something does not fit.

Compiled objects are taken from the build tree, so that nothing but the C++ example is compiled.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import _distutils_hack
import pytest
import setuptools
import torch

from torch_spe import _library

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("TORCH_SPE_BUILD_DIR", ROOT / "build" / "cmake")).resolve()
# Without what an outer make has set for its commands.
ENVIRONMENT = {name: os.environ[name] for name in os.environ.keys() - {"MAKEFLAGS", "TORCH"}}
PATH = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]

needs_build = pytest.mark.skipif(
    not (BUILD / "configured.json").is_file(),
    reason=f"needs the build tree {BUILD} (make build)",
)


def run(*command, env=None, status=0, **options):
    """Run a command; return its output once it ended with the expected status.

    Commands use one build tree: those of all test processes run one after the other.
    """
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "packaging.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            [str(part) for part in command],
            env={**ENVIRONMENT, "PATH": PATH, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
    assert done.returncode == status, done.stdout
    return done.stdout


def build_distribution(kind, folder):
    run(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", folder, ROOT)
    (distribution,) = folder.iterdir()
    return distribution


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_distribution("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Folder in which the wheel is installed, apart from this environment."""
    folder = tmp_path_factory.mktemp("installed")
    options = ("--quiet", "--no-deps", "--no-index", "--target", folder)
    run(sys.executable, "-m", "pip", "install", *options, wheel)
    return folder


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build_distribution("sdist", folder)) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(folder)
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    return unpacked


@needs_build
def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = (ROOT / "python/torch_spe").rglob("*py*")
    modules = {
        str(path.relative_to(ROOT / "python"))
        for path in sources
        if path.suffix in (".py", ".pyi") or path.name == "py.typed"
    }
    compiled = {f"torch_spe/_C{EXTENSION_SUFFIXES[0]}", "torch_spe/libtorch_spe.so"}
    package = {name for name in names if name.startswith("torch_spe/")}
    assert package == modules | compiled | {"torch_spe/_build_info.json"}
    others = names - package
    assert {name.split("/")[0].split("-")[0] for name in others} == {"torch_spe"}
    assert any(name.endswith("licenses/LICENSE") for name in others)
    assert f"-{sys.implementation.cache_tag.replace('cpython-', 'cp')}-" in wheel.name


@needs_build
def test_wheel_works_where_it_is_installed(installed):
    code = (
        "import torch, torch_spe\n"
        "x, w = torch.ones(1, 3, 1, 1), torch.ones(1, 1, 2, 1)\n"
        "print(torch.ops.torch_spe.sine_filter(x, torch.zeros(1, 1, 1), w).flatten().tolist())\n"
        "print(torch_spe.__file__)\n"
    )
    output = run(sys.executable, "-c", code, env={"PYTHONPATH": str(installed)}, cwd=installed)
    assert output.splitlines() == ["[1.0, 1.0, 1.0]", str(installed / "torch_spe/__init__.py")]
    for library in (installed / "torch_spe").glob("*.so"):
        (paths,) = re.findall(r"R(?:UN)?PATH\).*\[(.*)\]", run("readelf", "-d", library))
        assert all(path.startswith("$ORIGIN") for path in paths.split(":")), paths


@needs_build
def test_wheel_and_editable_builds_share_their_objects(wheel):
    output = run(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", cwd=ROOT)
    assert "no work to do" in output
    assert not re.search(r"Installing|Building|Configuring", output), output


@needs_build
def test_sdist_holds_all_that_the_build_reads(sdist):
    read = {"LICENSE", "README.md", "CHANGELOG.md", "VERSION", "pyproject.toml", "setup.py"}
    read |= {entry["file"] for entry in json.loads((BUILD / "compile_commands.json").read_text())}
    read |= set(re.findall(r"^    (.+)$", run("ninja", "-C", BUILD, "-t", "deps"), re.MULTILINE))
    paths = {Path(os.path.normpath(BUILD / name if "/" in name else ROOT / name)) for name in read}
    own = {path.relative_to(ROOT) for path in paths if path.is_relative_to(ROOT)}
    needed = {path for path in own if path.parts[0] not in ("build", "tests", ".venv")}
    assert len(needed) > 20
    assert [path for path in sorted(needed) if not (sdist / path).is_file()] == []
    assert (sdist / "python/torch_spe/py.typed").is_file()
    assert list(sdist.rglob("*.so")) == list(sdist.rglob("_build_info.json")) == []


def test_sdist_configures_without_a_cuda_toolkit(sdist, tmp_path):
    folders = [name for name in PATH.split(os.pathsep) if not (Path(name) / "nvcc").exists()]
    configure = ("cmake", "-S", sdist, "-B", tmp_path, "-GNinja", "-DTORCH_SPE_PYTHON=ON",
                 f"-DPython3_EXECUTABLE={sys.executable}")  # fmt: skip
    env = {"PATH": os.pathsep.join(folders), "CUDA_HOME": str(tmp_path / "no-cuda")}
    output = run(*configure, env=env)
    assert "torch_spe: CPU only" in output
    assert "Build files have been written" in output
    assert "TORCH_SPE_CUDA=1, but" in run(*configure, "-DTORCH_SPE_CUDA=1", env=env, status=1)


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_building_without_torch_says_what_to_do(kind, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty")
    output = prepare_metadata(tmp_path / "empty/bin/python", kind, tmp_path, status=1)
    assert "pip install --no-build-isolation ." in output
    assert "Traceback" not in output


def prepare_metadata(python, kind, folder, before="", **options):
    """Do what pip does first, in the environment that it makes: build requirements and no torch."""
    isolated = folder / "isolated"
    isolated.mkdir()
    folders = [Path(package.__file__).parent for package in (setuptools, _distutils_hack)]
    folders += Path(setuptools.__file__).parent.parent.glob("setuptools-*.dist-info")
    for source in folders:
        (isolated / source.name).symlink_to(source)
    code = (
        "import importlib.util, sys\n"
        "hidden = [path for path in sys.path if 'site-packages' not in path]\n"
        f"sys.path[:] = [{str(isolated)!r}, *hidden]\n"
        "assert importlib.util.find_spec('torch') is None\n"
        f"{before}\n"
        "from setuptools import build_meta\n"
        f"build_meta.prepare_metadata_for_build_{kind}({str(folder)!r})\n"
    )
    return run(python, "-I", "-c", code, cwd=ROOT, **options)


def test_build_isolation_finds_the_torch_in_use(tmp_path):
    prepare_metadata(sys.executable, "wheel", tmp_path)
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    assert "Requires-Dist: torch>=" in metadata.read_text()


@pytest.mark.parametrize("place", ["user", "base"])
@pytest.mark.parametrize("sees", [True, False])
def test_build_isolation_finds_the_torch_of_user_and_base(place, sees, tmp_path):
    run(
        *(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"),
        *["--system-site-packages"] * sees,
    )
    python, base = tmp_path / "env/bin/python", tmp_path / "base"
    code = "import site; print(site.getusersitepackages())"
    env = {"PYTHONUSERBASE": str(base)}
    packages = Path(run(python, "-I", "-c", code, env=env).strip())
    assert packages.is_relative_to(base)
    (packages / "torch").mkdir(parents=True)
    (packages / "torch/version.py").touch()
    before = f"import site; site.PREFIXES[1:] = [{str(base)!r}]" if place == "base" and sees else ""
    options = {"env": env} if place == "user" else {}
    output = prepare_metadata(python, "wheel", tmp_path, before, status=int(not sees), **options)
    assert ("does not see any" in output) != sees


def test_build_requirements_are_in_the_development_environment():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["build-system"]["requires"]) <= set(project["dependency-groups"]["build"])


@pytest.mark.parametrize(
    ("variables", "status"),
    [
        ({}, 5),  # skipped: no test
        ({"TORCH_SPE_TEST_LEVEL": "long"}, 2),  # an error
        ({"TORCH_SPE_TEST_LEVEL": "all", "TORCH_SPE_SKIP_MISSING": "1"}, 5),
    ],
)
def test_a_missing_package_fails_where_every_test_runs(variables, status, tmp_path):
    (tmp_path / "test_it.py").write_text('import pytest\npytest.importorskip("no_package")\n')
    cleared = {"TORCH_SPE_TEST_LEVEL": "", "TORCH_SPE_SKIP_MISSING": ""}
    paths = f"{ROOT / 'tests/python'}{os.pathsep}{ROOT / 'python'}"
    output = run(
        *(sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-rs", "."),
        cwd=tmp_path, env={**cleared, **variables, "PYTHONPATH": paths}, status=status,
    )  # fmt: skip
    assert "No module named 'no_package'" in output


@pytest.mark.long
@needs_build
def test_import_under_another_torch_says_what_to_do(installed, tmp_path):
    shutil.copytree(installed / "torch_spe", tmp_path / "torch_spe")
    (tmp_path / "torch_spe/_build_info.json").write_text('{"torch": "1.2.3"}')
    code = "import torch_spe"
    env = {"PYTHONPATH": str(tmp_path)}
    output = run(sys.executable, "-c", code, env=env, cwd=tmp_path, status=1)
    assert output.splitlines()[-1] == (
        f"ImportError: torch_spe was built for torch 1.2.3, but torch {torch.__version__} is "
        "installed; take the wheel whose version ends in "
        f"+torch{torch.__version__.split('+')[0]}.cpu, rebuild it in its source tree with "
        "'pip install --no-build-isolation --no-deps "
        "--no-cache-dir --force-reinstall .' ('make build' in a clone), or install the other torch "
        "with 'pip install torch==1.2.3'"
    )


def test_build_for_this_torch_and_python_is_required(tmp_path):
    with pytest.raises(ImportError, match=r"compiled part of torch_spe is missing.*rebuild it"):
        _library._check_build(tmp_path, "2.11.0")
    (tmp_path / "_build_info.json").write_text('{"torch": "2.11.0+cpu"}')
    with pytest.raises(ImportError, match="built for another version of Python; rebuild it"):
        _library._check_build(tmp_path, "2.11.0")
    with pytest.raises(ImportError, match=re.escape("built for torch 2.11.0+cpu, but torch 2.12")):
        _library._check_build(tmp_path, "2.12.0")
    (tmp_path / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    _library._check_build(tmp_path, "2.11.0")
    _library._check_build(tmp_path, "2.11.0+cu130", "13.0")


def test_import_errors_name_the_wheel(tmp_path):
    info = tmp_path / "_build_info.json"
    (tmp_path / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    for cuda, torch_cuda, version in (
        ("", "13.0", "torch2.12.0.cpu"),
        ("13.0", None, "torch2.12.0.cpu"),
        ("13.0", "13.2", "torch2.12.0.cu132"),
    ):
        info.write_text(json.dumps({"torch": "2.11.0", "cuda": cuda}))
        with pytest.raises(ImportError, match=re.escape(f"ends in +{version}, rebuild it")):
            _library._check_build(tmp_path, "2.12.0+local", torch_cuda)
    info.write_text('{"torch": "2.11.0", "cuda": "13.0"}')
    _library._check_build(tmp_path, "2.11.0+cu132", "13.2")  # minor versions are compatible
    with pytest.raises(ImportError, match=r"without CUDA; .* ends in \+torch2\.11\.0\.cpu"):
        _library._check_build(tmp_path, "2.11.0+cpu", None)
    with pytest.raises(ImportError, match=r"for CUDA 12\.9; .* ends in \+torch2\.11\.0\.cu129"):
        _library._check_build(tmp_path, "2.11.0+cu129", "12.9")


@pytest.mark.long
@needs_build
def test_cpp_programs_build_outside_the_tree_and_run(tmp_path):
    prefix, build, example = tmp_path / "prefix", tmp_path / "build", tmp_path / "example"
    shutil.copytree(ROOT / "examples/cpp", example)
    run("cmake", "--build", BUILD, "--target", "torch_spe")
    run("cmake", "--install", BUILD, "--prefix", prefix)
    run("cmake", "-S", example, "-B", build, "-GNinja", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", build)
    (library,) = prefix.rglob("libtorch_spe.so")
    assert "not found" not in run("ldd", library)
    output = run(build / "train")
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", output)]
    assert losses[-1] < 0.2, output  # predicting zero gives 0.95
    assert f"built with torch {torch.__version__.split('+')[0]}" in output

    # docs/cpp.md: the program, with the other block in a function of its own.
    blocks = re.findall(r"```(cmake|cpp)\n(.*?)```", (ROOT / "docs/cpp.md").read_text(), re.DOTALL)
    (_, lists), (_, program), (_, call) = blocks
    page = tmp_path / "page"
    page.mkdir()
    (page / "CMakeLists.txt").write_text(lists)
    called = (
        f"static at::Tensor call(at::Tensor freqs, at::Tensor gains) {{\n{call}return cycles;\n}}"
    )
    (page / "program.cpp").write_text(
        f"{program.replace('int main()', 'static void learn()')}\n{called}\n"
        "int main() {\n  learn();\n"
        "  const auto freqs = torch::rand({2, 8, 3}).requires_grad_();\n"
        "  std::cout << call(freqs, torch::rand({2, 8, 3})).sizes() << std::endl;\n}\n"
    )
    run("cmake", "-S", page, "-B", page / "build", "-GNinja", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", page / "build")
    assert run(page / "build/program").strip() == "[2, 8, 3]"


@pytest.fixture
def makefile_copy(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_make_installs_the_torch_asked_for(makefile_copy):
    assert "'torch==2.11.0'" in run("make", "-n", "test", cwd=makefile_copy)
    assert "'torch==2.15.0'" in run("make", "-n", "test", "TORCH=2.15.0", cwd=makefile_copy)


def test_make_names_the_python_it_needs(makefile_copy):
    output = run("make", "build", "PYTHON=false", cwd=makefile_copy, status=2)
    assert "torch_spe needs Python 3.10 or later" in output
