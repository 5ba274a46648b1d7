"""Linear autoencoder: the pixelwise error of a rank-k reconstruction, minimised by Adam.

E: x → w (k) and G: w → x (d) are matrices, x is centred, σ the standard deviation of its pixels:

    l2   min  mean ((x − G E x)/σ)²       PCA's subspace is the optimum (Eckart & Young 1936)
    l1   min  mean |x − G E x|/σ

    python step1_linear/linear_autoencoder.py                # l2 on MNIST, k = 10; or --k 50
    python step1_linear/linear_autoencoder.py --loss l1

Expect (seed 0, test MSE over PCA's): l2 1.000 at k = 10 and 50; l1 1.08 and 1.27.

A reference for the other linear files, after LinearVanilaAE of
github.com/ariel415el/LabProject-ALAE. Deviations from that: Adam's learning rate is 0.002, falling
linearly to 0, not 0.001; 5,000 steps of 256 images, each image once an epoch, not 1,000 of 64 drawn
at random.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

import torch
from torch import nn


@dataclass
class Config(shared.Protocol):
    loss: str = option("l2", "squared or absolute error", ("l2", "l1"))
    k: int = option(10, "dimension of the code", low=1)
    steps: int = option(5000, "training steps (ours)", low=0)
    batch_size: int = option(256, "images per step (ours)", low=1)
    lr: float = option(0.002, "Adam's learning rate, falling linearly to 0 (ours)", low=1e-9)
    eval_every: int = option(250, "steps between evaluations", low=1)


def build(config, x):
    """Matrices E (k, d) and G (d, k), for images x (N, d)."""
    E = nn.Linear(x.shape[1], config.k, bias=False)
    G = nn.Linear(config.k, x.shape[1], bias=False)
    pixels = nn.Module()
    pixels.mean = nn.Buffer(x.mean(0))
    pixels.sigma = nn.Buffer((x - pixels.mean).std())
    return nn.ModuleDict({"pixels": pixels, "E": E, "G": G})


def L_rec(E, G, x, sigma, loss):
    """|x − G E x|/σ or its square, mean over x (B, d) and pixels."""
    error = (x - x @ E.T @ G.T) / sigma
    return error.abs().mean() if loss == "l1" else error.square().mean()


def train_step(nets, optimizer, x, config):
    """One step of Adam on x (B, d)."""
    loss = L_rec(nets["E"].weight, nets["G"].weight, x, nets["pixels"].sigma, config.loss)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"L_rec": loss.detach()}


def maps(nets):
    """E (k, d), G (d, k) and mean (d,) for pixels: x̂ = mean + G E (x − mean)."""
    return nets["E"].weight.detach(), nets["G"].weight.detach(), nets["pixels"].mean


def evaluate(nets, data, config, full=False):
    """Errors over PCA's and angles to its subspace; at the end what the codes are worth."""
    E, G, mean = maps(nets)
    metrics = shared.pca.metrics(data, E, G, mean)
    if full:
        train, test = ((x - mean) @ E.T for x in (data.x_train, data.x_test))  # codes (N, k)
        metrics |= shared.image_metrics(data, mean + test @ G.T)
        metrics |= shared.code_metrics(data, train, test, "short")
    return metrics


def draw(run, data, config):
    """Components and reconstructions, beside PCA's; at the end alone."""
    title = f"Linear AE ({config.loss}), {config.dataset}, k = {config.k}, step {run.epoch}"
    for name, x, rows in shared.pca.pictures(data, *maps(run.nets)):
        run.picture(name, shared.grid(data.images(x), len(x) // len(rows), title, rows))


def main(config):
    device = shared.setup(config)
    data = shared.load_data(config, device, size=28)
    shared.pca.fit(data.x_train, config.k)  # refuses a k that is too large
    nets = build(config, data.x_train).to(device)
    x_train = data.x_train - nets["pixels"].mean
    optimizer = torch.optim.Adam(nets.parameters(), lr=config.lr, fused=True)
    parts = {"nets": nets, "optimizer": optimizer}

    run = shared.Run(config, device, nets)  # its own
    for row in run.epochs(parts):  # its own
        for step, i in shared.step_batches(x_train, config, row):  # its own
            optimizer.param_groups[0]["lr"] = config.lr * (1 - (step - 1) / config.steps)  # its own
            losses = train_step(nets, optimizer, x_train[i], config)  # its own
            run.step(losses, len(i))
        run.log_losses()
        if run.is_due():
            run.log(evaluate(run.nets, data, config))  # its own
        run.save(parts)
    metrics = evaluate(run.nets, data, config, full=True)
    draw(run, data, config)
    run.finish(metrics)


if __name__ == "__main__":
    main(shared.parse_config(Config))
