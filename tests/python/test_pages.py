"""The examples of README, of the pages and of the notebook run; the reference lists every name."""

import ast
import importlib
import inspect
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.cpu_only
ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]

# Their tests need the definitions of the page, or a process group.
ELSEWHERE = {
    "distributed.md": "test_distributed.py",
    "positions.md": "test_positions.py",
    "precision.md": "test_precision.py",
}
# What stands in a reader's program before the examples of a page.
BEFORE = {
    "README.md": "import torch\nbatch, length = 2, 9\n"
    "queries = keys = values = torch.ones(2, 9, 8, 64)",
    "generation.md, Hugging Face transformers": "import torch",
}
# Sections that run by themselves, and packages that a page or section needs.
APART = {
    ("generation.md", "Hugging Face transformers"): "transformers",
    ("pytorch.md", "Compiled and exported"): None,
    ("pytorch.md", "Lightning"): "lightning",
}
NEEDED = {"onnx.md": "onnxruntime"}
LONG = {"pytorch.md, Compiled and exported", "pytorch.md, Lightning"}


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def make_examples():
    """For each page, and for each section apart: its name, a package, and its blocks."""
    for page in PAGES:
        rest = []
        for section in re.split(r"(?=^## )", page.read_text(), flags=re.MULTILINE):
            heading = section.partition("\n")[0].removeprefix("## ")
            if (page.name, heading) in APART:
                package = APART[page.name, heading]
                yield f"{page.name}, {heading}", package, python_blocks(section)
            else:
                rest += python_blocks(section)
        if rest and page.name not in ELSEWHERE:
            yield page.name, NEEDED.get(page.name), rest


EXAMPLES = [
    pytest.param(*example, id=example[0], marks=[pytest.mark.long] * (example[0] in LONG))
    for example in make_examples()
]


@pytest.mark.parametrize(("name", "package", "blocks"), EXAMPLES)
def test_the_examples_run(name, package, blocks, tmp_path, monkeypatch):
    if package is not None:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.manual_seed(0)
    names = {"__name__": "example"}
    for block in [BEFORE.get(name, ""), *blocks]:
        exec(compile(block, name, "exec"), names)


def strings(node):
    parts = (part for part in ast.walk(node) if isinstance(part, ast.Constant))
    return {part.value for part in parts if isinstance(part.value, str)}


def runs_the_blocks(program, page):
    """Whether a function executes the Python blocks of a path that has the page's name."""
    tree = ast.parse(program)
    paths = {
        target.id
        for part in tree.body
        if isinstance(part, ast.Assign) and page in strings(part)
        for target in part.targets
    }
    for part in ast.walk(tree):
        if isinstance(part, ast.FunctionDef):
            names = {one.id for one in ast.walk(part) if isinstance(one, ast.Name)}
            blocks = any(text.startswith("```python") for text in strings(part))
            if blocks and "exec" in names and (paths & names or page in strings(part)):
                return True
    return False


def test_other_pages_have_tests():
    for page, test in ELSEWHERE.items():
        assert python_blocks((DOCS / page).read_text())
        program = (ROOT / "tests/python" / test).read_text()
        assert runs_the_blocks(program, page), f"{test} does not execute the examples of {page}"
        for changed in (
            program.replace(page, "another.md"),
            program.replace("exec(", "print("),
            program.replace("```python", "```cpp"),
        ):
            assert not runs_the_blocks(changed, page)


