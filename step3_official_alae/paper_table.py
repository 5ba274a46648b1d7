"""Table 1 of ALAE (arXiv 2004.04467) on MNIST from this repository's runs, next to the paper's.

1-NN (L2) and a linear SVM on short features, E(x) (50-d), and long ones, the activations before E's
last layer (1024-d). SW, same writers: a sixth of the training images is held out; DW, different
writers: the official test images (§6.1).

    python results/sweep.py step3_official_alae/sweeps/table1_*.yaml --workers 2
    python step3_official_alae/paper_table.py runs        # the tables of the runs below a folder
    python step3_official_alae/paper_table.py             # renew results/paper_table, from results

Expect: a 1-NN and SVM accuracy for each method of the paper, each with its epochs and seeds.

Deviations from the paper:
 1. Its five trials' number of epochs is not published (the official configuration has 400 to 600).
 2. The classifiers, assets/classifiers.py: exact 1-NN, liblinear's SVM (C = 0.02) to the optimum.
 3. SW is one partition for all seeds; the paper's trials vary it, as far as one can tell.
 4. Which branch of the official code made the table is not known: here are several ways to ALAE.
"""

import argparse
import csv
import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

VAE_GAN = "width 0.25, image_size 32, pad True, precision bf16"
METHODS = {  # (experiment, setting or, after 0 epochs, "untrained"): (the paper's row, ours)
    ("autoencoder_mnist", "loss l1"): ("AE(l1)", "AE(l1)"),
    ("autoencoder_mnist", ""): ("AE(l2)", "AE(l2)"),
    ("latent_regressor_mnist", ""): ("LR", "LR"),
    ("latent_regressor_mnist", "joint True"): ("JLR", "JLR"),
    ("bigan_mnist", ""): ("BiGAN", "BiGAN"),
    ("train_fc_alae", ""): ("ALAE", "ALAE, official setting"),
    ("train_fc_alae", "precision bf16"): ("ALAE", "ALAE, official setting, bf16"),
    ("alae_mnist", ""): ("ALAE", "ALAE, from the paper's text"),
    ("train_fc_alae", "preset fast"): ("ALAE", "ALAE, preset fast"),
    ("train_fc_alae", "preset fast, precision bf16"): ("ALAE", "ALAE, preset fast, bf16"),
    ("train_fc_alae", "preset clean"): ("ALAE", "ALAE, preset clean"),
    ("refit_encoder", "trained clean"): ("ALAE", "ALAE, clean for 40, then E alone"),
    ("train_fc_alae", "preset signed"): ("ALAE", "ALAE, preset signed"),
    ("train_fc_alae", "preset long"): ("ALAE", "ALAE, preset long"),
    ("aae_freiburg", "preset ours"): ("", "AAE"),
    ("vae_gan", VAE_GAN): ("", "VAE-GAN, ¼ of the width, padded"),
    ("raw_pixels", "untrained"): ("", "raw pixels"),
    ("train_fc_alae", "untrained"): ("", "untrained encoder of ALAE"),
}
COLUMNS = ("knn", "sw"), ("svm", "sw"), ("knn", "dw"), ("svm", "dw")
PAPER = {  # short and long features, of each of the COLUMNS
    "AE(l1)": ((97.15, 88.71, 96.84, 89.78), (97.43, 97.27, 96.80, 97.72)),
    "AE(l2)": ((97.52, 88.78, 97.05, 89.78), (97.37, 97.23, 96.77, 97.72)),
    "LR": ((92.79, 89.74, 91.90, 90.03), (97.28, 97.56, 96.69, 97.80)),
    "JLR": ((92.54, 89.23, 91.97, 90.82), (97.02, 97.19, 96.45, 97.62)),
    "BiGAN": ((95.83, 90.52, 95.38, 91.34), (97.14, 97.59, 96.81, 97.74)),
    "ALAE": ((93.79, 93.47, 94.59, 94.23), (97.61, 98.20, 97.47, 98.64)),
}
IMAGES = {"recon_mse": ("test MSE", 4), "identity": ("identity %", 1), "fid": ("LeNet-FID", 1)}
DRAWN = "AE(l2)", "BiGAN", "ALAE"  # in clean.md and assets/clean.png
# AE(l1) is much like AE(l2), signed like long; clean followed fast; the official setting ran longer
# in bf16; the rest make room for what ALAE is measured against
NOT_IN_FRONT = (
    "AE(l1)",
    "LR",
    "JLR",
    "ALAE, official setting",
    "ALAE, preset fast",
    "ALAE, preset fast, bf16",
    "ALAE, preset signed",
    "untrained encoder of ALAE",
)
EPOCHS = 5, 10, 20, 25, 40, 50, 75, 100, 200, 400, 600  # columns of clean.md


