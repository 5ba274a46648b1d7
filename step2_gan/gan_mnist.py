"""A GAN on MNIST (arXiv 1406.2661) with four losses, with or without spectral normalization.

G: z → x generates from z ~ N(0, I); D's logits tell data from samples. D minimises its loss, then
G minimises its own:

    minimax         D: softplus(−D(x)) + softplus(D(G(z)))    G: −softplus(D(G(z))): D's, negated
    non-saturating  the same D                                G: softplus(−D(G(z)))  (1406.2661 §3)
    r1              D: … + γ/2 ‖∇ₓ D(x)‖²                     the same G  (1801.04406 eq. 9; ALAE's)
    wgan-gp         D: D(G(z)) − D(x) + λ (‖∇ D(x̂)‖ − 1)²     G: −D(G(z))  (1704.00028; with
                    five steps of D for each of G's; x̂ = ε x + (1 − ε) G(z), ε ~ U[0, 1])

    python step2_gan/gan_mnist.py                   # 20 epochs, 13 minutes on one CPU core
    python step2_gan/gan_mnist.py --preset r1

Expect (20 epochs): LeNet-FID 7.1 (seed 0) and 22.2 (seed 1), each digit at least 7.9 % of samples.

Deviations from the papers:
 1. Adam 0.002, β = (0, 0.999), chosen on val with spectral normalization. R1 has 0.001, because
    of its training loss on DW (on val: results/gan_mnist/val-r1-lr0.001.json). WGAN-GP has its
    paper's rate, 1e-4, but β₂ 0.999, not 0.9; no run at that rate is kept. In the papers: DCGAN
    (1511.06434) Adam 2e-4, β = (0.5, 0.999); R1 RMSprop 1e-4.
 2. By default D has spectral normalization (1802.05957), which came after these losses. The presets
    without it have 0.001, but for wgan-gp; so has sweeps/gan_losses.yaml.
 3. z ~ N(0, I) with 50 dimensions, as in the other files. G has batch norm, D has none: so
    each penalty depends on one image alone.
 4. Samples come from an average of G's weights, as in PGGAN and ALAE (--eval-weights raw).
 5. 1406.2661 itself has maxout and dropout in D, and SGD with momentum.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

import torch
from torch import nn
from torch.nn.functional import softplus
from torch.nn.utils.parametrizations import spectral_norm

NO_NORM = {"norm": "none", "lr": 0.001}  # deviation 2
PRESETS = {
    "non-saturating-spectral": {},
    "non-saturating": NO_NORM,
    "minimax": NO_NORM | {"loss": "minimax"},
    "r1": NO_NORM | {"loss": "r1"},
    # its paper's rate, and five steps of D on 128 images each
    "wgan-gp": NO_NORM | {"loss": "wgan-gp", "lr": 1e-4, "critic_steps": 5, "batch_size": 640},
}
LOSSES = ("minimax", "non-saturating", "r1", "wgan-gp")


@dataclass
class Config(shared.Protocol):
    preset: str = option("non-saturating-spectral", "a loss and what it needs", tuple(PRESETS))
    epochs: int = option(20, "passes over the training images", low=0)
    batch_size: int = option(128, "images per step of G (1511.06434); D's steps share them", low=2)
    loss: str = option("non-saturating", "of D and G", LOSSES)
    norm: str = option("spectral", "of D's weights (1802.05957), or none", ("none", "spectral"))
    lr: float = option(0.002, "learning rate of Adam (chosen on val)", low=1e-9)
    beta1: float = option(0.0, "β₁ of Adam (ALAE's, chosen on val; β₂ = 0.999)", low=0, high=1)
    gamma: float = option(10.0, "the penalty's weight: γ (1801.04406) or λ (1704.00028)", low=0)
    critic_steps: int = option(1, "steps of D for one of G (WGAN-GP: 5)", low=1)
    latent_dim: int = option(50, "dimension of z", low=1)
    ema: float = option(10_000.0, "half-life in images of G's average (train_alae.py)", low=1)
    eval_weights: str = option("ema", "evaluate the averaged or the raw weights", ("raw", "ema"))
    eval_every: int = option(2, "epochs between evaluations, and pictures", low=1)
    precision: str = option("fp32", "of matrix products in training", ("fp32", "bf16"))


# B batch, Z = latent_dim, X = pixels (784), H = 1024


def build(config, X):
    """G: z (B, Z) → x (B, X), D: x → (B, 1)."""
    Z, H, leaky = config.latent_dim, 1024, nn.LeakyReLU(0.2)
    G = nn.Sequential(
        nn.Linear(Z, H, bias=False),
        nn.BatchNorm1d(H),
        nn.ReLU(),
        nn.Linear(H, H, bias=False),
        nn.BatchNorm1d(H),
        nn.ReLU(),
        nn.Linear(H, X),
        nn.Sigmoid(),
    )
    D = nn.Sequential(nn.Linear(X, H), leaky, nn.Linear(H, H), leaky, nn.Linear(H, 1))
    if config.norm == "spectral":
        for layer in D[::2]:
            spectral_norm(layer)
    return nn.ModuleDict({"G": G, "D": D})


def r1_penalty(real, x):
    """‖∇ₓ D(x)‖², mean over the batch, from D's logits `real` of x (arXiv 1801.04406)."""
    (gradient,) = torch.autograd.grad(real.sum(), x, create_graph=True)  # (B, X)
    return gradient.square().sum(1).mean()


