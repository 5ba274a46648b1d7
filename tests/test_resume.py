"""A run that was stopped ends, with --resume, bit for bit where it would have ended without."""

import csv
import importlib
import json
import os
import signal

import shared

import pytest
import torch
from conftest import assert_same, train
from test_form import TRAINED


def load(folder, name="checkpoint.pt"):
    return torch.load(folder / name, weights_only=True)


def rows(folder):
    table = list(csv.DictReader((folder / "metrics.csv").open()))
    return [{k: v for k, v in row.items() if k != "perf/images_per_s"} for row in table]


def stop_after(monkeypatch, steps):
    """Ctrl-C after so many training steps."""
    step, done = shared.Run.step, []

    def step_then_stop(run, *arguments):
        step(run, *arguments)
        done.append(1)
        if len(done) == steps:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(shared.Run, "step", step_then_stop)


@pytest.mark.parametrize("name", [path.stem for path in TRAINED])
def test_stopped_and_resumed_is_as_if_never_stopped(name, cheap, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(name)
    how = ["--smoke", "--out-dir", tmp_path, "--seed", 5, "--batch-size", 400]
    train(monkeypatch, module, *how, "--run-name", "straight")
    straight, stopped = tmp_path / name / "straight", tmp_path / name / "stopped"
    total = json.loads((straight / "summary.json").read_text())
    steps = 60 if "steps" in total else 2 * (2000 // 400)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        stop_after(patch, steps - 1 if steps < 60 or "epochs" in total else 50)
        train(patch, module, *how, "--run-name", "stopped")
    assert stop.value.code == 130
    checkpoint = stopped / "checkpoint.pt"
    assert f"--resume {checkpoint}" in capsys.readouterr().err
    assert json.loads((stopped / "summary.json").read_text())["status"] == "interrupted"
    train(monkeypatch, module, "--resume", checkpoint)

    a, b = load(straight), load(stopped)
    for part in a.keys() - {"config", "history"}:
        assert_same(a[part], b[part])
    assert rows(straight) == rows(stopped)
    after = json.loads((stopped / "summary.json").read_text())
    assert len(after["commands"]) == len(after["commits"]) == 2 and after["status"] == "done"
    assert after["images_seen"] == total["images_seen"]


@pytest.mark.parametrize("name", [path.stem for path in TRAINED])
def test_eval_measures_model_and_checkpoint_without_training(name, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    seen = []
    monkeypatch.setattr(shared.Run, "picture", lambda run, name, figure: None)
    monkeypatch.setattr(shared, "code_metrics", lambda *_, **__: {})
    monkeypatch.setattr(shared, "fid", lambda real, fake: fake.mean().item())
    monkeypatch.setattr(shared.Run, "finish", lambda run, metrics: seen.append((run, metrics)))
    how = ["--smoke", "--out-dir", tmp_path]
    train(monkeypatch, module, *how, "--run-name", "trained", "--batch-size", 400)
    run, metrics = seen.pop()
    run.save(run.nets, "model.pt")
    for file in ("model.pt", "checkpoint.pt"):
        path = tmp_path / name / "trained" / file
        train(monkeypatch, module, "--eval", path, *how, "--run-name", f"eval-{file}")
        again, found = seen.pop()
        assert again.epoch == run.epoch and again.bar is None
        assert found and found == pytest.approx({key: metrics[key] for key in found}, rel=1e-6)


@pytest.mark.parametrize("name", [path.stem for path in TRAINED])
def test_no_epochs_evaluates_the_untrained_nets(name, cheap, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    none = ["--steps", 0] if hasattr(module.Config, "steps") else ["--epochs", 0]
    how = ["--smoke", "--out-dir", tmp_path, "--run-name", "untrained"]
    train(monkeypatch, module, *how, *none)
    assert load(tmp_path / name / "untrained", "model.pt")["epoch"] == 0
