"""The official optimizer of ALAE, LREQAdam, is PGGAN's equalized learning rate (arXiv 1710.10196 §4.1) and plain Adam.

PGGAN keeps ŵ ~ N(0, 1) and uses w = c ŵ at run time, c = √2/√fan_in; in a layer with an lrmul, c has it as a factor and ŵ
is divided by it, so that w ~ N(0, 2/fan_in) always. By the chain rule ŵ has the gradient ĝ = c g, where g is that of w, so
Adam with β1 = 0 sees v̂ ← β2 v̂ + (1 − β2) ĝ², which is c² v, and moves, with b = 1 − β2^t,

    Δŵ = −lr √b ĝ/(√v̂ + ε) = −lr √b g/(√v + ε/c),    so    Δw = c Δŵ = −(c lr) √b g/(√v + ε/c).

That is Adam on w itself with the learning rate c lr; LREQAdam is this rule with ε in place of ε/c. Biases likewise, with
c = lrmul. torch.optim.Adam with one parameter group for each c is the third way to write it (it corrects √v by √b before it
adds ε, so has ε√b in place of ε). The three are one trajectory of w, but for ε, which only tiny gradients notice.
At the start w has the standard deviation √2/√fan_in, and g/√v is about 1, hence ‖Δw‖/‖w‖ ≈ lr · lrmul in every layer:
this is what is equalized. Under plain Adam it is lr √(fan_in/2), so wide layers turn faster than narrow ones.

The same fully connected ALAE (arXiv 2004.04467, algorithm 1) is trained four ways from the same weights, on the same batches
and z: LREQAdam as its authors wrote it, run-time scaling, parameter groups, and plain Adam with one learning rate, chosen on
validation images (`--split val`, whatever the split of the rest).

    python step3_official_alae/equalized_lr.py                  # 11 minutes on one core

Result to expect (seed 0, AMD EPYC, one core, results/equalized_lr): over 200 steps in float64 the three stay together to
9·10⁻¹⁴ with ε = 10⁻³⁰ and part by up to 0.37 with 10⁻⁸. ‖update‖/‖w‖ of the layers of G and E is the same within a factor
1.25 under each of them, 15 under plain Adam. Best MSE on validation images after an epoch: LREQAdam 0.068, plain 0.081.

Deviations: the training is that of train_fc_alae.py, whose docstring lists its own; here the raw weights are evaluated.
"""
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn
from torch.nn.functional import linear, softplus

import shared
from shared import option

WAYS = {"lreq": "LREQAdam", "runtime": "run-time scaling, Adam", "groups": "Adam, a group for each c", "plain": "plain Adam"}


@dataclass
class Config(shared.Protocol):
    epochs: int = option(2, "passes over the training images, in each of the four ways", low=1)
    batch_size: int = option(128, "images per step (mnist_fc.yaml)", low=1)
    lr: float = option(0.002, "learning rate of the three equalized ways (mnist_fc.yaml)", low=1e-9)
    lrs: tuple = option((1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3), "learning rates that plain Adam may choose from on val; LREQAdam is "
                        "tried with 20 times as much, the same step in a 1024-wide layer", low=1e-9)
    exact_steps: int = option(200, "steps of the comparison in float64", low=1)
    exact_batch: int = option(32, "images per step of that comparison", low=1)
    latent_dim: int = option(50, "dimension of z and of w (paper §6.1)", low=1)
    gamma: float = option(10.0, "weight γ of R1 (paper, algorithm 1)", low=0)
    eval_every: int = option(1, "epochs between evaluations of the MSE", low=1)
    resume: str = option("", "checkpoint.pt to go on from")


# B batch, Z = W = latent_dim, X = pixels (784), H = 1024

class Linear(nn.Module):
    """x wᵀ + b with w ~ N(0, 2/fan_in), b = 0. The parameters are w and b or, at run time scaled, w/c and b/lrmul."""

    def __init__(self, fan_in, fan_out, lrmul=1.0, runtime=False):
        super().__init__()
        weight, bias = torch.randn(fan_out, fan_in).double(), torch.zeros(fan_out).double()  # in float64 until all is scaled
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.weight.c, self.bias.c = math.sqrt(2 / fan_in) * lrmul, lrmul
        for p in (self.weight, self.bias):
            p.scale = p.c if runtime else 1.0
        with torch.no_grad():
            self.weight *= math.sqrt(2 / fan_in) / self.weight.scale

    def forward(self, x):
        w, b = (p * p.scale if p.scale != 1 else p for p in (self.weight, self.bias))
        return linear(x, w, b)


class PixelNorm(nn.Module):
    def forward(self, z):
        return z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)


