"""Latent regressor (LR) and joint latent regressor (JLR), the baselines of BiGAN's paper, arXiv 1605.09782 §4.1, on MNIST.

A GAN, and an encoder that learns to find the z behind each sample; it never sees data. With D's logits, z ~ U[−1, 1]⁵⁰ and
E(x) the logits of a regression of (z + 1)/2, all nets updated at once on the same batch:

    D   minimises   L_adv_D = softplus(−D(x)) + softplus(D(G(z)))
    G   minimises   L_adv_G = softplus(−D(G(z)))  [+ ¼ L_err_E with --joint]
    E   minimises   L_err_E = BCE(σ(E(G(z))), (z + 1)/2), mean over the dimensions of z

    python step2_gan/latent_regressor_mnist.py                          # LR, 25 epochs
    python step2_gan/latent_regressor_mnist.py --joint                  # JLR
    python step2_gan/latent_regressor_mnist.py --split sw --epochs 400  # as long as the paper
    python step2_gan/latent_regressor_mnist.py --resume runs/latent_regressor_mnist/NAME/checkpoint.pt --epochs 400

Result to expect (25 epochs, test images, seeds 0 and 1; AMD EPYC, one core, 8 to 9 minutes; README has the tables): LR / JLR:
MSE 0.025 / 0.025, 1-NN 92.4 / 92.5 % and SVM 89.3 / 89.0 % on short features (untrained encoder: SVM 79.3 %), identity 90.4 /
90.7 %.

Deviations from the paper (P) or its code (C, github.com/jeffdonahue/bigan, train_mnist.sh):
 1. P, C: 200 epochs, then 200 in which the learning rate decays exponentially to 1 %; here 25 by default, which fit a CPU
    (--epochs 400 has the same schedule).
 2. C: D's loss, and in JLR also what E minimises (¼ L_err_E), are scaled, which Adam undoes but for ε and the relative
    weight decay.
E is trained on samples, and evaluated with the batch statistics of data, as in C.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

import shared
from shared import option


@dataclass
class Config(shared.Protocol):
    epochs: int = option(25, "passes over the training images (train_mnist.sh: 400)", low=1)
    batch_size: int = option(128, "images per step (train_gan.py)", low=2)
    lr: float = option(0.0002, "learning rate of Adam with β = (0.5, 0.999) (train_gan.py)", low=1e-9)
    constant_epochs: int = option(200, "after these, lr falls exponentially, to 1 % in 200 more (train_mnist.sh)", low=0)
    weight_decay: float = option(2.5e-5, "L2 penalty, in the gradient (train_gan.py)", low=0)
    joint: bool = option(False, "JLR: L_err_E reaches the generator as well")
    joint_weight: float = option(0.25, "weight of that (train_mnist.sh; at 1 the samples degenerate)", low=0)
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


def critic(X, out, H=1024):
    """The net of D (one output) and of E. With PyTorch's ε = 1e-5, and D not starting at 0, JLR ended in black images."""
    return nn.Sequential(linear(X, H), nn.LeakyReLU(0.2),
                         linear(H, H), nn.BatchNorm1d(H, 1e-8, affine=False), nn.LeakyReLU(0.2), linear(H, out))


def build(config, X):
    """G, E, D; E gives logits, and the code is 2σ(E(x)) − 1."""
    nets = nn.ModuleDict({"G": Generator(config.latent_dim, X), "E": critic(X, config.latent_dim), "D": critic(X, 1)})
    nn.init.zeros_(nets["D"][-1].weight)
    return nets


def to_code(logits):
    return 2 * logits.sigmoid() - 1


def L_adv_D(real, fake):
    """softplus(−D(x)) + softplus(D(G(z))), mean over the batch, from D's logits."""
    return (softplus(-real) + softplus(fake)).mean()


def L_err_E(logits, z):
    """Cross-entropy of σ(logits) against (z + 1)/2, mean over batch and dimensions; logits, z (B, Z)."""
    return binary_cross_entropy_with_logits(logits, (z + 1) / 2)


def scale_gradient(x, weight):
    """x, whose gradient is multiplied by the weight."""
    return x.detach() + weight * (x - x.detach()) if weight else x.detach()


def train_step(nets, opt_D, opt_G, opt_E, x, config):
    """One update of D, G and E from the same batch x (B, X). Returns the LOSSES."""
    G, E, D = nets["G"], nets["E"], nets["D"]
    z = torch.rand(len(x), config.latent_dim, device=x.device) * 2 - 1
    x_fake = G(z)
    real, fake = D(x), D(x_fake)  # two calls: each has its own batch statistics
    loss_D, loss_G = L_adv_D(real, fake), softplus(-fake).mean()
    loss_E = L_err_E(E(scale_gradient(x_fake, config.joint_weight * config.joint)), z)
    for optimizer in (opt_D, opt_G, opt_E):
        optimizer.zero_grad()
    loss_D.backward(inputs=list(D.parameters()), retain_graph=True)
    (loss_G + loss_E).backward(inputs=[*G.parameters(), *E.parameters()])
    opt_D.step(), opt_G.step(), opt_E.step()
    return torch.stack([loss_D, loss_G, loss_E]).detach()


LOSSES = ("train/L_adv_D", "train/L_adv_G", "train/L_err_E")


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
    parts = {"nets": nets} | {f"opt_{name}": torch.optim.Adam(
        nets[name].parameters(), config.lr, (0.5, 0.999), weight_decay=config.weight_decay, fused=True) for name in "DGE"}
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
        nn.init.zeros_(nets["E"][-1].weight)  # train_gan.py; features that are all 0 would be no reference
    for epoch in range(run.done + 1, config.epochs + 1):
        for group in (group for name in parts if name != "nets" for group in parts[name].param_groups):
            group["lr"] = learning_rate(config, epoch)
        order = torch.Generator(device).manual_seed(1_000_003 * config.seed + epoch)
        for step, i in enumerate(shared.batches(len(x_train), config.batch_size, order, skip=first), first + 1):
            losses += train_step(*parts.values(), x_train[i], config)
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
                                          "1-NN accuracy on E(x), %": ["eval/knn_acc_short"]}, "JLR" if config.joint else "LR")
            nets.train()

    metrics = look(shared.evaluate, True)
    run.save("model.pt", **{name: net.state_dict() for name, net in nets.items()})
    run.finish(**metrics)


if __name__ == "__main__":
    main(shared.parse_config(Config))
