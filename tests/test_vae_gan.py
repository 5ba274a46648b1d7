"""VAE-GAN: the seeds' nets layer by layer, each net's gradient, who is trained when, eval mode, and going on after a stop."""
import os
import signal

import pytest
import torch
from conftest import assert_same, train_here
from torch import nn
from torch.autograd import grad
from torch.distributions import Normal, kl_divergence

import shared
import vae_gan

TABLES = {  # of seed 001's README; its Dis ends in a sigmoid, which ours leaves to the loss
    "Enc": [(64, 32, 32)] * 3 + [(128, 16, 16)] * 3 + [(256, 8, 8)] * 3 + [(2048,)] * 3 + [(128,)] * 2,
    "Dis": [(32, 64, 64)] * 2 + [(128, 32, 32)] * 3 + [(256, 16, 16)] * 3 + [(256, 8, 8)] * 3 + [(512,)] * 3 + [(1,)],
    "Dec": [(16384,)] * 3 + [(256, 16, 16)] * 3 + [(128, 32, 32)] * 3 + [(32, 64, 64)] * 3 + [(1, 64, 64)] * 2}


def configure(*args, **changes):
    """The config of a command line, with nets and images small enough for a test."""
    config = shared.parse_config(vae_gan.Config, list(args))
    for key, value in ({"width": 1 / 32, "image_size": "32", "latent_dim": 3} | changes).items():
        setattr(config, key, value)
    return config


def shapes(net, x):
    """Output shapes, without the batch, of the layers in the order of their calls."""
    seen = []
    for layer in net.modules():
        if not list(layer.children()) and not isinstance(layer, (nn.Flatten, nn.Unflatten)):
            layer.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape[1:])))
    net(x)
    return seen[:]  # the nets share an activation, so that the next one calls these hooks too


def test_layers_of_seed001():
    with torch.device("meta"):
        nets = vae_gan.build(configure(width=1, image_size="64", latent_dim=128), 1)
        x, z = torch.empty(64, 1, 64, 64), torch.empty(64, 128)
    assert {name: shapes(nets[name], z if name == "Dec" else x) for name in nets} == TABLES
    assert nets["Dis"][0](x).shape == (64, 256, 8, 8)  # Dis_l is the fourth block


@pytest.mark.parametrize("recipe, C, sizes", [
    ("seed001", 1, [35_112_064, 5_834_753, 10_953_409]), ("seed001", 3, [35_112_064 + 3200, 5_834_753 + 1602, 10_953_409 + 1600]),
    ("seed003", 3, [18_071_360, 4_693_155, 10_953_857])])
def test_sizes(recipe, C, sizes):
    with torch.device("meta"):
        nets = vae_gan.build(configure("--recipe", recipe, width=1, image_size="64", latent_dim=128), C)
    assert [sum(p.numel() for p in net.parameters()) for net in nets.values()] == sizes
    assert {m.momentum for m in nets.modules() if hasattr(m, "momentum")} == {0.9}
    assert isinstance(nets["Dis"][0][-1], nn.LeakyReLU if recipe == "seed001" else nn.Conv2d)  # after or before batch norm


@pytest.mark.parametrize("size", (32, 64))
@pytest.mark.parametrize("recipe", ("seed001", "seed003"))
def test_width_and_image_size(recipe, size):
    config = configure("--recipe", recipe, width=0.125, image_size=str(size), bn_momentum=0.2)
    nets, x = vae_gan.build(config, 3), torch.rand(2, 3, size, size)
    assert nets["Dec"](nets["Enc"](x)[0]).shape == x.shape and nets["Dis"](x).shape == (2, 1)
    assert nets["Enc"][0].out_channels == 8 and nets["Dis"][0][0].out_channels == 4
    assert {m.momentum for m in nets.modules() if hasattr(m, "momentum")} == {0.2}
    smooth, shape = torch.linspace(0, 1, 28).expand(2, 3, 28, 28).flatten(1), (3, 28, 28)
    large = vae_gan.enlarge(smooth, shape, config)
    assert large.shape == x.shape and large.min() == -1 and large.max() == 1
    torch.testing.assert_close(vae_gan.reduce(large, shape), smooth, atol=0.02, rtol=0)


