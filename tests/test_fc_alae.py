"""The official ALAE: its optimizer, its losses, which nets each step moves, what is evaluated."""

import copy
from types import SimpleNamespace

import shared

import fid_floor
import pytest
import torch
import train_fc_alae as alae
from conftest import FC_ALAE, ROOT, record, toy_data, train, watch
from torch import nn
from torch.nn.functional import leaky_relu, softplus


def small(**options):
    """A Config, nets for 20 pixels and the two optimizers."""
    config = alae.Config(latent_dim=5, **options)
    torch.manual_seed(0)
    nets = alae.build(config, 20)
    opt_ED = alae.LREQAdam(nets["E"], nets["D"], lr=config.lr)
    return config, nets, opt_ED, alae.LREQAdam(nets["F"], nets["G"], lr=config.lr)


def test_the_nets_have_the_official_sizes():
    nets = alae.build(alae.Config(), 784)
    sizes = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    assert sizes == {"F": 15_300, "G": 1_905_424, "E": 1_904_690, "D": 5_151}
    shallow = alae.build(alae.Config(**alae.PRESETS["shallow"]), 784)
    assert sum(p.numel() for p in shallow["F"].parameters()) == 2 * 2550


def test_weights_start_at_he_and_biases_at_zero():
    torch.manual_seed(0)
    layer = alae.Linear(800, 500, lrmul=0.1)
    assert layer.weight.std().item() == pytest.approx((2 / 800) ** 0.5, rel=0.01)
    assert not layer.bias.any()


def test_lreq_adam_is_the_official_formula():
    torch.manual_seed(0)
    layer = alae.Linear(6, 3, lrmul=0.1).double()
    assert (layer.weight.c, layer.bias.c) == (pytest.approx(0.1 * (2 / 6) ** 0.5), 0.1)
    w = [p.detach().clone() for p in layer.parameters()]
    v = [torch.zeros_like(p) for p in w]
    optimizer = alae.LREQAdam(layer, lr=0.002, eps=1e-3)  # an ε that shows
    for t in range(1, 8):
        for p, w_, v_ in zip(layer.parameters(), w, v, strict=True):
            g = torch.zeros_like(p) if t == 4 else torch.randn_like(p)
            p.grad = g
            v_.copy_(0.99 * v_ + 0.01 * g**2)
            w_ -= 0.002 * p.c * (1 - 0.99**t) ** 0.5 * g / (v_.sqrt() + 1e-3)
        optimizer.step()
        for p, w_ in zip(layer.parameters(), w, strict=True):
            torch.testing.assert_close(p.detach(), w_, rtol=1e-12, atol=1e-14)


def test_lreq_adam_is_runtime_scaling_under_adam():
    """PGGAN keeps ŵ ~ N(0, 1) and uses w = c ŵ; with β1 = 0 and ε → 0, w takes the same path."""
    torch.manual_seed(0)
    folded = nn.Sequential(alae.Linear(6, 4), nn.LeakyReLU(0.2), alae.Linear(4, 2, lrmul=0.1))
    folded.double()
    cs = [p.c for p in folded.parameters()]
    hats = [(p.detach() / p.c).requires_grad_() for p in folded.parameters()]
    lreq = alae.LREQAdam(folded, lr=0.01, eps=1e-30)
    adam = torch.optim.Adam(hats, lr=0.01, betas=(0.0, 0.99), eps=1e-30)
    for _ in range(50):
        x = torch.randn(8, 6, dtype=torch.float64)
        lreq.zero_grad()
        folded(x).square().sum().backward()
        lreq.step()
        a, b, c, d = (hat * coefficient for hat, coefficient in zip(hats, cs, strict=True))
        adam.zero_grad()
        (leaky_relu(x @ a.T + b, 0.2) @ c.T + d).square().sum().backward()
        adam.step()
    for p, hat in zip(folded.parameters(), hats, strict=True):
        torch.testing.assert_close(p.detach(), p.c * hat.detach(), rtol=1e-9, atol=1e-12)


