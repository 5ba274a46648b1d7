"""Linear autoencoders compared: by the error of their reconstructions and by classifiers on codes.

Each method maps x (d), centred, to a code E x (k) and back to G E x. No pair of matrices has a
smaller squared error than PCA's (Eckart & Young 1936); which code it is, any rotation or scaling
of PCA's or none of these, matters to a classifier. Here nothing is trained: the model.pt of
finished runs is measured, beside analytic PCA, k random orthonormal directions, and raw pixels.

    python results/sweep.py step1_linear/sweeps/compare_*.yaml     # trains what is compared
    python step1_linear/compare_autoencoders.py                    # all such runs below runs/

Expect (MNIST, seed 0): all but the l1 autoencoder and random directions within 0.1 % of PCA's test
MSE at k = 10 and 2.2 % at k = 50, with the same SVM to 0.3 % points.

Measures: MSE over pixels of all training and test images, not clipped; that over PCA's;
‖EEᵀ − I‖², whether E's rows are orthonormal; 1-NN, linear SVM (C = 0.02) and an MLP on codes of
the training images, % right on those of the test images. Of several runs of a kind: mean ± std.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

import torch
from matplotlib.figure import Figure
from torch import nn

EXPERIMENTS = ("pca_gd", "linear_autoencoder", "linear_alae", "linear_latent_regressor")
COLUMNS = {"mse_train": "train MSE", "mse_test": "test MSE", "ratio_test": "test MSE / PCA's"}
COLUMNS |= {"orthonormality": "‖EEᵀ − I‖²"}
COLUMNS |= {"knn_acc_short": "1-NN %", "svm_acc_short": "SVM %", "mlp_acc_short": "MLP %"}


@dataclass
class Config(shared.Protocol):
    dataset: str = option("mnist", "of the runs: images, or a toy: swiss_roll, sine_sheet")
    runs: str = option("", "folders to search for runs, with commas between (default: OUT_DIR)")
    k: int = option(0, "dimension of the codes (0: each that the runs have, or else 10)", low=0)
    steps = 0  # no option: it trains nothing


def method_of(experiment, config):
    """A run's name in tables."""
    if experiment == "pca_gd":
        return "PCA, gradient descent"
    if experiment == "linear_autoencoder":
        return f"linear AE ({config['loss']})"
    if experiment == "linear_latent_regressor":
        return "linear JLR" if config["joint"] else "linear LR"
    return "linear ALAE" if config["preset"] == "recipe" else f"linear ALAE, {config['preset']}"


def maps_of(model):
    """E (k, d), G (d, k) and mean (d,): x̂ = mean + G E (x − mean)."""
    if "pca" in model:
        return model["pca"]["C"].T, model["pca"]["C"], model["pca"]["mean"]
    mean, scale = model["scaling"]["mean"], model["scaling"]["scale"]
    return model["E"]["weight"] * scale, model["G"]["weight"] / scale, mean


def read_runs(config):
    """{k: {method: [maps of a run, …]}} of the finished runs on this data."""
    wanted = {name: getattr(config, name) for name in ("dataset", "split", "smoke")}
    paths = []
    for folder in (config.runs or config.out_dir).split(","):
        found = Path(folder).resolve().rglob("model.pt")
        paths += [path for path in sorted(found) if path.parts[-3] in EXPERIMENTS]
    models = {}
    for path in sorted(paths, key=lambda path: EXPERIMENTS.index(path.parts[-3])):
        model = torch.load(path, map_location="cpu", weights_only=True)
        method, maps = method_of(path.parts[-3], model["config"]), maps_of(model)
        k = len(maps[0])
        if config.k in (0, k) and wanted.items() <= model["config"].items():
            models.setdefault(k, {}).setdefault(method, []).append(maps)
    return dict(sorted(models.items()))


def references(data, k, seed):
    """Maps of PCA, of the training images, and of random orthonormal directions."""
    mean = data.x_train.mean(0)
    centred = (data.x_train - mean).cpu().double()
    V = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :k]
    Q = torch.randn(len(V), k, generator=torch.Generator().manual_seed(seed))
    Q = torch.linalg.qr(Q)[0]
    return (V.T, V, mean), (Q.T, Q, mean)


def accuracies(data, train, test):
    metrics = shared.code_metrics(data, train, test, "short")
    return {name.removeprefix("eval/"): value for name, value in metrics.items()}


def measure(data, E, G, mean):
    row = {}
    for name, x in (("mse_train", data.x_train), ("mse_test", data.x_test)):
        errors = shared.chunked(lambda x: (x - x @ E.T @ G.T).square().mean(1), x - mean)
        row[name] = errors.mean().item()
    row["orthonormality"] = (E @ E.T - torch.eye(len(E)).to(E)).square().sum().item()
    return row | accuracies(data, (data.x_train - mean) @ E.T, (data.x_test - mean) @ E.T)


