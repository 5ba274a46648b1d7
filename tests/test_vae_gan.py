"""VAE-GAN: the public nets layer by layer, initial weights, each net's gradient, evaluation."""

import shared

import benchmark
import pytest
import torch
import vae_gan
from conftest import assert_same, check_an_eighth, fake_run, record, see, state_of, toy_data, train
from torch import nn
from torch.autograd import grad
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, one_hot

# Of rishabhd786's README; Dis ends in a sigmoid there, which ours leaves to the loss
TABLES = {
    "Enc": [(64, 32, 32)] * 3 + [(128, 16, 16)] * 3 + [(256, 8, 8)] * 3 + [(2048,)] * 3,
    "Dis": [(32, 64, 64)] * 2 + [(128, 32, 32)] * 3 + [(256, 16, 16)] * 3 + [(256, 8, 8)] * 3,
    "Dec": [(16384,)] * 3 + [(256, 16, 16)] * 3 + [(128, 32, 32)] * 3 + [(32, 64, 64)] * 3,
}
LAST = {"Enc": [(128,)] * 2, "Dis": [(512,)] * 3 + [(1,)], "Dec": [(1, 64, 64)] * 2}


def configure(**changes):
    """Settings with nets and images small enough for a test."""
    return vae_gan.Config(**{"width": 1 / 32, "image_size": 32, "latent_dim": 3} | changes)


def full_size(C):
    config = configure(width=1.0, image_size=64, latent_dim=128)
    with torch.device("meta"):
        return vae_gan.build(config, C)


def sgd(nets, lr=1.0):
    return {name: torch.optim.SGD(net.parameters(), lr) for name, net in nets.items()}


def shapes(net, x):
    """Output shapes, without the batch, of the layers in the order of their calls."""
    found = []
    for layer in net.modules():
        if not list(layer.children()) and not isinstance(layer, (nn.Flatten, nn.Unflatten)):
            layer.register_forward_hook(lambda _, __, out: found.append(tuple(out.shape[1:])))
    net(x)
    return found[:]  # the nets share an activation, so that the next one calls these hooks too


# Nets


def test_layers_are_rishabhd786s():
    nets = full_size(1)
    x, z = torch.empty(64, 1, 64, 64, device="meta"), torch.empty(64, 128, device="meta")
    for name, net in nets.items():
        assert shapes(net, z if name == "Dec" else x) == TABLES[name] + LAST[name]
    assert nets["Dis"][0](x).shape == (64, 256, 8, 8)  # Dis_l is the fourth block


@pytest.mark.parametrize("C, more", [(1, (0, 0, 0)), (3, (3200, 1602, 1600))])
def test_sizes(C, more):
    nets = full_size(C)
    public = 35_112_064, 5_834_753, 10_953_409
    sizes = [sum(p.numel() for p in net.parameters()) for net in nets.values()]
    assert sizes == [size + extra for size, extra in zip(public, more, strict=True)]
    assert isinstance(nets["Dis"][0][-1], nn.LeakyReLU)  # features after batch norm


@pytest.mark.parametrize("size", (32, 64))
def test_width_and_image_size(size):
    nets = vae_gan.build(configure(width=0.125, image_size=size), 3)
    check_an_eighth(nets, size)


