"""AAE of Freiburg: nets, prior, losses, a step of each state, balance and plateau, animations."""

import copy
import math

import shared

import aae_freiburg as aae
import numpy as np
import pytest
import torch
from conftest import (
    assert_same,
    fake_run,
    prior_gap,
    record,
    see,
    size,
    state_of,
    toy_data,
    train,
    trained,
    watch,
)
from PIL import Image
from scipy.stats import wasserstein_distance
from torch import nn
from torch.nn.functional import binary_cross_entropy, one_hot

MNIST, FACE = torch.Size((1, 28, 28)), torch.Size((3, 32, 32))
PHASES = [("P", {"P"}), ("Q_rec", {"Q"}), ("D", {"D"}), ("Q_reg", {"Q"})]


def preset(name, **changes):
    return aae.Config(**aae.PRESETS[name] | {"preset": name} | changes)


def start(config, K):
    torch.manual_seed(0)
    nets = aae.build(config, MNIST, K)
    return nets, aae.optimizers(nets, config)[0]


def x_and_y(n=8, K=10):
    return torch.rand(n, 784), one_hot(torch.arange(n) % 10, 10).float()[:, :K]


# Nets


@pytest.mark.parametrize("net", ("dense", "conv"))
def test_batch_norm_has_the_momentum_asked_for_and_the_slope_is_a_fifth(net):
    layers = list(aae.build(aae.Config(net=net, bn_momentum=0.02), MNIST, 0).modules())
    norms = [layer for layer in layers if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))]
    assert {layer.momentum for layer in norms} == {0.02}
    leaky = [layer for layer in layers if isinstance(layer, nn.LeakyReLU)]
    assert {layer.negative_slope for layer in leaky} == {0.2}


@pytest.mark.parametrize("K", (0, 10))
@pytest.mark.parametrize("name", ("january", "head"))
def test_dense_sizes(name, K):
    nets = aae.build(preset(name), MNIST, K)
    norms = 2 * 2 * 1000
    assert size(nets["Q"]) == 785 * 1000 + 1001 * 1000 + 1001 * 5 + norms
    assert size(nets["P"]) == (6 + K) * 1000 + 1001 * 1000 + 1001 * 784 + norms
    assert size(nets["D"]) == (6 + K) * 500 + 501 * 500 + 501


@pytest.mark.parametrize("net", ("dense", "conv"))
def test_january_normalises_after_the_leaky_relu_and_head_before(net):
    for name, first, second in (("january", "Leaky", "Batch"), ("head", "Batch", "Leaky")):
        nets = aae.build(preset(name, net=net), MNIST, 0)
        for layers in (nets["Q"], nets["P"]):
            names = [type(layer).__name__ for layer in layers]
            places = [i for i, name in enumerate(names) if name.startswith(first)]
            assert len(places) == (2 if net == "dense" else 3)
            assert all(names[i + 1].startswith(second) for i in places)


@pytest.mark.parametrize(
    "shape, Z, K, channels, sizes",
    [
        (MNIST, 5, 10, (16, 32, 64), (28, 14, 7)),
        (FACE, 50, 0, (16, 32, 64, 128), (32, 16, 8, 4)),
    ],
)
def test_convolutions_are_freiburgs(shape, Z, K, channels, sizes):
    nets = aae.build(aae.Config(net="conv", latent_dim=Z), shape, K)
    shapes = {"Q": [], "P": []}

    def note(name):
        return lambda layer, _, out: shapes[name].append((layer.kernel_size[0], *out.shape[1:]))

    for name in shapes:
        for layer in nets[name]:
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                layer.register_forward_hook(note(name))
    x = torch.rand(2, shape.numel())
    assert nets["P"](torch.cat([nets["Q"](x), x[:, :K]], 1)).shape == x.shape
    kernels = [3, *(4 for _ in channels[1:])]
    down = list(zip(kernels, channels, sizes, sizes, strict=True))
    assert shapes["Q"] == [*down, (sizes[-1], Z, 1, 1)]
    up = zip([sizes[-1], *kernels[1:]], channels[::-1], sizes[::-1], sizes[::-1], strict=True)
    assert shapes["P"] == [*up, (3, *shape)]
    assert len([m for m in nets.modules() if isinstance(m, nn.BatchNorm2d)]) == 2 * len(channels)


