"""AAE_pytorch: nets, a step of both presets number by number, what is measured and drawn."""

import copy

import shared

import aae_pytorch as aae
import benchmark
import pytest
import torch
from conftest import assert_same, fake_run, prior_gap, record, see, size, state_of, toy_data, watch
from torch import nn
from torch.nn.functional import binary_cross_entropy

PHASES = [("P", {"P"}), ("Q_rec", {"Q"}), ("D", {"D"}), ("Q_reg", {"Q"})]


def preset(name, **changes):
    return aae.Config(**aae.PRESETS[name] | {"preset": name} | changes)


def start(config, dtype=torch.float32):
    torch.manual_seed(0)
    nets = aae.build(config, 784).to(dtype)
    return nets, aae.optimizers(nets, config)


def test_nets():
    nets = aae.build(preset("readme"), 784)
    assert size(nets["Q"]) == 785 * 1000 + 1001 * 1000 + 1001 * 2
    assert size(nets["P"]) == 3 * 1000 + 1001 * 1000 + 1001 * 784
    assert size(nets["D"]) == 3 * 1000 + 1001 * 1000 + 1001
    rates = {
        name: [m.p for m in net.modules() if isinstance(m, nn.Dropout)]
        for name, net in nets.items()
    }
    assert rates == {"Q": [0.25] * 2, "P": [0.25] * 2, "D": [0.2] * 2}
    assert [m.p for m in aae.build(preset("basic"), 784)["Q"] if isinstance(m, nn.Dropout)] == [
        0.2
    ] * 2


def test_without_its_second_relu_P_is_the_public_code_s():
    P = aae.build(preset("basic", relu_P=False), 784)["P"]
    layers = [type(layer).__name__ for layer in P]
    assert layers == ["Linear", "Dropout", "ReLU", "Linear", "Dropout", "Linear"]


@pytest.mark.parametrize("name", aae.PRESETS)
def test_a_step_number_by_number(name, monkeypatch):
    """Against gradients of losses written out and Adam's first step; without D's dropout."""
    sample_prior = aae.sample_prior
    monkeypatch.setattr(aae, "sample_prior", lambda *how: sample_prior(*how).double())
    config = preset(name, dropout=0.0, dropout_D=0.0)
    nets, opts = start(config, torch.float64)
    by_hand = copy.deepcopy(nets)
    Q, P, D = by_hand["Q"], by_hand["P"], by_hand["D"]
    x = torch.rand(8, 784).double()
    torch.manual_seed(1)
    losses = aae.train_step(nets, opts, x, config)
    torch.manual_seed(1)
    z = {"readme": 1, "basic": 5}[name] * torch.randn(8, 2)
    lr, lr_reg = {"readme": (6e-4, 8e-4), "basic": (1e-4, 5e-5)}[name]

    def descend(loss, parameters, lr):
        parameters = list(parameters)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= lr * g / (g.abs() + 1e-8)
        return loss.detach()

    rec = binary_cross_entropy(P(Q(x)).sigmoid(), x)
    expected = {"L_rec": descend(rec, [*Q.parameters(), *P.parameters()], lr)}
    loss_D = -(D(z.double()).sigmoid().log() + (1 - D(Q(x).detach()).sigmoid()).log()).mean()
    expected["L_D"] = descend(loss_D, D.parameters(), lr_reg)
    expected["L_Q"] = descend(-D(Q(x)).sigmoid().log().mean(), Q.parameters(), lr_reg)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(nets.state_dict(), by_hand.state_dict(), rtol=1e-7, atol=1e-9)


def test_the_public_order_moves_the_nets_in_the_same_way(monkeypatch):
    config = preset("readme")
    nets, opts = start(config, torch.double)
    for layer in nets.modules():
        if isinstance(layer, nn.Dropout):  # the public code draws other masks
            layer.p = 0.0
    other = copy.deepcopy(nets)
    x, z = torch.rand(8, 784).double(), torch.randn(8, 2).double()
    monkeypatch.setattr(aae, "sample_prior", lambda *_: z)
    aae.train_step(nets, opts, x, config)
    benchmark.aae_public_step(other, aae.optimizers(other, config), x, config)
    torch.testing.assert_close(nets.state_dict(), other.state_dict(), rtol=1e-7, atol=1e-9)


