"""Linear ALAE: why it fails as one would first write it, and a setting in which it comes to PCA.

F: z → w, G: w → x and E: x → w are matrices, z ~ N(0, I), x (d) is centred with covariance Σ = VΛVᵀ; ⟨·⟩ is a mean.
Algorithm 1 of the paper (arXiv 2004.04467), each step on fresh z; new here is the decay in Step II:

    I.   E, D   minimise  softplus(D(E G F z)) + softplus(−D(E x)) + γ/2 ‖∇ₓ D(E x)‖²
    II.  F, G   minimise  softplus(−D(E G F z)) + ν/2 ‖G‖²
    III. E, G   minimise  ‖F z − E G F z‖²

A linear critic D(w) = bᵀw cannot work. Step I is convex in a = Eᵀb and its gradient at a = 0 is ½(⟨GFz⟩ − ⟨x⟩) = 0: on
centred data the best critic is zero. Step II then has nothing to follow and Step III contains no data: it asks EG = I.
A quadratic critic D(w) = ‖Bw‖² − c, A = BᵀB, sees covariances, but is not enough: take the slope ½ of softplus at 0, γ = 0
and F = I. If EΣEᵀ = I, EG = I and A = 0, every gradient vanishes, whatever the k-dimensional space that E looks at.
The decay ν keeps A from vanishing. Now Step I: A E(GGᵀ − Σ) = 0 gives G = ΣEᵀ; Step II: EᵀA = νG; Step III: EG = I.
Together EΣ = AE/ν: the rows of E span an eigenspace of Σ, A = νΛ there, E = Λ^(−½)Vᵀ whitens, and GE is its projector.
PCA's is the stable one of these. A turn of eᵢ from eigenvector i inside towards j outside, and of gᵢ, moves by
(ė, ġ) = ν (λᵢ(λⱼ e − g), λᵢ e − g): it dies out if λᵢ > λⱼ and λᵢλⱼ < 1. If G is faster than E, by r, λᵢλⱼ < r will do.
Hence x is scaled to the energy of z, ⟨‖x‖²⟩ = k, with which λ₁λ_{k+1} < 1 on MNIST at k = 10, 20 and 50.
R1 only stretches: GᵀG = Λ(1 − 8γν), EEᵀ its inverse, as long as 8γν < 1; here that is 2/k, so k = 2 wants --gamma 0.1.

    python step1_linear/linear_alae.py                       # MNIST, k = 10; --k 50 for 50 components
    python step1_linear/linear_alae.py --setup seed          # the student's setting, which fails
    python step1_linear/linear_alae.py --ablate --split val  # what each ingredient is for, three seeds: 5 minutes

Result to expect (MNIST, seeds 0 to 2, AMD EPYC, 36 to 80 s on one core): test MSE over PCA's 1.0000 in each at k = 10,
1.0004 to 1.008 at k = 20, 1.019 to 1.031 at k = 50; the student's setting 2.06 to 2.16 at k = 10, 5.7 to 5.8 at k = 50.

Deviations from the paper: 1. Linear maps without bias. 2. F = I and the decay ν (above; --mapping linear learns F).
 3. Each step has an Adam of its own. With one for (E, D) and one for (F, G), as in the paper, the ratio ends near 1.6.
 4. The learning rate falls linearly to 1 %: Adam with β₁ = 0 keeps shaking the weights by about lr, and k = 50 comes to
    rest only as that dies down. D's is smaller, for k = 50. γ = 0.5, not 10: R1 damps the game while 8γν < 1 (above).
 5. G starts at 0, so that no direction of w begins with less variance in the data than in the samples, where A turns 0.
The student's gradient penalty (--penalty unit) was γ/2 (‖∇ₓD‖ − 1)², which holds ‖a‖ at 1 in an arbitrary direction;
his z had 32 dimensions at k = 10, here k.
"""
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn
from torch.nn.functional import softplus

import shared
from shared import option

LOSSES = ("train/L_adv_ED", "train/penalty", "train/L_adv_FG", "train/L_err_EG")


