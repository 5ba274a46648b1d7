"""Linear latent regressors, LR and joint LR: a GAN of matrices and an encoder that inverts it.

G: z → x, E: x → z are matrices, z ~ N(0, I), x (d) is centred with covariance Σ = VΛVᵀ; D: x → ℝ.
As BiGAN's authors define them (arXiv 1605.09782 §4), each updated once per iteration:

    D   minimises  softplus(D(G z)) + softplus(−D(x)) + γ/2 ‖∇ₓ D(x)‖²
    G   minimises  softplus(−D(G z)), and in joint LR also a quarter of E's error
    E   minimises  ‖z − E G z‖² + ρ ‖E‖²

A linear critic finds nothing in centred data (linear_alae.py says why). A quadratic one,
D(x) = xᵀAx + c, compares Σ with GGᵀ. Replace softplus by its tangent of slope ½ at 0. With R1 the
best A, in the eigenbasis, is A_ab = (Σ − GGᵀ)_ab / 4γ(λ_a + λ_b).

Is PCA stable? Let G = VΛ^½, with the k leading eigenvectors. Then A is 0 inside their span, and
1/8γ on each direction j outside, which pulls G there. But if a column of G turns by ε from i to j,
A_ij answers. The net force on ε is −ε/8γ · (λᵢ − λⱼ)/(λᵢ + λⱼ), which turns it back if λᵢ > λⱼ.
So PCA attracts, as fast for small eigenvalues as for large ones, provided that D answers faster
than G moves: hence G's smaller learning rate.

E only ever sees G z, so outside the span of G it would keep its initial weights. The ridge ρ
removes them. It acts like noise of variance ρ on E's input, and shortens E G by at most ρ/λ_k.

    python step1_linear/linear_latent_regressor.py             # LR on MNIST, k = 10; or --k 50
    python step1_linear/linear_latent_regressor.py --joint     # JLR

Expect (seeds 0 to 2, test MSE over PCA's): LR 1.001 at k = 10, 1.006 to 1.021 at k = 50; JLR 1.0005
and 1.002 to 1.003.

That PCA is the optimum of a linear G against a quadratic critic is due to Feizi et al. (arXiv
1710.10793). Deviations from BiGAN's paper:
 1. Linear G and E without bias, a quadratic critic (of rank 4k, not d as above), R1 and
    z ~ N(0, I) in place of weight decay and uniform z.
 2. The ridge ρ.
 3. A squared error for E, no cross-entropy.
 4. x is scaled to the energy of z, ⟨‖x‖²⟩ = k. Adam has β = (0, 0.99), as ALAE's, and its rates
    fall linearly to 1 %. G starts at a tenth of PyTorch's initial weights, and E not at 0.
 5. D, G and E move one after the other, each on a fresh z; in BiGAN's code all at once.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

import torch
from torch import nn
from torch.nn.functional import softplus


@dataclass
class Config(shared.Protocol):
    joint: bool = option(False, "JLR: E's error also reaches G")
    k: int = option(10, "dimension of z", low=1)
    steps: int = option(6000, "training steps (ours)", low=0)
    batch_size: int = option(256, "images per step (ours; paper: 128)", low=1)
    lr: float = option(0.002, "rate of D and E at the start (ours; paper: 0.0002)", low=1e-9)
    lr_generator: float = option(0.0005, "learning rate of G at the start (ours)", low=1e-9)
    gamma: float = option(2.0, "weight γ of R1 (ours)", low=0)
    joint_weight: float = option(
        0.25, "of E's error in G's loss, with --joint (BiGAN's code)", low=0
    )
    ridge: float = option(0.01, "weight ρ of ‖E‖² (ours)", low=0)
    eval_every: int = option(200, "steps between evaluations", low=1)


class Quadratic(nn.Module):
    """D(x) = ‖B₁x‖² − ‖B₂x‖² + c, with B₁ and B₂ (m, d)."""

    def __init__(self, d, m):
        super().__init__()
        self.B1 = nn.Linear(d, m, bias=False)
        self.B2 = nn.Linear(d, m, bias=False)
        self.c = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.B1(x).square().sum(1) - self.B2(x).square().sum(1) + self.c


def build(config, x):
    """Matrices G (d, k), E (k, d) and the critic D, for images x (N, d)."""
    k, mean = config.k, x.mean(0)
    energy = (x - mean).cpu().double().square().sum(1).mean().item()
    G = nn.Linear(k, x.shape[1], bias=False)
    G.weight.data.mul_(0.1)
    E = nn.Linear(x.shape[1], k, bias=False)
    D = Quadratic(x.shape[1], 2 * k)
    scaling = nn.Module()  # the maps see scale · (pixels − mean)
    scaling.mean = nn.Buffer(mean)
    scaling.scale = nn.Buffer(torch.tensor((k / energy) ** 0.5))
    return nn.ModuleDict({"scaling": scaling, "G": G, "E": E, "D": D})


def adam(net, lr):
    return torch.optim.Adam(net.parameters(), lr, betas=(0.0, 0.99), fused=True)


def optimizers(nets, config):
    rates = {"D": config.lr, "G": config.lr_generator, "E": config.lr}
    return {f"opt_{name}": adam(nets[name], lr) for name, lr in rates.items()}


def set_learning_rates(opts, config, step):
    """Linearly from the first rates, at step 1, to a hundredth of them."""
    share = 1 - 0.99 * (step - 1) / config.steps
    for opt in opts.values():
        opt.param_groups[0]["lr"] = opt.defaults["lr"] * share


def L_adv_D(G, D, x, z, gamma):
    """D's loss on x (B, d), z (B, k), and R1, γ/2 ‖∇ₓ D(x)‖²."""
    x = x.detach().requires_grad_()
    real = D(x)
    (gradient,) = torch.autograd.grad(real.sum(), x, create_graph=True)  # (B, d)
    adversarial = softplus(D(z @ G.detach().T)).mean() + softplus(-real).mean()
    return adversarial, gamma / 2 * gradient.square().sum(1).mean()


