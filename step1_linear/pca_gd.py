"""Principal component analysis by gradient descent, two problems with one solution, against the analytic solution.

With centred data X (n, d), covariance Σ = XᵀX/n = VΛVᵀ and C (d, k), k < d:

    reconstruction   min  ‖X − XCCᵀ‖²/n = tr Σ − 2 tr CᵀΣC + tr CᵀΣC CᵀC      subject to CᵀC = I
    variance         max  tr CᵀΣC                                             subject to CᵀC = I

Both are solved by every orthonormal basis of the k leading eigenvectors. The constraint is held
  - softly, by a penalty ρ‖CᵀC − I‖². The optimum of the reconstruction problem is orthonormal anyway. That of the
    variance problem is CᵀC = I + Λ/2ρ: the exact subspace, but columns that are too long, so that XCCᵀ overshoots, the
    more the smaller ρ; one QR at the end mends it;
  - or exactly, by a QR after each step. For the variance problem that is C ← qr((I + 2ηΣ)C): a large step η turns
    gradient descent into subspace iteration, C ← qr(ΣC). With η = 1/λ₁, where I is not negligible, thousands of steps are
    not enough on MNIST, whose λ₅₀ and λ₅₁ nearly agree.
Only Σ matters: a step costs d²k multiply-accumulates whatever n is.

    python step1_linear/pca_gd.py                          # MNIST, k = 50: 1.3 minutes on two CPU cores
    python step1_linear/pca_gd.py --dataset swiss_roll     # or sine_sheet: toy data in 3-D, k = 2

Result to expect (AMD EPYC, two cores): an angle below 10⁻³ rad and the optimal MSE after 640 steps (reconstruction, QR),
1,000 (variance, QR, large step) and 2,000 (penalties), 3 to 10 s each.

Sources: the seed's step 1; A. H. Williams, 'Everything you did and didn't know about PCA' (2016).
Deviations: 1. The seed descends on the data; here on Σ, the same function of C.
 2. Plain gradient descent needs thousands of steps for so small a gap between eigenvalues. Where momentum is of use (not
    in the variance problem with QR) it is Nesterov's, restarted when it climbs (O'Donoghue & Candès, 1204.3982).
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import scipy.linalg
import torch

import shared
from shared import option


@dataclass
class Config(shared.Protocol):
    dataset: str = option("mnist", "an image dataset, or swiss_roll or sine_sheet (toys in 3-D)")
    k: int = option(-1, "number of components; -1: 50, or 2 for the toys", low=-1)
    steps: int = option(3000, "at most so many gradient steps for each method (ours)", low=1)
    tolerance: float = option(1e-3, "stop at this largest principal angle, in rad (ours)", low=1e-9)
    rho: float = option(2.0, "weight ρ of the soft constraint, in units of λ₁ (ours)", low=1e-3)


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


def analytic(S, k):
    """The k leading eigenvectors (d, k) and eigenvalues of S, largest first."""
    d = len(S)
    values, vectors = scipy.linalg.eigh(S.cpu().numpy(), subset_by_index=[d - k, d - 1])
    return torch.from_numpy(vectors[:, ::-1].copy()).to(S), torch.from_numpy(values[::-1].copy()).to(S)


def largest_angle(C, V):
    """Largest principal angle, in rad, between the column spaces: the solution is unique only up to a rotation."""
    return float(scipy.linalg.subspace_angles(C.cpu().numpy(), V.cpu().numpy()).max())


def descend(loss, S, k, steps, eta, rho=0.0, exact=True, momentum=True, seed=0,
            done=lambda step, C: False):
    """Gradient descent with step size eta from a random orthonormal C (d, k): on loss + ρ‖CᵀC − I‖², or, if exact, on the
    loss with a QR after each step. done(step, C), asked every 20 steps and not timed, may end it. Returns C, steps,
    seconds."""
    generator = torch.Generator().manual_seed(seed)
    C = before = torch.linalg.qr(torch.randn(len(S), k, dtype=S.dtype, generator=generator))[0].to(S)
    n, seconds, start = 0, 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        Y = (C + n / (n + 3) * (C - before)).requires_grad_()
        gradient, = torch.autograd.grad(loss(Y, S) + (0 if exact else rho * orthonormality(Y)), Y)
        new = Y.detach() - eta * gradient
        if exact:
            Q, R = torch.linalg.qr(new)
            new = Q * R.diagonal().sign()  # the continuous choice, else momentum meets flipped columns
        n = n + 1 if momentum and (gradient * (new - C)).sum() <= 0 else 0
        C, before = new, C
        if step % 20 == 0 or step == steps:
            seconds += time.perf_counter() - start
            if done(step, C):
                break
            start = time.perf_counter()
    return C, step, seconds


def methods(l1, rho):
    """Name → how to descend. Step sizes are 1/L, L the largest curvature at the optimum: 8(λ₁ + ρ) with the penalty,
    2λ₁ for reconstruction on orthonormal C."""
    soft = {"eta": 1 / (8 * (l1 + rho)), "rho": rho, "exact": False}
    return {"reconstruction, penalty": {"loss": reconstruction_loss, **soft},
            "reconstruction, QR": {"loss": reconstruction_loss, "eta": 1 / (2 * l1)},
            "variance, penalty": {"loss": variance_loss, **soft},
            "variance, QR, ηλ₁ = 1000": {"loss": variance_loss, "eta": 1000 / l1, "momentum": False},
            "variance, QR, ηλ₁ = 1": {"loss": variance_loss, "eta": 1 / l1, "momentum": False}}


def covariance(x):
    """Mean (d,) and covariance (d, d) of x (n, d)."""
    mean = x.mean(0)
    return mean, (x - mean).T @ (x - mean) / len(x)


def measure(C, V, S, mean, x_test, optimum):
    """Quality of C (d, k). The MSEs are means over images and pixels, of reconstructions that are not clipped."""
    x, train = x_test - mean, reconstruction_loss(C, S).item() / len(S)
    return {"mse_train": train, "mse_test": (x - x @ C @ C.T).square().mean().item(), "ratio": train / optimum,
            "orthonormality": orthonormality(C).item(), "angle": largest_angle(C, V)}


def figure_toys():
    """Both toys in 3-D with the plane of PCA and that of gradient descent."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for i, name in enumerate(shared.TOYS):
        x = shared.load_vectors(shared.Protocol(dataset=name), "cpu")[0][:1500].double()
        mean, S = covariance(x)
        V, values = analytic(S, 2)
        C = descend(reconstruction_loss, S, 2, 2000, 0.5 / values[0].item())[0]
        axes = figure.add_subplot(1, 2, i + 1, projection="3d", title=name.replace("_", " "), xlabel="x₁", ylabel="x₂",
                                  zlabel="x₃")
        axes.scatter(*x.T.numpy(), c=((x - mean) @ V[:, 0]).numpy(), s=4, cmap="viridis", alpha=0.6)
        side = torch.linspace(-1.7, 1.7, 7, dtype=x.dtype)
        a, b = torch.meshgrid(side, side, indexing="ij")
        for basis, draw in ((V, {"color": "tab:orange", "alpha": 0.35}), (C, {"color": "tab:red", "linewidth": 1})):
            basis = basis @ basis.T @ V * values.sqrt()  # the same corners, projected on the plane at hand
            plane = [p.numpy() for p in (mean + a[..., None] * basis[:, 0] + b[..., None] * basis[:, 1]).unbind(2)]
            (axes.plot_surface if "alpha" in draw else axes.plot_wireframe)(*plane, **draw)
    figure.suptitle("Planes of analytic PCA (orange) and of gradient descent (red wires)")
    return figure


