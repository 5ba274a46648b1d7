"""Step 2: the losses' identities, and which parameters each step moves."""
import json

import pytest
import torch
from conftest import adam, assert_same, train_here, watch
from torch import nn
from torch.distributions import Normal, kl_divergence

import alae_mnist as alae
import autoencoder_mnist as ae
import bigan_mnist as bigan
import gan_mnist as gan
import latent_regressor_mnist as lr
import shared



@pytest.mark.parametrize("module", (ae, alae, bigan, lr))
def test_sizes_of_E_and_G(module):
    nets = module.build(module.Config(), 784)
    biases = 0 if module in (bigan, lr) else 1024 + 1024
    assert sum(p.numel() for p in nets["E"].parameters()) == 784 * 1024 + 1024 ** 2 + 1024 * 50 + (biases and biases + 50)
    again = 50 * 1024 if module in (bigan, lr) else 0  # G's second layer sees z again
    assert sum(p.numel() for p in nets["G"].parameters()) == 50 * 1024 + again + 1024 ** 2 + 1024 * 784 + (biases and biases + 784)


def test_gan_sizes_and_images():
    for net, size in (("mlp", 784 * 1024 + 1024 ** 2 + 1024 + 2049), ("dcgan", 64 * 16 + 64 + 128 * 64 * 16 + 128 + 128 * 49 + 1)):
        nets = gan.build(gan.Config(net=net, norm="none"), (1, 28, 28))
        assert sum(p.numel() for p in nets["D"].parameters()) == size
        assert nets["D"](nets["G"](torch.randn(3, 50))).shape == (3, 1)
        nets = gan.build(gan.Config(net=net), (3, 32, 32))
        assert nets["G"](torch.randn(3, 50)).shape == (3, 3 * 32 * 32)


# BiGAN

def test_swapping_the_pairs_flips_the_discriminators_loss():
    torch.manual_seed(0)
    nets = bigan.build(bigan.Config(latent_dim=5), 20).double()
    nn.init.normal_(nets["D"].last[-1].weight)
    x, z = torch.rand(2, 8, 20).double(), torch.rand(2, 8, 5).double()
    real, fake = nets["D"](x[0], z[0]), nets["D"](x[1], z[1])
    torch.testing.assert_close(bigan.L_EG(real, fake), bigan.L_D(fake, real))
    # softplus(−l) − softplus(l) = −l: with the roles exchanged, the same difference with the other sign
    torch.testing.assert_close(bigan.L_D(real, fake) - bigan.L_D(fake, real), (fake - real).mean())
    labels = torch.cat([torch.ones_like(real), torch.zeros_like(fake)])
    bce = nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(bigan.L_D(real, fake), 2 * bce(torch.cat([real, fake]), labels))
    torch.testing.assert_close(bigan.L_EG(real, fake), 2 * bce(torch.cat([real, fake]), 1 - labels))


def test_bigan_moves_all_three_from_the_same_losses():
    torch.manual_seed(0)
    config = bigan.Config(latent_dim=5)
    nets, x = bigan.build(config, 20), torch.rand(8, 20)
    nn.init.normal_(nets["D"].last[-1].weight, std=0.02)  # it starts at 0
    before, state = {k: v.clone() for k, v in nets.state_dict().items()}, torch.get_rng_state()
    opt_D, opt_EG = adam(nets["D"]), adam(nets["E"], nets["G"])
    seen = watch(nets, opt_D=opt_D, opt_EG=opt_EG)
    losses = bigan.train_step(nets, opt_D, opt_EG, x, config)
    assert seen == [("opt_D", {"D"}), ("opt_EG", {"E", "G"})]
    gradients = {name: [p.grad.clone() for p in net.parameters()] for name, net in nets.items()}
    nets.load_state_dict(before)
    torch.set_rng_state(state)
    z = torch.rand(8, 5) * 2 - 1
    real, fake = nets["D"](x, 2 * nets["E"](x).sigmoid() - 1), nets["D"](nets["G"](z), z)
    for i, (names, loss) in enumerate((("D", bigan.L_D(real, fake)), ("EG", bigan.L_D(fake, real)))):
        torch.testing.assert_close(losses[i], loss.detach())
        for name in names:
            for mine, theirs in zip(gradients[name], torch.autograd.grad(loss, list(nets[name].parameters()), retain_graph=True)):
                torch.testing.assert_close(mine, theirs)


