"""Adversarial autoencoder (AAE), arXiv 1511.05644, as github.com/fducau/AAE_pytorch has it.

Encoder Q: x → z, decoder P: z → x̂, discriminator D, which tells z ~ p(z) from z = Q(x). For each
batch three phases, one after the other (paper §2); p(z) is N(0, σ²I):

    1. reconstruction  Q, P  minimise  L_rec = −x log P(Q(x)) − (1 − x) log(1 − P(Q(x)))
    2. discriminator   D     minimises L_D   = −log D(z) − log(1 − D(Q(x))),  z ~ p(z)
    3. generator       Q     minimises L_Q   = −log D(Q(x))

    python baselines/aae_pytorch.py                                # the settings of its README
    python baselines/aae_pytorch.py --preset basic --epochs 500    # of script/aae_pytorch_basic.py

Expect (seeds 0, 1, test images): MSE 0.047, 0.042; identity 55, 70 %; prior gap 9, 25 times its
floor.

Deviations from that code, README and script (commit 30c05b6):
 1. There 47,000 training images, seed 10, and in the script 500 epochs; here 60,000 images, any
    seed, 30 epochs. The README names neither epochs nor the dimension of z; 2 is the script's.
 2. There the second layer of P has no ReLU, which is a bug; --no-relu-P does the same.
 3. Here losses are computed from logits, there from log(D + 1e-15). Here images are in [0, 1] from
    the start; there they are standardised first, and then transformed back.
 4. Dropout masks of the generator's pass are drawn before those of D.
 5. Paper: SGD with momentum, no dropout, and a squared error.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

PRESETS = {
    "readme": {},
    "basic": {"lr": 1e-4, "lr_reg": 5e-5, "dropout": 0.2, "prior_std": 5.0},
}


@dataclass
class Config(shared.Protocol):
    preset: str = option("readme", "the public code's README, or its script", tuple(PRESETS))
    epochs: int = option(30, "passes over the training images (script: 500)", low=0)
    batch_size: int = option(100, "images per step", low=2)
    latent_dim: int = option(2, "dimension of z (script)", low=1)
    prior_std: float = option(1.0, "σ of p(z) = N(0, σ²I) (README; script: 5)", low=1e-9)
    dropout: float = option(0.25, "in Q and P (README; script: 0.2)", low=0, high=1)
    dropout_D: float = option(0.2, "in D", low=0, high=1)
    relu_P: bool = option(True, "the ReLU of P's second layer (deviation 2)")
    lr: float = option(6e-4, "rate of Adam for reconstruction (README; script: 1e-4)", low=1e-9)
    lr_reg: float = option(8e-4, "of D, and of Q against it (README; script: 5e-5)", low=1e-9)
    precision: str = option("fp32", "of matrix products in training", ("fp32", "bf16"))


# B batch, Z = latent_dim, X = pixels (784), H = 1000


def build(config, X):
    """Q: x (B, X) → z (B, Z), P: z → logits of pixels (B, X), D: z → (B, 1)."""
    Z = config.latent_dim

    def layer(n, m, dropout):
        return [nn.Linear(n, m), nn.Dropout(dropout), nn.ReLU()]

    Q = [
        *layer(X, 1000, config.dropout),
        *layer(1000, 1000, config.dropout),
        nn.Linear(1000, Z),
    ]
    P = [
        *layer(Z, 1000, config.dropout),
        *layer(1000, 1000, config.dropout),
        nn.Linear(1000, X),
    ]
    if not config.relu_P:
        del P[5]  # of linear, dropout, ReLU, linear, dropout, ReLU, linear
    D = [
        *layer(Z, 1000, config.dropout_D),
        *layer(1000, 1000, config.dropout_D),
        nn.Linear(1000, 1),
    ]
    return nn.ModuleDict({"Q": nn.Sequential(*Q), "P": nn.Sequential(*P), "D": shared.Float32(*D)})


def sample_prior(x, config, seed=None):
    """A draw of p(z) for each row of x: (n, Z); with a seed always the same."""
    generator = None if seed is None else torch.Generator(x.device).manual_seed(seed)
    z = torch.randn(len(x), config.latent_dim, device=x.device, generator=generator)
    return config.prior_std * z


def L_rec(logits, x):
    """−x log x̂ − (1 − x) log(1 − x̂), mean over batch and pixels; x̂ = σ(logits)."""
    return binary_cross_entropy_with_logits(logits, x)


def L_D(D, z, z_fake):
    """−log D(z) − log(1 − D(z_fake)), mean over the batch; D gives logits."""
    return (softplus(-D(z)) + softplus(D(z_fake))).mean()


def L_Q(D, z_fake):
    """−log D(z_fake), mean over the batch."""
    return softplus(-D(z_fake)).mean()


def train_step(nets, opts, x, config):
    """The three phases on x (B, X)."""
    Q, P, D = nets["Q"], nets["P"], nets["D"]

    # Reconstruction
    with shared.products(config, x.device):
        logits = shared.fp32(P(Q(x)))
    loss_rec = L_rec(logits, x)
    nets.zero_grad()
    loss_rec.backward()
    opts["P"].step()
    opts["Q_rec"].step()

    # Discriminator, to which Q shows its codes without dropout
    z = sample_prior(x, config)  # (B, Z)
    with shared.products(config, x.device):
        z_fake = Q(x)  # with dropout, for the generator's phase
        with torch.no_grad():
            z_shown = Q.eval()(x)
    Q.train()
    loss_D = L_D(D, z, z_shown)
    opts["D"].zero_grad()
    loss_D.backward()
    opts["D"].step()

    # Generator
    loss_Q = L_Q(D, z_fake)
    opts["Q_reg"].zero_grad()
    loss_Q.backward(inputs=list(Q.parameters()))
    opts["Q_reg"].step()
    return {"L_rec": loss_rec.detach(), "L_D": loss_D.detach(), "L_Q": loss_Q.detach()}


def optimizers(nets, config):
    """Adam for each role; Q has two."""
    rates = {"Q_rec": config.lr, "P": config.lr, "D": config.lr_reg, "Q_reg": config.lr_reg}
    opts = {}
    for role, lr in rates.items():
        opts[role] = torch.optim.Adam(nets[role[0]].parameters(), lr, fused=True)
    return opts


def evaluate(nets, data, config, full=False):
    """Short features: Q(x) (N, Z); long: the activations (N, H) before Q's last layer."""
    nets.eval()
    Q, P = nets["Q"], nets["P"]
    long = [shared.chunked(Q[:-1], x) for x in (data.x_train, data.x_test)]
    z_train, z_test = [shared.chunked(Q[-1], hidden) for hidden in long]
    x_rec = shared.chunked(P, z_test).sigmoid()
    x_fake = shared.chunked(P, sample_prior(z_test, config, 0)).sigmoid()
    metrics = shared.image_metrics(data, x_rec, x_fake)
    metrics |= shared.code_metrics(data, z_train, z_test, "short", full)
    if full:
        metrics |= shared.code_metrics(data, *long, "long")
    draws = [sample_prior(z_test, config, seed) for seed in range(1, 9)]
    metrics |= shared.prior.gaps(z_train, z_test, draws)
    nets.train()
    return metrics


