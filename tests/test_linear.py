"""Linear ALAE, latent regressors and autoencoder: the arguments of the docstrings, and training."""

import importlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import shared

import linear_alae as alae
import linear_autoencoder as autoencoder
import linear_latent_regressor as regressor
import pca_gd
import pytest
import sweep
import torch
from conftest import ROOT, assert_same, record, train
from torch import nn
from torch.nn.functional import softplus

D, K, NU = 12, 3, 0.2
FILES = (alae, regressor, autoencoder)


@pytest.fixture
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def centred(n=400):
    x = torch.randn(n, D) @ torch.randn(D, D) * torch.linspace(2, 0.3, D)
    return x - x.mean(0)


def whitened(n, k):
    """Rows whose mean is 0 and whose second moments are exactly I."""
    z = torch.randn(n, k)
    return torch.linalg.qr(z - z.mean(0))[0] * n**0.5


def eigen(x):
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    return values.flip(0), vectors.flip(1)


def linear_alae(x, **options):
    config = alae.Config(**{"k": K, "batch_size": 50, "init_G": 1.0} | options)
    return config, alae.build(config, x)


def put(nets, E, G):
    nets["E"].weight.data.copy_(E)
    nets["G"].weight.data.copy_(G)


def losses_of(nets, x, z, config):
    """The losses of the three steps on the same x and z."""
    F, G, E = (nets[name].weight for name in "FGE")
    first = alae.L_adv_ED(F, G, E, nets["D"], x, z, config)
    second = alae.L_adv_FG(F, G, E, nets["D"], z, config)
    return sum(first), sum(second), alae.L_err_EG(F, G, E, z)


def forces(nets, x, config):
    """The largest gradient in each of the three steps, at exact second moments of z."""
    E, G, B = nets["E"].weight, nets["G"].weight, nets["D"].B
    found = []
    losses = losses_of(nets, x, whitened(len(x), K), config)
    moved = ([E, B], [G], [E, G])
    for loss, parameters in zip(losses, moved, strict=True):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append(max(g.abs().max().item() for g in gradients if g is not None))
    return found


# The arguments of linear_alae.py, line by line


@pytest.mark.parametrize("mapping", ("identity", "linear"))
def test_a_linear_critic_is_blind_at_zero_but_sees_a_mean(mapping, float64):
    x = centred()
    config, nets = linear_alae(x, critic="linear", mapping=mapping)
    nn.init.zeros_(nets["D"][0].weight)
    nn.init.zeros_(nets["D"][0].bias)
    losses_of(nets, x, whitened(len(x), K), config)[0].backward()
    assert nets["D"][0].weight.grad.abs().max() < 1e-12
    assert nets["E"].weight.grad.abs().max() < 1e-12
    losses_of(nets, x + 1, whitened(len(x), K), config)[0].backward()
    assert nets["D"][0].weight.grad.abs().max() > 1e-3


def test_the_three_steps_rest_at_pca_and_not_off_it(float64):
    x = centred()
    values, V = eigen(x)
    top, V = values[:K], V[:, : 2 * K]
    config, nets = linear_alae(x, adversarial="tangent", gamma=0.0, decay=NU)
    E, G = torch.diag(top**-0.5) @ V[:, :K].T, V[:, :K] @ torch.diag(top**0.5)
    turn = torch.linalg.qr(torch.randn(K, K))[0]
    for R in (torch.eye(K), turn):  # any rotation of w
        put(nets, R @ E, G @ R.T)
        nets["D"].B.data = (NU * (top - config.floor)).sqrt().diag() @ R.T
        assert max(forces(nets, x, config)) < 1e-10
    nets["D"].B.data *= 2**0.5
    assert forces(nets, x, config)[1] > 1e-3

    tilted = torch.linalg.qr(V[:, :K] + 0.3 * V[:, K:])[0]  # another space, whitened as well
    C = torch.linalg.cholesky(tilted.T @ (x.T @ x / len(x)) @ tilted)
    put(nets, torch.linalg.inv(C) @ tilted.T, tilted @ C)
    nets["D"].B.data = torch.linalg.cholesky(NU * (C.T @ C - config.floor * torch.eye(K))).T
    first, second, third = forces(nets, x, config)
    assert second < 1e-10 and third < 1e-10 and first > 0.1


@pytest.mark.parametrize("stretch, rests", ((1.0, True), (2.0, False)))
def test_without_the_decay_every_whitened_space_is_at_rest(stretch, rests, float64):
    x = centred()
    tilted = torch.linalg.qr(torch.randn(D, K))[0]
    C = torch.linalg.cholesky(tilted.T @ (x.T @ x / len(x)) @ tilted)
    config, nets = linear_alae(x, adversarial="tangent", gamma=0.0, decay=0.0)
    put(nets, stretch * torch.linalg.inv(C) @ tilted.T, tilted @ C / stretch)
    nn.init.eye_(nets["D"].B)  # its gradient is then twice that for A, whatever A
    loss = losses_of(nets, x, whitened(len(x), K), config)[0]
    assert (torch.autograd.grad(loss, nets["D"].B)[0].abs().max() < 1e-10) == rests
    nets["D"].B.data.zero_()  # and with A = 0 nothing else has a gradient
    assert max(forces(nets, x, config)) < 1e-10


