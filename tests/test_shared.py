"""The shared instruments against independent computations, data, splits, and the files of a run."""

import itertools
import json
import os
import runpy
import subprocess
import sys
from unittest.mock import MagicMock

import shared
from assets import classifiers

import numpy as np
import pytest
import scipy.optimize
import torch
import train_fc_alae
from conftest import ENVIRONMENT, FC_ALAE, ROOT, launch, toy_data, train
from PIL import Image
from train_fc_alae import PRESETS, Config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def splits():
    return {name: shared.load_data(Config(split=name), CPU) for name in ("dw", "sw", "val")}


@pytest.fixture(scope="module")
def mnist(splits):
    return splits["dw"]


def blobs(n, seed, classes=3, d=20):
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    centres = np.random.default_rng(9).normal(size=(classes, d))
    x = centres[y] + 1.3 * rng.normal(size=(n, d))
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


# Metrics


def test_svm_is_the_optimum_of_liblinears_primal():
    (x, y), (x_test, y_test) = blobs(600, 0), blobs(2000, 1)
    X = np.pad(x.numpy().astype(float), ((0, 0), (0, 1)), constant_values=1)
    X_test = np.pad(x_test.numpy().astype(float), ((0, 0), (0, 1)), constant_values=1)
    scores = []
    for c in range(3):
        t = np.where(y.numpy() == c, 1.0, -1.0)

        def primal(w, t=t):
            slack = np.maximum(0, 1 - t * (X @ w))
            return 0.5 * w @ w + 0.02 * slack @ slack, w - 0.04 * X.T @ (t * slack)

        how = {"jac": True, "method": "L-BFGS-B", "options": {"gtol": 1e-10, "ftol": 0}}
        scores.append(X_test @ scipy.optimize.minimize(primal, np.zeros(21), **how).x)
    expected = 100 * (np.argmax(scores, 0) == y_test.numpy()).mean()
    assert 50 < expected < 99
    one_image = 100 / 2000
    found = classifiers.svm_accuracy(x, y, x_test, y_test)
    assert found == pytest.approx(expected, abs=one_image)


def test_svm_bears_large_features_that_depend_on_each_other():
    (x, y), (x_test, y_test) = blobs(600, 0), blobs(2000, 1)
    x, x_test = 1e4 * x, 1e4 * x_test
    expected = classifiers.svm_accuracy(40**0.5 * x, y, 40**0.5 * x_test, y_test)
    x, x_test = x.repeat(1, 40), x_test.repeat(1, 40)  # the same problem, of rank 20 in 800
    X = torch.nn.functional.pad(x, (0, 1), value=1.0)
    assert torch.linalg.cholesky_ex(torch.eye(801) + 0.04 * X.T @ X).info > 0
    assert classifiers.svm_accuracy(x, y, x_test, y_test) == pytest.approx(expected, abs=1)


def test_knn_against_all_distances():
    (x, y), (x_test, y_test) = blobs(300, 0), blobs(1100, 1)
    x, x_test = x + 1000, x_test + 1000  # far from the origin, where ‖a‖² − 2ab would lose digits
    nearest = torch.cdist(x_test.double(), x.double()).argmin(1)
    expected = 100 * (y[nearest] == y_test).double().mean().item()
    assert classifiers.knn_accuracy(x, y, x_test, y_test) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["knn", "svm", "mlp"])
def test_classifiers_are_fitted_on_training_features_and_scored_on_test_features(kind):
    """The test features' labels are shifted by one class: fitted on them, all would be right."""
    x, y = blobs(300, 0)
    x = 4 * x + 20 * torch.nn.functional.one_hot(y, 20)  # easily told apart
    accuracy = getattr(classifiers, f"{kind}_accuracy")
    assert accuracy(x, y, x, y) > 99
    assert accuracy(x, y, x, (y + 1) % 3) < 1


@pytest.mark.parametrize("kind", ["knn", "svm", "mlp"])
def test_a_test_row_is_judged_whatever_the_other_test_rows_are(kind):
    accuracy = getattr(classifiers, f"{kind}_accuracy")
    (x, y), (x_test, y_test) = blobs(300, 0), blobs(400, 1)
    far = 1000 * x_test + 50
    both = accuracy(x, y, torch.cat([x_test, far]), y_test.repeat(2))
    each = accuracy(x, y, x_test, y_test), accuracy(x, y, far, y_test)
    assert both == pytest.approx(sum(each) / 2)


