"""Linear ALAE, latent regressors and their comparison: the arguments of the docstrings, on the shipped functions."""
import json
import os
import signal
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

import compare_autoencoders
import linear_alae as alae
import linear_latent_regressor as regressor
import shared

D, K, NU = 12, 3, 0.2


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    for number in (signal.SIGINT, signal.SIGTERM):  # a Run has its own handlers
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def centred(n=400):
    x = torch.randn(n, D) @ torch.randn(D, D) * torch.linspace(2, 0.3, D)
    return x - x.mean(0)


def whitened(n, k):
    """Rows whose mean is 0 and whose second moments are exactly I."""
    z = torch.randn(n, k)
    return torch.linalg.qr(z - z.mean(0))[0] * n ** 0.5


def eigen(x):
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    return values.flip(0), vectors.flip(1)


def parts(**options):
    config = alae.Config(k=K, batch_size=50, init_G=1.0, **options)
    return config, alae.start(config, D, "cpu")


@pytest.mark.parametrize("mapping", ("identity", "linear"))
def test_a_linear_critic_is_blind_at_zero(mapping):
    config, p = parts(critic="linear", mapping=mapping)
    nn.init.zeros_(p["D"][0].weight), nn.init.zeros_(p["D"][0].bias)
    x = centred()
    F, G, E = (p["maps"][name] for name in "FGE")
    losses = alae.L_adv_ED(F, G, E, p["D"], x, whitened(len(x), K), config)
    sum(losses).backward()
    assert p["D"][0].weight.grad.abs().max() < 1e-12 and E.grad.abs().max() < 1e-12
    losses = alae.L_adv_ED(F, G, E, p["D"], x + 1, whitened(len(x), K), config)  # it does see a mean
    sum(losses).backward()
    assert p["D"][0].weight.grad.abs().max() > 1e-3


def gradients(E, G, A, x, nu=NU):
    """Largest gradient in each of the three steps, with the tangent of softplus, γ = 0 and exact second moments."""
    config, p = parts(adversarial="tangent", gamma=0.0, decay=nu * K)
    with torch.no_grad():
        p["maps"]["E"].copy_(E), p["maps"]["G"].copy_(G), p["D"].B.copy_(torch.linalg.cholesky(A).T)
    (F, G, E), critic, z = (p["maps"][name] for name in "FGE"), p["D"], whitened(len(x), K)
    steps = ((sum(alae.L_adv_ED(F, G, E, critic, x, z, config)), [E, critic.B]),
             (sum(alae.L_adv_FG(F, G, E, critic, z, config)), [G]), (alae.L_err_EG(F, G, E, z), [E, G]))
    return [max(g.abs().max().item() for g in torch.autograd.grad(loss, of)) for loss, of in steps]


def test_the_three_steps_rest_at_pca_and_not_off_it():
    x = centred()
    values, V = eigen(x)
    top, V1 = values[:K], V[:, :K]
    E, G, A = torch.diag(top ** -0.5) @ V1.T, V1 @ torch.diag(top ** 0.5), NU * torch.diag(top)
    turn = torch.linalg.qr(torch.randn(K, K))[0]
    for R in (torch.eye(K), turn):  # any rotation of w
        assert max(gradients(R @ E, G @ R.T, R @ A @ R.T, x)) < 1e-10
    assert gradients(E, G, 2 * A, x)[1] > 1e-3
    tilted = torch.linalg.qr(V1 + 0.3 * V[:, K:2 * K])[0]
    S = x.T @ x / len(x)
    C = torch.linalg.cholesky(tilted.T @ S @ tilted)  # another space, whitened as well: Steps II and III can rest there
    E, G = torch.linalg.inv(C) @ tilted.T, tilted @ C
    first, second, third = gradients(E, G, NU * C.T @ C, x)
    assert second < 1e-10 and third < 1e-10 and first > 0.1


