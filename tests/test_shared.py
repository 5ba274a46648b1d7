"""The shared instruments against independent computations, the data and its splits, and the files of a run."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.optimize
import torch
from conftest import ENVIRONMENT, FC_ALAE, ROOT

import shared


@pytest.fixture(scope="module")
def mnist():
    return shared.load_images("mnist")


def blobs(n, seed, classes=3, d=20):
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    centres = np.random.default_rng(9).normal(size=(classes, d))
    return torch.tensor(centres[y] + 1.3 * rng.normal(size=(n, d)), dtype=torch.float32), torch.tensor(y)


def test_svm_is_the_optimum_of_liblinears_primal():
    (x, y), (x_test, y_test) = blobs(600, 0), blobs(2000, 1)
    X = np.pad(x.numpy().astype(float), ((0, 0), (0, 1)), constant_values=1)
    X_test = np.pad(x_test.numpy().astype(float), ((0, 0), (0, 1)), constant_values=1)
    scores = []
    for c in range(3):
        t = np.where(y.numpy() == c, 1.0, -1.0)

        def primal(w):
            slack = np.maximum(0, 1 - t * (X @ w))
            return 0.5 * w @ w + 0.02 * slack @ slack, w - 0.04 * X.T @ (t * slack)
        w = scipy.optimize.minimize(primal, np.zeros(21), jac=True, method="L-BFGS-B", options={"gtol": 1e-10, "ftol": 0}).x
        scores.append(X_test @ w)
    expected = 100 * (np.argmax(scores, 0) == y_test.numpy()).mean()
    assert 50 < expected < 99
    assert shared.svm_accuracy(x, y, x_test, y_test) == pytest.approx(expected, abs=0.051)  # one image of 2,000


def test_knn_against_all_distances():
    (x, y), (x_test, y_test) = blobs(300, 0), blobs(1100, 1)
    x, x_test = x + 100, x_test + 100  # far from the origin, where ‖a‖² − 2ab would lose digits
    expected = 100 * (y[torch.cdist(x_test.double(), x.double()).argmin(1)] == y_test).double().mean().item()
    assert shared.knn_accuracy(x, y, x_test, y_test) == pytest.approx(expected, abs=1e-4)


def test_mlp_learns_and_does_not_touch_the_random_state():
    state = torch.get_rng_state()
    (x, y), (x_test, y_test) = blobs(600, 0), blobs(2000, 1)
    first = shared.mlp_accuracy(x, y, x_test, y_test)
    assert first > 80 and first == shared.mlp_accuracy(x, y, x_test, y_test)
    assert torch.get_rng_state().equal(state)


def test_recon_mse_clips():
    assert shared.recon_mse(torch.ones(2, 3), torch.full((2, 3), 5.0)) == 0
    assert shared.recon_mse(torch.ones(2, 3), torch.full((2, 3), 0.5)) == 0.25


def test_the_committed_lenet(mnist):
    assert shared.identity(mnist[2], mnist[3]) >= 99
    assert shared.identity(torch.rand_like(mnist[2]), mnist[3]) < 20
    assert (ROOT / "assets" / "lenet.pt").stat().st_size < 1e6


def test_fid(mnist):
    a, b = mnist[2][:3000], mnist[2][3000:6000] * 0.7
    net = shared.lenet(torch.device("cpu"))[:-1]
    f, g = (net(x).detach().double().numpy() for x in (a, b))
    C, D = np.cov(f.T), np.cov(g.T)
    values, vectors = np.linalg.eigh(C)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ D @ root).clip(0)).sum()  # tr (CD)^½, the symmetric way
    expected = np.square(f.mean(0) - g.mean(0)).sum() + np.trace(C + D) - 2 * cross
    assert shared.fid(a, b) == pytest.approx(expected, rel=1e-3)
    assert shared.fid(a, a) == pytest.approx(0, abs=1e-3) and expected > 1


def test_splits(mnist):
    def keys(x):
        return {row.tobytes() for row in (255 * x).byte().flatten(1).numpy()}
    x_sw, y_sw, t_sw, _ = shared.load_images("mnist", split="sw")
    x_val, _, t_val, _ = shared.load_images("mnist", split="val")
    assert [len(t) for t in (mnist[0], mnist[2], x_sw, t_sw, x_val, t_val)] == [60000, 10000, 50000, 10000, 40000, 10000]
    assert keys(x_sw) | keys(t_sw) == keys(mnist[0])
    assert keys(t_val) | keys(x_val) == keys(x_sw)  # and so none of the test images of sw, which are distinct:
    assert not keys(t_sw) & keys(t_val) and not keys(t_val) & keys(x_val)
    assert x_sw.min() == 0 and x_sw.max() == 1 and y_sw.dtype == torch.int64


def test_own_pictures(tmp_path):
    from PIL import Image
    for i in range(12):
        Image.fromarray(np.full((40, 30, 3), 20 * i, np.uint8)).save(tmp_path / f"{i:02}.png")
    x, y, x_test, y_test = shared.load_images(f"folder:{tmp_path}", size=16)
    assert x.shape == (10, 1, 16, 16) and x_test.shape == (2, 1, 16, 16) and y is None and y_test is None
    values = sorted(torch.cat([x, x_test])[:, 0, 0, 0].mul(255).round().int().tolist())
    assert values == [20 * i for i in range(12)]
    Image.fromarray(np.random.default_rng(0).integers(255, size=(40, 30, 3), dtype=np.uint8)).save(tmp_path / "colour.png")
    assert shared.load_images(f"folder:{tmp_path}", size=16)[0].shape == (11, 3, 16, 16)


def test_batches():
    def epoch(seed, skip=0):
        return [i.tolist() for i in shared.batches(103, 10, torch.Generator().manual_seed(seed), skip)]
    assert len(epoch(0)) == 10 and len(set(sum(epoch(0), []))) == 100
    assert epoch(0) == epoch(0) != epoch(1)
    assert epoch(0, skip=7) == epoch(0)[7:]


def test_auto_matmul_keeps_fp32_accuracy():
    a, b = torch.randn(2, 300, 300)
    torch.set_float32_matmul_precision(shared.probe_matmul(torch.device("cpu")))
    error = ((a @ b).double() - a.double() @ b.double()).norm() / (a.double() @ b.double()).norm()
    torch.set_float32_matmul_precision("highest")
    assert error < 2e-6


def test_auto_matmul_refuses_a_mode_that_rounds(monkeypatch):
    def rounded(a, b):
        return torch.matmul(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 else torch.matmul(a, b)
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert shared.probe_matmul(torch.device("cpu")) == "highest"
    torch.set_float32_matmul_precision("highest")


def test_wandb_offline_mirrors_the_run(command, tmp_path):
    done = command(FC_ALAE, "--smoke", "--wandb", "--run-name", "w", cwd=tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    inspect = subprocess.run([sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", "wandb"], cwd=tmp_path,
                             env=ENVIRONMENT, capture_output=True, text=True)
    run, summary = json.loads(inspect.stdout), json.loads((tmp_path / "runs/train_fc_alae/w/summary.json").read_text())
    assert (run["project"], run["name"], run["state"], run["tags"]) == ("alae", "w", "finished", ["mnist", "dw"])
    assert run["config"]["lr"] == 0.002 and run["config"]["dataset"] == "mnist"
    assert {key: run["summary"][key] for key in summary} == summary
    assert any(key.startswith("media/samples") for key in run["summary"])
    # A resumed run continues the same W&B run.
    done = command(FC_ALAE, "--resume", tmp_path / "runs/train_fc_alae/w/checkpoint.pt", "--wandb", cwd=tmp_path,
                   WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert {str(p)[-8:] for p in (tmp_path / "wandb").glob("offline-run-*")} == {run["run_id"]}


def test_training_survives_a_failing_wandb(capsys):
    class Broken:
        def log(self, *args, **kwargs):
            raise OSError("no route to host")
    run = object.__new__(shared.Run)
    run.wandb = Broken()
    for _ in range(3):
        run._mirror(lambda w: w.log({}))
    assert capsys.readouterr().err.count("training goes on") == 1


def test_without_tqdm_and_wandb(tmp_path):
    """Both are imported lazily: the smoke run passes where neither is installed."""
    hide = "import runpy, sys; sys.modules['tqdm'] = sys.modules['wandb'] = None; sys.argv = sys.argv[1:]; " \
           "runpy.run_path(sys.argv[0], run_name='__main__')"
    args = [str(ROOT / FC_ALAE), "--smoke", "--out-dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", hide, *args], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused = subprocess.run([sys.executable, "-c", hide, *args, "--wandb"], env=ENVIRONMENT, capture_output=True, text=True)
    assert refused.returncode == 2 and "wandb" in refused.stderr


def test_write_is_all_or_nothing(tmp_path):
    path = tmp_path / "a.json"
    shared.write(path, {"a": 1})
    with pytest.raises(ZeroDivisionError):
        shared.write(path, lambda temporary: (temporary.write_text("half"), 1 / 0))
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


def test_runs_that_start_together_share_one_unpacked_dataset(tmp_path):
    shutil.copytree(ROOT / "data/MNIST/raw", tmp_path / "MNIST/raw", ignore=shutil.ignore_patterns("*ubyte"))
    code = f"import shared; print(len(shared.load_images('mnist', {str(tmp_path)!r})[0]))"
    runs = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE)
            for _ in range(2)]
    assert [run.communicate()[0].split()[-1:] for run in runs] == [[b"60000"]] * 2
