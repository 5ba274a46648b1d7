"""The distilled official ALAE: its optimizer, its losses, which parameters each step moves, and going on after a stop."""
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from conftest import ENVIRONMENT, FC_ALAE, ROOT, assert_same, train_here
from torch import nn

import shared
import train_fc_alae as alae


def small(**options):
    config = alae.Config(latent_dim=5, **options)
    torch.manual_seed(0)
    return config, alae.start(config, 20, "cpu")


def test_sizes():
    nets = alae.build(alae.Config(), 784)
    sizes = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    assert sizes == {"F": 15_300, "G": 1_905_424, "E": 1_904_690, "D": 5_151}


def test_pixel_norm():
    z = alae.PixelNorm()(torch.randn(7, 50) * 3)
    torch.testing.assert_close(z.square().mean(1), torch.ones(7))


def test_lreq_adam_is_the_official_formula():
    torch.manual_seed(0)
    layer = alae.Linear(6, 3, lrmul=0.1).double()
    assert layer.weight.lr_equalization_coef == pytest.approx(0.1 * (2 / 6) ** 0.5)
    assert layer.bias.lr_equalization_coef == 0.1
    w = [p.detach().clone() for p in layer.parameters()]
    v = [torch.zeros_like(p) for p in w]
    optimizer = alae.LREQAdam(layer.parameters(), lr=0.002, eps=1e-3)  # an ε that shows
    for t in range(1, 8):
        for p, w_, v_ in zip(layer.parameters(), w, v):
            g = torch.randn_like(p) * (t != 4)  # one step without gradient
            p.grad = g
            v_.copy_(0.99 * v_ + 0.01 * g ** 2)
            w_ -= 0.002 * p.lr_equalization_coef * (1 - 0.99 ** t) ** 0.5 * g / (v_.sqrt() + 1e-3)
        optimizer.step()
        for p, w_ in zip(layer.parameters(), w):
            torch.testing.assert_close(p.detach(), w_, rtol=1e-12, atol=1e-14)


def test_lreq_adam_is_runtime_scaling_under_adam():
    """PGGAN keeps ŵ ~ N(0, 1) and uses w = c ŵ; with β1 = 0 and ε → 0, w takes the same path under LREQAdam."""
    torch.manual_seed(0)
    folded = nn.Sequential(alae.Linear(6, 4), nn.LeakyReLU(0.2), alae.Linear(4, 2, lrmul=0.1))
    folded.double()
    coefs = [p.lr_equalization_coef for p in folded.parameters()]
    hats = [(p.detach() / c).requires_grad_() for p, c in zip(folded.parameters(), coefs)]
    lreq = alae.LREQAdam(folded.parameters(), lr=0.01, eps=1e-30)
    adam = torch.optim.Adam(hats, lr=0.01, betas=(0.0, 0.99), eps=1e-30)
    for _ in range(100):
        x = torch.randn(8, 6, dtype=torch.float64)
        lreq.zero_grad(), adam.zero_grad()
        folded(x).square().sum().backward()
        a, b, c, d = (hat * coef for hat, coef in zip(hats, coefs))
        (nn.functional.leaky_relu(x @ a.T + b, 0.2) @ c.T + d).square().sum().backward()
        lreq.step(), adam.step()
    for p, hat, c in zip(folded.parameters(), hats, coefs):
        torch.testing.assert_close(p.detach(), c * hat.detach(), rtol=1e-9, atol=1e-12)


def test_r1_of_a_linear_critic():
    D, gamma = nn.Linear(20, 1), 10.0
    loss, r1 = alae.L_adv_ED(D, nn.Identity(), torch.randn(9, 20), torch.randn(9, 20), gamma)
    torch.testing.assert_close(r1, gamma / 2 * D.weight.square().sum())
    assert loss > r1


def test_adversarial_losses():
    D, E, zeros = nn.Linear(3, 1), nn.Identity(), torch.zeros(4, 3)
    with torch.no_grad():
        D.weight.fill_(1.0), D.bias.fill_(2.0)  # 2 on zeros, 5 on ones
    softplus = nn.functional.softplus
    loss, r1 = alae.L_adv_ED(D, E, x=zeros + 1, x_fake=zeros, gamma=0.0)
    torch.testing.assert_close(loss, softplus(torch.tensor(2.0)) + softplus(torch.tensor(-5.0)))
    torch.testing.assert_close(alae.L_adv_FG(D, E, zeros), softplus(torch.tensor(-2.0)))
    torch.testing.assert_close(alae.L_err_EG(lambda x: 3 * x, lambda w: w, torch.ones(4, 3)), torch.tensor(4.0))