# Losses and phases


def test_losses():
    D, (z, z_fake) = nn.Sequential(nn.Linear(3, 1)), torch.randn(2, 6, 3)
    real, fake = D(z).sigmoid(), D(z_fake).sigmoid()
    ones, zeros = torch.ones(6, 1), torch.zeros(6, 1)
    expected = binary_cross_entropy(real, ones) + binary_cross_entropy(fake, zeros)
    torch.testing.assert_close(aae.L_D(D, z, z_fake), expected)
    torch.testing.assert_close(aae.L_Q(D, z_fake), binary_cross_entropy(fake, ones))
    x, logits = torch.rand(4, 7), torch.randn(4, 7)
    torch.testing.assert_close(aae.L_rec(logits, x), (x - logits.sigmoid()).pow(2).sum() / 28)


def moved(parameters, gradients, config, lr):
    """Where the first step of Adam or RMSprop takes parameters."""
    after = []
    for p, g in zip(parameters, gradients, strict=True):
        if config.optimizer == "rmsprop":
            after.append(p - lr * g / ((0.1 * g.square()).sqrt() + 1e-5))
        else:
            after.append(p - lr * g / (g.abs() + 1e-8))
    return after


def put(parameters, values):
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)


@pytest.mark.parametrize("name", ("january", "head", "ours"))
def test_a_step_of_each_state_number_by_number(name):
    """Against gradients of losses written out, in the order of that state."""
    config = preset(name)
    nets = start(config, 10)[0].double()
    opts, _ = aae.optimizers(nets, config)
    by_hand = copy.deepcopy(nets)
    Q, P, D = by_hand["Q"], by_hand["P"], by_hand["D"]
    x, y = (part.double() for part in x_and_y())
    torch.manual_seed(1)
    aae.train_step(nets, opts, x, y, config, aae.GUESSING)

    def code():
        return torch.cat([Q(x), y], 1)

    def gradients_of_D(z_fake):
        real, fake = D(torch.cat([z, y], 1)).sigmoid(), D(z_fake.detach()).sigmoid()
        return torch.autograd.grad(-(real.log() + (1 - fake).log()).mean(), all_D)

    def gradients_of_Q(z_fake):
        loss = -D(z_fake).sigmoid().log().mean()
        return torch.autograd.grad(loss, all_Q, retain_graph=True)

    torch.manual_seed(1)
    z = nn.init.trunc_normal_(torch.empty(8, 5), 0, 1, -2, 2)
    all_Q, all_D = list(Q.parameters()), list(D.parameters())
    both = [*all_Q, *P.parameters()]
    z_fake = code()
    error = (x - P(z_fake).sigmoid()).square()
    loss = error.sum() if name == "january" else error.mean()
    g_rec = torch.autograd.grad(loss, both, retain_graph=True)
    if name == "head":
        g_D, g_Q = gradients_of_D(z_fake), gradients_of_Q(z_fake)
        put(both, moved(both, g_rec, config, 5e-5))
        put(all_D, moved(all_D, g_D, config, 5e-5))
        put(all_Q, moved(all_Q, g_Q, config, 5e-5))
    else:
        put(both, moved(both, g_rec, config, 2e-4))
        z_fake = code()
        put(all_D, moved(all_D, gradients_of_D(z_fake), config, 1e-3 if name == "ours" else 2e-4))
        g_Q = gradients_of_Q(z_fake)
        put(all_Q, moved(all_Q, g_Q, config, 1e-4 if name == "ours" else 2e-4))
    torch.testing.assert_close(nets.state_dict(), by_hand.state_dict(), rtol=1e-7, atol=1e-9)


