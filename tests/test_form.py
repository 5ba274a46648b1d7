"""The main functions of trained experiments are one text, but for lines marked '# its own'."""

import ast
import importlib
import re
import sys
from dataclasses import fields
from difflib import SequenceMatcher
from pathlib import Path

import shared

import pytest
from conftest import ROOT
from test_smoke import EXPERIMENTS, FILES

TRAINED = [path for path in FILES if "run.epochs(" in path.read_text()]


def loop(path):
    """The lines of main from `run = ` on."""
    text = path.read_text()
    (main,) = (node for node in ast.parse(text).body if getattr(node, "name", "") == "main")
    lines = text.splitlines()[main.lineno : main.end_lineno]
    start = next(i for i, line in enumerate(lines) if line.startswith("    run = shared.Run("))
    return lines[start:]


def marked(lines):
    return bool(lines) and all(line.endswith("  # its own") for line in lines)


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_loops_differ_only_where_marked(path):
    (pattern,) = (loop(other) for other in TRAINED if other.stem == "autoencoder_mnist")
    lines, shared_lines = loop(path), 0
    for tag, a, b, c, d in SequenceMatcher(None, pattern, lines).get_opcodes():
        if tag == "equal":
            shared_lines += b - a
        else:
            changed = lines[c:d] or pattern[a:b]
            assert marked(changed), changed
    assert shared_lines >= 7


def test_all_trained_experiments_are_compared():
    assert {path.stem for path in TRAINED} == set(EXPERIMENTS) - {"pca_gd"}


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


COUNTS = {"eval_every", "batch_size", "k", "latent_dim", "critic_steps", "hidden_D"}  # not 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_number_has_a_least_value_and_counts_are_not_0(name):
    for option in fields(importlib.import_module(name).Config):
        low, argument = option.metadata["low"], option.metadata["argument"]
        if type(option.default) in (int, float) and not argument["choices"]:
            assert low is not None and low <= option.default, option.name
            assert low > 0 or not (option.name in COUNTS or option.name == "lr"), option.name


def test_no_public_repository_is_called_by_a_number_of_ours():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*.py"), *ROOT.glob("*.py")]
    found = [page for page in pages if re.search("seed ?00[0-4]", page.read_text())]
    assert not found


def test_every_command_in_a_text_is_one_that_its_program_understands(monkeypatch):
    monkeypatch.chdir(ROOT)
    pages = [page for page in ROOT.glob("*/*.md") if page.parent.name != "results"]  # old commands
    commands = set()
    for page in (*ROOT.glob("*.md"), *pages, *FILES):
        commands |= set(re.findall(r"python (\w+/\w+\.py)((?: +[^\s#`|]+)*)", page.read_text()))
    parsed = 0
    for file, words in commands:
        module = importlib.import_module(Path(file).stem) if ROOT / file in FILES else None
        if hasattr(module, "Config") and "NAME" not in words:
            presets = getattr(module, "PRESETS", None)
            shared.parse_config(module.Config, presets, words.split())
            parsed += 1
    assert parsed > 40
