"""Scripts that make releases and wheels: what they check, and one wheel from beginning to end."""

import importlib.util
import os
import subprocess
import sys
import tarfile
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TODAY = date(2026, 11, 26)
CHANGELOG = (
    "# Changelog\n\n## [1.2.3] - 2026-11-26\n\n### Added\n- A thing.\n\n## [1.2.2] - 2026-01-01\n"
)


def load(name):
    """Import a script, without leaving its folder on the path."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"scripts/{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sys.path[:] = before
    return script


release = load("release")
wheel = load("make_wheel")


@pytest.fixture
def tree(tmp_path):
    """A repository that is ready for release."""
    (tmp_path / "VERSION").write_text("1.2.3\n")
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    for command in (
        ("init", "--quiet"),
        ("config", "user.name", "someone"),
        ("config", "user.email", "someone@example.org"),
        ("add", "."),
        ("commit", "--quiet", "--message", "First"),
    ):
        release.git(tmp_path, *command)
    return tmp_path


def test_a_tree_that_is_ready(tree):
    assert release.check_release(tree, TODAY) == []
    release.git(tree, "tag", "v1.2.3")
    assert release.check_release(tree, TODAY) == []


def test_a_tag_of_another_commit_and_changes(tree):
    release.git(tree, "tag", "-a", "v1.2.3", "-m", "torch_spe 1.2.3")
    (tree / "new").touch()
    assert release.check_release(tree, TODAY) == [
        "the tree has changes that are not committed: ?? new"
    ]
    release.git(tree, "add", ".")
    release.git(tree, "commit", "--quiet", "--message", "Second")
    (problem,) = release.check_release(tree, TODAY)
    assert problem.startswith("the tag v1.2.3 exists and is another commit")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("2026-11-26", "unreleased", "expected the date of the release, such as 2026-11-26, got"),
        ("2026-11-26", "2026-11-27", "2026-11-27 is in the future"),
        ("[1.2.3]", "[1.2.4]", "the first entry must be [1.2.3], got '[1.2.4] - 2026-11-26'"),
        ("- A thing.\n", "", "the entry of 1.2.3 is empty"),
        ("[1.2.2]", "[1.2.3]", "two entries for 1.2.3"),
        ("## [", "# [", "no entry"),
    ],
)
def test_entries_of_the_changelog(old, new, problem):
    (found,) = release.check_changelog(CHANGELOG.replace(old, new), "1.2.3", TODAY)
    assert found.startswith("CHANGELOG.md: ")
    assert problem in found


@pytest.mark.parametrize("version", ["1.2", "v1.2.3", "1.2.3+cpu", "1.2.3-rc1", ""])
def test_versions(version):
    assert release.check_version("1.2.3") == release.check_version("1.2.3rc1") == []
    (problem,) = release.check_version(version)
    assert repr(version) in problem


@pytest.mark.parametrize("cuda", [False, True])
def test_a_release_has_a_wheel_of_each_variant(cuda, tree, tmp_path_factory, monkeypatch, capsys):
    made, checked = [], []
    out = tmp_path_factory.mktemp("dist")

    def run(*command):
        if "--sdist" in command:
            folder = command[command.index("-o") + 1]
            with tarfile.open(folder / "torch_spe-1.2.3.tar.gz", "w:gz") as archive:
                archive.add(tree / "VERSION", "torch_spe-1.2.3/VERSION")
        else:
            checked.extend(command[command.index("--strict") + 1 :])

    def build(source, out, pythons, cuda):
        assert (source / "VERSION").read_text() == "1.2.3\n"
        assert pythons == ["python3.12"]
        made.append(cuda)
        path = out / f"torch_spe-1.2.3+{'cuda' if cuda else 'cpu'}.whl"
        path.touch()
        return path

    monkeypatch.setattr(release.make_wheel, "run", run)
    monkeypatch.setattr(release.make_wheel, "build", build)
    monkeypatch.setattr(release, "ROOT", tree)
    monkeypatch.setattr(release, "check_release", lambda root, today: [])
    arguments = ["release.py", "--python", "python3.12", "--out", str(out), *["--cuda"] * cuda]
    monkeypatch.setattr(sys, "argv", arguments)
    assert release.main() == 0
    assert made == ([True, False] if cuda else [False])
    files = {"torch_spe-1.2.3.tar.gz", "torch_spe-1.2.3+cpu.whl"}
    files |= {"torch_spe-1.2.3+cuda.whl"} if cuda else set()
    assert {path.name for path in out.iterdir()} == {path.name for path in checked} == files
    printed = capsys.readouterr().out
    assert all(name in printed for name in files)


def test_labels_of_a_wheel():
    assert wheel.local_version("2.11.0+cu130", "13.0") == "torch2.11.0.cu130"
    assert wheel.local_version("2.11.0+cu130", None) == "torch2.11.0.cpu"
    metadata = (
        "Metadata-Version: 2.4\nName: torch-spe\nVersion: 1.2.3\nRequires-Dist: torch>=2.11\n"
        'Requires-Dist: torchcodec; extra == "video"\n\nText: Version: 1.2.3\n'
    )
    changed = wheel.relabel_metadata(metadata, "1.2.3+torch2.11.0.cpu", "2.11.0+cu130")
    assert changed == metadata.replace(
        "\nVersion: 1.2.3\n", "\nVersion: 1.2.3+torch2.11.0.cpu\n"
    ).replace("torch>=2.11", "torch==2.11.0")
    with pytest.raises(wheel.Error, match="METADATA: expected"):
        wheel.relabel_metadata(metadata.replace("torch>=2.11", "numpy"), "1.2.3+x", "2.11.0")
    tagged = wheel.relabel_tags(
        "Wheel-Version: 1.0\nTag: cp311-cp311-linux_x86_64\n\n", {"cp312", "cp310"}
    )
    assert tagged == (
        "Wheel-Version: 1.0\nTag: cp310-none-linux_x86_64\nTag: cp312-none-linux_x86_64\n\n"
    )


def test_a_python_without_headers_is_refused(tmp_path):
    tag, suffix, _ = wheel.probe(sys.executable)
    assert tag == f"cp3{sys.version_info.minor}"
    assert suffix.startswith(f".cpython-3{sys.version_info.minor}")
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho \'["cpython", "312", ".so", "{tmp_path}"]\'\n')
    fake.chmod(0o755)
    with pytest.raises(wheel.Error, match=r"no Python\.h"):
        wheel.probe(fake)
    fake.write_text('#!/bin/sh\necho \'["pypy", "311", ".so", "/"]\'\n')
    with pytest.raises(wheel.Error, match=r"expected CPython 3\.10 or later, got pypy 311"):
        wheel.probe(fake)


def test_headers_alone_are_enough(tmp_path):
    tag, suffix, include = wheel.probe(sys.executable)
    assert wheel.probe(include) == (tag, suffix, str(Path(include).resolve()))
    assert wheel.find_torch(include, "2.11.0", None) is None
    headers = tmp_path / "include/python3.99"  # as Debian packages have them
    headers.mkdir(parents=True)
    with pytest.raises(wheel.Error, match=r"no Python\.h in .*python3\.x-dev"):
        wheel.probe(headers)
    beside = tmp_path / "include/x86_64-linux-gnu/python3.99/pyconfig.h"
    beside.parent.mkdir(parents=True)
    beside.write_text("#define SIZEOF_LONG 8\n")
    (headers / "Python.h").touch()
    numbers = "#define PY_MAJOR_VERSION        3\n#define PY_MINOR_VERSION\t99\n"
    (headers / "patchlevel.h").write_text(f"{numbers}#define PY_MICRO_VERSION 1\n")
    (headers / "pyconfig.h").write_text("#  include <x86_64-linux-gnu/python3.99/pyconfig.h>\n")
    tag, suffix, include = wheel.probe(headers)
    assert tag == "cp399"
    assert suffix.startswith(".cpython-399-")
    whole = Path(wheel.whole_headers(include, tmp_path / "whole"))
    assert (whole / "pyconfig.h").read_text() == beside.read_text()
    assert (whole / "Python.h").is_file()


def test_which_torch_a_python_has(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho \'["/site", "2.11.0", "13.0"]\'\n')
    python.chmod(0o755)
    assert wheel.find_torch(python, "2.11.0+cu130", "13.0") == "/site"
    assert wheel.find_torch(python, "2.11.0", None) == "/site"  # of a wheel without CUDA
    assert wheel.find_torch(python, "2.11.0", "12.9") is None
    assert wheel.find_torch(python, "2.12.0", None) is None
    python.write_text("#!/bin/sh\nexit 1\n")  # no torch
    assert wheel.find_torch(python, "2.11.0", None) is None


def test_a_library_of_cuda_is_found(tmp_path):
    source = tmp_path / "empty.cpp"
    source.touch()
    runtime, library = tmp_path / "libcudart.so.13", tmp_path / "libtorch_spe.so"
    compiler = (os.environ.get("CXX", "c++"), "-shared", source, "-o")
    wheel.run(*compiler, runtime, "-Wl,-soname,libcudart.so.13")
    wheel.run(*compiler, library, "-Wl,--no-as-needed", runtime)
    with pytest.raises(wheel.Error, match=r"libtorch_spe\.so links to libcudart\.so\.13"):
        wheel.check_libraries([library], tmp_path, cuda=False)


@pytest.mark.long
def test_a_wheel_is_built_installed_and_run(tmp_path):
    output = subprocess.run(
        [sys.executable, "scripts/make_wheel.py", "--out", tmp_path],
        cwd=ROOT,
        env={"TORCH_SPE_INSTRUCTION_SETS": "native", **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert output.returncode == 0, output.stdout
    (built,) = tmp_path.iterdir()
    version = (ROOT / "VERSION").read_text().strip()
    assert built.name.startswith(f"torch_spe-{version}+torch2.")
    assert f".cpu-cp3{sys.version_info.minor}-none-manylinux" in built.name
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", built], check=True)
