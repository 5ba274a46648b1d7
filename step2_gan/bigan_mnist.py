"""Bidirectional GAN (BiGAN), arXiv 1605.09782, in the permutation-invariant MNIST setting of its §4.2.

A discriminator D of pairs tells (x, E(x)) from (G(z), z). Against the best D, E and G minimise a Jensen-Shannon divergence
of the two joint distributions, and only inverse maps reach its minimum (its §3), so that E inverts G though nothing compares
x with G(E(x)). With D's logits, z ~ U[−1, 1]⁵⁰, all nets updated at once on the same batch:

    D      minimises   L_D  = softplus(−D(x, E(x))) + softplus(D(G(z), z))
    E, G   minimise    L_EG = softplus(D(x, E(x))) + softplus(−D(G(z), z))        (its §3.4: the labels exchanged)

    python step2_gan/bigan_mnist.py                                     # 25 epochs
    python step2_gan/bigan_mnist.py --split sw --epochs 400             # as long as the paper
    python step2_gan/bigan_mnist.py --resume runs/bigan_mnist/NAME/checkpoint.pt --epochs 400

Result to expect (--split sw, 25 epochs, seeds 0 and 1; AMD EPYC, one core, 8 minutes; README has the tables): 1-NN on short /
long features 95.3 ± 0.5 / 96.1 ± 0.3 %; C's README has 95.41 / 96.28 % at that epoch. The first moves: seed 1 had 95.6 % at
epoch 20 and ends at 94.9 %. Reconstructions are another digit about half of the time.

Deviations from the paper (P) or its code (C, github.com/jeffdonahue/bigan, train_mnist.sh):
 1. P, C: 200 epochs, then 200 in which the learning rate decays exponentially to 1 %; here 25 by default, which fit a CPU
    (--epochs 400 has the same schedule).
 2. C: D's loss and that of E and G are halved, which Adam undoes but for ε and the relative weight decay.
 3. Reconstructions are G(2σ(E(x)) − 1), from a deterministic E, as in P's figures.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn
from torch.nn.functional import leaky_relu, softplus

import shared
from shared import option


@dataclass
class Config(shared.Protocol):
    epochs: int = option(25, "passes over the training images (train_mnist.sh: 400)", low=1)
    batch_size: int = option(128, "images per step (train_gan.py)", low=2)
    lr: float = option(0.0002, "learning rate of Adam with β = (0.5, 0.999) (train_gan.py)", low=1e-9)
    constant_epochs: int = option(200, "after these, lr falls exponentially, to 1 % in 200 more (train_mnist.sh)", low=0)
    weight_decay: float = option(2.5e-5, "L2 penalty, in the gradient (train_gan.py)", low=0)
    latent_dim: int = option(50, "dimension of z (train_mnist.sh)", low=1)
    eval_every: int = option(5, "epochs between cheap evaluations, and pictures", low=1)
    references: bool = option(False, "score raw pixels and the untrained encoder too, for the tables (a minute)")
    resume: str = option("", "checkpoint.pt to go on from")
    benchmark: bool = option(False, "measure the speed of a training step, and stop")


# B batch, Z = latent_dim, X = pixels (784), H = 1024

def linear(fan_in, fan_out):
    layer = nn.Linear(fan_in, fan_out, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


class Generator(nn.Module):
    """z (B, Z) → x (B, X) in [0, 1]; the second layer sees z again."""

    def __init__(self, Z, X, H=1024):
        super().__init__()
        self.first = nn.Sequential(linear(Z, H), nn.BatchNorm1d(H, 1e-8, affine=False), nn.ReLU())
        self.second, self.second_z = linear(H, H), linear(Z, H)
        self.last = nn.Sequential(nn.BatchNorm1d(H, 1e-8, affine=False), nn.ReLU(), linear(H, X), nn.Sigmoid())

    def forward(self, z):
        return self.last(self.second(self.first(z)) + self.second_z(z))


class Discriminator(nn.Module):
    """x (B, X), z (B, Z) → logits (B, 1); z enters at the second layer."""

    def __init__(self, Z, X, H=1024):
        super().__init__()
        self.first, self.second, self.second_z = linear(X, H), linear(H, H), linear(Z, H)
        self.last = nn.Sequential(nn.BatchNorm1d(H, 1e-8, affine=False), nn.LeakyReLU(0.2), linear(H, 1))

    def forward(self, x, z):
        return self.last(self.second(leaky_relu(self.first(x), 0.2)) + self.second_z(z))


def build(config, X):
    """G, E, D; E gives logits, and the code is 2σ(E(x)) − 1."""
    Z, H = config.latent_dim, 1024
    E = nn.Sequential(linear(X, H), nn.LeakyReLU(0.2), linear(H, H), nn.BatchNorm1d(H, 1e-8, affine=False), nn.LeakyReLU(0.2),
                      linear(H, Z))
    nets = nn.ModuleDict({"G": Generator(Z, X), "E": E, "D": Discriminator(Z, X)})
    nn.init.zeros_(nets["D"].last[-1].weight)
    return nets


def to_code(logits):
    return 2 * logits.sigmoid() - 1


def L_D(real, fake):
    """softplus(−D(x, E(x))) + softplus(D(G(z), z)), mean over the batch, from D's logits."""
    return (softplus(-real) + softplus(fake)).mean()


