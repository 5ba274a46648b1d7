"""Step 2: the losses' identities, what each step moves, what evaluate measures and main trains."""

import copy
from types import SimpleNamespace

import shared

import alae_mnist as alae
import autoencoder_mnist as ae
import bigan_mnist as bigan
import gan_mnist as gan
import latent_regressor_mnist as lr
import pytest
import torch
from conftest import size, toy_data, train, watch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits, softplus

ENCODERS = [(alae, {}), (ae, {}), (ae, {"loss": "vae"}), (bigan, {}), (lr, {})]
LOSSES = ("minimax", "non-saturating", "r1", "wgan-gp")
each_encoder = pytest.mark.parametrize("module, options", ENCODERS)


def adam(*nets):
    return torch.optim.Adam(nn.ModuleList(nets).parameters(), 1e-3)


def leave_gradients(nets):
    """Such as an earlier step leaves, which the next one must not see."""
    for p in nets.parameters():
        p.grad = torch.ones_like(p)


def assert_gradients(net, loss):
    whole = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    torch.testing.assert_close([p.grad for p in net.parameters()], list(whole))


def frozen(*nets):
    """An optimizer that moves nothing, so that gradients can be compared."""
    return torch.optim.SGD(nn.ModuleList(nets).parameters(), lr=0.0)


def norms(nets):
    return [module for module in nets.modules() if isinstance(module, nn.BatchNorm1d)]


# Networks


@pytest.mark.parametrize("module", (ae, alae))
def test_sizes_with_biases(module):
    nets = module.build(module.Config(), 784)
    assert size(nets["E"]) == 784 * 1024 + 1024**2 + 1024 * 50 + 1024 + 1024 + 50
    assert size(nets["G"]) == 50 * 1024 + 1024**2 + 1024 * 784 + 1024 + 1024 + 784


@pytest.mark.parametrize("module", (bigan, lr))
def test_sizes_without_biases(module):
    nets = module.build(module.Config(), 784)
    assert size(nets["E"]) == 784 * 1024 + 1024**2 + 1024 * 50
    assert size(nets["G"]) == 2 * 50 * 1024 + 1024**2 + 1024 * 784  # z enters twice
    z_too = 50 * 1024 if module is bigan else 0
    assert size(nets["D"]) == 784 * 1024 + z_too + 1024**2 + 1024
    assert all(layer.eps == 1e-8 for layer in norms(nets)) and len(norms(nets)) == 4


@pytest.mark.parametrize("module", (ae, alae, bigan, gan, lr))
def test_slopes_are_a_fifth_and_a_gans_pixels_lie_between_0_and_1(module):
    nets = module.build(module.Config(), 784)
    leaky = [layer for layer in nets.modules() if isinstance(layer, nn.LeakyReLU)]
    assert {layer.negative_slope for layer in leaky} == {0.2}
    pixels = nets["G"](torch.randn(64, 50))
    assert (pixels.min() > 0 and pixels.max() < 1) == (module in (bigan, gan, lr))


def test_F_and_D_of_alae_have_the_official_layers_and_a_tenth_of_the_rate():
    rates = {}
    for name, net in alae.build(alae.Config(), 784).items():
        rates[name] = [layer.lrmul for layer in net if isinstance(layer, alae.Linear)]
    assert rates == {"F": [0.1] * 6, "G": [1.0] * 3, "E": [1.0] * 3, "D": [0.1] * 3}


def test_z_enters_bigans_discriminator_at_its_second_layer():
    D, x, z = bigan.build(bigan.Config(latent_dim=5), 20)["D"], torch.rand(8, 20), torch.rand(8, 5)
    nn.init.normal_(D.last[-1].weight)
    first = D.first(x)
    hidden = D.second(torch.where(first > 0, first, 0.2 * first)) + D.second_z(z)
    torch.testing.assert_close(D(x, z), D.last(hidden))


def test_weights_start_at_he_in_an_autoencoder_and_at_0_02_in_bigan():
    nets = ae.build(ae.Config(), 784)
    for layer in (*nets["G"][::2], *nets["E"][::2]):
        expected = (2 / 1.04 / layer.in_features) ** 0.5  # He's for a slope of 0.2
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert not layer.bias.any()
    for weight in bigan.build(bigan.Config(), 784).parameters():
        assert not weight.any() or weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_sizes_of_the_gan():
    nets = gan.build(gan.Config(norm="none"), 784)
    assert size(nets["D"]) == 784 * 1024 + 1024**2 + 1024 + 2049
    assert size(nets["G"]) == 50 * 1024 + 1024**2 + 1024 * 784 + 4 * 1024 + 784
    assert nets["D"](nets["G"](torch.randn(3, 50))).shape == (3, 1)