def test_r1_stretches_the_fixed_point(float64):
    x, gamma = centred(), 0.1
    values, V = eigen(x)
    top = values[:K] * (1 - 8 * gamma * NU)
    config, nets = linear_alae(x, adversarial="tangent", gamma=gamma, decay=NU)
    put(nets, torch.diag(top**-0.5) @ V[:, :K].T, V[:, :K] @ torch.diag(top**0.5))
    nets["D"].B.data = (NU * (top - config.floor)).sqrt().diag()
    assert max(forces(nets, x, config)) < 1e-9


@pytest.mark.parametrize("floor", (0.0, 0.07))
def test_with_a_floor_the_critic_sees_where_B_is_blind(floor, float64):
    x = centred()
    config, nets = linear_alae(x, adversarial="tangent", gamma=0.0, decay=NU, floor=floor)
    nets["D"].B.data.zero_()
    F, G, E = (nets[name].weight for name in "FGE")
    loss = sum(alae.L_adv_ED(F, G, E, nets["D"], x, whitened(len(x), K), config))
    (of_E,) = torch.autograd.grad(loss, E)
    P, S = G @ G.T, x.T @ x / len(x)
    torch.testing.assert_close(of_E, floor * NU * E @ (P - S))


def test_the_top_eigenspace_attracts_and_another_does_not(float64):
    """Plain gradient descent on the exact moments from near an eigenspace, step by step."""
    variances = torch.tensor([1.0, 0.8, 0.3, 0.1])
    x = whitened(40, 4) @ variances.diag().sqrt()

    def angle_after(kept, steps=200, eta=0.2):
        options = {"k": 2, "adversarial": "tangent", "gamma": 0.0, "decay": 1.0, "init_G": 0.0}
        config, nets = linear_alae(x, **options)
        E, G, B = nets["E"].weight, nets["G"].weight, nets["D"].B
        top = variances[kept]
        B.data = (top - config.floor).sqrt().diag()  # ν = 1
        E.data.zero_()
        E.data[[0, 1], kept], G.data[kept, [0, 1]] = top**-0.5, top**0.5
        E.data += 0.05 * torch.randn(2, 4)
        z = whitened(40, 2)
        for _ in range(steps):
            for i, moved in enumerate(([E, B], [G], [E, G])):
                loss = losses_of(nets, x, z, config)[i]
                for parameter, g in zip(moved, torch.autograd.grad(loss, moved), strict=True):
                    parameter.data -= eta * g
        V = torch.eye(4)[:, kept]
        return shared.pca.angle(E.detach().T, V)

    assert angle_after([0, 1]) < 1e-3
    assert angle_after([0, 2]) > 0.5