def main(config):
    device = shared.setup(config)
    device = torch.device("cpu") if device.type == "mps" else device  # no float64 there
    x, _, x_test, _, shape = shared.load_vectors(config, device)
    x, x_test = x.double(), x_test.double()
    d, k, steps = x.shape[1], config.k, config.steps
    k = min(50, d - 1) if k == -1 else k
    if not 1 <= k < d:
        shared.fail(f"--k {k}: choose 1 to {d - 1}, below the data's dimension")
    if config.smoke:
        steps = min(steps, 40)
    mean, S = covariance(x)
    if S.trace() < 1e-12:
        shared.fail(f"--dataset {config.dataset}: the images are all the same")
    run = shared.Run(config, device, d * k, unit="step")
    run.at["images"] = len(x)
    top, values = analytic(S, d if d < 100 else max(k, 100))
    V, l1 = top[:, :k], values[0].item()
    optimum = reconstruction_loss(V, S).item() / d

    results, traces, solutions = {"analytic": measure(V, V, S, mean, x_test, optimum)}, {}, {}
    for name, how in methods(l1, config.rho * l1).items():
        trace = traces[name] = {}

        def done(step, C):
            angle, ratio = largest_angle(C, V), reconstruction_loss(C, S).item() / d / optimum
            trace[step] = (run.finite(angle), run.finite(ratio))
            if run.stop:  # Ctrl-C
                run.leave("a run takes a minute, start it again")
            return angle <= config.tolerance and (abs(ratio - 1) <= 1e-4 or how["loss"] is variance_loss)
        C, n, seconds = descend(S=S, k=k, steps=steps, seed=config.seed, done=done, **how)
        solutions[name], results[name] = C, measure(C, V, S, mean, x_test, optimum) | {"steps": n, "seconds": seconds}
        if name == "variance, penalty":
            results[name + ", then one QR"] = measure(torch.linalg.qr(C)[0], V, S, mean, x_test, optimum)

    print(f"{'':32s}{'train MSE':>10s}{'test MSE':>10s}{'ratio':>10s}{'|CᵀC−I|²':>10s}{'angle':>10s}{'steps':>8s}{'s':>7s}")
    for name, r in results.items():
        print(f"{name:32s}{r['mse_train']:10.6f}{r['mse_test']:10.6f}{r['ratio']:10.6f}{r['orthonormality']:10.1e}"
              f"{r['angle']:10.1e}" + (f"{r['steps']:8d}{r['seconds']:7.2f}" if "steps" in r else ""))
    for step in sorted({step for trace in traces.values() for step in trace}):
        run.log({"step": step} | {f"train/{key} ({name})": value for name, trace in traces.items() if step in trace
                                  for key, value in zip(("angle", "ratio"), trace[step])})
    styles = dict(zip(traces, ("-", "-", "--", "-", "-")))  # the two with a penalty turn alike
    figure = shared.curves({
        "largest principal angle, rad": {name: (list(t), [a for a, _ in t.values()], styles[name]) for name, t in
                                         traces.items()},
        "|MSE / optimum − 1|": {name: (list(t), [abs(r - 1) + 1e-12 for _, r in t.values()], styles[name]) for name, t in
                                traces.items()}},
        "gradient steps", f"PCA by gradient descent, {config.dataset}, k = {k}", yscale="log", xscale="log")
    for axes in figure.axes:
        axes.get_legend().remove()
    figure.legend(handles=figure.axes[0].get_lines(), loc="outside lower center", ncols=3)
    run.picture("convergence", figure)
    run.picture("toys", figure_toys())

    if shape:
        show = min(k, 10)
        C = solutions["variance, QR, ηλ₁ = 1000"]
        C = C @ torch.linalg.eigh(C.T @ S @ C)[1].flip(1)  # turned to the principal axes within its span
        C = C * (C * V).sum(0).sign()  # eigenvectors have no sign
        rows = torch.cat([V[:, :show].T, C[:, :show].T]).unflatten(1, shape)
        run.picture("components", shared.grid(0.5 + rows / (2 * rows.abs().amax((1, 2, 3), keepdim=True)), show,
                    f"Leading {show} principal components", ["analytic", "gradient\ndescent"]))
    ks = list(range(1, top.shape[1] + 1))
    tails = [(S.trace().item() - s) / d for s in values.cumsum(0).tolist()]
    points, most = [n for n in (1, 2, 5, 10, 20, 50, 100) if n <= ks[-1]], min(steps, 500)
    found = [reconstruction_loss(descend(variance_loss, S, n, most, 1000 / l1, momentum=False)[0], S).item() / d
             for n in points]
    run.picture("mse_against_k", shared.curves({"train MSE": {
        "analytic": (ks, tails), f"gradient descent, {most} steps": (points, found, "o")}}, "k", f"PCA, {config.dataset}"))
    C = solutions["reconstruction, QR"]
    run.save("model.pt", C=C, mean=mean)
    if shape:  # the contract's MSE, clipped
        results["eval"] = {"recon_mse": shared.recon_mse(x_test, (x_test - mean) @ C @ C.T + mean)}
        results["reconstruction, QR"] |= results["eval"]
    run.finish(**{f"{name}/{key}": value for name, result in results.items() for key, value in result.items()})


if __name__ == "__main__":
    main(shared.parse_config(Config))