def test_settled_statistics_are_means_over_batches_and_cost_no_random_numbers():
    torch.manual_seed(0)
    config = bigan.Config(latent_dim=5, batch_size=16)
    nets, x, state = bigan.build(config, 20), torch.rand(64, 20), torch.get_rng_state()
    bigan.settle(nets, x, config, n=200)
    assert torch.get_rng_state().equal(state)
    norm, hidden = nets["E"][3], nets["E"][:3](x).detach()
    torch.testing.assert_close(norm.running_mean, hidden.mean(0), atol=0.05 * hidden.std().item(), rtol=0.05)
    assert (norm.running_var / hidden.var(0) - 1).abs().mean() < 0.05
    assert nets["G"].last[0].num_batches_tracked == 200


@pytest.mark.parametrize("module", (bigan, lr))
def test_learning_rate_is_constant_and_then_decays_to_one_percent(module):
    config = module.Config()
    rates = [module.learning_rate(config, epoch) for epoch in (1, 200, 300, 400)]
    assert rates == pytest.approx([2e-4, 2e-4, 2e-5, 2e-6])


# Latent regressors

@pytest.mark.parametrize("joint", (False, True))
def test_what_reaches_the_generator_from_the_encoder(joint):
    torch.manual_seed(0)
    config = lr.Config(latent_dim=5, joint=joint)
    nets, x = lr.build(config, 20), torch.rand(8, 20)
    assert not nets["D"][-1].weight.any()  # no adversarial gradient
    before, state = {k: v.clone() for k, v in nets.state_dict().items()}, torch.get_rng_state()
    opts = {f"opt_{name}": adam(nets[name]) for name in "DGE"}
    seen = watch(nets, **opts)
    lr.train_step(nets, *opts.values(), x, config)
    assert seen == [("opt_D", {"D"}), ("opt_G", {"G"} if joint else set()), ("opt_E", {"E"})]
    gradients = {name: [p.grad.clone() for p in nets[name].parameters()] for name in "GE"}
    nets.load_state_dict(before)
    torch.set_rng_state(state)
    z = torch.rand(8, 5) * 2 - 1
    err = nn.functional.binary_cross_entropy(nets["E"](nets["G"](z)).sigmoid(), (z + 1) / 2)
    for name, weight in (("G", 0.25 * joint), ("E", 1)):
        for mine, whole in zip(gradients[name], torch.autograd.grad(err, list(nets[name].parameters()), retain_graph=True)):
            assert whole.abs().max() > 1e-4
            torch.testing.assert_close(mine, weight * whole)


# GANs

def test_gradient_penalty_of_a_linear_critic():
    a, x, x_fake = torch.randn(20, 1), torch.randn(9, 20), torch.randn(9, 20)
    torch.testing.assert_close(gan.gradient_penalty(lambda x: x @ a, x, x_fake, torch.rand(9, 1)), (a.norm() - 1) ** 2)
    x.requires_grad_()
    torch.testing.assert_close(gan.r1_penalty(x @ a, x), a.square().sum())
    quadratic = gan.gradient_penalty(lambda x: x.square().sum(1) / 2, x, x_fake, torch.full((9, 1), 0.25))  # its gradient is x̂
    torch.testing.assert_close(quadratic, ((0.25 * x + 0.75 * x_fake).norm(dim=1) - 1).square().mean())


def test_gan_losses():
    D, one = lambda x: x, torch.ones(6, 1)
    softplus, critic = nn.functional.softplus, {loss: gan.L_D(D, 3 * one, 2 * one, gan.Config(loss=loss)) for loss in gan.LOSS}
    for loss in ("minimax", "non_saturating", "r1"):
        torch.testing.assert_close(critic[loss][0], softplus(torch.tensor(-3.0)) + softplus(torch.tensor(2.0)))
    assert critic["wgan_gp"][0] == -1
    assert [critic[loss][1].item() for loss in gan.LOSS] == [0, 0, 5, 0]  # γ/2 and (1 − 1)²
    logits = torch.tensor([[2.0]])
    generator = [gan.L_G(logits, loss).item() for loss in gan.LOSS]
    assert generator == pytest.approx([-2.1269, 0.1269, 0.1269, -2.0], abs=1e-4)


