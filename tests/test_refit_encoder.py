"""E alone against a finished G: its loss, the descent, and the model that comes of it."""

import json
from types import SimpleNamespace

import shared

import pytest
import refit_encoder as refit
import torch
import train_fc_alae as alae
from conftest import FC_ALAE, ROOT, assert_same, record, toy_data, train, watch
from torch import nn

FILE = "step3_official_alae/refit_encoder.py"


def config_of(**options):
    config = refit.Config(**options)
    config.alae = alae.Config(latent_dim=3, width=8)
    return config


@pytest.mark.parametrize("options", alae.PRESETS.values(), ids=alae.PRESETS)
def test_the_nets_are_those_of_train_fc_alae(options):
    torch.manual_seed(0)
    config = alae.Config(**options)
    theirs, ours = alae.build(config, 784), refit.build(config, 784)
    for name in ours:
        ours[name].load_state_dict(theirs[name].state_dict())
    w, x = torch.randn(5, 50), torch.rand(5, 784)
    for name, argument in {"F": w, "G": w, "E": x}.items():
        assert ours[name](argument).equal(theirs[name](argument)), name


@pytest.mark.parametrize("loss", ["image", "latent"])
def test_a_step_moves_E_alone_and_its_loss_is_that_of_the_docstring(loss):
    torch.manual_seed(0)
    config = config_of(noise=0.0, loss=loss)
    nets = refit.build(config.alae, 6)
    optimizer = torch.optim.Adam(nets["E"].parameters(), 0.01)
    notes, z = watch(nets, E=optimizer), torch.randn(7, 3)
    w = nets["F"](z)
    x = nets["G"](w)
    error = w - nets["E"](x) if loss == "latent" else x - nets["G"](nets["E"](x))
    found = refit.train_step(nets, optimizer, z, config)
    torch.testing.assert_close(found, {"L_E": error.square().sum().detach() / 7})
    assert notes == [("E", {"E"})]


def test_the_noise_is_in_standard_deviations_of_the_codes():
    torch.manual_seed(0)
    F, z = nn.Linear(3, 3).requires_grad_(False), torch.randn(40_000, 3)
    noise = refit.noisy_codes(F, z, 0.5) - F(z)
    assert noise.std().item() == pytest.approx(0.5 * F(z).std().item(), rel=0.02)
    assert refit.noisy_codes(F, z, 0.0).equal(F(z))


def test_the_descent_finds_what_G_can_draw_and_leaves_G_alone():
    torch.manual_seed(0)
    G = nn.Linear(3, 6).requires_grad_(False)
    weight, w = G.weight.clone(), torch.randn(4, 3)
    start = w + 1
    found = refit.descend(G, start, G(w), config_of(descent_steps=500))
    torch.testing.assert_close(found, w, atol=1e-3, rtol=0)
    assert G.weight.equal(weight) and start.equal(w + 1)
    alone = refit.descend(G, start[:1], G(w)[:1], config_of(descent_steps=7))
    both = refit.descend(G, start, G(w), config_of(descent_steps=7))
    torch.testing.assert_close(alone, both[:1])  # each image by itself


def test_the_control_has_the_same_images_mirrored():
    data = toy_data()
    few, mirrored = refit.first_tests(data)
    assert few.x_test.equal(data.x_test[:20]) and few.y_test.equal(data.y_test[:20])
    assert mirrored.name == "mirrored" and len(mirrored.x_test) == 20
    rows = mirrored.x_test.unflatten(1, (28, 28))
    assert rows[:, 3, 0].equal(few.x_test.unflatten(1, (28, 28))[:, 3, 27])
    larger = data._replace(x_test=data.x_test.repeat(5, 1), y_test=None)
    assert [len(part.x_test) for part in refit.first_tests(larger)] == [100, 100]


def test_a_folder_with_few_pictures_has_fewer_in_the_picture(monkeypatch):
    monkeypatch.setattr(shared, "grid", lambda images, *_: images)
    data = toy_data()
    data = data._replace(x_test=data.x_test[:16], y_test=None)
    config = refit.Config()
    config.alae = alae.Config(width=8)
    nets, shown = refit.build(config.alae, 784), {}
    few, _ = refit.first_tests(data)
    run = SimpleNamespace(nets=nets, epoch=0, picture=shown.__setitem__)
    refit.draw(run, data, config, few.x_test, few.x_test)
    assert len(shown["comparison"]) == 4 * 10


@pytest.mark.parametrize("input_range", ["01", "11"])
def test_it_measures_what_train_fc_alae_measures(input_range, monkeypatch):
    torch.manual_seed(0)
    theirs = alae.Config(input_range=input_range, width=8)
    nets, data = alae.build(theirs, 784), toy_data()
    config = refit.Config()
    config.alae = theirs
    theirs_given = record(monkeypatch)
    alae.evaluate(nets, data, theirs, full=True)
    ours_given = record(monkeypatch)
    refit.evaluate(nets, data, config, full=True)
    assert ours_given.keys() == {"images", "short", "long"}
    assert_same(ours_given, theirs_given)


