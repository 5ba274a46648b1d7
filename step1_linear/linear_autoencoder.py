"""Linear autoencoder: the pixelwise error of a rank-k reconstruction, minimised by Adam.

E: x → w (k) and G: w → x (d) are matrices, x is centred, σ the standard deviation of its pixels:

    l2   min  mean ((x − G E x)/σ)²       PCA's subspace is the optimum (Eckart & Young 1936)
    l1   min  mean |x − G E x|/σ

    python step1_linear/linear_autoencoder.py                # l2 on MNIST, k = 10; or --k 50
    python step1_linear/linear_autoencoder.py --loss l1

Expect (seed 0, test MSE over PCA's): l2 1.000 at k = 10 and 50; l1 1.08 and 1.27.

It is a reference for compare_autoencoders.py, after LinearVanilaAE of
github.com/ariel415el/LabProject-ALAE. Deviations from that: Adam's learning rate is 0.002, falling
linearly to 0, not 0.001; 5,000 steps of 256 images, each image once an epoch, not 1,000 of 64 drawn
at random.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

import torch
from torch import nn


@dataclass
class Config(shared.Protocol):
    dataset: str = option("mnist", "an image dataset, or a toy in 3-D: swiss_roll, sine_sheet")
    loss: str = option("l2", "squared or absolute error", ("l2", "l1"))
    k: int = option(10, "dimension of the code", low=1)
    steps: int = option(5000, "training steps (ours)", low=0)
    batch_size: int = option(256, "images per step (ours)", low=1)
    lr: float = option(0.002, "Adam's learning rate, falling linearly to 0 (ours)", low=1e-9)
    eval_every: int = option(250, "steps between evaluations", low=1)


class Scaling(nn.Module):
    """Pixels → the x that the maps see: scale · (x − mean)."""

    def __init__(self, mean, scale):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x):
        return (x - self.mean) * self.scale


def build(config, x):
    """Matrices E (k, d) and G (d, k), for images x (N, d), which are not scaled."""
    E = nn.Linear(x.shape[1], config.k, bias=False)
    G = nn.Linear(config.k, x.shape[1], bias=False)
    return nn.ModuleDict({"scaling": Scaling(x.mean(0), 1.0), "E": E, "G": G})


def L_rec(E, G, x, sigma, loss):
    """|x − G E x|/σ or its square, mean over x (B, d) and pixels."""
    error = (x - x @ E.T @ G.T) / sigma
    return error.abs().mean() if loss == "l1" else error.square().mean()


def train_step(nets, opt, x, sigma, config):
    """One step of Adam on x (B, d)."""
    loss = L_rec(nets["E"].weight, nets["G"].weight, x, sigma, config.loss)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return {"L_rec": loss.detach()}


class Data(NamedTuple):
    """Images, and what one needs to compare with PCA, in float64 on the CPU."""

    images: shared.Data
    train: tuple  # mean (d,) and covariance (d, d) of the training images
    test: tuple  # the same of the test images
    pca: tuple  # of the training images, as maps(nets): Vᵀ (k, d), V (d, k), mean (d,)


def moments(x):
    mean = x.mean(0)
    centred = (x - mean).cpu().double()
    return mean.cpu().double(), centred.T @ centred / len(x)


def load(config, device):
    images = shared.load_data(config, device, toys=True)
    mean, S = moments(images.x_train)
    values, vectors = torch.linalg.eigh(S)  # ascending
    rank = int((values > 1e-9 * values[-1].clamp(min=1e-3)).sum())
    if config.k >= rank:
        shared.fail(f"--k {config.k}: the data spans {rank} dimensions, choose less")
    if config.batch_size > len(images.x_train):
        shared.fail(f"--batch-size {config.batch_size} is larger than the training data")
    V = vectors.flip(1)[:, : config.k]
    return Data(images, (mean, S), moments(images.x_test), (V.T, V, mean))


def maps(nets):
    """E (k, d), G (d, k) and mean (d,) for pixels: x̂ = mean + G E (x − mean)."""
    state = {name: t.cpu().double() for name, t in nets.state_dict().items()}
    scale = state["scaling.scale"]
    return state["E.weight"] * scale, state["G.weight"] / scale, state["scaling.mean"]


def reconstruct(x, E, G, mean):
    return mean.to(x) + (x - mean.to(x)) @ E.T.to(x) @ G.T.to(x)


def mse(E, G, mean, moments):
    """Mean over images and pixels of (x − x̂)², from the images' moments."""
    offset = moments[0] - mean
    S = moments[1] + offset.outer(offset)  # about the maps' mean
    ES = E @ S
    return (S.trace() - 2 * (ES * G.T).sum() + ((G.T @ G) * (ES @ E.T)).sum()).item() / len(S)


