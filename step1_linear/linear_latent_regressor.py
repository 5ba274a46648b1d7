"""Linear latent regressors, LR and joint LR: a GAN of matrices and an encoder that inverts it, and how they come to PCA.

G: z → x, E: x → z are matrices, z ~ N(0, I), x (d) is centred with covariance Σ = VΛVᵀ; D: x → ℝ. As BiGAN's authors
define them (arXiv 1605.09782 §4), everything updated once per iteration:

    D   minimises  softplus(D(G z)) + softplus(−D(x)) + γ/2 ‖∇ₓ D(x)‖²
    G   minimises  softplus(−D(G z)), and in joint LR also a quarter of E's error
    E   minimises  ‖z − E G z‖² + ρ ‖E‖²

A linear critic finds nothing in centred data (linear_alae.py says why). A quadratic one, D(x) = xᵀAx + c, compares Σ with
GGᵀ. Take softplus's slope ½ at 0. Against R1 the best A is A_ab = (Σ − GGᵀ)_ab / 4γ(λ_a + λ_b) in the eigenbasis.
At G = VΛ^½ (k leading eigenvectors) A is 1/8γ on each direction j outside, which pulls G there, and 0 inside; but if a
column of G turns by ε from i to j, A_ij answers, and the net force on ε is −ε/8γ · (λᵢ − λⱼ)/(λᵢ + λⱼ): back, if λᵢ > λⱼ.
So PCA is what attracts, as fast for small eigenvalues as for large ones, provided that D answers faster than G moves.
Hence G's smaller learning rate; with D's, at k = 50 on --split val, LR ends 7 to 14 % above PCA instead of 1 %.
E only ever sees G z: off the span of G its initial weights would stay. The ridge ρ, which is what noise of variance ρ on
E's input amounts to, removes them; it shortens E G by at most ρ/λ_k.

    python step1_linear/linear_latent_regressor.py             # LR on MNIST, k = 10; --k 50 for 50 components
    python step1_linear/linear_latent_regressor.py --joint     # JLR

Result to expect (MNIST, seeds 0 to 2, AMD EPYC, 21 to 62 s on one core): test MSE over PCA's for LR 1.001 at k = 10 and
1.006 to 1.021 at k = 50, for JLR 1.0005 and 1.002 to 1.003.

That PCA is the optimum of a linear G against a quadratic critic is due to Feizi et al. (arXiv 1710.10793).

Deviations from the paper: 1. Linear G and E without bias, a quadratic critic (of rank 4k, not d as above), R1 and
    z ~ N(0, I) in place of weight decay and uniform z. 2. The ridge ρ. 3. A squared error for E, no cross-entropy.
 4. x is scaled to the energy of z, ⟨‖x‖²⟩ = k, and the learning rates fall linearly to 1 %.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn
from torch.nn.functional import softplus

import shared
from shared import option

LOSSES = ("train/L_adv_D", "train/r1", "train/L_adv_G", "train/L_err_E")


@dataclass
class Config(shared.Protocol):
    dataset: str = option("mnist", "an image dataset, or swiss_roll or sine_sheet (toys in 3-D)")
    joint: bool = option(False, "JLR: E's error also reaches G")
    k: int = option(10, "dimension of z", low=1)
    steps: int = option(6000, "training steps (ours)", low=1)
    batch_size: int = option(256, "images per step (ours; paper: 128)", low=1)
    lr: float = option(0.002, "learning rate of D and E at the start (ours; paper: 0.0002)", low=1e-9)
    lr_generator: float = option(0.0005, "learning rate of G at the start (ours)", low=1e-9)
    critic: str = option("quadratic", "D: x → ℝ (ours)", choices=("linear", "quadratic"))
    gamma: float = option(2.0, "weight γ of R1 (ours)", low=0)
    joint_weight: float = option(0.25, "weight of E's error for G in JLR (BiGAN's code)", low=0)
    ridge: float = option(0.01, "weight ρ of ‖E‖² (ours)", low=0)
    eval_every: int = option(200, "steps between evaluations", low=1)
    resume: str = option("", "checkpoint.pt to go on from")


class Quadratic(nn.Module):
    """D(x) = ‖B₁x‖² − ‖B₂x‖² + c, with B₁ and B₂ (m, d)."""

    def __init__(self, d, m):
        super().__init__()
        self.B1, self.B2, self.c = nn.Linear(d, m, bias=False), nn.Linear(d, m, bias=False), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.B1(x).square().sum(1) - self.B2(x).square().sum(1) + self.c


def start(config, d, device):
    """Maps G (d, k), E (k, d), critic D, and their optimizers."""
    maps = nn.ParameterDict({"G": 0.1 * nn.Linear(config.k, d, bias=False).weight.detach(),
                             "E": nn.Linear(d, config.k, bias=False).weight.detach()}).to(device)
    D = (Quadratic(d, 2 * config.k) if config.critic == "quadratic" else nn.Sequential(nn.Linear(d, 1), nn.Flatten(0))).to(device)

    def adam(parameters, lr):
        return torch.optim.Adam([{"params": list(parameters), "lr": lr, "first_lr": lr}], betas=(0.0, 0.99), fused=True)
    return {"maps": maps, "D": D, "opt_D": adam(D.parameters(), config.lr), "opt_G": adam([maps["G"]], config.lr_generator),
            "opt_E": adam([maps["E"]], config.lr)}


def L_adv_D(G, D, x, z, gamma):
    """D's loss on x (B, d), z (B, k), and R1, γ/2 ‖∇ₓ D(x)‖²."""
    x = x.requires_grad_()
    real = D(x)
    gradient, = torch.autograd.grad(real.sum(), x, create_graph=True)
    return softplus(D(z @ G.detach().T)).mean() + softplus(-real).mean(), gamma / 2 * gradient.square().sum(1).mean()