def test_the_balance_looks_at_this_batch_in_january_and_at_the_one_before_in_head(monkeypatch):
    asked = []

    def balance(losses):
        asked.append({name: float(loss) for name, loss in losses.items()})
        return False, False

    monkeypatch.setattr(aae, "balance", balance)
    for name in ("january", "head", "mixed"):
        nets, opts = start(preset(name), 10)
        losses = aae.train_step(nets, opts, *x_and_y(), preset(name), {"L_D": 7.0, "L_Q": 8.0})
        now = {key: pytest.approx(losses[key].item()) for key in ("L_D", "L_Q")}
        assert asked[-1] == (now if name == "january" else {"L_D": 7.0, "L_Q": 8.0})


@pytest.mark.parametrize(
    "l_D, l_Q, trains",
    [
        (0.69, 0.69, (True, True)),  # both guess
        (0.30, 1.50, (False, True)),  # D far ahead: it sits out
        (1.20, 0.20, (True, False)),  # Q far ahead
        (0.46, 1.50, (True, True)),
        (0.30, 0.94, (True, True)),
        (0.94, 0.20, (True, True)),
        (1.20, 0.46, (True, True)),
    ],
)
def test_the_balance_rule(l_D, l_Q, trains):
    assert (
        aae.balance({"L_D": 2 * l_D, "L_Q": l_Q}) == trains
    )  # its l_D is half the sum of two cross-entropies


def test_which_net_moves_in_which_phase():
    def moves(config, before=aae.GUESSING):
        nets, opts = start(config, 10)
        notes = watch(nets, **opts)
        return notes, aae.train_step(nets, opts, *x_and_y(), config, before)

    ahead, behind = {"L_D": 2 * 0.3, "L_Q": 1.5}, {"L_D": 2 * 1.2, "L_Q": 0.2}
    for name in ("january", "head", "mixed", "ours"):
        notes, losses = moves(preset(name))
        assert notes == PHASES and losses["trains_D"] == losses["trains_Q"] == 1
    for name in ("head", "mixed"):
        notes, losses = moves(preset(name), ahead)
        assert notes == [PHASES[i] for i in (0, 1, 3)]
        assert (losses["trains_D"], losses["trains_Q"]) == (0, 1) and losses["L_D"] > 0
        notes, losses = moves(preset(name), behind)
        assert notes == PHASES[:3]
        assert (losses["trains_D"], losses["trains_Q"]) == (1, 0) and losses["L_Q"] > 0
    notes, losses = moves(aae.Config(lr_Q=0.0))  # a plain autoencoder
    assert notes == PHASES[:2] and losses.keys() == {"L_rec"}


def test_each_role_has_its_own_rate():
    opts = start(aae.Config(lr=1.0, lr_D=2.0, lr_Q=3.0), 0)[1]
    rates = {role: opt.param_groups[0]["lr"] for role, opt in opts.items()}
    assert rates == {"P": 1, "Q_rec": 1, "D": 2, "Q_reg": 3}
    assert all(opt.defaults["betas"] == (0.5, 0.999) for opt in opts.values())


# Schedules


def test_the_balance_begins_anew_in_each_epoch(monkeypatch, tmp_path, cheap):
    calls, _ = trained(monkeypatch, tmp_path, aae, {"L_rec": 1.0, "L_D": 7.0, "L_Q": 8.0})
    before = [(float(args[-1]["L_D"]), float(args[-1]["L_Q"])) for args in calls]
    guessing = pytest.approx((2 * math.log(2), math.log(2)))
    assert len(before) == 2 * 15
    assert [i for i, pair in enumerate(before) if pair == guessing] == [0, 15]
    assert set(before[1:15] + before[16:]) == {(7.0, 8.0)}


def test_main_gives_each_image_its_class(monkeypatch, tmp_path, cheap):
    calls, _ = trained(
        monkeypatch, tmp_path, aae, {"L_rec": 1.0, "L_D": 1.0, "L_Q": 1.0}, "--labels"
    )
    data = shared.load_data(aae.Config(smoke=True), torch.device("cpu"))
    for _, _, x, y, *_ in calls[:2]:
        i = torch.cdist(x, data.x_train).argmin(1)
        assert y.shape == (128, 10) and y.argmax(1).equal(data.y_train[i])