def test_initial_weights(monkeypatch):
    """Convolutions and batch norm of Enc and Dec are rishabhd786's; all else is PyTorch's."""
    torch.manual_seed(0)
    ours = vae_gan.build(configure(width=0.25), 1)
    torch.manual_seed(0)
    monkeypatch.setattr(vae_gan, "start_normal", lambda _: None)
    usual = vae_gan.build(configure(width=0.25), 1)
    for name in ("Enc", "Dec"):
        for layer, other in zip(ours[name].modules(), usual[name].modules(), strict=True):
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                n = layer.weight.numel()
                assert abs(layer.weight.mean()) < 4 * 0.02 / n**0.5
                assert layer.weight.std().item() == pytest.approx(0.02, rel=4 / n**0.5)
                assert layer.bias.equal(other.bias)
            elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                n = layer.weight.numel()
                assert layer.weight.mean().item() == pytest.approx(1, abs=4 * 0.02 / n**0.5)
                assert layer.weight.std().item() == pytest.approx(0.02, rel=4 / n**0.5)
                assert not layer.bias.any() and other.weight.eq(1).all()
            elif isinstance(layer, nn.Linear):
                assert layer.weight.equal(other.weight)
    for layer in ours["Dis"].modules():
        if isinstance(layer, nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5  # of a uniform distribution
            assert 0.9 * bound < layer.weight.abs().max() <= bound
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert layer.weight.eq(1).all()


def there_and_back(images, config):
    """images (B, C, H, W) as the nets see them, and these as pixels again."""
    x = images.flatten(1)
    data = shared.Data("", x, None, x, None, images.shape[1:])
    large = vae_gan.to_x(x, data, config)
    assert large.shape == (2, 3, config.image_size, config.image_size)
    return large, vae_gan.decode(nn.Identity(), large, data, config)


@pytest.mark.parametrize("size", (32, 64))
def test_images_are_enlarged_and_reduced(size):
    config = configure(image_size=size)
    images = torch.linspace(0, 1, 28).expand(2, 3, 28, 28)
    large, again = there_and_back(images, config)
    assert large.min() == -1 and large.max() == 1
    torch.testing.assert_close(again, images.flatten(1), atol=0.02, rtol=0)
    native = torch.rand(2, 3, size, size)
    large, again = there_and_back(native, config)
    torch.testing.assert_close(large, 2 * native - 1)
    torch.testing.assert_close(again, native.flatten(1))


def test_with_pad_images_get_a_black_border_and_lose_it_again():
    images = torch.rand(2, 3, 28, 28)
    large, again = there_and_back(images, configure(image_size=32, pad=True))
    bordered = torch.full((2, 3, 32, 32), -1.0)
    bordered[:, :, 2:-2, 2:-2] = 2 * images - 1
    torch.testing.assert_close(large, bordered)
    torch.testing.assert_close(again, images.flatten(1))


# Losses


def test_losses():
    mu, log_var = torch.randn(2, 7, 5)
    standard = Normal(torch.zeros(5), torch.ones(5))
    expected = kl_divergence(Normal(mu, (log_var / 2).exp()), standard)
    torch.testing.assert_close(vae_gan.kl(mu, log_var), expected)
    mean = (log_var - mu).square().mean()
    torch.testing.assert_close(vae_gan.L_llike(log_var, mu), mean)
    logits, expected = torch.randn(3, 7, 1), 0
    for part, real in zip(logits, (1.0, 0.0, 0.0), strict=True):
        expected += binary_cross_entropy_with_logits(part, torch.full_like(part, real))
    torch.testing.assert_close(vae_gan.L_GAN(logits), expected)


def written(nets, x, noise):
    """The three losses as they are written, with sigmoids, x̃ and x_p part of one graph."""
    mu, log_var = nets["Enc"](x)
    s = (log_var / 2).exp()
    x_rec, x_p = nets["Dec"](mu + s * noise[0]), nets["Dec"](noise[1])
    f = [nets["Dis"][0](part) for part in (x, x_rec, x_p)]
    D = [nets["Dis"][1](part).sigmoid() for part in f]
    kl = kl_divergence(Normal(mu, s), Normal(torch.zeros_like(mu), torch.ones_like(mu)))
    gan = -(D[0].log() + (1 - D[1]).log() + (1 - D[2]).log()).mean()
    return kl.mean(), (f[0] - f[1]).square().mean(), gan


def test_each_net_gets_the_gradient_of_its_loss_alone():
    torch.manual_seed(0)
    config = configure()
    nets = vae_gan.build(config, 1).double()
    x = torch.rand(6, 1, 32, 32).double() * 2 - 1
    before = {name: value.clone() for name, value in nets.state_dict().items()}
    torch.manual_seed(1)
    losses = vae_gan.train_step(nets, sgd(nets), x, config)  # a step is the gradient
    steps = {name: before[name] - p for name, p in nets.named_parameters()}
    counts = {name: v.clone() for name, v in nets.named_buffers() if "tracked" in name}
    nets.load_state_dict(before)
    torch.manual_seed(1)
    noise = [torch.randn(6, 3, dtype=torch.double) for _ in range(2)]
    prior, llike, gan = written(nets, x, noise)
    assert list(losses) == ["L_prior", "L_llike", "L_GAN"]
    torch.testing.assert_close(list(losses.values()), [prior, llike, gan])
    wanted = {"Enc": prior + 5 * llike, "Dec": 15 * llike - gan, "Dis": gan}
    scale = max(float(loss.abs()) for loss in losses.values())
    for name, loss in wanted.items():
        gradients = grad(loss, [*nets[name].parameters()], retain_graph=True)
        for (key, _), gradient in zip(nets[name].named_parameters(), gradients, strict=True):
            step = steps[f"{name}.{key}"]
            torch.testing.assert_close(step, gradient, rtol=1e-6, atol=1e-9 * scale)
        assert max(g.abs().max() for g in gradients) > 1e-3
    assert_same(counts, {name: v for name, v in nets.named_buffers() if "tracked" in name})


def test_the_public_order_gives_the_same_gradients_while_the_nets_hardly_move(monkeypatch):
    torch.manual_seed(0)
    config, lr = configure(), 1e-10
    nets = vae_gan.build(config, 1).double()
    before = {name: value.clone() for name, value in nets.state_dict().items()}
    x = torch.rand(6, 1, 32, 32).double() * 2 - 1
    noise, z_p = torch.randn(2, 6, 3, dtype=torch.double)
    found = []
    for step in (vae_gan.train_step, benchmark.vae_gan_public_step):
        nets.load_state_dict(before)
        draws = iter((noise, z_p, noise))  # the public code draws twice for x̃
        monkeypatch.setattr(torch, "randn_like", lambda _, draws=draws: next(draws))
        step(nets, sgd(nets, lr), x, config)
        found.append({name: (before[name] - p) / lr for name, p in nets.named_parameters()})
    ours, public = found
    for name, gradient in ours.items():
        torch.testing.assert_close(public[name], gradient, rtol=1e-3, atol=1e-4)
    assert max(gradient.abs().max() for gradient in ours.values()) > 0.1


def test_a_vae_is_gaussian_in_the_pixels(monkeypatch):
    torch.manual_seed(0)
    config = configure(method="vae")
    nets = vae_gan.build(config, 1).double()
    assert [*nets] == ["Enc", "Dec"]
    x, noise = torch.rand(4, 1, 32, 32).double(), torch.randn(4, 3).double()
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    mu, log_var = nets["Enc"](x)
    x_rec = nets["Dec"](mu + (log_var / 2).exp() * noise)
    prior = 0.5 * (mu**2 + log_var.exp() - 1 - log_var).sum() / 4
    llike = 0.5 * ((x - x_rec) ** 2).sum() / 4
    gradients = grad(prior + llike, [*nets.parameters()])
    before = [p.detach().clone() for p in nets.parameters()]
    losses = vae_gan.vae_step(nets, sgd(nets), x, config)
    torch.testing.assert_close(losses, {"L_prior": prior.detach(), "L_llike": llike.detach()})
    for p, old, gradient in zip(nets.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(old - p.detach(), gradient, rtol=1e-6, atol=1e-6)


# Training


def test_main_gives_the_rates_stops_at_max_steps_and_shrinks_a_smoke_run(
    monkeypatch, tmp_path, cheap
):
    rates, sizes = [], []

    def train_step(nets, opts, x, config):
        rates.append({name: opt.param_groups[0]["lr"] for name, opt in opts.items()})
        assert all(opt.defaults["alpha"] == 0.99 for opt in opts.values())
        sizes.append((tuple(x.shape), x.min().item(), config.width))
        return {"L_prior": torch.zeros(())}

    monkeypatch.setattr(vae_gan, "train_step", train_step)
    monkeypatch.setattr(vae_gan, "evaluate", lambda *_, **__: {"eval/recon_mse": 0.0})
    monkeypatch.setattr(vae_gan, "draw", lambda *_: None)
    options = ["--smoke", "--width", 1, "--image-size", 64, "--out-dir", tmp_path]
    train(monkeypatch, vae_gan, *options, "--max-steps", 4)
    assert set(sizes) == {((64, 1, 32, 32), -1.0, 1 / 16)}
    assert rates == [pytest.approx({"Enc": 3e-4, "Dec": 3e-4, "Dis": 3e-5})] * 8


def test_losses_are_kept_by_iteration():
    losses = [{"L_prior": torch.tensor(float(i)), "L_GAN": torch.tensor(0.5)} for i in range(47)]
    rows = vae_gan.means_of_20(losses, 100)
    assert rows == [
        {"iteration": 120, "L_prior": 9.5, "L_GAN": 0.5},
        {"iteration": 140, "L_prior": 29.5, "L_GAN": 0.5},
    ]


# Evaluation


def assert_settled(module, config):
    """Enc has the mean statistics of training images, one Dec those of their μ, one those of z_p:
    of as many batches of 64 as there are among 300 images."""
    torch.manual_seed(0)
    nets, data = module.build(config, 1), toy_data()
    Enc, Dec, Dec_p = module.settled(nets, data, config)
    assert nets.training and not any(net.training for net in (Enc, Dec, Dec_p))
    x = module.to_x(data.x_train[:256], data, config)
    z = torch.randn(256, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for net, given in ((Enc, x), (Dec, Enc(x)[0]), (Dec_p, z)):
            first = (
                net[0](given).unflatten(0, (4, 64)).transpose(1, 2).flatten(2)
            )  # (4, channels, ·)
            torch.testing.assert_close(net[1].running_mean, first.mean(2).mean(0))
            torch.testing.assert_close(net[1].running_var, first.var(2).mean(0))


def test_evaluation_has_statistics_of_batches_of_one_kind():
    assert_settled(vae_gan, configure())


@pytest.fixture
def small():
    """Nets after a step, and toy data."""
    torch.manual_seed(0)
    config, data = configure(epochs=1), toy_data()
    nets = vae_gan.build(config, 1)
    x = vae_gan.to_x(data.x_train[:16], data, config)
    vae_gan.train_step(nets, sgd(nets, 1e-3), x, config)
    return config, data, nets


def test_what_evaluate_measures(small, monkeypatch):
    config, data, nets = small
    before, given = state_of(nets), record(monkeypatch)
    vae_gan.evaluate(nets, data, config, full=True)
    assert_same(before, state_of(nets))

    def enlarged(x):
        return interpolate(data.images(x), (32, 32), mode="bicubic").clamp(0, 1) * 2 - 1

    def pixels(x):
        x = interpolate(x, (28, 28), mode="bicubic", antialias=True).clamp(-1, 1)
        return (x.flatten(1) + 1) / 2

    Enc, Dec, Dec_p = vae_gan.settled(nets, data, config)
    z = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        train, test = enlarged(data.x_train), enlarged(data.x_test)
        (x_rec, x_fake), (none, resized) = given["images"]
        torch.testing.assert_close(x_rec, pixels(Dec(Enc(test)[0])))
        torch.testing.assert_close(x_fake, pixels(Dec_p(z)))
        torch.testing.assert_close(resized, pixels(test))  # the floor
        assert none is None
        torch.testing.assert_close(given["short"][0], Enc(train)[0])
        torch.testing.assert_close(given["short"][1], Enc(test)[0])
        torch.testing.assert_close(given["long"][0], Enc[:-1](train))
        torch.testing.assert_close(given["long"][1], Enc[:-1](test))


def test_the_floor_is_of_mnist_alone(small, monkeypatch):
    config, data, nets = small
    monkeypatch.setattr(shared, "code_metrics", lambda *_, **__: {})
    monkeypatch.setattr(vae_gan, "fixed_z", lambda *_: torch.zeros(100, 3))
    assert "eval/fid_floor" in vae_gan.evaluate(nets, data, config, full=True)
    other = vae_gan.evaluate(nets, data._replace(name="fashion_mnist"), config, full=True)
    assert other.keys() == {"eval/recon_mse"}


def test_pictures_are_of_test_images_and_samples_and_leave_the_nets_alone(small, monkeypatch):
    config, data, nets = small
    before, run, seen = state_of(nets), fake_run(nets, config), see(monkeypatch)
    run.history = {"losses": [{"iteration": i, "L_GAN": 1.0} for i in (20, 40)]}
    vae_gan.draw(run, data, config)
    assert_same(before, state_of(nets))
    assert run.names == ["samples", "reconstructions", "arithmetic", "losses"]
    given = record(monkeypatch)
    vae_gan.evaluate(nets, data, config)
    ((x_rec, x_fake),), ((x, x_shown),) = given["images"], seen["pairs"]
    assert x.equal(data.images(data.x_test[:50]))
    torch.testing.assert_close(x_shown, data.images(x_rec[:50]))
    torch.testing.assert_close(seen["grid"][0][:90], data.images(x_fake[:90]))
    run.names.clear()
    run.history = {}  # of an evaluated model
    vae_gan.draw(run, data._replace(y_train=None), config)
    run.epoch = 0  # not the last
    vae_gan.draw(run, data, config)
    assert run.names == ["samples", "reconstructions"] * 2


def test_latent_arithmetic_moves_from_class_to_class(monkeypatch):
    """With Enc and Dec the identity images of a move by the difference of the mean images."""
    y = torch.arange(10).repeat(30)
    x = one_hot(y, 12).float() + 0.01 * torch.rand(300, 12)
    data = shared.Data("mnist", x, y, x[:200], y[:200], torch.Size((1, 3, 4)))

    def encode(Enc, x, *_):
        return None, x

    monkeypatch.setattr(vae_gan, "encode", encode)
    monkeypatch.setattr(vae_gan, "decode", lambda Dec, z, *_: z)
    images, names = vae_gan.arithmetic(None, None, data, configure())
    rows = images.unflatten(0, (-1, 10))
    assert len(rows) == len(names) == 12
    for i, (a, b) in enumerate(((3, 8), (4, 9), (7, 1), (0, 6))):
        before, rec, after = rows[3 * i : 3 * i + 3]
        assert names[3 * i : 3 * i + 3] == ["x", "Dec(μ)", f"{a} → {b}"]
        assert (before.argmax(1) == a).all() and rec.equal(before)
        assert (after.argmax(1) == b).all() and after[:, a].abs().max() < 0.05
