"""Every experiment runs through, and the numbers that it wrote are those expected, and finite."""

import csv
import json
import math

import pytest
import torch
from conftest import FC_ALAE, ROOT

FOLDERS = ("step1_linear", "step2_gan", "step3_official_alae", "baselines")
FILES = sorted(path for path in ROOT.glob("*/*.py") if path.parent.name in FOLDERS)
EXPERIMENTS = [path.stem for path in FILES if "shared.Run(" in path.read_text()]
FACTS = {"experiment", "run", "dataset", "split", "seed", "setting", "params", "hardware", "torch"}
FACTS |= {"commands", "commits", "images_seen", "wall_s", "status"}
IMAGES = {"eval/recon_mse", "eval/identity", "eval/fid"}
SHORT = {"eval/knn_acc_short", "eval/svm_acc_short", "eval/mlp_acc_short"}
LONG = {"eval/knn_acc_long", "eval/svm_acc_long"}
EXPECTED = {
    "pca_gd": {"eval/recon_mse"},
    "linear_alae": {"eval/recon_mse", "eval/ratio_test", "eval/angle_E", "train/L_adv_ED"},
    "linear_latent_regressor": {"eval/recon_mse", "eval/ratio_test", "train/L_adv_D"},
    "linear_autoencoder": {"eval/recon_mse", "eval/ratio_test"},
    "gan_mnist": {"eval/fid", "eval/digit_kl", "eval/digit_min", "train/grad_norm_G"},
    "equalized_lr": {"lreq/recon_mse", "plain/recon_mse"},
    "aae_freiburg": IMAGES | SHORT | LONG | {"eval/prior_gap", "eval/prior_gap_floor"},
    "aae_pytorch": IMAGES | SHORT | LONG | {"eval/prior_gap", "eval/prior_gap_floor"},
    "aae_semi_supervised": IMAGES | SHORT | LONG | {"eval/error"},
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_smoke(name, finished):
    folder = finished(name)
    summary = json.loads((folder / "summary.json").read_text())
    assert FACTS | EXPECTED.get(name, IMAGES | SHORT | LONG) <= summary.keys()
    assert summary["status"] == "done"
    numbers = [value for key, value in summary.items() if "/" in key]
    assert numbers and all(math.isfinite(number) for number in numbers)
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    for row in rows:
        assert all(math.isfinite(float(value)) for value in row.values() if value)
    assert rows
    assert len(list(folder.glob("*.png"))) >= 3
    config = json.loads((folder / "config.json").read_text())["config"]
    assert config["seed"] == summary["seed"]
    model = torch.load(folder / "model.pt", weights_only=True)
    assert model["experiment"] == name and "random" not in model
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_file_runs_as_a_user_runs_it_and_needs_no_wandb(launched):
    done, folder = launched
    assert done.returncode == 0, done.stderr
    assert "eval/fid" in done.stdout and "L_adv_ED" in done.stderr
    facts = json.loads((folder / "config.json").read_text())
    assert facts["config"]["epochs"] == 1 and facts["commands"][0].startswith(f"python {FC_ALAE}")
    assert "cores" in facts["hardware"] and facts["matmul"] in ("medium", "highest")