def L_EG(real, fake):
    """L_D with the pairs' roles exchanged."""
    return L_D(fake, real)


def train_step(nets, opt_D, opt_EG, x, config):
    """One update of D, and of E and G, from the same batch x (B, X). Returns the LOSSES."""
    G, E, D = nets["G"], nets["E"], nets["D"]
    z = torch.rand(len(x), config.latent_dim, device=x.device) * 2 - 1
    real, fake = D(x, to_code(E(x))), D(G(z), z)  # two calls: each has its own batch statistics
    loss_D, loss_EG = L_D(real, fake), L_EG(real, fake)
    opt_D.zero_grad(), opt_EG.zero_grad()
    loss_D.backward(inputs=list(D.parameters()), retain_graph=True)
    loss_EG.backward(inputs=[*E.parameters(), *G.parameters()])
    opt_D.step(), opt_EG.step()
    return torch.stack([loss_D, loss_EG]).detach()


LOSSES = ("train/L_D", "train/L_EG")


def learning_rate(config, epoch):
    """Constant, then falling exponentially, to 1 % in the 200th epoch after; for the epochs 1, 2, …"""
    return config.lr * 0.01 ** (max(0, epoch - config.constant_epochs) / 200)


@torch.no_grad()
def settle(nets, x_train, config, n=1000):
    """Batch statistics for evaluation: their mean over n batches, always of the same images and z (train_mnist.sh)."""
    generator = torch.Generator(x_train.device).manual_seed(0)
    norms = [m for net in (nets["G"], nets["E"]) for m in net.modules() if isinstance(m, nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    nets.train()
    for _ in range(20 if config.smoke else n):
        nets["E"](x_train[torch.randint(len(x_train), (config.batch_size,), device=x_train.device, generator=generator)])
        nets["G"](2 * torch.rand(config.batch_size, config.latent_dim, device=x_train.device, generator=generator) - 1)


def maps(nets, config, x_train):
    """What shared.evaluate and shared.draw look at; the short features are the logits (train_gan.py)."""
    G, E = nets["G"], nets["E"]

    def prior(n):
        return 2 * torch.rand(n, config.latent_dim, generator=torch.Generator().manual_seed(0)).to(x_train.device) - 1
    return {"encode": lambda x: to_code(E(x)), "decode": G, "prior": prior, "short": E, "long": E[:5]}


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
    opt_D, opt_EG = (torch.optim.Adam(params, config.lr, (0.5, 0.999), weight_decay=config.weight_decay, fused=True)
                     for params in (nets["D"].parameters(), [*nets["E"].parameters(), *nets["G"].parameters()]))
    parts = {"nets": nets, "opt_D": opt_D, "opt_EG": opt_EG}
    if config.benchmark:
        return shared.benchmark(lambda: train_step(*parts.values(), x_train[:config.batch_size], config),
                                config.batch_size, config)
    first, losses = 0, torch.zeros(len(LOSSES), device=device)  # steps behind us in this epoch, and their losses
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        first, losses = checkpoint["step"], checkpoint["losses"].to(device)
    run = shared.Run(config, device, sum(p.numel() for p in nets.parameters()), checkpoint)
    seen = maps(nets, config, x_train)

    def save(step):
        run.save("checkpoint.pt", step=step, losses=losses, **{name: part.state_dict() for name, part in parts.items()})

    def look(measure, *args):
        settle(nets, x_train, config)
        nets.eval()
        result = measure(config, data, seen, *args)
        nets.train()
        return result

    if not checkpoint:
        run.log({"epoch": 0} | look(shared.untrained))
    for epoch in range(run.done + 1, config.epochs + 1):
        for group in (*opt_D.param_groups, *opt_EG.param_groups):
            group["lr"] = learning_rate(config, epoch)
        order = torch.Generator(device).manual_seed(1_000_003 * config.seed + epoch)
        for step, i in enumerate(shared.batches(len(x_train), config.batch_size, order, skip=first), first + 1):
            losses += train_step(nets, opt_D, opt_EG, x_train[i], config)
            run.tick(config.batch_size, losses[0] / step, config.epochs * steps)
            if run.stop:
                save(step)
                run.leave()
        row = {"epoch": epoch} | {name: run.finite(loss / steps) for name, loss in zip(LOSSES, losses)}
        first, losses = 0, torch.zeros_like(losses)
        if looked := epoch % config.eval_every == 0 or epoch == config.epochs:
            row |= look(shared.evaluate, False)
        run.log(row)
        save(0)
        if looked:
            nets.eval()
            shared.draw(run, data, seen, {"loss": LOSSES, "reconstruction MSE": ["eval/recon_mse"],
                                          "1-NN accuracy on E(x), %": ["eval/knn_acc_short"]}, "BiGAN")
            nets.train()

    metrics = look(shared.evaluate, True)
    run.save("model.pt", **{name: net.state_dict() for name, net in nets.items()})
    run.finish(**metrics)


if __name__ == "__main__":
    main(shared.parse_config(Config))
