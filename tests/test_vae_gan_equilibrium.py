"""VAE-GAN with equilibrium: sizes, initial weights, gradients, two passes, who trains, a folder."""

import importlib
import json

import shared

import numpy as np
import pytest
import torch
import vae_gan
import vae_gan_equilibrium as equilibrium
from conftest import assert_same, check_an_eighth, fake_run, record, see, state_of, toy_data, train
from PIL import Image
from test_vae_gan import assert_settled, sgd
from torch import nn
from torch.autograd import grad
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate


def configure(preset="published", **changes):
    """A preset with nets and images small enough for a test."""
    small = {"width": 1 / 32, "image_size": 32, "latent_dim": 3, "preset": preset}
    return equilibrium.Config(**equilibrium.PRESETS[preset] | small | changes)


# Nets


@pytest.mark.parametrize("module", (vae_gan, equilibrium))
def test_a_cpu_has_a_quarter_of_the_width_and_32_pixels(module, monkeypatch):
    def build(config, C):
        raise RuntimeError(f"{config.width} of the width, {config.image_size} pixels")

    monkeypatch.setattr(module, "build", build)
    monkeypatch.setattr(shared, "load_data", lambda *_, **__: toy_data())
    with pytest.raises(RuntimeError, match=r"0\.25 of the width, 32 pixels"):
        module.main(module.Config(device="cpu"))


def test_sizes_are_those_of_the_public_code():
    config = configure(width=1.0, image_size=64, latent_dim=128)
    with torch.device("meta"):
        nets = equilibrium.build(config, 3)
    sizes = [sum(p.numel() for p in net.parameters()) for net in nets.values()]
    assert sizes == [18_071_360, 4_693_155, 10_953_857]
    fourth = nets["Dis"][0][-1]
    assert isinstance(fourth, nn.Conv2d) and fourth.bias is None  # features before batch norm
    features = nets["Dis"][0](torch.empty(2, 3, 64, 64, device="meta"))
    assert features.shape == (2, 256, 8, 8)


@pytest.mark.parametrize("size", (32, 64))
def test_width_and_image_size(size):
    nets = equilibrium.build(configure(width=0.125, image_size=size), 3)
    check_an_eighth(nets, size)


def test_initial_weights_are_uniform_and_a_root_of_three_below_pytorchs():
    torch.manual_seed(0)
    nets = equilibrium.build(configure(width=0.25), 1)
    usual = equilibrium.build(configure(width=0.25, init="pytorch"), 1)
    for layer, other in zip(nets.modules(), usual.modules(), strict=True):
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            weight, n = layer.weight, layer.weight.numel()
            bound = 1 / (3 * weight[0].numel()) ** 0.5
            assert (1 - 10 / n) * bound < weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=3 / n**0.5)
            assert layer.bias is None or not layer.bias.any()
            ratio = other.weight.std() / weight.std()
            assert ratio.item() == pytest.approx(3**0.5, rel=5 / n**0.5)


# Losses


def test_losses():
    mu, log_var = torch.randn(2, 7, 5)
    standard = Normal(torch.zeros(5), torch.ones(5))
    kl = kl_divergence(Normal(mu, (log_var / 2).exp()), standard)
    torch.testing.assert_close(equilibrium.L_prior(mu, log_var), kl.sum())
    log_p = Normal(mu, 1).log_prob
    ratio = (log_p(mu) - log_p(log_var)).sum()
    torch.testing.assert_close(equilibrium.L_llike(log_var, mu), ratio)
    logits, expected = torch.randn(3, 7, 1), []
    for part, real in zip(logits, (1.0, 0.0, 0.0), strict=True):
        target = torch.full_like(part, real)
        expected.append(binary_cross_entropy_with_logits(part, target, reduction="sum"))
    torch.testing.assert_close(equilibrium.cross_entropies(logits), torch.stack(expected))
    two = equilibrium.cross_entropies(logits[:2])
    torch.testing.assert_close(two, torch.stack(expected[:2]))


def normalised(layers, x):
    """Layers whose batch norm is written out: the statistics are those of this batch."""
    for layer in layers:
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            axes = [0, 2, 3] if x.dim() == 4 else [0]
            mean, var = x.mean(axes, keepdim=True), x.var(axes, unbiased=False, keepdim=True)
            shape = [1, -1, 1, 1] if x.dim() == 4 else [1, -1]
            x = (x - mean) / (var + layer.eps).sqrt() * layer.weight.view(shape)
            x = x + layer.bias.view(shape)
        elif isinstance(layer, nn.ReLU):
            x = x.clamp(min=0)
        else:
            x = layer(x)
    return x