def test_without_the_decay_every_whitened_space_is_at_rest():
    x = centred()
    tilted = torch.linalg.qr(torch.randn(D, K))[0]
    C = torch.linalg.cholesky(tilted.T @ (x.T @ x / len(x)) @ tilted)
    for stretch, rests in ((1.0, True), (2.0, False)):
        E, G = stretch * torch.linalg.inv(C) @ tilted.T, tilted @ C / stretch
        config, p = parts(adversarial="tangent", gamma=0.0, decay=0.0)
        nn.init.eye_(p["D"].B)  # its gradient is then twice that for A, whose value it does not depend on
        for t, value in ((p["maps"]["E"], E), (p["maps"]["G"], G)):
            t.data.copy_(value)
        (F, G, E), z = (p["maps"][name] for name in "FGE"), whitened(len(x), K)
        loss = sum(alae.L_adv_ED(F, G, E, p["D"], x, z, config))
        assert (torch.autograd.grad(loss, p["D"].B)[0].abs().max() < 1e-10) == rests
        p["D"].B.data.zero_()  # and with A = 0 nothing else has a gradient
        losses = (sum(alae.L_adv_ED(F, G, E, p["D"], x, z, config)), alae.L_adv_FG(F, G, E, p["D"], z, config)[0],
                  alae.L_err_EG(F, G, E, z))
        assert all(g.abs().max() < 1e-10 for loss in losses for g in torch.autograd.grad(loss, [E, G], allow_unused=True)
                   if g is not None)


def test_the_penalty_stretches_the_fixed_point():
    x, gamma = centred(), 0.1
    values, V = eigen(x)
    share = 1 - 8 * gamma * NU
    top = values[:K] * share
    config, p = parts(adversarial="tangent", gamma=gamma, decay=NU * K)
    for t, value in ((p["maps"]["E"], torch.diag(top ** -0.5) @ V[:, :K].T), (p["maps"]["G"], V[:, :K] @ torch.diag(top ** 0.5)),
                     (p["D"].B, (NU * top).sqrt().diag())):
        t.data.copy_(value)
    (F, G, E), z = (p["maps"][name] for name in "FGE"), whitened(len(x), K)
    for loss, of in ((sum(alae.L_adv_ED(F, G, E, p["D"], x, z, config)), [E, p["D"].B]),
                     (sum(alae.L_adv_FG(F, G, E, p["D"], z, config)), [G]), (alae.L_err_EG(F, G, E, z), [E, G])):
        assert max(g.abs().max() for g in torch.autograd.grad(loss, of)) < 1e-9


def test_the_top_eigenspace_attracts_and_another_does_not():
    """Plain gradient descent on the exact moments from near an eigenspace, in the order of the algorithm."""
    S = torch.diag(torch.tensor([1.0, 0.8, 0.3, 0.1]))
    x = whitened(400, 4) @ S.sqrt()

    def angle_after(kept, steps=4000, eta=0.05):
        config = alae.Config(k=2, adversarial="tangent", gamma=0.0, decay=2 * NU)
        p = alae.start(config, 4, "cpu")
        top = S.diagonal()[kept]
        with torch.no_grad():
            p["maps"]["E"].zero_(), p["maps"]["G"].zero_(), p["D"].B.copy_((NU * top).sqrt().diag())
            p["maps"]["E"][[0, 1], kept], p["maps"]["G"][kept, [0, 1]] = top ** -0.5, top ** 0.5
            p["maps"]["E"].add_(0.01 * torch.randn(2, 4))
        (F, G, E), critic, z = (p["maps"][name] for name in "FGE"), p["D"], whitened(400, 2)
        for _ in range(steps):
            for loss, of in ((lambda: sum(alae.L_adv_ED(F, G, E, critic, x, z, config)), [E, critic.B]),
                             (lambda: sum(alae.L_adv_FG(F, G, E, critic, z, config)), [G]),
                             (lambda: alae.L_err_EG(F, G, E, z), [E, G])):
                for parameter, g in zip(of, torch.autograd.grad(loss(), of)):
                    parameter.data -= eta * g
        V = torch.eye(4)[:, kept]
        return torch.linalg.svdvals(torch.linalg.qr(E.T)[0].T @ V).clamp(max=1).acos().max().item()
    assert angle_after([0, 1]) < 1e-3
    assert angle_after([0, 2]) > 0.5


