"""Autoencoders that do compare pixels, with ALAE's E and G: AE(l1), AE(l2), a denoising autoencoder, and a VAE.

    l1, l2   min over E, G   E ‖x − G(E(x + σ ε))‖₁  or  ‖·‖₂²,  ε ~ N(0, I)          (ALAE, table 1; σ > 0: denoising)
    bce      the same with the cross-entropy of pixels in [0, 1] and a sigmoid behind G   (where seed 002 begins)
    vae      E −log p(x | z) + KL(q(z | x) ‖ N(0, I)), z = μ + s ε,  q = N(μ, diag s²), (μ, log s²) = E(x)
             (arXiv 1312.6114, eq. 10; p Bernoulli, its cross-entropy taken of grey values)

    python step2_gan/autoencoder_mnist.py                      # AE(l2), 20 epochs
    python step2_gan/autoencoder_mnist.py --loss vae           # the VAE that gan_mnist.py is compared with
    python step2_gan/autoencoder_mnist.py --loss bce --noise 0.5
    python step2_gan/autoencoder_mnist.py --epochs 400         # as long as BiGAN's paper trains its methods

Result to expect (20 epochs, test images, seeds 0 and 1; AMD EPYC, one core, 3 to 5 minutes; README has the tables): AE(l2):
MSE 0.0053, 1-NN / SVM on short features 96.8 / 89.8 %, identity 99.2 %; VAE: 0.0081, 97.1 / 88.4 %, 98.1 %, LeNet-FID 145.
With --split sw, seed 0, AE(l2)'s 1-NN is 97.3 %.

Deviations from the paper's comparison (ALAE §6.1, BiGAN §4.2), whose autoencoders are not described in detail:
 1. E and G are ALAE's fully connected nets, leaky ReLU 0.2, without batch norm, He-initialised.
 2. Adam 0.001, β = (0.9, 0.999), batch 128: PyTorch's defaults; BiGAN's code has no autoencoder.
 3. A plain autoencoder has no prior. Its samples are G of a Gaussian with mean and covariance of the training codes.
 4. The VAE's short features are μ; its reconstructions G(μ) and samples G(z) are the means of p, not draws from it.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import shared
from shared import option


@dataclass
class Config(shared.Protocol):
    epochs: int = option(20, "passes over the training images (BiGAN §4.2: 400)", low=1)
    batch_size: int = option(128, "images per step (BiGAN §4.2)", low=1)
    lr: float = option(0.001, "learning rate of Adam (its default)", low=1e-9)
    latent_dim: int = option(50, "dimension of z (ALAE §6.1)", low=1)
    loss: str = option("l2", "what is minimised", choices=("l1", "l2", "bce", "vae"))
    noise: float = option(0.0, "standard deviation σ of the noise on E's input", low=0)
    eval_every: int = option(5, "epochs between cheap evaluations, and pictures", low=1)
    references: bool = option(False, "score raw pixels and the untrained encoder too, for the tables (a minute)")
    resume: str = option("", "checkpoint.pt to go on from")
    benchmark: bool = option(False, "measure the speed of a training step, and stop")


# B batch, Z = latent_dim, X = pixels (784), H = 1024

def build(config, X):
    """G and E as nn.Sequential; a VAE's E has 2Z outputs."""
    Z, H, leaky = config.latent_dim, 1024, nn.LeakyReLU(0.2)
    G = nn.Sequential(nn.Linear(Z, H), leaky, nn.Linear(H, H), leaky, nn.Linear(H, X))
    E = nn.Sequential(nn.Linear(X, H), leaky, nn.Linear(H, H), leaky, nn.Linear(H, Z * (1 + (config.loss == "vae"))))
    for layer in (*G, *E):
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, 0.2), nn.init.zeros_(layer.bias)
    return nn.ModuleDict({"G": G, "E": E})


def KL(mu, log_var):
    """KL(N(μ, diag s²) ‖ N(0, I)) = ½ Σ (μ² + s² − 1 − log s²) of each row of μ, log s² (B, Z); in nats (B,)."""
    return 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(1)


def L_rec(out, x, loss):
    """Reconstruction loss of G's output on x (B, X): mean over pixels for l1, l2, bce; nats per image for the VAE."""
    if loss == "l1":
        return (out - x).abs().mean()
    if loss == "l2":
        return (out - x).square().mean()
    bce = binary_cross_entropy_with_logits(out, x)
    return bce * x.shape[1] if loss == "vae" else bce


