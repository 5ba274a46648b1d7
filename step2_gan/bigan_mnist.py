"""Bidirectional GAN (BiGAN), arXiv 1605.09782, in the permutation-invariant MNIST setting of §4.2.

A discriminator D of pairs tells (x, E(x)) from (G(z), z). Against the best D, E and G minimise a
Jensen-Shannon divergence of the two joint distributions, and only inverse maps reach its minimum
(§3), so that E inverts G though nothing compares x with G(E(x)). With D's logits, z ~ U[−1, 1]⁵⁰,
all nets updated at once on the same batch:

    D     minimises  L_D  = softplus(−D(x, E(x))) + softplus(D(G(z), z))
    E, G  minimise   L_EG = softplus(D(x, E(x))) + softplus(−D(G(z), z))  (§3.4: labels exchanged)

    python step2_gan/bigan_mnist.py               # 25 epochs, 14 minutes on one CPU core
    python step2_gan/bigan_mnist.py --split sw --epochs 400          # as long as the paper

Expect (--split sw, 25 epochs, seeds 0, 1): 1-NN short / long 95.3 ± 0.5 / 96.1 ± 0.3 %; the README
of the paper's code has 95.41 / 96.28 % at that epoch.

Deviations from the paper (P) or its code (C: github.com/jeffdonahue/bigan, train_mnist.sh):
 1. P, C: 400 epochs; here 25 by default, which fit a CPU.
 2. C halves both losses (--loss-scale 0.5). Adam undoes this, except for ε and the weight decay:
    the decay is relatively stronger there. This matters at first: D's last layer starts at 0, and
    as long as it is 0, weight decay alone moves the rest. No difference was seen: README.md.
Reconstructions are G(2σ(E(x)) − 1), from a deterministic E, as in P's figures.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

import torch
from torch import nn
from torch.nn.functional import leaky_relu, softplus


@dataclass
class Config(shared.Protocol):
    epochs: int = option(25, "passes over the training images (train_mnist.sh: 400)", low=0)
    batch_size: int = option(128, "images per step (train_gan.py)", low=2)
    lr: float = option(0.0002, "learning rate, constant for 200 epochs (train_gan.py)", low=1e-9)
    weight_decay: float = option(2.5e-5, "L2 penalty, in the gradient (train_gan.py)", low=0)
    loss_scale: float = option(1.0, "factor of both losses (paper; train_gan.py: 0.5)", low=1e-9)
    latent_dim: int = option(50, "dimension of z (train_mnist.sh)", low=1)
    precision: str = option("fp32", "of matrix products in training", ("fp32", "bf16"))


# B batch, Z = latent_dim, X = pixels (784), H = 1024


def linear(fan_in, fan_out):
    layer = nn.Linear(fan_in, fan_out, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


def norm(H):
    """Batch norm without weights, whose running statistics are plain means: see settle."""
    return nn.BatchNorm1d(H, eps=1e-8, momentum=None, affine=False)


class Generator(nn.Module):
    """z (B, Z) → x (B, X) in [0, 1]; the second layer sees z again."""

    def __init__(self, Z, X, H=1024):
        super().__init__()
        self.first = nn.Sequential(linear(Z, H), norm(H), nn.ReLU())
        self.second = linear(H, H)
        self.second_z = linear(Z, H)
        self.last = nn.Sequential(norm(H), nn.ReLU(), linear(H, X), nn.Sigmoid())

    def forward(self, z):
        return self.last(self.second(self.first(z)) + self.second_z(z))


class Discriminator(nn.Module):
    """x (B, X), z (B, Z) → logits (B, 1); z enters at the second layer. The last starts at 0."""

    def __init__(self, Z, X, H=1024):
        super().__init__()
        self.first = linear(X, H)
        self.second = linear(H, H)
        self.second_z = linear(Z, H)
        self.last = nn.Sequential(norm(H), nn.LeakyReLU(0.2), linear(H, 1))
        nn.init.zeros_(self.last[-1].weight)

    def forward(self, x, z):
        return self.last(self.second(leaky_relu(self.first(x), 0.2)) + self.second_z(z))


def build(config, X):
    """G, E: x (B, X) → logits (B, Z) of a code, D."""
    Z, H, leaky = config.latent_dim, 1024, nn.LeakyReLU(0.2)
    E = nn.Sequential(linear(X, H), leaky, linear(H, H), norm(H), leaky, linear(H, Z))
    return nn.ModuleDict({"G": Generator(Z, X), "E": E, "D": Discriminator(Z, X)})


def to_code(logits):
    """E's logits → z in [−1, 1]."""
    return 2 * logits.sigmoid() - 1


def L_D(real, fake):
    """softplus(−D(x, E(x))) + softplus(D(G(z), z)), mean over the batch, from D's logits."""
    return (softplus(-real) + softplus(fake)).mean()


def L_EG(real, fake):
    """L_D with the pairs' roles exchanged."""
    return L_D(fake, real)


