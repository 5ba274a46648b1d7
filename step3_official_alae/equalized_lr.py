"""LREQAdam, ALAE's official optimizer, is PGGAN's equalized learning rate (arXiv 1710.10196 §4.1).

PGGAN stores ŵ ~ N(0, 1) and uses w = c ŵ at run time, with c = √2/√fan_in. If a layer has an lrmul,
c is multiplied and ŵ divided by it, so that always w ~ N(0, 2/fan_in). By the chain rule ŵ has the
gradient ĝ = c g, where g is the gradient of w. So Adam with β1 = 0 computes
v̂ ← β2 v̂ + (1 − β2) ĝ², which is c² v, and moves (as torch.optim.Adam does), with b = 1 − β2^t,

    Δŵ = −lr √b ĝ/(√v̂ + √b ε),   so   Δw = c Δŵ = −(c lr) √b g/(√v + √b ε/c).

That is Adam on w itself with the learning rate c lr, and ε/c. Biases likewise, with c = lrmul.
The three ways differ only in what they add to √v: run-time scaling √b ε/c, torch's Adam with a
group for each tensor, of the rate c lr, √b ε, and LREQAdam ε. Except for ε, all have one
trajectory of w. In the first step √b |g|/√v is 1, so that ‖Δw‖/‖w‖ ≈ lr · lrmul in every layer:
this is what is equalized. Under plain Adam it is lr √(fan_in/2): wide layers turn faster.

Here the FC ALAE is trained in all three ways and by plain Adam, as in train_fc_alae.py, from the
same w, on the same x and z; the raw weights are evaluated.

    python step3_official_alae/equalized_lr.py     # 8 minutes of training on one CPU core

Expect (seed 0): in float64 the three part by 9·10⁻¹⁴ with ε = 10⁻³⁰, by 0.37 with 10⁻⁸.
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import linear, softplus

BETA2 = 0.99  # of Adam
GAMMA = 10.0  # weight γ of R1
WAYS = {"lreq": "LREQAdam", "runtime": "run-time scaling", "groups": "groups", "plain": "Adam"}
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)  # of plain Adam; in wide layers LREQAdam's c ≈ 1/20
PRESETS = {"official": {}} | {f"rate-{rate}": {"lr_plain": rate, "lr": 20 * rate} for rate in RATES}


@dataclass
class Config(shared.Protocol):
    preset: str = option("official", "mnist_fc.yaml's rate, or one of those tried", tuple(PRESETS))
    epochs: int = option(2, "passes over the training images, in each of the four ways", low=0)
    batch_size: int = option(128, "images per step (mnist_fc.yaml)", low=1)
    lr: float = option(0.002, "learning rate of the three equalized ways (mnist_fc.yaml)", low=1e-9)
    lr_plain: float = option(0.001, "learning rate of plain Adam (chosen on val)", low=1e-9)
    exact_steps: int = option(200, "steps, on 32 images, of the comparison in float64", low=0)
    latent_dim: int = option(50, "dimension of z and of w (paper §6.1)", low=1)
    width: int = option(1024, "units of the hidden layers of E and G (paper §6.1)", low=1)


# B batch, Z = W = latent_dim, X = pixels (784), H = width


class Linear(nn.Module):
    """x wᵀ + b with w ~ N(0, 2/fan_in), b = 0; at run time scaled, it keeps w/c and b/lrmul."""

    def __init__(self, fan_in, fan_out, lrmul=1.0, runtime=False):
        super().__init__()
        he = math.sqrt(2 / fan_in)
        scale = he * lrmul if runtime else 1.0
        self.weight = nn.Parameter(torch.randn(fan_out, fan_in).double() * (he / scale))
        self.bias = nn.Parameter(torch.zeros(fan_out).double())  # in float64 until all is scaled
        self.weight.c, self.bias.c = he * lrmul, lrmul
        self.weight.scale, self.bias.scale = scale, lrmul if runtime else 1.0

    def forward(self, x):
        if self.weight.scale == 1:
            return linear(x, self.weight, self.bias)
        return linear(x, self.weight * self.weight.scale, self.bias * self.bias.scale)


def build(config, X, runtime):
    """F: z (B, Z) → w (B, W), G: w → x (B, X), E: x → w, D: w → (B, 1)."""
    Z, H, leaky = config.latent_dim, config.width, nn.LeakyReLU(0.2)
    layer = partial(Linear, runtime=runtime)
    F = [nn.RMSNorm(Z, eps=1e-8, elementwise_affine=False)]  # pixel norm
    for _ in range(6):
        F += [layer(Z, Z, 0.1), leaky]
    G = [layer(Z, H), leaky, layer(H, H), leaky, layer(H, X)]
    E = [layer(X, H), leaky, layer(H, H), leaky, layer(H, Z), leaky]
    D = [layer(Z, Z, 0.1), layer(Z, Z, 0.1), layer(Z, 1, 0.1)]
    nets = {"F": F, "G": G, "E": E, "D": D}
    return nn.ModuleDict({name: nn.Sequential(*layers) for name, layers in nets.items()})


class LREQAdam(torch.optim.Optimizer):
    """As in custom_adam.py: v ← β2 v + (1 − β2) g², w ← w − lr c √(1 − β2^t) g/(√v + ε)."""

    def __init__(self, params, lr, eps):
        super().__init__(params, {"lr": lr, "eps": eps, "t": 0})

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        group["t"] += 1
        size = group["lr"] * math.sqrt(1 - BETA2 ** group["t"])
        for p in group["params"]:
            v = self.state[p].setdefault("v", torch.zeros_like(p))
            v.mul_(BETA2).addcmul_(p.grad, p.grad, value=1 - BETA2)
            p.addcdiv_(p.grad, v.sqrt().add_(group["eps"]), value=-size * p.c)


def start(config, X, device, ways=tuple(WAYS), eps=1e-8, dtype=torch.float32):
    """{way: networks}, {"way ED" or "way FG": optimizer}; from one seed, so all with the same w."""
    nets, opts = nn.ModuleDict(), {}
    for way in ways:
        torch.manual_seed(config.seed)
        nets[way] = build(config, X, runtime=way == "runtime").to(device, dtype)
        lr = config.lr_plain if way == "plain" else config.lr
        for pair in ("ED", "FG"):
            params = list(nn.ModuleList(nets[way][name] for name in pair).parameters())
            if way == "groups":
                params = [{"params": [p], "lr": lr * p.c} for p in params]
            if way == "lreq":
                opts[f"{way} {pair}"] = LREQAdam(params, lr, eps)
            else:
                adam = torch.optim.Adam(params, lr, (0.0, BETA2), eps, fused=True)
                opts[f"{way} {pair}"] = adam
    return nets, opts


def iterate(way, nets, opts, x, z):
    """One iteration of algorithm 1 on x (B, X) and z (3, B, Z), as in train_fc_alae.py."""
    F, G, E, D = nets[way].values()
    opt_ED, opt_FG = opts[f"{way} ED"], opts[f"{way} FG"]

    # Step I: the critic D∘E tells data from samples.
    with torch.no_grad():
        x_fake = G(F(z[0]))
    x = x.detach().requires_grad_()
    real = D(E(x))  # (B, 1)
    fake = D(E(x_fake))
    (gradient,) = torch.autograd.grad(real.sum(), x, create_graph=True)  # (B, X)
    r1 = GAMMA / 2 * gradient.square().sum(1).mean()
    loss_ED = (softplus(fake) + softplus(-real)).mean() + r1
    opt_ED.zero_grad()
    loss_ED.backward(inputs=[*E.parameters(), *D.parameters()])
    opt_ED.step()

    # Step II: the generator G∘F moves against it.
    loss_FG = softplus(-D(E(G(F(z[1]))))).mean()
    opt_FG.zero_grad()
    loss_FG.backward(inputs=[*F.parameters(), *G.parameters()])
    opt_FG.step()

    # Step III: E inverts G, on latents.
    w = F(z[2])  # (B, W)
    loss_err = (w.detach() - E(G(w))).square().mean()
    opt_ED.zero_grad(set_to_none=False)  # D's gradients stay 0, not None, as official
    opt_FG.zero_grad()
    loss_err.backward()
    opt_ED.step()
    opt_FG.step()
    return {"L_adv_ED": loss_ED, "L_adv_FG": loss_FG, "L_err_EG": loss_err}


def train_step(nets, opts, x, config):
    """The same iteration in each of the four ways, on x (B, X) and fresh z."""
    z = torch.randn(3, len(x), config.latent_dim, device=x.device)
    losses = {}
    for way in WAYS:
        for name, loss in iterate(way, nets, opts, x, z).items():
            losses[f"{way}/{name}"] = loss.detach()
    return losses


def weights(nets):
    """w and b of every layer by name, whatever their parameters are."""
    return {name: p.detach() * p.scale for name, p in nets.named_parameters()}


def relative(now, before):
    """‖Δw‖/‖w‖ of each tensor that is not 0."""
    return {n: ((now[n] - w).norm() / w.norm()).item() for n, w in before.items() if w.any()}


def trajectories(config, x, eps):
    """{way: the largest ‖w − w'‖/‖w'‖ of a tensor after each step}; w' is LREQAdam's; float64."""
    distances = {"runtime": [], "groups": []}
    nets, opts = start(config, x.shape[1], "cpu", ("lreq", *distances), eps, torch.float64)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(2 if config.smoke else config.exact_steps):
        i = torch.randint(len(x), (32,), generator=generator)
        z = torch.randn(3, 32, config.latent_dim, generator=generator, dtype=torch.float64)
        for way in nets:
            iterate(way, nets, opts, x[i].double(), z)
        w = weights(nets["lreq"])
        for way in distances:
            distances[way].append(max(relative(weights(nets[way]), w).values()))
    return distances


def compare_trajectories(run, x, config):
    """How far the three part, as metrics and as a picture."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    metrics = {}
    for axes, eps in zip(figure.subplots(1, 2), ("1e-30", "1e-8"), strict=True):
        for way, distances in trajectories(config, x, float(eps)).items():
            metrics[f"{way}/strays_{eps}"] = max(distances)
            axes.plot(range(1, len(distances) + 1), distances, label=WAYS[way])
        axes.set(yscale="log", xlabel="step, float64", ylabel=f"‖Δw‖/‖w‖, ε = {eps}")
        axes.legend()
    figure.suptitle("Three ways to write one trajectory: largest distance to LREQAdam's")
    run.picture("trajectories", figure)
    return metrics