@pytest.mark.parametrize("loss", gan.LOSS)
def test_what_a_gan_step_moves(loss):
    config = gan.Config(loss=loss, batch_size=4, latent_dim=5)
    parts = gan.start(config, (1, 4, 4), "cpu")
    nets, averaged = parts["nets"], [p.clone() for p in parts["averaged"].parameters()]
    seen = watch(nets, opt_D=parts["opt_D"], opt_G=parts["opt_G"])
    assert gan.per_step(config) == (20 if loss == "wgan_gp" else 4)
    losses = gan.train_step(*parts.values(), torch.rand(gan.per_step(config), 16), config)
    assert seen == [("opt_D", {"D"})] * (5 if loss == "wgan_gp" else 1) + [("opt_G", {"G"})]
    grads = torch.cat([p.grad.flatten() for p in nets["G"].parameters()])
    torch.testing.assert_close(losses[3], grads.norm())
    decay = 0.5 ** (gan.per_step(config) / config.ema)
    for mean, old, new in zip(parts["averaged"].parameters(), averaged, nets["G"].parameters()):
        torch.testing.assert_close(mean, decay * old + (1 - decay) * new)


def test_spectral_norm():
    torch.manual_seed(0)
    nets = gan.build(gan.Config(), (1, 28, 28))
    for _ in range(30):  # power iterations
        nets["D"](torch.rand(2, 784))
    for layer in nets["D"][::2]:
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=0.02)
    config = shared.parse_config(gan.Config, ["--loss", "r1", "--lr", "0.5"])
    assert (config.norm, config.lr) == ("none", 0.5) and shared.parse_config(gan.Config, []).norm == "spectral"


def test_a_collapse_is_said():
    row = {f"eval/digit_{i}": 10.0 for i in range(10)}
    assert gan.verdict(row).startswith("not collapsed") and gan.verdict({}) == "diverged"
    assert gan.verdict(row | {"eval/digit_3": 0.9, "eval/digit_8": 0.0}) == "collapsed, hardly any sample is a 3, 8"


def test_mode_coverage_counts_digits(monkeypatch):
    """Samples that are copies of one test digit: all of them in its class, and KL = −log of its share of the data."""
    config = gan.Config(smoke=True)
    data = shared.load_vectors(config, torch.device("cpu"), toys=False)
    x, y = data[2], data[3]
    four = x[(y == 4).nonzero()[0, 0]]
    parts = gan.start(config, data[4], "cpu")
    monkeypatch.setattr(gan, "maps", lambda *_: {"decode": lambda z: four.expand(len(z), -1), "prior": lambda n: torch.zeros(n, 1)})
    row = gan.evaluate(parts, data, config)
    assert row["eval/digit_4"] == 100 and row["eval/digit_min"] == 0
    assert row["eval/digit_kl"] == pytest.approx(-torch.log((y == 4).double().mean()).item(), abs=0.1)


def test_comparison(here, tmp_path):
    done = here("step2_gan/gan_mnist.py", "--compare", "--smoke", "--epochs", "1", "--run-name", "c")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/gan_mnist/c"
    summary = json.loads((folder / "summary.json").read_text())
    for row in (f"{name}, seed {seed}" for name in gan.VARIANTS for seed in (0, 1)):
        assert {f"{row}/{key}" for key in ("fid", "digit_kl", "digit_min", "digit_7", "grad_norm_G")} <= summary.keys()
        assert f"{row}: collapsed, " in done.stdout and f"{row}: collapsed, " in summary["verdict"]  # so early, all are
    assert len((folder / "metrics.csv").read_text().splitlines()) == 2
    assert {path.name for path in folder.glob("*.png")} == {"compare.png", "samples.png"}


# Autoencoders

def test_KL_is_torchs():
    torch.manual_seed(0)
    mu, log_var = torch.randn(2, 7, 5)
    expected = kl_divergence(Normal(mu, (log_var / 2).exp()), Normal(torch.zeros(5), torch.ones(5))).sum(1)
    torch.testing.assert_close(ae.KL(mu, log_var), expected)


def test_reconstruction_losses():
    out, x = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    assert ae.L_rec(out, x, "l1") == 1.5 and ae.L_rec(out, x, "l2") == 2.5
    bce = nn.functional.binary_cross_entropy(out.sigmoid(), x)
    torch.testing.assert_close(ae.L_rec(out, x, "bce"), bce)
    torch.testing.assert_close(ae.L_rec(out, x, "vae"), 2 * bce)  # a sum over pixels, beside a sum over dimensions


@pytest.mark.parametrize("loss", ("l1", "l2", "bce", "vae"))
def test_an_autoencoder_moves_both_and_measures_against_the_clean_image(loss):
    torch.manual_seed(0)
    config = ae.Config(loss=loss, noise=0.5, latent_dim=5)
    nets, x = ae.build(config, 20), torch.rand(8, 20)
    optimizer, inputs = adam(nets), []
    nets["E"].register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    nets["G"].register_forward_hook(lambda _, __, out: inputs.append(out))
    seen = watch(nets, optimizer=optimizer)
    rec, kl = ae.train_step(nets, optimizer, x, config)
    assert seen == [("optimizer", {"E", "G"})]
    assert 0.3 < (inputs[0] - x).std() < 0.7
    torch.testing.assert_close(rec, ae.L_rec(inputs[1], x, loss).detach())
    assert (kl > 0) == (loss == "vae")