@dataclass
class Config(shared.Protocol):
    dataset: str = option("mnist", "an image dataset, or swiss_roll or sine_sheet (toys in 3-D)")
    setup: str = option("recipe", "seed: the student's setting, which fails", choices=("recipe", "seed"))
    k: int = option(10, "dimension of z and w", low=1)
    steps: int = option(16_000, "training steps (ours)", low=1)
    batch_size: int = option(512, "images per step (ours; paper: 128)", low=1)
    lr: float = option(0.004, "learning rate of E, F and G at the start (ours; paper: 0.002)", low=1e-9)
    lr_critic: float = option(0.001, "learning rate of D at the start (ours)", low=1e-9)
    lr_end: float = option(0.01, "the learning rates fall linearly to this share (ours; 1: constant)", low=0, high=1)
    critic: str = option("quadratic", "D: w → ℝ (ours)", choices=("linear", "quadratic", "mlp"))
    adversarial: str = option("softplus", "softplus (paper), or its tangent x/2", choices=("softplus", "tangent"))
    penalty: str = option("r1", "‖∇ₓD‖² (paper) or (‖∇ₓD‖ − 1)² (the student's)", choices=("r1", "unit"))
    gamma: float = option(0.5, "γ/2 times the penalty in Step I (ours; paper: 10)", low=0)
    decay: float = option(0.5, "kν, with ν/2 ‖G‖² in Step II (ours; paper: 0)", low=0)
    adams: str = option("steps", "one Adam for each step (ours), or one for (E, D) and one for (F, G) (paper)", ("steps", "nets"))
    mapping: str = option("identity", "F = I, or a learned matrix (paper: an MLP)", choices=("identity", "linear"))
    scale: float = option(0.0, "x is multiplied by this; 0: so that ⟨‖x‖²⟩ = k (ours)", low=0)
    init_G: float = option(0.0, "scale of G's initial weights, in units of PyTorch's (ours)", low=0)
    ablate: bool = option(False, "instead of one run, the table of what each ingredient is for, in at most 3,000 steps each")
    eval_every: int = option(400, "steps between evaluations", low=1)
    resume: str = option("", "checkpoint.pt to go on from")
    recipes = {("setup", "seed"): {
        "critic": "linear", "penalty": "unit", "gamma": 10.0, "decay": 0.0, "mapping": "linear", "scale": 1.0, "init_G": 1.0,
        "steps": 4687, "batch_size": 128, "lr": 0.002, "lr_critic": 0.002, "lr_end": 1.0}}


# what is changed: {field: value}
ABLATIONS = {
    "recipe": {}, "critic: linear": {"critic": "linear"}, "critic: MLP": {"critic": "mlp"}, "no decay on G": {"decay": 0.0},
    "decay / 4": {"decay": 0.125}, "decay × 4": {"decay": 2.0}, "x not scaled": {"scale": 1.0},
    "F learned": {"mapping": "linear"}, "γ = 0": {"gamma": 0.0}, "γ = 10": {"gamma": 10.0}, "γ = 10, (‖∇‖ − 1)²":
    {"gamma": 10.0, "penalty": "unit"}, "tangent of softplus": {"adversarial": "tangent"}, "lr of D × 4": {"lr_critic": 0.004},
    "lr constant": {"lr_end": 1.0}, "G from PyTorch's init": {"init_G": 1.0}, "Adams as in the paper": {"adams": "nets"}}


class Quadratic(nn.Module):
    """D(w) = ‖Bw‖² − c."""

    def __init__(self, k):
        super().__init__()
        self.B, self.c = nn.Parameter(0.1 * torch.eye(k)), nn.Parameter(torch.zeros(()))

    def forward(self, w):
        return (w @ self.B.T).square().sum(1) - self.c


def start(config, d, device):
    """Maps F (k, k), G (d, k), E (k, d), critic D, and the optimizers."""
    k = config.k
    E, G = (nn.Linear(a, b, bias=False).weight.detach() for a, b in ((d, k), (k, d)))
    F = torch.eye(k) if config.mapping == "identity" else nn.Linear(k, k, bias=False).weight.detach()
    D = {"linear": lambda: nn.Sequential(nn.Linear(k, 1), nn.Flatten(0)), "quadratic": lambda: Quadratic(k), "mlp": lambda:
         nn.Sequential(nn.Linear(k, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1), nn.Flatten(0))}[config.critic]().to(device)
    maps = nn.ParameterDict({"F": F, "G": config.init_G * G, "E": E}).to(device)
    maps["F"].requires_grad_(config.mapping == "linear")

    def adam(*groups):
        return torch.optim.Adam([{"params": list(p), "lr": lr, "first_lr": lr} for p, lr in groups], betas=(0.0, 0.99),
                                fused=True)
    parts = {"maps": maps, "D": D, "opt_ED": adam(([maps["E"]], config.lr), (D.parameters(), config.lr_critic)),
             "opt_FG": adam(([p for p in (maps["F"], maps["G"]) if p.requires_grad], config.lr))}
    return parts if config.adams == "nets" else parts | {"opt_EG": adam(([maps["E"], maps["G"]], config.lr))}


