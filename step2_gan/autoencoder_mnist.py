"""Autoencoders that do compare pixels, with ALAE's E and G: AE(l1), AE(l2), a denoising one, a VAE.

⟨·⟩ is a mean over the data:

    l1, l2  min over E, G  ⟨‖x − G(E(x + σ ε))‖₁ or ‖·‖₂²⟩, ε ~ N(0, I); σ = 0 in table 1 of ALAE's
            paper, σ > 0: denoising
    bce     the same with the cross-entropy of pixels in [0, 1] and a sigmoid behind G, as
            github.com/fducau/AAE_pytorch has it
    vae     ⟨−log p(x | z)⟩ + KL(q(z | x) ‖ N(0, I)),  z = μ + s ε,  q = N(μ, diag s²),
            (μ, log s²) = E(x)  (arXiv 1312.6114, eq. 10; p Bernoulli, of grey values)

    python step2_gan/autoencoder_mnist.py               # AE(l2), 20 epochs, 6 minutes on one core
    python step2_gan/autoencoder_mnist.py --loss vae    # the VAE that gan_mnist.py is compared with
    python step2_gan/autoencoder_mnist.py --loss bce --noise 0.5
    python step2_gan/autoencoder_mnist.py --split sw --epochs 400    # as long as BiGAN's paper

Expect (20 epochs, test images, seeds 0, 1): AE(l2) MSE 0.0053, identity 99.2 %, SVM short 89.8 ±
0.1 %; VAE 0.0081, 98.1 %, 88.4 ± 0.2 %, LeNet-FID 145.

Deviations from the paper's comparison (ALAE §6.1, BiGAN §4.2), which leaves its autoencoders open:
 1. E and G are ALAE's fully connected nets, leaky ReLU 0.2, without batch norm, He-initialised.
 2. Adam 0.001, β = (0.9, 0.999), PyTorch's defaults, batch 128; BiGAN's code has no autoencoder.
    l1, l2 and bce are means over pixels, not sums: Adam undoes this factor, except for ε.
 3. A plain autoencoder has no prior. Its samples are G of a Gaussian with mean and covariance of
    the training codes.
 4. The VAE's short features are μ; its reconstructions G(μ) and samples G(z) are the means of p,
    not draws from it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits


@dataclass
class Config(shared.Protocol):
    epochs: int = option(20, "passes over the training images (BiGAN §4.2: 400)", low=0)
    batch_size: int = option(128, "images per step (BiGAN §4.2)", low=1)
    lr: float = option(0.001, "learning rate of Adam (its default)", low=1e-9)
    latent_dim: int = option(50, "dimension of z (ALAE §6.1)", low=1)
    loss: str = option("l2", "what is minimised", ("l1", "l2", "bce", "vae"))
    noise: float = option(0.0, "standard deviation σ of the noise on E's input", low=0)
    precision: str = option("fp32", "of matrix products in training", ("fp32", "bf16"))


# B batch, Z = latent_dim, X = pixels (784), H = 1024


def build(config, X):
    """G: z (B, Z) → (B, X), E: x (B, X) → z; a VAE's E has 2Z outputs."""
    Z, H, leaky = config.latent_dim, 1024, nn.LeakyReLU(0.2)
    outputs = 2 * Z if config.loss == "vae" else Z
    G = nn.Sequential(nn.Linear(Z, H), leaky, nn.Linear(H, H), leaky, nn.Linear(H, X))
    E = nn.Sequential(nn.Linear(X, H), leaky, nn.Linear(H, H), leaky, nn.Linear(H, outputs))
    for layer in (*G, *E):
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, 0.2)
            nn.init.zeros_(layer.bias)
    return nn.ModuleDict({"G": G, "E": E})


def KL(mu, log_var):
    """KL(N(μ, diag s²) ‖ N(0, I)) = ½ Σ (μ² + s² − 1 − log s²) of each row of μ, log s² (B, Z); in
    nats (B,)."""
    return 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(1)


def L_rec(out, x, loss):
    """Of G's output on x (B, X): mean over pixels for l1, l2, bce; nats per image for the VAE."""
    if loss == "l1":
        return (out - x).abs().mean()
    if loss == "l2":
        return (out - x).square().mean()
    bce = binary_cross_entropy_with_logits(out, x)
    return bce * x.shape[1] if loss == "vae" else bce