def test_mlp_does_not_depend_on_the_unit_of_a_feature():
    (x, y), (x_test, y_test) = blobs(300, 0), blobs(400, 1)
    unit = 2.0 ** torch.arange(-5, 15)
    expected = classifiers.mlp_accuracy(x, y, x_test, y_test)
    found = classifiers.mlp_accuracy(unit * x, y, unit * x_test, y_test)
    assert found == pytest.approx(expected, abs=0.5)


def test_mlp_leaves_the_random_state_alone_and_is_the_same_each_time():
    state = torch.get_rng_state()
    features = *blobs(300, 0), *blobs(400, 1)
    assert classifiers.mlp_accuracy(*features) == classifiers.mlp_accuracy(*features) > 60
    assert torch.get_rng_state().equal(state)


def test_code_metrics_hands_each_split_to_each_classifier(monkeypatch):
    calls = []
    for kind in ("knn", "svm", "mlp"):
        monkeypatch.setattr(classifiers, f"{kind}_accuracy", lambda *args: calls.append(args))
    data = toy_data(30, 20)
    train_features, test_features = torch.rand(30, 5), torch.rand(20, 5)
    metrics = shared.code_metrics(data, train_features, test_features, "short")
    assert set(metrics) == {f"eval/{kind}_acc_short" for kind in ("knn", "svm", "mlp")}
    assert len(calls) == 3
    for args in calls:
        assert args[0] is train_features and args[2] is test_features
        assert args[1] is data.y_train and args[3] is data.y_test
    assert list(shared.code_metrics(data, *args[::2], "long", full=False)) == ["eval/knn_acc_long"]
    assert shared.code_metrics(data._replace(y_train=None), *args[::2], "short") == {}


def test_image_metrics_judge_reconstructions_of_test_images_and_samples(mnist):
    data = mnist._replace(x_test=mnist.x_test[:400], y_test=mnist.y_test[:400])
    wrong = data.x_test.roll(1, 0)  # each image's reconstruction is another image
    exact = shared.image_metrics(data, data.x_test, data.x_test)
    assert exact["eval/recon_mse"] == 0 and exact["eval/identity"] >= 98
    assert exact["eval/fid"] == pytest.approx(0, abs=1e-3)
    other = shared.image_metrics(data, wrong, mnist.x_train[:400] * 0.5)
    assert other["eval/identity"] < 30 and other["eval/recon_mse"] > 0.05
    assert other["eval/fid"] > 10
    assert list(shared.image_metrics(data._replace(name="cifar10"), wrong, wrong)) == [
        "eval/recon_mse"
    ]


def test_recon_mse_clips():
    data = toy_data(name="cifar10")._replace(x_test=torch.ones(2, 3))
    for value, expected in ((5.0, 0), (0.5, 0.25)):
        metrics = shared.image_metrics(data, torch.full((2, 3), value))
        assert metrics == {"eval/recon_mse": expected}


def test_lenet_sees_clipped_images():
    images = torch.tensor([-1.0, 0.25, 2.0]).view(3, 1, 1, 1).expand(3, 1, 28, 28)
    assert shared.lenet.judge(torch.nn.Identity(), images).equal(images.clamp(0, 1))


def test_the_committed_lenet_is_right_on_99_percent(mnist):
    right = shared.lenet.identity(mnist.images(mnist.x_test), mnist.y_test)
    assert right == pytest.approx(99.44, abs=0.015)  # other weights make other numbers
    assert (ROOT / "assets" / "lenet.pt").stat().st_size < 1e6


def test_lenets_training_images_are_moved_by_up_to_two_pixels():
    images = torch.zeros(500, 1, 28, 28)
    images[:, :, 14, 14] = 1
    moved = shared.lenet.moved(images, torch.Generator().manual_seed(0))
    assert moved.sum((1, 2, 3)).eq(1).all()  # the pixel stays one pixel
    places = {divmod(place, 28) for place in moved.flatten(1).argmax(1).tolist()}
    assert places == set(itertools.product(range(12, 17), repeat=2))


def test_lenets_training_learns_digits(mnist, monkeypatch):
    few = mnist._replace(x_train=mnist.x_train[:3000], y_train=mnist.y_train[:3000])
    monkeypatch.setattr(shared.lenet, "lenet", shared.lenet.lenet.__wrapped__)  # not the cached one
    torch.manual_seed(0)
    net = shared.lenet.train(few, epochs=3)
    digits = shared.lenet.judge(net, mnist.images(mnist.x_test[:2000])).argmax(1)
    assert (digits == mnist.y_test[:2000]).float().mean() > 0.85


