"""Table 1 of ALAE (arXiv 2004.04467) on MNIST from this repository's runs, next to the paper's.

1-NN (L2) and a linear SVM on short features, E(x) (50-d), and long ones, the activations before E's
last layer (1024-d). SW, same writers: a sixth of the training images is held out; DW, different
writers: the official test images (§6.1). What is trained is trained by sweeps:

    python results/sweep.py step3_official_alae/sweeps/table1_*.yaml --workers 2
    python step3_official_alae/paper_table.py runs        # the tables of the runs below a folder
    python step3_official_alae/paper_table.py             # renew results/paper_table, from results

Expect: a 1-NN and SVM accuracy for each method of the paper, each with its epochs and seeds.

Deviations from the paper:
 1. Its five trials' number of epochs is not published (the official configuration has 400 to 600).
 2. The classifiers are shared.py's: exact 1-NN, and liblinear's SVM (C = 0.02) to the optimum.
 3. SW is one partition for all seeds; the paper's trials vary it, as far as one can tell.
 4. Which branch of the official code made the table is not known: here are three ways to ALAE.
"""

import csv
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

METHODS = {  # (experiment, setting): (the paper's row, ours)
    ("autoencoder_mnist", "loss l1"): ("AE(l1)", "AE(l1)"),
    ("autoencoder_mnist", ""): ("AE(l2)", "AE(l2)"),
    ("latent_regressor_mnist", ""): ("LR", "LR"),
    ("latent_regressor_mnist", "joint True"): ("JLR", "JLR"),
    ("bigan_mnist", ""): ("BiGAN", "BiGAN"),
    ("train_fc_alae", ""): ("ALAE", "ALAE, official setting"),
    ("alae_mnist", ""): ("ALAE", "ALAE, from the paper's text"),
    ("train_fc_alae", "preset fast"): ("ALAE", "ALAE, preset fast"),
}
COLUMNS = ("knn", "sw"), ("svm", "sw"), ("knn", "dw"), ("svm", "dw")
CLASSIFIERS = {"knn": "1-NN", "svm": "SVM"}
PAPER = {  # short and long features, of each of the COLUMNS
    "AE(l1)": ((97.15, 88.71, 96.84, 89.78), (97.43, 97.27, 96.80, 97.72)),
    "AE(l2)": ((97.52, 88.78, 97.05, 89.78), (97.37, 97.23, 96.77, 97.72)),
    "LR": ((92.79, 89.74, 91.90, 90.03), (97.28, 97.56, 96.69, 97.80)),
    "JLR": ((92.54, 89.23, 91.97, 90.82), (97.02, 97.19, 96.45, 97.62)),
    "BiGAN": ((95.83, 90.52, 95.38, 91.34), (97.14, 97.59, 96.81, 97.74)),
    "ALAE": ((93.79, 93.47, 94.59, 94.23), (97.61, 98.20, 97.47, 98.64)),
}
IMAGES = {"recon_mse": 4, "identity": 1, "fid": 1}  # digits
UNDRAWN = "AE(l1)", "LR", "JLR"  # in clean.md
REFERENCES = {"pixels": "raw pixels", "untrained": "untrained encoder of ALAE"}
MEASURES = {
    "recon_mse": "test MSE",
    "identity": "identity %",
    "fid": "LeNet-FID",
    "knn_acc_short": "1-NN short",
    "knn_acc_long": "1-NN long",
    "svm_acc_short": "SVM short",
    "svm_acc_long": "SVM long",
}


def gather(folder):
    """Summaries of the finished runs on MNIST below a folder of runs, or kept in one like results/,
    each with the path of its metrics along the training."""
    found = []
    for path in sorted(folder.rglob("summary.json")) or sorted(folder.rglob("*.json")):
        summary = json.loads(path.read_text())
        rows = path.with_suffix(".csv")
        if path.name == "summary.json":
            rows = path.with_name("metrics.csv")
        if summary["status"] == "done" and summary["dataset"] == "mnist":
            found.append(summary | {"rows": rows})
    return found


def select(found, keys):
    """{key: {epochs: {split: {seed: run}}}} of the runs whose (experiment, setting) is in keys."""
    groups = {key: {} for key in keys}
    for run in sorted(
        found, key=lambda run: "--eval " in run["commands"][-1]
    ):  # last, so as not to
        key = run["experiment"], run["setting"]  # count twice what was only evaluated once more
        if key in groups:
            splits = groups[key].setdefault(run["epochs"], {})
            splits.setdefault(run["split"], {}).setdefault(run["seed"], run)
    return {key: dict(sorted(lengths.items())) for key, lengths in groups.items()}


def cell(runs, name, digits=2, spread=True):
    """mean ± std over seeds; or the mean alone."""
    values = [run[name] for run in runs.values() if name in run]
    if not values:
        return "–"
    text = f"{statistics.fmean(values):.{digits}f}"
    if spread and len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


