"""LeNet, the judge of MNIST's reconstructions and samples: identity and LeNet-FID.

    python assets/lenet.py              # trains it, where there is no assets/lenet.pt

The committed weights were made once. They are not made again: new ones would make all
identities and LeNet-FIDs incomparable. Right on 99.44 % of the test images.
"""

import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

WEIGHTS = Path(__file__).with_name("lenet.pt")


@cache
def lenet(device, trained=True):
    """Images (N, 1, 28, 28) → 10 logits; lenet(device)[:-1]: 84 features."""
    with torch.random.fork_rng(devices=[]):  # a training's random numbers are left alone
        first = nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)
        second = nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
        hidden = nn.Linear(800, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()
        net = nn.Sequential(*first, *second, *hidden, nn.Linear(84, 10))
    if trained:
        net.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return net.to(device)


@torch.no_grad()
def judge(net, images):
    """LeNet, or a part of it, on images (N, 1, 28, 28), clipped to [0, 1]."""
    return torch.cat([net(part) for part in images.clamp(0, 1).split(2000)])


def digits(images):
    """LeNet's labels of images (N, C, H, W)."""
    return judge(lenet(images.device), images).argmax(1)


def identity(images, y):
    """% of reconstructions (N, C, H, W) to which LeNet gives the true label y (N,)."""
    return 100 * (digits(images) == y).sum().item() / len(y)


def fid(real, fake):
    """LeNet-FID of images (M, C, H, W) and (N, C, H, W): ‖μ − μ'‖² + tr(C + C' − 2(CC')^½) of 84
    features; comparable with itself alone."""
    features = lenet(real.device)[:-1]
    f, g = (judge(features, images).cpu().double().numpy() for images in (real, fake))
    C, D = np.cov(f.T), np.cov(g.T)
    eigenvalues = np.linalg.eigvals(C @ D).astype(complex)  # tr (CD)^½ is the sum of their roots
    trace = np.trace(C) + np.trace(D) - 2 * np.sqrt(eigenvalues).real.sum()
    return float(np.square(f.mean(0) - g.mean(0)).sum() + trace)


def image_metrics(data, x_rec=None, x_fake=None):
    """Of reconstructions x_rec of the test images (M, X), and of samples x_fake (N, X); LeNet
    judges MNIST alone."""
    metrics = {}
    by_lenet = data.name == "mnist"
    if x_rec is not None:
        metrics["eval/recon_mse"] = (data.x_test - x_rec.clamp(0, 1)).square().mean().item()
    if x_rec is not None and by_lenet:
        metrics["eval/identity"] = identity(data.images(x_rec), data.y_test)
    if x_fake is not None and by_lenet:
        x_fake = data.images(x_fake[: len(data.x_test)])  # as many; fewer in a smoke run alone
        metrics["eval/fid"] = fid(data.images(data.x_test), x_fake)
    return metrics


def moved(images, generator):
    """Each image (B, 1, 28, 28) moved by up to 2 pixels in both directions."""
    shift = torch.eye(2, 3).repeat(len(images), 1, 1)
    shift[:, :, 2] = torch.randint(-2, 3, (len(images), 2), generator=generator) / 14
    grid = affine_grid(shift, images.shape, align_corners=False)
    return grid_sample(images, grid, "nearest", align_corners=False)


def train(data, epochs=12, batch_size=128, lr=2e-3):
    """LeNet, trained on moved training images; data: shared.Data on the CPU."""
    x = data.images(data.x_train)
    net = lenet(x.device, trained=False)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, weight_decay=1e-5)
    steps = epochs * (len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for i in order[: len(x) - len(x) % batch_size].view(-1, batch_size):
            optimizer.zero_grad()
            cross_entropy(net(moved(x[i], generator)), data.y_train[i]).backward()
            optimizer.step()
            schedule.step()
        right = (judge(net, data.images(data.x_test)).argmax(1) == data.y_test).float().mean()
        print(f"epoch {epoch + 1}: {100 * right:.2f} % right on the test images", flush=True)
    return net


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared

    if WEIGHTS.exists():
        shared.fail(f"{WEIGHTS} exists: new weights would make all numbers incomparable")
    config = shared.Protocol(device="cpu")
    net = train(shared.load_data(config, shared.setup(config)))
    torch.save(net.state_dict(), WEIGHTS)
