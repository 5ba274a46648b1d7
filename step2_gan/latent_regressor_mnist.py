"""Latent regressor (LR) and joint latent regressor (JLR) on MNIST: the baselines of BiGAN's paper,
arXiv 1605.09782 §4.1.

A GAN, and an encoder that learns to find the z behind each sample; it never sees data. With D's
logits, z ~ U[−1, 1]⁵⁰ and E(x) the logits of a regression of (z + 1)/2, all nets updated at once
on the same batch:

    D  minimises  L_adv_D = softplus(−D(x)) + softplus(D(G(z)))
    G  minimises  L_adv_G = softplus(−D(G(z)))  [+ ¼ L_err_E with --joint]
    E  minimises  L_err_E = BCE(σ(E(G(z))), (z + 1)/2), mean over the dimensions of z

    python step2_gan/latent_regressor_mnist.py           # LR, 25 epochs, 14 minutes on one CPU core
    python step2_gan/latent_regressor_mnist.py --joint   # JLR
    python step2_gan/latent_regressor_mnist.py --split sw --epochs 400      # as long as the paper

Expect (25 epochs, test images, seeds 0, 1): LR MSE 0.025, SVM short 89.3 ± 0.2 %, identity 90.4 ±
1.2 %; JLR 0.025, 89.0 ± 0.4 %, 90.7 ± 0.5 %.

Deviations from the paper (P) or its code (C: github.com/jeffdonahue/bigan, train_mnist.sh):
 1. P, C: 400 epochs; here 25 by default, which fit a CPU.
 2. C: D's loss, and in JLR also what E minimises (¼ L_err_E), are scaled. Adam undoes this, except
    for ε and the weight decay: the decay is relatively stronger there.
E is trained on samples, and evaluated with the batch statistics of data, as in C.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus


@dataclass
class Config(shared.Protocol):
    epochs: int = option(25, "passes over the training images (train_mnist.sh: 400)", low=0)
    batch_size: int = option(128, "images per step (train_gan.py)", low=2)
    lr: float = option(0.0002, "learning rate, constant for 200 epochs (train_gan.py)", low=1e-9)
    weight_decay: float = option(2.5e-5, "L2 penalty, in the gradient (train_gan.py)", low=0)
    joint: bool = option(False, "JLR: L_err_E reaches the generator as well")
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


def image_net(X, out, H=1024):
    """x (B, X) → (B, out): the net of D and of E."""
    leaky = nn.LeakyReLU(0.2)
    return nn.Sequential(linear(X, H), leaky, linear(H, H), norm(H), leaky, linear(H, out))


def build(config, X):
    """G, E: x (B, X) → logits (B, Z) of a code, D: x → (B, 1); the last layers of E and D start
    at 0 (train_gan.py), unless the untrained E is asked for its features."""
    G = Generator(config.latent_dim, X)
    E = image_net(X, config.latent_dim)
    D = image_net(X, 1)
    nn.init.zeros_(D[-1].weight)
    if config.epochs > 0:
        nn.init.zeros_(E[-1].weight)
    return nn.ModuleDict({"G": G, "E": E, "D": D})


def to_code(logits):
    """E's logits → z in [−1, 1]."""
    return 2 * logits.sigmoid() - 1


def L_adv_D(real, fake):
    """softplus(−D(x)) + softplus(D(G(z))), mean over the batch, from D's logits."""
    return (softplus(-real) + softplus(fake)).mean()


def L_adv_G(fake):
    """softplus(−D(G(z))), mean over the batch, from D's logits."""
    return softplus(-fake).mean()


def L_err_E(logits, z):
    """Cross-entropy of σ(logits) against (z + 1)/2, mean over batch and dimensions."""
    return binary_cross_entropy_with_logits(logits, (z + 1) / 2)


def train_step(nets, opt_D, opt_G, opt_E, x, config):
    """One update of D, G and E from the same batch x (B, X)."""
    G, E, D = nets["G"], nets["E"], nets["D"]
    z = torch.rand(len(x), config.latent_dim, device=x.device) * 2 - 1
    with shared.products(config, x.device):
        x_fake = G(z)
        real = shared.fp32(D(x))  # (B, 1); two calls: each has its own batch statistics
        fake = shared.fp32(D(x_fake))
        x_for_E = x_fake.detach()  # LR: E's error does not reach G
        if config.joint:  # the same numbers; a quarter of the gradient reaches G (train_mnist.sh)
            x_for_E = x_for_E + 0.25 * (x_fake - x_for_E)
        logits = shared.fp32(E(x_for_E))  # (B, Z)
    loss_D = L_adv_D(real, fake)
    loss_G = L_adv_G(fake)
    loss_E = L_err_E(logits, z)

    opt_D.zero_grad()
    opt_G.zero_grad()
    opt_E.zero_grad()
    loss_D.backward(inputs=list(D.parameters()), retain_graph=True)
    (loss_G + loss_E).backward(inputs=[*G.parameters(), *E.parameters()])
    opt_D.step()
    opt_G.step()
    opt_E.step()
    losses = {"L_adv_D": loss_D, "L_adv_G": loss_G, "L_err_E": loss_E}
    return {name: loss.detach() for name, loss in losses.items()}


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
    title = f"{'JLR' if config.joint else 'LR'}, epoch {run.epoch}"

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

    def adam(net):  # as train_gan.py
        kwargs = {"weight_decay": config.weight_decay, "fused": True}
        return torch.optim.Adam(net.parameters(), config.lr, (0.5, 0.999), **kwargs)

    opt_D = adam(nets["D"])
    opt_G = adam(nets["G"])
    opt_E = adam(nets["E"])
    parts = {"nets": nets, "opt_D": opt_D, "opt_G": opt_G, "opt_E": opt_E}

    run = shared.Run(config, device, nets, len(data.x_train) // config.batch_size)
    for epoch in run.epochs(parts):
        for optimizer in (opt_D, opt_G, opt_E):  # its own
            optimizer.param_groups[0]["lr"] = learning_rate(config, epoch)  # its own
        for i in shared.batches(data.x_train, config.batch_size, config.seed, epoch):
            losses = train_step(nets, opt_D, opt_G, opt_E, data.x_train[i], config)  # its own
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
