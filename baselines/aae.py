"""Adversarial autoencoder (AAE), arXiv 1511.05644: a discriminator makes codes look like a prior.

Encoder Q: x → z, decoder P: z → x̂, discriminator D, which tells z ~ p(z) from z = Q(x). For each
batch three phases, one after the other (paper §2):

    1. reconstruction  Q, P  minimise  L_rec = ‖x − P(Q(x))‖², or the cross-entropy of pixels
    2. discriminator   D     minimises L_D   = −log D(z) − log(1 − D(Q(x))),  z ~ p(z)
    3. generator       Q     minimises L_Q   = −log D(Q(x))

With --labels the one-hot class y goes to P and to D beside z, so that z is left with the style.

    python baselines/aae.py                           # Freiburg's own rates
    python baselines/aae.py --preset ours --labels    # better ones, and labels

Expect (--preset ours, seed 0): test MSE 0.0232, identity 90.1 %, prior gap 0.033, floor 0.017.

Deviations from the paper (P) and two public codes, F: github.com/PatrykChrabaszcz/
Adversarial_Autoencoder, of Freiburg, and A: github.com/fducau/AAE_pytorch; README.md has more:
 1. F: two states are mixed. As in its head losses are means, and the balance rule looks at the
    batch before; as in its commit of January 24 Adam has rate 2e-4 and β₁ = 0.5, in separate
    phases. The head has one pass for all gradients and RMSprop at 5e-5; that commit sums over
    pixels and batch, beside which Adam's ε is smaller, and looks at the current batch.
 2. F divides its rates by hand; here by 5 whenever --patience epochs bring the training's L_rec
    down by less than 1 %. A last stage of RMSprop is left out, and its Xavier-uniform start.
 3. P: SGD with momentum, D with 1000 units, a label for D alone; here Adam, and P has it too.
 4. --preset ours is from trials on val that are not kept: D learns ten times as fast as Q does
    against it, and batch norm's running statistics, whose noise moves the codes, forget slower.
"""

import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize, one_hot, softplus
from torch.optim.lr_scheduler import ReduceLROnPlateau

NETS_A = {"hidden_D": 1000, "slope": 0.0, "batch_norm": False, "dropout": 0.25, "dropout_D": 0.2}
ADAM_A = {"batch_size": 100, "lr": 6e-4, "lr_D": 8e-4, "lr_Q": 8e-4, "beta1": 0.9, "patience": 0}
CODE_A = {"prior": "gaussian", "latent_dim": 2, "loss": "bce", "q_eval": True, "balance": False}
PRESETS = {
    "freiburg": {},
    "ours": {"lr_D": 1e-3, "lr_Q": 1e-4, "bn_momentum": 0.01},  # deviation 4
    "aae_pytorch": NETS_A | ADAM_A | CODE_A,
    "faces": {"net": "conv", "latent_dim": 50},  # Freiburg's
}
GUESSING = {"L_D": 2 * math.log(2), "L_Q": math.log(2)}  # the balance rule's start, each epoch


@dataclass
class Config(shared.Protocol):
    preset: str = option("freiburg", "a public code's settings, or ours", tuple(PRESETS))
    epochs: int = option(30, "passes over the training images (A: 500; F: by hand)", low=0)
    batch_size: int = option(128, "images per step (F; A: 100)", low=2)
    net: str = option("dense", "784-1000-1000-z and back, or F's convolutions", ("dense", "conv"))
    labels: bool = option(False, "give the one-hot class to P and D (F's scenarios 1 and 3)")
    prior: str = option("truncated", "p(z): N(0, I), or cut at 2 (F)", ("gaussian", "truncated"))
    latent_dim: int = option(5, "dimension of z (F; its faces: 50)", low=1)
    loss: str = option("mse", "L_rec: squared error (F) or cross-entropy (A)", ("mse", "bce"))
    lr: float = option(2e-4, "learning rate of Adam for reconstruction (F; A: 6e-4)", low=1e-9)
    lr_D: float = option(2e-4, "of D (F; A: 8e-4)", low=1e-9)
    lr_Q: float = option(2e-4, "of Q against D (F; A: 8e-4); 0: a plain autoencoder", low=0)
    beta1: float = option(0.5, "β₁ of Adam (F; A: 0.9)", low=0)
    hidden_D: int = option(500, "units of D's two layers (F; A: 1000)", low=1)
    slope: float = option(0.2, "slope of the leaky ReLU (F; A: 0)", low=0)
    batch_norm: bool = option(True, "in Q and P (F)")
    bn_momentum: float = option(0.1, "weight of a batch in the running statistics (F)", low=0)
    dropout: float = option(0.0, "in dense Q and P (A: 0.25)", low=0)
    dropout_D: float = option(0.0, "in D (A: 0.2)", low=0)
    q_eval: bool = option(False, "Q in evaluation mode while D learns (A)")
    balance: bool = option(True, "D and Q each sit out while far ahead (F)")
    patience: int = option(3, "epochs without progress that cut the rates (F; 0: never)", low=0)
    precision: str = option("fp32", "of products in training (ours)", ("fp32", "bf16"))


