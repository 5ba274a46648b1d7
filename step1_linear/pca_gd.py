"""Principal component analysis by gradient descent, two problems with one solution.

With centred data X (n, d), covariance Σ = XᵀX/n = VΛVᵀ and C (d, k), k < d:

    reconstruction   min  ‖X − XCCᵀ‖²/n = tr Σ − 2 tr CᵀΣC + tr CᵀΣC CᵀC   subject to CᵀC = I
    variance         max  tr CᵀΣC                                          subject to CᵀC = I

Both are solved by every orthonormal basis of the k leading eigenvectors. The constraint is held
  - softly, by a penalty ρ‖CᵀC − I‖². The optimum of the reconstruction problem is orthonormal
    anyway. That of the variance problem is CᵀC = I + Λ/2ρ: the exact subspace, but columns that
    are too long, so that XCCᵀ overshoots, the more the smaller ρ; one QR at the end mends it;
  - or exactly, by a QR after each step. For the variance problem that is C ← qr((I + 2ηΣ)C): a
    large step η turns gradient descent into subspace iteration, C ← qr(ΣC). With η = 1/λ₁, where I
    is not negligible, the error comes to PCA's, but thousands of steps are not enough for the
    subspace on MNIST, whose λ₅₀ and λ₅₁ nearly agree.
Only Σ matters: a step costs d²k multiply-accumulates whatever n is.

    python step1_linear/pca_gd.py              # MNIST, k = 50
    python step1_linear/pca_gd.py --k 10

Expect (k = 50): an angle below 0.001 rad after 640 (reconstruction, QR) to 2,000 steps (penalties);
with variance, QR, ηλ₁ = 1 it is still 0.8 after 3,000.

Sources: step 1 of github.com/ariel415el/LabProject-ALAE; A. H. Williams, 'Everything you did and
didn't know about PCA' (2016). Deviations:
 1. LabProject-ALAE descends on the data; here on Σ, the same function of C.
 2. There Adam; here plain gradient descent, which needs thousands of steps for so small a gap
    between eigenvalues. Where momentum is of use (not in the variance problem with QR) it is
    Nesterov's, restarted when it climbs (O'Donoghue & Candès, 1204.3982).
"""

import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

import torch
from matplotlib.figure import Figure
from torch import nn


@dataclass
class Config(shared.Protocol):
    k: int = option(50, "number of components", low=1)
    steps: int = option(3000, "at most so many gradient steps for each method (ours)", low=1)
    tolerance: float = option(1e-3, "stop at this largest principal angle, in rad (ours)", low=1e-9)
    rho: float = option(2.0, "weight ρ of the soft constraint, in units of λ₁ (ours)", low=1e-3)
    eval_every: int = option(20, "steps between measurements of angle and error", low=1)
    device: str = option("cpu", "float64, which not every device has", ("cpu",))


def reconstruction_loss(C, S):
    """‖X − XCCᵀ‖²/n, from the covariance S alone."""
    SC = S @ C
    return S.trace() - 2 * (C * SC).sum() + ((C.T @ SC) * (C.T @ C)).sum()


def variance_loss(C, S):
    """−tr CᵀΣC."""
    return -(C * (S @ C)).sum()


def orthonormality(C):
    """‖CᵀC − I‖²."""
    return (C.T @ C - torch.eye(C.shape[1]).to(C)).square().sum()


def descend(loss, S, k, steps, every, eta, rho=0.0, exact=True, momentum=True, seed=0):
    """Gradient descent with step size eta from a random orthonormal C (d, k).

    On loss + ρ‖CᵀC − I‖² or, if exact, on the loss with a QR after each step. Yields (step, C,
    seconds so far) after each `every` steps and after the last.
    """
    generator = torch.Generator().manual_seed(seed)
    C = torch.randn(len(S), k, dtype=S.dtype, generator=generator)
    C = before = torch.linalg.qr(C)[0].to(S)
    n = 0  # steps since momentum began anew
    seconds = 0.0
    start = time.perf_counter()
    for step in range(1, steps + 1):
        Y = (C + n / (n + 3) * (C - before)).requires_grad_()
        penalty = 0 if exact else rho * orthonormality(Y)
        (gradient,) = torch.autograd.grad(loss(Y, S) + penalty, Y)
        new = Y.detach() - eta * gradient
        if exact:
            Q, R = torch.linalg.qr(new)
            new = Q * R.diagonal().sign()  # the continuous choice, else momentum meets flips
        climbs = (gradient * (new - C)).sum() > 0
        n = n + 1 if momentum and not climbs else 0
        C, before = new, C
        if step % every == 0 or step == steps:
            seconds += time.perf_counter() - start
            yield step, C, seconds
            start = time.perf_counter()


def methods(l1, rho):
    """Name → how to descend, for the largest eigenvalue l1.

    Step sizes are 1/L, L the largest curvature at the optimum: 8(λ₁ + ρ) with the penalty, 2λ₁ for
    reconstruction on orthonormal C.
    """
    soft = {"eta": 1 / (8 * (l1 + rho)), "rho": rho, "exact": False}
    plain = {"loss": variance_loss, "momentum": False}
    return {
        "reconstruction, penalty": {"loss": reconstruction_loss, **soft},
        "reconstruction, QR": {"loss": reconstruction_loss, "eta": 1 / (2 * l1)},
        "variance, penalty": {"loss": variance_loss, **soft},
        "variance, QR, ηλ₁ = 1000": {**plain, "eta": 1000 / l1},
        "variance, QR, ηλ₁ = 1": {**plain, "eta": 1 / l1},
    }


