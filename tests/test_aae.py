"""AAE: nets, priors, losses, the three phases, the balance and plateau rules, labels, clusters."""

import math
from types import SimpleNamespace

import shared

import aae
import aae_semi_supervised as semi
import numpy as np
import pytest
import torch
from conftest import assert_same, toy_data, train, watch
from PIL import Image
from scipy.stats import wasserstein_distance
from torch import nn
from torch.nn.functional import binary_cross_entropy, one_hot

MNIST, FACE = torch.Size((1, 28, 28)), torch.Size((3, 32, 32))
PHASES = [("P", {"P"}), ("Q_rec", {"Q"}), ("D", {"D"}), ("Q_reg", {"Q"})]
SEMI_PHASES = [*PHASES[:2], ("D", {"D_y", "D_z"}), ("Q_reg", {"Q"}), ("Q_sup", {"Q"})]


def preset(name, **changes):
    return aae.Config(**aae.PRESETS[name] | {"preset": name} | changes)


def size(net):
    return sum(p.numel() for p in net.parameters())


def start(config, K):
    torch.manual_seed(0)
    nets = aae.build(config, MNIST, K)
    return nets, aae.optimizers(nets, config)


def x_and_y(n=8, K=10):
    return torch.rand(n, 784), one_hot(torch.arange(n) % 10, 10).float()[:, :K]


def record(monkeypatch):
    """Puts spies in place of the shared instruments; returns what they were given."""
    given = {}

    def image_metrics(data, x_rec=None, x_fake=None):
        given.setdefault("images", []).append((x_rec, x_fake))
        return {}

    def code_metrics(data, train, test, kind, full=True):
        given[kind] = train, test
        return {}

    monkeypatch.setattr(shared, "image_metrics", image_metrics)
    monkeypatch.setattr(shared, "code_metrics", code_metrics)
    return given


def state_of(nets):
    """All that an evaluation must leave alone: the nets, their mode, the random numbers."""
    state = {name: value.clone() for name, value in nets.state_dict().items()}
    return state, nets.training, torch.get_rng_state()


def fake_run(nets, config):
    """A run that keeps its pictures' names, and draws nothing."""
    names = []
    run = SimpleNamespace(nets=nets, epoch=config.epochs, names=names)
    run.picture = lambda name, figure: names.append(name)
    return run


# Nets


@pytest.mark.parametrize("K", (0, 10))
def test_dense_sizes(K):
    nets = aae.build(aae.Config(), MNIST, K)
    norms = 2 * 2 * 1000
    assert size(nets["Q"]) == 785 * 1000 + 1001 * 1000 + 1001 * 5 + norms
    assert size(nets["P"]) == (6 + K) * 1000 + 1001 * 1000 + 1001 * 784 + norms
    assert size(nets["D"]) == (6 + K) * 500 + 501 * 500 + 501
    nets = aae.build(preset("aae_pytorch"), MNIST, K)
    assert size(nets["Q"]) == 785 * 1000 + 1001 * 1000 + 1001 * 2
    assert size(nets["D"]) == (3 + K) * 1000 + 1001 * 1000 + 1001
    dropouts = [m.p for m in nets.modules() if isinstance(m, nn.Dropout)]
    assert sorted(set(dropouts)) == [0.2, 0.25]


@pytest.mark.parametrize(
    "shape, Z, K, channels, sizes",
    [
        (MNIST, 5, 10, (16, 32, 64), (28, 14, 7)),
        (FACE, 50, 0, (16, 32, 64, 128), (32, 16, 8, 4)),
    ],
)
def test_convolutions_are_freiburgs(shape, Z, K, channels, sizes):
    nets = aae.build(aae.Config(net="conv", latent_dim=Z), shape, K)
    seen = {"Q": [], "P": []}

    def look(name):
        return lambda layer, _, out: seen[name].append((layer.kernel_size[0], *out.shape[1:]))

    for name in seen:
        for layer in nets[name]:
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                layer.register_forward_hook(look(name))
    x = torch.rand(2, shape.numel())
    assert nets["P"](torch.cat([nets["Q"](x), x[:, :K]], 1)).shape == x.shape
    kernels = [3, *(4 for _ in channels[1:])]
    down = list(zip(kernels, channels, sizes, sizes, strict=True))
    assert seen["Q"] == [*down, (sizes[-1], Z, 1, 1)]
    up = zip([sizes[-1], *kernels[1:]], channels[::-1], sizes[::-1], sizes[::-1], strict=True)
    assert seen["P"] == [*up, (3, *shape)]
    assert len([m for m in nets.modules() if isinstance(m, nn.BatchNorm2d)]) == 2 * len(channels)


