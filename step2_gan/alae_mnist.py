"""Adversarial Latent Autoencoder (ALAE), arXiv 2004.04467, written from the paper, for MNIST.

Four maps: F: z → w, G: w → x, E: x → w, D: w → ℝ. G∘F generates, D∘E judges, and E inverts G on the latents w (§3, §4.1).
Algorithm 1, each step on a fresh z ~ N(0, I) and with an optimizer of its own:

    I.   E, D   minimise  L_adv^{E,D} = softplus(D(E(G(F(z))))) + softplus(−D(E(x))) + γ/2 ‖∇ₓ D(E(x))‖²    (R1)
    II.  F, G   minimise  L_adv^{F,G} = softplus(−D(E(G(F(z)))))
    III. E, G   minimise  L_err^{E,G} = ‖F(z) − E(G(F(z)))‖²

    python step2_gan/alae_mnist.py                              # 20 epochs
    python step2_gan/alae_mnist.py --epochs 600                 # the official code's length
    python step2_gan/alae_mnist.py --resume runs/alae_mnist/NAME/checkpoint.pt --epochs 100

Result to expect (averaged weights, test images; AMD EPYC, one core, 15 to 18 minutes; README has the table): seeds 0 and 1:
MSE 0.0226 ± 0.0006, SVM on short / long features 92.6 ± 0.9 / 98.2 %, identity 93.1 ± 0.5 %.

What the paper says (here) against what its code does (step3_official_alae/train_fc_alae.py):
 1. Three optimizers, each with moments of its own: Adam being scale-free, L_err moves E and G as fast as the adversarial
    losses do. The code has two, for (E, D) and (F, G), and steps both in step III with the moments of steps I and II.
 2. Step III moves E and G alone; in the code F moves as well (its target is detached, its input is not), and so does D,
    whose zero gradients only shrink its second moment.
 3. Equalized learning rate as in PGGAN: weights ŵ ~ N(0, 1), scaled at run time by the He constant of their layer, under
    torch.optim.Adam; the code's LREQAdam is the same in its effect, but for ε.
 4. D is a network, with leaky ReLU between its layers; the code's D is a product of three matrices, hence linear.
 5. E ends in a linear layer, so that w is unbounded; the code's E ends in a leaky ReLU.
 6. Learning rate 0.004 (0.008 was no better on val, in trials not kept) and batch 64; the code has 0.002 and 128.

What the paper leaves open is the code's, as named fields or in the networks: pixel norm of z, F's six layers, the lower
learning rate of F and D, β = (0, 0.99), slope 0.2, averaged weights, and L_err as a mean over the dimensions of w.
"""
import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn
from torch.nn.functional import linear, softplus

import shared
from shared import option


@dataclass
class Config(shared.Protocol):
    epochs: int = option(20, "passes over the training images (official code: 600)", low=1)
    batch_size: int = option(64, "images per step (chosen on val; official code: 128)", low=1)
    lr: float = option(0.004, "learning rate of the three optimizers (chosen on val; official code: 0.002)", low=1e-9)
    latent_dim: int = option(50, "dimension of z and of w (§6.1)", low=1)
    lrmul: float = option(0.1, "learning rate of F and D over that of E and G (mnist_fc.yaml)", low=1e-9)
    gamma: float = option(10.0, "weight γ of R1 (algorithm 1)", low=0)
    ema: float = option(10_000.0, "half-life, in images, of the averaged weights (train_alae.py)", low=1)
    eval_weights: str = option("ema", "evaluate the averaged or the raw weights", choices=("raw", "ema"))
    eval_every: int = option(5, "epochs between cheap evaluations, and pictures", low=1)
    references: bool = option(False, "score raw pixels and the untrained encoder too, for the tables (a minute)")
    resume: str = option("", "checkpoint.pt to go on from")
    benchmark: bool = option(False, "measure the speed of a training step, and stop")


# B batch, Z = W = latent_dim, X = pixels (784), H = 1024

class Linear(nn.Module):
    """Equalized learning rate (PGGAN, arXiv 1710.10196 §4.1): x (c ŵ)ᵀ + lrmul b with c = √2 lrmul/√fan_in. It scales x
    (B, fan_in) instead of ŵ, which comes to the same and is smaller."""

    def __init__(self, fan_in, fan_out, lrmul=1.0):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(fan_out, fan_in) / lrmul), nn.Parameter(torch.zeros(fan_out))
        self.c, self.lrmul = math.sqrt(2 / fan_in) * lrmul, lrmul

    def forward(self, x):
        return linear(self.c * x, self.weight, self.lrmul * self.bias)


class PixelNorm(nn.Module):
    def forward(self, z):
        return z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)


def build(config, X):
    """F, G, E, D as nn.Sequential."""
    Z, H, leaky, lrmul = config.latent_dim, 1024, nn.LeakyReLU(0.2), config.lrmul
    F = nn.Sequential(PixelNorm(), *(layer for _ in range(6) for layer in (Linear(Z, Z, lrmul), leaky)))
    G = nn.Sequential(Linear(Z, H), leaky, Linear(H, H), leaky, Linear(H, X))
    E = nn.Sequential(Linear(X, H), leaky, Linear(H, H), leaky, Linear(H, Z))
    D = nn.Sequential(Linear(Z, Z, lrmul), leaky, Linear(Z, Z, lrmul), leaky, Linear(Z, 1, lrmul))
    return nn.ModuleDict({"F": F, "G": G, "E": E, "D": D})