def test_what_each_step_moves():
    config, parts = small()
    nets, seen = parts["nets"], []

    def values():
        return {name: torch.cat([p.detach().flatten().clone() for p in net.parameters()]) for name, net in nets.items()}

    def second_moment():
        return parts["opt_ED"].state[nets["D"][0].weight]["exp_avg_sq"].clone()
    for name in ("opt_ED", "opt_FG"):
        def step(optimizer=parts[name], name=name, real=parts[name].step):
            before = values()
            real()
            seen.append((name, {n for n, v in values().items() if not v.equal(before[n])}, second_moment()))
        parts[name].step = step
    x = torch.rand(8, 20)
    alae.train_step(nets, parts["opt_ED"], parts["opt_FG"], x, config)
    assert [(name, moved) for name, moved, _ in seen] == [
        ("opt_ED", {"E", "D"}), ("opt_FG", {"F", "G"}), ("opt_ED", {"E"}), ("opt_FG", {"F", "G"})]
    torch.testing.assert_close(seen[2][2], 0.99 * seen[0][2])  # zero gradients: D's second moment decays
    assert not x.requires_grad


def test_ema():
    _, parts = small()
    with torch.no_grad():
        for p in parts["nets"].parameters():
            p.fill_(1.0)
        for p in parts["averaged"].parameters():
            p.fill_(0.0)
    alae.update_ema(parts["averaged"], parts["nets"], 0.75)
    assert all((p == 0.25).all() for p in parts["averaged"].parameters())


def train(patch, *args):
    train_here(patch, alae, *args)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Two epochs in one go."""
    out = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        train(patch, "--smoke", "--epochs", "2", "--eval-every", "1", "--out-dir", str(out), "--run-name", "a")
    return out / "train_fc_alae" / "a"


def compare(straight, folder):
    a, b = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (straight, folder))
    for part in ("nets", "averaged", "opt_ED", "opt_FG", "random"):
        assert_same(a[part], b[part])
    timing = {"perf/images_per_s"}
    rows = [[{k: v for k, v in row.items() if k not in timing} for row in c["run"]["rows"]] for c in (a, b)]
    assert len(rows[0]) == 3 and rows[0] == rows[1]


def test_resume_equals_no_interruption(straight, unpictured, tmp_path, monkeypatch):
    folder = tmp_path / "train_fc_alae" / "b"
    train(monkeypatch, "--smoke", "--epochs", "1", "--eval-every", "1", "--out-dir", str(tmp_path), "--run-name", "b")
    monkeypatch.chdir(tmp_path)  # from elsewhere, too
    train(monkeypatch, "--resume", str(folder / "checkpoint.pt"), "--epochs", "2", "--matmul", "auto")
    compare(straight, folder)


def test_ctrl_c_in_an_epoch_saves_and_resumes(straight, unpictured, tmp_path, monkeypatch, capsys):
    folder, tick = tmp_path / "train_fc_alae" / "c", shared.Run.tick

    def tick_then_signal(run, *args):
        tick(run, *args)
        if run.at["steps"] == 6:  # the second step of the second epoch
            os.kill(os.getpid(), signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(shared.Run, "tick", tick_then_signal)
        with pytest.raises(SystemExit) as stop:
            train(patch, "--smoke", "--epochs", "2", "--eval-every", "1", "--out-dir", str(tmp_path), "--run-name", "c")
    assert stop.value.code == 130 and f"--resume {folder / 'checkpoint.pt'}" in capsys.readouterr().err
    train(monkeypatch, "--resume", str(folder / "checkpoint.pt"))
    compare(straight, folder)


def test_a_loss_that_turns_nan_stops_the_run(tmp_path, here):
    done = here(FC_ALAE, "--smoke", "--lr", "1e30", "--run-name", "nan")
    assert done.returncode == 1 and "loss became" in done.stderr and "Traceback" not in done.stderr
    assert '"diverged"' in (tmp_path / "runs/train_fc_alae/nan/summary.json").read_text()


KILLED = """
import os, runpy, signal, sys, torch
real, calls = torch.save, []
def save(content, path):
    calls.append(path)
    if len(calls) == 2:
        path.write_bytes(b"half a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)
    real(content, path)
torch.save = save
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_kill_while_saving_leaves_the_previous_checkpoint_whole(tmp_path, here, bare):
    args = [str(ROOT / FC_ALAE), "--smoke", "--epochs", "2", "--out-dir", str(tmp_path), "--run-name", "k"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *args], env=ENVIRONMENT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    path = tmp_path / "train_fc_alae" / "k" / "checkpoint.pt"
    assert shared.load_checkpoint(path, alae.Config)["run"]["done"] == 1
    resumed = here(FC_ALAE, "--resume", path)
    assert resumed.returncode == 0, resumed.stderr


def test_references_do_not_change_the_training(straight, unpictured, tmp_path, monkeypatch):
    train(monkeypatch, "--smoke", "--epochs", "2", "--references", "--out-dir", str(tmp_path), "--run-name", "r")
    a, b = (torch.load(path / "model.pt", weights_only=True) for path in (straight, tmp_path / "train_fc_alae" / "r"))
    assert_same(a["E"], b["E"])
    assert {"untrained/svm_acc_short", "pixels/svm_acc_short"} <= b["run"]["rows"][0].keys()


def test_load_model_gives_the_evaluated_networks(straight):
    nets, config = alae.load_model(straight / "model.pt")
    x = torch.rand(3, 784)
    assert nets["G"](nets["E"](x)).shape == (3, 784) and config.latent_dim == 50
    averaged = torch.load(straight / "checkpoint.pt", weights_only=True)["averaged"]
    assert_same(dict(nets.state_dict()), dict(averaged))


@pytest.mark.parametrize("file", ["model.pt", "checkpoint.pt", "model_half.pt"])
def test_eval_gives_a_runs_final_metrics_and_pictures(file, straight, tmp_path, monkeypatch):
    train(monkeypatch, "--eval", str(straight / file), "--smoke", "--out-dir", str(tmp_path), "--run-name", "e")
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (straight, tmp_path / "train_fc_alae" / "e"))
    assert b["epochs"] == 2 and b["images_seen"] == a["images_seen"] and "eval" in b["setting"]
    for key in (key for key in a if key.startswith("eval/")):
        assert b[key] == pytest.approx(a[key], rel=0.02) if "half" in file else b[key] == a[key], key
    assert not any(key.startswith("train/") for key in b)  # of this evaluation alone
    pictures = {path.name for path in straight.glob("*.png")}
    assert {path.name for path in (tmp_path / "train_fc_alae" / "e").glob("*.png")} == pictures
    assert {"samples.png", "reconstructions.png", "interpolations.png", "interpolations_z.png", "traversals.png"} <= pictures