# Losses and phases


def test_losses():
    D, (z, z_fake) = nn.Sequential(nn.Linear(3, 1)), torch.randn(2, 6, 3)
    real, fake = D(z).sigmoid(), D(z_fake).sigmoid()
    ones, zeros = torch.ones(6, 1), torch.zeros(6, 1)
    expected = binary_cross_entropy(real, ones) + binary_cross_entropy(fake, zeros)
    for module in (aae, semi):
        torch.testing.assert_close(module.L_D(D, z, z_fake), expected)
        torch.testing.assert_close(module.L_Q(D, z_fake), binary_cross_entropy(fake, ones))
    x, logits = torch.rand(4, 7), torch.randn(4, 7)
    bce = binary_cross_entropy(logits.sigmoid(), x)
    torch.testing.assert_close(aae.L_rec(logits, x, "bce"), bce)
    for mse in (aae.L_rec(logits, x, "mse"), semi.L_rec(logits, x)):
        torch.testing.assert_close(mse, (x - logits.sigmoid()).pow(2).sum() / 28)


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
    assert aae.balance(2 * l_D, l_Q) == trains  # its l_D is half the sum of two cross-entropies


def test_which_net_moves_in_which_phase():
    def moves(config, before=aae.GUESSING):
        nets, opts = start(config, 10)
        notes = watch(nets, **opts)
        return notes, aae.train_step(nets, opts, *x_and_y(), config, before)

    for config in (preset("freiburg"), preset("aae_pytorch")):
        notes, losses = moves(config)
        assert notes == PHASES and losses["trains_D"] == losses["trains_Q"] == 1
    ahead, behind = {"L_D": 2 * 0.3, "L_Q": 1.5}, {"L_D": 2 * 1.2, "L_Q": 0.2}
    notes, losses = moves(aae.Config(), ahead)
    assert notes == [PHASES[i] for i in (0, 1, 3)]
    assert (losses["trains_D"], losses["trains_Q"]) == (0, 1) and losses["L_D"] > 0
    notes, losses = moves(aae.Config(), behind)
    assert notes == PHASES[:3]
    assert (losses["trains_D"], losses["trains_Q"]) == (1, 0) and losses["L_Q"] > 0
    assert moves(aae.Config(balance=False), ahead)[0] == PHASES
    notes, losses = moves(aae.Config(lr_Q=0.0))  # a plain autoencoder
    assert notes == PHASES[:2] and losses.keys() == {"L_rec"}


def test_each_role_has_its_own_rate():
    config = aae.Config(lr=1.0, lr_D=2.0, lr_Q=3.0, beta1=0.4)
    groups = {role: opt.param_groups[0] for role, opt in start(config, 0)[1].items()}
    rates = {role: group["lr"] for role, group in groups.items()}
    assert rates == {"P": 1, "Q_rec": 1, "D": 2, "Q_reg": 3}
    assert all(group["betas"] == (0.4, 0.999) for group in groups.values())