def table(dataset, results):
    """Markdown of {(k, method): [measures of a run, …]}."""
    columns = [key for key in COLUMNS if any(key in rows[0] for rows in results.values())]
    lines = [["data", "k", "method", "runs", *(COLUMNS[key] for key in columns)]]
    lines.append(["---" for _ in lines[0]])
    for (k, method), rows in results.items():
        lines.append([dataset, str(k or ""), method, str(len(rows))])
        for key in columns:
            digits = 2 if "acc" in key else 3 if key == "ratio_test" else 5
            values = [row[key] for row in rows if key in row]
            cell = f"{statistics.fmean(values):.{digits}f}" if values else ""
            if len(values) > 1:
                cell += f" ± {statistics.stdev(values):.{digits}f}"
            lines[-1].append(cell)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def figure_reconstructions(data, methods, title):
    """The same test images by each method, of several runs the first."""
    x = data.x_test[:12]
    rows = [x]
    for (E, G, mean), *_ in methods.values():
        rows.append(mean + (x - mean) @ E.T @ G.T)
    names = ["x", *(method.replace(", ", ",\n") for method in methods)]
    return shared.grid(data.images(torch.cat(rows)), len(x), title, names)


def figure_codes(data, methods, title):
    """The first two dimensions of test codes, coloured by class, or by x₁."""
    x, lines = data.x_test[:2000], -(-len(methods) // 4)
    colours = {"c": x[:, 0].cpu()} if data.y_test is None else {"c": data.y_test[:2000].cpu()}
    figure = Figure(figsize=(9, 2.4 * lines), layout="constrained")
    for place, (method, ((E, _, mean), *_)) in enumerate(methods.items(), 1):
        codes = ((x - mean) @ E.T).cpu()
        axes = figure.add_subplot(lines, 4, place, title=method, xlabel="code 1", ylabel="code 2")
        axes.scatter(codes[:, 0], codes[:, :2][:, -1], s=3, cmap="turbo", **colours)
    figure.suptitle(title)
    return figure


def figure_error(results, title):
    """Test MSE over PCA's, mean over runs."""
    ks = sorted({k for k, _ in results})
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, len(ks), squeeze=False, sharey=True)[0]
    for axes, k in zip(panels, ks, strict=True):
        rows = {method: results[of, method] for of, method in results if of == k}
        means = [statistics.fmean(row["ratio_test"] for row in runs) for runs in rows.values()]
        axes.bar_label(axes.barh(list(rows), means), fmt=" %.3f", fontsize=8)
        axes.set(xlabel="test MSE / PCA's", title=f"k = {k}")
        axes.margins(x=0.2)
    axes.invert_yaxis()  # of all: they share it
    figure.suptitle(title)
    return figure


def main(config):
    device = shared.setup(config)
    data = shared.load_data(config, device, toys=True)
    models = read_runs(config) or {min(config.k or 10, data.x_train.shape[1] - 1): {}}
    name = Path(config.dataset).name
    run = shared.Run(config, device, nn.ModuleDict())
    results = {}
    for k, methods in models.items():
        pca, chance = references(data, k, config.seed)
        methods = {"PCA": [pca]} | methods | {"random projection": [chance]}
        for method, runs in methods.items():
            runs[:] = [[t.to(data.x_train) for t in maps] for maps in runs]
            results[k, method] = rows = [measure(data, *maps) for maps in runs]
            for row in rows:
                row["ratio_test"] = row["mse_test"] / results[k, "PCA"][0]["mse_test"]
        title = f"test images of {name}, k = {k}"
        run.picture(f"codes_{name}_k{k}", figure_codes(data, methods, f"Codes of {title}"))
        if data.shape is not None:
            figure = figure_reconstructions(data, methods, f"Reconstructions of {title}")
            run.picture(f"reconstructions_{name}_k{k}", figure)
    run.picture(f"error_{name}", figure_error(results, f"Reconstruction error over PCA's, {name}"))
    if data.y_train is not None:
        pixels = accuracies(data, data.x_train - pca[2], data.x_test - pca[2])
        results[0, "raw pixels"] = [pixels]
    text = table(config.dataset, results)
    shared.write_file(run.dir / "table.md", lambda temporary: temporary.write_text(text))
    metrics = {}
    for (k, method), rows in results.items():
        setting = f"{config.dataset}, k = {k}" if k else config.dataset
        for key in rows[0]:
            metrics[f"{setting}: {method}/{key}"] = statistics.fmean(row[key] for row in rows)
    run.finish(metrics)
    print(text)


if __name__ == "__main__":
    main(shared.parse_config(Config))