def evaluate(nets, data, config, full=False):
    """Errors, the same of PCA, their ratio, and angles to PCA's subspace."""
    E, G, mean = maps(nets)
    V, variance = data.pca[1], data.train[1].trace().item() / len(mean)
    metrics = {}
    for name, part in (("train", data.train), ("test", data.test)):
        metrics[f"eval/mse_{name}"] = mse(E, G, mean, part)
        metrics[f"eval/pca_mse_{name}"] = mse(*data.pca, part)
    metrics["eval/ratio"] = metrics["eval/mse_train"] / metrics["eval/pca_mse_train"]
    metrics["eval/ratio_test"] = metrics["eval/mse_test"] / metrics["eval/pca_mse_test"]
    metrics["eval/explained"] = 100 * (1 - metrics["eval/mse_train"] / variance)  # %
    for name, basis in (("E", E.T), ("G", G)):
        angles = torch.linalg.svdvals(torch.linalg.qr(basis)[0].T @ V).clamp(max=1).acos()
        metrics[f"eval/angle_{name}"] = angles.max().item()
        metrics[f"eval/angle_mean_{name}"] = angles.mean().item()
    if full and data.images.shape is not None:
        x_test = data.images.x_test
        metrics |= shared.image_metrics(data.images, reconstruct(x_test, E, G, mean))
    return metrics


def draw(run, data, config):
    """At the end: components and reconstructions, beside PCA's."""
    if data.images.shape is None or (run.is_due() and not config.eval):
        return
    E, G, mean = maps(run.nets)
    V, S = data.pca[1], data.train[1]
    title = f"Linear AE ({config.loss}), {config.dataset}, k = {config.k}, step {run.epoch}"
    Q = torch.linalg.qr(G)[0]
    Q = Q @ torch.linalg.eigh(Q.T @ S @ Q)[1].flip(1)  # the principal axes in the span of G
    Q = torch.where((Q * V).sum(0) < 0, -Q, Q)  # eigenvectors have no sign
    axes = torch.cat([V.T[:10], Q.T[:10]])
    images = data.images.images(0.5 + axes / (2 * axes.abs().amax(1, keepdim=True)))
    run.picture("components", shared.grid(images, len(axes) // 2, title, ["PCA", "ours"]))
    x = data.images.x_test[:12]
    images = torch.cat([x, reconstruct(x, *data.pca), reconstruct(x, E, G, mean)])
    images = data.images.images(images)
    run.picture("reconstructions", shared.grid(images, len(x), title, ["x", "PCA", "ours"]))


def main(config):
    device = shared.setup(config)
    data = load(config, device)
    nets = build(config, data.images.x_train).to(device)
    x_train = nets["scaling"](data.images.x_train)
    sigma = x_train.std()
    opt = torch.optim.Adam(nets.parameters(), lr=config.lr, fused=True)
    parts = {"nets": nets, "opt": opt}

    run = shared.Run(config, device, nets)  # its own
    for row in run.epochs(parts):  # its own
        for step, i in shared.step_batches(x_train, config, row):  # its own
            opt.param_groups[0]["lr"] = config.lr * (1 - (step - 1) / config.steps)  # its own
            losses = train_step(nets, opt, x_train[i], sigma, config)  # its own
            run.step(losses, len(i))
        run.log_losses()
        if run.is_due():
            run.log(evaluate(run.nets, data, config))
            draw(run, data, config)
        run.save(parts)
    metrics = evaluate(run.nets, data, config, full=True)
    draw(run, data, config)
    run.finish(metrics)


if __name__ == "__main__":
    main(shared.parse_config(Config))