def train_step(nets, opt_D, opt_EG, x, config):
    """One update of D, and of E and G, from the same batch x (B, X)."""
    G, E, D = nets["G"], nets["E"], nets["D"]
    z = torch.rand(len(x), config.latent_dim, device=x.device) * 2 - 1
    with shared.products(config, x.device):  # two calls of D: each has its own batch statistics
        real = shared.fp32(D(x, to_code(E(x))))  # (B, 1)
        fake = shared.fp32(D(G(z), z))
    loss_D = L_D(real, fake)
    loss_EG = L_EG(real, fake)

    opt_D.zero_grad()
    opt_EG.zero_grad()
    (config.loss_scale * loss_D).backward(inputs=list(D.parameters()), retain_graph=True)
    (config.loss_scale * loss_EG).backward(inputs=[*E.parameters(), *G.parameters()])
    opt_D.step()
    opt_EG.step()
    return {"L_D": loss_D.detach(), "L_EG": loss_EG.detach()}


def learning_rate(config, epoch):
    """Constant for 200 epochs, then falling exponentially, to 1 % in 200 more (train_mnist.sh)."""
    return config.lr * 0.01 ** (max(0, epoch - 200) / 200)


@torch.no_grad()
def settle(nets, x_train, config):
    """Batch statistics for evaluation: their mean over 1,000 batches (train_mnist.sh), always of
    the same images and z."""
    for module in (*nets["G"].modules(), *nets["E"].modules()):
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
    generator = torch.Generator(x_train.device).manual_seed(0)
    kwargs = {"device": x_train.device, "generator": generator}
    nets.train()
    for _ in range(20 if config.smoke else 1000):
        i = torch.randint(len(x_train), (config.batch_size,), **kwargs)
        nets["E"](x_train[i])
        nets["G"](2 * torch.rand(config.batch_size, config.latent_dim, **kwargs) - 1)


def fixed_z(n, config, device):
    """Always the same z (n, Z)."""
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(n, config.latent_dim, generator=generator).to(device) - 1


def evaluate(nets, data, config, full=False):
    """Short features: E's logits (train_gan.py); long: the activations before its last layer."""
    settle(nets, data.x_train, config)
    nets.eval()
    G, E = nets["G"], nets["E"]
    long = [shared.chunked(E[:5], x) for x in (data.x_train, data.x_test)]
    short = [shared.chunked(E[5:], hidden) for hidden in long]
    x_rec = shared.chunked(G, to_code(short[1]))
    x_fake = shared.chunked(G, fixed_z(len(data.x_test), config, data.x_test.device))
    metrics = shared.image_metrics(data, x_rec, x_fake)
    metrics |= shared.code_metrics(data, *short, "short", full)
    if full:
        metrics |= shared.code_metrics(data, *long, "long")
    nets.train()
    return metrics


@torch.no_grad()
def draw(run, data, config):
    """Samples, reconstructions, interpolations of codes; with evaluate's batch statistics."""
    run.nets.eval()
    G, E = run.nets["G"], run.nets["E"]
    x, z = data.x_test[:50], fixed_z(100, config, data.x_test.device)
    title = f"BiGAN, epoch {run.epoch}"

    run.picture("samples", shared.grid(data.images(G(z)), 10, f"{title}: samples"))
    codes = to_code(E(x))  # (50, Z)
    x_rec = data.images(G(codes))
    pairs = shared.pairs(data.images(x), x_rec, f"{title}: test images x and G(E(x))")
    run.picture("reconstructions", pairs)
    t = torch.linspace(0, 1, 10, device=x.device)[:, None]
    between = data.images(G(codes[:8, None].lerp(codes[8:16, None], t).flatten(0, 1)))
    run.picture("interpolations", shared.grid(between, 10, f"{title}: between two codes"))
    run.nets.train()


def main(config):
    device = shared.setup(config)
    data = shared.load_data(config, device)
    nets = build(config, data.x_train.shape[1]).to(device)

    def adam(parameters):  # as train_gan.py
        kwargs = {"weight_decay": config.weight_decay, "fused": True}
        return torch.optim.Adam(parameters, config.lr, (0.5, 0.999), **kwargs)

    opt_D = adam(nets["D"].parameters())
    opt_EG = adam([*nets["E"].parameters(), *nets["G"].parameters()])
    parts = {"nets": nets, "opt_D": opt_D, "opt_EG": opt_EG}

    run = shared.Run(config, device, nets, len(data.x_train) // config.batch_size)
    for epoch in run.epochs(parts):
        for optimizer in (opt_D, opt_EG):  # its own
            optimizer.param_groups[0]["lr"] = learning_rate(config, epoch)  # its own
        for i in shared.batches(data.x_train, config.batch_size, config.seed, epoch):
            losses = train_step(nets, opt_D, opt_EG, data.x_train[i], config)  # its own
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