def test_fid_is_the_frechet_distance_of_gaussians(mnist):
    a, b = mnist.images(mnist.x_test[:1000]), mnist.images(mnist.x_test[1000:2000] * 0.7)
    net = shared.lenet.lenet(CPU)[:-1]
    f, g = (net(x).detach().double().numpy() for x in (a, b))
    C, D = np.cov(f.T), np.cov(g.T)
    values, vectors = np.linalg.eigh(C)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ D @ root).clip(0)).sum()  # the symmetric way
    expected = np.square(f.mean(0) - g.mean(0)).sum() + np.trace(C + D) - 2 * cross
    assert shared.lenet.fid(a, b) == pytest.approx(expected, rel=1e-3) and expected > 1


# Data


def test_splits_are_disjoint_and_val_is_cut_from_what_sw_trains_on(splits):
    def keys(x):
        return {row.tobytes() for row in (255 * x).byte().numpy()}

    mnist, sw, val = splits.values()
    parts = [mnist.x_train, mnist.x_test, sw.x_train, sw.x_test, val.x_train, val.x_test]
    assert [len(part) for part in parts] == [60000, 10000, 50000, 10000, 40000, 10000]
    dw_train, _, sw_train, sw_test, val_train, val_test = map(keys, parts)
    assert sw_train | sw_test == dw_train and val_train | val_test == sw_train
    assert not sw_test & (val_test | val_train) and not val_test & val_train
    official = shared.datasets.MNIST(ROOT / "data", train=False)
    assert mnist.y_test.equal(official.targets)
    assert (255 * mnist.x_test).round().byte().view(-1, 28, 28).equal(official.data)


def test_the_splits_are_those_of_the_kept_runs(splits):
    labels = {name: splits[name].y_test[:12].tolist() for name in ("sw", "val")}
    assert labels["sw"] == [9, 3, 5, 4, 7, 4, 9, 6, 8, 8, 7, 4]
    assert labels["val"] == [5, 8, 2, 4, 9, 6, 8, 8, 1, 9, 3, 5]


def test_a_dataset_is_read_by_torchvisions_class_of_its_name():
    for name, cls in shared.DATASETS.items():
        assert cls.lower() == name.replace("_", "") and hasattr(shared.datasets, cls)


@pytest.mark.parametrize("split", ["sw", "val"])
def test_labels_stay_with_their_images(split, splits):
    data = splits[split]
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        for part in (slice(1000), slice(-1000, None)):
            assert shared.lenet.identity(data.images(x[part]), y[part]) > 98


@pytest.mark.parametrize("split", ["sw", "val"])
def test_a_split_does_not_depend_on_the_seed_and_a_smoke_run_has_its_first_images(split, splits):
    data, few = splits[split], shared.load_data(Config(split=split, seed=3, smoke=True), CPU)
    assert few.x_train.equal(data.x_train[:2000]) and few.y_train.equal(data.y_train[:2000])
    assert few.x_test.equal(data.x_test[:1000]) and few.y_test.equal(data.y_test[:1000])


def test_colours_are_channels(tmp_path):
    for i in range(100):
        Image.new("RGB", (9, 9), (i, 100 + i, 255 - i)).save(tmp_path / f"{i:02}.png")
    data = shared.load_data(Config(dataset=f"folder:{tmp_path}", batch_size=10), CPU, size=8)
    red, green, blue = (255 * data.images(data.x_train)).round().unbind(1)
    assert data.shape == (3, 8, 8) and len(red.unique()) == len(data.x_train) > 80
    assert green.equal(100 + red) and blue.equal(255 - red)


def test_own_pictures_are_cropped_and_split_without_loss(tmp_path):
    for i in range(120):
        picture = np.full((200, 30, 3), 2 * i, np.uint8)
        picture[:70] = picture[130:] = 255  # far above and below the central square
        Image.fromarray(picture).save(tmp_path / f"{i:03}.png")
    data = shared.load_data(Config(dataset=f"folder:{tmp_path}", batch_size=10), CPU, size=16)
    assert data.shape == (1, 16, 16) and data.y_train is None and data.y_test is None
    values = torch.cat([data.x_train, data.x_test])[:, 0].mul(255).round().int().tolist()
    assert (len(data.x_test), sorted(values)) == (20, [2 * i for i in range(120)])


