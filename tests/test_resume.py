"""A run that was stopped ends, with --resume, bit for bit where it would have ended without."""

import csv
import importlib
import json
import os
import signal

import shared

import pytest
import torch
from conftest import assert_same, smoke_options, train
from test_form import TRAINED

NAMES = [path.stem for path in TRAINED]


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


@pytest.mark.parametrize("name", NAMES)
def test_stopped_and_resumed_is_as_if_never_stopped(
    name, finished, few_images, tmp_path, monkeypatch, capsys
):
    module = importlib.import_module(name)
    straight, stopped = finished(name), tmp_path / name / "stopped"
    total = json.loads((straight / "summary.json").read_text())
    steps = 50 if "steps" in total else 3  # of 60, or of 2 epochs of 2

    monkeypatch.setattr(shared.Run, "picture", lambda *_: None)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        stop_after(patch, steps)
        options = [*smoke_options(module), "--out-dir", tmp_path]
        train(patch, module, *options, "--run-name", "stopped")
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
    assert after["images_seen"] == total["images_seen"] == (60 if "steps" in total else 4) * 200


@pytest.mark.parametrize("name", NAMES)
def test_eval_measures_model_and_checkpoint_without_training(
    name, finished, few_images, tmp_path, monkeypatch
):
    module, folder, ended = importlib.import_module(name), finished(name), []
    trained = json.loads((folder / "summary.json").read_text())
    monkeypatch.setattr(shared.Run, "picture", lambda *_: None)
    monkeypatch.setattr(shared.Run, "finish", lambda run, metrics: ended.append((run, metrics)))
    for file in ("model.pt", "checkpoint.pt"):
        options = ["--eval", folder / file, "--smoke", "--out-dir", tmp_path, "--run-name", file]
        train(monkeypatch, module, *options)
        run, metrics = ended.pop()
        assert run.epoch == trained[f"{run.unit}s"] > 0 and run.bar.n == 0
        assert metrics == pytest.approx({key: trained[key] for key in metrics}, rel=1e-6)
        assert metrics


@pytest.mark.parametrize("name", NAMES)
def test_no_epochs_evaluates_the_untrained_nets(name, cheap, few_images, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    none = ["--steps", 0] if hasattr(module.Config, "steps") else ["--epochs", 0]
    how = [*smoke_options(module), "--out-dir", tmp_path, "--run-name", "untrained"]
    train(monkeypatch, module, *how, *none)
    assert load(tmp_path / name / "untrained", "model.pt")["epoch"] == 0