@torch.no_grad()
def draw(run, data, config):
    """Samples, reconstructions, codes beside the prior; for two dimensions the plane of z, too."""
    run.nets.eval()
    Q, P = run.nets["Q"], run.nets["P"]
    x, z = data.x_test, shared.chunked(Q, data.x_test)
    title = f"AAE_pytorch, {config.preset}, epoch {run.epoch}"

    def decode(z):
        return data.images(P(z).sigmoid())

    z_prior = sample_prior(z, config, 0)
    samples = decode(z_prior[:100])
    run.picture("samples", shared.grid(samples, 10, f"{title}: samples"))
    pairs = data.images(x[:50]), decode(z[:50])
    run.picture("reconstructions", shared.pairs(*pairs, f"{title}: test images x and P(Q(x))"))
    figure = Figure(figsize=(8, 4), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    left.set(title="codes of test images", xlabel="z$_1$")
    left.set(ylabel=f"z$_{{{config.latent_dim}}}$")
    right.set(title="draws of p(z)", xlabel="z$_1$")
    colors = {}
    if data.y_test is not None:
        colors = {"c": data.y_test.cpu(), "cmap": "tab10"}
    points = left.scatter(*z[:, [0, -1]].T.cpu(), s=2, **colors)
    if colors:
        left.legend(*points.legend_elements(), title="digit", fontsize=8)
    right.scatter(*z_prior[:, [0, -1]].T.cpu(), s=2)
    run.picture("codes", figure)
    if config.latent_dim == 2:
        axis = config.prior_std * torch.linspace(-2, 2, 15, device=z.device)
        codes = torch.cartesian_prod(axis.flip(0), axis).flip(1)  # z₁ to the right, z₂ upwards
        plane = decode(codes)
        run.picture("plane", shared.grid(plane, 15, f"{title}: P over the plane, ±2σ"))
    run.nets.train()


def main(config):
    device = shared.setup(config)
    data = shared.load_data(config, device, size=32)
    nets = build(config, data.x_train.shape[1]).to(device)
    opts = optimizers(nets, config)
    parts = {"nets": nets} | opts

    run = shared.Run(config, device, nets, len(data.x_train) // config.batch_size)
    for epoch in run.epochs(parts):
        for i in shared.batches(data.x_train, config.batch_size, config.seed, epoch):
            losses = train_step(nets, opts, data.x_train[i], config)  # its own
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
    main(shared.parse_config(Config, PRESETS))