def written(nets, x, noise, config):
    """The three losses as the papers write them, with sigmoids, x̃ and x_p part of one graph."""
    mu, log_var = nets["Enc"](x)
    x_rec, x_p = nets["Dec"](mu + (log_var / 2).exp() * noise[0]), nets["Dec"](noise[1])
    if config.dis_batches == "joined":
        f = nets["Dis"][0](torch.cat([x, x_rec, x_p]))
        D, (f, f_rec, _) = nets["Dis"][1](f).sigmoid().chunk(3), f.chunk(3)
    else:
        f, f_rec, f_p = (nets["Dis"][0](part) for part in (x, x_rec, x_p))
        D = [nets["Dis"][1](part).sigmoid() for part in (f, f_rec, f_p)]
    kl = kl_divergence(Normal(mu, (log_var / 2).exp()), Normal(torch.zeros_like(mu), torch.ones_like(mu)))
    terms = [D[0].log(), (1 - D[1]).log(), (1 - D[2]).log()]
    if config.recipe == "seed001":
        return kl.mean(), (f - f_rec).square().mean(), -sum(terms).mean()
    return kl.sum(), (f - f_rec).square().sum() / 2, -(terms[0] + terms[2]).sum()


@pytest.mark.parametrize("recipe", ("seed001", "seed003"))
def test_each_net_gets_the_gradient_of_its_loss_alone(recipe):
    torch.manual_seed(0)
    config = configure("--recipe", recipe, margin=0.0)
    nets, x = vae_gan.build(config, 1).double().train(), torch.rand(6, 1, 32, 32).double() * 2 - 1
    before = {k: v.clone() for k, v in nets.state_dict().items()}
    opts = {name: torch.optim.SGD(net.parameters(), 1.0) for name, net in nets.items()}  # a step is the gradient
    torch.manual_seed(1)
    losses = vae_gan.train_step(nets, opts, x, config)
    steps = {name: [before[f"{name}.{key}"] - p for key, p in net.named_parameters()] for name, net in nets.items()}
    buffers = {key: v.clone() for key, v in nets.named_buffers()}
    nets.load_state_dict(before)
    torch.manual_seed(1)
    prior, llike, gan = terms = written(nets, x, [torch.randn(6, 3, dtype=torch.double) for _ in range(2)], config)
    torch.testing.assert_close(losses, torch.stack(terms).detach())
    wanted = {"seed001": {"Enc": prior + 5 * llike, "Dec": 15 * llike - gan, "Dis": gan},
              "seed003": {"Enc": prior + llike, "Dec": 1e-6 * llike - (1 - 1e-6) * gan, "Dis": gan}}[recipe]
    for name, loss in wanted.items():
        for mine, theirs in zip(steps[name], grad(loss, [*nets[name].parameters()], retain_graph=True)):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9 * losses.abs().max().item())
        assert max(g.abs().max() for g in steps[name]) > 1e-3
    assert_same({k: v for k, v in buffers.items() if "tracked" in k}, {k: v for k, v in nets.named_buffers() if "tracked" in k})