def test_the_new_model_is_evaluated_by_train_fc_alae_and_keeps_the_old_E(
    finished, few_images, here, tmp_path
):
    folder = finished("refit_encoder")
    before = torch.load(ROOT / "assets/fc_alae.pt", weights_only=True)
    after = torch.load(folder / "alae.pt", weights_only=True)
    for name in ("F", "G"):
        assert all(after[name][key].equal(before[name][key]) for key in before[name])
    old = before.get("E_as_trained", before["E"])
    assert all(after["E_as_trained"][key].equal(old[key]) for key in old)
    assert not after["E"]["0.weight"].equal(old["0.weight"].float())
    assert after["history"]["commands"][-1].startswith(f"python {FILE}")
    assert len(after["history"]["commands"]) == len(before["history"]["commands"]) + 1

    done = here(FC_ALAE, "--eval", folder / "alae.pt", "--smoke", "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    printed = dict(line.split()[:2] for line in done.stdout.splitlines() if "eval/" in line)
    for metric in ("eval/recon_mse", "eval/identity", "eval/fid"):
        assert float(printed[metric]) == pytest.approx(summary[metric], rel=1e-3)


def test_main_starts_from_the_old_E_lets_the_rate_fall_and_tells_descent_from_E(
    few_images, tmp_path, monkeypatch
):
    rates, weights, judged = [], [], []

    def train_step(nets, optimizer, *_):
        rates.append(optimizer.param_groups[0]["lr"])
        weights.append(nets["E"][0].weight.clone())
        return {"L_E": torch.zeros(())}

    def evaluate(*_, **__):
        judged.append(len(rates))
        return {}

    monkeypatch.setattr(refit, "train_step", train_step)
    monkeypatch.setattr(refit, "evaluate", evaluate)
    monkeypatch.setattr(refit, "drawn", lambda *_: ["by E", "by descent"])
    monkeypatch.setattr(refit, "draw", lambda *_: None)
    monkeypatch.setattr(shared, "image_metrics", lambda data, x_rec: {"eval/of": x_rec})
    monkeypatch.setattr(shared.Run, "finish", lambda run, metrics: rates.append(metrics))
    how = ["--smoke", "--batch-size", 200, "--eval-every", 2, "--out-dir", tmp_path]
    train(monkeypatch, refit, *how)
    metrics = rates.pop()
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    saved = torch.load(ROOT / "assets/fc_alae.pt", weights_only=True)
    assert weights[0].equal(saved["E_as_trained"]["0.weight"])
    assert judged[0] == 0  # "as trained" is measured before the training
    assert metrics["as trained, the same/of"] == "by E"
    assert metrics["descent/of"] == metrics["descent, mirrored/of"] == "by descent"


def test_the_descent_starts_at_the_code_that_E_finds(monkeypatch):
    config, data, starts = config_of(), toy_data(30, 20, size=16), []
    nets = refit.build(config.alae, 16)

    def descend(G, w, x, config):
        starts.append((w, x))
        return w

    monkeypatch.setattr(refit, "descend", descend)
    x_before, x_descent = refit.drawn(nets, data, config)
    ((w, x),) = starts
    assert w.equal(nets["E"](data.x_test)) and x.equal(data.x_test)
    assert x_before.equal(x_descent) and x_before.equal(nets["G"](w))


def test_the_falling_rate_fixes_the_length(finished, monkeypatch, capsys):
    checkpoint = finished("refit_encoder") / "checkpoint.pt"
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, refit, "--resume", checkpoint, "--epochs", 3)
    assert stop.value.code == 2 and "--epochs: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("name, own, given", [("split", "sw", "dw"), ("trained", "fast", "clean")])
def test_another_split_or_preset_than_the_models_is_refused(name, own, given, tmp_path, capsys):
    saved = torch.load(ROOT / "assets/fc_alae.pt", weights_only=True)
    saved["config"]["split"], saved["config"]["preset"] = "sw", "fast"
    torch.save(saved, tmp_path / "model.pt")
    config = refit.Config(model=str(tmp_path / "model.pt"), **{name: given})
    with pytest.raises(SystemExit):
        refit.load_alae(config)
    assert f"--{name}: leave it out, the model has its own, {own}" in capsys.readouterr().err


def test_a_model_of_an_older_version_is_refused_in_a_line(here, tmp_path):
    saved = torch.load(ROOT / "assets/fc_alae.pt", weights_only=True)
    del saved["config"]["width"]
    torch.save(saved, tmp_path / "model.pt")
    done = here(FILE, "--model", tmp_path / "model.pt", "--out-dir", tmp_path / "runs")
    assert done.returncode == 2 and "older version" in done.stderr
    assert not (tmp_path / "runs").exists()
