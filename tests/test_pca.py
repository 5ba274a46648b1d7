"""PCA by gradient descent: identities of the shipped functions."""
import torch

import shared
from pca_gd import analytic, covariance, descend, largest_angle, methods, orthonormality, reconstruction_loss, variance_loss


def data(d=20, n=500):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, d, dtype=torch.float64, generator=generator) * torch.linspace(2, 0.5, d) + 3


def test_loss_on_the_covariance_is_the_loss_on_the_data():
    x = data()
    mean, S = covariance(x)
    C = torch.randn(20, 4, dtype=torch.float64)  # not orthonormal
    direct = (x - mean - (x - mean) @ C @ C.T).square().sum(1).mean()
    torch.testing.assert_close(reconstruction_loss(C, S), direct)
    torch.testing.assert_close(variance_loss(C, S), -((x - mean) @ C).square().sum(1).mean())


def test_each_method_spans_what_the_eigenvectors_span():
    _, S = covariance(data())
    V, values = analytic(S, 4)
    for name, how in methods(values[0].item(), values[0].item()).items():
        C, _, _ = descend(S=S, k=4, steps=3000, **how)
        assert largest_angle(C, V) < 1e-5, name
        assert how.get("exact") is False or orthonormality(C) < 1e-20, name


def test_optimum_of_the_soft_variance_problem():
    _, S = covariance(data())
    V, values = analytic(S, 4)
    rho = 2 * values[0].item()
    C, _, _ = descend(S=S, k=4, steps=5000, **methods(values[0].item(), rho)["variance, penalty"])
    found = torch.linalg.eigvalsh(C.T @ C).flip(0)
    torch.testing.assert_close(found, 1 + values / (2 * rho), rtol=1e-8, atol=1e-8)


def test_a_large_step_is_subspace_iteration():
    _, S = covariance(data())
    C, _, _ = descend(variance_loss, S, 4, 7, eta=1e9, momentum=False)
    Q = torch.linalg.qr(torch.randn(20, 4, dtype=S.dtype, generator=torch.Generator().manual_seed(0)))[0]
    for _ in range(7):
        Q = torch.linalg.qr(S @ Q)[0]
    assert largest_angle(C, Q) < 1e-6


def test_no_random_subspace_beats_pca():
    _, S = covariance(shared.load_vectors(shared.Protocol(dataset="swiss_roll"), "cpu")[0].double())
    best = reconstruction_loss(analytic(S, 2)[0], S)
    for _ in range(50):
        assert reconstruction_loss(torch.linalg.qr(torch.randn(3, 2, dtype=S.dtype))[0], S) >= best
