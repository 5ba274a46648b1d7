"""Figures of studies, from finished runs: those kept in results/, or those below a folder.

    python results/figures.py linear_ablation                  # writes assets/linear_ablation.png
    python results/figures.py gan_losses --runs runs           # of your own: runs/gan_losses.png

Runs of a sweep are known by their names, which begin with the file's: ablation-no-decay-seed0.
Two studies were once made by one run each, whose keys name the setting and the seed.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "step3_official_alae"))
from shared import ROOT, fail, write_file

import paper_table
import table
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

ABLATION = {  # presets of linear_alae.py, and what they change
    "recipe": "recipe",
    "critic-linear": "critic: linear",
    "critic-mlp": "critic: MLP",
    "no-decay": "no decay on G",
    "decay-quarter": "decay / 4",
    "decay-times-4": "decay × 4",
    "unscaled": "x not scaled",
    "mapping-linear": "F learned",
    "gamma-0": "γ = 0",
    "gamma-10": "γ = 10",
    "penalty-unit": "γ = 10, (‖∇‖ − 1)²",
    "tangent": "tangent of softplus",
    "lr-critic-times-4": "lr of D × 4",
    "lr-constant": "lr constant",
    "init-pytorch": "G from PyTorch's init",
    "adams-paper": "Adams as in the paper",
}
LOSSES = {  # presets of gan_mnist.py
    "minimax": "minimax",
    "non-saturating": "non-saturating",
    "non-saturating-spectral": "non-saturating, spectral norm",
    "r1": "R1",
    "wgan-gp": "WGAN-GP",
}


def study(folder, experiment, sweep, combined, labels):
    """{preset's label: {seed: {metric: value}}} of a sweep's runs, else of the run that had all."""
    found = [s for s in table.summaries(folder) if s["experiment"] == experiment]
    seeds = {label: {} for label in labels.values()}
    for s in found:
        preset = s["run"].removeprefix(f"{sweep}-").rsplit("-seed", 1)[0]
        if s["run"].startswith(f"{sweep}-") and preset in labels:
            metrics = {key.split("/")[1]: value for key, value in s.items() if "/" in key}
            seeds[labels[preset]][s["seed"]] = metrics
    if any(seeds.values()):
        return seeds
    for s in found:
        if s["run"] == combined:
            for key in [key for key in s if "/" in key and not key.startswith("perf/")]:
                label, seed, metric = re.fullmatch("(.*), seed ([0-9]+)/(.*)", key).groups()
                seeds[label].setdefault(int(seed), {})[metric] = s[key]
    if not any(seeds.values()):
        fail(f"no finished run {sweep}-… below {folder}: run the sweep")
    return seeds


def dots(axes, found, value, xlabel, colored=False):
    """A row of dots for each {label: {seed: run}}, on a logarithmic scale."""
    for i, seeds in enumerate(found.values()):
        color = f"C{i}" if colored else "C0"
        numbers = [value(run) for run in seeds.values()]
        axes.plot(numbers, [i for _ in numbers], "o", color=color, alpha=0.7)
    axes.set_yticks(range(len(found)), list(found))
    axes.set(xscale="log", xlabel=xlabel)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.invert_yaxis()
    axes.grid(alpha=0.3)


def linear_ablation(folder):
    """What each ingredient of linear ALAE's recipe is for: step1_linear/sweeps/ablation.yaml."""
    found = study(folder, "linear_alae", "ablation", "ablation-val-k10", ABLATION)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        title="Linear ALAE on MNIST (val), k = 10: one thing changed at a time"
    )
    xlabel = "MSE of held-out images / PCA's − 1, at least 0.0001, for each seed"
    dots(axes, found, lambda run: max(run["ratio_test"] - 1, 1e-4), xlabel)
    return figure