def test_the_vae_draws_codes_of_the_encoders_standard_deviation():
    torch.manual_seed(0)
    config = ae.Config(loss="vae", latent_dim=5)
    nets, codes = ae.build(config, 20), []
    nn.init.zeros_(nets["E"][-1].weight), nets["E"][-1].bias.data.copy_(torch.tensor([3.0, 4.0]).log().repeat_interleave(5) * 2)
    nets["G"].register_forward_hook(lambda _, args, __: codes.append(args[0].detach()))
    ae.train_step(nets, adam(nets), torch.rand(4000, 20), config)  # μ = 2 log 3, log s² = 2 log 4
    assert codes[0].mean().item() == pytest.approx(2.197, abs=0.1) and codes[0].std().item() == pytest.approx(4, rel=0.03)


def test_samples_of_an_autoencoder_have_the_codes_moments():
    config = ae.Config(latent_dim=5)
    nets, x = ae.build(config, 20), torch.rand(500, 20)
    codes, drawn = nets["E"](x).detach(), ae.maps(nets, config, x)["prior"](20_000)
    torch.testing.assert_close(drawn.mean(0), codes.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), codes.T.cov(), atol=0.05, rtol=0.05)


# ALAE from the paper

def test_what_each_step_of_alae_moves():
    torch.manual_seed(0)
    config = alae.Config(latent_dim=5)
    nets = alae.build(config, 20)
    opts = {"opt_ED": adam(nets["E"], nets["D"]), "opt_FG": adam(nets["F"], nets["G"]), "opt_EG": adam(nets["E"], nets["G"])}
    seen = watch(nets, **opts)
    alae.train_step(nets, *opts.values(), torch.rand(8, 20), config)
    assert seen == [("opt_ED", {"E", "D"}), ("opt_FG", {"F", "G"}), ("opt_EG", {"E", "G"})]


def test_the_critic_is_not_affine():
    torch.manual_seed(0)
    D = alae.build(alae.Config(latent_dim=5), 20)["D"]
    a, b = torch.randn(2, 5)
    assert (D(a) + D(b) - D(a + b) - D(0 * a)).abs() > 1e-2


def test_runtime_equalized_layer():
    torch.manual_seed(0)
    layer, x = alae.Linear(200, 300, lrmul=0.1).double(), torch.randn(50, 200).double()
    assert layer.weight.std().item() == pytest.approx(10, rel=0.02)  # N(0, 1)/lrmul
    nn.init.normal_(layer.bias)
    W = layer.weight * 0.1 * (2 / 200) ** 0.5
    torch.testing.assert_close(layer(x), x @ W.T + 0.1 * layer.bias)
    assert W.std().item() == pytest.approx((2 / 200) ** 0.5, rel=0.02)


def test_alae_losses():
    D, E, zeros = nn.Linear(3, 1), nn.Identity(), torch.zeros(4, 3)
    with torch.no_grad():
        D.weight.fill_(1.0), D.bias.fill_(2.0)  # 2 on zeros, 5 on ones
    softplus = nn.functional.softplus
    loss, r1 = alae.L_adv_ED(D, E, x=zeros + 1, x_fake=zeros, gamma=10.0)
    torch.testing.assert_close(r1, torch.tensor(15.0))  # γ/2 ‖(1, 1, 1)‖²
    torch.testing.assert_close(loss, softplus(torch.tensor(2.0)) + softplus(torch.tensor(-5.0)) + r1)
    torch.testing.assert_close(alae.L_adv_FG(D, E, zeros), softplus(torch.tensor(-2.0)))
    torch.testing.assert_close(alae.L_err_EG(lambda x: 3 * x, lambda w: w, torch.ones(4, 3)), torch.tensor(4.0))


def test_references_do_not_change_the_training(tmp_path, monkeypatch):
    for run, extra in (("a", []), ("b", ["--references"])):
        train_here(monkeypatch, lr, "--smoke", "--epochs", "1", *extra, "--out-dir", str(tmp_path), "--run-name", run)
    a, b = (torch.load(tmp_path / "latent_regressor_mnist" / run / "model.pt", weights_only=True) for run in "ab")
    assert_same(a["E"], b["E"])
    assert b["run"]["rows"][0]["untrained/svm_acc_short"] > 50  # of a random last layer, though training starts at 0