def test_the_last_layer_of_LRs_E_starts_at_zero_only_where_it_is_trained():
    assert not lr.build(lr.Config(), 20)["E"][-1].weight.any()
    untrained = lr.build(lr.Config(epochs=0), 20)
    assert untrained["E"][-1].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not untrained["D"][-1].weight.any()


# What evaluate measures


def encode(module, nets, x, config):
    out = nets["E"](x)
    if module in (bigan, lr):
        return 2 * out.sigmoid() - 1
    return out[:, : config.latent_dim]


def decode(nets, z, config):
    out = nets["G"](z)
    return out.sigmoid() if getattr(config, "loss", "") == "vae" else out


def sample(module, nets, n, data, config):
    """G of the prior that each paper names, by hand; the first 100 of n samples."""
    generator = torch.Generator().manual_seed(0)
    if module in (bigan, lr):
        z = 2 * torch.rand(n, config.latent_dim, generator=generator) - 1
    else:
        z = torch.randn(n, config.latent_dim, generator=generator)
    if module is alae:
        z = nets["F"](z)
    if module is ae and config.loss != "vae":
        z = ae.fitted_z(n, nets["E"](data.x_train), config)  # has a test of its own
    return decode(nets, z[:100], config)


def toy(module, **options):
    """Untrained nets with batch statistics that are worthless, and a copy in evaluation's state."""
    torch.manual_seed(0)
    data = toy_data(160, 80, size=64)
    config = module.Config(epochs=0, smoke=True, latent_dim=5, batch_size=16, **options)
    nets = module.build(config, 64)
    settled = copy.deepcopy(nets)
    if hasattr(module, "settle"):
        for layer in norms(nets):
            layer.running_mean.fill_(7.0)
            layer.num_batches_tracked.fill_(1000)
        module.settle(settled, data.x_train, config)
    return nets, data, config, settled.eval()


@pytest.fixture
def given(monkeypatch):
    """What evaluate hands to the shared instruments, by the names of their arguments."""
    notes = {}

    def image_metrics(data, x_rec=None, x_fake=None):
        notes.update(x_rec=x_rec, x_fake=x_fake)
        return {"eval/recon_mse": 1.0}

    def code_metrics(data, train, test, kind, full=True):
        notes[kind] = (train, test, full)
        return {f"eval/knn_acc_{kind}": 2.0}

    monkeypatch.setattr(shared, "image_metrics", image_metrics)
    monkeypatch.setattr(shared, "code_metrics", code_metrics)
    return notes


@each_encoder
@pytest.mark.parametrize("full", (False, True))
@torch.no_grad()
def test_evaluate_hands_over_the_right_images_and_features(module, options, full, given):
    nets, data, config, settled = toy(module, **options)
    random = torch.get_rng_state()
    metrics = module.evaluate(nets, data, config, full)

    expected = {"eval/recon_mse", "eval/knn_acc_short"} | ({"eval/knn_acc_long"} if full else set())
    assert metrics.keys() == expected
    assert torch.get_rng_state().equal(random) and nets.training
    before_last = []
    settled["E"][-1].register_forward_hook(lambda layer, args, out: before_last.append(args[0]))
    codes = encode(module, settled, data.x_test, config)
    close = torch.testing.assert_close
    close(given["x_rec"], decode(settled, codes, config))
    close(given["x_fake"], sample(module, settled, len(data.x_test), data, config))
    short = encode(module, settled, data.x_train, config), codes
    if module in (bigan, lr):  # the logits are the features
        short = settled["E"](data.x_train), settled["E"](data.x_test)
    close(given["short"], (*short, full))
    assert ("long" in given) == full
    if full:
        close(given["long"][:2], (before_last[1], before_last[0]))


@each_encoder
@torch.no_grad()
def test_the_pictures_show_test_images_their_reconstructions_and_samples(
    module, options, monkeypatch
):
    _, data, config, settled = toy(module, **options)
    nets = copy.deepcopy(settled).train(hasattr(module, "settle"))  # evaluate comes before draw
    images, pictures = [], {}
    monkeypatch.setattr(shared, "grid", lambda shown, *_: images.append(shown))
    monkeypatch.setattr(shared, "pairs", lambda *shown: shown)
    run = SimpleNamespace(epoch=3, nets=nets, picture=pictures.__setitem__)
    module.draw(run, data, config)

    assert nets.training == hasattr(module, "settle")
    x, x_rec, title = pictures["reconstructions"]
    codes = encode(module, settled, data.x_test[:50], config)
    close = torch.testing.assert_close
    close(x.flatten(1), data.x_test[:50])
    close(x_rec.flatten(1), decode(settled, codes, config))
    close(images[0].flatten(1), sample(module, settled, 100, data, config))
    close(images[1].flatten(1)[[0, 9]], decode(settled, codes[[0, 8]], config))
    assert "epoch 3" in title and {"samples", "interpolations"} <= pictures.keys()