@pytest.mark.parametrize("critic", ("linear", "quadratic", "mlp"))
@pytest.mark.parametrize("penalty", ("r1", "unit"))
def test_the_penalty_is_on_the_gradient_for_x(critic, penalty, float64):
    x = centred(50).requires_grad_()
    config, nets = linear_alae(x.detach(), critic=critic, penalty=penalty, gamma=3.0)
    F, G, E = (nets[name].weight for name in "FGE")
    (gradient,) = torch.autograd.grad(nets["D"](x @ E.T).sum(), x)
    norm = gradient.norm(dim=1)
    expected = 1.5 * (norm.square() if penalty == "r1" else (norm - 1).square()).mean()
    found = alae.L_adv_ED(F, G, E, nets["D"], x.detach(), torch.randn(50, K), config)[1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("adversarial", ("softplus", "tangent"))
def test_the_adversarial_losses_are_the_papers(adversarial, float64):
    x, z = centred(50), torch.randn(50, K)
    config, nets = linear_alae(x, adversarial=adversarial, mapping="linear", decay=0.2)
    F, G, E = (nets[name].weight for name in "FGE")
    f = softplus if adversarial == "softplus" else lambda t: t / 2
    real, fake = nets["D"](x @ E.T), nets["D"](z @ F.T @ G.T @ E.T)
    losses = alae.L_adv_ED(F, G, E, nets["D"], x, z, config)
    torch.testing.assert_close(losses[0], f(fake).mean() + f(-real).mean())
    adversarial, decay = alae.L_adv_FG(F, G, E, nets["D"], z, config)
    torch.testing.assert_close(adversarial, f(-fake).mean())
    torch.testing.assert_close(decay, 0.1 * G.square().sum())
    w = z @ F.T
    error = (w - w @ G.T @ E.T).square().sum(1).mean()
    torch.testing.assert_close(alae.L_err_EG(F, G, E, z), error)


@pytest.mark.parametrize(
    "mapping, adams", (("identity", "steps"), ("linear", "steps"), ("linear", "nets"))
)
def test_which_parameters_each_step_moves(mapping, adams):
    x = torch.randn(50, D)
    config, nets = linear_alae(x, mapping=mapping, adams=adams)
    opts, moved = alae.optimizers(nets, config), []

    def watched(step):
        def watched_step():
            before = {name: p.detach().clone() for name, p in nets.named_parameters()}
            step()
            now = nets.named_parameters()
            moved.append({name[0] for name, p in now if not p.equal(before[name])})

        return watched_step

    for opt in opts.values():
        opt.step = watched(opt.step)
    alae.train_step(nets, opts, x, config)
    third = [{"E", "G"}] if adams == "steps" else [{"E"}, {"G"}]
    assert moved == [{"E", "D"}, {"F", "G"} if mapping == "linear" else {"G"}, *third]


def reached(loss, nets):
    """The first letters of the parameters that a loss has a gradient for."""
    nets.zero_grad()
    loss.backward()
    return {name[0] for name, p in nets.named_parameters() if p.grad is not None}


def test_no_loss_has_a_gradient_for_what_its_step_does_not_move():
    x, z = torch.randn(50, D), torch.randn(50, K)
    config, nets = linear_alae(x, mapping="linear")
    losses = losses_of(nets, x, z, config)
    assert [reached(loss, nets) - {"D"} for loss in losses] == [{"E"}, {"F", "G"}, {"E", "G"}]
    nets = regressor.build(regressor.Config(k=K), x)
    G = nets["G"].weight
    assert reached(sum(regressor.L_adv_D(G, nets["D"], x, z, 1.0)), nets) == {"D"}
    assert reached(regressor.L_adv_G(G, nets["D"], z), nets) == {"D", "G"}


def test_each_step_has_a_z_of_its_own():
    x = torch.randn(50, D)
    config, nets = linear_alae(x, mapping="linear", lr=0.0, lr_critic=0.0)
    torch.manual_seed(3)
    found = alae.train_step(nets, alae.optimizers(nets, config), x, config)
    torch.manual_seed(3)
    z = torch.randn(3, 50, K)
    F, G, E = (nets[name].weight for name in "FGE")
    adversarial, penalty = alae.L_adv_ED(F, G, E, nets["D"], x, z[0], config)
    assert (found["L_adv_ED"], found["penalty"]) == (adversarial, penalty)
    assert found["L_adv_FG"] == alae.L_adv_FG(F, G, E, nets["D"], z[1], config)[0]
    assert found["L_err_EG"] == alae.L_err_EG(F, G, E, z[2])


def test_adam_is_the_papers():
    config, nets = linear_alae(torch.randn(50, D))
    opts = [*alae.optimizers(nets, config).values(), regressor.adam(nets["E"], 0.1)]
    assert len(opts) == 4
    for opt in opts:
        assert isinstance(opt, torch.optim.Adam) and opt.defaults["betas"] == (0.0, 0.99)


def test_learning_rates_fall_linearly_each_from_its_own():
    config, nets = linear_alae(torch.randn(50, D), steps=100, lr_end=0.1)
    opts = alae.optimizers(nets, config)
    for step, share in ((1, 1.0), (51, 0.55), (100, 0.109)):
        alae.set_learning_rates(opts, config, step)
        groups = itertools.chain(*(opt.param_groups for opt in opts.values()))
        rates = [group["lr"] for group in groups]
        assert rates == pytest.approx([share * lr for lr in (0.004, 0.001, 0.004, 0.004)])
    config = regressor.Config(steps=100)
    opts = regressor.optimizers(regressor.build(config, torch.randn(50, D)), config)
    regressor.set_learning_rates(opts, config, 51)
    for name, lr in (("D", 0.002), ("G", 0.0005), ("E", 0.002)):
        assert opts[f"opt_{name}"].param_groups[0]["lr"] == pytest.approx(lr * 0.505)


# Those of linear_latent_regressor.py


def test_only_the_joint_regressor_tells_G_about_E():
    x = torch.randn(64, D)

    def gradient(other, **options):
        torch.manual_seed(1)
        config = regressor.Config(k=K, **options)
        nets = regressor.build(config, x)
        nets["E"].weight.data.mul_(0 if other else 1)
        opts = {f"opt_{name}": regressor.adam(nets[name], 0.0) for name in "DGE"}
        kept = []

        def step():
            assert nets["E"].weight.grad is None
            kept.append(nets["G"].weight.grad.clone())

        opts["opt_G"].step = step
        regressor.train_step(nets, opts, x, config)
        return kept[0]

    alone = gradient(False)
    assert torch.equal(alone, gradient(True))
    assert torch.equal(alone, gradient(False, joint=True, joint_weight=0.0))
    quarter, half = gradient(False, joint=True), gradient(False, joint=True, joint_weight=0.5)
    assert not torch.equal(quarter, gradient(True, joint=True))
    torch.testing.assert_close(half - alone, 2 * (quarter - alone))


def test_each_of_D_G_and_E_is_moved_by_its_own_loss(float64):
    x = torch.randn(64, D)
    config = regressor.Config(k=K, ridge=0.3, gamma=1.5)
    nets = regressor.build(config, x)
    G, E, critic = nets["G"].weight, nets["E"].weight, nets["D"]
    opts = {f"opt_{name}": torch.optim.SGD(nets[name].parameters(), 1.0) for name in "DGE"}
    before = {name: p.detach().clone() for name, p in nets.named_parameters()}
    torch.manual_seed(3)
    z = torch.randn(3, 64, K)
    (w,) = torch.autograd.grad(critic(x.requires_grad_()).sum(), x, create_graph=True)
    loss = softplus(critic(z[0] @ G.T)).mean() + softplus(-critic(x)).mean()
    (of_B1,) = torch.autograd.grad(loss + 0.75 * w.square().sum(1).mean(), critic.B1.weight)
    torch.manual_seed(3)
    losses = regressor.train_step(nets, opts, x.detach(), config)
    torch.testing.assert_close(critic.B1.weight, before["D.B1.weight"] - of_B1)
    old_G = before["G.weight"].requires_grad_()
    (of_G,) = torch.autograd.grad(softplus(-critic(z[1] @ old_G.T)).mean(), old_G)
    torch.testing.assert_close(G, old_G - of_G)
    old_E = before["E.weight"].requires_grad_()
    error = (z[2] - z[2] @ G.T @ old_E.T).square().sum(1).mean()
    (of_E,) = torch.autograd.grad(error + 0.3 * old_E.square().sum(), old_E)
    torch.testing.assert_close(E, old_E - of_E)
    torch.testing.assert_close(losses["L_err_E"], error.detach())
    assert G.grad is None, "E's error is not for G"


def test_the_critics_best_answer_turns_G_back_to_pca(float64):
    """A_ab = (Σ − GGᵀ)_ab / 4γ(λ_a + λ_b) is D's optimum against R1, and its force on G."""
    gamma, S = 1e4, torch.diag(torch.tensor([3.0, 1.0, 0.4]))  # A so small: softplus is its tangent
    z, x, eps = whitened(300, 1), whitened(300, 3) @ S.sqrt(), 1e-3
    G = torch.tensor([[3.0**0.5], [eps], [0.0]])
    values = S.diagonal()
    A = (S - G @ G.T) / (4 * gamma * (values[:, None] + values))
    assert A[1, 1].item() == pytest.approx(1 / (8 * gamma), rel=1e-3)
    a, U = torch.linalg.eigh(A)

    def critic(stretch):
        D = regressor.Quadratic(3, 3)
        D.B1.weight.data = (stretch * a.clamp(min=0)).sqrt()[:, None] * U.T
        D.B2.weight.data = (stretch * (-a).clamp(min=0)).sqrt()[:, None] * U.T
        return D

    largest = {}
    for stretch in (1.0, 1.1):
        D = critic(stretch)
        sum(regressor.L_adv_D(G, D, x, z, gamma)).backward()
        largest[stretch] = max(D.B1.weight.grad.abs().max(), D.B2.weight.grad.abs().max())
    assert largest[1.0] < 1e-2 * largest[1.1]
    G.requires_grad_()
    regressor.L_adv_G(G, critic(1.0), z).backward()
    assert -G.grad[1, 0].item() == pytest.approx(-eps / (8 * gamma) * (3 - 1) / (3 + 1), rel=1e-2)


# What is measured, against what is known


def points(n, seed):
    """In 6-D with two large variances, in directions that are no axes; the mean is not 0."""
    generator = torch.Generator().manual_seed(5)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    scales = torch.tensor([2, 1.6, 0.6, 0.5, 0.3, 0.2])
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x * scales @ turn.T + 1


@pytest.fixture
def toys(monkeypatch):
    """Instead of datasets: points whose test part has other leading directions than training's."""
    x, x_test = points(1000, 1), points(500, 2)
    x_test = x_test.roll(1, 1) * torch.tensor([1, 1, 1, 1, 1, 2.0])
    data = shared.Data("toy", x, None, x_test, None, torch.Size([1, 2, 3]))
    monkeypatch.setattr(shared, "load_data", lambda *_, **__: data)
    return data


def direct(x, basis, mean):
    """The mean squared error of a projection, the slow way."""
    x = x.double()
    return (x - mean - (x - mean) @ basis @ basis.T).square().mean().item()


def test_pca_is_that_of_the_training_images_and_both_errors_are_right(toys):
    mean = toys.x_train.double().mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(toys.x_train.double().T, correction=0))
    V = vectors.flip(1)[:, :2]
    own = shared.pca.fit(toys.x_train, 2)
    torch.testing.assert_close(torch.linalg.svdvals(own[0] @ V), torch.ones(2).double())
    torch.testing.assert_close(own[1], own[0].T)
    torch.testing.assert_close(own[2], mean, rtol=1e-5, atol=0)
    found = torch.linalg.eigvalsh(shared.pca.moments(toys.x_train)[1])
    torch.testing.assert_close(found, values, rtol=1e-5, atol=0)
    tilt = torch.tensor(0.3).double()
    W = V.clone()
    W[:, 1] = tilt.cos() * V[:, 1] + tilt.sin() * vectors[:, 0]
    metrics = shared.pca.metrics(toys, 5 * W.T, W / 5, mean)
    assert metrics["eval/mse_train"] == pytest.approx(direct(toys.x_train, W, mean), rel=1e-5)
    assert metrics["eval/mse_test"] == pytest.approx(direct(toys.x_test, W, mean), rel=1e-5)
    best, best_test = direct(toys.x_train, V, mean), direct(toys.x_test, V, mean)
    assert metrics["eval/pca_mse_train"] == pytest.approx(best, rel=1e-5)
    assert metrics["eval/pca_mse_test"] == pytest.approx(best_test, rel=1e-5)
    assert metrics["eval/ratio"] == pytest.approx(metrics["eval/mse_train"] / best, rel=1e-5)
    assert metrics["eval/ratio_test"] == pytest.approx(metrics["eval/mse_test"] / best_test, 1e-5)
    for name in "EG":
        assert metrics[f"eval/angle_{name}"] == pytest.approx(0.3, rel=1e-4)