def L_adv_G(G, D, z):
    """softplus(−D(G z)), on z (B, k)."""
    return softplus(-D(z @ G.T)).mean()


def L_err_E(G, E, z):
    """‖z − E G z‖², on z (B, k)."""
    return (z - z @ (E @ G).T).square().sum(1).mean()


def train_step(nets, opts, x, config):
    """One update of D, G and E on x (B, d)."""
    G, E, D = nets["G"].weight, nets["E"].weight, nets["D"]
    z = torch.randn(3, len(x), config.k, device=x.device)  # fresh for each of them

    adv_D, r1 = L_adv_D(G, D, x, z[0], config.gamma)
    nets.zero_grad()
    (adv_D + r1).backward(inputs=list(D.parameters()))
    opts["opt_D"].step()

    adv_G = L_adv_G(G, D, z[1])
    loss_G = adv_G
    if config.joint:
        loss_G = adv_G + config.joint_weight * L_err_E(G, E.detach(), z[1])
    nets.zero_grad()
    loss_G.backward(inputs=[G])
    opts["opt_G"].step()

    err = L_err_E(G.detach(), E, z[2])
    nets.zero_grad()
    (err + config.ridge * E.square().sum()).backward()
    opts["opt_E"].step()

    losses = {"L_adv_D": adv_D, "r1": r1, "L_adv_G": adv_G, "L_err_E": err}
    return {name: loss.detach() for name, loss in losses.items()}


def maps(nets):
    """E (k, d), G (d, k) and mean (d,) for pixels: x̂ = mean + G E (x − mean)."""
    E, G = nets["E"].weight.detach(), nets["G"].weight.detach()
    mean, scale = nets["scaling"].mean, nets["scaling"].scale
    return E * scale, G / scale, mean


def evaluate(nets, data, config, full=False):
    """Errors over PCA's and angles to its subspace; at the end what the codes are worth."""
    E, G, mean = maps(nets)
    metrics = shared.pca.metrics(data, E, G, mean)
    if full:
        train, test = ((x - mean) @ E.T for x in (data.x_train, data.x_test))  # codes (N, k)
        metrics |= shared.image_metrics(data, mean + test @ G.T)
        metrics |= shared.code_metrics(data, train, test, "short")
    return metrics


def draw(run, data, config):
    """Components and reconstructions, beside PCA's; at the end alone."""
    method = "joint LR" if config.joint else "LR"
    title = f"Linear {method}, {config.dataset}, k = {config.k}, step {run.epoch}"
    for name, x, rows in shared.pca.pictures(data, *maps(run.nets)):
        run.picture(name, shared.grid(data.images(x), len(x) // len(rows), title, rows))


def main(config):
    device = shared.setup(config)
    data = shared.load_data(config, device, size=28)
    shared.pca.fit(data.x_train, config.k)  # refuses a k that is too large
    nets = build(config, data.x_train).to(device)
    opts = optimizers(nets, config)
    x_train = (data.x_train - nets["scaling"].mean) * nets["scaling"].scale
    parts = {"nets": nets} | opts

    run = shared.Run(config, device, nets)  # its own
    for row in run.epochs(parts):  # its own
        for step, i in shared.step_batches(x_train, config, row):  # its own
            set_learning_rates(opts, config, step)  # its own
            losses = train_step(nets, opts, x_train[i], config)  # its own
            run.step(losses, len(i))
        run.log_losses()
        if run.is_due():
            run.log(evaluate(run.nets, data, config))  # its own
        run.save(parts)
    metrics = evaluate(run.nets, data, config, full=True)
    draw(run, data, config)
    run.finish(metrics)


if __name__ == "__main__":
    main(shared.parse_config(Config))
