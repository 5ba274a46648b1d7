"""PCA by gradient descent: identities of the shipped functions, and the file on points."""

import json

import shared

import pca_gd
import pytest
import torch
from conftest import train
from pca_gd import descend, methods, orthonormality, reconstruction_loss, variance_loss


def data(d=20, n=500):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    return x * torch.linspace(2, 0.5, d) + 3


def covariance(x):
    """Mean and covariance, and the eigenvectors and eigenvalues of that, largest first."""
    mean = x.mean(0)
    S = (x - mean).T @ (x - mean) / len(x)
    values, vectors = torch.linalg.eigh(S)
    return mean, S, vectors.flip(1), values.flip(0)


def last(*args, **how):
    *_, (step, C, _) = descend(*args, every=20, **how)
    return step, C


def test_the_losses_on_the_covariance_are_those_on_the_data():
    x = data()
    mean, S, _, _ = covariance(x)
    C = torch.randn(20, 4, dtype=torch.float64)  # not orthonormal
    direct = (x - mean - (x - mean) @ C @ C.T).square().sum(1).mean()
    torch.testing.assert_close(reconstruction_loss(C, S), direct)
    torch.testing.assert_close(variance_loss(C, S), -((x - mean) @ C).square().sum(1).mean())


def test_each_method_spans_what_the_eigenvectors_span():
    _, S, V, values = covariance(data())
    V, l1 = V[:, :4], values[0].item()
    assert torch.allclose(S @ V, V * values[:4])
    for name, how in methods(l1, l1).items():
        steps, C = last(S=S, k=4, steps=400, **how)
        assert steps == 400 and shared.pca.angle(C, V) < 1e-5, name
        assert how.get("exact") is False or orthonormality(C) < 1e-20, name


def test_step_sizes_are_the_inverse_of_the_largest_curvature():
    found = {name: (how["eta"], how.get("rho")) for name, how in methods(2.0, 3.0).items()}
    assert found == {
        "reconstruction, penalty": (1 / 40, 3.0),
        "reconstruction, QR": (1 / 4, None),
        "variance, penalty": (1 / 40, 3.0),
        "variance, QR, ηλ₁ = 1000": (500.0, None),
        "variance, QR, ηλ₁ = 1": (1 / 2, None),
    }


def test_momentum_is_what_makes_the_reconstruction_fast():
    _, S, V, values = covariance(data())
    how = {"loss": reconstruction_loss, "S": S, "k": 4, "steps": 200}
    angles = []
    for momentum in (True, False):
        _, C = last(**how, eta=0.5 / values[0].item(), momentum=momentum)
        angles.append(shared.pca.angle(C, V[:, :4]))
    assert angles[0] < 0.01 * angles[1]


def test_the_optimum_of_the_soft_variance_problem_is_too_long():
    _, S, V, values = covariance(data())
    rho = 2 * values[0].item()
    _, C = last(S=S, k=4, steps=400, **methods(values[0].item(), rho)["variance, penalty"])
    found = torch.linalg.eigvalsh(C.T @ C).flip(0)
    torch.testing.assert_close(found, 1 + values[:4] / (2 * rho), rtol=1e-7, atol=1e-7)
    assert shared.pca.angle(torch.linalg.qr(C)[0], V[:, :4]) < 1e-5


def test_a_large_step_is_subspace_iteration():
    _, S, _, _ = covariance(data())
    _, C = last(variance_loss, S, 4, 7, eta=1e9, momentum=False)
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(20, 4, dtype=S.dtype, generator=generator))[0]
    for _ in range(7):
        Q = torch.linalg.qr(S @ Q)[0]
    assert shared.pca.angle(C, Q) < 1e-6


def test_the_way_does_not_depend_on_the_signs_that_a_qr_chooses(monkeypatch):
    _, S, _, _ = covariance(data())
    how = {"loss": reconstruction_loss, "S": S, "k": 4, "steps": 20, "eta": 0.1}
    _, C = last(**how)
    qr, calls = torch.linalg.qr, []

    def flipped(A):
        calls.append(A)
        Q, R = qr(A)
        signs = torch.ones(len(R)).to(R)
        if len(calls) > 1:  # not those of the start
            signs[len(calls) % len(R)] = -1
        return Q * signs, signs[:, None] * R

    monkeypatch.setattr(torch.linalg, "qr", flipped)
    torch.testing.assert_close(last(**how)[1], C)


def test_no_random_subspace_beats_pca():
    _, S, V, _ = covariance(data(3))
    best = reconstruction_loss(V[:, :2], S)
    for _ in range(50):
        assert reconstruction_loss(torch.linalg.qr(torch.randn(3, 2, dtype=S.dtype))[0], S) > best


@pytest.fixture
def points(monkeypatch):
    """Test points whose principal axes are not those of the training points."""
    x = data(6, 400)
    points = shared.Data("points", x, None, x[:100].flip(1), None, torch.Size([1, 2, 3]))
    monkeypatch.setattr(shared, "load_data", lambda *_, **__: points)
    return points


def test_a_run_fits_the_training_points_and_measures_both(points, monkeypatch, tmp_path, capsys):
    drawn = []
    monkeypatch.setattr(shared.Run, "picture", lambda run, name, _: drawn.append(name))
    train(monkeypatch, pca_gd, "--k", 2, "--out-dir", tmp_path, "--run-name", "p")
    assert "variance, penalty, then one QR" in capsys.readouterr().out
    assert drawn == ["convergence", "components", "reconstructions", "curves"]
    folder = tmp_path / "pca_gd/p"
    summary = json.loads((folder / "summary.json").read_text())
    x, mean = points.x_train, points.x_train.mean(0)
    V = torch.linalg.eigh(torch.cov(x.T, correction=0))[1].flip(1)[:, :2]
    for name, part in (("mse_train", x), ("mse_test", points.x_test)):
        error = (part - mean - (part - mean) @ V @ V.T).square().mean().item()
        assert summary[f"analytic/{name}"] == pytest.approx(error)
        assert summary[f"reconstruction, QR/{name}"] == pytest.approx(error, rel=1e-2)
    for name in methods(1.0, 1.0):
        assert summary[f"{name}/angle"] < 1e-3 and summary[f"{name}/steps"] < 3000
    assert summary["variance, penalty/ratio"] > 1.01
    assert summary["variance, penalty, then one QR/ratio"] == pytest.approx(1, abs=1e-4)
    assert summary["reconstruction, QR/ratio"] == pytest.approx(1, abs=1e-4)
    model = torch.load(folder / "model.pt", weights_only=True)["pca"]
    torch.testing.assert_close(model["mean"], mean)
    assert shared.pca.angle(model["C"], V) < 1e-3 and orthonormality(model["C"]) < 1e-10
    assert shared.pca.angle(model["C"], V) > 1e-12, "by gradient descent, not the analytic one"

    with pytest.raises(SystemExit):
        train(monkeypatch, pca_gd, "--eval", folder / "model.pt")
    assert "start it again" in capsys.readouterr().err


@pytest.mark.parametrize("k", (6, 7))
def test_more_components_than_the_data_has_are_refused(k, points, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, pca_gd, "--k", k, "--out-dir", tmp_path)
    assert stop.value.code == 2 and "spans 6 dimensions" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
