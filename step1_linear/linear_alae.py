"""Linear ALAE: why it fails as one would first write it, and a setting in which it comes to PCA.

F: z → w, G: w → x and E: x → w are matrices, z ~ N(0, I), x (d) is centred with covariance
Σ = VΛVᵀ; ⟨·⟩ is a mean. Algorithm 1 of the paper (arXiv 2004.04467), each step on fresh z; the
decay in Step II is ours:

    I.   E, D   minimise  softplus(D(E G F z)) + softplus(−D(E x)) + γ/2 ‖∇ₓ D(E x)‖²
    II.  F, G   minimise  softplus(−D(E G F z)) + ν/2 ‖G‖²
    III. E, G   minimise  ‖F z − E G F z‖²

A linear critic D(w) = bᵀw cannot work. Step I is convex in a = Eᵀb and its gradient at a = 0 is
½(⟨GFz⟩ − ⟨x⟩) = 0: on centred data the best critic is zero. Step II then has nothing to follow,
and Step III contains no data: it asks EG = I.
A quadratic critic D(w) = wᵀAw − c sees covariances, but A = BᵀB is not enough. Replace softplus by
its tangent of slope ½ at 0, and take γ = 0 and F = I. If EΣEᵀ = I, EG = I and A = 0, every gradient
vanishes, whichever k-dimensional subspace E looks at.

The decay ν keeps A from vanishing. At a fixed point Step I, A E(GGᵀ − Σ) = 0, gives G = ΣEᵀ; Step
II gives EᵀA = νG; Step III gives EG = I. Together EΣ = AE/ν. So the rows of E span an eigenspace of
Σ; there A = νΛ, E = Λ^(−½)Vᵀ whitens the data, and GE is the projector. R1 only stretches this:
GᵀG = Λ(1 − 8γν), and EEᵀ is its inverse, as long as 8γν < 1; here 8γν is 0.2.

Of these eigenspaces PCA's is the stable one in the linearised gradient flow. Let row eᵢ of E turn
by e, and column gᵢ of G by g, from eigenvector i inside towards j outside. Then
(ė, ġ) = ν (λᵢ(λⱼ e − g), λᵢ e − g), which dies out if λᵢ > λⱼ and λᵢλⱼ < 1. (Adam also arrives
where λᵢλⱼ > 1: --preset unscaled.)

On the way there an eigenvalue of BᵀB may fall to 0. There it stays, since B's gradient vanishes
with B: on Fashion-MNIST D goes blind in a direction, and E misses one. Hence A = BᵀB + φνI: D sees
every direction, and as long as φ < λ_k (1 − 8γν) the fixed points stay as they are.

    python step1_linear/linear_alae.py                           # MNIST, k = 10; or --k 50
    python step1_linear/linear_alae.py --preset student          # the student's, which fails
    python results/sweep.py step1_linear/sweeps/ablation.yaml    # what each ingredient is for

Expect (test MSE over PCA's): 1.0000 at k = 10, 1.012 to 1.015 at k = 50; student 2.1.

Deviations from the paper:
 1. Linear maps without bias, F = I, the decay ν and the floor φ. x is scaled to the energy of z,
    ⟨‖x‖²⟩ = k.
 2. Each step has an Adam of its own, as alae_mnist.py reads algorithm 1, and as LabProject-ALAE
    has it; the official code has one for (E, D) and one for (F, G).
 3. The learning rates fall linearly to 1 %, since Adam with β₁ = 0 keeps moving the weights by
    about lr. D's rate is smaller (README.md says when it matters). γ is 0.5, not 10, so that
    8γν < 1.
 4. G starts at 0. Without the floor this is needed (README.md); with it PyTorch's initial weights
    are good enough.
 5. --preset student: autoencoders.py of github.com/ariel415el/LabProject-ALAE. Its penalty,
    γ/2 (‖∇ₓD‖ − 1)², is not convex in a and pulls ‖a‖ to 1: what is said above of a linear critic
    holds for R1. There D has no bias, and main.py has z in 50 dimensions and lr 0.001.
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

STUDENT = {"critic": "linear", "penalty": "unit", "gamma": 10.0, "decay": 0.0, "scale": 1.0}
STUDENT |= {"mapping": "linear", "init_G": 1.0, "steps": 4687, "batch_size": 128}
STUDENT |= {"lr": 0.002, "lr_critic": 0.002, "lr_end": 1.0}
PRESETS = {
    "recipe": {},
    "student": STUDENT,  # deviation 5
    # The recipe with one thing changed: what each ingredient is for
    "critic-linear": {"critic": "linear"},  # blind on centred data
    "no-floor": {"floor": 0.0},  # A may lose a direction
    "critic-mlp": {"critic": "mlp"},  # sees more than second moments
    "no-decay": {"decay": 0.0},  # nor a floor, φν; every whitened subspace is at rest
    "no-decay-floor": {"decay": 1e-6, "floor": 3500.0},  # the floor φν alone
    "decay-quarter": {"decay": 0.0125},  # and a quarter of the floor
    "decay-times-4": {"decay": 0.2},  # and four times the floor
    "unscaled": {"scale": 1.0},  # at k = 10 λ₁λ_{k+1} is then 5.7, not 0.2
    "mapping-linear": {"mapping": "linear"},  # F is learned, as in the paper
    "gamma-0": {"gamma": 0.0},  # nothing damps the game
    "gamma-10": {"gamma": 10.0},  # the paper's; 8γν is not below 1
    "penalty-unit": {"gamma": 10.0, "penalty": "unit"},  # the student's, to compare with gamma-10
    "tangent": {"adversarial": "tangent"},  # the loss of the argument above
    "lr-critic-times-4": {"lr_critic": 0.004},  # D as fast as the maps
    "lr-constant": {"lr_end": 1.0},  # Adam keeps shaking
    "init-pytorch": {"init_G": 1.0},  # G does not start at 0
    "adams-paper": {"adams": "nets"},  # the official code's: Step III shares their moments
}


@dataclass
class Config(shared.Protocol):
    preset: str = option("recipe", "ours, the student's, or a study of ours", tuple(PRESETS))
    k: int = option(10, "dimension of z and w", low=1)
    steps: int = option(16_000, "training steps (ours)", low=0)
    batch_size: int = option(512, "images per step (ours; official code: 128)", low=1)
    lr: float = option(0.004, "rate of E, F, G at the start (ours; official code: 0.002)", low=1e-9)
    lr_critic: float = option(0.001, "learning rate of D at the start (ours)", low=1e-9)
    lr_end: float = option(0.01, "rates fall to this share (ours; 1: constant)", low=0, high=1.01)
    critic: str = option("quadratic", "D: w → ℝ (ours)", ("linear", "quadratic", "mlp"))
    floor: float = option(0.07, "φ, with A = BᵀB + φνI in the quadratic critic (ours)", low=0)
    adversarial: str = option(
        "softplus",
        "softplus (paper), or t/2, its tangent at 0 less a constant",
        ("softplus", "tangent"),
    )
    penalty: str = option("r1", "‖∇ₓD‖² (paper), (‖∇ₓD‖ − 1)² (the student's)", ("r1", "unit"))
    gamma: float = option(0.5, "γ/2 times the penalty in Step I (ours; paper: 10)", low=0)
    decay: float = option(0.05, "ν, with ν/2 ‖G‖² in Step II (ours; paper: 0)", low=0)
    adams: str = option(
        "steps", "one for each step, or for (E, D) and (F, G): official code", ("steps", "nets")
    )
    mapping: str = option("identity", "F = I (ours), or a learned matrix", ("identity", "linear"))
    scale: float = option(0.0, "x is multiplied by this; 0: so that ⟨‖x‖²⟩ = k (ours)", low=0)
    init_G: float = option(0.0, "G's initial weights, in units of PyTorch's (ours)", low=0)
    eval_every: int = option(400, "steps between evaluations", low=1)


class Quadratic(nn.Module):
    """D(w) = wᵀAw − c, A = BᵀB + floor I, for w (B, k); floor: φν."""

    def __init__(self, k, floor):
        super().__init__()
        self.B = nn.Parameter(0.1 * torch.eye(k))
        self.c = nn.Parameter(torch.zeros(()))
        self.floor = floor

    def forward(self, w):
        return (w @ self.B.T).square().sum(1) + self.floor * w.square().sum(1) - self.c


def build(config, x):
    """Matrices F (k, k), G (d, k), E (k, d) and the critic D, for images x (N, d)."""
    k, mean = config.k, x.mean(0)
    energy = (x - mean).square().sum(1).mean().item()
    E = nn.Linear(x.shape[1], k, bias=False)
    G = nn.Linear(k, x.shape[1], bias=False)
    G.weight.data.mul_(config.init_G)
    if config.mapping == "linear":
        F = nn.Linear(k, k, bias=False)
    else:
        F = nn.Module()
        F.weight = nn.Buffer(torch.eye(k))  # a matrix that is not learned
    if config.critic == "linear":
        D = nn.Sequential(nn.Linear(k, 1), nn.Flatten(0))
    elif config.critic == "quadratic":
        D = Quadratic(k, config.floor * config.decay)
    else:
        D = nn.Sequential(nn.Linear(k, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1), nn.Flatten(0))
    scaling = nn.Module()  # the maps see scale · (pixels − mean)
    scaling.mean = nn.Buffer(mean)
    scaling.scale = nn.Buffer(torch.tensor(config.scale or (k / energy) ** 0.5))
    return nn.ModuleDict({"scaling": scaling, "F": F, "G": G, "E": E, "D": D})


def adam(*groups):
    """Adam for groups (parameters, learning rate at the start)."""
    groups = [{"params": params, "lr": lr, "first_lr": lr} for params, lr in groups]
    return torch.optim.Adam(groups, betas=(0.0, 0.99), fused=True)


def optimizers(nets, config):
    F, G, E, D = (list(nets[name].parameters()) for name in "FGED")
    opts = {"opt_ED": adam((E, config.lr), (D, config.lr_critic))}
    opts["opt_FG"] = adam((F + G, config.lr))
    if config.adams == "steps":
        opts["opt_EG"] = adam((E + G, config.lr))
    return opts


def set_learning_rates(opts, config, step):
    """Linearly from the first rates, at step 1, to lr_end of them."""
    share = 1 - (1 - config.lr_end) * (step - 1) / config.steps
    for opt in opts.values():
        for group in opt.param_groups:
            group["lr"] = group["first_lr"] * share


def f(t, config):
    """softplus of D's output t (B,); or t/2, its tangent at 0 but for a constant: with it a
    quadratic critic sees second moments alone."""
    return softplus(t) if config.adversarial == "softplus" else t / 2


def L_adv_ED(F, G, E, D, x, z, config):
    """Step I on x (B, d), z (B, k): the adversarial loss, and γ/2 times the penalty."""
    w = x @ E.T  # (B, k)
    w_fake = z @ (E @ (G @ F).detach()).T  # (B, k): E(G(F(z))) without an x in between
    real = D(w)  # (B,)
    (v,) = torch.autograd.grad(real.sum(), w, create_graph=True)  # (B, k): ∇ₓ D(E x) = Eᵀv
    penalty = ((v @ (E @ E.T)) * v).sum(1)  # (B,): ‖∇ₓ D(E x)‖²
    if config.penalty == "unit":
        penalty = ((penalty + 1e-12).sqrt() - 1).square()
    adversarial = f(D(w_fake), config).mean() + f(-real, config).mean()
    return adversarial, config.gamma / 2 * penalty.mean()


def L_adv_FG(F, G, E, D, z, config):
    """Step II on z (B, k): the adversarial loss, and ν/2 ‖G‖²."""
    w_fake = z @ (E.detach() @ G @ F).T
    return f(-D(w_fake), config).mean(), config.decay / 2 * G.square().sum()


def L_err_EG(F, G, E, z):
    """Step III on z (B, k): ‖w − E G w‖², w = F z, only w detached."""
    w = z @ F.detach().T
    return (w - w @ (E @ G).T).square().sum(1).mean()


def train_step(nets, opts, x, config):
    """One iteration of algorithm 1 on x (B, d).

    The losses that it returns are without the penalty and the decay; alae_mnist.py's L_adv_ED has
    R1 in it.
    """
    F, G, E = (nets[name].weight for name in "FGE")
    z = torch.randn(3, len(x), config.k, device=x.device)  # fresh for each step

    # Step I: the critic D∘E tells data from samples.
    adv_ED, penalty = L_adv_ED(F, G, E, nets["D"], x, z[0], config)
    nets.zero_grad()
    (adv_ED + penalty).backward()
    opts["opt_ED"].step()

    # Step II: the generator G∘F moves against it.
    adv_FG, decay = L_adv_FG(F, G, E, nets["D"], z[1], config)
    nets.zero_grad()
    (adv_FG + decay).backward()
    opts["opt_FG"].step()

    # Step III: E inverts G. Of (E, D) and (F, G) only E and G have a gradient.
    err_EG = L_err_EG(F, G, E, z[2])
    nets.zero_grad()
    err_EG.backward()
    third = ["opt_EG"] if config.adams == "steps" else ["opt_ED", "opt_FG"]
    for name in third:
        opts[name].step()

    losses = {"L_adv_ED": adv_ED, "penalty": penalty, "L_adv_FG": adv_FG, "L_err_EG": err_EG}
    return {name: loss.detach() for name, loss in losses.items()}


def maps(nets):
    """E (k, d), G (d, k) and mean (d,) for pixels: x̂ = mean + G E (x − mean)."""
    E, G = nets["E"].weight.detach(), nets["G"].weight.detach()
    mean, scale = nets["scaling"].mean, nets["scaling"].scale
    return E * scale, G / scale, mean


def evaluate(nets, data, config, full=False):
    """Errors over PCA's and angles to its subspace; at the end what the codes are worth.

    least_A: the least eigenvalue of A/ν, λ_k (1 − 8γν) at rest; at 0 D is blind in a direction.
    """
    E, G, mean = maps(nets)
    metrics = shared.pca.metrics(data, E, G, mean)
    if config.critic == "quadratic" and config.decay:
        B = nets["D"].B
        least = torch.linalg.eigvalsh(B.T @ B)[0].item()
        metrics["eval/least_A"] = least / config.decay + config.floor
    if full:
        train, test = ((x - mean) @ E.T for x in (data.x_train, data.x_test))  # codes (N, k)
        metrics |= shared.image_metrics(data, mean + test @ G.T)
        metrics |= shared.code_metrics(data, train, test, "short")
    return metrics


def draw(run, data, config):
    """Components and reconstructions, beside PCA's; at the end alone."""
    title = f"Linear ALAE, {config.dataset}, k = {config.k}, step {run.epoch}"
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
    main(shared.parse_config(Config, PRESETS))