def test_r1_of_a_linear_critic_is_its_squared_norm():
    D, gamma = nn.Linear(20, 1), 10.0
    loss, r1 = alae.L_adv_ED(D, nn.Identity(), torch.randn(9, 20), torch.randn(9, 20), gamma)
    torch.testing.assert_close(r1, gamma / 2 * D.weight.square().sum())
    assert loss > r1


def test_losses_have_the_papers_signs():
    D, E, zeros = nn.Linear(3, 1), nn.Identity(), torch.zeros(4, 3)
    nn.init.constant_(D.weight, 1.0)
    nn.init.constant_(D.bias, 2.0)  # 2 on zeros, 5 on ones
    loss, _ = alae.L_adv_ED(D, E, x=zeros + 1, x_fake=zeros, gamma=0.0)
    expected = softplus(torch.tensor(2.0)) + softplus(torch.tensor(-5.0))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(alae.L_adv_FG(D, E, zeros), softplus(torch.tensor(-2.0)))


def test_the_target_of_step_iii_is_detached_and_its_input_is_not():
    w = torch.ones(4, 3, requires_grad=True)
    loss = alae.L_err_EG(lambda x: 3 * x, lambda w: w, w)
    torch.testing.assert_close(loss, torch.tensor(4.0))
    loss.backward()  # d (1 − 3w)²/dw with the 1 held fixed: 2·(3 − 1)·3 over 12 entries
    torch.testing.assert_close(w.grad, torch.full((4, 3), 1.0))


def test_what_each_step_moves():
    config, nets, opt_ED, opt_FG = small()
    moments = []
    notes = watch(nets, opt_ED=opt_ED, opt_FG=opt_FG)
    step = opt_ED.step

    def step_and_note():
        step()
        moments.append(opt_ED.state[nets["D"][0].weight]["exp_avg_sq"].clone())

    opt_ED.step = step_and_note
    losses = alae.train_step(nets, opt_ED, opt_FG, torch.rand(8, 20), config)
    assert notes == [
        ("opt_ED", {"E", "D"}),
        ("opt_FG", {"F", "G"}),
        ("opt_ED", {"E"}),
        ("opt_FG", {"F", "G"}),
    ]
    torch.testing.assert_close(moments[1], 0.99 * moments[0])  # zero gradients for D in step III
    assert list(losses) == ["L_adv_ED", "L_adv_FG", "L_err_EG", "r1"]
    assert not any(loss.requires_grad for loss in losses.values())