def L_err(G, E, z):
    """‖z − E G z‖², on z (B, k)."""
    return (z - z @ (E @ G).T).square().sum(1).mean()


def train_step(parts, x, config):
    """One update of D, G and E on x (B, d). Returns the LOSSES."""
    (G, E), D = (parts["maps"][name] for name in "GE"), parts["D"]
    z = torch.randn(3, len(x), config.k, device=x.device)

    adv_D, r1 = L_adv_D(G, D, x, z[0], config.gamma)
    parts["opt_D"].zero_grad()
    (adv_D + r1).backward()
    parts["opt_D"].step()

    adv_G = softplus(-D(z[1] @ G.T)).mean()
    parts["opt_G"].zero_grad()
    (adv_G + config.joint_weight * L_err(G, E.detach(), z[1]) if config.joint else adv_G).backward()
    parts["opt_G"].step()

    err = L_err(G.detach(), E, z[2])
    parts["opt_E"].zero_grad()
    (err + config.ridge * E.square().sum()).backward()
    parts["opt_E"].step()
    return torch.stack([adv_D, r1, adv_G, err]).detach()


def mse(E, G, S):
    """Mean over images and pixels of (x − GEx)², x centred with covariance S (d, d); E (k, d), G (d, k)."""
    ES = E @ S
    return (S.trace() - 2 * (ES * G.T).sum() + ((G.T @ G) * (ES @ E.T)).sum()).item() / len(S)


def evaluate(E, G, V, S, S_test):
    """x̂ = mean + G E (x − mean) against PCA, whose k leading eigenvectors are V (d, k); all in float64."""
    row = {"mse_train": mse(E, G, S), "mse_test": mse(E, G, S_test)}
    best = {"mse_train": mse(V.T, V, S), "mse_test": mse(V.T, V, S_test)}
    row |= {"ratio": row["mse_train"] / best["mse_train"], "ratio_test": row["mse_test"] / best["mse_test"]}
    row |= {"explained": 100 * (1 - row["mse_train"] * len(S) / S.trace().item())}  # % of the variance
    row |= {f"pca_{key}": value for key, value in best.items()}
    for name, W in (("E", E.T), ("G", G)):
        row[f"angle_{name}"] = torch.linalg.svdvals(torch.linalg.qr(W)[0].T @ V).clamp(max=1).acos().max().item()
    return {f"eval/{key}": value for key, value in row.items()}


