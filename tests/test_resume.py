"""A run that was stopped ends, with --resume, bit for bit where it would have ended without."""

import csv
import importlib
import json
import os
import signal
from dataclasses import asdict, replace

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


def stop_after(monkeypatch, steps, number):
    """Ctrl-C, or kill, after so many training steps."""
    step, done = shared.Run.step, []

    def step_then_stop(run, *arguments):
        step(run, *arguments)
        done.append(1)
        if len(done) == steps:
            os.kill(os.getpid(), number)

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
        stop_after(patch, steps, signal.SIGTERM if "steps" in total else signal.SIGINT)
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
        assert run.facts["commands"][:-1] == trained["commands"] and not run.rows
        assert metrics == pytest.approx({key: trained[key] for key in metrics}, rel=1e-6)
        assert metrics


@pytest.mark.parametrize("way", ("resume", "eval"))
def test_a_smoke_run_is_shortened_only_at_its_start(way):
    for name, length, short in (("train_fc_alae", "epochs", 2), ("linear_alae", "steps", 60)):
        Config = importlib.import_module(name).Config
        for expected, more in ((short, {}), (90, {way: "model.pt"})):
            config = Config(smoke=True, **{length: 90}, **more)
            shared.setup(config)
            assert getattr(config, length) == expected


@pytest.mark.parametrize("name", NAMES)
def test_no_epochs_evaluates_the_untrained_nets(name, cheap, few_images, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    none = ["--steps", 0] if hasattr(module.Config, "steps") else ["--epochs", 0]
    how = [*smoke_options(module), "--out-dir", tmp_path, "--run-name", "untrained"]
    train(monkeypatch, module, *how, *none)
    assert load(tmp_path / name / "untrained", "model.pt")["epoch"] == 0


def test_a_resumed_run_goes_on_with_its_clock_and_the_random_states_of_all_gpus(
    cheap, few_images, tmp_path, monkeypatch
):
    restored, states = [], [torch.tensor([i], dtype=torch.uint8) for i in (7, 8)]
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
    module = importlib.import_module("train_fc_alae")
    options = ["--batch-size", 400, "--out-dir", tmp_path, "--run-name", "mine"]
    train(monkeypatch, module, *options, "--epochs", 1)
    folder = tmp_path / "train_fc_alae/mine"
    content = load(folder)
    content["history"]["wall_s"] = 5000.0
    torch.save(content, folder / "checkpoint.pt")
    assert not restored
    train(monkeypatch, module, "--resume", folder / "checkpoint.pt", "--epochs", 2)
    assert_same(restored, [states])
    assert 5000 <= json.loads((folder / "summary.json").read_text())["wall_s"] < 5100


MACHINE = {"device": "cpu", "data_dir": "elsewhere", "wandb": True}
CHANGES = [  # what may be said beside each, and is then so
    ("resume", MACHINE | {"epochs": 9}),
    ("eval", MACHINE | {"out_dir": "o", "run_name": "n", "split": "val", "dataset": "cifar10"}),
    ("eval", {"smoke": True, "eval_weights": "raw"}),
]


@pytest.mark.parametrize("way, changes", CHANGES)
def test_what_may_be_said_beside_resume_and_eval(way, changes, tmp_path):
    module = importlib.import_module("train_fc_alae")
    own = module.Config(lr=0.5, epochs=3, out_dir="far", run_name="r", resume="a", device="mps")
    content = {"experiment": "train_fc_alae", "config": asdict(own), "random": 0}
    torch.save(content, tmp_path / "c.pt")
    argv = [f"--{way}", str(tmp_path / "c.pt")]
    for name, value in changes.items():
        argv.append(f"--{name}" if value is True else f"--{name}={value}")
    config = shared.parse_config(module.Config, module.PRESETS, argv)
    expected = module.Config(lr=0.5, epochs=3) if way == "eval" else own
    given = changes | {way: str(tmp_path / "c.pt")}
    assert config == replace(expected, **given)


@pytest.mark.parametrize("own", ("dw", "sw", "val"))
@pytest.mark.parametrize("asked", ("dw", "sw", "val"))
def test_a_model_is_not_evaluated_on_images_that_it_was_trained_on(own, asked, tmp_path):
    module = importlib.import_module("train_fc_alae")
    content = {"experiment": "train_fc_alae", "config": asdict(module.Config(split=own))}
    torch.save(content, tmp_path / "m.pt")
    argv = ["--eval", str(tmp_path / "m.pt"), "--split", asked]
    if (own, asked) in (("dw", "sw"), ("dw", "val"), ("sw", "val")):
        with pytest.raises(SystemExit):
            shared.parse_config(module.Config, module.PRESETS, argv)
    else:
        assert shared.parse_config(module.Config, module.PRESETS, argv).split == asked


@pytest.mark.parametrize("way", ("resume", "eval"))
@pytest.mark.parametrize("name", ("eval_every", "seed", "preset", "decay", "eval_weights"))
def test_what_may_not_be_said_beside_resume_and_a_trained_model(way, name, tmp_path, capsys):
    module = importlib.import_module("train_fc_alae")
    config = module.Config()
    torch.save({"experiment": "train_fc_alae", "config": asdict(config)}, tmp_path / "c.pt")
    argv = [f"--{way}", str(tmp_path / "c.pt"), f"--{name}={getattr(config, name)}"]
    with pytest.raises(SystemExit):
        shared.parse_config(module.Config, module.PRESETS, argv)
    assert f"--{name.replace('_', '-')}: leave it out" in capsys.readouterr().err