@pytest.mark.parametrize("critic", ("linear", "quadratic", "mlp"))
@pytest.mark.parametrize("penalty", ("r1", "unit"))
def test_penalty_is_on_the_gradient_for_x(critic, penalty):
    config, p = parts(critic=critic, penalty=penalty, gamma=3.0)
    x, (F, G, E) = centred(50).requires_grad_(), (p["maps"][name] for name in "FGE")
    gradient, = torch.autograd.grad(p["D"](x @ E.T).sum(), x)
    norm = gradient.norm(dim=1)
    expected = 1.5 * (norm.square() if penalty == "r1" else (norm - 1).square()).mean()
    torch.testing.assert_close(alae.L_adv_ED(F, G, E, p["D"], x.detach(), torch.randn(50, K), config)[1], expected)


@pytest.mark.parametrize("mapping, adams", (("identity", "steps"), ("linear", "steps"), ("linear", "nets")))
def test_which_parameters_each_step_moves(mapping, adams, monkeypatch):
    config, p = parts(mapping=mapping, adams=adams)
    named, moved = {**dict(p["maps"].items()), "D": p["D"].B}, []
    for name in (name for name in p if name.startswith("opt_")):
        def step(real=p[name].step):
            before = {key: t.detach().clone() for key, t in named.items()}
            real()
            moved.append({key for key, t in named.items() if not torch.equal(t, before[key])})
        monkeypatch.setattr(p[name], "step", step)
    alae.train_step(p, centred(50), config)
    assert moved == [{"E", "D"}, {"F", "G"} if mapping == "linear" else {"G"}] + (
        [{"E", "G"}] if adams == "steps" else [{"E"}, {"G"}])


def test_no_random_maps_beat_pca():
    x = centred()
    S, (_, V) = x.T @ x / len(x), eigen(x)
    best = alae.mse(V[:, :K].T, V[:, :K], S)
    assert best == pytest.approx((x - x @ V[:, :K] @ V[:, :K].T).square().mean().item())
    for _ in range(50):
        E = torch.randn(K, D)
        G = S @ E.T @ torch.linalg.inv(E @ S @ E.T)  # the best G for this E
        assert best < alae.mse(E, G, S) < alae.mse(E, G + 0.1 * torch.randn(D, K), S)


def test_only_the_joint_regressor_tells_G_about_E():
    def gradient(other, joint, weight=0.25):
        torch.manual_seed(1)
        config = regressor.Config(k=K, joint=joint, joint_weight=weight)
        p = regressor.start(config, D, "cpu")
        with torch.no_grad():
            p["maps"]["E"].mul_(0 if other else 1)
        regressor.train_step(p, centred(64), config)
        return p["maps"]["G"].grad
    found = {other: [gradient(other, False), gradient(other, True, 0.0), gradient(other, True), gradient(other, True, 0.5)]
             for other in (False, True)}
    assert torch.equal(found[False][0], found[True][0]) and torch.equal(found[False][0], found[False][1])
    assert not torch.equal(found[False][2], found[True][2])
    quarter, half = (g - found[False][0] for g in found[False][2:])
    torch.testing.assert_close(half, 2 * quarter)