def judge(Dis, x, x_rec, x_p, config):
    """Features of x, x̃ and Dis of x, x_p, x̃, as they are written."""
    if config.joint:
        f = normalised(Dis[0], torch.cat([x_rec, x, x_p]))
        D_rec, D, D_p = normalised(Dis[1], f).sigmoid().chunk(3)
        return *f.chunk(3)[1::-1], D, D_p, D_rec
    f_rec, f = normalised(Dis[0], torch.cat([x_rec, x])).chunk(2)
    images = [x, x_p, x_rec] if config.gan_reconstruction else [x, x_p]
    D = normalised([*Dis[0], *Dis[1]], torch.cat(images)).sigmoid()
    return f, f_rec, *D.chunk(len(images))


def written(nets, x, noise, config):
    """The losses as they are written, with sigmoids, x̃ and x_p part of one graph."""
    mu, log_var = nets["Enc"](x)
    s = (log_var / 2).exp()
    x_rec, x_p = nets["Dec"](mu + s * noise[0]), nets["Dec"](noise[1])
    f, f_rec, D, D_p, *D_rec = judge(nets["Dis"], x, x_rec, x_p, config)
    D_rec = D_rec[0] if config.gan_reconstruction else torch.zeros_like(D)
    kl = kl_divergence(Normal(mu, s), Normal(torch.zeros_like(mu), torch.ones_like(mu)))
    gan = -(D.log() + (1 - D_p).log() + (1 - D_rec).log()).sum()
    dec = -gan
    if config.swapped_labels:
        dec = -((1 - D).log() + D_p.log()).sum()
        if config.gan_reconstruction:
            dec = dec - D_rec.log().sum()
    return kl.sum(), 0.5 * (f - f_rec).square().sum(), gan, dec


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"joint": True},
        {"gan_reconstruction": True},
        {"gan_reconstruction": True, "joint": True},
        {"swapped_labels": True},
        {"swapped_labels": True, "gan_reconstruction": True},
        {"lambda_mse": 0.3, "gamma_enc": 4.0},
    ],
    ids=lambda changes: "-".join(["published", *changes]),
)
def test_each_net_gets_the_gradient_of_its_loss_alone(changes):
    torch.manual_seed(0)
    config = configure(margin=0.0, **changes)
    nets = equilibrium.build(config, 1).double()
    x = torch.rand(6, 1, 32, 32).double() * 2 - 1
    before = {name: value.clone() for name, value in nets.state_dict().items()}
    torch.manual_seed(1)
    losses = equilibrium.train_step(nets, sgd(nets), x, config)  # a step is the gradient
    steps = {name: before[name] - p for name, p in nets.named_parameters()}
    nets.load_state_dict(before)
    torch.manual_seed(1)
    noise = [torch.randn(6, 3, dtype=torch.double) for _ in range(2)]
    prior, llike, gan, dec = written(nets, x, noise, config)
    for name, loss in {"L_prior": prior, "L_llike": llike, "L_GAN": gan}.items():
        assert losses[name].item() == pytest.approx(loss.item() / 6, rel=1e-6)
    share = config.lambda_mse
    wanted = {"Enc": prior + config.gamma_enc * llike, "Dis": gan}
    wanted["Dec"] = share * llike + (1 - share) * dec
    for name, loss in wanted.items():
        gradients = grad(loss, [*nets[name].parameters()], retain_graph=True)
        scale = max(g.abs().max().item() for g in gradients)
        assert scale > 1e-3
        for (key, _), gradient in zip(nets[name].named_parameters(), gradients, strict=True):
            step = steps[f"{name}.{key}"]
            torch.testing.assert_close(step, gradient, rtol=1e-6, atol=1e-9 * scale)


