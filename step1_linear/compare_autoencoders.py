"""Linear autoencoders compared: by the error of their reconstructions, and by classifiers on their codes.

Each method maps x (d), centred, to a code E x (k) and back to G E x. No pair of matrices has a smaller squared error than
PCA's (Eckart & Young 1936); which code it is, any rotation or scaling of PCA's or none of these, matters to a classifier.

    pca       the k leading eigenvectors of the covariance        pca_gd   the same by gradient descent   (pca_gd.py)
    ae_l2     min mean (x − G E x)², by Adam                      alae     linear ALAE                    (linear_alae.py)
    ae_l1     min mean |x − G E x|, by Adam                       lr, jlr  linear (joint) latent regressor
    random    k random orthonormal directions                              (linear_latent_regressor.py)
    pixels    no code at all: a classifier on x itself

The files named are run as they are, in processes of their own, and their model.pt is measured here like all else.

    python step1_linear/compare_autoencoders.py                                    # MNIST, k = 10 and 50
    python step1_linear/compare_autoencoders.py --datasets fashion_mnist swiss_roll sine_sheet

Result to expect (MNIST, seed 0, AMD EPYC, 3.5 minutes on two cores): all but ae_l1 and random within 0.1 % of PCA's test
MSE at k = 10 and 2.2 % at k = 50, with the same SVM to 0.3 % points; ae_l1 8 and 27 % worse.

Measures: MSE on all training and test images, not clipped; that over PCA's; ‖EEᵀ − I‖², whether E's rows are orthonormal;
1-NN, linear SVM (C = 0.02) and an MLP on the codes of the training images, % right on those of the test images.
"""
import contextlib
import dataclasses
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn

import shared
from shared import option

METHODS = {"pca": "PCA", "pca_gd": "PCA, gradient descent", "ae_l2": "linear AE (l2)", "ae_l1": "linear AE (l1)",
           "alae": "linear ALAE", "lr": "linear LR", "jlr": "linear JLR", "random": "random projection", "pixels": "raw pixels"}
FILES = {"pca_gd": ["pca_gd.py"], "alae": ["linear_alae.py"], "lr": ["linear_latent_regressor.py"],
         "jlr": ["linear_latent_regressor.py", "--joint"]}
COLUMNS = {"mse_train": "train MSE", "mse_test": "test MSE", "ratio_test": "test MSE / PCA's", "orthonormality": "‖EEᵀ − I‖²",
           "knn_acc_short": "1-NN %", "svm_acc_short": "SVM %", "mlp_acc_short": "MLP %"}


@dataclass
class Config(shared.Protocol):
    dataset: str = option("", "instead of --datasets, a single one")
    datasets: tuple = option(("mnist",), "any of mnist, fashion_mnist, cifar10, celeba, folder:PATH, swiss_roll, sine_sheet")
    methods: tuple = option(tuple(METHODS), "any of the methods above", choices=tuple(METHODS))
    k: tuple = option((10, 50), "dimensions of the code (the toys, in 3-D, always take 2)", low=1)
    steps: int = option(5000, "training steps of the linear AEs (ours)", low=1)
    batch_size: int = option(256, "images per step of the linear AEs (ours)", low=1)
    lr: float = option(0.002, "Adam's learning rate for the linear AEs, falling linearly to 0 (ours)", low=1e-9)
    workers: int = option(2, "how many of the other files run at a time", low=1)