def train_step(nets, optimizer, x, config):
    """One update of E and G on x (B, X)."""
    x_noisy = x
    if config.noise > 0:
        x_noisy = x + config.noise * torch.randn_like(x)
    kl = torch.zeros((), device=x.device)
    with shared.products(config, x.device):
        code = shared.fp32(nets["E"](x_noisy))
        if config.loss == "vae":
            mu, log_var = code.chunk(2, 1)  # (B, Z) each
            code = mu + (log_var / 2).exp() * torch.randn_like(mu)
            kl = KL(mu, log_var).mean()
        out = shared.fp32(nets["G"](code))
    rec = L_rec(out, x, config.loss)

    optimizer.zero_grad()
    (rec + kl).backward()
    optimizer.step()
    losses = {"L_rec": rec.detach()}
    if config.loss == "vae":
        losses["KL"] = kl.detach()
    return losses


def decode(nets, z, config):
    """z (B, Z) → x (B, X); for bce and vae in [0, 1]."""
    out = nets["G"](z)
    return out.sigmoid() if config.loss in ("bce", "vae") else out


def fitted_z(n, codes, config):
    """Always the same z (n, Z): N(0, I) for a VAE, else with the moments of the codes (N, Z)."""
    z = torch.randn(n, config.latent_dim, generator=torch.Generator().manual_seed(0)).to(codes)
    if config.loss == "vae":
        return z
    covariance = codes.T.cov().view(config.latent_dim, -1).cpu()
    values, vectors = torch.linalg.eigh(covariance)  # unlike Cholesky's, good for a singular one
    return codes.mean(0) + z @ (vectors * values.clamp(min=0).sqrt()).T.to(z)


def evaluate(nets, data, config, full=False):
    """Short features: E(x) (N, Z); long: the activations (N, H) before E's last layer."""

    def G(z):
        return decode(nets, z, config)

    E, Z = nets["E"], config.latent_dim
    long = [shared.chunked(E[:4], x) for x in (data.x_train, data.x_test)]
    short = [shared.chunked(E[4:], hidden)[:, :Z] for hidden in long]
    x_rec = shared.chunked(G, short[1])
    x_fake = shared.chunked(G, fitted_z(len(data.x_test), short[0], config))
    metrics = shared.image_metrics(data, x_rec, x_fake)
    metrics |= shared.code_metrics(data, *short, "short", full)
    if full:
        metrics |= shared.code_metrics(data, *long, "long")
    return metrics


@torch.no_grad()
def draw(run, data, config):
    """Samples, reconstructions, and interpolations between two codes."""
    x = data.x_test[:50]
    title = f"AE({config.loss}), epoch {run.epoch}"

    def images(z):
        return data.images(decode(run.nets, z, config))

    codes = shared.chunked(run.nets["E"], data.x_train)[:, : config.latent_dim]
    samples = images(fitted_z(100, codes, config))
    run.picture("samples", shared.grid(samples, 10, f"{title}: samples"))
    codes = run.nets["E"](x)[:, : config.latent_dim]  # (50, Z); of a VAE the means
    pairs = shared.pairs(data.images(x), images(codes), f"{title}: test images x and G(E(x))")
    run.picture("reconstructions", pairs)
    t = torch.linspace(0, 1, 10, device=x.device)[:, None]
    between = images(codes[:8, None].lerp(codes[8:16, None], t).flatten(0, 1))
    run.picture("interpolations", shared.grid(between, 10, f"{title}: between two codes"))


def main(config):
    device = shared.setup(config)
    data = shared.load_data(config, device)
    nets = build(config, data.x_train.shape[1]).to(device)
    optimizer = torch.optim.Adam(nets.parameters(), config.lr, fused=True)
    parts = {"nets": nets, "optimizer": optimizer}

    run = shared.Run(config, device, nets, len(data.x_train) // config.batch_size)
    for epoch in run.epochs(parts):
        for i in shared.batches(data.x_train, config.batch_size, config.seed, epoch):
            losses = train_step(nets, optimizer, data.x_train[i], config)  # its own
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