@pytest.mark.parametrize("phase", ("reconstruction", "discriminator", "generator"))
def test_each_phase_descends_its_written_loss(phase):
    """With SGD at rate 1 in this phase and 0 in the others, weights move by the loss's gradient."""
    config = aae.Config(prior="gaussian", batch_norm=False)
    nets = start(config, 10)[0].double()
    Q, P, D = nets["Q"], nets["P"], nets["D"]
    x, y = (part.double() for part in x_and_y())
    rates = {"P": 0.0, "Q_rec": 0.0, "D": 0.0, "Q_reg": 0.0}
    for role in {"reconstruction": ("P", "Q_rec"), "discriminator": ("D",)}.get(phase, ("Q_reg",)):
        rates[role] = 1.0
    opts = {role: torch.optim.SGD(nets[role[0]].parameters(), lr) for role, lr in rates.items()}
    torch.manual_seed(1)
    z = torch.randn(8, 5)  # as the step draws it
    with_y = torch.cat([Q(x), y], 1)
    real, fake = D(torch.cat([z, y], 1)).sigmoid(), D(with_y).sigmoid()
    loss, moving = {
        "reconstruction": ((x - P(with_y).sigmoid()).square().mean(), (Q, P)),
        "discriminator": (-(real.log() + (1 - fake).log()).mean(), (D,)),
        "generator": (-fake.log().mean(), (Q,)),
    }[phase]
    parameters = list(nn.ModuleList(moving).parameters())
    expected = [
        p - g for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True)
    ]
    others = {p: p.clone() for p in nets.parameters() if all(p is not q for q in parameters)}
    torch.manual_seed(1)
    aae.train_step(nets, opts, x, y, config, aae.GUESSING)
    torch.testing.assert_close(parameters, [p.detach() for p in expected])
    assert all(p.equal(before) for p, before in others.items())


def test_q_is_in_evaluation_mode_while_D_learns(monkeypatch):
    shown, L_D = [], aae.L_D

    def spy(D, z, z_fake):
        shown.append(z_fake)
        return L_D(D, z, z_fake)

    monkeypatch.setattr(aae, "L_D", spy)
    x, y = x_and_y(K=0)
    for q_eval in (True, False):
        config = aae.Config(batch_norm=False, dropout=0.5, q_eval=q_eval, lr_Q=1e-30)
        nets, opts = start(config, 0)
        aae.train_step(nets, opts, x, y, config, aae.GUESSING)
        assert not shown[-1].requires_grad and nets["Q"].training
        without_dropout = torch.allclose(shown[-1], nets["Q"].eval()(x), atol=1e-6)
        assert without_dropout == q_eval


# Schedules


def trained(monkeypatch, tmp_path, losses, *arguments, module=aae):
    """main with a train_step that notes its arguments and returns these losses."""
    calls = []

    def train_step(*args):
        calls.append(args)
        return {name: torch.tensor(loss) for name, loss in losses.items()}

    monkeypatch.setattr(module, "train_step", train_step)
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: {"eval/recon_mse": 0.0})
    monkeypatch.setattr(module, "draw", lambda *_: None)
    train(monkeypatch, module, "--smoke", "--out-dir", tmp_path, "--run-name", "a", *arguments)
    path = tmp_path / module.__name__ / "a/checkpoint.pt"
    return calls, torch.load(path, weights_only=True)


def test_the_balance_begins_anew_in_each_epoch(monkeypatch, tmp_path, cheap):
    calls, _ = trained(monkeypatch, tmp_path, {"L_rec": 1.0, "L_D": 7.0, "L_Q": 8.0})
    before = [(float(args[-1]["L_D"]), float(args[-1]["L_Q"])) for args in calls]
    guessing = pytest.approx((2 * math.log(2), math.log(2)))
    assert len(before) == 2 * 15
    assert [i for i, pair in enumerate(before) if pair == guessing] == [0, 15]
    assert set(before[1:15] + before[16:]) == {(7.0, 8.0)}


def test_main_gives_each_image_its_class(monkeypatch, tmp_path, cheap):
    calls, _ = trained(monkeypatch, tmp_path, {"L_rec": 1.0, "L_D": 1.0, "L_Q": 1.0}, "--labels")
    data = shared.load_data(aae.Config(smoke=True), torch.device("cpu"))
    for _, _, x, y, *_ in calls[:2]:
        i = torch.cdist(x, data.x_train).argmin(1)
        assert y.shape == (128, 10) and y.argmax(1).equal(data.y_train[i])


