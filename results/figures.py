"""Figures of studies, from finished runs: those kept in results/, or those below a folder.

    python results/figures.py linear_ablation                  # writes assets/linear_ablation.png
    python results/figures.py gan_losses --runs runs           # of your own: runs/gan_losses.png

Runs of a sweep are known by their names, which begin with the file's: ablation-no-decay-seed0.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "step3_official_alae"))
from shared import ROOT, Protocol, fail, load_data

import numpy as np
import paper_table
import table
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch.nn.functional import interpolate, pad


def study(folder, experiment, sweep):
    """{setting: {seed: {metric: value}}} of a sweep's runs."""
    settings = {}
    for run in table.summaries(folder):
        name = re.match(f"{sweep}-(.*)-seed([0-9]+)$", run["run"])
        if name and run["experiment"] == experiment and run["dataset"] == "mnist":
            metrics = {key.rpartition("/")[2]: value for key, value in run.items()}
            settings.setdefault(name[1], {})[int(name[2])] = metrics
    if not settings:
        fail(f"no finished run {sweep}-… below {folder}: run the sweep")
    return settings


def dots(axes, found, metric, xlabel, colored=False):
    """A row of dots for each {label: {seed: run}}, on a logarithmic scale."""
    for i, seeds in enumerate(found.values()):
        color = f"C{i}" if colored else "C0"
        numbers = [run[metric] for run in seeds.values()]
        axes.plot(numbers, [i for _ in numbers], "o", color=color, alpha=0.7)
    axes.set_yticks(range(len(found)), list(found))
    axes.set(xscale="log", xlabel=xlabel)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.invert_yaxis()
    axes.grid(alpha=0.3)


def linear_ablation(folder):
    """What each ingredient of linear ALAE's recipe is for: step1_linear/sweeps/ablation.yaml."""
    worst = {}
    found = study(folder, "linear_alae", "ablation")
    for label, seeds in found.items():
        worst[label] = max(run["ratio_test"] for run in seeds.values())
        for run in seeds.values():
            run["excess"] = max(run["ratio_test"] - 1, 1e-4)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    title = "Linear ALAE, MNIST (val), k = 10, 3,000 steps: one thing changed at a time"
    axes.set_title(title, fontsize=11)
    xlabel = "(MSE / PCA's MSE) − 1, held-out images; at least 0.0001 is shown; a dot a seed"
    found = {label: found[label] for label in sorted(worst, key=worst.get, reverse=True)}
    dots(axes, found, "excess", xlabel)
    names = [f"{label}: nothing changed" if label == "recipe" else label for label in found]
    axes.set_yticklabels(names)
    return figure


def gan_losses(folder):
    """A GAN with each loss, at the end: step2_gan/sweeps/gan_losses.yaml."""
    found = study(folder, "gan_mnist", "gan_losses")
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    *panels, digits = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.5])
    names = {"fid": "LeNet-FID", "grad_norm_G": "norm of G's gradient"}
    names["digit_kl"] = "KL of digits, nats"
    for axes, (metric, name) in zip(panels, names.items(), strict=True):
        dots(axes, found, metric, name, colored=True)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:g}")
        if axes is not panels[0]:
            axes.set_yticklabels([])
    for i, seeds in enumerate(found.values()):
        for seed, run in seeds.items():
            shares = [run[f"digit_{digit}"] for digit in range(10)]
            digits.plot(shares, ".-" if seed == 0 else ".--", color=f"C{i}")
    digits.set(xticks=range(10), xlabel="digit, by LeNet", ylabel="% of the samples")
    digits.set_title("solid: seed 0, dashed: seed 1", fontsize=10)
    digits.grid(alpha=0.3)
    title = "A GAN with different losses: MNIST (dw), 5 epochs, learning rate 0.001, two seeds"
    figure.suptitle(title)
    return figure