def test_eval_weights_of_a_checkpoint_may_be_chosen_those_of_a_model_not(straight, bare, tmp_path, monkeypatch, capsys):
    raw, _ = alae.load_model(straight / "checkpoint.pt", alae.Config(eval_weights="raw"))
    assert_same(dict(raw.state_dict()), dict(torch.load(straight / "checkpoint.pt", weights_only=True)["nets"]))
    train(monkeypatch, "--eval", str(straight / "checkpoint.pt"), "--eval-weights", "raw", "--smoke", "--out-dir", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, "--eval", str(straight / "model.pt"), "--eval-weights", "raw")
    assert stop.value.code == 2 and "--eval-weights ema, not raw" in capsys.readouterr().err


def test_the_animation_has_a_frame_for_each_epoch(straight):
    with Image.open(straight / "samples.gif") as animation:
        assert animation.n_frames == 3 and animation.size == (448, 472)


def test_decay():
    config, parts = small(lr=0.004, decay=0.5)
    for done, factor in ((0.0, 1), (0.5, 1), (0.75, 0.5), (0.9, 0.2), (1.0, 0)):
        alae.set_rate((parts["opt_ED"], parts["opt_FG"]), config, done)
        assert parts["opt_ED"].param_groups[0]["lr"] == pytest.approx(
            0.004 * factor * parts["nets"]["E"][0].weight.lr_equalization_coef)
    alae.set_rate((parts["opt_FG"],), alae.Config(lr=0.004), 0.99)
    assert parts["opt_FG"].param_groups[0]["lr"] == pytest.approx(0.004 * 0.1 * (2 / 5) ** 0.5)


def test_options_of_the_networks():
    config, parts = small(mapping="identity", critic="mlp", output="bounded")
    F, G, E, D = (parts["nets"][name] for name in "FGED")
    z = torch.randn(6, 5)
    torch.testing.assert_close(F(z), alae.PixelNorm()(z))
    assert 0 <= G(100 * z).min() < 0.01 and 0.99 < G(100 * z).max() <= 1
    assert (D(z) + D(-z)).abs().max() > 1e-4  # bends
    assert alae.train_step(parts["nets"], parts["opt_ED"], parts["opt_FG"], torch.rand(8, 20), config).isfinite().all()
    G, D = (alae.build(alae.Config(latent_dim=5, output="bounded", input_range="11"), 20)[name] for name in "GD")
    assert G(10 * z).min() < -0.5 and G(10 * z).min() >= -1
    torch.testing.assert_close(D(-z), -D(z))  # the official one is linear


def test_the_recipe_is_a_set_of_defaults():
    config = shared.parse_config(alae.Config, ["--recipe", "fast", "--lr", "0.5"])
    assert (config.lr, config.batch_size, config.decay) == (0.5, 64, alae.Config.recipes["recipe", "fast"]["decay"])
    assert shared.parse_config(alae.Config, []) == alae.Config()


def test_a_decay_fixes_the_length(bare, tmp_path, monkeypatch, capsys):
    train(monkeypatch, "--smoke", "--epochs", "1", "--decay", "0.5", "--out-dir", str(tmp_path), "--run-name", "d")
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, "--resume", str(tmp_path / "train_fc_alae/d/checkpoint.pt"), "--epochs", "2")
    assert stop.value.code == 2 and "falls towards epoch 1" in capsys.readouterr().err