def L_adv_ED(D, E, x, x_fake, gamma):
    """softplus(D(E(x_fake))) + softplus(−D(E(x))) + γ/2 ‖∇ₓ D(E(x))‖², mean over the batch, and its last term."""
    x = x.detach().requires_grad_()
    real, fake = D(E(x)), D(E(x_fake))  # (B, 1)
    gradient, = torch.autograd.grad(real.sum(), x, create_graph=True)  # (B, X)
    r1 = gamma / 2 * gradient.square().sum(1).mean()
    return (softplus(fake) + softplus(-real)).mean() + r1, r1


def L_adv_FG(D, E, x_fake):
    """softplus(−D(E(x_fake))), mean over the batch."""
    return softplus(-D(E(x_fake))).mean()


def L_err_EG(E, G, w):
    """‖w − E(G(w))‖², mean over batch and dimensions."""
    return (w - E(G(w))).square().mean()


def train_step(nets, opt_ED, opt_FG, opt_EG, x, config):
    """One iteration of algorithm 1 on x (B, X). Returns the LOSSES."""
    F, G, E, D = nets["F"], nets["G"], nets["E"], nets["D"]
    ED, FG, EG = ([p for net in group for p in net.parameters()] for group in ((E, D), (F, G), (E, G)))
    z_I, z_II, z_III = torch.randn(3, len(x), config.latent_dim, device=x.device)  # (B, Z) each

    # Step I: the critic D∘E tells data from samples.
    with torch.no_grad():
        x_fake = G(F(z_I))
    loss_ED, r1 = L_adv_ED(D, E, x, x_fake, config.gamma)
    opt_ED.zero_grad()
    loss_ED.backward(inputs=ED)
    opt_ED.step()

    # Step II: the generator G∘F moves against it.
    loss_FG = L_adv_FG(D, E, G(F(z_II)))
    opt_FG.zero_grad()
    loss_FG.backward(inputs=FG)
    opt_FG.step()

    # Step III: E inverts G, on latents.
    with torch.no_grad():
        w = F(z_III)  # (B, W)
    loss_err = L_err_EG(E, G, w)
    opt_EG.zero_grad()
    loss_err.backward(inputs=EG)
    opt_EG.step()
    return torch.stack([loss_ED, loss_FG, loss_err, r1]).detach()


LOSSES = ("train/L_adv_ED", "train/L_adv_FG", "train/L_err_EG", "train/r1")


@torch.no_grad()
def update_ema(averaged, nets, decay):
    torch._foreach_lerp_(list(averaged.parameters()), list(nets.parameters()), 1 - decay)


def maps(nets, config, device):
    """What shared.evaluate and shared.draw look at."""
    F, G, E = nets["F"], nets["G"], nets["E"]

    def prior(n):
        z = torch.randn(n, config.latent_dim, generator=torch.Generator().manual_seed(0))
        return shared.in_chunks(F, z.to(device))
    return {"encode": E, "decode": G, "prior": prior, "short": E, "long": E[:4]}


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
    averaged = copy.deepcopy(nets).requires_grad_(False)

    def adam(*names):
        return torch.optim.Adam([p for name in names for p in nets[name].parameters()], config.lr, (0.0, 0.99), fused=True)
    opts = {"opt_ED": adam("E", "D"), "opt_FG": adam("F", "G"), "opt_EG": adam("E", "G")}
    if config.benchmark:
        def step():
            train_step(nets, *opts.values(), x_train[:config.batch_size], config)
            update_ema(averaged, nets, 0.5 ** (config.batch_size / config.ema))
        return shared.benchmark(step, config.batch_size, config)
    parts = {"nets": nets, "averaged": averaged} | opts
    first, losses = 0, torch.zeros(len(LOSSES), device=device)  # steps behind us in this epoch, and their losses
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        first, losses = checkpoint["step"], checkpoint["losses"].to(device)
    evaluated = averaged if config.eval_weights == "ema" else nets
    run = shared.Run(config, device, sum(p.numel() for p in nets.parameters()), checkpoint)
    seen = maps(evaluated, config, device)

    def save(step):
        run.save("checkpoint.pt", step=step, losses=losses, **{name: part.state_dict() for name, part in parts.items()})

    if not checkpoint:
        run.log({"epoch": 0} | shared.untrained(config, data, seen))
    for epoch in range(run.done + 1, config.epochs + 1):
        order = torch.Generator(device).manual_seed(1_000_003 * config.seed + epoch)
        for step, i in enumerate(shared.batches(len(x_train), config.batch_size, order, skip=first), first + 1):
            losses += train_step(nets, *opts.values(), x_train[i], config)
            update_ema(averaged, nets, 0.5 ** (config.batch_size / config.ema))
            run.tick(config.batch_size, losses[0] / step, config.epochs * steps)
            if run.stop:
                save(step)
                run.leave()
        row = {"epoch": epoch} | {name: run.finite(loss / steps) for name, loss in zip(LOSSES, losses)}
        first, losses = 0, torch.zeros_like(losses)
        if looked := epoch % config.eval_every == 0 or epoch == config.epochs:
            row |= shared.evaluate(config, data, seen, full=False)
        run.log(row)
        save(0)
        if looked:
            shared.draw(run, data, seen, {"adversarial losses": [LOSSES[i] for i in (0, 1, 3)], "latent error": LOSSES[2:3],
                                          "reconstruction MSE": ["eval/recon_mse"],
                                          "1-NN accuracy on E(x), %": ["eval/knn_acc_short"]}, "ALAE")

    run.save("model.pt", **{name: net.state_dict() for name, net in evaluated.items()})
    run.finish(**shared.evaluate(config, data, seen, full=True))


if __name__ == "__main__":
    main(shared.parse_config(Config))