def clean(folder):
    """MSE, identity and LeNet-FID along the training."""
    lines = paper_table.along(paper_table.gather(folder))
    if not lines:
        fail(f"no finished run of a method of table 1 below {folder}")
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    ticks = [0.005, 0.01, 0.02, 0.05], range(50, 101, 10), [3, 10, 30, 100, 300]
    for axes, metric, values in zip(panels, paper_table.IMAGES, ticks, strict=True):
        for label, points in lines.items():
            epochs = [epoch for epoch, row in points.items() if epoch and f"eval/{metric}" in row]
            numbers = [points[epoch][f"eval/{metric}"] for epoch in epochs]
            axes.plot(epochs, numbers, "o-", markersize=4, label=label)
        axes.set(xscale="log", yscale="linear" if metric == "identity" else "log")
        axes.set(xlabel="epoch", ylabel=table.NAMES[metric])
        axes.set_xticks([5, 10, 20, 50, 100, 200, 400], [5, 10, 20, 50, 100, 200, 400])
        axes.set_yticks(values, values)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    names = panels[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle("What gets clean, and when (MNIST, dw, seed 0)")
    return figure


def official_length(folder):
    """SVM on short features along the official setting, seed 0, with the lines that foretold it."""
    found = {"": {}, "precision bf16": {}}  # {setting: {epochs: accuracy}}
    for run in table.summaries(folder):
        where = run["experiment"], run["dataset"], run["split"], run["seed"]
        setting = re.sub("(, )?--eval.*", "", run["setting"])
        if where == ("train_fc_alae", "mnist", "dw", 0) and setting in found and run["epochs"]:
            found[setting][run["epochs"]] = run["eval/svm_acc_short"]
    fp32, bf16 = found.values()
    if len(fp32) < 2 or not bf16:
        fail(f"{folder}: needs runs of the official setting, two lengths in fp32 and one in bf16")
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="epochs", ylabel="SVM short, %")
    axes.plot(list(fp32), list(fp32.values()), "o", label="fp32")
    axes.plot(list(bf16), list(bf16.values()), "s", label="bf16")
    until_200 = fp32 | {epochs: svm for epochs, svm in bf16.items() if epochs <= 200}
    lines = {"fp32": (fp32, "C0--"), "all until 200 epochs": (until_200, "k:")}
    for name, (points, style) in lines.items():
        slope, offset = np.polyfit(np.log(list(points)), list(points.values()), 1)
        at_400 = slope * np.log(400) + offset
        epochs = np.array([min(points), 600])
        label = f"line through {name}: {at_400:.1f} at 400"
        axes.plot(epochs, slope * np.log(epochs) + offset, style, label=label)
    paper = paper_table.PAPER["ALAE"][0][3]
    axes.axhline(paper, color="0.5", linewidth=1, label=f"the paper: {paper}")
    axes.set_xticks([20, 40, 100, 200, 400, 600], [20, 40, 100, 200, 400, 600])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    axes.set_title("The official setting (MNIST, dw, seed 0)", fontsize=11)
    return figure


def official_resampling(_):
    """What the official main branch makes of MNIST on its way to E, and of G's outputs."""
    data = load_data(Protocol(), torch.device("cpu"))
    x = torch.cat([data.images(data.x_test[data.y_test == digit][:1]) for digit in range(8)])
    x_main = interpolate(pad(x, (2, 2, 2, 2)), 28)  # its data set's 32×32, then E's first line
    outputs = torch.ones(1, 1, 28, 28, requires_grad=True)
    interpolate(interpolate(outputs, 32), 28).sum().backward()  # G's last line, E's first
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[4, 1.2])
    rows = [torch.cat(list(images[:, 0]), 1) for images in (x, x_main)]
    left.imshow(torch.cat(rows).numpy(), cmap="gray", interpolation="nearest")
    left.set_xticks([])
    left.set_yticks([14, 42], ["mnist_ref", "main"])
    left.set_title("what E sees")
    uses = right.imshow(outputs.grad[0, 0].numpy(), cmap="gray", vmin=0)
    figure.colorbar(uses, ax=right, ticks=[0, 1, 2, 4], label="times used")
    dead = int((outputs.grad == 0).sum())
    right.set_title(f"main: {dead} of G's 784\noutputs get no gradient", fontsize=10)
    return figure


FIGURES = {
    "official_resampling": official_resampling,
    "linear_ablation": linear_ablation,
    "gan_losses": gan_losses,
    "clean": clean,
    "official_length": official_length,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = fail
    kwargs = {"choices": tuple(FIGURES), "metavar": "NAME", "help": ", ".join(FIGURES)}
    parser.add_argument("names", nargs="+", **kwargs)
    parser.add_argument("--runs", type=Path, help="a folder of runs (default: results)")
    options = parser.parse_args()
    if options.runs and not options.runs.is_dir():
        fail(f"--runs {options.runs}: no such folder")
    for name in options.names:
        figure = FIGURES[name](options.runs or ROOT / "results")
        path = (options.runs or ROOT / "assets") / f"{name}.png"
        figure.savefig(path, dpi=130, bbox_inches="tight")
        print(path)