def compare_updates(run, nets, before):
    """‖update‖/‖w‖ of each layer, as a picture; of G and E the largest over the smallest."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.add_subplot(xlabel="layer", ylabel="‖update‖/‖w‖", yscale="log")
    axes.set_title(f"Effective learning rate of each layer, last iteration of epoch {run.epoch}")
    metrics = {}
    for way, style in zip(WAYS, "osx^", strict=True):
        moved = relative(weights(nets[way]), before[way])
        layers = {}
        for name, size in moved.items():
            if name.endswith(".weight"):
                layers[name.removesuffix(".weight")] = size
        axes.plot(layers.keys(), layers.values(), style, label=WAYS[way], mfc="none")
        of_G_and_E = [size for name, size in layers.items() if name[0] in "GE"]
        metrics[f"{way}/update_ratio"] = max(of_G_and_E) / min(of_G_and_E)
    axes.legend()
    run.picture("updates", figure)
    return metrics


def evaluate(nets, data, config, full=False):
    """The same few metrics of each way, under its name, full or not."""
    metrics = {}
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(len(data.x_test), config.latent_dim, generator=generator).to(data.x_test)
    for way in WAYS:
        F, G, E, _ = nets[way].values()
        short = [shared.chunked(E, x) for x in (data.x_train, data.x_test)]
        x_fake = shared.chunked(nn.Sequential(F, G), z)
        found = shared.image_metrics(data, shared.chunked(G, short[1]), x_fake)
        found |= shared.code_metrics(data, *short, "short", full=False)
        metrics |= {name.replace("eval", way): value for name, value in found.items()}
    return metrics


@torch.no_grad()
def draw(run, data, config):
    """Test images and what each way makes of them."""
    x = data.x_test[:10]
    rows = [x] + [nets["G"](nets["E"](x)) for nets in run.nets.values()]
    title = f"FC ALAE, epoch {run.epoch}: test images x and G(E(x)), optimized four ways"
    images = data.images(torch.cat(rows))
    run.picture("reconstructions", shared.grid(images, 10, title, ["x", *WAYS]))


def main(config):
    device = shared.setup(config)
    if config.smoke and not config.eval:
        config.width = min(config.width, 64)
    data = shared.load_data(config, device)
    nets, opts = start(config, data.x_train.shape[1], device)
    parts = {"nets": nets} | opts

    run = shared.Run(config, device, nets, len(data.x_train) // config.batch_size)
    for epoch in run.epochs(parts):
        for i in shared.batches(data.x_train, config.batch_size, config.seed, epoch):
            if run.step_in_epoch == run.epoch_steps - 1:  # its own
                before = {way: weights(nets[way]) for way in WAYS}  # its own
            losses = train_step(nets, opts, data.x_train[i], config)  # its own
            run.step(losses, len(i))
        run.log_losses()
        run.log(compare_updates(run, nets, before))  # its own
        if run.is_due():
            run.log(evaluate(run.nets, data, config))
            draw(run, data, config)
        run.save(parts)
    metrics = evaluate(run.nets, data, config, full=True)
    if config.exact_steps > 0 and not config.eval:  # its own
        metrics |= compare_trajectories(run, data.x_train.cpu(), config)  # its own
    draw(run, data, config)
    run.finish(metrics)


if __name__ == "__main__":
    main(shared.parse_config(Config, PRESETS))