def test_losses():
    mu, log_var = torch.randn(2, 7, 5)
    kl = kl_divergence(Normal(mu, (log_var / 2).exp()), Normal(torch.zeros(5), torch.ones(5)))
    torch.testing.assert_close(vae_gan.L_prior(mu, log_var, "sum"), kl.sum())
    torch.testing.assert_close(vae_gan.L_prior(mu, log_var, "mean"), kl.mean())
    log_p = Normal(mu, 1).log_prob
    torch.testing.assert_close(vae_gan.L_llike(log_var, mu, "sum"), (log_p(mu) - log_p(log_var)).sum())
    torch.testing.assert_close(vae_gan.L_llike(log_var, mu, "mean"), (log_var - mu).square().mean())
    logits, bce = torch.randn(3, 7, 1), nn.functional.binary_cross_entropy_with_logits
    expected = [bce(part, torch.full_like(part, real)) for part, real in zip(logits, (1.0, 0.0, 0.0))]
    torch.testing.assert_close(vae_gan.cross_entropies(logits, configure()), torch.stack(expected))
    torch.testing.assert_close(vae_gan.cross_entropies(logits, configure("--no-gan-reconstruction")), torch.stack(expected[::2]))


@pytest.mark.parametrize("bces, dis, dec", [
    ((0.69, 0.69), True, True), ((0.32, 0.69), False, True), ((0.69, 0.32), False, True), ((1.04, 0.69), True, False),
    ((0.69, 1.04), True, False), ((0.32, 1.04), True, True), ((0.34, 1.02), True, True)])
def test_who_is_trained(bces, dis, dec, monkeypatch):
    config = configure("--recipe", "seed003")
    assert vae_gan.who_trains(bces, config) == (dis, dec)
    assert vae_gan.who_trains(bces, configure()) == (True, True)
    monkeypatch.setattr(vae_gan, "cross_entropies", lambda logits, _: torch.tensor(bces) + 0 * torch.cat(logits).mean())
    nets = vae_gan.build(config, 1)
    opts, before = {name: torch.optim.SGD(net.parameters(), 1e-9) for name, net in nets.items()}, []
    for name, optimizer in opts.items():
        optimizer.step = lambda name=name: before.append(name)
    vae_gan.train_step(nets, opts, torch.rand(4, 1, 32, 32), config)
    assert before == ["Dis"] * dis + ["Dec"] * dec + ["Enc"]


def test_a_vae_is_gaussian_in_the_pixels():
    torch.manual_seed(0)
    config = configure("--method", "vae")
    nets, x = vae_gan.build(config, 1), torch.rand(4, 1, 32, 32)
    opts = {name: torch.optim.SGD(net.parameters(), 1e-4) for name, net in nets.items()}
    assert [*nets] == ["Enc", "Dec"]
    seen = []
    nets["Dec"].register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    prior, llike = vae_gan.vae_step(nets, opts, x, config)
    torch.testing.assert_close(llike, (x - seen[0]).square().sum() / 2 / 4)
    losses = [vae_gan.vae_step(nets, opts, x, config).sum() for _ in range(20)]
    assert losses[-1] < 0.9 * (prior + llike)


def test_clip():
    p = nn.Parameter(torch.zeros(3))
    for clip, step in ((0, 5.0), (1, 1.0)):
        vae_gan.descend(torch.optim.SGD([p], 1.0), [torch.tensor([5.0, -0.5, -5.0])], clip)
        torch.testing.assert_close(p.data, -torch.tensor([step, -0.5, -step])), p.data.zero_()
    assert p.grad is None


def test_evaluation_leaves_the_statistics_alone_and_treats_images_one_by_one():
    config = configure()
    nets, x = vae_gan.build(config, 1), torch.rand(8, 784)
    vae_gan.train_step(nets, {name: torch.optim.SGD(net.parameters(), 1e-3) for name, net in nets.items()},
                       vae_gan.enlarge(x, (1, 28, 28), config), config)
    before, seen = {k: v.clone() for k, v in nets.state_dict().items()}, vae_gan.maps(nets, config, (1, 28, 28), "cpu")
    out = {name: seen[name](x) for name in ("encode", "short", "long")} | {"decode": seen["decode"](seen["prior"](8))}
    assert out["decode"].shape == x.shape and 0 <= out["decode"].min() and out["decode"].max() <= 1
    assert out["long"].shape == (8, 64)
    torch.testing.assert_close(seen["encode"](x[:1]), out["encode"][:1])
    torch.testing.assert_close(seen["decode"](seen["prior"](8)[:1]), out["decode"][:1])
    assert_same(before, dict(nets.state_dict()))