# B batch, Z = latent_dim, K classes (0 without labels), X = pixels, an image is (C, H, W)


def block(layer, norm, config):
    """Layer, norm, ReLU, dropout."""
    layers = [layer, norm] if config.batch_norm else [layer]
    return [*layers, nn.LeakyReLU(config.slope), nn.Dropout(config.dropout)]


def build(config, shape, K):
    """Q: x (B, X) → z (B, Z), P: (z, y) (B, Z + K) → logits of pixels, D: (z, y) → (B, 1)."""
    Z, M, (C, size, _) = config.latent_dim, config.hidden_D, shape
    X, momentum = math.prod(shape), config.bn_momentum

    def dense(n, m):
        return block(nn.Linear(n, m), nn.BatchNorm1d(m, momentum=momentum), config)

    def conv(layer):
        return block(layer, nn.BatchNorm2d(layer.out_channels, momentum=momentum), config)

    if config.net == "dense":
        Q = [*dense(X, 1000), *dense(1000, 1000), nn.Linear(1000, Z)]
        P = [*dense(Z + K, 1000), *dense(1000, 1000), nn.Linear(1000, X)]
    else:
        channels = [16, 32, 64] if size == 28 else [16, 32, 64, 128]
        n, rest = channels[-1], size >> (len(channels) - 1)  # 7×7 or 4×4: one more kernel
        Q = [nn.Unflatten(1, shape), *conv(nn.Conv2d(C, 16, 3, padding=1))]
        for a, b in pairwise(channels):
            Q += conv(nn.Conv2d(a, b, 4, 2, 1))
        Q += [nn.Conv2d(n, Z, rest), nn.Flatten()]
        P = [nn.Unflatten(1, (Z + K, 1, 1)), *conv(nn.ConvTranspose2d(Z + K, n, rest))]
        for a, b in pairwise(reversed(channels)):
            P += conv(nn.ConvTranspose2d(a, b, 4, 2, 1))
        P += [nn.Conv2d(16, C, 3, padding=1), nn.Flatten()]
    leaky, drop = nn.LeakyReLU(config.slope), nn.Dropout(config.dropout_D)
    D = [nn.Linear(Z + K, M), leaky, drop, nn.Linear(M, M), leaky, drop, nn.Linear(M, 1)]
    return nn.ModuleDict({"Q": nn.Sequential(*Q), "P": nn.Sequential(*P), "D": shared.Float32(*D)})


def sample_prior(y, config, seed=None):
    """A draw of p(z) for each row of y: (n, Z); with a seed always the same."""
    generator = None if seed is None else torch.Generator(y.device).manual_seed(seed)
    z = torch.empty(len(y), config.latent_dim, device=y.device)
    if config.prior == "gaussian":
        return z.normal_(generator=generator)
    return nn.init.trunc_normal_(z, 0, 1, -2, 2, generator=generator)


def L_rec(logits, x, loss):
    """Mean over batch and pixels of (x − x̂)² or of the cross-entropy; x̂ = σ(logits)."""
    if loss == "bce":
        return binary_cross_entropy_with_logits(logits, x)
    return (x - logits.sigmoid()).square().mean()


def L_D(D, z, z_fake):
    """−log D(z) − log(1 − D(z_fake)), mean over the batch; D gives logits."""
    return (softplus(-D(z)) + softplus(D(z_fake))).mean()


def L_Q(D, z_fake):
    """−log D(z_fake), mean over the batch."""
    return softplus(-D(z_fake)).mean()