def tangent(x):
    """softplus near 0, without its constant: with it a quadratic critic's loss depends on second moments alone."""
    return x / 2


def L_adv_ED(F, G, E, D, x, z, config):
    """Step I on x (B, d), z (B, k): the adversarial loss, and γ/2 times the penalty."""
    f = softplus if config.adversarial == "softplus" else tangent
    w, w_fake = x @ E.T, z @ (E @ (G @ F).detach()).T  # (B, k); E(G(F(z))) without an x in between
    real = D(w)
    v, = torch.autograd.grad(real.sum(), w, create_graph=True)
    squared = ((v @ (E @ E.T)) * v).sum(1)  # ∇ₓ D(E x) = Eᵀv
    penalty = squared if config.penalty == "r1" else ((squared + 1e-12).sqrt() - 1).square()
    return f(D(w_fake)).mean() + f(-real).mean(), config.gamma / 2 * penalty.mean()


def L_adv_FG(F, G, E, D, z, config):
    """Step II on z (B, k): the adversarial loss, and ν/2 ‖G‖²."""
    f = softplus if config.adversarial == "softplus" else tangent
    return f(-D(z @ (E.detach() @ G @ F).T)).mean(), config.decay / config.k / 2 * G.square().sum()


def L_err_EG(F, G, E, z):
    """Step III on z (B, k): ‖w − E G w‖², w = F z."""
    w = z @ F.detach().T
    return (w - w @ (E @ G).T).square().sum(1).mean()


def train_step(parts, x, config):
    """Algorithm 1, one iteration on x (B, d). Returns the LOSSES."""
    (F, G, E), D = (parts["maps"][name] for name in "FGE"), parts["D"]
    z = torch.randn(3, len(x), config.k, device=x.device)  # fresh for each step

    adv_ED, penalty = L_adv_ED(F, G, E, D, x, z[0], config)
    parts["opt_ED"].zero_grad()
    (adv_ED + penalty).backward()
    parts["opt_ED"].step()

    adv_FG, decay = L_adv_FG(F, G, E, D, z[1], config)
    parts["opt_FG"].zero_grad()
    (adv_FG + decay).backward()
    parts["opt_FG"].step()

    err_EG = L_err_EG(F, G, E, z[2])
    optimizers = [parts["opt_EG"]] if "opt_EG" in parts else [parts["opt_ED"], parts["opt_FG"]]
    for optimizer in optimizers:
        optimizer.zero_grad()
    err_EG.backward()
    for optimizer in optimizers:  # D and F have no gradient
        optimizer.step()
    return torch.stack([adv_ED, penalty, adv_FG, err_EG]).detach()


class Data:
    """What a run looks at: scaled images x (N, d), and in float64 the covariances and the k leading eigenvectors V."""

    def __init__(self, config, device):
        x, _, self.x_test, _, self.shape = shared.load_vectors(config, device)
        if config.k >= (most := min(x.shape)):
            shared.fail(f"--k {config.k}: choose 1 to {most - 1}, below the data's dimension")
        if config.batch_size > len(x):
            shared.fail(f"--batch-size {config.batch_size} is larger than the data, {len(x)} images")
        self.mean = x.mean(0)
        x = x - self.mean
        if (energy := x.square().sum(1).mean().item()) < 1e-9:
            shared.fail(f"--dataset {config.dataset}: the images are all the same")
        self.scale = config.scale or (config.k / energy) ** 0.5
        self.S, self.S_test = (t.T @ t / len(t) for t in (x.cpu().double(), (self.x_test - self.mean).cpu().double()))
        self.x = x * self.scale
        values, V = torch.linalg.eigh(self.S)
        if config.k >= (rank := int((values > 1e-9 * values[-1]).sum())):
            shared.fail(f"--k {config.k}: the data spans only {rank} dimensions, choose less")
        self.V = V.flip(1)[:, :config.k]