def test_a_direction_that_is_missing_is_at_a_right_angle():
    generator = torch.Generator().manual_seed(0)
    V = torch.linalg.qr(torch.randn(6, 3, generator=generator).double())[0]
    A = V[:, :2]
    assert shared.pca.angle(3 * A @ torch.tensor([[1.0, 2.0], [0.0, 1.0]]).double(), A) < 1e-12
    assert shared.pca.angle(V[:, [0, 2]], A) == pytest.approx(torch.pi / 2)
    assert shared.pca.angle(A * torch.tensor([1.0, 0.0]), A) > 0.1, "SciPy's alone is 0"
    assert shared.pca.angle(torch.zeros(6, 2).double(), A) > 0.1


def test_each_map_has_an_angle_of_its_own(toys):
    V, mean = shared.pca.fit(toys.x_train, 2)[1:]
    rest = torch.linalg.svd(V)[0][:, 2:]
    turned = [V * tilt.cos() + rest[:, :2] * tilt.sin() for tilt in torch.tensor([0.3, 0.7])]
    metrics = shared.pca.metrics(toys, turned[0].T, turned[1], mean)
    assert metrics["eval/angle_E"] == pytest.approx(0.3, rel=1e-4)
    assert metrics["eval/angle_G"] == pytest.approx(0.7, rel=1e-4)