def test_latent_arithmetic():
    """With E = G = identity, images of class a move by the difference of the classes' mean images."""
    y = torch.arange(10).repeat(30)
    x = nn.functional.one_hot(y, 12).float() + 0.01 * torch.rand(300, 12)
    data, same = (x, y, x[:200], y[:200], (1, 3, 4)), {key: lambda x: x for key in ("short", "encode", "decode")}
    wanted = vae_gan.directions(configure(), data)
    rows = vae_gan.arithmetic(data, same, wanted)
    assert [name for name, *_ in wanted] == ["3 → 8", "4 → 9", "7 → 1", "0 → 6"] and len(rows) == 3 * len(wanted)
    for (a, b), (before, _, after) in zip(((3, 8), (4, 9), (7, 1), (0, 6)), zip(*[iter(rows)] * 3)):
        assert len(before) == 10 and (before.argmax(1) == a).all() and (after.argmax(1) == b).all()
        assert after[:, a].abs().max() < 0.05
    assert vae_gan.directions(configure("--dataset", "folder:x"), (x, None, x, None, (1, 3, 4))) == []


def test_attributes_of_celeba(monkeypatch):
    class CelebA:
        attr_names = ["Bald", "Blond_Hair", "Eyeglasses", "Male", "Smiling"]

        def __init__(self, root, part):
            self.attr = torch.arange(20)[:, None] >> torch.arange(5) & 1
    monkeypatch.setattr("torchvision.datasets.CelebA", CelebA)
    data = (torch.rand(16, 12), None, torch.rand(8, 12), None, (3, 2, 2))
    wanted = {name: rest for name, *rest in vae_gan.directions(configure("--dataset", "celeba"), data)}
    assert list(wanted) == ["Smiling", "Eyeglasses", "Male", "Blond_Hair"]
    has, has_not, test = wanted["Eyeglasses"]
    assert has.tolist() == [i >> 2 & 1 == 1 for i in range(16)] and has_not.equal(~has)
    assert test.tolist() == [i >> 2 & 1 == 0 for i in range(8)]
    assert vae_gan.directions(configure("--dataset", "celeba", "--split", "sw"), data) == []


@pytest.mark.parametrize("extra", (["--recipe", "seed003"], ["--method", "vae"]))
def test_ctrl_c_saves_and_resumes(extra, tmp_path, monkeypatch, capsys):
    tick, runs = shared.Run.tick, tmp_path / "vae_gan"
    extra = [*extra, "--smoke", "--width", "0.1", "--out-dir", str(tmp_path), "--batch-size", "16"]
    monkeypatch.setattr(shared, "evaluate", lambda *_, **__: {"eval/recon_mse": 0.0})
    monkeypatch.setattr(vae_gan, "draw", lambda *_: None)
    train_here(monkeypatch, vae_gan, *extra, "--run-name", "straight")

    def tick_then_signal(run, *args):
        tick(run, *args)
        if run.at["steps"] == 6:  # the second iteration of the second epoch
            os.kill(os.getpid(), signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(shared.Run, "tick", tick_then_signal)
        with pytest.raises(SystemExit) as stop:
            train_here(patch, vae_gan, *extra, "--run-name", "stopped")
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().err
    train_here(monkeypatch, vae_gan, "--resume", str(runs / "stopped/checkpoint.pt"))
    a, b = (torch.load(runs / name / "checkpoint.pt", weights_only=True) for name in ("straight", "stopped"))
    assert len(a["trace"]) == 8
    for part in a.keys() - {"config", "run"}:
        assert_same(a[part], b[part])
    if "seed003" in extra:
        assert {a[f"opt_{name}"]["param_groups"][0]["lr"] for name in ("Enc", "Dec", "Dis")} == {1e-4 * 0.75}
