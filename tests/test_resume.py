"""Networks trained epoch by epoch (step 2 and the baselines) end, after Ctrl-C and --resume, where they would have without."""
import csv
import os
import signal

import pytest
import torch
from conftest import ROOT, assert_same, train_here

import aae
import aae_semi_supervised
import alae_mnist
import autoencoder_mnist
import bigan_mnist
import gan_mnist
import latent_regressor_mnist
import shared
import vae_gan

FILES = {module.__name__: module for module in (
    aae, aae_semi_supervised, alae_mnist, autoencoder_mnist, bigan_mnist, gan_mnist, latent_regressor_mnist, vae_gan)}


@pytest.mark.parametrize("name", FILES)
def test_ctrl_c_in_an_epoch_saves_and_resumes(name, bare, tmp_path, monkeypatch, capsys):
    module, tick = FILES[name], shared.Run.tick
    extra = ["--smoke", "--epochs", "2", "--batch-size", "128", "--out-dir", str(tmp_path)]
    train_here(monkeypatch, module, *extra, "--run-name", "straight")
    folder = tmp_path / name / "stopped"

    def tick_then_signal(run, *args):
        tick(run, *args)
        if run.at["steps"] == steps + 2:  # the second step of the second epoch
            os.kill(os.getpid(), signal.SIGINT)
    steps = torch.load(tmp_path / name / "straight/checkpoint.pt", weights_only=True)["run"]["steps"] // 2
    with monkeypatch.context() as patch:
        patch.setattr(shared.Run, "tick", tick_then_signal)
        with pytest.raises(SystemExit) as stop:
            train_here(patch, module, *extra, "--run-name", "stopped")
    assert stop.value.code == 130 and f"--resume {folder / 'checkpoint.pt'}" in capsys.readouterr().err
    train_here(monkeypatch, module, "--resume", str(folder / "checkpoint.pt"))
    a, b = (torch.load(tmp_path / name / run / "checkpoint.pt", weights_only=True) for run in ("straight", "stopped"))
    for part in a.keys() - {"config", "run"}:
        assert_same(a[part], b[part])
    rows = [list(csv.DictReader(open(tmp_path / name / run / "metrics.csv"))) for run in ("straight", "stopped")]
    assert len(rows[0]) == 3 and [[r | {"perf/images_per_s": ""} for r in run] for run in rows][0] == [
        r | {"perf/images_per_s": ""} for r in rows[1]]


@pytest.mark.parametrize("name", FILES)
def test_benchmark(name, tmp_path, monkeypatch, capsys):
    train_here(monkeypatch, FILES[name], "--smoke", "--benchmark", "--out-dir", str(tmp_path))
    words = capsys.readouterr().out.split()
    assert float(words[words.index("images/s") - 1]) > 0 and not list(tmp_path.iterdir())


def test_layout():
    assert {path.stem for folder in ("step2_gan", "baselines") for path in (ROOT / folder).glob("*.py")} == FILES.keys()