def mse(E, G, S):
    """Mean over images and pixels of (x − GEx)², x centred with covariance S (d, d); E (k, d), G (d, k)."""
    ES = E @ S
    return (S.trace() - 2 * (ES * G.T).sum() + ((G.T @ G) * (ES @ E.T)).sum()).item() / len(S)


def evaluate(E, G, data):
    """Measures of x̂ = mean + G E (x − mean); the ratio's denominator is PCA's MSE on the same images."""
    E, G, P = E.detach().cpu().double(), G.detach().cpu().double(), data.V.T
    row = {"mse_train": mse(E, G, data.S), "mse_test": mse(E, G, data.S_test)}
    best = {"mse_train": mse(P, data.V, data.S), "mse_test": mse(P, data.V, data.S_test)}
    row |= {"ratio": row["mse_train"] / best["mse_train"], "ratio_test": row["mse_test"] / best["mse_test"]}
    row |= {"explained": 100 * (1 - row["mse_train"] * len(data.S) / data.S.trace().item())}  # % of the variance
    row |= {f"pca_{key}": value for key, value in best.items()}
    for name, W in (("E", E.T), ("G", G)):
        angles = torch.linalg.svdvals(torch.linalg.qr(W)[0].T @ data.V).clamp(max=1).acos()
        row |= {f"angle_{name}": angles.max().item(), f"angle_mean_{name}": angles.mean().item()}
    if data.shape:
        row["recon_mse"] = shared.recon_mse(data.x_test, reconstruct(E, G, data.x_test, data))
    return {f"eval/{key}": value for key, value in row.items()}


def reconstruct(E, G, x, data):
    return data.mean + ((x - data.mean) @ E.T.to(x)) @ G.T.to(x)


def draw(E, G, data, run):
    """Curves; with images also components and reconstructions, beside PCA's."""
    rows, title = run.rows, f"Linear ALAE, {run.config.dataset}, k = {run.config.k}, {run.config.critic} critic"
    steps = [row["step"] for row in rows]
    run.picture("convergence", shared.curves({
        "MSE": {label: (steps, [row[f"eval/{key}"] for row in rows], style) for label, key, style in (
            ("training images", "mse_train", "C0"), ("test images", "mse_test", "C1"), ("PCA, training", "pca_mse_train", "C0--"),
            ("PCA, test", "pca_mse_test", "C1--"))},
        "MSE / PCA's − 1": {label: (steps, [row[f"eval/{key}"] - 1 for row in rows]) for label, key in (
            ("training images", "ratio"), ("test images", "ratio_test"))},
        "angles to PCA's subspace, rad": {label: (steps, [row[f"eval/{key}"] for row in rows]) for label, key in (
            ("E, largest", "angle_E"), ("E, mean", "angle_mean_E"), ("G, largest", "angle_G"), ("G, mean", "angle_mean_G"))}},
        "steps", title, yscale="log"))
    run.picture("losses", shared.curves({"loss": {key.removeprefix("train/"): (steps, [row[key] for row in rows])
                                                  for key in LOSSES}}, "steps", title, yscale="log"))
    if data.shape:
        n, (E, G) = min(10, run.config.k), (t.detach().cpu().double() for t in (E, G))
        Q = torch.linalg.qr(G)[0]
        Q = Q @ torch.linalg.eigh(Q.T @ data.S @ Q)[1].flip(1)  # turned to the principal axes within the span of G
        Q = Q * (Q * data.V).sum(0).sign()
        maps = torch.cat([W[:, :n].T for W in (data.V, Q, G)]).unflatten(1, data.shape)
        run.picture("components", shared.grid(0.5 + maps / (2 * maps.abs().amax((1, 2, 3), keepdim=True)), n, title,
                                              ["PCA", "span of G,\nits axes", "G, as\nlearned"]))
        x = data.x_test[:12]
        images = [x, *(reconstruct(*pair, x, data) for pair in ((data.V.T, data.V), (E, G)))]
        run.picture("reconstructions", shared.grid(torch.cat(images).unflatten(1, data.shape), len(x), title,
                                                   ["x", "PCA", "linear\nALAE"]))


