"""Semi-supervised AAE: phases, labels, clusters, what is measured and drawn."""

from types import SimpleNamespace

import shared

import aae_semi_supervised as semi
import pytest
import torch
from conftest import assert_same, fake_run, record, size, state_of, toy_data, train, trained, watch
from torch import nn
from torch.nn.functional import binary_cross_entropy, one_hot

PHASES = [("P", {"P"}), ("Q_rec", {"Q"}), ("D", {"D_y", "D_z"}), ("Q_reg", {"Q"}), ("Q_sup", {"Q"})]


def test_losses():
    D, (z, z_fake) = nn.Sequential(nn.Linear(3, 1)), torch.randn(2, 6, 3)
    real, fake = D(z).sigmoid(), D(z_fake).sigmoid()
    ones, zeros = torch.ones(6, 1), torch.zeros(6, 1)
    expected = binary_cross_entropy(real, ones) + binary_cross_entropy(fake, zeros)
    torch.testing.assert_close(semi.L_D(D, z, z_fake), expected)
    torch.testing.assert_close(semi.L_Q(D, z_fake), binary_cross_entropy(fake, ones))
    x, logits = torch.rand(4, 7), torch.randn(4, 7)
    torch.testing.assert_close(semi.L_rec(logits, x), (x - logits.sigmoid()).pow(2).sum() / 28)


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
    assert notes == PHASES[: 4 if cluster else 5] and ("L_sup" in losses) == (not cluster)
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
    rates, set_learning_rates = [], semi.set_learning_rates

    def spy(opts, config, done):
        set_learning_rates(opts, config, done)
        rates.append(opts["Q_sup"].param_groups[0]["lr"])

    monkeypatch.setattr(semi, "set_learning_rates", spy)
    how = ["--labels", 100, "--seed", 3]
    calls, _ = trained(monkeypatch, tmp_path, semi, {"L_rec": 1.0}, *how)
    data = shared.load_data(semi.Config(smoke=True), torch.device("cpu"))
    chosen = semi.balanced(data.y_train, 100, 3)
    drawn = set()
    for _, _, x, (x_l, k_l), _ in calls:
        i = torch.cdist(x_l, data.x_train).argmin(1)
        assert x_l.shape == x.shape == (100, 784) and k_l.equal(data.y_train[i])
        drawn |= set(i.tolist())
    assert drawn == set(chosen.tolist()) and len(calls) == 2 * 20  # 100 images, in 4,000 draws
    falling = [0.004 * (1 - i / 20) for i in range(20)]
    assert rates == pytest.approx([0.004] * 20 + falling)


def test_rates_fall_linearly():
    config = semi.Config(lr=1.0, lr_reg=2.0, lr_sup=3.0, decay=0.5)
    opts = semi_start(config, 10)[1]
    assert all(opt.defaults["betas"] == (0.5, 0.999) for opt in opts.values())
    for progress, share in ((0, 1), (0.5, 1), (0.75, 0.5), (1, 0)):
        semi.set_learning_rates(opts, config, progress)
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
    before, given = state_of(nets), record(monkeypatch)
    metrics = semi.evaluate(nets, data, config, full=True)
    assert_same(before, state_of(nets))
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
    empty = set(range(K)) - set(test_y.argmax(1).tolist())
    assert metrics.get("eval/empty_clusters") == (len(empty) if cluster else None)


def test_what_D_y_thinks_of_filled_and_empty_clusters_and_halfway():
    def D_y(y):  # 1, 2, 4, 8 of the corners, and much less for what is none
        logits = y @ torch.tensor([1.0, 2, 4, 8])
        return torch.where(y.max(-1).values < 1, logits - 100, logits)[..., None]

    metrics = semi.cluster_metrics(D_y, torch.tensor([0, 0, 2]), 4)
    assert metrics["eval/empty_clusters"] == 2
    assert metrics["eval/D_y_filled"] == 2.5 and metrics["eval/D_y_empty"] == 5
    assert metrics["eval/D_y_between"] == pytest.approx(3.75 - 100)
    none_empty = semi.cluster_metrics(D_y, torch.tensor([3, 2, 1, 0]), 4)
    assert none_empty == {"eval/empty_clusters": 0, "eval/D_y_filled": 3.75}


def test_noise_y_is_on_the_input_of_D_y_alone_and_in_training():
    config, y = semi.Config(cluster=7, noise_y=0.3), torch.eye(7)
    D_y, D_z = (semi_start(config, 7)[0][name] for name in ("D_y", "D_z"))
    shown = []
    D_y[1].register_forward_hook(lambda net, given, out: shown.append(given[0] - y))
    D_y(y)
    assert shown[0].std().item() == pytest.approx(0.3, rel=0.5)
    D_y.eval()(y)
    assert not shown[1].any()
    assert D_z(torch.ones(1, 10)).equal(D_z(torch.ones(1, 10)))


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--labels", "1001"], "multiple of 10"),
        (["--cluster", "30", "--labels", "100"], "without --labels"),
        (["--cluster", "1"], "two or more"),
    ],
)
def test_bad_input(words, complaint, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, semi, "--smoke", "--out-dir", tmp_path, *words)
    assert stop.value.code == 2 and complaint in capsys.readouterr().err


@torch.no_grad()
def test_rows_of_a_style_with_each_class_and_of_a_clusters_images(monkeypatch):
    config, data, sheets = semi.Config(cluster=12), toy_data(), {}
    nets = semi_start(config, 12)[0]
    monkeypatch.setattr(shared, "pairs", lambda *images_and_title: images_and_title)
    monkeypatch.setattr(shared, "grid", lambda images, *_: images.flatten(1))
    semi.draw(SimpleNamespace(nets=nets, epoch=1, picture=sheets.__setitem__), data, config)
    Q, P = nets.eval()["Q"], nets["P"]
    y, z = semi.code(Q, data.x_test, config)
    one, entries = torch.eye(12), y.argmax(1)
    k = entries[0]

    def decode(*codes):
        return P(torch.cat(codes, -1)).sigmoid()

    close = torch.testing.assert_close
    x, x_rec, _ = sheets["reconstructions"]
    close(x.flatten(1), data.x_test[:50])
    close(x_rec.flatten(1), decode(y[:50], z[:50]))
    rows = sheets["style"].unflatten(0, (10, 13))
    close(rows[:, 0], data.x_test[:10])
    close(rows[3, 6], decode(one[5], z[3]))
    rows = sheets["clusters"].unflatten(0, (12, 16))
    close(rows[k, 0], decode(one[k], torch.zeros(10)))
    close(rows[k, 1], data.x_test[0])
    assert rows[k, 1:].ne(1).any(1).sum() == min(15, (entries == k).sum())