def test_least_A_is_the_least_of_wAw_on_the_unit_circle_over_the_decay(toys):
    config = alae.Config(k=2, decay=0.2, floor=0.1)
    nets = alae.build(config, toys.x_train)
    nets["D"].B.data = torch.tensor([[0.6, 0.5], [-0.2, 0.4]])
    angles = torch.linspace(0, torch.pi, 1001)
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    least = (nets["D"](circle) + nets["D"].c).min().item()
    metrics = alae.evaluate(nets, toys, config)
    assert metrics["eval/least_A"] == pytest.approx(least / 0.2, rel=1e-3)


@pytest.mark.parametrize("module", (*FILES, pca_gd))
def test_codes_of_training_images_are_what_classifiers_learn_from(module, toys, monkeypatch):
    labels = [torch.arange(len(x)) % 3 for x in (toys.x_train, toys.x_test)]
    data = toys._replace(y_train=labels[0], y_test=labels[1])
    given = record(monkeypatch)
    if module is pca_gd:
        E, G, mean = shared.pca.fit(data.x_train, 2)
        pca_gd.final_metrics(G, mean, data)
    else:
        nets = module.build(module.Config(k=2), data.x_train)
        nn.init.normal_(nets["G"].weight)
        E, G, mean = module.maps(nets)
        module.evaluate(nets, data, module.Config(k=2), full=True)
    E, G, mean = E.float(), G.float(), mean.float()
    train_codes, test_codes = given["short"]
    torch.testing.assert_close(train_codes, (data.x_train - mean) @ E.T)
    torch.testing.assert_close(test_codes, (data.x_test - mean) @ E.T)
    ((x_rec, x_fake),) = given["images"]
    torch.testing.assert_close(x_rec, mean + (data.x_test - mean) @ E.T @ G.T)
    assert x_fake is None