def summaries(folder):
    """Those of the finished runs below a folder, or of the kept ones in one like results/, with the
    path of their metrics along the training."""
    found = []
    for path in sorted(folder.rglob("summary.json")) or sorted(folder.rglob("*.json")):
        try:
            summary = json.loads(path.read_text())
        except ValueError:
            print(f"{path}: not readable, left out", file=sys.stderr)
            continue
        name = "metrics.csv" if path.name == "summary.json" else f"{path.stem}.csv"
        if isinstance(summary, dict) and summary.get("status") == "done":
            evaluated = re.search(r"--eval[= ](\S+)", summary["commands"][-1])
            if evaluated:  # no training of its own
                words = [summary["setting"], f"--eval {Path(evaluated[1]).name}"]
                summary["setting"] = ", ".join(word for word in words if word)
            found.append(summary | {"metrics_csv": path.with_name(name)})
    return found


def gather(folder):
    """{method: {epochs: {split: {seed: summary}}}} of the runs on MNIST."""
    groups = {method: {} for method in METHODS}
    found = [run for run in summaries(folder) if run["dataset"] == "mnist" and "epochs" in run]
    for run in sorted(found, key=lambda run: run["epochs"]):
        method = run["experiment"], run["setting"] if run["epochs"] else "untrained"
        if method in METHODS and "eval/knn_acc_short" in run:
            splits = groups[method].setdefault(run["epochs"], {})
            splits.setdefault(run["split"], {})[run["seed"]] = run  # the last, as in table.py
    return groups


def mean_std(values, digits):
    """mean ± standard deviation (n − 1)."""
    text = f"{statistics.fmean(values):{digits}}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):{digits}}"
    return text


def cell(runs, metric, digits=2, with_std=True):
    """mean ± std, or the mean alone, over the runs that have the metric; – if none has."""
    values = [run[metric] for run in runs if metric in run]
    if not values:
        return "–"
    return mean_std(values if with_std else [statistics.fmean(values)], f".{digits}f")