def gan_losses(folder):
    """A GAN with each loss, at the end: step2_gan/sweeps/gan_losses.yaml."""
    found = study(folder, "gan_mnist", "gan_losses", "compare", LOSSES)
    figure = Figure(figsize=(14, 3.4), layout="constrained")
    panels = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.5])
    dots(panels[0], found, lambda run: run["fid"], "LeNet-FID", colored=True)
    dots(panels[1], found, lambda run: run["grad_norm_G"], "norm of G's gradient", colored=True)
    dots(
        panels[2],
        found,
        lambda run: run["digit_kl"],
        "KL of the digits to the data's",
        colored=True,
    )
    for axes in panels[:3]:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:g}")
    for axes in panels[1:3]:
        axes.set_yticklabels([])
    for i, seeds in enumerate(found.values()):
        for seed, run in seeds.items():
            shares = [run[f"digit_{digit}"] for digit in range(10)]
            panels[3].plot(shares, ".-" if seed == 0 else ".--", color=f"C{i}")
    panels[3].set(xticks=range(10), xlabel="digit, by LeNet", ylabel="% of the samples")
    panels[3].grid(alpha=0.3)
    figure.suptitle(
        "A GAN with different losses: MNIST (dw), 5 epochs, learning rate 0.001, two seeds"
    )
    return figure


def clean(folder):
    """MSE, identity and LeNet-FID along the training."""
    lines = paper_table.along(paper_table.gather(folder))
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, metric in zip(panels, ("recon_mse", "identity", "fid"), strict=True):
        for label, points in lines.items():
            epochs = [epoch for epoch, row in points.items() if epoch and f"eval/{metric}" in row]
            values = [points[epoch][f"eval/{metric}"] for epoch in epochs]
            axes.plot(epochs, values, "o-", markersize=4, label=label)
        axes.set(xscale="log", yscale="linear" if metric == "identity" else "log")
        axes.set(xlabel="epoch", ylabel=table.NAMES[metric])
        axes.grid(alpha=0.3)
    names = panels[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=5, fontsize=9)
    figure.suptitle("What gets clean, and when (MNIST, DW, first seed)")
    return figure


def table1(folder):
    """Our accuracies and those of table 1 of the paper."""
    found = paper_table.select(paper_table.gather(folder), paper_table.METHODS)
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    longest = max(max(lengths, default=0) for lengths in found.values())
    for i, axes in enumerate(figure.subplots(2, 4, sharey=True).flat):
        length = ("short", "long")[i // 4]
        kind, split = paper_table.COLUMNS[i % 4]
        for y, (key, lengths) in enumerate(found.items()):
            paper = paper_table.PAPER[paper_table.METHODS[key][0]]
            axes.plot(paper[i // 4][i % 4], y, "k|", markersize=14)
            for epochs, splits in lengths.items():
                runs = splits.get(split, {}).values()
                values = [run[f"eval/{kind}_acc_{length}"] for run in runs]
                style = {"mfc": "none", "color": "C0", "markersize": 3 + 5 * epochs / longest}
                axes.plot(values, [y for _ in values], "o", **style)
        axes.set_yticks(range(len(found)), [label for _, label in paper_table.METHODS.values()])
        axes.set_title(f"{paper_table.CLASSIFIERS[kind]}, {length}, {split.upper()}")
        axes.set_xlabel("accuracy, %")
        axes.grid(alpha=0.3)
    axes.invert_yaxis()
    figure.suptitle(
        "Table 1 of the paper (bars) and our runs (circles; the larger, the more epochs)"
    )
    return figure


FIGURES = {
    "linear_ablation": (linear_ablation, "assets"),
    "gan_losses": (gan_losses, "assets"),
    "clean": (clean, "results/paper_table"),
    "table": (table1, "results/paper_table"),
}


def main(name, folder):
    make, home = FIGURES[name]
    path = (folder or ROOT / home) / f"{name}.png"
    figure = make(folder or ROOT / "results")
    how = {"format": "png", "dpi": 130, "bbox_inches": "tight"}
    write_file(path, lambda temporary: figure.savefig(temporary, **how))
    print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = fail
    parser.add_argument("names", nargs="+", choices=tuple(FIGURES), metavar="NAME")
    parser.add_argument("--runs", type=Path, help="a folder of runs (default: results)")
    options = parser.parse_args()
    for name in options.names:
        main(name, options.runs)