def test_pictures_of_subfolders_are_split_alike_in_whatever_order_they_are_found(
    tmp_path, monkeypatch
):
    for i in range(120):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        Image.new("L", (8, 8), 2 * i).save(tmp_path / f"{i % 2}/{i:03}.png")
    config = Config(dataset=f"folder:{tmp_path}", batch_size=10)
    first = shared.load_data(config, CPU, size=8)
    rglob = shared.Path.rglob
    monkeypatch.setattr(shared.Path, "rglob", lambda *given: list(rglob(*given))[::-1])
    again = shared.load_data(config, CPU, size=8)
    assert len(first.x_test) == 20 and again.x_test.equal(first.x_test)


def test_photographs_stand_upright_and_files_of_other_kinds_are_left_alone(tmp_path):
    picture, exif = np.zeros((16, 16, 3), np.uint8), Image.Exif()
    picture[:, :8] = 255  # left; upright, at the top
    exif[0x0112] = 6  # as a phone that was held upright says it
    for i in range(100):
        Image.fromarray(picture).save(tmp_path / f"{i}.jpg", exif=exif)
    (tmp_path / "album.pdf").write_bytes(b"%PDF-1.4")
    x = shared.read_pictures(tmp_path, 16, 1000)
    assert x.shape == (100, 16, 16, 1)
    assert (x[:, :8] > 250).all() and (x[:, 8:] < 5).all()


def test_batches_visit_each_image_once_and_again_the_same():
    x = torch.zeros(103, 1)
    first = shared.batches(x, 10, seed=0, epoch=1)
    assert first.shape == (10, 10) and len(set(first.flatten().tolist())) == 100
    assert first.equal(shared.batches(x, 10, 0, 1))
    assert not first.equal(shared.batches(x, 10, 0, 2))
    assert not first.equal(shared.batches(x, 10, 1, 1))
    assert not shared.batches(x, 10, 0, 2).equal(shared.batches(x, 10, 1, 1))
    assert shared.batches(x, 10, 1, 1) is shared.batches(x, 10, 1, 1), "drawn once for an epoch"


def test_step_batches_go_through_the_epochs_row_by_row():
    x, config = torch.zeros(50, 1), Config(seed=2, batch_size=10, eval_every=4)  # 5 an epoch
    rows = [list(shared.step_batches(x, config, end)) for end in (4, 8, 10)]
    found = rows[0] + rows[1] + rows[2]
    assert [step for step, _ in found] == list(range(1, 11))
    epochs = torch.cat([shared.batches(x, 10, 2, epoch) for epoch in (0, 1)])
    assert torch.stack([i for _, i in found]).equal(epochs)


# The machine


def test_the_seed_is_that_of_the_initial_weights_and_of_z():
    drawn = []
    for seed in (3, 3, 4):
        shared.setup(Config(seed=seed, device="cpu"))
        drawn.append(torch.randn(5))
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])


def test_products_keep_fp32_accuracy():
    a, b = torch.randn(2, 300, 300)
    torch.set_float32_matmul_precision(shared.fastest_exact_matmul(CPU))
    exact = a.double() @ b.double()
    assert ((a @ b).double() - exact).norm() < 2e-6 * exact.norm()