def test_the_critics_best_answer_turns_G_back_to_pca():
    """The docstring's argument: A_ab = (Σ − GGᵀ)_ab / 4γ(λ_a + λ_b) is D's optimum against R1, and its force on G."""
    gamma, S = 1e4, torch.diag(torch.tensor([3.0, 1.0, 0.4]))  # A is so small that softplus is its tangent
    z, x, eps = whitened(300, 1), whitened(300, 3) @ S.sqrt(), 1e-3
    G = torch.tensor([[3.0 ** 0.5], [eps], [0.0]])
    values = S.diagonal()
    A = (S - G @ G.T) / (4 * gamma * (values[:, None] + values))
    assert A[1, 1].item() == pytest.approx(1 / (8 * gamma), rel=1e-3)
    a, U = torch.linalg.eigh(A)

    def critic(stretch):
        D = regressor.Quadratic(3, 3)
        D.B1.weight.data, D.B2.weight.data = ((stretch * t.clamp(min=0)).sqrt()[:, None] * U.T for t in (a, -a))
        return D
    largest = {}
    for stretch in (1.0, 1.1):
        D = critic(stretch)
        sum(regressor.L_adv_D(G, D, x.clone(), z, gamma)).backward()
        largest[stretch] = max(D.B1.weight.grad.abs().max(), D.B2.weight.grad.abs().max())
    assert largest[1.0] < 1e-2 * largest[1.1]
    G.requires_grad_()
    softplus(-critic(1.0)(z @ G.T)).mean().backward()
    assert -G.grad[1, 0].item() == pytest.approx(-eps / (8 * gamma) * (3 - 1) / (3 + 1), rel=1e-2)


@pytest.mark.parametrize("file, more", (("linear_alae.py", ["--steps", "2000", "--gamma", "0.1"]), ("linear_latent_regressor.py", []),
                                        ("linear_latent_regressor.py", ["--joint"])))
def test_each_finds_pca_on_toy_data(file, more, here, tmp_path):
    done = here(f"step1_linear/{file}", "--dataset", "sine_sheet", "--k", "2", "--batch-size", "200", "--run-name", "toy", *more)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / file[:-3] / "toy/summary.json").read_text())
    assert 1 <= summary["eval/ratio"] < 1.05 and summary["eval/angle_G"] < 0.1 and summary["eval/angle_E"] < 0.1
    model = torch.load(tmp_path / "runs" / file[:-3] / "toy/model.pt", weights_only=True)
    w = (shared.load_vectors(shared.Protocol(dataset="sine_sheet"), "cpu")[0] - model["mean"]).double() @ model["E"].double().T
    variances = torch.linalg.eigvalsh(w.T @ w / len(w))
    assert 0.5 < variances[0] and variances[1] < 2.5, "E whitens the data, up to R1"


def test_the_students_setting_does_not(here, tmp_path):
    done = here("step1_linear/linear_alae.py", "--dataset", "sine_sheet", "--k", "2", "--setup", "seed", "--steps", "2500",
                   "--lr", "0.003", "--run-name", "toy")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/linear_alae/toy"
    config = json.loads((folder / "config.json").read_text())["config"]
    assert config["critic"] == "linear" and config["gamma"] == 10 and config["lr"] == 0.003  # what is given counts
    assert json.loads((folder / "summary.json").read_text())["eval/ratio_test"] > 1.5


@pytest.mark.parametrize("module", (alae, regressor))
def test_ctrl_c_saves_and_resumes(module, tmp_path, monkeypatch, capsys):
    torch.set_default_dtype(torch.float32)
    tick, found = shared.Run.tick, []

    def train(*args):
        monkeypatch.setattr(sys, "argv", [module.__file__, *args])
        torch.manual_seed(9)
        module.main(shared.parse_config(module.Config))

    def tick_then_signal(run, *args):
        tick(run, *args)
        if run.at["steps"] == 27:
            os.kill(os.getpid(), signal.SIGINT)
    for name in ("straight", "stopped"):
        if name == "stopped":
            with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
                patch.setattr(shared.Run, "tick", tick_then_signal)
                train("--smoke", "--out-dir", str(tmp_path), "--run-name", name)
            assert stop.value.code == 130
            train("--resume", str(next(tmp_path.glob(f"*/{name}/checkpoint.pt"))))
        else:
            train("--smoke", "--out-dir", str(tmp_path), "--run-name", name)
        found.append(torch.load(next(tmp_path.glob(f"*/{name}/model.pt")), weights_only=True))
    assert torch.equal(found[0]["E"], found[1]["E"]) and torch.equal(found[0]["G"], found[1]["G"])
    assert len(found[1]["run"]["rows"]) == len(found[0]["run"]["rows"])