def markdown(lines):
    lines = [lines[0], ["---" for _ in lines[0]], *lines[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(found, length):
    """Ours below the paper's, in the paper's order; length: of features, short or long."""
    names = [f"{CLASSIFIERS[kind]} {split.upper()}" for kind, split in COLUMNS]
    lines = [["", "epochs", "seeds", *names]]

    def add(label, epochs, splits, section):
        seeds = [str(len(splits[split])) for split in ("sw", "dw") if split in splits]
        keys = [(split, f"{section}/{kind}_acc_{length}") for kind, split in COLUMNS]
        cells = [cell(splits.get(split, {}), key) for split, key in keys]
        lines.append([label, str(epochs), ", ".join(seeds), *cells])

    shown = set()
    for key, lengths in select(found, METHODS).items():
        paper, label = METHODS[key]
        if paper not in shown:
            numbers = PAPER[paper][("short", "long").index(length)]
            lines.append([f"**{paper}**, paper", "", "5", *(f"{n:.2f}" for n in numbers)])
            shown.add(paper)
        for epochs, splits in lengths.items():
            if splits.keys() & {"sw", "dw"}:
                add(label, epochs, splits, "eval")
    for section, label in REFERENCES.items():
        splits = references(found, section)
        if splits and (section, length) != ("pixels", "long"):
            add(label, 0, splits, section)
    return markdown(lines)


def references(found, section):
    """{split: {seed: run}} of the official ALAE's runs that measured raw pixels, or E untrained."""
    splits = {}
    for run in found:
        official = run["experiment"] == "train_fc_alae" and run["setting"] == ""
        if official and f"{section}/svm_acc_short" in run:
            splits.setdefault(run["split"], {})[run["seed"]] = run
    return splits


def full_table(found):
    """table.md."""
    head = "Accuracy in %, mean ± standard deviation over seeds (SW, DW)."
    text = f"{head} Short features, E(x):\n\n{table(found, 'short')}\n"
    return f"{text}Long features, the activations before E's last layer:\n\n{table(found, 'long')}"


def front_table(found):
    """front.md: means over the longest runs of each method, on DW."""
    head = ["DW", "epochs", "seeds", "1-NN short, paper", "ours", "SVM short, paper", "ours"]
    lines = [[*head, "test MSE", "identity %", "LeNet-FID"]]

    def add(label, epochs, runs, section, paper):
        line = [label, str(epochs), str(len(runs))]
        line += [paper[2], cell(runs, f"{section}/knn_acc_short", spread=False)]
        line += [paper[3], cell(runs, f"{section}/svm_acc_short", spread=False)]
        images = [cell(runs, f"{section}/{name}", n, spread=False) for name, n in IMAGES.items()]
        lines.append(line + images)

    for key, lengths in select(found, METHODS).items():
        epochs = [number for number, splits in lengths.items() if "dw" in splits]
        if epochs:
            paper = [f"{number:.2f}" for number in PAPER[METHODS[key][0]][0]]
            add(METHODS[key][1], epochs[-1], lengths[epochs[-1]]["dw"], "eval", paper)
    for section, label in REFERENCES.items():
        if "dw" in references(found, section):
            add(label, 0, references(found, section)["dw"], section, ["–"] * 4)
    return markdown(lines)


def ablation(found):
    """ablation.md: a line for each preset of train_fc_alae.py that is a change, on val."""
    settings = {run["setting"] for run in found if run["setting"].startswith("preset rate")}
    keys = [("train_fc_alae", setting) for setting in sorted(settings)]
    lines = [["change", "epochs", "seeds", *MEASURES.values()]]
    for (_, setting), lengths in select(found, keys).items():
        for epochs, splits in lengths.items():
            runs = splits.get("val", {})
            cells = [cell(runs, f"eval/{m}", 4 if m == "recon_mse" else 2) for m in MEASURES]
            if runs:
                lines.append([setting.removeprefix("preset "), str(epochs), str(len(runs)), *cells])
    return f"{markdown(lines)}\nPresets of train_fc_alae.py, on validation images.\n"


def along(found):
    """{label: {epoch: metrics}} on DW of the methods that draw, first seed: along the longest run
    that kept its metrics, and at the ends of all."""
    lines = {}
    for key, lengths in select(found, METHODS).items():
        points, ends = {}, {}
        for epochs, splits in lengths.items():
            if "dw" in splits:
                run = splits["dw"][min(splits["dw"])]
                ends[epochs] = run
                if run["rows"].exists():
                    points = read_rows(run["rows"])
        # of shorter runs only where the longest did not look: their learning rate may fall sooner
        looked = any("eval/fid" in row for row in points.values())
        for epochs, run in ends.items():
            if not looked or epochs >= max(points):
                points[epochs] = run
        if points and METHODS[key][1] not in UNDRAWN:
            lines[METHODS[key][1]] = dict(sorted(points.items()))
    return lines


def read_rows(path):
    """{epoch: {metric: value}} of a metrics.csv."""
    rows = {}
    with open(path) as file:
        for row in csv.DictReader(file):
            rows[int(row["epoch"])] = {name: float(text) for name, text in row.items() if text}
    return rows


def clean(found):
    """clean.md: what is clean after so many epochs."""
    lines, epochs = along(found), set()
    for points in lines.values():
        epochs |= {epoch for epoch, row in points.items() if "eval/fid" in row}
    epochs = sorted(epochs & {1, 2, 3, 5, 10, 20, 25, 40, 50, 60, 80, 100, 200, 400, 600})
    text = [["", "after epochs", *map(str, epochs)]]
    for label, points in lines.items():
        for name, n in IMAGES.items():
            cells = [cell({0: points.get(epoch, {})}, f"eval/{name}", n) for epoch in epochs]
            text.append([label, MEASURES[name], *cells])
    return markdown(text)


TABLES = {"front": front_table, "table": full_table, "clean": clean, "ablation": ablation}


def main(arguments):
    if arguments:
        found = []
        for folder in arguments:
            found += gather(Path(folder))
        if not found:
            shared.fail(f"no finished run below {' '.join(arguments)}")
        print("\n".join(make(found) for make in TABLES.values()))
        return
    found = gather(shared.ROOT / "results")
    for name, make in TABLES.items():
        path = shared.ROOT / f"results/paper_table/{name}.md"
        path.write_text(make(found))
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
