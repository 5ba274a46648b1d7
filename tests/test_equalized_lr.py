"""LREQAdam, run-time scaling and Adam with groups are one trajectory; what is equalized."""

import json
import math

import shared

import equalized_lr as lr
import pytest
import torch
import train_fc_alae as alae
from conftest import toy_data, train

SMALL = lr.Config(latent_dim=5, exact_steps=20)


@pytest.fixture
def narrow(monkeypatch):
    """Layers of at most 64 units, for speed."""
    layer = lr.Linear

    def narrow_layer(fan_in, fan_out, *more, **options):
        return layer(min(fan_in, 64), min(fan_out, 64), *more, **options)

    monkeypatch.setattr(lr, "Linear", narrow_layer)


def test_three_ways_are_one_trajectory_but_for_epsilon(narrow):
    x = torch.rand(50, 20)
    far = {eps: lr.trajectories(SMALL, x, eps) for eps in (1e-30, 1e-8)}
    exact = [max(distances) for distances in far[1e-30].values()]
    usual = [max(distances) for distances in far[1e-8].values()]
    assert far[1e-30].keys() == {"runtime", "groups"} and len(far[1e-30]["groups"]) == 20
    assert 0 < max(exact) < 1e-10 and min(usual) > 1e3 * max(exact)


def test_the_distance_is_that_of_the_tensor_farthest_away(narrow, monkeypatch):
    w = {"a": torch.tensor([3.0, 4.0]), "b": torch.ones(4), "bias": torch.zeros(2)}
    now = {"a": torch.tensor([3.0, 3.0]), "b": 2 * torch.ones(4), "bias": torch.ones(2)}
    far = lr.relative(now, w)
    assert far == {"a": pytest.approx(0.2), "b": pytest.approx(1.0)}
    monkeypatch.setattr(lr, "relative", lambda *_: far)
    assert lr.trajectories(SMALL, torch.rand(5, 20), 1e-8)["groups"][0] == far["b"]


def test_all_ways_start_from_the_same_weights():
    nets, _ = lr.start(SMALL, 20, "cpu")
    w = {way: lr.weights(nets[way]) for way in lr.WAYS}
    for way in lr.WAYS:
        for name in w["lreq"]:
            torch.testing.assert_close(w[way][name], w["lreq"][name])
    assert w["lreq"]["G.2.weight"].std().item() == pytest.approx((2 / 1024) ** 0.5, rel=0.01)
    assert w["lreq"]["F.3.weight"].std().item() == pytest.approx((2 / 5) ** 0.5, rel=0.4)
    stored = nets["runtime"]["F"][1].weight  # ŵ, whose standard deviation is 1/lrmul
    assert stored.std().item() == pytest.approx(10, rel=0.4)


def test_the_first_step_is_lr_times_lrmul_in_every_layer_under_equalization_alone():
    config = lr.Config(lr_plain=0.002)
    nets, opts = lr.start(config, 30, "cpu", eps=1e-30, dtype=torch.float64)
    x = torch.rand(64, 30, dtype=torch.float64)
    z = torch.randn(3, 64, 50, dtype=torch.float64)
    moved = {}
    for way in lr.WAYS:
        before, first = lr.weights(nets[way]), opts[f"{way} ED"]
        opts[f"{way} ED"] = Once(first)
        opts[f"{way} FG"] = Once(None)
        lr.iterate(way, nets, opts, x, z)
        moved[way] = lr.relative(lr.weights(nets[way]), before)
    for way in ("lreq", "runtime", "groups"):
        for name in ("E.0", "E.2", "E.4", "D.0", "D.1"):
            expected = 0.002 * (0.1 if name[0] == "D" else 1)
            assert moved[way][f"{name}.weight"] == pytest.approx(expected, rel=0.3), (way, name)
    wide, narrow = moved["plain"]["E.2.weight"], moved["plain"]["E.0.weight"]
    assert wide / narrow == pytest.approx((1024 / 30) ** 0.5, rel=0.1)