def build(config, X, runtime):
    """F, G, E, D as nn.Sequential."""
    Z, H, leaky = config.latent_dim, 1024, nn.LeakyReLU(0.2)

    def layer(*sizes):
        return Linear(*sizes, runtime=runtime)
    F = nn.Sequential(PixelNorm(), *(module for _ in range(6) for module in (layer(Z, Z, 0.1), leaky)))
    G = nn.Sequential(layer(Z, H), leaky, layer(H, H), leaky, layer(H, X))
    E = nn.Sequential(layer(X, H), leaky, layer(H, H), leaky, layer(H, Z), leaky)
    D = nn.Sequential(layer(Z, Z, 0.1), layer(Z, Z, 0.1), layer(Z, 1, 0.1))
    return nn.ModuleDict({"F": F, "G": G, "E": E, "D": D})


class LREQAdam(torch.optim.Optimizer):
    """The official optimizer as written (custom_adam.py): v ← β2 v + (1 − β2) g², w ← w − lr c √(1 − β2^t) g/(√v + ε)."""

    def __init__(self, params, lr, beta2=0.99, eps=1e-8):
        super().__init__(params, {"lr": lr, "beta2": beta2, "eps": eps, "t": 0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["t"] += 1
            beta2, size = group["beta2"], group["lr"] * math.sqrt(1 - group["beta2"] ** group["t"])
            for p in group["params"]:
                v = self.state[p].setdefault("v", torch.zeros_like(p))
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                p.addcdiv_(p.grad, v.sqrt().add_(group["eps"]), value=-size * p.c)


def optimizer(way, params, lr, eps=1e-8):
    """The optimizer of one of the WAYS."""
    params = list(params)
    if way == "lreq":
        return LREQAdam(params, lr, eps=eps)
    if way == "groups":
        params = [{"params": [p for p in params if p.c == c], "lr": lr * c} for c in dict.fromkeys(p.c for p in params)]
    return torch.optim.Adam(params, lr, (0.0, 0.99), eps, fused=True)


def start(way, config, X, device, lr, eps=1e-8, dtype=torch.float32):
    """Networks and optimizers of one of the WAYS; from the same seed, the same w."""
    torch.manual_seed(config.seed)
    nets = build(config, X, runtime=way == "runtime")
    for p in nets.parameters():
        p.data = p.data.to(device, dtype)  # keeps p.c and p.scale
    return {"nets": nets, "opt_ED": optimizer(way, [*nets["E"].parameters(), *nets["D"].parameters()], lr, eps),
            "opt_FG": optimizer(way, [*nets["F"].parameters(), *nets["G"].parameters()], lr, eps)}


def train_step(nets, opt_ED, opt_FG, x, z, gamma):
    """One iteration of algorithm 1 on x (B, X) and z (3, B, Z), as in train_fc_alae.py. Returns the LOSSES."""
    F, G, E, D = nets["F"], nets["G"], nets["E"], nets["D"]
    ED, FG, EFG = ([p for net in group for p in net.parameters()] for group in ((E, D), (F, G), (E, F, G)))

    # Step I: the critic D∘E tells data from samples.
    with torch.no_grad():
        x_fake = G(F(z[0]))
    x = x.detach().requires_grad_()
    real, fake = D(E(x)), D(E(x_fake))  # (B, 1)
    gradient, = torch.autograd.grad(real.sum(), x, create_graph=True)  # (B, X)
    loss_ED = (softplus(fake) + softplus(-real)).mean() + gamma / 2 * gradient.square().sum(1).mean()
    opt_ED.zero_grad()
    loss_ED.backward(inputs=ED)
    opt_ED.step()

    # Step II: the generator G∘F moves against it.
    loss_FG = softplus(-D(E(G(F(z[1]))))).mean()
    opt_FG.zero_grad()
    loss_FG.backward(inputs=FG)
    opt_FG.step()

    # Step III: E inverts G, on latents.
    w = F(z[2])  # (B, W)
    loss_err = (w.detach() - E(G(w))).square().mean()
    opt_ED.zero_grad(), opt_FG.zero_grad()
    loss_err.backward(inputs=EFG)
    for p in D.parameters():  # zeros, not None, as official
        p.grad = torch.zeros_like(p)
    opt_ED.step(), opt_FG.step()
    return torch.stack([loss_ED, loss_FG, loss_err]).detach()


LOSSES = ("L_adv_ED", "L_adv_FG", "L_err_EG")


def weights(nets):
    """w and b of every layer by name, whatever their parameters are."""
    return {name: p.detach() * p.scale for name, p in nets.named_parameters()}


def relative(now, before):
    """‖Δw‖/‖w‖ of each tensor that is not 0."""
    return {name: ((now[name] - w).norm() / w.norm()).item() for name, w in before.items() if w.any()}


def trajectories(config, x, eps, run):
    """{way: the largest ‖w − w'‖/‖w'‖ of a tensor after each step, w' being LREQAdam's}, in float64, on the CPU."""
    parts = {way: start(way, config, x.shape[1], x.device, config.lr, eps, torch.float64) for way in ("lreq", "runtime", "groups")}
    found = {way: [] for way in parts if way != "lreq"}
    z_of, B = torch.Generator(x.device).manual_seed(config.seed), min(config.exact_batch, len(x))
    for step in range(config.exact_steps):
        i = torch.randint(len(x), (B,), generator=z_of, device=x.device)
        z = torch.randn(3, B, config.latent_dim, generator=z_of, device=x.device, dtype=torch.float64)
        for part in parts.values():
            train_step(*part.values(), x[i].double(), z, config.gamma)
        w = {way: weights(part["nets"]) for way, part in parts.items()}
        for way in found:
            found[way].append(max(relative(w[way], w["lreq"]).values()))
        run.stop and run.leave("start it again")
    return found


def mse(nets, x):
    """Of the reconstructions of x (N, X)."""
    return shared.recon_mse(x, shared.in_chunks(nn.Sequential(nets["E"], nets["G"]), x))


def maps(nets, config):
    """What shared.evaluate and shared.draw look at."""
    F, G, E = nets["F"], nets["G"], nets["E"]

    def prior(n):
        z = torch.randn(n, config.latent_dim, generator=torch.Generator().manual_seed(0))
        return shared.in_chunks(F, z.to(next(E.parameters()).device))
    return {"encode": E, "decode": G, "prior": prior, "short": E, "long": E[:4]}


def sweep(config, device, run):
    """MSE on validation images after one epoch, {way: {lr: MSE}}, of plain Adam and of LREQAdam."""
    data = shared.load_vectors(replace(config, split="val"), device, toys=False)
    x, found = data[0], {"plain": {}, "lreq": {}}
    for way, lr in ((way, lr) for lr in config.lrs for way in found):
        lr = lr if way == "plain" else 20 * lr
        parts = start(way, config, x.shape[1], device, lr)
        for i in shared.batches(len(x), min(config.batch_size, len(x)), torch.Generator(device).manual_seed(config.seed)):
            train_step(*parts.values(), x[i], torch.randn(3, len(i), config.latent_dim, device=device), config.gamma)
            run.stop and run.leave("start it again")
        error = mse(parts["nets"], data[2])
        found[way][lr] = error if math.isfinite(error) else math.inf
        print(f"{WAYS[way]}, learning rate {lr:g}: MSE on validation images {error:.4f} after one epoch", flush=True)
    return found


def draw(run, exact, found, updates):
    """The pictures: three trajectories that are one, what each way learns, and the layers' relative updates."""
    run.picture("trajectories", shared.curves({
        f"‖Δw‖/‖w‖, ε = {eps}": {WAYS[way]: (range(1, len(line) + 1), line) for way, line in lines.items()}
        for eps, lines in exact.items()}, "step, float64", "Three ways to write one trajectory: largest distance of a "
        "tensor to LREQAdam's", yscale="log"))
    run.picture("curves", shared.curves({label: {WAYS[way]: (*zip(*((row["epoch"], row[f"{way}/{key}"]) for row in run.rows
                                                                     if f"{way}/{key}" in row)), style)
                                                 for way, style in zip(WAYS, ("-", "--", ":", "-"))}
                                         for label, key in (("test MSE", "recon_mse"), ("L_adv_ED", "L_adv_ED"),
                                                            ("L_err_EG", "L_err_EG"))}, "epoch", "FC ALAE, optimized four ways"))
    run.picture("sweep", shared.curves({"validation MSE after one epoch": {
        WAYS[way] + (", lr" if way == "plain" else ", lr/20"): (
            [lr if way == "plain" else lr / 20 for lr in values], list(values.values()), "o-")
        for way, values in found.items()}}, "learning rate", "With and without equalization", xscale="log"))
    axes = (figure := shared.Figure(figsize=(9, 3.8), layout="constrained")).add_subplot()
    layers = [name for name in updates["lreq"] if name.endswith("weight")]
    for way, style in zip(WAYS, ("o", "s", "x", "^")):
        axes.plot([updates[way][name] for name in layers], style, label=WAYS[way], mfc="none")
    axes.set_xticks(range(len(layers)), [name.removesuffix(".weight") for name in layers], rotation=60)
    axes.set(yscale="log", xlabel="layer", ylabel="‖update‖/‖w‖", title="Effective learning rate of each layer, one iteration")
    axes.grid(alpha=0.3), axes.legend(fontsize=8)
    run.picture("updates", figure)


def main(config):
    device = shared.setup(config)
    checkpoint = shared.load_checkpoint(config.resume, Config) if config.resume else None
    data = shared.load_vectors(config, device, toys=False)
    x, X = data[0], data[0].shape[1]
    if config.smoke:
        config.epochs, config.exact_steps, config.lrs = min(config.epochs, 2), min(config.exact_steps, 2), config.lrs[:1]
    if config.latent_dim > X:
        shared.fail(f"--latent-dim {config.latent_dim} is larger than the data, {X} pixels")
    if (steps := len(x) // config.batch_size) == 0:
        shared.fail(f"--batch-size {config.batch_size} is larger than the data, {len(x)} images")
    size = sum(p.numel() for p in build(config, X, runtime=False).parameters())
    run = shared.Run(config, device, size, checkpoint)
    if checkpoint:
        exact, found = checkpoint["exact"], checkpoint["found"]
    else:
        exact = {eps: trajectories(config, x.cpu(), float(eps), run) for eps in ("1e-30", "1e-8")}
        for eps, lines in exact.items():
            print(*(f"ε = {eps}: {WAYS[way]} strays from LREQAdam by {max(line):.1e}" for way, line in lines.items()), sep="\n")
        found = sweep(config, device, run)
    best = min(found["plain"], key=found["plain"].get)
    parts = {way: start(way, config, X, device, best if way == "plain" else config.lr) for way in WAYS}
    torch.manual_seed(config.seed)
    first, losses, moved, seconds = 0, torch.zeros(len(WAYS), len(LOSSES), device=device), {}, {way: [] for way in WAYS}
    if checkpoint:
        first, losses, moved, seconds = (checkpoint[key] for key in ("step", "losses", "moved", "seconds"))
        losses = losses.to(device)
        for restore, state in zip((torch.set_rng_state, torch.cuda.set_rng_state_all), checkpoint["random"]):
            restore(state)
        for way in WAYS:
            for name, part in parts[way].items():
                part.load_state_dict(checkpoint[way][name])

    def save(step):
        run.save("checkpoint.pt", exact=exact, found=found, step=step, losses=losses, moved=moved, seconds=seconds, **{
            way: {name: part.state_dict() for name, part in parts[way].items()} for way in WAYS})

    def clock():
        device.type == "cuda" and torch.cuda.synchronize()
        return time.perf_counter()
    for epoch in range(run.done + 1, config.epochs + 1):
        order = torch.Generator(device).manual_seed(1_000_003 * config.seed + epoch)
        for step, i in enumerate(shared.batches(len(x), config.batch_size, order, skip=first), first + 1):
            z = torch.randn(3, len(i), config.latent_dim, device=device)
            for way, loss in zip(WAYS, losses):
                before = weights(parts[way]["nets"]) if step == steps else {}
                begin = clock()
                loss += train_step(*parts[way].values(), x[i], z, config.gamma)
                seconds[way].append(clock() - begin)
                if before:  # how far the last iteration moves each layer
                    moved[way] = relative(weights(parts[way]["nets"]), before)
            run.tick(len(WAYS) * len(i), losses[0, 0] / step, config.epochs * steps)
            if run.stop:
                save(step)
                run.leave()
        row = {"epoch": epoch} | {f"{way}/{name}": run.finite(value / steps) for way, line in zip(WAYS, losses)
                                  for name, value in zip(LOSSES, line)}
        first, losses = 0, torch.zeros_like(losses)
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            for way in WAYS:
                row[f"{way}/recon_mse"] = mse(parts[way]["nets"], data[2])
        run.log(row)
        save(0)
    draw(run, exact, found, moved)
    run.save("model.pt", **{way: {k: net.state_dict() for k, net in parts[way]["nets"].items()} for way in WAYS})
    weight = {way: [v for name, v in moved[way].items() if name.endswith("weight") and name[0] in "GE"] for way in WAYS}
    final = {way: shared.evaluate(config, data, maps(parts[way]["nets"], config), full=False, prefix=way) for way in WAYS}
    run.finish(**{key: value for metrics in final.values() for key, value in metrics.items()},
               **{f"{way}/strays_{eps}": max(line) for eps, lines in exact.items() for way, line in lines.items()},
               **{f"{way}/val_mse_lr_{lr:g}": mse for way, values in found.items() for lr, mse in values.items()},
               **{f"{way}/update_ratio": max(line) / min(line) for way, line in weight.items()},
               **{f"{way}/ms_per_step": 1e3 * statistics.median(times) for way, times in seconds.items()})


if __name__ == "__main__":
    main(shared.parse_config(Config))