def draw(E, G, V, S, x, shape, mean, run):
    """Curves; with images, x (n, d), also components and reconstructions, beside PCA's."""
    rows, name = run.rows, "joint LR" if run.config.joint else "LR"
    steps, title = [row["step"] for row in rows], f"Linear {name}, {run.config.dataset}, k = {run.config.k}"
    run.picture("convergence", shared.curves({
        "test MSE": {label: (steps, [row[f"eval/{key}"] for row in rows]) for label, key in (
            (name, "mse_test"), ("PCA", "pca_mse_test"))},
        "MSE / PCA's − 1": {label: (steps, [row[f"eval/{key}"] - 1 for row in rows]) for label, key in (
            ("training images", "ratio"), ("test images", "ratio_test"))},
        "largest angle to PCA's, rad": {label: (steps, [row[f"eval/angle_{label}"] for row in rows]) for label in "EG"}},
        "steps", title, yscale="log"))
    run.picture("losses", shared.curves({"loss": {key.removeprefix("train/"): (steps[1:], [row[key] for row in rows[1:]])
                                                  for key in LOSSES}}, "steps", title, yscale="log"))
    if shape:
        Q, n = torch.linalg.qr(G)[0], min(10, run.config.k)
        Q = Q @ torch.linalg.eigh(Q.T @ S @ Q)[1].flip(1)  # turned to the principal axes within the span of G
        pictures = torch.cat([V[:, :n].T, (Q * (Q * V).sum(0).sign())[:, :n].T]).unflatten(1, shape)
        run.picture("components", shared.grid(0.5 + pictures / (2 * pictures.abs().amax((1, 2, 3), keepdim=True)), n, title,
                                              ["PCA", "span of G,\nits axes"]))
        both = [x, mean + (x - mean) @ V @ V.T, mean + (x - mean) @ E.T @ G.T]
        run.picture("reconstructions", shared.grid(torch.cat(both).unflatten(1, shape), len(x), title, ["x", "PCA", name]))


def main(config):
    device = shared.setup(config)
    checkpoint = shared.load_checkpoint(config.resume, Config) if config.resume else None
    if config.smoke:
        config.steps, config.batch_size, config.eval_every = min(config.steps, 60), min(config.batch_size, 200), 20
    x, _, x_test, _, shape = shared.load_vectors(config, device)
    if config.k >= (most := min(x.shape)):
        shared.fail(f"--k {config.k}: choose 1 to {most - 1}, below the data's dimension")
    if config.batch_size > len(x):
        shared.fail(f"--batch-size {config.batch_size} is larger than the data, {len(x)} images")
    mean = x.mean(0)
    S, S_test = (t.T @ t / len(t) for t in ((x - mean).cpu().double(), (x_test - mean).cpu().double()))
    if S.trace() < 1e-9:
        shared.fail(f"--dataset {config.dataset}: the images are all the same")
    values, V = torch.linalg.eigh(S)
    if config.k >= (rank := int((values > 1e-9 * values[-1]).sum())):
        shared.fail(f"--k {config.k}: the data spans only {rank} dimensions, choose less")
    V, scale = V.flip(1)[:, :config.k], (config.k / S.trace().item()) ** 0.5
    x = (x - mean) * scale

    parts, first, losses = start(config, x.shape[1], device), 0, torch.zeros(len(LOSSES), device=device)
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        first, losses = checkpoint["step"], checkpoint["losses"].to(device)
    run = shared.Run(config, device, sum(p.numel() for name in ("maps", "D") for p in parts[name].parameters()), checkpoint,
                     unit="step")

    def maps():  # for unscaled x
        E, G = (parts["maps"][name].detach().cpu().double() for name in "EG")
        return E * scale, G / scale

    if not checkpoint:
        run.log({"step": 0} | evaluate(*maps(), V, S, S_test))
    per_epoch = len(x) // config.batch_size
    for step in range(first + 1, config.steps + 1):
        epoch, done = divmod(step - 1, per_epoch)
        if done == 0 or step == first + 1:
            order = torch.Generator(device).manual_seed(1_000_003 * config.seed + epoch)
            indices = shared.batches(len(x), config.batch_size, order, skip=done)
        for group in (group for name in ("opt_D", "opt_G", "opt_E") for group in parts[name].param_groups):
            group["lr"] = group["first_lr"] * (1 - 0.99 * (step - 1) / config.steps)
        losses += train_step(parts, x[next(indices)], config)
        n = (step - 1) % config.eval_every + 1  # steps since the last row
        run.tick(config.batch_size, losses[-1] / n, config.steps)
        if n == config.eval_every or step == config.steps:
            run.log({"step": step} | {key: run.finite(loss / n) for key, loss in zip(LOSSES, losses)}
                    | evaluate(*maps(), V, S, S_test))
            losses.zero_()
        if run.stop or step == config.steps:
            run.save("checkpoint.pt", step=step, losses=losses, **{name: part.state_dict() for name, part in parts.items()})
            run.stop and run.leave()
    E, G = maps()
    draw(E, G, V, S, x_test[:12].cpu().double(), shape, mean.cpu().double(), run)
    run.save("model.pt", E=E, G=G, mean=mean.cpu())
    E, G = E.to(x), G.to(x)
    run.finish(**{"eval/recon_mse": shared.recon_mse(x_test, mean + (x_test - mean) @ E.T @ G.T)} if shape else {})


if __name__ == "__main__":
    main(shared.parse_config(Config))
