"""How Sphinx makes the site from the pages of this folder: `make docs`, or
`python -m sphinx -W docs build/docs` with the dependency group `docs`.
"""

import ast
import importlib.util
import inspect
import re
import textwrap
from pathlib import Path

import torch_spe

project = "torch_spe"
author = "The torch_spe developers"
copyright = author
version = release = torch_spe.__version__

# What the list at the left shows, by caption. It is not in index.md, which GitHub shows as well.
CONTENTS = {
    "Start": ["choose", "pictures", "notebook"],
    "How to": [
        "swap", "generation", "images", "packed", "distributed", "cpp", "checkpoints", "positions",
    ],
    "More of the layers": ["layers", "pytorch", "precision", "onnx"],
    "Reference": [
        "reference/layers", "reference/positions", "reference/attention", "reference/functional",
        "reference/models", "reference/hf", "reference/distributed", "reference/onnx",
        "reference/tools",
    ],
    "Evidence": [
        "experiments", "experiments_tables", "benchmarks", "chorales", "music", "digits", "lra",
    ],
    "Inside": ["method", "cuda", "abi"],
}  # fmt: skip

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
default_role = "py:obj"
exclude_patterns = ["images/*"]
suppress_warnings = ["config.cache"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120

autodoc_default_options = {"members": True, "exclude-members": "extra_repr, config_class"}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"torch_spe {release}"
# Formulas need no network: MathJax, fonts included, is one file of a package.
MATHJAX = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax"
mathjax_path = "tex-svg.js"
html_static_path = ["static", str(MATHJAX / mathjax_path)]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
copybutton_prompt_text = ">>> |\\.\\.\\. |\\$ "
copybutton_prompt_is_regexp = True

ROOT = Path(__file__).resolve().parent.parent


def add_contents(app, docname, source):
    """Give the front page the list at the left; name what is outside and no file to fetch."""
    page = source[0]
    if docname == "index":
        for caption, pages in CONTENTS.items():
            page += (
                f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n"
                + "\n".join(pages)
                + "\n```\n"
            )

    def name_target(match):
        text, target = match.groups()
        target = ((Path(app.srcdir) / docname).parent / target).resolve()
        outside = not target.is_relative_to(app.srcdir)
        if outside and (target.is_dir() or target.suffix == ".md"):
            return (
                f"{text} (`{target.relative_to(ROOT)}`)" if text not in str(target) else f"`{text}`"
            )
        return match[0]

    source[0] = re.sub(r"\[([^\]]+)\]\((\.\./[^)#]+)\)", name_target, page)


def find_shapes(thing):
    """Return the shapes that the source has in comments beside parameters, fields and results."""
    try:
        lines = textwrap.dedent(inspect.getsource(thing)).splitlines()
        node = ast.parse("\n".join(lines)).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return []

    def beside(line):
        comment = re.search(r"# (.*\[.*)$", lines[line - 1])
        return comment and comment[1]

    if isinstance(node, ast.ClassDef):
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
        return [
            (part.target.id, beside(part.end_lineno)) for part in fields if beside(part.end_lineno)
        ]
    if not isinstance(node, ast.FunctionDef):
        return []
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    shapes = {argument.arg: beside(argument.end_lineno) for argument in arguments}
    last = node.returns.end_lineno if node.returns is not None else node.lineno
    if arguments and arguments[0].lineno == last:  # all in one line, with one comment
        tensors = [
            one.arg for one in arguments if "Tensor" in ast.unparse(one.annotation or ast.Name(""))
        ]
        given, _, result = (beside(last) or "").partition(" -> ")
        shapes = {tensors[0]: given, "returns": result} if tensors else {"returns": given}
    else:
        shapes["returns"] = beside(last)
    return [(name, shape) for name, shape in shapes.items() if shape]


def add_shapes(app, what, name, thing, options, lines):
    """List shapes of tensors with the parameters, as they stand in the source."""
    if what not in ("function", "method", "class"):
        return
    shapes = find_shapes(inspect.unwrap(thing))
    if not shapes:
        return
    entry = [":Shapes:"] + [f"    | {where} ``{shape}``" for where, shape in shapes]
    fields = [
        index for index, line in enumerate(lines) if re.match(r":(param|returns|raises)", line)
    ]
    place = fields[0] if fields else len(lines)
    lines[place:place] = ["", *entry, ""] if not fields else [*entry]


def link_pages(app, what, name, thing, options, lines):
    """Turn names of pages, as docstrings have them, into links."""
    lines[:] = [re.sub(r"\bdocs/(\w+)\.md", r":doc:`/\1`", line) for line in lines]


def setup(app):
    """Connect what is added to Sphinx."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", add_shapes, priority=900)
    app.connect("autodoc-process-docstring", link_pages, priority=900)