def test_which_net_moves_in_which_phase():
    nets, opts = start(preset("readme"))
    notes = watch(nets, **opts)
    aae.train_step(nets, opts, torch.rand(8, 784), preset("readme"))
    assert notes == PHASES


def test_D_learns_from_codes_without_dropout_and_Q_from_codes_with_it(monkeypatch):
    shown, L_D, L_Q = {}, aae.L_D, aae.L_Q

    def spy_D(D, z, z_fake):
        shown["D"] = z_fake
        return L_D(D, z, z_fake)

    def spy_Q(D, z_fake):
        shown["Q"] = z_fake
        return L_Q(D, z_fake)

    monkeypatch.setattr(aae, "L_D", spy_D)
    monkeypatch.setattr(aae, "L_Q", spy_Q)
    config = preset("readme", dropout=0.5, lr_reg=1e-30)
    nets, opts = start(config)
    x = torch.rand(8, 784)
    aae.train_step(nets, opts, x, config)
    assert nets["Q"].training and not shown["D"].requires_grad and shown["Q"].requires_grad
    z = nets["Q"].eval()(x)
    torch.testing.assert_close(shown["D"], z, check_stride=False, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(shown["Q"], z, atol=1e-3)


def test_the_prior_and_the_distance_to_it():
    torch.manual_seed(0)
    config, x = preset("basic"), torch.empty(20_000, 0)
    assert aae.sample_prior(x, config).std().item() == pytest.approx(5, rel=0.02)
    before = torch.get_rng_state()
    once, again, other = (aae.sample_prior(x[:50], config, seed) for seed in (1, 1, 2))
    assert once.equal(again) and not once.equal(other)
    assert torch.get_rng_state().equal(before)
    z = aae.sample_prior(x[:1000], config, 99)
    gap, floor = prior_gap(aae, z, config)
    assert gap == pytest.approx(floor, rel=1) and floor < 0.3
    assert prior_gap(aae, 1.5 * z, config)[0] > 1


def test_what_evaluate_measures_and_draw_draws(monkeypatch):
    config, data = preset("readme"), toy_data()
    nets = start(config)[0]
    before, given = state_of(nets), record(monkeypatch)
    metrics = aae.evaluate(nets, data, config, full=True)
    assert_same(before, state_of(nets))
    run, seen = fake_run(nets, config), see(monkeypatch)
    aae.draw(run, data, config)
    assert_same(before, state_of(nets))
    assert run.names == ["samples", "reconstructions", "codes", "plane"]
    Q, P = nets.eval()["Q"], nets["P"]
    with torch.no_grad():
        ((x, x_shown),) = seen["pairs"]
        assert x.equal(data.images(data.x_test[:50]))
        torch.testing.assert_close(x_shown, data.images(P(Q(data.x_test[:50])).sigmoid()))
        ((x_rec, x_fake),) = given["images"]
        torch.testing.assert_close(x_rec, P(Q(data.x_test)).sigmoid())
        z = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(x_fake, P(z).sigmoid())
        for kind, net in (("short", Q), ("long", Q[:-1])):
            torch.testing.assert_close(given[kind][0], net(data.x_train))
            torch.testing.assert_close(given[kind][1], net(data.x_test))
        gap, floor = prior_gap(aae, Q(data.x_test), config)
        gap_train, _ = prior_gap(aae, Q(data.x_train[:200]), config)
    assert metrics["eval/prior_gap"] == pytest.approx(gap, rel=1e-4)
    assert metrics["eval/prior_gap_floor"] == pytest.approx(floor, rel=1e-4)
    assert metrics["eval/prior_gap_train"] == pytest.approx(gap_train, rel=1e-4)


def test_presets_fill_defaults():
    config = shared.parse_config(aae.Config, aae.PRESETS, ["--preset", "basic", "--lr", "0.1"])
    assert (config.lr, config.lr_reg, config.dropout, config.prior_std) == (0.1, 5e-5, 0.2, 5.0)
    assert shared.parse_config(aae.Config, aae.PRESETS, []).lr == 6e-4