def balance(l_D, l_Q):
    """Whether D and Q train after a batch with these losses (F, whose l_D is half of L_D)."""
    return l_Q < 0.95 or l_D / 2 > 0.45, l_D / 2 < 0.95 or l_Q > 0.45


def train_step(nets, opts, x, y, config, before):
    """The three phases on x (B, X) of classes y (B, K); before: the losses of the last batch."""
    Q, P, D = nets["Q"], nets["P"], nets["D"]

    # Reconstruction
    with shared.products(config, x.device):
        logits = shared.fp32(P(torch.cat([Q(x), y], 1)))
    loss_rec = L_rec(logits, x, config.loss)
    nets.zero_grad()
    loss_rec.backward()
    opts["P"].step()
    opts["Q_rec"].step()
    if not config.lr_Q:
        return {"L_rec": loss_rec.detach()}
    trains_D, trains_Q = True, True
    if config.balance:
        trains_D, trains_Q = balance(float(before["L_D"]), float(before["L_Q"]))

    # Discriminator
    z = torch.cat([sample_prior(y, config), y], 1)  # (B, Z + K)
    with shared.products(config, x.device):
        z_fake = torch.cat([Q(x), y], 1)
    z_shown = z_fake.detach()
    if config.q_eval:
        with torch.no_grad():
            z_shown = torch.cat([Q.eval()(x), y], 1)
        Q.train()
    loss_D = L_D(D, z, z_shown)
    if trains_D:
        opts["D"].zero_grad()
        loss_D.backward()
        opts["D"].step()

    # Generator
    loss_Q = L_Q(D, z_fake)
    if trains_Q:
        opts["Q_reg"].zero_grad()
        loss_Q.backward(inputs=list(Q.parameters()))
        opts["Q_reg"].step()
    losses = {"L_rec": loss_rec, "L_D": loss_D, "L_Q": loss_Q}
    shares = {"trains_D": torch.tensor(float(trains_D)), "trains_Q": torch.tensor(float(trains_Q))}
    return {name: loss.detach() for name, loss in losses.items()} | shares


def optimizers(nets, config):
    """Adam for each role; Q has two."""

    def adam(name, lr):
        return torch.optim.Adam(nets[name].parameters(), lr, (config.beta1, 0.999), fused=True)

    opts = {"Q_rec": adam("Q", config.lr), "P": adam("P", config.lr)}
    return opts | {"D": adam("D", config.lr_D), "Q_reg": adam("Q", config.lr_Q)}


def plateau_rules(opts, config):
    """Deviation 2, for each optimizer; with --patience 0 never."""
    patience = config.patience - 1 if config.patience else math.inf
    how = {"factor": 0.2, "patience": patience, "threshold": 0.01}
    return {f"plateau_{name}": ReduceLROnPlateau(opt, **how) for name, opt in opts.items()}


def given_labels(data, config):
    """One-hot classes (N, K), (M, K) of training and test images for P and D; without, K = 0."""
    if not config.labels:
        return data.x_train[:, :0], data.x_test[:, :0]
    if data.y_train is None:
        shared.fail(f"--labels: {config.dataset} has none")
    K = int(data.y_train.max()) + 1
    return one_hot(data.y_train, K).float(), one_hot(data.y_test, K).float()


def turns(n, y):
    """One-hot classes (n, K) that take turns, of as many columns as y has."""
    return torch.eye(max(y.shape[1], 1), device=y.device).repeat(n, 1)[:n, : y.shape[1]]


def sliced_wasserstein(a, b, directions=200):
    """Mean over random directions of the 1-Wasserstein distance between projections of (N, Z)."""
    generator = torch.Generator().manual_seed(0)
    theta = normalize(torch.randn(a.shape[1], directions, generator=generator), dim=0).to(a)
    return ((a @ theta).sort(0).values - (b @ theta).sort(0).values).abs().mean().item()


def prior_gap(z, y, config, draws=4):
    """Distance of z (N, Z) to draws of p(z), a row for each of y; of two such draws: the floor."""
    gap, floor = 0.0, 0.0
    for i in range(draws):
        one, other = sample_prior(y, config, 2 * i + 1), sample_prior(y, config, 2 * i + 2)
        gap += sliced_wasserstein(z, other) / draws
        floor += sliced_wasserstein(one, other) / draws
    return gap, floor