def test_a_stagnant_loss_divides_the_rates_by_5(monkeypatch, tmp_path, cheap):
    _, saved = trained(monkeypatch, tmp_path, {"L_rec": 1.0}, "--lr-Q", 0, "--patience", 1)
    assert [row["train/lr"] for row in saved["history"]["rows"]] == [2e-4, 2e-4]
    rates = [saved[role]["param_groups"][0]["lr"] for role in ("P", "Q_rec", "D")]
    assert rates == pytest.approx([4e-5] * 3)


def test_less_than_one_percent_is_stagnant():
    def rate_after(progress, patience=3):
        opts = {"P": torch.optim.Adam([nn.Parameter(torch.zeros(1))], 1.0)}
        rules = aae.plateau_rules(opts, aae.Config(patience=patience))
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

    config = parsed("--preset", "aae_pytorch", "--lr-D", "0.1")
    assert (config.dropout, config.lr, config.lr_D, config.batch_size) == (0.25, 6e-4, 0.1, 100)
    assert (config.prior, config.q_eval, config.balance) == ("gaussian", True, False)
    config = parsed("--preset=faces", "--dataset=folder:/some/faces")
    assert (config.net, config.latent_dim) == ("conv", 50)
    assert parsed().preset == "freiburg" and parsed().lr_Q == 2e-4


@pytest.mark.parametrize(
    "module, words, complaint",
    [
        (semi, ["--labels", "1001"], "multiple of 10"),
        (semi, ["--cluster", "30", "--labels", "100"], "without --labels"),
        (semi, ["--cluster", "1"], "one cluster is none"),
    ],
)
def test_bad_input(module, words, complaint, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, module, "--smoke", "--out-dir", tmp_path, *words)
    assert stop.value.code == 2 and complaint in capsys.readouterr().err


# Priors and their distance


def test_priors():
    torch.manual_seed(0)

    def draw(name):
        return aae.sample_prior(torch.empty(20_000, 0), aae.Config(prior=name, latent_dim=2))

    z = draw("truncated")
    assert z.abs().max() <= 2 and z.std().item() == pytest.approx(0.8796, abs=0.01)
    assert draw("gaussian").std().item() == pytest.approx(1, rel=0.02)


def test_a_prior_with_a_seed_leaves_the_random_numbers_alone():
    y, before = torch.empty(50, 0), torch.get_rng_state()
    for name in ("gaussian", "truncated"):
        config = aae.Config(prior=name, latent_dim=2)
        once, again, other = (aae.sample_prior(y, config, seed) for seed in (1, 1, 2))
        assert once.equal(again) and not once.equal(other)
    assert torch.get_rng_state().equal(before)


def test_sliced_wasserstein_and_the_floor():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 500, 1, generator=generator) * torch.tensor([[[1.0]], [[2.0]]])
    expected = wasserstein_distance(a[:, 0].numpy(), b[:, 0].numpy() + 1)
    assert aae.sliced_wasserstein(a, b + 1) == pytest.approx(expected, rel=1e-5)
    shift = torch.tensor([3.0, 4.0])  # E |θ·shift| = ‖shift‖ 2/π for a direction θ in the plane
    a = torch.randn(500, 2)
    assert aae.sliced_wasserstein(a, a + shift) == pytest.approx(10 / math.pi, rel=0.1)
    config, y = aae.Config(latent_dim=2), torch.empty(1000, 0)
    gap, floor = aae.prior_gap(aae.sample_prior(y, config, 99), y, config)
    assert gap == pytest.approx(floor, rel=1) and floor < 0.06
    assert aae.prior_gap(1.5 * aae.sample_prior(y, config, 99), y, config)[0] > 0.2


# Evaluation


