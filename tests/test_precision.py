"""--precision bf16: products in bf16, all else in fp32; each step sees the weights of its time."""

import csv
import importlib

import shared

import bf16_rules
import pytest
import torch
import train_fc_alae as alae
from conftest import smoke_options, train
from test_form import TRAINED
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

NAMES = [path.stem for path in TRAINED if "shared.products(" in path.read_text()]


def test_all_but_the_linear_experiments_and_the_comparison_of_optimizers_have_it():
    others = {path.stem for path in TRAINED} - set(NAMES)
    linear = {"linear_alae", "linear_autoencoder", "linear_latent_regressor"}
    assert others == linear | {"equalized_lr"}
    for name in NAMES:
        assert importlib.import_module(name).Config().precision == "fp32"


@pytest.mark.parametrize("name", NAMES)
def test_bf16_trains_fp32_weights_as_fp32_does(name, finished, few_images, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    module, seen = importlib.import_module(name), set()
    options = [*smoke_options(module), "--precision", "bf16", "--out-dir", tmp_path]
    step, kinds_of_losses = shared.Run.step, set()

    def noting_step(run, losses, images):
        kinds_of_losses.update(loss.dtype for key, loss in losses.items() if key.startswith("L_"))
        step(run, losses, images)

    monkeypatch.setattr(shared.Run, "step", noting_step)
    with register_module_forward_hook(lambda net, x, out: seen.add(getattr(out, "dtype", None))):
        train(monkeypatch, module, *options, "--run-name", "run")
    assert torch.bfloat16 in seen and kinds_of_losses == {torch.float32}
    model = torch.load(tmp_path / name / "run/model.pt", weights_only=True)
    kept = {}
    for state in model.values():
        kept |= state if isinstance(state, dict) else {}
    kinds = {t.dtype for t in kept.values() if isinstance(t, torch.Tensor)}
    assert torch.float32 in kinds and kinds <= {torch.float32, torch.int64}
    first = []
    for folder in (finished(name), tmp_path / name / "run"):
        with open(folder / "metrics.csv") as file:
            first.append(next(csv.DictReader(file)))
    losses = [key for key in first[0] if key.startswith("train/L_")]
    assert losses
    for key in losses:
        assert float(first[1][key]) == pytest.approx(float(first[0][key]), rel=0.05, abs=0.02)


def test_each_step_sees_the_weights_that_the_one_before_has_moved():
    """At a large rate; a cast that outlives its weights would leave Step II where Step I began."""
    found = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        config = alae.Config(precision=precision, lr=0.05, latent_dim=10)
        nets = alae.build(config, 64)
        opt_ED = alae.LREQAdam(nets["E"], nets["D"], lr=config.lr)
        opt_FG = alae.LREQAdam(nets["F"], nets["G"], lr=config.lr)
        losses = alae.train_step(nets, opt_ED, opt_FG, torch.rand(32, 64), config)
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        assert all(p.grad.dtype == torch.float32 for p in nets.parameters())
        found[precision] = {name: loss.item() for name, loss in losses.items()}
    for name, loss in found["fp32"].items():
        assert found["bf16"][name] == pytest.approx(loss, rel=0.05), name
    start = alae.L_adv_FG(nets["D"], nets["E"], nets["G"](torch.zeros(32, 10)))
    assert abs(start.item() - found["fp32"]["L_adv_FG"]) > 0.2, "the rate is large enough to tell"


def test_layers_that_stay_in_fp32():
    net = shared.Float32(nn.Linear(4, 3))
    with shared.products(alae.Config(precision="bf16"), torch.device("cpu")):
        assert nn.Linear(4, 3)(torch.rand(2, 4)).dtype == torch.bfloat16
        assert net(torch.rand(2, 4).bfloat16()).dtype == torch.float32
    with shared.products(alae.Config(), torch.device("cpu")):
        assert nn.Linear(4, 3)(torch.rand(2, 4)).dtype == torch.float32
    assert net.double()(torch.rand(2, 4).double()).dtype == torch.float64


def test_a_processor_without_such_products_is_told_and_runs_fp32(monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    config = alae.Config(precision="bf16", device="cpu")
    shared.setup(config)
    assert config.precision == "fp32" and "fp32 it is" in capsys.readouterr().err


RULES = {  # what else than `ours` a rule has in fp32 (32), in bf16 (16), or in both (48)
    "fp32": {"G": 32, "G's end": 32, "E": 32, "E's end": 32},
    "ours": {},
    "outputs-fp32": {"G's end": 32, "E's end": 32},
    "r1-fp32": {"E": 48, "E's end": 48},
    "F-D-bf16": {"F": 16, "D": 16},
    "one-context": {},
    "whole-step": {"F": 16, "D": 16},
    "rounded-weights": {"G": 32, "G's end": 32, "E": 32, "E's end": 32},
}


@pytest.mark.parametrize("preset", bf16_rules.PRESETS)
def test_a_rule_of_the_study_changes_what_it_says(preset, monkeypatch):
    for name in ("build", "train_step", "L_adv_ED"):
        monkeypatch.setattr(alae, name, getattr(alae, name))  # to be put back
    losses, seen = {}, {}

    def training(config):
        torch.manual_seed(0)
        nets = alae.build(config, 64)
        layers = {"F": nets["F"][1], "D": nets["D"][0], "G": nets["G"][0], "E": nets["E"][0]}
        layers |= {"G's end": nets["G"][4], "E's end": nets["E"][4]}
        for name, layer in layers.items():
            kinds = seen.setdefault(name, set())
            layer.register_forward_hook(lambda net, x, out, to=kinds: to.add(out.dtype))
        opt_ED = alae.LREQAdam(nets["E"], nets["D"], lr=config.lr)
        opt_FG = alae.LREQAdam(nets["F"], nets["G"], lr=config.lr)
        losses.update(alae.train_step(nets, opt_ED, opt_FG, torch.rand(32, 64), config))

    monkeypatch.setattr(alae, "main", training)
    options = bf16_rules.PRESETS[preset] | {"preset": preset, "lr": 0.05, "latent_dim": 10}
    bf16_rules.main(bf16_rules.Config(**options))
    expected = {"F": 32, "D": 32, "G": 16, "G's end": 16, "E": 16, "E's end": 16} | RULES[preset]
    kinds = {16: {torch.bfloat16}, 32: {torch.float32}, 48: {torch.bfloat16, torch.float32}}
    assert seen == {name: kinds[bits] for name, bits in expected.items()}
    blind = losses["L_adv_FG"] > 0.5  # Step II does not see how Step I has moved the critic
    assert blind == (preset in ("one-context", "whole-step")), losses["L_adv_FG"]


def test_a_rounded_layer_multiplies_by_bf16_weights_and_keeps_their_gradient():
    layer = bf16_rules.Rounded(4, 3)
    x, exact = torch.rand(2, 4), layer.weight.detach().clone()
    out = layer(x)
    torch.testing.assert_close(out, x @ exact.bfloat16().float().T)
    assert (out - x @ exact.T).abs().max() > 1e-4
    out.sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(3, 4))
    layer.requires_grad_(False)
    assert torch.equal(layer(x), nn.functional.linear(x, exact, layer.bias))