def train_step(nets, optimizer, x, config):
    """One update of E and G on x (B, X). Returns the LOSSES."""
    code = nets["E"](x + config.noise * torch.randn_like(x) if config.noise else x)
    kl = torch.zeros((), device=x.device)
    if config.loss == "vae":
        mu, log_var = code.chunk(2, 1)  # (B, Z) each
        code, kl = mu + (log_var / 2).exp() * torch.randn_like(mu), KL(mu, log_var).mean()
    rec = L_rec(nets["G"](code), x, config.loss)
    optimizer.zero_grad()
    (rec + kl).backward()
    optimizer.step()
    return torch.stack([rec, kl]).detach()


LOSSES = ("train/L_rec", "train/KL")


def maps(nets, config, x_train):
    """What shared.evaluate and shared.draw look at."""
    G, E, Z = nets["G"], nets["E"], config.latent_dim
    sigmoid = nn.Sigmoid() if config.loss in ("bce", "vae") else nn.Identity()

    def encode(x):
        return E(x)[:, :Z]

    def prior(n):
        z = torch.randn(n, Z, generator=torch.Generator().manual_seed(0)).to(x_train.device)
        if config.loss == "vae":
            return z
        codes = shared.in_chunks(E, x_train)
        values, vectors = torch.linalg.eigh(codes.T.cov().view(Z, Z).cpu())  # unlike Cholesky's, good for a singular one
        return codes.mean(0) + z @ (vectors * values.clamp(min=0).sqrt()).T.to(z)
    return {"encode": encode, "decode": lambda z: sigmoid(G(z)), "prior": prior, "short": encode, "long": E[:4]}


def main(config):
    device = shared.setup(config)
    checkpoint = shared.load_checkpoint(config.resume, Config) if config.resume else None
    data = shared.load_vectors(config, device, toys=False)
    x_train, X = data[0], data[0].shape[1]
    if config.smoke:
        config.epochs = min(config.epochs, 2)
    if config.latent_dim > X:
        shared.fail(f"--latent-dim {config.latent_dim} is larger than the data, {X} pixels")
    if (steps := len(x_train) // config.batch_size) == 0:
        shared.fail(f"--batch-size {config.batch_size} is larger than the data, {len(x_train)} images")

    nets = build(config, X).to(device)
    optimizer = torch.optim.Adam(nets.parameters(), config.lr, fused=True)
    if config.benchmark:
        return shared.benchmark(lambda: train_step(nets, optimizer, x_train[:config.batch_size], config),
                                config.batch_size, config)
    first, losses = 0, torch.zeros(len(LOSSES), device=device)  # steps behind us in this epoch, and their losses
    if checkpoint:
        nets.load_state_dict(checkpoint["nets"]), optimizer.load_state_dict(checkpoint["optimizer"])
        first, losses = checkpoint["step"], checkpoint["losses"].to(device)
    run = shared.Run(config, device, sum(p.numel() for p in nets.parameters()), checkpoint)
    seen = maps(nets, config, x_train)

    def save(step):
        run.save("checkpoint.pt", step=step, losses=losses, nets=nets.state_dict(), optimizer=optimizer.state_dict())

    if not checkpoint:
        run.log({"epoch": 0} | shared.untrained(config, data, seen))
    for epoch in range(run.done + 1, config.epochs + 1):
        order = torch.Generator(device).manual_seed(1_000_003 * config.seed + epoch)
        for step, i in enumerate(shared.batches(len(x_train), config.batch_size, order, skip=first), first + 1):
            losses += train_step(nets, optimizer, x_train[i], config)
            run.tick(config.batch_size, losses[0] / step, config.epochs * steps)
            if run.stop:
                save(step)
                run.leave()
        row = {"epoch": epoch} | {name: run.finite(loss / steps) for name, loss in zip(LOSSES, losses)}
        config.loss == "vae" or row.pop("train/KL")
        first, losses = 0, torch.zeros_like(losses)
        if looked := epoch % config.eval_every == 0 or epoch == config.epochs:
            row |= shared.evaluate(config, data, seen, full=False)
        run.log(row)
        save(0)
        if looked:
            shared.draw(run, data, seen, {"loss": LOSSES, "reconstruction MSE": ["eval/recon_mse"],
                                          "1-NN accuracy on E(x), %": ["eval/knn_acc_short"]}, f"AE({config.loss})")

    run.save("model.pt", **{name: net.state_dict() for name, net in nets.items()})
    run.finish(**shared.evaluate(config, data, seen, full=True))


if __name__ == "__main__":
    main(shared.parse_config(Config))