@pytest.mark.parametrize("module", FILES)
def test_a_model_brings_its_own_mean_and_scale(module, toys):
    nets = module.build(module.Config(k=2), toys.x_train)
    own = nets["pixels" if module is autoencoder else "scaling"]
    own.mean += 0.5  # as of a model that is evaluated on other data
    scale = 1 if module is autoencoder else own.scale
    x = toys.x_test
    x_rec = (nets["G"](nets["E"]((x - own.mean) * scale)) / scale + own.mean).detach()
    E, G, mean = module.maps(nets)
    torch.testing.assert_close(mean + (x - mean) @ E.T @ G.T, x_rec)
    error = (x - x_rec).square().mean().item()
    metrics = module.evaluate(nets, toys, module.Config(k=2))
    assert metrics["eval/mse_test"] == pytest.approx(error, rel=1e-5)


def test_no_random_maps_beat_pca(float64):
    x = centred()
    S, (_, V) = x.T @ x / len(x), eigen(x)
    mean = shared.pca.moments(x)[0]
    best = shared.pca.mse(x, V[:, :K].T, V[:, :K], mean)
    for _ in range(20):
        E = torch.randn(K, D)
        G = S @ E.T @ torch.linalg.inv(E @ S @ E.T)  # the best G for this E
        error = shared.pca.mse(x, E, G, mean)
        assert best < error < shared.pca.mse(x, E, G + 0.1 * torch.randn(D, K), mean)


def test_pictures_show_the_components_of_what_the_maps_reconstruct(toys, monkeypatch):
    """Of maps to PCA's second and third direction: these two, whatever the basis of the code."""
    own = shared.pca.fit(toys.x_train, 2)
    _, vectors, mean = shared.pca.fit(toys.x_train, 3)
    turn = torch.linalg.qr(torch.randn(2, 2).double())[0]
    E, G = turn @ vectors[:, 1:].T, vectors[:, 1:] @ turn.T
    drawn = {name: images for name, images, _ in shared.pca.pictures(toys, E, G, mean)}
    axes = drawn["components"] - 0.5
    expected = torch.cat([own[1], vectors[:, 1:]], 1)
    cosines = torch.nn.functional.cosine_similarity(axes, expected.T)
    torch.testing.assert_close(cosines.abs(), torch.ones(4).double())
    x, x_pca, x_rec = drawn["reconstructions"].split(12)
    torch.testing.assert_close(x, toys.x_test[:12].double())
    torch.testing.assert_close(x_pca, mean + (x - mean) @ own[1] @ own[1].T)
    torch.testing.assert_close(x_rec, mean + (x - mean) @ E.T @ G.T)
    assert not x_rec.allclose(x_pca)


def test_pictures_of_pcas_own_maps_are_the_same_in_sign_too_and_have_the_maps_mean(toys):
    E, G, mean = shared.pca.fit(toys.x_train, 4)
    drawn = {name: x for name, x, _ in shared.pca.pictures(toys, E, G, mean + 0.5)}
    pca, ours = drawn["components"].split(4)
    torch.testing.assert_close(ours, pca)
    assert pca.min() >= 0 and pca.max() <= 1
    x, _, x_rec = drawn["reconstructions"].split(12)
    torch.testing.assert_close(x_rec, mean + 0.5 + (x - mean - 0.5) @ E.T @ G.T)


@pytest.mark.parametrize("module", FILES)
def test_pictures_have_a_row_for_the_data_for_pca_and_for_the_maps(module, toys, monkeypatch):
    sheets, names = {}, ("images", "columns", "title", "rows")
    monkeypatch.setattr(shared, "grid", lambda *how: dict(zip(names, how, strict=True)))
    nets = module.build(module.Config(k=2), toys.x_train)
    run = SimpleNamespace(nets=nets, epoch=9, picture=sheets.__setitem__)
    module.draw(run, toys, module.Config(k=2))
    expected = {name: (x, rows) for name, x, rows in shared.pca.pictures(toys, *module.maps(nets))}
    assert sheets.keys() == expected.keys() == {"components", "reconstructions"}
    for name, sheet in sheets.items():
        x, rows = expected[name]
        assert sheet["images"].equal(toys.images(x)) and sheet["rows"] == rows
        assert sheet["columns"] * len(rows) == len(x) and "step 9" in sheet["title"]