def test_the_notebook_runs():
    # The site's build runs it in Jupyter; its code alone is quick.
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    notebook = json.loads((DOCS / "notebook.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names = {}
    with pyplot.rc_context():
        for cell in cells:
            exec("".join(cell["source"]), names)
            pyplot.close("all")
    assert names["errors"][-1] < 0.1 * names["errors"][0]


def names_in_the_reference():
    names = set()
    for page in (DOCS / "reference").glob("*.md"):
        module = None
        for line in page.read_text().splitlines():
            if match := re.fullmatch(r"\.\. (currentmodule|auto\w+):: (\S+)", line):
                kind, name = match.groups()
                module = name if kind == "currentmodule" else module
                if kind != "currentmodule":
                    assert f"{module}.{name}" not in names, f"{module}.{name} is listed twice"
                    names.add(f"{module}.{name}")
    return names


def public_names(module):
    """What `__all__` of a module says, without importing what the module needs."""
    path = ROOT / "python" / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return {f"{module}.{name}" for name in ast.literal_eval(node.value)}
    raise AssertionError(f"{module} has no __all__")


def test_every_public_name_is_in_the_reference():
    listed = names_in_the_reference()
    parts = ("functional", "models", "hf", "distributed", "onnx", "plots")
    public = set().union(*(public_names(f"torch_spe.{part}") for part in parts))
    modules = {"torch_spe.functional", "torch_spe.reference"}
    assert (public_names("torch_spe") - modules) | public <= listed
    functions = ast.parse((ROOT / "python/torch_spe/reference.py").read_text()).body
    names = [one.name for one in functions if isinstance(one, ast.FunctionDef)]
    assert {f"torch_spe.reference.{name}" for name in names if name[0] != "_"} <= listed


def test_the_reference_has_shapes(monkeypatch):
    """Every tensor that an operator or a layer takes has its shape on the site."""
    monkeypatch.syspath_prepend(str(DOCS))
    find_shapes = importlib.import_module("conf").find_shapes
    without = set()
    for name in names_in_the_reference():
        module, _, attribute = name.rpartition(".")
        if module.startswith(("torch_spe.hf", "torch_spe.onnx")):
            continue  # these need more packages
        thing = getattr(importlib.import_module(module), attribute)
        members = [thing]
        if isinstance(thing, type):  # and what it does not inherit, with its description
            inherited = set().union(*(vars(base) for base in thing.__mro__[1:]))
            members = [value for key, value in vars(thing).items() if key not in inherited]
        for function in map(inspect.unwrap, members):
            if not inspect.isfunction(function) or function.__name__.startswith("_"):
                continue
            annotations = {**function.__annotations__, "return": None}
            tensors = {where for where, kind in annotations.items() if kind == "Tensor"}
            missing = tensors - {where for where, _ in find_shapes(function)}
            without |= {f"{name}.{function.__name__}: {where}" for where in missing}
    assert without == set()


@pytest.mark.long
def test_the_site_builds_without_warnings(tmp_path):
    for package in (
        *("furo", "myst_nb", "sphinx_copybutton", "sphinx-mathjax-offline"),
        *("transformers", "onnxscript"),
    ):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", DOCS, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in PAGES[1:]:
        assert (tmp_path / page.with_suffix(".html").name).is_file(), page
    # No page needs the network: scripts and styles, MathJax among them, are files of the site.
    elsewhere = re.compile(r'<(script|link rel="stylesheet")[^>]+(src|href)="(https?:)?//')
    assert [page for page in tmp_path.rglob("*.html") if elsewhere.search(page.read_text())] == []
    assert (tmp_path / "_static/tex-svg.js").is_file()
    reference = "".join(page.read_text() for page in (tmp_path / "reference").glob("*.html"))
    for name in names_in_the_reference():
        assert f'id="{name}"' in reference
    notebook = (tmp_path / "notebook.html").read_text()
    assert notebook.count('src="_images/') >= 5  # pictures that its cells made


@pytest.mark.long
def test_the_figures_are_those_of_the_library(tmp_path):
    image = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("matplotlib")
    subprocess.run([sys.executable, DOCS / "figures", "--out", tmp_path], check=True)
    made = sorted(tmp_path.glob("*.png"))
    assert len(made) == 13
    for path in made:
        pixels = [
            numpy.asarray(image.open(one).convert("RGB"), dtype=float)
            for one in (path, DOCS / "images" / path.name)
        ]
        assert pixels[0].shape == pixels[1].shape, path.name
        # Rounding on another processor moves a line by less than a pixel.
        assert abs(pixels[0] - pixels[1]).mean() < 2, path.name
