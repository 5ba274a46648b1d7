"""AAE: sizes, priors, losses, which parameters each phase moves, the balance rule, labels, clusters and the prior gap."""
import json
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import adam, train_here, watch
from PIL import Image
from scipy.stats import wasserstein_distance
from torch import nn
from torch.nn.functional import binary_cross_entropy, one_hot

import aae
import aae_semi_supervised as semi
import shared

MNIST, FACE = torch.Size((1, 28, 28)), torch.Size((3, 32, 32))


def size(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("K", (0, 10))
def test_dense_sizes(K):
    nets = aae.build(aae.Config(), MNIST, K)
    norms = 2 * 2 * 1000
    assert size(nets["Q"]) == 785 * 1000 + 1001 * 1000 + 1001 * 5 + norms
    assert size(nets["P"]) == (6 + K) * 1000 + 1001 * 1000 + 1001 * 784 + norms
    assert size(nets["D"]) == (6 + K) * 500 + 501 * 500 + 501
    nets = aae.build(aae.Config(**aae.Config.recipes["recipe", "seed002"]), MNIST, K)
    assert size(nets["Q"]) == 785 * 1000 + 1001 * 1000 + 1001 * 2 and size(nets["D"]) == (3 + K) * 1000 + 1001 * 1000 + 1001


@pytest.mark.parametrize("shape, Z, K, channels, sizes", (
    (MNIST, 5, 10, (16, 32, 64), (28, 14, 7)), (FACE, 50, 0, (16, 32, 64, 128), (32, 16, 8, 4))))
def test_convolutions_are_seed_004s(shape, Z, K, channels, sizes):
    nets, seen = aae.build(aae.Config(net="conv", latent_dim=Z), shape, K), {"Q": [], "P": []}
    for name in "QP":
        for layer in nets[name]:
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                layer.register_forward_hook(lambda layer, _, out, name=name: seen[name].append((layer.kernel_size[0], *out.shape[1:])))
    x = torch.rand(2, shape.numel())
    assert nets["P"](torch.cat([nets["Q"](x), x[:, :K]], 1)).shape == x.shape
    kernels = [3] + [4] * (len(channels) - 1)
    assert seen["Q"] == [(k, c, s, s) for k, c, s in zip(kernels, channels, sizes)] + [(sizes[-1], Z, 1, 1)]
    assert seen["P"] == [(k, c, s, s) for k, c, s in zip([sizes[-1]] + kernels[1:], channels[::-1], sizes[::-1])] + [(3, *shape)]


def test_losses():
    D, (z, z_fake) = nn.Sequential(nn.Linear(3, 1)), torch.randn(2, 6, 3)
    real, fake = D(z).sigmoid(), D(z_fake).sigmoid()
    ones, zeros = torch.ones(6, 1), torch.zeros(6, 1)
    for module in (aae, semi):
        torch.testing.assert_close(module.L_D(D, z, z_fake), binary_cross_entropy(real, ones) + binary_cross_entropy(fake, zeros))
        torch.testing.assert_close(module.L_Q(D, z_fake), binary_cross_entropy(fake, ones))
    x, logits = torch.rand(4, 7), torch.randn(4, 7)
    torch.testing.assert_close(aae.L_rec(logits, x, "bce"), binary_cross_entropy(logits.sigmoid(), x))
    for mse in (aae.L_rec(logits, x, "mse"), semi.L_rec(logits, x)):
        torch.testing.assert_close(mse, (x - logits.sigmoid()).pow(2).sum() / 28)


@pytest.mark.parametrize("l_D, l_Q, trains", (
    (0.69, 0.69, (True, True)),   # both guess
    (0.30, 1.50, (False, True)),  # D far ahead: it sits out
    (1.20, 0.20, (True, False)),  # Q far ahead
    (0.46, 1.50, (True, True)), (0.30, 0.94, (True, True)), (0.94, 0.20, (True, True)), (1.20, 0.46, (True, True))))
def test_balance(l_D, l_Q, trains):
    assert aae.balance(2 * l_D, l_Q) == trains  # seed 004 halves the sum of D's two cross-entropies


def settle(config, K=0, before=(0, 2 * math.log(2), math.log(2), 0, 0)):
    """One step on random images; returns what moved, step by step, the losses and the nets."""
    torch.manual_seed(0)
    nets, opts = aae.start(config, MNIST, K, torch.device("cpu"))
    seen = watch(nets, **opts)
    x, y = torch.rand(8, 784), one_hot(torch.arange(8) % 10, 10).float()[:, :K]
    losses = aae.train_step(nets, opts, x, y, config, torch.tensor(before))
    return seen, losses, nets


def test_which_nets_move():
    phases = [("P", {"P"}), ("Q_rec", {"Q"}), ("D", {"D"}), ("Q_reg", {"Q"})]
    for config in (aae.Config(), aae.Config(**aae.Config.recipes["recipe", "seed002"]), aae.Config(prior="gmm10", latent_dim=2)):
        seen, losses, nets = settle(config, K=10)
        assert seen == phases and losses[3:].tolist() == [1, 1] and nets["Q"].training
    ahead, behind = (0, 2 * 0.3, 1.5, 1, 1), (0, 2 * 1.2, 0.2, 1, 1)
    seen, losses, _ = settle(aae.Config(), before=ahead)
    assert seen == [phases[i] for i in (0, 1, 3)] and losses[3:].tolist() == [0, 1] and losses[1] > 0
    seen, losses, _ = settle(aae.Config(), before=behind)
    assert seen == phases[:3] and losses[3:].tolist() == [1, 0] and losses[2] > 0
    assert settle(aae.Config(balance=False), before=ahead)[0] == phases
    assert settle(aae.Config(lr_Q=0.0))[0] == phases[:2]  # a plain autoencoder


def test_q_is_in_evaluation_mode_while_D_learns(monkeypatch):
    shown, L_D = [], aae.L_D
    monkeypatch.setattr(aae, "L_D", lambda D, z, z_fake: shown.append(z_fake) or L_D(D, z, z_fake))
    for q_eval in (True, False):
        config = aae.Config(batch_norm=False, dropout=0.5, q_eval=q_eval, lr_Q=1e-30)
        nets, opts = aae.start(config, MNIST, 0, torch.device("cpu"))
        aae.train_step(nets, opts, x := torch.rand(8, 784), x[:, :0], config, torch.tensor([0, 1.4, 0.7, 0, 0]))
        assert not shown[-1].requires_grad and nets["Q"].training
        assert torch.allclose(shown[-1], nets["Q"].eval()(x), atol=1e-6) == q_eval  # no dropout


def test_priors():
    generator = torch.Generator().manual_seed(0)
    y = one_hot(torch.arange(20_000) % 10, 10)

    def draw(name, y=None, **more):
        return aae.p(20_000, aae.Config(prior=name, **more), "cpu", y, generator)
    z = draw("truncated")
    assert z.abs().max() <= 2 and z.std().item() == pytest.approx(0.8796, abs=0.01)  # of N(0, 1) cut at 2
    assert draw("gaussian", prior_std=5.0).std().item() == pytest.approx(5, rel=0.02)
    z = draw("gmm10", y, latent_dim=2)
    for k in range(10):
        part, angle = z[k::10], math.tau * k / 10
        torch.testing.assert_close(part.mean(0), 2 * torch.tensor([math.cos(angle), math.sin(angle)]), atol=0.06, rtol=0)
        assert torch.linalg.eigvalsh(part.T.cov()).sqrt().tolist() == pytest.approx([0.15, 0.6], rel=0.1)
    radii = draw("swiss_roll", y, latent_dim=2).norm(dim=1)
    means = torch.stack([radii[k::10].mean() for k in range(10)])
    assert (means.diff() > 0).all() and means[-1].item() == pytest.approx(3 * 0.95 ** 0.5, abs=0.05)
    for name in ("gmm10", "swiss_roll"):  # without labels: the same mixture
        assert aae.sliced_wasserstein(draw(name, latent_dim=2), draw(name, y, latent_dim=2)) < 0.05


def test_sliced_wasserstein_and_the_floor():
    a, b = torch.randn(2, 500, 1, generator=torch.Generator().manual_seed(0)).mul(torch.tensor([[[1.0]], [[2.0]]]))
    assert aae.sliced_wasserstein(a, b + 1) == pytest.approx(wasserstein_distance(a[:, 0].numpy(), b[:, 0].numpy() + 1), rel=1e-5)
    shift = torch.tensor([3.0, 4.0])  # E |θ·shift| = ‖shift‖ 2/π for a direction θ in the plane
    a = torch.randn(500, 2)
    assert aae.sliced_wasserstein(a, a + shift) == pytest.approx(10 / math.pi, rel=0.1)
    config = aae.Config(latent_dim=2)
    nets = aae.build(config, MNIST, 0)
    seen = aae.maps(nets, config, MNIST, 0, "cpu")
    gap = aae.prior_gap(seen, seen["prior"](4000, 99), 2)
    assert gap["eval/prior_gap"] == pytest.approx(gap["eval/prior_gap_floor"], rel=1) and gap["eval/prior_gap_floor"] < 0.05
    assert aae.prior_gap(seen, 1.5 * seen["prior"](4000, 99), 2)["eval/prior_gap"] > 0.2


def test_labels_stand_behind_pixels_and_codes():
    config = aae.Config(labels=True, smoke=True)
    data, K = aae.load(config, torch.device("cpu"))
    assert K == 10 and data[0].shape == (2000, 794) and data[4] == MNIST
    assert data[0][:, 784:].argmax(1).equal(data[1]) and data[2][:, 784:].argmax(1).equal(data[3])
    nets = aae.build(config, MNIST, K)
    seen, x = aae.maps(nets, config, MNIST, K, "cpu"), data[2][:20]
    codes = seen["encode"](x)
    assert codes.shape == (20, 15) and codes[:, 5:].equal(x[:, 784:]) and seen["prior"](20)[:, 5:].argmax(1).tolist() == [*range(10)] * 2
    images, columns = aae.sheet(seen, 5, K, 3)
    assert images.shape == (90, 784) and columns == 15
    z = seen["prior"](10_000)[:, :5]  # row 1, column 4: the first row of class 1's grid, its second entry
    code = torch.zeros(1, 15)
    code[0, 0], code[0, 1], code[0, 6] = z[:, 0].quantile(0.5), z[:, 1].quantile(0.98), 1
    torch.testing.assert_close(images[4:5], seen["decode"](code))
    plain = shared.evaluate(config, data, seen, full=False)
    moved = data[0].clone(), data[1], torch.cat([data[2][:, :784], data[2][:, 784:].roll(1, 1)], 1), data[3], data[4]
    assert shared.evaluate(config, moved, seen, full=False)["eval/recon_mse"] != plain["eval/recon_mse"]  # P sees the class
    assert shared.evaluate(config, moved, seen, full=False)["eval/knn_acc_short"] == plain["eval/knn_acc_short"]  # Q does not


def test_prior_gap_compares_with_the_classes_at_hand():
    config, y = aae.Config(prior="gmm10", latent_dim=2, labels=True), one_hot(torch.arange(6000) % 3, 10).float()
    seen = aae.maps(aae.build(config, MNIST, 10), config, MNIST, 10, "cpu")
    gap = aae.prior_gap(seen, seen["prior"](6000, 99, y), 2)  # three of ten classes
    assert gap["eval/prior_gap"] == pytest.approx(gap["eval/prior_gap_floor"], rel=1) and gap["eval/prior_gap"] < 0.05


def test_recipes_fill_defaults():
    config = shared.parse_config(aae.Config, ["--recipe", "seed002", "--lr-D", "0.1"])
    assert (config.dropout, config.lr, config.lr_D, config.prior, config.batch_size) == (0.25, 6e-4, 0.1, "gaussian", 100)
    config = shared.parse_config(aae.Config, ["--dataset", "folder:/some/faces"])
    assert (config.net, config.latent_dim, config.dataset) == ("conv", 50, "folder:/some/faces")
    assert shared.parse_config(aae.Config, ["--prior", "gmm10", "--dataset", "celeba"]).latent_dim == 2


def test_learning_rates_fall_on_a_plateau(bare, tmp_path, monkeypatch):
    monkeypatch.setattr(aae, "L_rec", lambda logits, x, loss: 0 * logits.mean() + 1)
    train_here(monkeypatch, aae, "--smoke", "--epochs", "2", "--patience", "1", "--out-dir", str(tmp_path), "--run-name", "a")
    rows = torch.load(tmp_path / "aae/a/checkpoint.pt", weights_only=True)
    assert [row.get("train/lr") for row in rows["run"]["rows"]] == [None, 2e-4, 2e-4]
    assert {round(rows[name]["param_groups"][0]["lr"], 9) for name in ("P", "Q_rec", "Q_reg", "D")} == {4e-5}


def test_a_plain_autoencoder_has_no_adversarial_metrics(bare, tmp_path, monkeypatch):
    train_here(monkeypatch, aae, "--smoke", "--epochs", "1", "--lr-Q", "0", "--out-dir", str(tmp_path), "--run-name", "a")
    keys = json.loads((tmp_path / "aae/a/summary.json").read_text()).keys()
    assert {"train/L_rec", "eval/prior_gap"} <= keys and not {"train/L_D", "train/L_Q", "train/trains_D"} & keys


def test_own_faces(bare, tmp_path, monkeypatch):
    (tmp_path / "faces").mkdir()
    for i in range(12):
        Image.merge("RGB", [Image.effect_noise((40, 30), 20 + i + j) for j in range(3)]).save(tmp_path / "faces" / f"{i}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_here(monkeypatch, aae, "--smoke", "--dataset", f"folder:{tmp_path / 'faces'}", "--batch-size", "5", "--epochs", "1",
                   "--out-dir", str(tmp_path), "--run-name", "own")
    saved = torch.load(tmp_path / "aae/own/model.pt", weights_only=True)
    assert saved["config"]["net"] == "conv" and saved["config"]["latent_dim"] == 50 and saved["Q"]["1.weight"].shape == (16, 3, 3, 3)
    with Image.open(tmp_path / "aae/own/traversal.gif") as gif:
        assert gif.size == (320, 320)


@pytest.mark.parametrize("K, size", ((0, (280, 280)), (10, (840, 336))))
def test_the_animation_goes_along_z3_and_back(K, size, tmp_path):
    seen = {"prior": lambda n: torch.rand(n, 3 + K), "decode": lambda z: z[:, 2:3].expand(-1, 784)}
    def save(*args):
        shared.Run.animation(SimpleNamespace(dir=tmp_path, _mirror=lambda function: None), *args)
    aae.animate(SimpleNamespace(animation=save), seen, MNIST, 3, K)
    with Image.open(tmp_path / "traversal.gif") as gif:
        assert gif.size == size and gif.n_frames > 10
        levels = []
        for i in range(gif.n_frames):
            gif.seek(i)
            levels.append(np.asarray(gif.convert("L"))[0, 0].item())
    assert max(levels) > 200 and levels[:levels.index(max(levels)) + 1] == sorted(levels[:levels.index(max(levels)) + 1])
    assert levels[-1] < max(levels)


# Semi-supervised

def test_semi_supervised_phases():
    config = semi.Config()
    for cluster, K in ((0, 10), (7, 7)):
        torch.manual_seed(0)
        nets, opts = semi.start(config, 784, K, "cpu")
        assert size(nets["Q"]) == 785 * 1000 + 1001 * 1000 + 1001 * (K + 10) + 4000
        seen, x = watch(nets, **opts), torch.rand(8, 784)
        labelled = (x[:0], None) if cluster else (torch.rand(4, 784), torch.arange(4))
        losses = semi.train_step(nets, opts, x, *labelled, config, K)
        phases = [("P", {"P"}), ("Q_rec", {"Q"}), ("D", {"D_y", "D_z"}), ("Q_reg", {"Q"}), ("Q_sup", {"Q"})]
        assert seen == phases[:4 + (not cluster)] and (losses[3] > 0) == (not cluster)
        y, z = semi.code(nets["Q"], x, K)
        assert y.shape == (8, K) and z.shape == (8, 10)
        torch.testing.assert_close(y.sum(1), torch.ones(8))


@pytest.mark.parametrize("phases", ({"P", "Q_rec"}, {"D"}, {"Q_reg"}, {"Q_sup"}))
def test_each_phase_descends_its_written_loss(phases):
    """With SGD of rate 1 and all other phases at rate 0, the weights move by the gradient of the loss as it is written."""
    torch.manual_seed(0)
    config, K = semi.Config(latent_dim=3, hidden_D=5, noise=0.0), 4
    nets = semi.build(config, 6, K).double()
    opts = {name: torch.optim.SGD(opt.param_groups[0]["params"], float(name in phases)) for name, opt in {
        "P": adam(nets["P"]), "Q_rec": adam(nets["Q"]), "Q_reg": adam(nets["Q"]), "Q_sup": adam(nets["Q"]),
        "D": adam(nets["D_y"], nets["D_z"])}.items()}
    x, x_l, k_l = torch.rand(8, 6).double(), torch.rand(5, 6).double(), torch.tensor([0, 3, 1, 1, 2])
    state = torch.get_rng_state()
    y = one_hot(torch.randint(K, (8,)), K).double()  # as the step draws them
    z = torch.randn(8, 3, dtype=torch.float64)
    torch.set_rng_state(state)
    a = nets["Q"](x)
    y_fake, z_fake = a[:, :K].exp() / a[:, :K].exp().sum(1, keepdim=True), a[:, K:]
    D = {name: lambda c, name=name: nets[name](c).sigmoid() for name in ("D_y", "D_z")}
    rec = (x - nets["P"](torch.cat([y_fake, z_fake], 1)).sigmoid()).pow(2).mean()
    loss_D = sum(-(D[n](c).log() + (1 - D[n](f.detach())).log()).mean() for n, c, f in (("D_y", y, y_fake), ("D_z", z, z_fake)))
    loss_Q = -(D["D_y"](y_fake).log() + D["D_z"](z_fake).log()).mean()
    sup = -nets["Q"](x_l)[:, :K].log_softmax(1)[torch.arange(5), k_l].mean()
    loss, names = {"P": (rec, "QP"), "D": (loss_D, ("D_y", "D_z")), "Q_reg": (loss_Q, "Q"), "Q_sup": (sup, "Q")}[min(phases)]
    params = [p for name in names for p in nets[name].parameters()]
    want = [p - g for p, g in zip(params, torch.autograd.grad(loss, params))]
    others = [p.clone() for name in nets.keys() - set(names) for p in nets[name].parameters()]
    semi.train_step(nets, opts, x, x_l, k_l, config, K)
    torch.testing.assert_close(params, [p.detach() for p in want])
    torch.testing.assert_close([p for name in nets.keys() - set(names) for p in nets[name].parameters()], others)


def test_noise_in_training_alone():
    noise, x = semi.Noise(0.3), torch.zeros(100, 100)
    assert noise(x).std().item() == pytest.approx(0.3, rel=0.05) and noise.eval()(x) is x


def test_labels_are_balanced_and_drawn_by_seed():
    y = torch.arange(1000) % 10
    a, again, b = semi.balanced(y, 100, 0), semi.balanced(y, 100, 0), semi.balanced(y, 100, 1)
    assert y[a].bincount().tolist() == [10] * 10 and len(set(a.tolist())) == 100
    assert a.equal(again) and not a.equal(b) and sorted(semi.balanced(y, 0, 0).tolist()) == list(range(1000))


def test_clusters_take_the_class_of_their_surest_training_image():
    config, y = semi.Config(cluster=3), torch.tensor([[.9, .1, 0], [.6, .4, 0], [0, .3, .7], [.1, .8, .1], [0, .1, .9]])
    data = (y, torch.tensor([4, 5, 6, 7, 8]), torch.tensor([[.5, .3, .2], [.2, .5, .3], [.1, .1, .8], [.8, .1, .1]]),
            torch.tensor([4, 7, 6, 5]), None)
    probabilities, classes = semi.classify(config, data, {"encode": lambda x: x}, 3)
    assert classes.tolist() == [4, 7, 8]
    assert (classes[probabilities.argmax(1)] != data[3]).float().mean() == 0.5


def test_learning_rates_fall_linearly():
    config = semi.Config(lr=1.0, reg_lr=2.0, sup_lr=3.0, decay=0.5)
    opts = semi.start(config, 784, 10, "cpu")[1]
    for done, share in ((0, 1), (0.5, 1), (0.75, 0.5), (1, 0)):
        semi.set_rates(opts, config, done)
        assert {name: opt.param_groups[0]["lr"] for name, opt in opts.items()} == {
            "Q_rec": share, "P": share, "Q_sup": 3 * share, "D": 2 * share, "Q_reg": 2 * share}
