"""The settings behind the kept runs: those of the public codes, and ours, number by number."""

import importlib
from dataclasses import asdict

import shared

import pytest
import torch
import train_fc_alae as alae
from conftest import ROOT

OFFICIAL = {"batch_size": 128, "lr": 0.002, "gamma": 10, "err_weight": 1, "ema": 10_000}
OFFICIAL |= {"latent_dim": 50, "width": 1024, "mapping_layers": 6, "slope": 0.2, "decay": 0}
OFFICIAL |= {"input_range": "01", "mapping": "mlp", "critic": "linear", "output": "linear"}
FAST = OFFICIAL | {"batch_size": 64, "lr": 0.008, "decay": 0.5, "lr_end": 0, "epochs": 50}
FAST |= {"output": "bounded", "err_weight": 0.1}
BIGAN = {"batch_size": 128, "lr": 2e-4, "weight_decay": 2.5e-5, "latent_dim": 50}
JANUARY = {"batch_size": 128, "latent_dim": 5, "lr": 2e-4, "lr_D": 2e-4, "lr_Q": 2e-4, "sums": True}
JANUARY |= {"patience": 3, "bn_momentum": 0.1, "norm_last": True, "one_pass": False}
RESTED = {"batch_size": 64, "alpha": 0.9, "margin": 0.35, "latent_dim": 128}
SETTINGS = [
    ("train_fc_alae", "official", OFFICIAL),
    ("train_fc_alae", "fast", FAST),
    ("train_fc_alae", "signed", FAST | {"input_range": "11", "err_weight": 0.3, "lr_end": 0.4}),
    ("alae_mnist", "", {"batch_size": 64, "lr": 0.004, "gamma": 10, "ema": 10_000}),
    ("bigan_mnist", "", BIGAN | {"loss_scale": 1}),
    ("latent_regressor_mnist", "", BIGAN | {"joint": False}),
    ("autoencoder_mnist", "", {"batch_size": 128, "lr": 0.001, "latent_dim": 50, "noise": 0}),
    ("aae_pytorch", "readme", {"lr": 6e-4, "lr_reg": 8e-4, "dropout": 0.25, "prior_std": 1}),
    ("aae_freiburg", "january", JANUARY),
    ("aae_freiburg", "ours", {"lr_D": 1e-3, "lr_Q": 1e-4, "bn_momentum": 0.01, "patience": 3}),
    ("aae_semi_supervised", "", {"lr": 0.004, "lr_reg": 0.0012, "lr_sup": 0.004, "noise": 0.3}),
    ("vae_gan", "", {"lr": 3e-4, "lr_Dis": 3e-5, "alpha": 0.99, "gamma": 15, "gamma_enc": 5}),
    ("vae_gan_equilibrium", "published", RESTED | {"lr": 1e-4, "lr_decay": 0.75}),
    ("vae_gan_equilibrium", "published", {"gamma_enc": 1, "lambda_mse": 1e-6, "joint": False}),
    ("vae_gan_equilibrium", "learns", {"lr": 3e-4, "gamma_enc": 10, "lambda_mse": 1e-2}),
    ("linear_alae", "student", {"gamma": 10, "decay": 0, "steps": 4687, "lr": 0.002}),
    ("linear_alae", "recipe", {"gamma": 0.5, "decay": 0.05, "floor": 0.07, "steps": 16_000}),
]


@pytest.mark.parametrize("name, preset, settings", SETTINGS)
def test_a_preset_has_the_settings_of_its_public_code_or_of_the_kept_runs(name, preset, settings):
    module = importlib.import_module(name)
    words = ["--preset", preset] if preset else []
    config = shared.parse_config(module.Config, getattr(module, "PRESETS", None), words)
    assert {option: getattr(config, option) for option in settings} == settings


def test_the_committed_model_was_trained_by_todays_preset_clean():
    saved = torch.load(ROOT / "assets/fc_alae.pt", weights_only=True)["config"]
    config = asdict(alae.Config(preset="clean", **alae.PRESETS["clean"]))
    own = config.keys() - shared.OF_THE_MACHINE - {"eval_every", "smoke"}
    assert {name: saved[name] for name in own} == {name: config[name] for name in own}