def evaluate(nets, data, config, full=False):
    nets.eval()
    Q, P = nets["Q"], nets["P"]
    y_train, y_test = given_labels(data, config)
    z_train, z_test = shared.chunked(Q, data.x_train), shared.chunked(Q, data.x_test)
    y = turns(10_000, y_test)
    x_fake = shared.chunked(P, torch.cat([sample_prior(y, config, 0), y], 1)).sigmoid()
    x_rec = None if config.labels else shared.chunked(P, z_test).sigmoid()  # P is told labels
    metrics = shared.image_metrics(data, x_rec, x_fake)
    metrics |= shared.code_metrics(data, z_train, z_test, "short", full)
    if full:
        hidden = Q[:-1] if config.net == "dense" else Q[:-2]
        long = [shared.chunked(hidden, x).flatten(1) for x in (data.x_train, data.x_test)]
        metrics |= shared.code_metrics(data, *long, "long")
    gap, floor = prior_gap(z_test, y_test, config)
    gap_train, _ = prior_gap(z_train[: len(z_test)], y_train[: len(z_test)], config)
    metrics |= {"eval/prior_gap": gap, "eval/prior_gap_floor": floor}
    nets.train()
    return metrics | {"eval/prior_gap_train": gap_train}


@torch.no_grad()
def draw(run, data, config):
    """Samples, reconstructions, codes beside the prior, and each style in all classes."""
    run.nets.eval()
    Q, P = run.nets["Q"], run.nets["P"]
    x, y = data.x_test, given_labels(data, config)[1]
    z, K = shared.chunked(Q, x), y.shape[1]
    labels = "labels, " if K else ""
    title = f"AAE, {config.net}, {labels}{config.prior} prior, epoch {run.epoch}"

    def decode(z, y):
        return data.images(P(torch.cat([z, y], 1)).sigmoid())

    samples = decode(sample_prior(turns(100, y), config, 0), turns(100, y))
    run.picture("samples", shared.grid(samples, 10, f"{title}: samples"))
    pairs = data.images(x[:50]), decode(z[:50], y[:50])
    run.picture("reconstructions", shared.pairs(*pairs, f"{title}: test images x and P(Q(x))"))
    figure = Figure(figsize=(8, 4))
    figure.suptitle(f"{title}: codes of test images, and p(z); first and last dimension")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, codes in zip(panels, (z, sample_prior(y, config, 0)), strict=True):
        axes.scatter(codes[:, 0].cpu(), codes[:, -1].cpu(), s=2)
    run.picture("codes", figure)
    if K:
        what = "test images, then their z with each class"
        styled = decode(z[:10].repeat_interleave(K, 0), turns(10 * K, y)).unflatten(0, (10, K))
        rows = torch.cat([data.images(x[:10])[:, None], styled], 1).flatten(0, 1)
        run.picture("style", shared.grid(rows, 1 + K, f"{title}: {what}"))
    run.nets.train()


def main(config):
    device = shared.setup(config)
    data = shared.load_data(config, device, size=32)
    y_train, _ = given_labels(data, config)
    nets = build(config, data.shape, y_train.shape[1]).to(device)
    opts = optimizers(nets, config)
    plateaus = plateau_rules(opts, config)
    parts = {"nets": nets, **opts, **plateaus}

    run = shared.Run(config, device, nets, len(data.x_train) // config.batch_size)  # its own
    for epoch in run.epochs(parts):
        losses = GUESSING  # its own
        for i in shared.batches(data.x_train, config.batch_size, config.seed, epoch):
            losses = train_step(nets, opts, data.x_train[i], y_train[i], config, losses)  # its own
            run.step(losses, len(i))
        run.log_losses()
        run.log({"train/lr": opts["P"].param_groups[0]["lr"]})  # its own
        for plateau in plateaus.values():  # its own
            plateau.step(run.rows[-1]["train/L_rec"])  # its own
        if run.is_due():
            run.log(evaluate(run.nets, data, config))
            draw(run, data, config)
        run.save(parts)
    metrics = evaluate(run.nets, data, config, full=True)
    draw(run, data, config)
    run.finish(metrics)


if __name__ == "__main__":
    main(shared.parse_config(Config, PRESETS))