class Once:
    """An optimizer whose first step counts, or none."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def zero_grad(self, **options):
        if self.optimizer:
            self.optimizer.zero_grad(**options)

    def step(self):
        if self.optimizer:
            self.optimizer.step()
        self.optimizer = None


def test_lreq_adam_is_the_one_of_train_fc_alae():
    torch.manual_seed(0)
    mine, theirs = lr.Linear(6, 3, 0.1), alae.Linear(6, 3, 0.1).double()
    theirs.load_state_dict(mine.state_dict())
    assert theirs.weight.c == pytest.approx(mine.weight.c) and theirs.bias.c == mine.bias.c == 0.1
    optimizers = [lr.LREQAdam(mine.parameters(), 0.01, 1e-3)]
    optimizers.append(alae.LREQAdam(theirs, lr=0.01, eps=1e-3))
    for _ in range(5):
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            p.grad = q.grad = torch.randn_like(p)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_an_iteration_is_that_of_train_fc_alae():
    config = alae.Config(latent_dim=5)
    torch.manual_seed(0)
    theirs = alae.build(config, 30)
    nets, opts = lr.start(SMALL, 30, "cpu")
    nets["lreq"].load_state_dict(theirs.state_dict())
    opt_ED = alae.LREQAdam(theirs["E"], theirs["D"], lr=0.002)
    opt_FG = alae.LREQAdam(theirs["F"], theirs["G"], lr=0.002)
    x = torch.rand(8, 30)
    for step in range(2):
        torch.manual_seed(step)
        expected = alae.train_step(theirs, opt_ED, opt_FG, x, config)
        torch.manual_seed(step)
        z = torch.randn(3, 8, 5)
        losses = lr.iterate("lreq", nets, opts, x, z)
        for name, loss in losses.items():
            torch.testing.assert_close(loss.detach(), expected[name])
    before = dict(theirs.named_parameters())
    for name, p in nets["lreq"].named_parameters():
        torch.testing.assert_close(p, before[name], rtol=1e-4, atol=1e-5)


def test_all_ways_see_the_same_z_and_have_losses_of_their_own():
    nets, opts = lr.start(lr.Config(latent_dim=5), 20, "cpu")
    torch.manual_seed(0)
    losses = lr.train_step(nets, opts, torch.rand(8, 20), lr.Config(latent_dim=5))
    assert len(losses) == 12 and not any(loss.requires_grad for loss in losses.values())
    for name in ("L_adv_ED", "L_adv_FG", "L_err_EG"):
        torch.testing.assert_close(
            losses[f"groups/{name}"], losses[f"lreq/{name}"], rtol=1e-3, atol=0
        )
    assert losses["plain/L_err_EG"] != losses["lreq/L_err_EG"]


def test_plain_adam_has_its_own_rate_and_the_presets_try_twenty_times_as_much_for_the_others():
    for preset in lr.PRESETS:
        config = shared.parse_config(lr.Config, lr.PRESETS, ["--preset", preset])
        _, opts = lr.start(config, 20, "cpu")
        assert opts["plain ED"].param_groups[0]["lr"] == config.lr_plain
        assert opts["lreq FG"].param_groups[0]["lr"] == config.lr
        if preset != "official":
            assert config.lr == pytest.approx(20 * config.lr_plain)
    tried = {}
    for rate in lr.RATES:
        kept = shared.ROOT / f"results/equalized_lr/equalized_lr-rate-{rate}-seed0.json"
        tried[rate] = json.loads(kept.read_text())["plain/recon_mse"]
    assert lr.Config().lr_plain == min(tried, key=tried.get)


def test_metrics_are_of_each_ways_own_nets(monkeypatch):
    data = toy_data(name="mnist", size=784)
    nets, _ = lr.start(lr.Config(), 784, "cpu")
    monkeypatch.setattr(shared.lenet, "fid", lambda real, fake: fake.mean().item())
    with torch.no_grad():
        for i, way in enumerate(lr.WAYS):
            for p in nets[way]["G"].parameters():
                p.zero_()
            bias = nets[way]["G"][-1].bias
            bias.fill_(i / 8 / bias.scale)
    metrics = lr.evaluate(nets, data, lr.Config(smoke=True), full=True)
    for i, way in enumerate(lr.WAYS):
        error = (data.x_test - i / 8).square().mean().item()
        assert metrics[f"{way}/recon_mse"] == pytest.approx(error, rel=1e-4)
        assert metrics[f"{way}/fid"] == pytest.approx(i / 8, abs=1e-6)


def test_a_run_measures_how_far_each_layer_moves_and_goes_on_bit_for_bit(
    tmp_path, monkeypatch, cheap, narrow
):
    few = toy_data(200, 20, size=16)
    monkeypatch.setattr(shared, "load_data", lambda *_: few)
    given = ["--device", "cpu", "--batch-size", 100, "--exact-steps", 0, "--out-dir", tmp_path]
    for name, epochs in (("a", 2), ("b", 1)):
        train(monkeypatch, lr, *given, "--epochs", epochs, "--run-name", name)
    checkpoint = tmp_path / "equalized_lr/b/checkpoint.pt"
    train(monkeypatch, lr, "--resume", checkpoint, "--epochs", 2)
    a, b = (
        json.loads((tmp_path / f"equalized_lr/{name}/summary.json").read_text()) for name in "ab"
    )
    same = [key for key in a if "/" in key and not key.startswith("perf/")]
    assert {key: a[key] for key in same} == {key: b[key] for key in same} and len(same) == 16
    assert a["plain/update_ratio"] > 1.5 * a["lreq/update_ratio"] > 1
    assert math.isfinite(a["train/plain/L_err_EG"])


def test_updates_are_those_of_the_last_iteration_and_z_is_drawn_after_the_weights(
    tmp_path, monkeypatch, cheap, narrow
):
    data = toy_data(300, 20, size=16)
    monkeypatch.setattr(shared, "load_data", lambda *_: data)
    weights, noise, measured = [], [], []
    step, iterate = lr.train_step, lr.iterate

    def watched_step(nets, *more):
        weights.append(lr.weights(nets["lreq"]))
        return step(nets, *more)

    def watched_iterate(way, nets, opts, x, z):
        noise.append(z)
        return iterate(way, nets, opts, x, z)

    monkeypatch.setattr(lr, "train_step", watched_step)
    monkeypatch.setattr(lr, "iterate", watched_iterate)

    def watched_updates(run, nets, before):
        measured.append(before)
        return {}

    monkeypatch.setattr(lr, "compare_updates", watched_updates)
    given = ["--device", "cpu", "--batch-size", 100, "--exact-steps", 0, "--epochs", 1]
    train(monkeypatch, lr, *given, "--seed", 5, "--out-dir", tmp_path)
    assert len(weights) == 3
    for name, w in measured[0]["lreq"].items():
        assert w.equal(weights[2][name])
    lr.start(lr.Config(seed=5), 16, "cpu")
    assert noise[0].equal(torch.randn(3, 100, 50))  # not the numbers of the first weights again
