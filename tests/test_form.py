"""The main functions of trained experiments are one text, but for lines marked '# its own'."""

import ast
import re
import sys
from pathlib import Path

import pytest
from test_smoke import FILES

TRAINED = [path for path in FILES if "run.epochs(" in path.read_text()]


def loop(path):
    """The unmarked lines of main from `run = ` on."""
    text = path.read_text()
    (main,) = (node for node in ast.parse(text).body if getattr(node, "name", "") == "main")
    lines = text.splitlines()[main.lineno : main.end_lineno]
    start = next(i for i, line in enumerate(lines) if line.startswith("    run = shared.Run("))
    return [line for line in lines[start:] if not line.endswith("  # its own")]


@pytest.mark.parametrize("path", TRAINED[1:], ids=lambda path: path.stem)
def test_loops_differ_only_where_marked(path):
    assert loop(path) == loop(TRAINED[0])


def test_the_common_loop_is_no_empty_shell():
    assert len(TRAINED) >= 12 and len(loop(TRAINED[0])) >= 9


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_imports_nothing_of_ours_but_shared_and_that_before_torch(path):
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module.split(".")[0])
    ours = {file.stem for file in FILES} | {"table", "sweep", "figures", "baselines"}
    assert not ours & set(names) and "shared" in names
    if "torch" in names:
        assert names.index("shared") < names.index("torch")
    packages = {"torch", "torchvision", "numpy", "scipy", "matplotlib", "tqdm", "PIL", "shared"}
    assert set(names) <= packages | set(sys.stdlib_module_names)


def test_no_public_repository_is_called_by_a_number_of_ours():
    root = Path(__file__).resolve().parents[1]
    pages = [*root.glob("*.md"), *root.glob("*/*.md"), *root.glob("*/*.py"), *root.glob("*.py")]
    found = [page for page in pages if re.search("seed ?00[0-4]", page.read_text())]
    assert not found