def test_the_energy_of_x_is_that_of_z(toys):
    for module in (alae, regressor):
        scaling = module.build(module.Config(k=2), toys.x_train)["scaling"]
        x = (toys.x_train - scaling.mean) * scaling.scale
        assert x.mean(0).abs().max() < 1e-5
        assert x.square().sum(1).mean().item() == pytest.approx(2, rel=1e-5)
    nets = alae.build(alae.Config(k=2, scale=3.0), toys.x_train)
    assert nets["scaling"].scale == 3 and nets["G"].weight.abs().max() == 0


def test_more_dimensions_than_the_data_has_are_refused(toys, capsys):
    for data, k, rank in ((toys, 6, 6), (toys._replace(x_train=torch.full((9, 6), 0.3)), 1, 0)):
        with pytest.raises(SystemExit) as stop:
            shared.pca.fit(data.x_train, k)
        assert stop.value.code == 2
        assert f"--k {k}: the data spans {rank} dimensions" in capsys.readouterr().err


# Training


@pytest.fixture
def unpictured(monkeypatch):
    """Runs without pictures, which take most of a short run's time."""
    monkeypatch.setattr(shared, "curves", lambda *_: None)
    monkeypatch.setattr(shared.Run, "picture", lambda *_: None)


def fit(monkeypatch, tmp_path, module, *arguments):
    """A short training on the toys; its summary and its model."""
    options = ("--k", 2, "--batch-size", 100, "--out-dir", tmp_path, "--run-name", "toy")
    train(monkeypatch, module, *options, *arguments)
    (folder,) = tmp_path.glob("*/toy")
    summary = json.loads((folder / "summary.json").read_text())
    return summary, torch.load(folder / "model.pt", weights_only=True)


@pytest.mark.parametrize(
    "module, steps, arguments",
    (
        (alae, 600, ["--lr", 0.02, "--lr-critic", 0.005, "--gamma", 0.1]),
        (regressor, 600, ["--lr", 0.02, "--lr-generator", 0.005]),
        (regressor, 600, ["--lr", 0.02, "--lr-generator", 0.005, "--joint"]),
        (autoencoder, 500, ["--lr", 0.02]),
    ),
)
def test_each_finds_pca(module, steps, arguments, toys, unpictured, monkeypatch, tmp_path):
    summary, model = fit(monkeypatch, tmp_path, module, "--steps", steps, *arguments)
    assert 1 <= summary["eval/ratio"] < 1.04
    assert summary["eval/angle_G"] < 0.1 and summary["eval/angle_E"] < 0.2
    if module is not autoencoder:
        w = (toys.x_train - model["scaling"]["mean"]) * model["scaling"]["scale"]
        w = w @ model["E"]["weight"].T
        variances = torch.linalg.eigvalsh(w.T @ w / len(w))
        assert variances[0] > 0.5 and variances[1] < 2.5, "E whitens the data, up to R1"


@pytest.mark.parametrize(
    "module, lr, end", ((alae, 4, 0.01), (regressor, 2, 0.01), (autoencoder, 2, 0))
)
def test_the_loop_lowers_the_rates_at_each_step_and_feeds_scaled_images(
    module, lr, end, toys, unpictured, monkeypatch, tmp_path
):
    rates, images = [], []
    train_step = module.train_step

    def spy(nets, opts, x, *more):
        first = opts["opt_E" if module is regressor else "opt_ED"] if type(opts) is dict else opts
        rates.append(1000 * first.param_groups[0]["lr"])
        images.append(x)
        return train_step(nets, opts, x, *more)

    monkeypatch.setattr(module, "train_step", spy)
    _, model = fit(monkeypatch, tmp_path, module, "--steps", 10)  # one epoch
    assert rates == pytest.approx([lr * (1 - (1 - end) * i / 10) for i in range(10)])
    x = toys.x_train - toys.x_train.mean(0)
    if module is not autoencoder:
        x = x * model["scaling"]["scale"]
    seen = torch.cat(images)
    order = seen[:, 0].argsort(), x[:, 0].argsort()
    torch.testing.assert_close(seen[order[0]], x[order[1]])
    if module is autoencoder:
        assert model["pixels"]["sigma"] == x.std() and model["pixels"]["mean"].shape == (6,)


def test_the_students_setting_does_not(toys, unpictured, monkeypatch, tmp_path):
    arguments = ("--preset", "student", "--steps", 400, "--lr", 0.02)
    summary, _ = fit(monkeypatch, tmp_path, alae, *arguments)
    assert summary["eval/ratio_test"] > 1.5


def test_the_absolute_error_is_another_optimum(float64):
    x = centred(50)
    nets = autoencoder.build(autoencoder.Config(k=K), x)
    E, G = nets["E"].weight, nets["G"].weight
    error = (x - x @ E.T @ G.T) / 2
    l1, l2 = error.abs().mean(), error.square().mean()
    torch.testing.assert_close(autoencoder.L_rec(E, G, x, 2.0, "l1"), l1)
    torch.testing.assert_close(autoencoder.L_rec(E, G, x, 2.0, "l2"), l2)
    for loss, expected in (("l1", l1), ("l2", l2)):
        config = autoencoder.Config(k=K, loss=loss)
        opt = torch.optim.SGD(nets.parameters(), 0.0)
        nets["pixels"].sigma.fill_(2)
        found = autoencoder.train_step(nets, opt, x, config)
        torch.testing.assert_close(found["L_rec"], expected.detach())