def train(config, data, parts, run, first=0, losses=0, total=None):
    """Trains the parts after `first` steps, with the losses since the last row; total: the steps of many trainings, which
    are neither logged nor saved. Returns E (k, d), G (d, k) for unscaled x."""
    def maps():
        return parts["maps"]["E"].detach() * data.scale, parts["maps"]["G"].detach() / data.scale

    per_epoch = len(data.x) // config.batch_size
    groups = [group for name, part in parts.items() if name.startswith("opt_") for group in part.param_groups]
    for step in range(first + 1, config.steps + 1):
        epoch, done = divmod(step - 1, per_epoch)
        if done == 0 or step == first + 1:
            order = torch.Generator(data.x.device).manual_seed(1_000_003 * config.seed + epoch)
            indices = shared.batches(len(data.x), config.batch_size, order, skip=done)
        for group in groups:
            group["lr"] = group["first_lr"] * (1 - (1 - config.lr_end) * (step - 1) / config.steps)
        losses = losses + train_step(parts, data.x[next(indices)], config)
        n = (step - 1) % config.eval_every + 1  # steps since the last row
        run.tick(config.batch_size, losses[-1] / n, total or config.steps)
        if n == config.eval_every or step == config.steps:
            if total is None:
                run.log({"step": step} | {name: run.finite(loss / n) for name, loss in zip(LOSSES, losses)}
                        | evaluate(*maps(), data))
            losses = 0
        if run.stop and total:
            run.leave("start it again")
        if run.stop or step == config.steps and not total:
            run.save("checkpoint.pt", step=step, losses=losses, **{name: part.state_dict() for name, part in parts.items()})
            run.stop and run.leave()
    return maps()


def ablate(config, data, device, run):
    """The table of ABLATIONS: MSE of the held-out images over PCA's in each of three seeds; printed, drawn, in the summary."""
    results, steps = {}, config.steps
    for name, change in ABLATIONS.items():
        for seed in range(config.seed, config.seed + (1 if config.smoke else 3)):
            torch.manual_seed(seed)
            variant = dataclasses.replace(config, **change, seed=seed)
            scaled = Data(variant, device) if "scale" in change else data
            parts = start(variant, data.x.shape[1], device)
            maps = train(variant, scaled, parts, run, total=3 * len(ABLATIONS) * steps)
            results.setdefault(name, {})[f"seed {seed}"] = evaluate(*maps, data)["eval/ratio_test"]
        print(f"{name:24s}", *(f"{value:8.4f}" for value in results[name].values()), flush=True)
    axes = (figure := shared.Figure(figsize=(8, 5), layout="constrained")).add_subplot()
    for i, values in enumerate(results.values()):
        axes.plot([max(v - 1, 1e-4) for v in values.values()], [i] * len(values), "o", color="tab:blue", alpha=0.7)
    axes.set(xscale="log", xlabel="MSE of held-out images / PCA's − 1, at least 0.0001, for each seed",
             yticks=range(len(results)), yticklabels=list(results),
             title=f"Linear ALAE, {config.dataset} ({config.split}), k = {config.k}, {steps} steps: one thing changed at a time")
    axes.grid(alpha=0.3), axes.invert_yaxis()
    run.picture("ablation", figure)
    run.at["done"] = steps
    run.finish(**{f"{name}/{key}": value for name, row in results.items() for key, value in row.items()})


def main(config):
    device = shared.setup(config)
    checkpoint = shared.load_checkpoint(config.resume, Config) if config.resume else None
    if config.smoke:
        config.steps, config.batch_size, config.eval_every = min(config.steps, 60), min(config.batch_size, 200), 20
    if config.ablate:
        config.setup == "recipe" or shared.fail("--ablate changes the recipe, not --setup seed")
        config.steps = min(config.steps, 20 if config.smoke else 3000)
    data = Data(config, device)
    parts = start(config, data.x.shape[1], device)
    run = shared.Run(config, device, sum(p.numel() for name in ("maps", "D") for p in parts[name].parameters()
                                         if p.requires_grad), checkpoint, unit="step")
    if config.ablate:
        return ablate(config, data, device, run)
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        E, G = train(config, data, parts, run, checkpoint["step"], torch.as_tensor(checkpoint["losses"]).to(device))
    else:
        E, G = train(config, data, parts, run)
    draw(E, G, data, run)
    run.save("model.pt", E=E.cpu(), G=G.cpu(), mean=data.mean.cpu())
    run.finish()


if __name__ == "__main__":
    main(shared.parse_config(Config))