def test_a_stagnant_loss_divides_the_rates_by_5(monkeypatch, tmp_path, cheap):
    _, saved = trained(monkeypatch, tmp_path, aae, {"L_rec": 1.0}, "--lr-Q", 0, "--patience", 1)
    assert [row["train/lr"] for row in saved["history"]["rows"]] == [2e-4, 2e-4]
    rates = [saved[role]["param_groups"][0]["lr"] for role in ("P", "Q_rec", "D")]
    assert rates == pytest.approx([4e-5] * 3)
    assert saved["plateau_P"]["best"] == 1.0
    assert {"plateau_Q_rec", "plateau_D", "plateau_Q_reg"} <= saved.keys()


def test_less_than_one_percent_is_stagnant():
    def rate_after(progress, patience=3):
        nets = nn.ModuleDict({name: nn.Linear(1, 1) for name in "QPD"})
        opts, rules = aae.optimizers(nets, aae.Config(patience=patience, lr=1.0))
        for epoch in range(5):
            for rule in rules.values():
                rule.step((1 - progress) ** epoch)
        return opts["P"].param_groups[0]["lr"]

    assert rate_after(0.02) == rate_after(0.0, patience=0) == 1
    assert rate_after(0.003) == pytest.approx(0.2)  # three epochs together less than 1 %
    assert rate_after(0.0) == pytest.approx(0.2)


def test_presets_fill_defaults():
    def parsed(*words):
        return shared.parse_config(aae.Config, aae.PRESETS, list(words))

    config = parsed("--preset", "head", "--lr-D", "0.1")
    assert (config.lr, config.lr_D, config.optimizer, config.one_pass) == (
        5e-5,
        0.1,
        "rmsprop",
        True,
    )
    config = parsed("--preset=faces", "--dataset=folder:/some/faces")
    assert (config.net, config.latent_dim) == ("conv", 50)
    assert parsed().preset == "january" and parsed().lr_Q == 2e-4 and parsed().sums


# The prior and the distance to it


def test_the_prior_is_cut_at_2_and_a_seed_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    config = aae.Config(latent_dim=2)
    z = aae.sample_prior(torch.empty(20_000, 0), config)
    assert z.abs().max() <= 2 and z.std().item() == pytest.approx(0.8796, abs=0.01)
    y, before = torch.empty(50, 0), torch.get_rng_state()
    once, again, other = (aae.sample_prior(y, config, seed) for seed in (1, 1, 2))
    assert once.equal(again) and not once.equal(other)
    assert torch.get_rng_state().equal(before)


def test_sliced_wasserstein_and_the_floor():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 500, 1, generator=generator) * torch.tensor([[[1.0]], [[2.0]]])
    expected = wasserstein_distance(a[:, 0].numpy(), b[:, 0].numpy() + 1)
    assert shared.prior.sliced_wasserstein(a, b + 1) == pytest.approx(expected, rel=1e-5)
    shift = torch.tensor([3.0, 4.0])  # E |θ·shift| = ‖shift‖ 2/π for a direction θ in the plane
    a = torch.randn(500, 2)
    assert shared.prior.sliced_wasserstein(a, a + shift) == pytest.approx(10 / math.pi, rel=0.1)
    config = aae.Config(latent_dim=2)
    z = aae.sample_prior(torch.empty(1000, 0), config, 99)
    gap, floor = prior_gap(aae, z, config)
    assert gap == pytest.approx(floor, rel=1) and floor < 0.06
    assert prior_gap(aae, 1.5 * z, config)[0] > 0.2


# Evaluation


def settled(config, data, K):
    """Nets after a step, so that their batch norm's running statistics are not a batch's."""
    nets, opts = start(config, K)
    y = aae.given_labels(data, config)[0]
    aae.train_step(nets, opts, data.x_train[:64], y[:64], config, aae.GUESSING)
    return nets