@pytest.mark.parametrize(
    "module, arguments", ((alae, ["--adams", "nets"]), (regressor, ["--joint"]))
)
def test_a_resumed_run_of_other_options_is_the_same_to_the_bit(
    module, arguments, toys, unpictured, monkeypatch, tmp_path
):
    arguments = ("--steps", 40, "--eval-every", 15, *arguments)  # 10 batches in an epoch
    whole = fit(monkeypatch, tmp_path / "whole", module, *arguments)
    save = shared.Run.save

    def save_and_stop(run, *args):
        save(run, *args)
        if run.epoch == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shared.Run, "save", save_and_stop)
        fit(patch, tmp_path / "stopped", module, *arguments)
    (checkpoint,) = (tmp_path / "stopped").glob("*/toy/checkpoint.pt")
    torch.manual_seed(99)
    train(monkeypatch, module, "--resume", checkpoint)
    model = torch.load(checkpoint.with_name("model.pt"), weights_only=True)
    for name in ("E", "G"):
        assert_same(model[name], whole[1][name])
    summary = json.loads(checkpoint.with_name("summary.json").read_text())
    names = [name for name in summary if name.startswith(("eval/", "train/"))]
    assert len(names) > 8 and all(summary[name] == whole[0][name] for name in names)


def test_an_image_run_draws_components_and_reconstructions_at_its_end_only(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(shared.Run, "picture", lambda run, name, _: drawn.append((run.epoch, name)))
    train(monkeypatch, alae, "--smoke", "--out-dir", tmp_path)
    assert drawn == [(60, "components"), (60, "reconstructions"), (60, "curves")]


# Studies


def test_each_preset_is_another_training(toys):
    usual, found = alae.Config(), {}
    for preset, changes in alae.PRESETS.items():
        assert all(getattr(usual, name) != value for name, value in changes.items()), preset
        if preset != "student":
            assert len(changes) <= 1 or preset in ("penalty-unit", "no-decay-floor")
        config = alae.Config(**changes | {"k": 2, "batch_size": 100, "steps": 6})
        torch.manual_seed(0)
        nets = alae.build(config, toys.x_train)
        opts = alae.optimizers(nets, config)
        scaling = nets["scaling"]
        x = (toys.x_train[:100] - scaling.mean) * scaling.scale
        for step in (1, 2, 3, 4):
            alae.set_learning_rates(opts, config, step)
            alae.train_step(nets, opts, x, config)
        E, G, _ = alae.maps(nets)
        found[preset] = round((E @ G).sum().item(), 12)
    assert len(set(found.values())) == len(alae.PRESETS), found


def test_the_ablation_is_judged_on_validation_images(monkeypatch):
    asked = []
    monkeypatch.setattr(shared, "load_data", lambda config, *_, **__: asked.append(config.split))
    commands = sweep.expand(ROOT / "step1_linear/sweeps/ablation.yaml").values()
    presets = []
    for command in commands:
        start = command.index("step1_linear/linear_alae.py")
        config = shared.parse_config(alae.Config, alae.PRESETS, command[start + 1 :])
        assert (config.k, config.steps, config.lr) == (10, 3000, 0.004)
        with pytest.raises(AttributeError):  # there are no images here
            alae.main(config)
        presets.append((config.preset, config.seed))
    assert asked == ["val"] * 54
    studied = set(alae.PRESETS) - {"student"}
    assert set(presets) == set(itertools.product(studied, (0, 1, 2)))


def test_comparison_sweeps_train_each_linear_autoencoder():
    found = set()
    for path in (ROOT / "step1_linear/sweeps").glob("compare_*.yaml"):
        for command in sweep.expand(path).values():
            (place,) = (i for i, part in enumerate(command) if part.endswith(".py"))
            module = importlib.import_module(Path(command[place]).stem)
            presets = getattr(module, "PRESETS", None)
            config = shared.parse_config(module.Config, presets, command[place + 1 :])
            variant = getattr(config, "loss", getattr(config, "joint", None))
            found.add((module.__name__, variant, config.dataset, config.k))
    variants = [("pca_gd", None), ("linear_alae", None)]
    variants += [("linear_autoencoder", loss) for loss in ("l1", "l2")]
    variants += [("linear_latent_regressor", joint) for joint in (False, True)]
    for experiment, variant in variants:
        for dataset, k in itertools.product(("mnist", "fashion_mnist"), (10, 50)):
            assert (experiment, variant, dataset, k) in found