def load(config, name, device):
    """The dataset as shared.load_vectors has it; None, after one line that says how to get it, if it is not here."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            return shared.load_vectors(dataclasses.replace(config, dataset=name), device)
        except SystemExit:
            reason = said.getvalue().strip().split(": error: ")[-1]
    if "could not be fetched" not in reason:
        shared.fail(reason)
    print(f"{name} is skipped: run once with a network, or put its archives into --data-dir. {reason}")


def train_ae(kind, x, k, config, run, label, total):
    """Linear autoencoder on centred x (N, d), kind ae_l1 or ae_l2; total: steps of all trainings. Returns E (k, d), G (d, k)."""
    torch.manual_seed(config.seed)
    d, B = x.shape[1], min(config.batch_size, len(x))
    E, G = (nn.Parameter(nn.Linear(a, b, bias=False).weight.detach().to(x)) for a, b in ((d, k), (k, d)))
    optimizer, unit = torch.optim.Adam([E, G], lr=config.lr, fused=True), x.std()
    generator, step = torch.Generator(x.device).manual_seed(config.seed), 0
    while step < config.steps:
        for i in shared.batches(len(x), B, generator):
            optimizer.param_groups[0]["lr"] = config.lr * (1 - step / config.steps)
            error = (x[i] - x[i] @ E.T @ G.T) / unit
            loss = error.abs().mean() if kind == "ae_l1" else error.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.tick(B, loss.detach(), total)
            if run.stop:
                run.leave("start it again")
            if (step := step + 1) % 500 == 0 or step == config.steps:
                run.log({"step": run.at["steps"], f"train/{label}": run.finite(loss.detach())})
            if step == config.steps:
                break
    return E.detach(), G.detach()


def drive(config, run, jobs, sizes):
    """Runs the other files for the jobs (dataset, k, method), some at a time; sizes: of the training sets. Returns the
    models {job: (E, G)}."""
    def one(job):
        if run.stop:
            return
        name, k, method = job
        file, *more = FILES[method]
        label = f"{Path(name).name}-k{k}-{method}"  # of folder:PATH its last part
        command = [sys.executable, Path(__file__).with_name(file), *more, "--smoke" if config.smoke else "--no-smoke"]
        for key, value in {"dataset": name, "k": k, "run-name": label, "out-dir": run.dir / "runs", "seed": config.seed, "split":
                           config.split, "data-dir": config.data_dir, "device": config.device, "matmul": config.matmul}.items():
            command += [f"--{key}", str(value)]
        if method != "pca_gd" and sizes[name] < 512:
            command += ["--batch-size", str(sizes[name])]
        if method == "alae" and k == 2:
            command += ["--gamma", "0.1"]  # the default's 8γν is not below 1 there: see linear_alae.py
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // config.workers))}
        with open(run.dir / f"{label}.log", "w") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=threads | os.environ).returncode
        if code:
            last = Path(log.name).read_text().strip().splitlines()[-1:]
            raise RuntimeError(f"{METHODS[method]} on {name}, k = {k}, ended with code {code}: {''.join(last)}")
        model = torch.load(run.dir / "runs" / Path(file).stem / label / "model.pt", map_location="cpu", weights_only=True)
        return (model["E"], model["G"]) if "E" in model else (model["C"].T, model["C"])
    with ThreadPoolExecutor(config.workers) as pool:
        found = pool.map(one, jobs)
        try:
            models = dict(zip(jobs, shared.tqdm(found, "the other files", len(jobs)) if shared.tqdm else found))
        except RuntimeError as error:
            pool.shutdown(cancel_futures=True)
            if not run.stop:
                run.summarize("failed")
                shared.fail(error, 1)
    run.stop and run.leave("start it again")
    return models


def measure(E, G, pca, x, y, x_test, y_test):
    """Measures of the pair E (k, d), G (d, k), either None, on centred images; pca: the test MSE of PCA."""
    row = {}
    if E is not None:
        mse = {key: sum((part - part @ E.T @ G.T).square().sum().item() for part in t.split(10_000)) / t.numel()
               for key, t in (("mse_train", x), ("mse_test", x_test))}
        row = mse | {"ratio_test": mse["mse_test"] / pca,
                     "orthonormality": (E @ E.T - torch.eye(len(E)).to(E)).square().sum().item()}
        x, x_test = x @ E.T, x_test @ E.T
    if y is not None:
        row |= {key.split("/")[1]: value for key, value in shared.accuracies("short", x, y, x_test, y_test).items()}
    return row


def draw(name, models, x, y, mean, shape, results, run):
    """Reconstructions of the same images, errors relative to PCA, and codes; models {k: {method: (E, G)}}, results
    {(k, method): measures}."""
    for k, maps in models.items():
        if shape:
            rows = [x[:12], *(x[:12] @ E.T @ G.T for E, G in maps.values())]
            run.picture(f"reconstructions_{name}_k{k}", shared.grid(
                mean.view(shape) + torch.cat(rows).unflatten(1, shape), len(rows[0]),
                f"Reconstructions of test images of {name}, k = {k}", ["x", *(METHODS[m].replace(", ", ",\n") for m in maps)]))
        lines = -(-len(maps) // 4)
        figure = shared.Figure(figsize=(9, 2.4 * lines), layout="constrained")
        colours = {"c": x[:2000, 0].cpu()} if y is None else {"c": y[:2000].cpu(), "cmap": "tab10"}
        for axes, (method, (E, _)) in zip(figure.subplots(lines, 4, squeeze=False).flat, maps.items()):
            codes = (x[:2000] @ E[:2].T).T.cpu()
            dots = axes.scatter(codes[0], codes[-1], s=3, **colours)  # k = 1: the diagonal
            axes.set(title=METHODS[method], xlabel="code 1", ylabel="code 2")
        figure.colorbar(dots, ax=figure.axes, label="x₁" if y is None else "class")
        for axes in figure.axes[len(maps):-1]:
            axes.remove()
        figure.suptitle(f"First two code dimensions, test data of {name}, k = {k}")
        run.picture(f"codes_{name}_k{k}", figure)
    axes = (figure := shared.Figure(figsize=(8, 3.6), layout="constrained")).add_subplot()
    for i, (k, maps) in enumerate(models.items()):
        ratios = {METHODS[m]: results[k, m]["ratio_test"] for m in maps}
        bars = axes.bar([j + 0.8 * i / len(models) for j in range(len(ratios))], list(ratios.values()), 0.8 / len(models),
                        label=f"k = {k}")
        axes.bar_label(bars, [f"{r:.3f}" for r in ratios.values()], fontsize=7)
    axes.set(yscale="log", ylabel="test MSE / PCA's", title=f"Reconstruction error relative to PCA, {name}")
    axes.set_xticks([j + 0.4 - 0.4 / len(models) for j in range(len(ratios))], [name.replace(" ", "\n") for name in ratios])
    axes.legend(), axes.margins(y=0.15), axes.set_ylim(bottom=0.95)
    run.picture(f"error_{name}", figure)


def table(results, absent):
    """Markdown of {(dataset, k, method): measures}."""
    columns = [key for key in COLUMNS if any(key in row for row in results.values())]
    lines = [["data", "k", "method", *(COLUMNS[key] for key in columns)], ["---"] * (3 + len(columns))]
    for (name, k, method), row in results.items():
        cells = {key: f"{value:{'.2f' if 'acc' in key else '.3f' if key == 'ratio_test' else '.5f'}}" for key, value in row.items()}
        lines.append([name, str(k or ""), METHODS[method], *(cells.get(key, "") for key in columns)])
    lines += [[name, "", "absent: the data is not on this machine", *[""] * len(columns)] for name in absent]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(config):
    device = shared.setup(config)
    names = (config.dataset,) if config.dataset else tuple(dict.fromkeys(config.datasets))
    data = {name: load(config, name, device) for name in names}
    absent = [name for name in names if data[name] is None]
    data = {name: part for name, part in data.items() if part is not None}
    data or shared.fail("none of the datasets is on this machine")
    if len({Path(name).name for name in data}) < len(data):
        shared.fail("--datasets: two folders have the same name")
    if config.smoke:
        config.steps, config.k = min(config.steps, 30), config.k[:1]
    ks = {name: (2,) if name in shared.TOYS else tuple(dict.fromkeys(config.k)) for name in data}
    axes = {}
    for name, (x, y, *_) in data.items():
        if max(ks[name]) >= (most := min(x.shape)):
            shared.fail(f"--k {max(ks[name])}: choose 1 to {most - 1} on {name}, below the data's dimension")
        if (x - x[0]).abs().max() == 0:
            shared.fail(f"{name}: the images are all the same")
        centred = (x - x.mean(0)).cpu().double()
        values, axes[name] = (t.flip(-1) for t in torch.linalg.eigh(centred.T @ centred))
        if max(ks[name]) >= (rank := int((values > 1e-9 * values[0]).sum())):
            shared.fail(f"--k {max(ks[name])}: {name} spans only {rank} dimensions, choose less")
        if y is not None and len(y.unique()) < 2:
            shared.fail(f"{name}: all labels are the same, there is nothing to classify")
    if set(methods := [m for m in METHODS if m in config.methods]) == {"pixels"}:
        shared.fail("--methods pixels: choose at least one with a code")
    config.dataset = "+".join(data)
    run = shared.Run(config, device, 0, unit="step")

    found = drive(config, run, [(name, k, m) for m in methods if m in FILES for name in data for k in reversed(ks[name])],
                  {name: len(part[0]) for name, part in data.items()})
    total = config.steps * sum(len(ks[name]) for name in data) * sum(m.startswith("ae_") for m in methods)
    results, models = {}, {}
    for name, (x, y, x_test, y_test, shape) in data.items():
        mean = x.mean(0)
        x, x_test, V = x - mean, x_test - mean, axes[name].to(x)
        for k in ks[name]:
            pca = measure(V[:, :k].T, V[:, :k], 1.0, x, None, x_test, None)["mse_test"]
            for method in (m for m in methods if m != "pixels"):
                if method in FILES:
                    E, G = (t.to(x) for t in found[name, k, method])
                elif method.startswith("ae_"):
                    E, G = train_ae(method, x, k, config, run, f"{method} ({name}, k = {k})", total)
                else:
                    Q = torch.randn(len(V), k, generator=torch.Generator().manual_seed(config.seed))
                    G = V[:, :k] if method == "pca" else torch.linalg.qr(Q)[0].to(x)
                    E = G.T
                run.stop and run.leave("start it again")
                models[name, k, method] = E, G
                results[name, k, method] = measure(E, G, pca, x, y, x_test, y_test)
                run.finite(results[name, k, method]["mse_test"])
        if "pixels" in methods and y is not None:
            results[name, 0, "pixels"] = measure(None, None, None, x, y, x_test, y_test)
        draw(Path(name).name, {k: {m: models[name, k, m] for m in methods if m != "pixels"} for k in ks[name]}, x_test,
             y_test, mean, shape, {(k, m): row for (of, k, m), row in results.items() if of == name}, run)
    text = table(results, absent)
    shared.write(run.dir / "table.md", lambda temporary: temporary.write_text(text))
    run.save("model.pt", maps={f"{name}, k = {k}: {METHODS[m]}": pair for (name, k, m), pair in models.items()})
    print(text)
    run.finish(**{f"{name}{f', k = {k}' if k else ''}: {METHODS[m]}/{key}": value for (name, k, m), row in results.items()
                  for key, value in row.items()}, absent=" ".join(absent))


if __name__ == "__main__":
    main(shared.parse_config(Config))
