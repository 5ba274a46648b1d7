"""Every experiment file runs through, and the numbers it wrote are the expected ones and finite."""
import csv
import importlib
import json
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import FC_ALAE, ROOT, launch, train_here

EXPERIMENTS = sorted(str(path.relative_to(ROOT)) for folder in ("step1_linear", "step2_gan", "step3_official_alae", "baselines")
                     for path in (ROOT / folder).glob("*.py") if path.stem != "paper_table")  # it drives these: test_paper_table
FACTS = {"experiment", "dataset", "split", "seed", "images_seen", "params", "wall_s", "status", "command", "hardware", "torch"}
EVALUATION = {f"eval/{key}" for key in (
    "recon_mse", "identity", "fid", "knn_acc_short", "knn_acc_long", "svm_acc_short", "svm_acc_long", "mlp_acc_short")}

OF_ITS_OWN = {FC_ALAE: EVALUATION} | {
    f"step2_gan/{name}_mnist.py": EVALUATION for name in ("alae", "autoencoder", "bigan", "latent_regressor")} | {
    "baselines/aae.py": EVALUATION | {"eval/prior_gap", "eval/prior_gap_floor", "untrained/prior_gap"},
    "baselines/aae_semi_supervised.py": EVALUATION | {"eval/error"}, "baselines/vae_gan.py": EVALUATION | {"eval/fid_floor"},
    "step3_official_alae/equalized_lr.py": {f"{way}/{key}" for way in ("lreq", "runtime", "groups", "plain") for key in (
        "recon_mse", "L_err_EG", "update_ratio", "ms_per_step")} | {"groups/strays_1e-30", "plain/val_mse_lr_0.0001"},
    "step2_gan/gan_mnist.py": {"eval/fid", "eval/digit_kl", "eval/digit_min", "train/grad_norm_G"} | {
        f"eval/digit_{i}" for i in range(10)}, "step1_linear/compare_autoencoders.py": {
    f"mnist, k = 10: {method}/{key}" for method in ("PCA", "linear AE (l1)", "linear ALAE", "linear JLR", "random projection")
    for key in ("mse_train", "mse_test", "orthonormality", "knn_acc_short", "svm_acc_short", "mlp_acc_short")}}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Runs each file once, two at a time; returns the folder and for each file the finished process."""
    tmp_path = tmp_path_factory.mktemp("smoke")

    def run(file):
        fewer = ["--epochs", "1"] if "equalized" in file else []  # it trains in four ways
        return launch(tmp_path, file, "--smoke", "--run-name", "smoke", *fewer, OMP_NUM_THREADS="1")
    with ThreadPoolExecutor(2) as pool:
        return tmp_path, dict(zip(EXPERIMENTS, pool.map(run, EXPERIMENTS)))


@pytest.mark.parametrize("file", EXPERIMENTS)
def test_smoke(file, smoke):
    tmp_path, done = smoke[0], smoke[1][file]
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / file.split("/")[1].removesuffix(".py") / "smoke"
    summary = json.loads((folder / "summary.json").read_text())
    assert FACTS | OF_ITS_OWN.get(file, {"eval/recon_mse"}) <= summary.keys()
    assert summary["status"] == "done"
    numbers = {key: value for key, value in summary.items() if isinstance(value, float)}
    assert numbers and all(math.isfinite(value) for value in numbers.values()), numbers
    with open(folder / "metrics.csv") as table:
        rows = list(csv.DictReader(table))
    assert rows and all(math.isfinite(float(value)) for row in rows for value in row.values() if value)
    assert len(list(folder.glob("*.png"))) >= 3
    assert json.loads((folder / "config.json").read_text())["config"]["matmul"] in ("highest", "medium")
    assert torch.load(folder / "model.pt", weights_only=True)["experiment"] == summary["experiment"]
    assert not list(folder.glob(".*")), "a temporary file was left"


@pytest.mark.parametrize("file", [
    file for file in EXPERIMENTS if not file.startswith("step1") and "equalized" not in file])
def test_own_pictures_without_labels(file, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        Image.fromarray(np.random.default_rng(i).integers(255, size=(20, 30, 3), dtype=np.uint8)).save(
            tmp_path / "pictures" / f"{i}.png")
    module = importlib.import_module(Path(file).stem)  # in this process, which spares the import of torch
    with warnings.catch_warnings(record=True) as warned:
        train_here(monkeypatch, module, "--smoke", "--dataset", f"folder:{tmp_path / 'pictures'}", "--batch-size", "5", "--epochs", "1",
                   "--latent-dim", "1", "--run-name", "own", "--out-dir", str(tmp_path / "runs"),
                   *{"step2_gan/gan_mnist.py": ["--net", "dcgan"], "baselines/aae_semi_supervised.py": ["--cluster", "2"]}.get(
                       file, ["--references"]))
    assert not warned, warned[0]
    folder = tmp_path / "runs" / module.__name__ / "own"
    keys = {key for key in json.loads((folder / "summary.json").read_text()) if key.startswith("eval/") and "prior_gap" not in key}
    assert keys == (set() if "/gan_" in file else {"eval/recon_mse"}) and len(list(folder.glob("*.png"))) >= 3


def test_benchmark(here, tmp_path):
    done = here(FC_ALAE, "--smoke", "--benchmark")
    assert done.returncode == 0, done.stderr
    ratios = [float(part.split()[-1]) for part in done.stdout.split(" times torch.mm")[:-1]]
    assert len(ratios) == 2 and min(ratios) > 0 and "peak memory" in done.stdout
    assert not (tmp_path / "runs").exists()