def test_each_step_has_its_own_gradients_and_weights(monkeypatch):
    """The gradients that the optimizers see are those of the written losses, weights included."""
    config, nets, opt_ED, opt_FG = small(err_weight=0.25)
    found = []
    ED = [*nets["E"].parameters(), *nets["D"].parameters()]
    FG = [*nets["F"].parameters(), *nets["G"].parameters()]
    opt_ED.step = lambda: found.append([p.grad.clone() for p in ED])
    opt_FG.step = lambda: found.append([p.grad.clone() for p in FG])
    x = torch.rand(8, 20)
    torch.manual_seed(1)
    alae.train_step(nets, opt_ED, opt_FG, x, config)
    torch.manual_seed(1)
    z = torch.randn(3, 8, 5)
    F, G = nets["F"], nets["G"]
    E, D = nets["E"], nets["D"]
    loss_I = alae.L_adv_ED(D, E, x, G(F(z[0])).detach(), config.gamma)[0]
    loss_III = 0.25 * alae.L_err_EG(E, G, F(z[2]))
    wanted = [
        torch.autograd.grad(loss_I, ED),
        torch.autograd.grad(alae.L_adv_FG(D, E, G(F(z[1]))), FG),
        torch.autograd.grad(loss_III, ED, retain_graph=True, materialize_grads=True),
        torch.autograd.grad(loss_III, FG),
    ]
    for mine, theirs in zip(found, wanted, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_the_average_keeps_the_share_decay_of_itself():
    _, nets, *_ = small()
    averaged = copy.deepcopy(nets)
    for p, a in zip(nets.parameters(), averaged.parameters(), strict=True):
        nn.init.constant_(p, 1.0)
        nn.init.constant_(a, 0.0)
    alae.update_ema(averaged, nets, 0.75)
    assert all((p == 0.25).all() for p in averaged.parameters())


def test_the_average_is_of_the_trained_nets_and_halves_after_ema_images(
    cheap, few_images, tmp_path, monkeypatch
):
    stepped, updates = [], []

    def train_step(nets, *_):
        stepped.append(nets)
        return {"L": torch.zeros(())}

    monkeypatch.setattr(alae, "update_ema", lambda *given: updates.append(given))
    monkeypatch.setattr(alae, "train_step", train_step)
    how = ["--smoke", "--epochs", 1, "--batch-size", 400, "--ema", 2000, "--out-dir", tmp_path]
    train(monkeypatch, alae, *how)
    averaged, nets, decay = updates[0]
    assert nets is stepped[0] and averaged is not nets
    assert decay ** (2000 / 400) == pytest.approx(0.5)


def test_decay_holds_the_rate_and_then_lets_it_fall_to_its_end():
    config, nets, opt_ED, _ = small(lr=0.004, decay=0.5)
    rates = [alae.learning_rate(config, done) for done in (0.0, 0.5, 0.75, 0.9, 1.0)]
    assert rates == pytest.approx([0.004, 0.004, 0.002, 0.0008, 0.0])
    assert alae.learning_rate(alae.Config(lr=0.004), 0.99) == 0.004
    config.lr_end = 0.25
    ends = [alae.learning_rate(config, done) for done in (0.5, 0.75, 1.0)]
    assert ends == pytest.approx([0.004, 0.0025, 0.001])
    opt_ED.set_lr(0.1)
    by_c = {group["c"]: group["lr"] for group in opt_ED.param_groups}
    assert by_c[nets["E"][0].weight.c] == pytest.approx(0.1 * (2 / 20) ** 0.5)


def test_main_trains_each_net_at_the_falling_rate_on_images_in_the_nets_range(
    cheap, few_images, tmp_path, monkeypatch
):
    rates = []

    def train_step(nets, opt_ED, opt_FG, x, config):
        for names, opt in (("ED", opt_ED), ("FG", opt_FG)):
            expected = nn.ModuleList(nets[name] for name in names).parameters()
            found = []
            for group in opt.param_groups:
                found += group["params"]
            assert {*map(id, found)} == {*map(id, expected)}
            rates.append({round(group["lr"] / group["c"], 9) for group in opt.param_groups})
        assert x.min() == -1 and x.max() == 1
        return {"L": torch.zeros(())}

    monkeypatch.setattr(alae, "learning_rate", lambda config, progress: 1 - progress)
    monkeypatch.setattr(alae, "train_step", train_step)
    how = ["--smoke", "--batch-size", 100, "--input-range=11", "--out-dir", tmp_path]
    train(monkeypatch, alae, *how)  # 2 epochs of 4 steps
    assert rates == [{1 - i // 2 / 8} for i in range(16)]


@torch.no_grad()
def test_each_picture_shows_what_its_title_says(monkeypatch):
    config, data, pictures = alae.Config(latent_dim=5, input_range="11"), toy_data(size=16), {}
    torch.manual_seed(0)
    nets = alae.build(config, 16)
    monkeypatch.setattr(shared, "grid", lambda images, *_: images.flatten(1))
    monkeypatch.setattr(shared, "pairs", lambda x, x_rec, _: torch.stack([x, x_rec]).flatten(2))
    run = SimpleNamespace(nets=nets, epoch=3, picture=pictures.__setitem__)
    alae.draw(run, data, config)

    F, G, E = nets["F"], nets["G"], nets["E"]
    x, z = data.x_test[:50], torch.randn(10_000, 5, generator=torch.Generator().manual_seed(0))
    w, w_fake = E(2 * x - 1), F(z)

    def pixels(w):
        return (G(w) + 1) / 2

    close = torch.testing.assert_close
    close(pictures["samples"], pixels(w_fake[:100]))
    close(pictures["reconstructions"], torch.stack([x, pixels(w)]))
    for name, codes in (("interpolations", w), ("interpolations_z", w_fake)):
        rows = pictures[name].unflatten(0, (8, 10))
        close(rows[:, [0, 9]], torch.stack([pixels(codes[:8]), pixels(codes[8:16])], 1))
    rows = pictures["traversals"].unflatten(0, (5, 11))
    close(rows[:, 5], pixels(w[:1]).expand(5, -1))
    _, sigma, axes = torch.linalg.svd(w_fake - w_fake.mean(0), full_matrices=False)
    far = 2.5 * (sigma / 9999**0.5)[:, None] * axes
    ends = torch.stack([pixels(w[0] - far), pixels(w[0] + far)], 1)  # axes have no sign
    close(rows[:, [0, 10]].sort(1).values, ends.sort(1).values, atol=1e-4, rtol=1e-3)


def test_a_decay_fixes_the_length(cheap, few_images, tmp_path, monkeypatch, capsys):
    how = ["--smoke", "--epochs", 1, "--batch-size", 400, "--decay", 0.5]
    train(monkeypatch, alae, *how, "--out-dir", tmp_path, "--run-name", "d")
    checkpoint = tmp_path / "train_fc_alae/d/checkpoint.pt"
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, alae, "--resume", checkpoint, "--epochs", 2)
    assert stop.value.code == 2 and "--epochs: leave it out" in capsys.readouterr().err


def test_options_of_the_networks():
    nets = small(mapping="pixel-norm", critic="mlp", output="bounded")[1]
    F, G, D = nets["F"], nets["G"], nets["D"]
    z = torch.randn(6, 5)
    torch.testing.assert_close(F(z), z / z.square().mean(1, keepdim=True).sqrt())
    assert 0 <= G(100 * z).min() < 0.01 and 0.99 < G(100 * z).max() <= 1
    assert (D(z) + D(-z)).abs().max() > 1e-4  # bends
    assert small(mapping="identity")[1]["F"](z).equal(z)
    signed = alae.Config(latent_dim=5, output="bounded", input_range="11")
    nets = alae.build(signed, 20)
    assert -1 <= nets["G"](10 * z).min() < -0.5
    torch.testing.assert_close(nets["D"](-z), -nets["D"](z))  # the official one is linear
    slopes = alae.build(alae.Config(latent_dim=5, slope=0.01), 20)
    assert [slopes["E"][i].negative_slope for i in (1, 3, 5)] == [0.2, 0.2, 0.01]
    assert [slopes["G"][i].negative_slope for i in (1, 3)] == [0.01, 0.01]


@pytest.mark.parametrize("input_range", ["01", "11"])
def test_evaluate_looks_at_the_right_images_and_features(input_range, monkeypatch):
    data = toy_data(30, 20, size=16)
    config = alae.Config(latent_dim=3, input_range=input_range)
    torch.manual_seed(0)
    nets = alae.build(config, 16)
    given = record(monkeypatch)
    alae.evaluate(nets, data, config, full=True)
    F, G, E = nets["F"], nets["G"], nets["E"]

    def encode(x, layers=6):
        return E[:layers](2 * x - 1 if input_range == "11" else x)

    def decode(w):
        return (G(w) + 1) / 2 if input_range == "11" else G(w)

    z = torch.randn(len(data.x_test), 3, generator=torch.Generator().manual_seed(0))
    close = torch.testing.assert_close
    close(given["images"], [(decode(encode(data.x_test)), decode(F(z)))])
    close(given["short"], (encode(data.x_train), encode(data.x_test)))
    close(given["long"], (encode(data.x_train, 4), encode(data.x_test, 4)))
    assert given["long"][0].shape == (30, 1024)


@pytest.mark.parametrize("which", ["raw", "ema"])
def test_eval_weights_are_those_that_are_evaluated(which, cheap, few_images, tmp_path, monkeypatch):
    how = ["--smoke", "--epochs", 1, "--batch-size", 400, "--eval-weights", which]
    train(monkeypatch, alae, *how, "--out-dir", tmp_path, "--run-name", "r")
    folder = tmp_path / "train_fc_alae/r"
    model = torch.load(folder / "model.pt", weights_only=True)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    part = checkpoint["nets" if which == "raw" else "averaged"]
    assert model["E"]["0.weight"].equal(part["E.0.weight"])
    assert not checkpoint["nets"]["E.0.weight"].equal(checkpoint["averaged"]["E.0.weight"])


def test_the_committed_model_is_as_good_as_the_readme_says(here, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "code_metrics", lambda *_, **__: {})
    done = here(FC_ALAE, "--eval", ROOT / "assets/fc_alae.pt", "--smoke", "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    found = dict(line.split()[:2] for line in done.stdout.splitlines() if line.startswith("eval/"))
    assert float(found["eval/identity"]) > 97 and float(found["eval/recon_mse"]) < 0.013


def test_a_kill_while_saving_leaves_the_previous_checkpoint_whole(
    cheap, few_images, tmp_path, monkeypatch
):
    class Killed(BaseException):
        """Which nothing catches."""

    save, calls = torch.save, []

    def half(content, path):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half a checkpoint")
            raise Killed
        save(content, path)

    monkeypatch.setattr(torch, "save", half)
    how = ["--smoke", "--batch-size", 400, "--out-dir", tmp_path, "--run-name", "k"]
    with pytest.raises(Killed):
        train(monkeypatch, alae, *how)
    path = tmp_path / "train_fc_alae/k/checkpoint.pt"
    assert shared.load_checkpoint(path, alae.Config)["epoch"] == 1


def test_lenet_sees_the_true_digit_in_all_reconstructions_shown():
    config, nets = fid_floor.trained_model()
    data = shared.load_data(shared.Protocol(), torch.device("cpu"))
    with torch.no_grad():
        x_rec = alae.to_pixels(nets["G"](nets["E"](alae.to_x(data.x_test[:50], config))), config)
        judge = shared.lenet.lenet(torch.device("cpu"))
        digits = shared.lenet.judge(judge, data.images(x_rec)).argmax(1)
    assert digits.equal(data.y_test[:50])


def test_the_floor_is_of_all_training_images_and_the_models_of_ten_draws(monkeypatch, tmp_path):
    model, data = fid_floor.trained_model(), shared.load_data(shared.Protocol(), "cpu")
    given = []

    def fid(real, fake):
        assert real.equal(data.images(data.x_test))
        given.append(fake)
        return float(len(given))

    (tmp_path / "results").mkdir()
    monkeypatch.setattr(shared, "ROOT", tmp_path)
    monkeypatch.setattr(shared, "load_data", lambda *_: data)
    monkeypatch.setattr(shared.lenet, "fid", fid)
    monkeypatch.setattr(fid_floor, "trained_model", lambda: model)
    fid_floor.main()
    assert [len(images) for images in given] == [10_000] * 16
    sums = [torch.cat(given[:6]).flatten(1).sum(1).sort()[0], data.x_train.sum(1).sort()[0]]
    torch.testing.assert_close(*sums)  # each training image once
    config, nets = model
    z = alae.fixed_z(10_000, config, "cpu")  # the draw that evaluates a model
    torch.testing.assert_close(
        given[6], data.images(alae.to_pixels(nets["G"](nets["F"](z)), config))
    )
    assert not given[7].equal(given[6])
    text = (tmp_path / "results/fid_floor.md").read_text()
    assert "test images): 3.50 ± 1.87." in text
    assert "11.50 ± 3.03, from 7.00 to 16.00." in text and "first draw, 7.00." in text