def gradient_penalty(D, x, x_fake, epsilon):
    """(‖∇ D(x̂)‖ − 1)² at x̂ = ε x + (1 − ε) x_fake, mean over the batch (1704.00028 eq. 3).

    epsilon (B, 1).
    """
    x_hat = (epsilon * x + (1 - epsilon) * x_fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(D(x_hat).sum(), x_hat, create_graph=True)  # (B, X)
    return (gradient.norm(dim=1) - 1).square().mean()


def L_D(D, x, x_fake, config):
    """D's loss without its penalty, and the penalty; means over the batch; x, x_fake (B, X)."""
    x = x.detach().requires_grad_(config.loss == "r1")
    real = shared.fp32(D(x))  # (B, 1)
    fake = shared.fp32(D(x_fake))
    if config.loss == "wgan-gp":
        epsilon = torch.rand(len(x), 1, device=x.device)
        penalty = config.gamma * gradient_penalty(D, x, x_fake, epsilon)
        return (fake - real).mean(), penalty
    penalty = torch.zeros((), device=x.device)
    if config.loss == "r1":
        penalty = config.gamma / 2 * r1_penalty(real, x)
    return (softplus(-real) + softplus(fake)).mean(), penalty


def L_G(fake, loss):
    """G's loss from D's logits of samples, mean over the batch."""
    if loss == "wgan-gp":
        return -fake.mean()
    if loss == "minimax":
        return -softplus(fake).mean()
    return softplus(-fake).mean()


def train_step(nets, opt_D, opt_G, x, config):
    """Steps of D, each on its part of x (B, X), then one of G."""
    G, D = nets["G"], nets["D"]
    for x_real in x.chunk(config.critic_steps):
        with shared.products(config, x.device):
            with torch.no_grad():
                x_fake = G(torch.randn(len(x_real), config.latent_dim, device=x.device))
            loss_D, penalty = L_D(D, x_real, x_fake, config)
        opt_D.zero_grad()
        (loss_D + penalty).backward(inputs=list(D.parameters()))
        opt_D.step()

    z = torch.randn(len(x) // config.critic_steps, config.latent_dim, device=x.device)
    with shared.products(config, x.device):
        loss_G = L_G(shared.fp32(D(G(z))), config.loss)
    opt_G.zero_grad()
    loss_G.backward(inputs=list(G.parameters()))
    opt_G.step()

    grad_norm = nn.utils.get_total_norm([p.grad for p in G.parameters()])
    losses = {"L_D": loss_D, "L_G": loss_G, "grad_norm_G": grad_norm}
    if config.loss in ("r1", "wgan-gp"):
        losses["penalty"] = penalty
    return {name: loss.detach() for name, loss in losses.items()}


@torch.no_grad()
def update_ema(averaged, G, decay):
    """Averages the parameters of G and its batch statistics."""
    averages = averaged.state_dict()
    for name, tensor in G.state_dict().items():
        if tensor.is_floating_point():
            averages[name].lerp_(tensor, 1 - decay)


def fixed_z(n, config, device):
    """Always the same z (n, Z)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, config.latent_dim, generator=generator).to(device)


def digit_shares(images):
    """Share of each digit, as LeNet sees it, among images (N, C, H, W)."""
    digits = shared.lenet.digits(images)
    return digits.bincount(minlength=10).cpu().double() / len(images)


def evaluate(nets, data, config, full=False):
    """LeNet-FID, and the digits among 10,000 samples: % of each, the least, and KL(shares ‖ those
    of the test images), full or not. Where samples collapse, digits are missing."""
    if data.name != "mnist":
        return {}
    nets.eval()
    x_fake = shared.chunked(nets["G"], fixed_z(10_000, config, data.x_test.device))
    nets.train()
    metrics = shared.image_metrics(data, x_fake=x_fake)
    shares = digit_shares(data.images(x_fake))
    target = digit_shares(data.images(data.x_test))
    metrics["eval/digit_kl"] = torch.special.xlogy(shares, shares / target).sum().item()
    metrics["eval/digit_min"] = 100 * shares.min().item()
    for digit, share in enumerate(shares.tolist()):
        metrics[f"eval/digit_{digit}"] = 100 * share
    return metrics


@torch.no_grad()
def draw(run, data, config):
    """Samples, and interpolations between two z."""
    run.nets.eval()
    G = run.nets["G"]
    z = fixed_z(100, config, data.x_test.device)
    title = f"GAN ({run.facts['setting'] or config.preset}), epoch {run.epoch}"
    run.picture("samples", shared.grid(data.images(G(z)), 10, f"{title}: samples"))
    t = torch.linspace(0, 1, 10, device=z.device)[:, None]
    between = data.images(G(z[:8, None].lerp(z[8:16, None], t).flatten(0, 1)))
    run.picture("interpolations", shared.grid(between, 10, f"{title}: between two z"))
    run.nets.train()


def main(config):
    device = shared.setup(config)
    data = shared.load_data(config, device)
    n = config.critic_steps
    if config.batch_size % n or config.batch_size < 2 * n:  # batch norm needs two images
        shared.fail(f"--batch-size {config.batch_size}: must be 2, 3, … times --critic-steps {n}")
    nets = build(config, data.x_train.shape[1]).to(device)
    averaged = copy.deepcopy(nets["G"]).requires_grad_(False)

    def adam(net):
        return torch.optim.Adam(net.parameters(), config.lr, (config.beta1, 0.999), fused=True)

    opt_D = adam(nets["D"])
    opt_G = adam(nets["G"])
    parts = {"nets": nets, "averaged": averaged, "opt_D": opt_D, "opt_G": opt_G}
    evaluated = nets
    if config.eval_weights == "ema":
        evaluated = nn.ModuleDict({"G": averaged, "D": nets["D"]})

    run = shared.Run(config, device, evaluated, len(data.x_train) // config.batch_size)  # its own
    for epoch in run.epochs(parts):
        for i in shared.batches(data.x_train, config.batch_size, config.seed, epoch):
            losses = train_step(nets, opt_D, opt_G, data.x_train[i], config)  # its own
            update_ema(averaged, nets["G"], 0.5 ** (config.batch_size / config.ema))  # its own
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