def test_ablation_is_a_table_of_its_own(here, tmp_path):
    done = here("step1_linear/linear_alae.py", "--smoke", "--ablate", "--run-name", "a")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/linear_alae/a/summary.json").read_text())
    assert all(summary[f"{name}/seed 0"] > 1 for name in alae.ABLATIONS)
    assert len({summary[f"{name}/seed 0"] for name in alae.ABLATIONS}) == len(alae.ABLATIONS), "two variants are the same run"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A smoke run of the comparison, in this process, over a toy, and a dataset that is not there."""
    out = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("http_proxy", "http://127.0.0.1:9"), patch.setenv("https_proxy", "http://127.0.0.1:9")
        patch.setattr(sys, "argv", [compare_autoencoders.__file__, "--smoke", "--datasets", "mnist", "swiss_roll", "cifar10",
                                    "--out-dir", str(out), "--run-name", "c", "--methods", "pca", "lr", "ae_l2", "random", "pixels"])
        compare_autoencoders.main(shared.parse_config(compare_autoencoders.Config))
    return out / "compare_autoencoders" / "c"


def test_comparison_table(compared):
    summary = json.loads((compared / "summary.json").read_text())
    lines = [line.strip("|").split("|") for line in (compared / "table.md").read_text().splitlines()]
    rows = {(line[0].strip(), line[1].strip(), line[2].strip()): line for line in lines[2:]}
    assert list(rows) == [*(("mnist", "10", m) for m in ("PCA", "linear AE (l2)", "linear LR", "random projection")),
                          ("mnist", "", "raw pixels"),
                          *(("swiss_roll", "2", m) for m in ("PCA", "linear AE (l2)", "linear LR", "random projection")),
                          ("cifar10", "", "absent: the data is not on this machine")]
    assert summary["absent"] == "cifar10" and summary["dataset"] == "mnist+swiss_roll"
    assert summary["mnist, k = 10: PCA/ratio_test"] == 1 < summary["mnist, k = 10: linear LR/ratio_test"]
    assert summary["mnist, k = 10: PCA/orthonormality"] < 1e-6 < 1 < summary["mnist, k = 10: linear AE (l2)/orthonormality"]
    assert summary["mnist: raw pixels/svm_acc_short"] > summary["mnist, k = 10: random projection/svm_acc_short"] > 15
    assert rows["mnist", "10", "PCA"][7].strip() == f"{summary['mnist, k = 10: PCA/knn_acc_short']:.2f}"
    own = json.loads((compared / "runs/linear_latent_regressor/mnist-k10-lr/summary.json").read_text())
    assert summary["mnist, k = 10: linear LR/mse_test"] == pytest.approx(own["eval/mse_test"], rel=1e-4)


def test_measures_of_a_pair_of_maps():
    x, x_test = centred(), centred()
    E, G = torch.randn(K, D), torch.randn(D, K)
    row = compare_autoencoders.measure(E, G, 2.0, x, None, x_test, None)
    assert row["mse_test"] == pytest.approx((x_test - x_test @ E.T @ G.T).square().mean().item())
    assert row["ratio_test"] == pytest.approx(row["mse_test"] / 2)
    assert row["orthonormality"] == pytest.approx((E @ E.T - torch.eye(K)).norm().item() ** 2)


def test_one_class_only_gets_a_clear_line(capsys):
    x, y = torch.randn(20, 3), torch.zeros(20, dtype=torch.long)
    with pytest.raises(SystemExit) as stop:
        shared.accuracies("short", x, y, x, y)
    assert stop.value.code == 2 and "nothing to classify" in capsys.readouterr().err