def markdown(lines):
    """A table of lines, lists of cells, the first of which is its head."""
    lines = [lines[0], ["---" for _ in lines[0]], *lines[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def superseded(epochs, lengths):
    """Whether a longer training of the method has as many seeds on each split."""
    seeds = {split: len(runs) for split, runs in lengths[epochs].items() if split != "val"}
    longer = [splits for other, splits in lengths.items() if other > epochs]
    return any(all(len(splits.get(k, ())) >= n for k, n in seeds.items()) for splits in longer)


def table(groups, features):
    """Ours below the paper's, in the paper's order; features: short or long."""
    lines = [["", "epochs", "seeds", "1-NN SW", "SVM SW", "1-NN DW", "SVM DW"]]
    for method, (paper, label) in METHODS.items():
        if paper:
            numbers = PAPER[paper][("short", "long").index(features)]
            line = [f"**{paper}**, paper", "", "5", *(f"{number:.2f}" for number in numbers)]
            if line not in lines:
                lines.append(line)
        for epochs, splits in groups[method].items():
            if superseded(epochs, groups[method]):
                continue
            seeds = [str(len(splits[split])) for split in ("sw", "dw") if split in splits]
            cells = []
            for kind, split in COLUMNS:
                runs = splits.get(split, {}).values()
                cells.append(cell(runs, f"eval/{kind}_acc_{features}"))
            if set(cells) != {"–"}:
                lines.append([label, str(epochs), ", ".join(seeds), *cells])
    return markdown(lines)


def full_table(groups):
    """table.md."""
    text = "Accuracy in %, mean ± standard deviation over seeds. Column seeds: how many on SW, "
    text += "on DW; one number if only one of the two was run. A length is left out if a longer "
    text += "one has as many seeds. Short features, E(x):\n\n"
    text += f"{table(groups, 'short')}\nLong features, the activations before E's last layer:\n\n"
    return text + table(groups, "long")


def front_table(groups):
    """front.md: means over the longest runs of a method, on DW; bold: the paper's or more."""
    head = ["DW", "epochs", "seeds", "1-NN short, paper", "ours", "SVM short, paper", "ours"]
    lines = [[*head, *(name for name, _ in IMAGES.values())]]
    for method, (paper, label) in METHODS.items():
        lengths = [epochs for epochs, splits in groups[method].items() if "dw" in splits]
        if not lengths or label in NOT_IN_FRONT:
            continue
        runs = groups[method][lengths[-1]]["dw"].values()
        line = [label, str(lengths[-1]), str(len(runs))]
        for place, kind in ((2, "knn"), (3, "svm")):
            published = f"{PAPER[paper][0][place]:.2f}" if paper else "–"
            ours = cell(runs, f"eval/{kind}_acc_short", with_std=False)
            reached = paper and float(ours) >= float(published)
            line += [published, f"**{ours}**" if reached else ours]
        for metric, (_, digits) in IMAGES.items():
            line.append(cell(runs, f"eval/{metric}", digits, with_std=False))
        lines.append(line)
    return markdown(lines)


def along(groups):
    """{label: {epoch: metrics}} on DW, first seed: along the longest run that kept its metrics, and
    at the ends of longer ones."""
    lines = {}
    for method, (paper, label) in METHODS.items():
        points = {}
        for epochs, splits in groups[method].items():
            refitted = method[0] == "refit_encoder"  # its epochs are of E alone
            if "dw" in splits and paper in DRAWN and not refitted:
                run = splits["dw"][min(splits["dw"])]
                rows = read_rows(run["metrics_csv"])
                if any("eval/fid" in row for row in rows.values()):
                    points = {}  # no shorter runs: their learning rate may fall sooner
                points = rows | points | {epochs: run}
        if points:
            lines[label] = dict(sorted(points.items()))
    return lines


def read_rows(path):
    """{epoch: {metric: value}} of a metrics.csv, or nothing."""
    rows = {}
    for row in csv.DictReader(path.read_text().splitlines() if path.exists() else []):
        rows[int(row["epoch"])] = {name: float(value) for name, value in row.items() if value}
    return rows


def clean_table(groups):
    """clean.md: what is clean after so many epochs."""
    lines = along(groups)
    epochs = [epoch for epoch in EPOCHS if any(epoch in points for points in lines.values())]
    rows = [["", "after epochs", *map(str, epochs)]]
    for label, points in lines.items():
        for metric, (name, digits) in IMAGES.items():
            cells = [cell([points.get(epoch, {})], f"eval/{metric}", digits) for epoch in epochs]
            rows.append([label, name, *cells])
    return markdown(rows)


TABLES = {"front": front_table, "table": full_table, "clean": clean_table}


def main(folder):
    groups = gather(folder or shared.ROOT / "results")
    if not any(groups.values()):
        shared.fail(f"no finished run below {folder or 'results'} whose setting is among METHODS")
    for name, make in TABLES.items():
        if folder:
            print(f"## {name}\n\n{make(groups)}")
        else:
            (shared.ROOT / f"results/paper_table/{name}.md").write_text(make(groups))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = shared.fail
    parser.add_argument(
        "folder", nargs="?", type=Path, help="of runs (default: renew results/paper_table)"
    )
    main(parser.parse_args().folder)