@torch.no_grad()
def test_the_gan_is_evaluated_and_drawn_with_running_statistics(given, monkeypatch):
    nets, data, config, settled = toy(gan)
    z = torch.randn(10_000, 5, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(gan, "digit_shares", lambda images: torch.full((10,), 0.1))
    random = torch.get_rng_state()
    gan.evaluate(nets, data, config)
    torch.testing.assert_close(given["x_fake"][:100], settled["G"](z[:100]))
    assert given["x_rec"] is None and nets.training and len(given["x_fake"]) == 10_000

    images = []
    monkeypatch.setattr(shared, "grid", lambda shown, *_: images.append(shown))
    run = {"epoch": 3, "nets": nets, "facts": {"setting": ""}, "picture": lambda *_: None}
    gan.draw(SimpleNamespace(**run), data, config)
    z = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(images[0].flatten(1), settled["G"](z))
    assert torch.get_rng_state().equal(random) and nets.training
    assert all(layer.num_batches_tracked == 0 for layer in norms(nets))


def test_mode_coverage_counts_digits(monkeypatch):
    """Samples that are copies of a 4: all of them in its class, KL = −log of its share in data."""
    config = gan.Config(smoke=True)
    data = shared.load_data(config, torch.device("cpu"))
    four = data.x_test[data.y_test == 4][0]

    class Copies(nn.Module):
        def forward(self, z):
            return four.expand(len(z), -1)

    monkeypatch.setattr(gan, "fixed_z", lambda *_: torch.zeros(300, 1))
    row = gan.evaluate(nn.ModuleDict({"G": Copies()}), data, config)
    share = (data.y_test == 4).double().mean()
    assert row["eval/digit_4"] == 100 and row["eval/digit_3"] == row["eval/digit_min"] == 0
    assert row["eval/digit_kl"] == pytest.approx(-torch.log(share).item(), abs=0.1)
    assert row["eval/fid"] > 100
    assert gan.evaluate(nn.ModuleDict(), data._replace(name="cifar10"), config) == {}


@pytest.mark.parametrize("module", (bigan, lr))
def test_settled_statistics_are_means_over_a_thousand_batches(module):
    torch.manual_seed(0)
    config = module.Config(latent_dim=5, batch_size=2)
    nets, x = module.build(config, 20), torch.rand(64, 20)
    random = torch.get_rng_state()
    module.settle(nets, x, config)
    assert torch.get_rng_state().equal(random)
    hidden = nets["E"][:3](x).detach()
    layer = nets["E"][3]
    torch.testing.assert_close(layer.running_mean, hidden.mean(0), atol=0.02, rtol=0.1)
    assert (layer.running_var / hidden.var(0) - 1).abs().mean() < 0.1
    first = nets["G"].first[0].weight.detach()
    layer = nets["G"].first[1]  # of z ~ U[−1, 1]: mean 0, variance 1/3
    assert layer.running_mean.abs().mean() < 0.1 * first.std() and layer.num_batches_tracked == 1000
    assert (layer.running_var / (first.square().sum(1) / 3) - 1).abs().mean() < 0.1


# What main trains


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """Runs main on toy images, four batches of 64 an epoch; notes each training step's arguments,
    what is averaged with which decay, and the nets that are evaluated."""
    data = toy_data(260, 20, size=64)

    def run(module, *options):
        notes = SimpleNamespace(lrs=[], decays=[], evaluated=None, averaged=None)

        def train_step(nets, *rest):
            *notes.optimizers, x, _ = rest
            notes.nets = nets
            notes.lrs.append([optimizer.param_groups[0]["lr"] for optimizer in notes.optimizers])
            assert (x[:, None] == data.x_train).all(2).any(1).all()
            return {"L": torch.zeros(())}

        def update_ema(averaged, nets, decay):
            notes.averaged = averaged
            notes.decays.append(decay)

        def evaluate(nets, *_, **__):
            notes.evaluated = nets
            return {}

        monkeypatch.setattr(shared, "load_data", lambda *_: data)
        monkeypatch.setattr(shared.Run, "save", lambda *_: None)
        monkeypatch.setattr(shared.Run, "picture", lambda *_: None)
        monkeypatch.setattr(module, "train_step", train_step)
        monkeypatch.setattr(module, "evaluate", evaluate)
        monkeypatch.setattr(module, "draw", lambda *_: None)
        if hasattr(module, "update_ema"):
            monkeypatch.setattr(module, "update_ema", update_ema)
        train(monkeypatch, module, "--out-dir", tmp_path, "--device", "cpu", *options)
        return notes

    return run


def holds(optimizer, *nets):
    (group,) = optimizer.param_groups
    expected = nn.ModuleList(nets).parameters()
    return [id(p) for p in group["params"]] == [id(p) for p in expected]


@pytest.mark.parametrize("module", (bigan, lr))
def test_learning_rates_are_constant_and_then_decay_to_one_percent(module, steps, monkeypatch):
    config = module.Config()
    rates = [module.learning_rate(config, epoch) for epoch in (1, 200, 300, 400)]
    assert rates == pytest.approx([2e-4, 2e-4, 2e-5, 2e-6])

    monkeypatch.setattr(module, "learning_rate", lambda config, epoch: config.lr / epoch)
    notes = steps(module, "--epochs", 3, "--batch-size", 64)
    assert len(notes.lrs) == 12
    for i, rates in enumerate(notes.lrs):
        assert all(rate == 2e-4 / (i // 4 + 1) for rate in rates)
    G, E, D = (notes.nets[name] for name in "GED")
    groups = [(D,), (E, G)] if module is bigan else [(D,), (G,), (E,)]
    for optimizer, nets in zip(notes.optimizers, groups, strict=True):
        group = optimizer.param_groups[0]
        assert holds(optimizer, *nets)
        assert group["betas"] == (0.5, 0.999) and group["weight_decay"] == 2.5e-5
    assert notes.evaluated is notes.nets


@pytest.mark.parametrize("weights", ("ema", "raw"))
def test_alae_averages_with_its_half_life_and_evaluates_what_is_asked(weights, steps):
    notes = steps(alae, "--epochs", 1, "--ema", 128, "--eval-weights", weights)
    assert notes.decays == [0.5**0.5] * 4
    F, G, E, D = (notes.nets[name] for name in "FGED")
    for optimizer, nets in zip(notes.optimizers, ((E, D), (F, G), (E, G)), strict=True):
        assert holds(optimizer, *nets) and optimizer.param_groups[0]["betas"] == (0.0, 0.99)
    assert notes.evaluated is (notes.averaged if weights == "ema" else notes.nets)
    assert notes.averaged is not notes.nets and notes.lrs == [[0.004] * 3] * 4


@pytest.mark.parametrize("weights", ("ema", "raw"))
def test_the_gan_averages_with_its_half_life_of_images(weights, steps):
    options = ["--epochs", 1, "--ema", 128, "--eval-weights", weights]
    notes = steps(gan, *options, "--batch-size", 64)
    assert notes.decays == [0.5**0.5] * 4
    for optimizer, name in zip(notes.optimizers, "DG", strict=True):
        assert holds(optimizer, notes.nets[name])
        assert optimizer.param_groups[0]["betas"] == (0.0, 0.999)
    assert notes.evaluated["G"] is (notes.averaged if weights == "ema" else notes.nets["G"])
    assert notes.evaluated["D"] is notes.nets["D"] and notes.averaged is not notes.nets["G"]


def test_one_adam_moves_the_autoencoder(steps):
    notes = steps(ae, "--epochs", 1, "--batch-size", 64)
    assert holds(notes.optimizers[0], notes.nets) and notes.lrs == [[0.001]] * 4
    assert notes.evaluated is notes.nets


def test_averages_of_weights_and_of_batch_statistics():
    G = gan.build(gan.Config(latent_dim=5), 16)["G"]
    averaged = copy.deepcopy(G).requires_grad_(False)
    for net, value in ((averaged, 0.0), (G, 1.0)):
        for tensor in net.state_dict().values():
            tensor.fill_(value)
    gan.update_ema(averaged, G, 0.75)
    for name, tensor in averaged.state_dict().items():
        assert (tensor == (0 if "tracked" in name else 0.25)).all(), name

    nets = alae.build(alae.Config(latent_dim=5), 20)
    averaged = copy.deepcopy(nets).requires_grad_(False)
    for p in nets.parameters():
        p.data.fill_(1.0)
    for p in averaged.parameters():
        p.fill_(0.0)
    alae.update_ema(averaged, nets, 0.75)
    assert all((p == 0.25).all() for p in averaged.parameters())


# BiGAN


def test_swapping_the_pairs_flips_the_discriminators_loss():
    real, fake = torch.randn(2, 8, 1, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(bigan.L_EG(real, fake), bigan.L_D(fake, real))
    # softplus(−l) − softplus(l) = −l
    difference = bigan.L_D(real, fake) - bigan.L_D(fake, real)
    torch.testing.assert_close(difference, (fake - real).mean())
    logits, labels = torch.cat([real, fake]), torch.ones(16, 1).double()
    labels[8:] = 0
    bce = binary_cross_entropy_with_logits
    torch.testing.assert_close(bigan.L_D(real, fake), 2 * bce(logits, labels))
    torch.testing.assert_close(bigan.L_EG(real, fake), 2 * bce(logits, 1 - labels))


@pytest.mark.parametrize("scale", (1.0, 0.5))
def test_bigan_moves_all_three_from_the_same_losses(scale):
    torch.manual_seed(0)
    config = bigan.Config(latent_dim=5, loss_scale=scale)
    nets, x = bigan.build(config, 20), torch.rand(8, 20)
    assert not nets["D"].last[-1].weight.any()
    nn.init.normal_(nets["D"].last[-1].weight, std=0.02)
    opt_D, opt_EG = adam(nets["D"]), adam(nets["E"], nets["G"])
    notes = watch(nets, opt_D=opt_D, opt_EG=opt_EG)
    bigan.train_step(nets, opt_D, opt_EG, x, config)
    assert notes == [("opt_D", {"D"}), ("opt_EG", {"E", "G"})]

    leave_gradients(nets)
    random = torch.get_rng_state()
    opts = frozen(nets["D"]), frozen(nets["E"], nets["G"])
    losses = bigan.train_step(nets, *opts, x, config)
    torch.set_rng_state(random)
    z = torch.rand(8, 5) * 2 - 1
    real, fake = nets["D"](x, 2 * nets["E"](x).sigmoid() - 1), nets["D"](nets["G"](z), z)
    expected = {"L_D": bigan.L_D(real, fake), "L_EG": bigan.L_D(fake, real)}
    torch.testing.assert_close(losses, {name: loss.detach() for name, loss in expected.items()})
    for name, loss in (("D", "L_D"), ("E", "L_EG"), ("G", "L_EG")):
        assert_gradients(nets[name], scale * expected[loss])


# Latent regressors


@pytest.mark.parametrize("joint", (False, True))
def test_what_reaches_the_generator_from_the_encoder(joint):
    torch.manual_seed(0)
    config = lr.Config(epochs=0, latent_dim=5, joint=joint)
    nets, x = lr.build(config, 20), torch.rand(8, 20)  # D's last layer is 0: nothing from there
    leave_gradients(nets)
    random = torch.get_rng_state()
    losses = lr.train_step(nets, *(frozen(nets[name]) for name in "DGE"), x, config)
    torch.set_rng_state(random)
    z = torch.rand(8, 5) * 2 - 1
    err = binary_cross_entropy(nets["E"](nets["G"](z)).sigmoid(), (z + 1) / 2)
    torch.testing.assert_close(losses["L_err_E"], err.detach())
    assert_gradients(nets["E"], err)
    assert_gradients(nets["G"], (0.25 if joint else 0.0) * err)

    opts = {f"opt_{name}": adam(nets[name]) for name in "DGE"}
    notes = watch(nets, **opts)
    lr.train_step(nets, *opts.values(), x, config)
    assert notes == [("opt_D", {"D"}), ("opt_G", {"G"} if joint else set()), ("opt_E", {"E"})]


def test_the_latent_regressors_gan_is_non_saturating():
    torch.manual_seed(0)
    config = lr.Config(latent_dim=5)  # E's last layer is 0: nothing from there
    nets, x = lr.build(config, 20), torch.rand(8, 20)
    nn.init.normal_(nets["D"][-1].weight, std=0.02)
    leave_gradients(nets)
    random = torch.get_rng_state()
    losses = lr.train_step(nets, *(frozen(nets[name]) for name in "DGE"), x, config)
    torch.set_rng_state(random)
    real, fake = nets["D"](x), nets["D"](nets["G"](torch.rand(8, 5) * 2 - 1))
    expected = {"L_adv_D": (softplus(-real) + softplus(fake)).mean()}
    expected["L_adv_G"] = softplus(-fake).mean()
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss.detach())
        assert_gradients(nets[name[-1]], loss)


# GANs


def test_wgan_gp_looks_anywhere_between_an_image_and_a_sample(monkeypatch):
    given = []

    def gradient_penalty(*args):
        given.append(args)
        return torch.ones(())

    monkeypatch.setattr(gan, "gradient_penalty", gradient_penalty)
    x, x_fake = torch.rand(4000, 3), torch.rand(4000, 3)
    gan.L_D(nn.Linear(3, 1), x, x_fake, gan.Config(loss="wgan-gp"))
    _, real, fake, epsilon = given[0]
    assert real.equal(x) and fake.equal(x_fake) and epsilon.shape == (4000, 1)
    assert epsilon.min() < 0.01 and epsilon.max() > 0.99 and abs(epsilon.mean() - 0.5) < 0.03


def test_gradient_penalties_of_known_critics():
    a, x, x_fake = torch.randn(20, 1), torch.randn(9, 20), torch.randn(9, 20)

    def linear(x):
        return x @ a

    def quadratic(x):  # its gradient is x
        return x.square().sum(1) / 2

    penalty = gan.gradient_penalty(linear, x, x_fake, torch.rand(9, 1))
    torch.testing.assert_close(penalty, (a.norm() - 1) ** 2)
    penalty = gan.gradient_penalty(quadratic, x, x_fake, torch.full((9, 1), 0.25))
    expected = ((0.25 * x + 0.75 * x_fake).norm(dim=1) - 1).square().mean()
    torch.testing.assert_close(penalty, expected)
    x.requires_grad_()
    torch.testing.assert_close(gan.r1_penalty(linear(x), x), a.square().sum())


@pytest.mark.parametrize("loss", LOSSES)
def test_gan_losses(loss):
    def D(x):
        return x

    one, config = torch.ones(6, 1), gan.Config(loss=loss)
    loss_D, penalty = gan.L_D(D, 3 * one, 2 * one, config)
    usual = softplus(torch.tensor(-3.0)) + softplus(torch.tensor(2.0))
    torch.testing.assert_close(loss_D, torch.tensor(-1.0) if loss == "wgan-gp" else usual)
    assert penalty == (5 if loss == "r1" else 0)  # γ/2; (1 − 1)²
    penalty = gan.L_D(lambda x: 3 * x, 3 * one, 2 * one, config)[1]
    assert penalty == {"r1": 45, "wgan-gp": 40}.get(loss, 0)  # γ/2 3²; λ (3 − 1)²
    expected = {"minimax": -2.1269, "wgan-gp": -2.0}.get(loss, 0.1269)
    assert gan.L_G(2 * one, loss).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_a_gan_step_moves(loss):
    torch.manual_seed(0)
    critic_steps = 5 if loss == "wgan-gp" else 1
    images = 4 * critic_steps
    config = gan.Config(loss=loss, batch_size=images, critic_steps=critic_steps, latent_dim=5)
    nets = gan.build(config, 16)
    opt_D, opt_G = adam(nets["D"]), adam(nets["G"])
    notes = watch(nets, opt_D=opt_D, opt_G=opt_G)
    seen = []
    hook = nets["D"].register_forward_hook(lambda net, args, out: seen.append(args[0]))
    x = torch.rand(images, 16)
    losses = gan.train_step(nets, opt_D, opt_G, x, config)
    hook.remove()
    *steps_of_D, step_of_G = notes
    assert len(steps_of_D) == critic_steps and step_of_G == ("opt_G", {"G"})
    assert all(note == ("opt_D", {"D"}) for note in steps_of_D)
    assert all(any(batch.equal(part) for batch in seen) for part in x.split(4))
    assert {len(batch) for batch in seen} == {4}
    gradient = torch.cat([p.grad.flatten() for p in nets["G"].parameters()])
    torch.testing.assert_close(losses["grad_norm_G"], gradient.norm())
    assert ("penalty" in losses) == (loss in ("r1", "wgan-gp"))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradients_of_a_gan_step_are_those_of_its_losses(loss):
    torch.manual_seed(0)
    config = gan.Config(loss=loss, norm="none", critic_steps=1, batch_size=4, latent_dim=5)
    nets, x = gan.build(config, 16), torch.rand(4, 16)
    G, D = nets["G"], nets["D"]
    leave_gradients(nets)
    random = torch.get_rng_state()
    losses = gan.train_step(nets, frozen(D), frozen(G), x, config)
    torch.set_rng_state(random)
    loss_D, penalty = gan.L_D(D, x, G(torch.randn(4, 5)).detach(), config)
    loss_G = gan.L_G(D(G(torch.randn(4, 5))), loss)
    assert_gradients(D, loss_D + penalty)
    assert_gradients(G, loss_G)
    torch.testing.assert_close(losses["L_D"], loss_D.detach())
    torch.testing.assert_close(losses["L_G"], loss_G.detach())


def test_spectral_norm():
    torch.manual_seed(0)
    D = gan.build(gan.Config(latent_dim=5), 64)["D"]
    for _ in range(60):  # power iterations
        D(torch.rand(2, 64))
    for layer in D[::2]:
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=0.03)


def test_presets_are_losses_with_what_they_need():
    def parsed(*words):
        return shared.parse_config(gan.Config, gan.PRESETS, list(words))

    default = parsed()
    r1 = parsed("--preset", "r1", "--lr", "0.5")
    wgan = parsed("--preset=wgan-gp")
    assert (default.loss, default.norm, default.lr) == ("non-saturating", "spectral", 0.002)
    assert (r1.loss, r1.norm, r1.lr) == ("r1", "none", 0.5)
    assert (wgan.loss, wgan.norm, wgan.lr) == ("wgan-gp", "none", 1e-4)
    assert (wgan.batch_size, wgan.critic_steps) == (640, 5)  # 128 for each


# Autoencoders


def test_KL_is_torchs():
    torch.manual_seed(0)
    mu, log_var = torch.randn(2, 7, 5)
    q, p = Normal(mu, (log_var / 2).exp()), Normal(torch.zeros(5), torch.ones(5))
    torch.testing.assert_close(ae.KL(mu, log_var), kl_divergence(q, p).sum(1))


def test_reconstruction_losses():
    out, x = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    assert ae.L_rec(out, x, "l1") == 1.5 and ae.L_rec(out, x, "l2") == 2.5
    bce = binary_cross_entropy(out.sigmoid(), x)
    torch.testing.assert_close(ae.L_rec(out, x, "bce"), bce)
    torch.testing.assert_close(ae.L_rec(out, x, "vae"), 2 * bce)  # a sum, as KL is


@pytest.mark.parametrize("noise", (0.0, 0.5))
@pytest.mark.parametrize("loss", ("l1", "l2", "bce", "vae"))
def test_an_autoencoder_moves_both_and_measures_against_the_clean_image(loss, noise):
    torch.manual_seed(0)
    config = ae.Config(loss=loss, noise=noise, latent_dim=5)
    nets, x = ae.build(config, 20), torch.rand(8, 20)
    optimizer, notes, seen = adam(nets), [], []
    nets["E"].register_forward_hook(lambda net, args, out: seen.append(args[0]))
    nets["G"].register_forward_hook(lambda net, args, out: seen.append(out))
    notes = watch(nets, optimizer=optimizer)
    losses = ae.train_step(nets, optimizer, x, config)
    assert notes == [("optimizer", {"E", "G"})]
    assert (seen[0] - x).std().item() == pytest.approx(noise, abs=0.2 * noise)
    torch.testing.assert_close(losses["L_rec"], ae.L_rec(seen[1], x, loss).detach())
    assert losses.keys() == ({"L_rec", "KL"} if loss == "vae" else {"L_rec"})


def test_the_vae_draws_codes_of_the_encoders_standard_deviation_and_minimises_the_sum():
    torch.manual_seed(0)
    config = ae.Config(loss="vae", latent_dim=5)
    nets, codes = ae.build(config, 20), []
    last = nets["E"][-1]
    nn.init.zeros_(last.weight)
    last.bias.data.copy_(2 * torch.tensor([3.0, 4.0]).log().repeat_interleave(5))
    nets["G"].register_forward_hook(lambda net, args, out: codes.append(args[0].detach()))
    nn.init.zeros_(nets["G"][-1].weight)  # nothing from there: KL alone moves E
    leave_gradients(nets)
    losses = ae.train_step(nets, adam(nets), torch.rand(4000, 20), config)  # μ = 2 log 3, s = 4
    assert codes[0].mean().item() == pytest.approx(2.197, abs=0.1)
    assert codes[0].std().item() == pytest.approx(4, rel=0.03)
    assert losses["KL"].item() == pytest.approx(5 / 2 * (2.1972**2 + 16 - 1 - 2.7726), rel=1e-4)
    assert last.bias.grad.tolist() == pytest.approx([2.1972] * 5 + [7.5] * 5, rel=1e-3)


def test_samples_of_an_autoencoder_have_the_codes_moments():
    torch.manual_seed(0)
    codes = torch.randn(500, 5) @ torch.randn(5, 5) + 1
    for loss in ("l2", "vae"):
        mean, covariance = torch.zeros(5), torch.eye(5)
        if loss == "l2":
            mean, covariance = codes.mean(0), codes.T.cov()
        drawn = ae.fitted_z(20_000, codes, ae.Config(latent_dim=5, loss=loss))
        torch.testing.assert_close(drawn.mean(0), mean, atol=0.05, rtol=0)
        torch.testing.assert_close(drawn.T.cov(), covariance, atol=0.05, rtol=0.05)


# ALAE from the paper


def test_what_each_step_of_alae_moves():
    torch.manual_seed(0)
    config = alae.Config(latent_dim=5)
    nets = alae.build(config, 20)
    opt_ED, opt_FG = adam(nets["E"], nets["D"]), adam(nets["F"], nets["G"])
    opts = {"opt_ED": opt_ED, "opt_FG": opt_FG, "opt_EG": adam(nets["E"], nets["G"])}
    notes, inputs, x = watch(nets, **opts), [], torch.rand(8, 20)
    nets["F"].register_forward_hook(lambda net, args, out: inputs.append(args[0]))
    alae.train_step(nets, *opts.values(), x, config)
    assert notes == [("opt_ED", {"E", "D"}), ("opt_FG", {"F", "G"}), ("opt_EG", {"E", "G"})]
    assert len({z.sum().item() for z in inputs}) == 3 and not x.requires_grad  # z is fresh


def test_the_gradients_of_alaes_steps_are_those_of_their_losses():
    torch.manual_seed(0)
    config = alae.Config(latent_dim=5)
    nets, x = alae.build(config, 20), torch.rand(8, 20)
    F, G, E, D = (nets[name] for name in "FGED")
    leave_gradients(nets)
    random = torch.get_rng_state()
    losses = alae.train_step(nets, frozen(E, D), frozen(F, G), frozen(E, G), x, config)
    torch.set_rng_state(random)
    z = torch.randn(3, 8, 5)
    loss_ED, r1 = alae.L_adv_ED(D, E, x, G(F(z[0])).detach(), config.gamma)
    loss_FG = alae.L_adv_FG(D, E, G(F(z[1])))
    loss_err = alae.L_err_EG(E, G, F(z[2]).detach())
    for net, loss in ((D, loss_ED), (F, loss_FG), (E, loss_err), (G, loss_err)):
        assert_gradients(net, loss)
    expected = {"L_adv_ED": loss_ED, "L_adv_FG": loss_FG, "L_err_EG": loss_err, "r1": r1}
    torch.testing.assert_close(losses, {name: loss.detach() for name, loss in expected.items()})


def test_the_critic_is_not_affine():
    torch.manual_seed(0)
    D = alae.build(alae.Config(latent_dim=5), 20)["D"]
    a, b = torch.randn(2, 5)
    assert (D(a) + D(b) - D(a + b) - D(0 * a)).abs() > 1e-2


def test_pixel_norm():
    z = 3 * torch.randn(7, 50)
    normed = alae.build(alae.Config(), 20)["F"][0](z)
    torch.testing.assert_close(normed, z / z.square().mean(1, keepdim=True).sqrt())


def test_runtime_equalized_layer():
    torch.manual_seed(0)
    layer, x = alae.Linear(200, 300, lrmul=0.1).double(), torch.randn(50, 200).double()
    assert layer.weight.std().item() == pytest.approx(10, rel=0.02)  # N(0, 1)/lrmul
    nn.init.normal_(layer.bias)
    W = layer.weight * 0.1 * (2 / 200) ** 0.5
    torch.testing.assert_close(layer(x), x @ W.T + 0.1 * layer.bias)


def test_alae_losses():
    D, E, zeros = nn.Linear(3, 1), nn.Identity(), torch.zeros(4, 3)
    nn.init.constant_(D.weight, 1.0)
    nn.init.constant_(D.bias, 2.0)  # 2 on zeros, 5 on ones
    loss, r1 = alae.L_adv_ED(D, E, x=zeros + 1, x_fake=zeros, gamma=10.0)
    torch.testing.assert_close(r1, torch.tensor(15.0))  # γ/2 ‖(1, 1, 1)‖²
    expected = softplus(torch.tensor(2.0)) + softplus(torch.tensor(-5.0)) + r1
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(alae.L_adv_FG(D, E, zeros), softplus(torch.tensor(-2.0)))
    err = alae.L_err_EG(lambda x: 3 * x, lambda w: w, torch.ones(4, 3))
    torch.testing.assert_close(err, torch.tensor(4.0))
