"""Rules that the sources keep: what kernels may include and export, documentation, versions."""

import doctest
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

import torch_spe

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("TORCH_SPE_BUILD_DIR", ROOT / "build" / "cmake")).resolve()
KERNEL_FOLDERS = ("csrc/core", "csrc/cpu", "csrc/cuda")
PACKAGE = ROOT / "python/torch_spe"
MODULES = [
    importlib.import_module(
        ".".join(("torch_spe", *path.relative_to(PACKAGE).with_suffix("").parts))
    )
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem not in ("__init__", "__main__")
    and (path.parent.name != "hf" or importlib.util.find_spec("transformers") is not None)
]


def files_under(*folders, suffixes):
    files = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return sorted(path for path in files if path.suffix in suffixes)


@pytest.fixture(scope="module")
def compile_commands():
    database = BUILD / "compile_commands.json"
    if not database.is_file():
        pytest.skip(f"needs the build tree {BUILD} (make build)")
    return json.loads(database.read_text())


@pytest.fixture(scope="module")
def kernels(compile_commands):
    """Entries of the compilation database for CPU kernels, with their instruction set."""
    found = [
        (match[1], entry)
        for entry in compile_commands
        if (match := re.search(r"-DTORCH_SPE_ISA=(\w+)", entry["command"]))
    ]
    assert found
    return found


def test_kernels_know_nothing_of_torch():
    pattern = re.compile(r'#\s*include\s*[<"](ATen|torch|c10|caffe2|pybind11|torch_spe)/')
    sources = files_under(*KERNEL_FOLDERS, suffixes={".h", ".cpp", ".cu", ".cuh"})
    assert sources
    for source in sources:
        assert not pattern.search(source.read_text()), source


def test_no_fast_math(compile_commands):
    flags = re.compile(r"-Ofast|-ffast-math|fast-math\"|-funsafe-math|-ffinite-math|use_fast_math")
    files = files_under("csrc", "cmake", suffixes={".h", ".cpp", ".cu", ".cuh", ".cmake", ".in"})
    for file in [ROOT / "CMakeLists.txt", ROOT / "setup.py", *files]:
        assert not flags.search(file.read_text()), file
    for entry in compile_commands:
        assert not flags.search(entry["command"]), entry["file"]


def symbols_outside(isa, compiled):
    """External symbols that do not name the namespace of the instruction set.

    The linker keeps one of several weak definitions: a std::vector compiled for AVX-512 could so
    end up in the baseline code, and crash on an older processor. DW.ref.* is no code but a pointer
    to the exception handler, the same everywhere.
    """
    namespace = f"9torch_spe3cpu{len(isa)}{isa}"
    listing = subprocess.run(
        ["nm", "--defined-only", "--extern-only", "--format=posix", compiled],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    symbols = [line.split()[0] for line in listing.splitlines()]
    assert symbols, compiled
    return [name for name in symbols if namespace not in name and not name.startswith("DW.ref.")]


def compile_plainly(entry, source, compiled):
    """Compile without the optimizer, whose choice of what to inline changes with the code."""
    command = shlex.split(entry["command"])
    command[command.index("-o") + 1] = str(compiled)
    command[command.index("-c") + 1] = str(source)
    subprocess.run([*command, "-O0"], check=True, cwd=entry["directory"])


@pytest.mark.long
def test_kernels_export_only_their_namespace(kernels, tmp_path):
    for isa, entry in kernels:
        compiled = Path(entry["directory"], entry["output"])
        assert symbols_outside(isa, compiled) == [], entry["file"]
    last_isa = kernels[-1][0]
    for isa, entry in kernels:
        if isa == last_isa:
            compile_plainly(entry, entry["file"], tmp_path / "kernel.o")
            assert symbols_outside(isa, tmp_path / "kernel.o") == [], entry["file"]


def test_a_planted_weak_symbol_is_found(kernels, tmp_path):
    isa, entry = kernels[-1]
    planted = tmp_path / "planted.cpp"
    planted.write_text(
        f'#include "{entry["file"]}"\n'
        "#include <vector>\n"
        "namespace torch_spe::cpu::TORCH_SPE_ISA {\n"
        "void planted(std::vector<float>& values, float value) { values.push_back(value); }\n"
        "}\n"
    )
    compile_plainly(entry, planted, tmp_path / "planted.o")
    outside = symbols_outside(isa, tmp_path / "planted.o")
    assert any("vector" in symbol for symbol in outside), outside


def test_sources_are_listed_once():
    cmake = (ROOT / "CMakeLists.txt").read_text()
    for source in files_under("csrc", "tests/cpp", suffixes={".cpp", ".cu"}):
        name = str(source.relative_to(ROOT))
        assert len(re.findall(rf"(?<![\w/]){re.escape(name)}\b", cmake)) == 1, name
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in"):
        assert ".cpp" not in (ROOT / file).read_text(), file


def public_objects():
    for module in [torch_spe, *MODULES]:
        for name, value in vars(module).items():
            ours = getattr(value, "__module__", "") == module.__name__
            if ours and not name.startswith("_") and callable(value):
                yield f"{module.__name__}.{name}", value


@pytest.mark.parametrize(("name", "value"), list(public_objects()))
def test_public_objects_are_documented(name, value):
    assert inspect.getdoc(value), name
    if inspect.isclass(value):
        for member, function in vars(value).items():
            if inspect.isfunction(function) and not member.startswith("_"):
                assert inspect.getdoc(function), f"{name}.{member}"


@pytest.mark.parametrize("name", torch_spe.functional.__all__)
def test_operators_have_an_example(name):
    assert ">>>" in inspect.getdoc(getattr(torch_spe.functional, name))


@pytest.mark.parametrize("module", [torch_spe, *MODULES], ids=lambda module: module.__name__)
def test_docstring_examples_run(module):
    outcome = doctest.testmod(
        module,
        extraglobs={"torch": torch, "nn": torch.nn},
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert outcome.failed == 0


def test_every_folder_of_the_package_is_a_package():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_one_place_calls_the_operators():
    callers = [path for path in PACKAGE.rglob("*.py") if "torch.ops." in path.read_text()]
    assert {path.parent.name for path in callers} == {"functional", "onnx"}  # which names them
    operators = {
        schema.name.removeprefix("torch_spe::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("torch_spe::") and not schema.name.endswith("_backward")
    }
    assert operators == set(torch_spe.functional.__all__)


def test_nothing_computes_with_the_reference():
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("reference.py", "__init__.py"):
            assert not re.search(r"import.*\breference\b|reference\.\w+\(", path.read_text()), path


def test_files_of_the_library_are_short():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 600, path


def test_extras_are_those_of_the_source_tree():
    """No index has the package yet."""
    paths = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *PACKAGE.rglob("*.py")]
    text = {path: path.read_text() for path in paths}
    assert [path for path in paths if re.search(r"torch[_-]spe\[[a-z]", text[path])] == []
    named = set(re.findall(r'"\.\[(\w+)\]"', "".join(text.values())))
    extras = re.split(r"^\[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    (extras,) = [part for part in extras if part.startswith("project.optional-dependencies]")]
    assert named == set(re.findall(r"^(\w+) =", extras, flags=re.MULTILINE))


def test_version_is_the_same_everywhere():
    version = (ROOT / "VERSION").read_text().strip()
    assert torch_spe.__version__ == version
    assert torch_spe.build_info()["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