def solve(how, S, V, config):
    """Descends until C spans V's subspace and, in the reconstruction problem, has its error.

    Returns C, {step: (angle, ratio)} and the cost.
    """
    least = reconstruction_loss(V, S).item()
    trace = {}
    how = how | {"k": config.k, "steps": config.steps, "every": config.eval_every}
    for step, C, seconds in descend(S=S, seed=config.seed, **how):
        angle = shared.pca.angle(C, V)
        ratio = reconstruction_loss(C, S).item() / least
        trace[step] = angle, ratio
        cost = {"steps": step, "seconds": seconds}
        # With a penalty the variance problem's optimum has a larger error: there the angle decides.
        error_arrived = how["loss"] is variance_loss or abs(ratio - 1) <= 1e-4
        if angle <= config.tolerance and error_arrived:
            break
    return C, trace, cost


def measure(C, mean, data):
    """Of C (d, k): MSEs per pixel of reconstructions without clipping, training MSE over PCA's,
    ‖CᵀC − I‖², and the largest angle to PCA's subspace in rad."""
    metrics = shared.pca.metrics(data, C.T, C, mean)
    found = {name: metrics[f"eval/{name}"] for name in ("mse_train", "mse_test", "ratio")}
    return found | {"orthonormality": orthonormality(C).item(), "angle": metrics["eval/angle_G"]}


def rows_of(results, traces):
    """{step: {name: number}}: the ways there, and each result at the step at which it stopped."""
    rows = defaultdict(dict)
    for name, trace in traces.items():
        for step, (angle, ratio) in trace.items():
            rows[step] |= {f"train/angle ({name})": angle, f"train/ratio ({name})": ratio}
    for name, result in results.items():
        row = {f"{name}/{key}": value for key, value in result.items()}
        rows[result.get("steps", 0)] |= row
    return dict(sorted(rows.items()))


def final_metrics(C, mean, data):
    """Errors over PCA's and angles to its subspace, and what the codes are worth."""
    metrics = shared.pca.metrics(data, C.T, C, mean)
    C, mean = C.to(data.x_test), mean.to(data.x_test)
    train, test = ((x - mean) @ C for x in (data.x_train, data.x_test))  # codes (N, k)
    metrics |= shared.image_metrics(data, mean + test @ C.T)
    return metrics | shared.code_metrics(data, train, test, "short")


def figure_convergence(traces, title):
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, trace in traces.items():
        style = "--" if name == "variance, penalty" else "-"  # the two with a penalty turn alike
        angles, ratios = zip(*trace.values(), strict=True)
        left.plot(list(trace), angles, style, label=name)
        right.plot(list(trace), [abs(ratio - 1) + 1e-12 for ratio in ratios], style)
    left.set_ylabel("largest principal angle, rad")
    right.set_ylabel("|MSE / optimum − 1|")
    for axes in (left, right):
        axes.set(xlabel="gradient steps", xscale="log", yscale="log")
        axes.tick_params(axis="x", which="minor", labelbottom=False)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    figure.suptitle(title)
    return figure


def main(config):
    if config.resume or config.eval:
        shared.fail("--resume, --eval: a run takes a minute, start it again")
    device = shared.setup(config)
    data = shared.load_data(config, device, size=28)
    _, V, mean = shared.pca.fit(data.x_train, config.k)
    _, S = shared.pca.moments(data.x_train)
    projection = nn.Module()  # x̂ = mean + C Cᵀ(x − mean)
    projection.C = nn.Parameter(V.clone())  # until there is one by gradient descent
    projection.mean = nn.Buffer(mean)
    run = shared.Run(config, device, nn.ModuleDict({"pca": projection}))
    shared.write_json(run.dir / "config.json", run.facts | {"config": asdict(config)})

    results, traces = {"analytic": measure(V, mean, data)}, {}
    l1 = torch.linalg.eigvalsh(S)[-1].item()
    for name, how in methods(l1, config.rho * l1).items():
        C, traces[name], cost = solve(how, S, V, config)
        results[name] = measure(C, mean, data) | cost
        print(f"{name}: {cost['steps']} steps, {cost['seconds']:.1f} s", flush=True)
        if name == "reconstruction, QR":
            projection.C.data.copy_(C)
        if name == "variance, penalty":
            C = torch.linalg.qr(C)[0]
            results[f"{name}, then one QR"] = measure(C, mean, data) | cost
    for step, row in rows_of(results, traces).items():
        run.epoch = step
        run.log(row)

    title = f"PCA by gradient descent, {config.dataset}, k = {config.k}"
    run.picture("convergence", figure_convergence(traces, title))
    run.history["images_seen"] = len(data.x_train)
    C = projection.C.detach()
    for name, x, rows in shared.pca.pictures(data, C.T, C, mean):
        run.picture(name, shared.grid(data.images(x), len(x) // len(rows), title, rows))
    run.finish(final_metrics(C, mean, data))
    for name, result in results.items():
        print(f"{name:32s}", *(f"{key} {value:<9.4g}" for key, value in result.items()))


if __name__ == "__main__":
    main(shared.parse_config(Config))