def test_each_pass_of_the_discriminator_has_its_own_batch_statistics():
    torch.manual_seed(0)
    nets = equilibrium.build(configure(), 1)
    Dis, images = nets["Dis"], [torch.rand(5, 1, 32, 32) + i for i in range(3)]
    x, x_rec, x_p = images
    given = []
    for layer in Dis.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda _, inputs, __: given.append(inputs[0]))
    _, f_rec, logits = equilibrium.discriminate(Dis, x, x_rec, x_p, configure())
    first = Dis[0][:2]
    convolved = [Dis[0][2](first(torch.cat(pair))) for pair in ([x_rec, x], [x, x_p])]
    # Two norms up to Dis_l; in the second pass these and that of Dis_l
    assert [len(batch) for batch in given] == [10] * 5
    torch.testing.assert_close(given[0], convolved[0])
    torch.testing.assert_close(given[2], convolved[1])
    _, f_joint, joint = equilibrium.discriminate(Dis, x, x_rec, x_p, configure(joint=True))
    assert len(logits) == len(joint) == 2
    assert not torch.allclose(f_rec, f_joint, rtol=0.01)
    assert not torch.allclose(logits[0], joint[0], rtol=0.01)


@pytest.mark.parametrize(
    "terms, dis, dec",
    [
        ((0.69, 0.69), True, True),
        ((0.32, 0.69), False, True),
        ((0.69, 0.32), False, True),
        ((1.04, 0.69), True, False),
        ((0.69, 1.04), True, False),
        ((0.32, 1.04), True, True),
        ((0.34, 1.02), True, True),
        ((0.69, 0.69, 0.1), True, True),  # the reconstruction's does not count
    ],
)
def test_who_trains(terms, dis, dec, monkeypatch):
    config, terms = configure(), torch.tensor(terms)
    assert equilibrium.who_trains(terms, config) == (dis, dec)
    assert equilibrium.who_trains(terms, configure(margin=0.0)) == (True, True)

    def cross_entropies(logits):
        return 4 * terms + 0 * torch.cat([*logits]).mean()  # sums over four images

    monkeypatch.setattr(equilibrium, "cross_entropies", cross_entropies)
    nets, order = equilibrium.build(config, 1), []
    opts = sgd(nets, 1e-9)
    for name, optimizer in opts.items():
        optimizer.step = lambda name=name: order.append(name)
    losses = equilibrium.train_step(nets, opts, torch.rand(4, 1, 32, 32), config)
    assert order == ["Dis"] * dis + ["Dec"] * dec + ["Enc"]
    assert (losses["trains_Dis"], losses["trains_Dec"]) == (dis, dec)


# Training


def test_main_gives_the_rates_their_decay_and_shrinks_a_smoke_run(monkeypatch, tmp_path, cheap):
    rates, sizes = [], set()

    def train_step(nets, opts, x, config):
        rates.append([opt.param_groups[0]["lr"] for opt in opts.values()])
        assert all(opt.defaults["alpha"] == 0.9 for opt in opts.values())
        sizes.add((tuple(x.shape), x.min().item(), config.width))
        return {"L_prior": torch.zeros(())}

    monkeypatch.setattr(equilibrium, "train_step", train_step)
    monkeypatch.setattr(equilibrium, "evaluate", lambda *_, **__: {"eval/recon_mse": 0.0})
    monkeypatch.setattr(equilibrium, "draw", lambda *_: None)
    options = ["--smoke", "--width", 1, "--image-size", 64, "--out-dir", tmp_path]
    train(monkeypatch, equilibrium, *options, "--batch-size", 500)
    assert sizes == {((500, 1, 32, 32), -1.0, 1 / 16)}
    assert rates[:4] == [pytest.approx([1e-4] * 3)] * 4
    assert rates[4:] == [pytest.approx([7.5e-5] * 3)] * 4


def test_presets_fill_defaults():
    def parsed(*words):
        return shared.parse_config(equilibrium.Config, equilibrium.PRESETS, list(words))

    config = parsed("--alpha=0.5")
    assert (config.lr, config.alpha, config.lr_decay) == (1e-4, 0.5, 0.75)
    assert (config.gamma_enc, config.lambda_mse, config.margin) == (1.0, 1e-6, 0.35)
    assert not (config.gan_reconstruction or config.joint or config.swapped_labels)
    for preset, settings in equilibrium.PRESETS.items():
        given = vars(parsed(f"--preset={preset}"))
        assert given == vars(equilibrium.Config()) | settings | {"preset": preset}


OF_A_FOLDER = {  # options, images seen, pictures beside samples and reconstructions
    "vae_gan_equilibrium": ([], 192, set()),
    "vae_gan": ([], 192, set()),
    "aae_pytorch": ([], 200, {"codes", "plane"}),
    "aae_semi_supervised": (["--cluster", 10], 200, {"style", "clusters"}),
}


