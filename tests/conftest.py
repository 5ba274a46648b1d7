import os
import runpy
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / folder) for folder in ("step1_linear", "step2_gan", "step3_official_alae", "baselines", "results"))]
import shared  # noqa: E402
# Nobody is logged in to W&B, and nothing can be downloaded: a proxy that refuses.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | {
    "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "NETRC": "/dev/null",
    "WANDB_CONFIG_DIR": "/nonexistent"}
FC_ALAE = "step3_official_alae/train_fc_alae.py"


def launch(tmp_path, file, *args, cwd=ROOT, **environment):
    """Runs a file of the repo as a user does, with runs in tmp_path/runs; returns the finished process."""
    return subprocess.run([sys.executable, str(ROOT / file), *with_out_dir(tmp_path, file, args)], cwd=cwd, text=True,
                          env=ENVIRONMENT | environment, capture_output=True, timeout=300)


def with_out_dir(tmp_path, file, args):
    own = "--out-dir" in args or "--resume" in args or file.startswith("results")
    return [*map(str, args), *([] if own else ["--out-dir", str(tmp_path / "runs")])]


@pytest.fixture
def command(tmp_path):
    return partial(launch, tmp_path)


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """As `command`, but in this process, which spares the imports."""
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)

    def run(file, *args):
        for key, value in ENVIRONMENT.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(sys, "argv", [str(ROOT / file), *with_out_dir(tmp_path, file, args)])
        code = 0
        try:
            with signals_kept():
                runpy.run_path(str(ROOT / file), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return subprocess.CompletedProcess(args, code, said.out, said.err)
    yield run
    torch.set_float32_matmul_precision(precision), torch.set_default_dtype(dtype)


@pytest.fixture
def unpictured(monkeypatch):
    """Training without pictures, a good part of a short run's time."""
    monkeypatch.setattr(shared.Run, "picture", lambda *_: None)


@pytest.fixture
def bare(unpictured, monkeypatch):
    """Training without pictures and accuracies."""
    monkeypatch.setattr(shared, "accuracies", lambda *_, **__: {})


@contextmanager
def signals_kept():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train_here(patch, module, *args):
    """Runs an experiment in this process; patch: pytest's monkeypatch."""
    patch.setattr(sys, "argv", [module.__file__, *args])
    with signals_kept():
        module.main(module.shared.parse_config(module.Config))


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
    if isinstance(a, (dict, list, tuple)):
        for i in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[i], b[i])
    else:
        assert a.equal(b) if isinstance(a, torch.Tensor) else a == b


def watch(nets, **optimizers):
    """Makes each optimizer note which of the networks its step moves; returns the list of notes."""
    seen = []

    def values():
        return {name: torch.cat([p.detach().flatten().clone() for p in net.parameters()]) for name, net in nets.items()}
    for name, optimizer in optimizers.items():
        def step(real=optimizer.step, name=name):
            before = values()
            real()
            seen.append((name, {n for n, v in values().items() if not v.equal(before[n])}))
        optimizer.step = step
    return seen


def adam(*nets):
    return torch.optim.Adam([p for net in nets for p in net.parameters()], 1e-3)