@pytest.mark.parametrize("labels", (False, True))
def test_what_evaluate_measures(labels, monkeypatch):
    config, data = aae.Config(labels=labels), toy_data()
    nets = settled(config, data, 10 * labels)
    before, given = state_of(nets), record(monkeypatch)
    metrics = aae.evaluate(nets, data, config, full=True)
    assert_same(before, state_of(nets))
    Q, P = nets.eval()["Q"], nets["P"]
    y = one_hot(torch.arange(200) % 10, 10).float()[:, : 10 * labels]
    with torch.no_grad():
        x_fake = P(torch.cat([aae.sample_prior(y, config, 0), y], 1)).sigmoid()
        ((x_rec, fake),) = given["images"]
        torch.testing.assert_close(fake, x_fake)
        if labels:  # P is told the class: neither identity nor MSE
            assert x_rec is None
        else:
            torch.testing.assert_close(x_rec, P(Q(data.x_test)).sigmoid())
        for kind, net in (("short", Q), ("long", Q[:-1])):
            torch.testing.assert_close(given[kind][0], net(data.x_train))
            torch.testing.assert_close(given[kind][1], net(data.x_test))
        gap, floor = prior_gap(aae, Q(data.x_test), config)
        gap_train, _ = prior_gap(aae, Q(data.x_train[:200]), config)
    assert metrics["eval/prior_gap"] == pytest.approx(gap, rel=1e-4)
    assert metrics["eval/prior_gap_floor"] == pytest.approx(floor, rel=1e-4)
    assert metrics["eval/prior_gap_train"] == pytest.approx(gap_train, rel=1e-4)


def test_long_features_of_convolutions_come_before_the_last_layer(monkeypatch):
    config, data = aae.Config(net="conv"), toy_data(n=20, m=10)
    nets, given = start(config, 0)[0], record(monkeypatch)
    aae.evaluate(nets, data, config, full=True)
    last = nets["Q"][-2]
    z = last(given["long"][1].unflatten(1, (64, 7, 7))).flatten(1)
    torch.testing.assert_close(z, given["short"][1])


def test_classes_are_one_hot_and_take_turns():
    data = toy_data()
    data = data._replace(y_test=data.y_test.flip(0))
    y_train, y_test = aae.given_labels(data, aae.Config(labels=True))
    assert y_train.argmax(1).equal(data.y_train) and y_test.argmax(1).equal(data.y_test)
    assert y_train.sum(1).eq(1).all() and y_train.shape == (300, 10)
    assert aae.given_labels(data, aae.Config())[1].shape == (200, 0)
    assert aae.turns(25, y_test).argmax(1).tolist() == [*range(10), *range(10), *range(5)]
    assert aae.turns(25, y_test[:, :0]).shape == (25, 0)
    with pytest.raises(SystemExit):
        aae.given_labels(data._replace(y_train=None), aae.Config(labels=True))


# Pictures


@pytest.mark.parametrize("labels", (False, True))
def test_drawing_leaves_the_nets_alone(labels, monkeypatch):
    config, data = aae.Config(labels=labels), toy_data()
    nets = settled(config, data, 10 * labels)
    before, run, seen = state_of(nets), fake_run(nets, config), see(monkeypatch)
    aae.draw(run, data, config)
    x, y = data.x_test[:50], aae.given_labels(data, config)[1][:50]
    nets.eval()
    ((x_shown, x_rec),) = seen["pairs"]
    assert x_shown.equal(data.images(x))
    assert x_rec.equal(aae.decode(run, data, nets["Q"](x), y))
    nets.train()
    monkeypatch.setattr(aae, "movie", lambda run, name, *_: run.names.append(name))
    aae.animate(run, data, config)
    assert_same(before, state_of(nets))
    if labels:
        names = ["samples", "reconstructions", "style", "grid", "dimensions", "style"]
    else:
        names = ["samples", "reconstructions", "grid", "dimensions"]
    assert run.names == names