@pytest.mark.parametrize("name", OF_A_FOLDER)
def test_a_folder_of_pictures(name, monkeypatch, tmp_path, few_images):
    """Discs and gradients in colour go through training, evaluation and pictures."""
    own, seen, pictures = OF_A_FOLDER[name]
    folder, random = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    rows, columns = np.mgrid[:40, :50]
    for i in range(240):
        (r, c), radius = random.integers(10, 30, 2), random.integers(4, 12)
        disc = (rows - r) ** 2 + (columns - c) ** 2 < radius**2
        slope = (rows * random.random() + columns * random.random()) / 90
        picture = np.stack([disc, slope, 1 - slope], -1)
        Image.fromarray((255 * picture).astype(np.uint8)).save(folder / f"{i}.png")
    options = [*own, "--smoke", "--dataset", f"folder:{folder}", "--epochs", 1]
    options += ["--out-dir", tmp_path, "--run-name", "run"]
    train(monkeypatch, importlib.import_module(name), *options)
    run = tmp_path / name / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "done" and summary["images_seen"] == seen
    assert 0 < summary["eval/recon_mse"] < 1 and "eval/identity" not in summary
    assert {path.stem for path in run.glob("*.png")} == pictures | {"samples", "reconstructions"}


class Loaded(Exception):
    pass


def test_faces_of_celebas_size_are_cut_as_by_the_public_code(monkeypatch, tmp_path):
    face = np.zeros((218, 178), np.uint8)
    face[40:188, 15:163] = 255  # the box in its generator.py
    for i in range(100):
        Image.fromarray(face).save(tmp_path / f"{i:03}.png")
    load_data = shared.load_data

    def load(*args, **kwargs):
        raise Loaded(load_data(*args, **kwargs), load_data(*args, kwargs["size"]))

    monkeypatch.setattr(shared, "load_data", load)
    with pytest.raises(Loaded) as stop:
        train(monkeypatch, equilibrium, "--dataset", f"folder:{tmp_path}", "--batch-size", 10)
    data, whole = stop.value.args
    assert data.shape == whole.shape == (1, 32, 32)
    assert data.x_train.eq(1).all() and whole.x_train.eq(0).any()


# Evaluation


def test_evaluation_has_statistics_of_batches_of_one_kind():
    assert_settled(equilibrium, configure())


def test_what_evaluate_measures_and_draw_shows(monkeypatch):
    torch.manual_seed(0)
    config, data = configure(epochs=1), toy_data()
    nets = equilibrium.build(config, 1)
    x = equilibrium.to_x(data.x_train[:16], data, config)
    equilibrium.train_step(nets, sgd(nets, 1e-3), x, config)
    before, given = state_of(nets), record(monkeypatch)
    equilibrium.evaluate(nets, data, config, full=True)
    run, seen = fake_run(nets, config), see(monkeypatch)
    equilibrium.draw(run, data, config)
    assert_same(before, state_of(nets))
    assert run.names == ["samples", "reconstructions"]

    def enlarged(x):
        return interpolate(data.images(x), (32, 32), mode="bicubic").clamp(0, 1) * 2 - 1

    def pixels(x):
        x = interpolate(x, (28, 28), mode="bicubic", antialias=True).clamp(-1, 1)
        return (x.flatten(1) + 1) / 2

    Enc, Dec, Dec_p = equilibrium.settled(nets, data, config)
    with torch.no_grad():
        train, test = enlarged(data.x_train), enlarged(data.x_test)
        z = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        x_rec, x_fake = given["images"][0]
        torch.testing.assert_close(x_rec, pixels(Dec(Enc(test)[0])))
        torch.testing.assert_close(x_fake, pixels(Dec_p(z)))
        ((x, x_shown),) = seen["pairs"]
        assert x.equal(data.images(data.x_test[:50]))
        torch.testing.assert_close(x_shown, data.images(x_rec[:50]))
        torch.testing.assert_close(seen["grid"][0][:90], data.images(x_fake[:90]))
        torch.testing.assert_close(given["short"], (Enc(train)[0], Enc(test)[0]))
        torch.testing.assert_close(given["long"], (Enc[:-1](train), Enc[:-1](test)))