def settled(config, data, K):
    """Nets after a step, so that their batch norm's running statistics are not a batch's."""
    nets, opts = start(config, K)
    y = aae.given_labels(data, config)[0]
    aae.train_step(nets, opts, data.x_train[:64], y[:64], config, aae.GUESSING)
    return nets


@pytest.mark.parametrize("labels", (False, True))
def test_what_evaluate_measures(labels, monkeypatch):
    config, data = aae.Config(labels=labels, dropout=0.3), toy_data()
    nets, turns = settled(config, data, 10 * labels), aae.turns
    before, given = state_of(nets), record(monkeypatch)
    monkeypatch.setattr(aae, "turns", lambda n, y: turns(n // 50, y))  # of 10,000 samples
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
        y_train, y_test = aae.given_labels(data, config)
        gap, floor = aae.prior_gap(Q(data.x_test), y_test, config)
        gap_train, _ = aae.prior_gap(Q(data.x_train[:200]), y_train[:200], config)
    assert metrics["eval/prior_gap"] == pytest.approx(gap, rel=1e-4)
    assert metrics["eval/prior_gap_floor"] == pytest.approx(floor, rel=1e-4)
    assert metrics["eval/prior_gap_train"] == pytest.approx(gap_train, rel=1e-4)


def test_long_features_of_convolutions_come_before_the_last_layer(monkeypatch):
    config, data = aae.Config(net="conv"), toy_data(n=20, m=10)
    monkeypatch.setattr(aae, "turns", lambda n, y: y[:10])  # fewer samples
    nets, given = start(config, 0)[0], record(monkeypatch)
    aae.evaluate(nets, data, config, full=True)
    last = nets["Q"][-2]
    z = last(given["long"][1].unflatten(1, (64, 7, 7))).flatten(1)
    torch.testing.assert_close(z, given["short"][1])


@pytest.mark.parametrize("labels", (False, True))
def test_drawing_leaves_the_nets_alone(labels):
    config, data = aae.Config(labels=labels), toy_data()
    nets = settled(config, data, 10 * labels)
    before, run = state_of(nets), fake_run(nets, config)
    aae.draw(run, data, config)
    assert_same(before, state_of(nets))
    pictures = ["samples", "reconstructions", "codes"]
    assert run.names == ([*pictures, "style"] if labels else pictures)


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


def test_own_faces(monkeypatch, tmp_path):
    monkeypatch.setattr(aae, "evaluate", lambda *_, **__: {"eval/recon_mse": 0.0})
    (tmp_path / "faces").mkdir()
    for i in range(102):
        x = np.random.default_rng(i).integers(255, size=(20, 30, 3), dtype=np.uint8)
        Image.fromarray(x).save(tmp_path / "faces" / f"{i}.png")
    options = ["--preset", "faces", "--dataset", f"folder:{tmp_path / 'faces'}", "--smoke"]
    train(monkeypatch, aae, *options, "--batch-size", 5, "--epochs", 1, "--out-dir", tmp_path)
    (path,) = tmp_path.glob("aae/*/model.pt")
    saved = torch.load(path, weights_only=True)
    assert saved["Q"]["1.weight"].shape == (16, 3, 3, 3) and saved["config"]["latent_dim"] == 50


# Semi-supervised


def semi_start(config, K, X=784):
    torch.manual_seed(0)
    nets = semi.build(config, X, K)
    return nets, semi.optimizers(nets, config)


@pytest.mark.parametrize("cluster, K", ((0, 10), (7, 7)))
def test_semi_supervised_phases(cluster, K):
    config = semi.Config(cluster=cluster)
    nets, opts = semi_start(config, K)
    assert size(nets["Q"]) == 785 * 1000 + 1001 * 1000 + 1001 * (K + 10) + 4000
    notes, x = watch(nets, **opts), torch.rand(8, 784)
    labelled = None if cluster else (torch.rand(4, 784), torch.arange(4))
    losses = semi.train_step(nets, opts, x, labelled, config)
    assert notes == SEMI_PHASES[: 4 if cluster else 5] and ("L_sup" in losses) == (not cluster)
    y, z = semi.code(nets["Q"], x, config)
    assert y.shape == (8, K) and z.shape == (8, 10)
    torch.testing.assert_close(y.sum(1), torch.ones(8))


@pytest.mark.parametrize("role", ("P", "D", "Q_reg", "Q_sup"))
def test_each_semi_supervised_phase_descends_its_written_loss(role):
    config, K = semi.Config(latent_dim=3, hidden_D=5, noise=0.0), 4
    nets = semi_start(config, K, X=6)[0].double()
    roles = {"P": ["P"], "Q_rec": ["Q"], "Q_reg": ["Q"], "Q_sup": ["Q"], "D": ["D_y", "D_z"]}
    moving = {"P": ["Q", "P"]}.get(role, roles[role])
    opts = {}
    for name, members in roles.items():
        rate = float(name == role or (role, name) == ("P", "Q_rec"))
        parameters = nn.ModuleList(nets[member] for member in members).parameters()
        opts[name] = torch.optim.SGD(parameters, rate)
    x, x_l, k_l = torch.rand(8, 6).double(), torch.rand(5, 6).double(), torch.arange(5) % 4
    torch.manual_seed(1)
    y = one_hot(torch.randint(K, (8,)), K).double()  # as the step draws them
    z = torch.randn(8, 3, dtype=torch.float64)
    a = nets["Q"](x)
    fake = {"D_y": a[:, :K].exp() / a[:, :K].exp().sum(1, keepdim=True), "D_z": a[:, K:]}
    loss_D, loss_Q = 0.0, 0.0
    for name, real in (("D_y", y), ("D_z", z)):
        D_real, D_fake = (nets[name](c).sigmoid() for c in (real, fake[name]))
        loss_D = loss_D - (D_real.log() + (1 - D_fake).log()).mean()
        loss_Q = loss_Q - D_fake.log().mean()
    x_rec = nets["P"](torch.cat(list(fake.values()), 1)).sigmoid()
    sup = -nets["Q"](x_l)[:, :K].log_softmax(1)[torch.arange(5), k_l].mean()
    losses = {"P": (x - x_rec).square().mean(), "D": loss_D, "Q_reg": loss_Q, "Q_sup": sup}
    parameters = list(nn.ModuleList(nets[name] for name in moving).parameters())
    gradients = torch.autograd.grad(losses[role], parameters)
    expected = [p - g for p, g in zip(parameters, gradients, strict=True)]
    others = {p: p.clone() for p in nets.parameters() if all(p is not q for q in parameters)}
    torch.manual_seed(1)
    semi.train_step(nets, opts, x, (x_l, k_l), config)
    torch.testing.assert_close(parameters, [p.detach() for p in expected])
    assert all(p.equal(before) for p, before in others.items())


def test_noise_in_training_alone():
    noise, x = semi.Noise(0.3), torch.zeros(100, 100)
    assert noise(x).std().item() == pytest.approx(0.3, rel=0.05)
    assert noise.eval()(x) is x


def test_labels_are_balanced_and_drawn_by_seed():
    y = torch.arange(1000) % 10
    a, again, b = (semi.balanced(y, 100, seed) for seed in (0, 0, 1))
    assert y[a].bincount().tolist() == [10] * 10 and len(set(a.tolist())) == 100
    assert a.equal(again) and not a.equal(b)
    assert sorted(semi.balanced(y, 0, 0).tolist()) == list(range(1000))


def test_labelled_batches_are_of_the_chosen_labels_alone(monkeypatch, tmp_path, cheap):
    """With 100 labels main never shows the class of another image; rates fall at the end."""
    rates, set_rates = [], semi.set_rates

    def spy(opts, config, done):
        set_rates(opts, config, done)
        rates.append(opts["Q_sup"].param_groups[0]["lr"])

    monkeypatch.setattr(semi, "set_rates", spy)
    calls, _ = trained(monkeypatch, tmp_path, {"L_rec": 1.0}, "--labels", 100, module=semi)
    data = shared.load_data(semi.Config(smoke=True), torch.device("cpu"))
    chosen = semi.balanced(data.y_train, 100, 0)
    seen = set()
    for _, _, x, (x_l, k_l), _ in calls:
        i = torch.cdist(x_l, data.x_train).argmin(1)
        assert x_l.shape == x.shape == (100, 784) and k_l.equal(data.y_train[i])
        seen |= set(i.tolist())
    assert seen == set(chosen.tolist()) and len(calls) == 2 * 20  # 100 images, in 4,000 draws
    falling = [0.004 * (1 - i / 20) for i in range(20)]
    assert rates == pytest.approx([0.004] * 20 + falling)


def test_rates_fall_linearly():
    config = semi.Config(lr=1.0, reg_lr=2.0, sup_lr=3.0, decay=0.5)
    opts = semi_start(config, 10)[1]
    for done, share in ((0, 1), (0.5, 1), (0.75, 0.5), (1, 0)):
        semi.set_rates(opts, config, done)
        rates = {name: opt.param_groups[0]["lr"] for name, opt in opts.items()}
        expected = {"Q_rec": 1, "P": 1, "Q_sup": 3, "D": 2, "Q_reg": 2}
        assert rates == {name: rate * share for name, rate in expected.items()}


def test_clusters_take_the_class_of_their_surest_training_image():
    y = torch.tensor([[0.9, 0.1, 0], [0.6, 0.4, 0], [0, 0.3, 0.7], [0.1, 0.8, 0.1], [0, 0.1, 0.9]])
    data = toy_data()._replace(y_train=torch.tensor([4, 5, 6, 7, 8]))
    assert semi.class_of_each(y, data, semi.Config(cluster=3)).tolist() == [4, 7, 8]
    assert semi.class_of_each(y, data, semi.Config()).tolist() == [0, 1, 2]


@pytest.mark.parametrize("cluster", (0, 12))
def test_what_the_semi_supervised_evaluate_measures(cluster, monkeypatch):
    config, data = semi.Config(cluster=cluster), toy_data()
    K = cluster or 10
    nets, opts = semi_start(config, K)
    semi.train_step(nets, opts, data.x_train[:64], None, config)
    before, given, prior = state_of(nets), record(monkeypatch), semi.prior
    monkeypatch.setattr(semi, "prior", lambda n, *rest: prior(n // 50, *rest))  # of 10,000
    metrics = semi.evaluate(nets, data, config, full=True)
    assert_same(before, state_of(nets))
    monkeypatch.setattr(semi, "prior", prior)
    run = fake_run(nets, config)
    semi.draw(run, data, config)
    assert_same(before, state_of(nets))
    pictures = ["samples", "reconstructions", "style"]
    assert run.names == ([*pictures, "clusters"] if cluster else pictures)
    Q, P = nets.eval()["Q"], nets["P"]
    with torch.no_grad():
        train_y, test_y = Q(data.x_train)[:, :K].softmax(1), Q(data.x_test)[:, :K].softmax(1)
        short = [
            torch.cat([train_y, Q(data.x_train)[:, K:]], 1),
            torch.cat([test_y, Q(data.x_test)[:, K:]], 1),
        ]
        ((x_rec, x_fake),) = given["images"]
        torch.testing.assert_close(x_rec, P(short[1]).sigmoid())
        z = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
        y = one_hot(torch.arange(200) % K, K).float()
        torch.testing.assert_close(x_fake, P(torch.cat([y, z], 1)).sigmoid())
        for i in range(2):
            x = (data.x_train, data.x_test)[i]
            torch.testing.assert_close(given["short"][i], short[i])
            torch.testing.assert_close(given["long"][i], Q[:-1](x))
    classes = data.y_train[train_y.argmax(0)] if cluster else torch.arange(K)
    wrong = (classes[test_y.argmax(1)] != data.y_test).float().mean()
    assert metrics["eval/error"] == pytest.approx(100 * wrong.item(), abs=1e-4)