def test_a_code_of_fewer_dimensions_is_one_of_the_first():
    config, data, y = aae.Config(latent_dim=7), toy_data(), torch.empty(1, 0)
    run, z = fake_run(start(config, 0)[0].eval(), config), torch.randn(4, 5)
    whole = torch.cat([z, torch.zeros(4, 2)], 1)
    assert aae.decode(run, data, z, y).equal(aae.decode(run, data, whole, y))


def test_animations_are_small_and_show_the_codes_they_name(tmp_path):
    """With a P of noise, which compresses worst."""
    config, data = aae.Config(labels=True), toy_data()
    nets = start(config, 10)[0]
    nets["P"] = nn.Linear(15, 784).requires_grad_(False)
    nn.init.normal_(nets["P"].weight)
    run = fake_run(nets, config)
    run.dir = tmp_path
    aae.animate(run, data, config)
    frames = {}
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            frames[path.name] = image.n_frames, image.size
        assert path.stat().st_size < 1e6, path
    assert frames["grid.gif"] == (10, (25 * 14, 25 * 14))
    assert frames["dimensions.gif"] == (50, (140, 140))
    assert frames["style.gif"] == (91, (140, 140))

    def shown(name, frame, row, column, side=28):
        with Image.open(tmp_path / name) as image:
            image.seek(frame)
            pixels = np.asarray(image.convert("L")) / 255
        row, column = side * row, side * column
        return torch.tensor(pixels[row : row + side, column : column + side]).float()

    def decoded(z, y):
        return nets["P"](torch.tensor([*z, *y])).sigmoid().view(28, 28)

    y = one_hot(data.y_test[0], 10).tolist()
    near = {"rtol": 0, "atol": 0.04}  # half a shade of 16
    corner = shown("dimensions.gif", 29, 4, 0)  # the third dimension at its end, the next at theirs
    torch.testing.assert_close(corner, decoded([0, 0, 3, 1.8, -1.8], y), **near)
    place = shown("grid.gif", 0, 5 * 4 + 1, 5 * 0 + 2, side=14)
    x = decoded([-3, 1.8, -1.8, -0.9, 0], y)
    torch.testing.assert_close(place, x.view(14, 2, 14, 2).mean((1, 3)), **near)
    z = (3 * torch.rand(25, 5, generator=torch.Generator().manual_seed(0)) - 1.5)[7].tolist()
    for frame, y in ((0, {0: 1.0}), (90, {9: 1.0}), (15, {1: 1 - 0.5**0.5, 2: 0.5**0.5})):
        y = [y.get(k, 0.0) for k in range(10)]
        torch.testing.assert_close(shown("style.gif", frame, 1, 2), decoded(z, y), **near)


def test_own_faces(monkeypatch, tmp_path):
    """200 pictures of rectangles on gradients."""
    monkeypatch.setattr(aae, "evaluate", lambda *_, **__: {"eval/recon_mse": 0.0})
    (tmp_path / "faces").mkdir()
    slope = np.linspace(0, 255, 40)[None, :, None] * np.ones((36, 1, 3))
    for i in range(200):
        random = np.random.default_rng(i)
        x = slope * random.uniform(0.2, 1, 3)
        top, left = random.integers(20, size=2)
        x[top : top + 12, left : left + 12] = random.integers(255, size=3)
        Image.fromarray(x.astype(np.uint8)).save(tmp_path / "faces" / f"{i}.png")
    options = ["--preset", "faces", "--dataset", f"folder:{tmp_path / 'faces'}", "--smoke"]
    train(monkeypatch, aae, *options, "--batch-size", 20, "--epochs", 1, "--out-dir", tmp_path)
    (path,) = tmp_path.glob("aae_freiburg/*/model.pt")
    saved = torch.load(path, weights_only=True)
    assert saved["Q"]["1.weight"].shape == (16, 3, 3, 3) and saved["config"]["latent_dim"] == 50
    for name in ("grid.gif", "dimensions.gif"):
        assert 0 < (path.parent / name).stat().st_size < 1e6
    assert not (path.parent / "style.gif").exists()
