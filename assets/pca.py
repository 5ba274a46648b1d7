"""PCA, the yardstick of linear maps: their errors over its own, and angles to its subspace.

A linear autoencoder is three maps: E (k, d), G (d, k) and mean (d,), x̂ = mean + G E (x − mean).
Here they are in float64 on the CPU, and only the mean and the covariance of images are needed.
"""

from functools import lru_cache

import torch
from scipy.linalg import subspace_angles


@lru_cache(2)  # of the training and of the test images, which do not change
def moments(x):
    """Mean (d,) and covariance (d, d) of images x (n, d)."""
    mean = x.mean(0)
    centred = (x - mean).cpu().double()
    return mean.cpu().double(), centred.T @ centred / len(x)


@lru_cache(1)
def fit(x, k):
    """PCA's E, G and mean for images x (n, d); ends the program if they span no more than k."""
    mean, S = moments(x)
    values, vectors = torch.linalg.eigh(S)  # ascending
    rank = int((values > 1e-9 * values[-1].clamp(min=1e-3)).sum())
    if k >= rank:
        import shared  # not above: shared imports this file

        shared.fail(f"--k {k}: the data spans {rank} dimensions, choose less")
    V = vectors.flip(1)[:, :k]
    return V.T, V, mean


def mse(x, E, G, mean):
    """Mean over images x (n, d) and pixels of (x − x̂)², without clipping, from their moments."""
    centre, S = moments(x)
    S = S + (centre - mean).outer(centre - mean)  # about the maps' mean
    ES = E @ S
    total = S.trace() - 2 * (ES * G.T).sum() + ((G.T @ G) * (ES @ E.T)).sum()
    return total.item() / len(S)


def angle(A, B):
    """Largest principal angle, in rad, between the column spaces of A and B (d, k)."""
    A = torch.linalg.qr(A)[0]  # SciPy leaves out a direction in which A is 0
    return float(subspace_angles(A, B)[0])


def metrics(data, E, G, mean):
    """Errors on training and test images, over PCA's, and angles to PCA's subspace."""
    E, G, mean = (t.cpu().double() for t in (E, G, mean))
    best = fit(data.x_train, len(E))
    found = {}
    for name, x in (("train", data.x_train), ("test", data.x_test)):
        found[f"eval/mse_{name}"] = mse(x, E, G, mean)
        found[f"eval/pca_mse_{name}"] = mse(x, *best)
    found["eval/ratio"] = found["eval/mse_train"] / found["eval/pca_mse_train"]
    found["eval/ratio_test"] = found["eval/mse_test"] / found["eval/pca_mse_test"]
    return found | {"eval/angle_E": angle(E.T, best[1]), "eval/angle_G": angle(G, best[1])}


def pictures(data, E, G, mean):
    """(Name, images (N, d), names of rows): components and reconstructions, PCA's and ours."""
    E, G, mean = (t.cpu().double() for t in (E, G, mean))
    best = fit(data.x_train, len(E))
    V, GE = best[1], G @ E
    S_rec = GE @ moments(data.x_train)[1] @ GE.T  # the covariance of x̂
    U = torch.linalg.eigh(S_rec)[1].flip(1)[:, : len(E)]
    U = torch.where((U * V).sum(0) < 0, -U, U)  # eigenvectors have no sign
    axes = torch.cat([V.T[:10], U.T[:10]])
    axes = 0.5 + axes / (2 * axes.abs().amax(1, keepdim=True))
    x = data.x_test[:12].cpu().double()
    x_rec = [m + (x - m) @ e.T @ g.T for e, g, m in (best, (E, G, mean))]
    yield "components", axes, ["PCA", "ours"]
    yield "reconstructions", torch.cat([x, *x_rec]), ["x", "PCA", "ours"]