def test_a_mode_that_rounds_is_not_taken(monkeypatch):
    def rounded(a, b):
        if a.dtype == torch.float32:
            return torch.matmul(a.bfloat16(), b.bfloat16()).float()
        return torch.matmul(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    shared.setup(Config(device="cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


def test_waiting_threads_sleep_soon(launched):
    """OpenMP itself tells which settings it found when torch was loaded."""
    assert "GOMP_SPINCOUNT = '2000'" in launched[0].stderr


@pytest.mark.parametrize("name, value", [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "ACTIVE")])
def test_how_threads_wait_is_left_to_a_user_who_says_so(name, value, monkeypatch):
    settings = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    for setting in settings:
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.setenv(name, value)
    runpy.run_path(shared.__file__)
    assert {key: os.environ[key] for key in settings if key in os.environ} == {name: value}


def test_hardware_names_the_processor_its_cores_and_the_threads(monkeypatch):
    known = shared.Path("/proc/cpuinfo")
    if known.exists() and "cpu family" in known.read_text():
        told = dict(line.split("\t", 1) for line in known.read_text().splitlines() if "\t" in line)
        for fact in ("model name", "cpu family", "model"):
            assert told[fact].strip(" :\t") in shared.hardware(CPU)
    monkeypatch.setattr(os, "cpu_count", lambda: 77)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 33)
    assert shared.hardware(CPU).endswith(", 77 cores, 33 threads")


# Options and a run


def test_epochs_are_due_every_eval_every_but_the_last_is_not():
    run = object.__new__(shared.Run)
    run.config, run.total, due = Config(eval_every=3), 9, []
    for epoch in range(1, 10):
        run.epoch = epoch
        if run.is_due():
            due.append(epoch)
    assert due == [3, 6]


def test_a_row_has_the_mean_losses_of_its_epoch_and_the_speed(monkeypatch):
    run, rows, clock = object.__new__(shared.Run), [], iter([50.0, 53.5])
    run.unit, run.epoch, run.epoch_steps = "epoch", 1, 10
    run.sums, run.step_in_epoch = {}, 0
    run.bar, run.history, run.log = shared.tqdm(disable=True), {"images_seen": 0}, rows.append
    monkeypatch.setattr(shared.time, "perf_counter", lambda: next(clock))
    for i in range(10):
        run.step({"L": torch.tensor(float(i))}, 4)
    run.log_losses()
    assert rows == [{"train/L": 4.5, "perf/images_per_s": 9 * 4 / 3.5}]


def test_presets_replace_defaults_and_the_command_line_replaces_presets():
    config = shared.parse_config(Config, PRESETS, ["--preset=fast", "--batch_size=32"])
    assert (config.lr, config.batch_size, config.output) == (0.008, 32, "bounded")
    assert shared.parse_config(Config, PRESETS, []) == Config()


def test_a_summary_names_the_setting_by_what_is_not_usual(cheap, tmp_path, monkeypatch):
    how = ["--smoke", "--epochs", 0, "--out-dir", tmp_path, "--run-name"]
    train(monkeypatch, train_fc_alae, *how, "a", "--preset", "fast", "--lr", 0.001, "--seed", 4)
    summary = json.loads((tmp_path / "train_fc_alae/a/summary.json").read_text())
    assert summary["setting"] == "smoke True, preset fast, lr 0.001"
    assert summary["seed"] == 4 and summary["epochs"] == 0


def test_what_is_logged_is_in_the_summary_while_the_run_goes_on(
    cheap, few_images, tmp_path, monkeypatch
):
    summaries = []

    def read(run, *_):
        summaries.append(json.loads((run.dir / "summary.json").read_text()))

    monkeypatch.setattr(shared.Run, "save", read)
    train(monkeypatch, train_fc_alae, "--epochs", 1, "--batch-size", 400, "--out-dir", tmp_path)
    assert summaries[0]["status"] == "running" and summaries[0]["epochs"] == 1
    assert summaries[0]["train/L_adv_ED"] > 0


def test_a_loss_that_turns_nan_stops_the_run_within_100_steps(tmp_path, monkeypatch, capsys):
    done = []

    def breaks(*_):
        done.append(1)
        found = 0.5 if len(done) < 30 else float("nan")
        return {"L_adv_ED": torch.tensor(0.5), "L_adv_FG": torch.tensor(found)}

    monkeypatch.setattr(train_fc_alae, "train_step", breaks)
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, train_fc_alae, "--smoke", "--batch-size", 8, "--out-dir", tmp_path)
    (folder,) = (tmp_path / "train_fc_alae").iterdir()
    assert stop.value.code == 1 and len(done) <= 130
    assert "L_adv_FG became nan" in capsys.readouterr().err
    assert json.loads((folder / "summary.json").read_text())["status"] == "diverged"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    shared.write_file(path, lambda temporary: temporary.write_text("whole"))

    def breaks(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shared.write_file(path, breaks)
    assert path.read_text() == "whole"


def test_wandb_offline_mirrors_the_run_and_goes_on_with_it(cheap, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for i in range(120):
        Image.new("L", (28, 28), 2 * i).save(tmp_path / "pictures" / f"{i}.png")
    out, offline = tmp_path / "runs", {"WANDB_MODE": "offline", "cwd": tmp_path}
    how = ["--dataset", "folder:pictures", "--batch-size", 50, "--out-dir", out, "--run-name", "w"]
    done = launch(FC_ALAE, *how, "--epochs", 1, "--wandb", **offline)
    assert done.returncode == 0, done.stderr
    leet = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", "wandb"]
    told = subprocess.run(leet, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    run = json.loads(told.stdout)
    summary = json.loads((out / "train_fc_alae/w/summary.json").read_text())
    assert (run["project"], run["name"], run["tags"]) == ("alae", "w", ["folder:pictures", "dw"])
    assert run["config"]["lr"] == 0.002
    assert {key: run["summary"][key] for key in summary} == summary
    assert any(key.startswith("media/samples") for key in run["summary"])

    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.chdir(tmp_path)
    checkpoint = out / "train_fc_alae/w/checkpoint.pt"
    train(monkeypatch, train_fc_alae, "--resume", checkpoint, "--epochs", 2, "--wandb")
    again = wandb.init.call_args.kwargs
    assert again["id"] == run["run_id"] and again["resume"] == "allow"


FAKE_WANDB = """
import os, unittest.mock
Image = unittest.mock.MagicMock()
def init(id, **_):
    with open(os.environ["TOLD"], "a") as file:
        print(id, file=file)
    return unittest.mock.MagicMock()
"""


def test_a_run_of_a_wandb_agent_is_mirrored_under_its_id_and_so_it_goes_on(tmp_path):
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    environment = {"PYTHONPATH": str(tmp_path), "TOLD": str(tmp_path / "told")}
    agent = {"WANDB_SWEEP_ID": "sweep", "WANDB_RUN_ID": "theirs"}
    how = ["--smoke", "--out-dir", tmp_path, "--run-name", "mine"]
    file = "step1_linear/linear_autoencoder.py"
    assert launch(file, *how, **environment, **agent).returncode == 0
    checkpoint = tmp_path / "linear_autoencoder/mine/checkpoint.pt"
    assert launch(file, "--resume", checkpoint, **environment).returncode == 0
    assert (tmp_path / "told").read_text().split() == ["theirs", "theirs"]


def test_training_survives_a_failing_wandb(capsys):
    class Broken:
        def log(self, metrics):
            raise OSError("no route to host")

    run = object.__new__(shared.Run)
    run.wandb = Broken()
    for _ in range(3):
        run._mirror(lambda wandb: wandb.log({}))
    assert capsys.readouterr().err.count("training goes on") == 1


def test_a_run_survives_a_picture_that_wandb_does_not_take(tmp_path, monkeypatch, capsys):
    broken = MagicMock()
    broken.Image.side_effect = OSError("no space left")
    run = object.__new__(shared.Run)
    run.dir, run.epoch = tmp_path, 1
    run.wandb, run.image = broken, broken.Image
    run.picture("samples", shared.grid(torch.rand(2, 1, 4, 4), 2, "samples"))
    assert (tmp_path / "samples.png").exists() and run.wandb is None
    assert "training goes on" in capsys.readouterr().err


# Pictures


def test_a_grid_is_filled_row_by_row_and_clipped():
    grey = torch.linspace(-0.5, 1.5, 6)
    figure = shared.grid(grey.view(6, 1, 1, 1).expand(6, 1, 2, 2), 3, "title", ["a", "b"])
    (axes,) = figure.axes
    sheet = torch.tensor(axes.get_images()[0].get_array())  # each image in a white frame: 4 × 4
    assert sheet.shape == (8, 12) and sheet[::4].eq(1).all()
    assert sheet[1::4, 1::4].equal(grey.clamp(0, 1).view(2, 3))
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]


def test_each_row_of_images_is_above_that_of_their_reconstructions(monkeypatch):
    given = []
    monkeypatch.setattr(shared, "grid", lambda *arguments: given.extend(arguments))
    x = torch.rand(25, 1, 4, 4)
    shared.pairs(x, x - 1, "title")
    both, *more = given
    assert both.equal(torch.cat([x[:10], x[:10] - 1, x[10:20], x[10:20] - 1]))
    assert more == [10, "title", ["x", "rec.", "x", "rec."]]


def test_curves_have_a_panel_for_each_number_that_was_logged_twice():
    rows = [{"epoch": 1, "L": 1.0}, {"epoch": 2, "L": 3.0, "eval/fid": 7.0}]
    rows.append({"epoch": 3, "eval/fid": 5.0, "eval/svm": 90.0})
    panels = {}
    for axes in shared.curves(rows, "epoch", "title").axes:
        panels[axes.get_title()] = axes.lines[0].get_xydata().tolist()
    assert panels == {"L": [[1, 1], [2, 3]], "eval/fid": [[2, 7], [3, 5]]}
