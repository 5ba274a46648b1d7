"""Table 1 of ALAE (arXiv 2004.04467) on MNIST from this repository's own runs, next to the paper's, cell by cell.

1-NN (L2) and a linear SVM on short features, E(x) (50-d), and long ones, the activations before E's last layer (1024-d).
SW, same writers: a sixth of the training images is held out; DW, different writers: the official test images. Protocol and
figures are the paper's (§6.1, table 1, means over five trials). Nothing is trained here: the experiment files are, as
subprocesses, with their defaults at the same number of epochs. Each run is kept in OUT_DIR/paper_table; what is finished
there is skipped and what was stopped is gone on with, so this may be killed at any moment and started again.

    python step3_official_alae/paper_table.py                                      # one seed: about 2.5 hours
    python step3_official_alae/paper_table.py --quick                              # 3 epochs, DW: 9.4 minutes on two cores
    python step3_official_alae/paper_table.py --seeds 0 1 2 3 4 --epochs 400       # the paper's length
    python step3_official_alae/paper_table.py --methods alae_fast --epochs 60      # a row more
    python step3_official_alae/paper_table.py --ablate --epochs 10                 # the choices that the paper leaves open, on val

Result to expect: results/paper_table/table.md, ablation.md and clean.md, which this file writes from all the runs that it
finds in its folder, each row with its epochs and seeds.

Deviations from the paper:
 1. Its five trials' number of epochs is not published (the official configuration has 400 to 600); rows here name theirs.
 2. The classifiers are those of shared.py: exact 1-NN, and liblinear's SVM (C = 0.02) solved to the optimum.
 3. Which branch of the official code made the table is not known: ALAE here is train_fc_alae.py by default, its recipe fast,
    and alae_mnist.py, written from the paper's text.
"""
import csv
import fcntl
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

FC = "step3_official_alae/train_fc_alae.py"
METHODS = {  # our name: (the paper's row, file, options, the same as a summary's "setting")
    "l1": ("AE(l1)", "step2_gan/autoencoder_mnist.py", "--loss l1", "loss l1"),
    "l2": ("AE(l2)", "step2_gan/autoencoder_mnist.py", "", ""),
    "lr": ("LR", "step2_gan/latent_regressor_mnist.py", "", ""),
    "jlr": ("JLR", "step2_gan/latent_regressor_mnist.py", "--joint", "joint True"),
    "bigan": ("BiGAN", "step2_gan/bigan_mnist.py", "", ""),
    "alae": ("ALAE", FC, "", ""),
    "alae_paper": ("ALAE", "step2_gan/alae_mnist.py", "", ""),
    "alae_fast": ("ALAE", FC, "--recipe fast", "recipe fast")}
LABELS = {"alae": "ALAE, official setting", "alae_paper": "ALAE, from the paper's text", "alae_fast": "ALAE, recipe fast"}
COLUMNS = [(kind, split) for split in ("sw", "dw") for kind in ("knn", "svm")]
PAPER = {  # short, long for each of the COLUMNS
    "AE(l1)": ((97.15, 97.43), (88.71, 97.27), (96.84, 96.80), (89.78, 97.72)),
    "AE(l2)": ((97.52, 97.37), (88.78, 97.23), (97.05, 96.77), (89.78, 97.72)),
    "LR": ((92.79, 97.28), (89.74, 97.56), (91.90, 96.69), (90.03, 97.80)),
    "JLR": ((92.54, 97.02), (89.23, 97.19), (91.97, 96.45), (90.82, 97.62)),
    "BiGAN": ((95.83, 97.14), (90.52, 97.59), (95.38, 96.81), (91.34, 97.74)),
    "ALAE": ((93.79, 97.61), (93.47, 98.20), (94.59, 97.47), (94.23, 98.64))}
BASE = "--lr 0.008 --batch-size 64 --decay 0.5"
ABLATION = {  # changes to BASE, in the order in which they were tried; its first run is named for what it was then
    "chosen": "", "critic-mlp": "--critic mlp", "output-bounded": "--output bounded", "slope-0.01": "--slope 0.01",
    "input-11": "--input-range 11", "bounded-identity": "--output bounded --mapping identity",
    "bounded-err-0.1-lr-0.016": "--output bounded --err-weight 0.1 --lr 0.016",
    "bounded-err-0.1": "--output bounded --err-weight 0.1",
    "bounded-err-0.1-raw": "--output bounded --err-weight 0.1 --eval-weights raw"}
MEASURES = {"recon_mse": "test MSE", "identity": "identity %", "fid": "LeNet-FID", "knn_acc_short": "1-NN short",
            "knn_acc_long": "1-NN long", "svm_acc_short": "SVM short", "svm_acc_long": "SVM long"}


@dataclass
class Config(shared.Protocol):
    seeds: tuple = option((0,), "seeds of each method (paper: five trials)", low=0)
    epochs: int = option(40, "passes over the training images, for every method (official: 400 to 600)", low=1)
    methods: tuple = option(tuple(METHODS), "rows of the table", choices=tuple(METHODS))
    splits: tuple = option(("dw", "sw"), "columns of the table", choices=("dw", "sw"))
    workers: int = option(2, "trainings at a time; the CPU's cores are shared among them", low=1)
    ablate: bool = option(False, "train the ablation on val instead")
    quick: bool = option(False, "a first look: 3 epochs, DW")
    recipes = {("quick", True): {"epochs": 3, "splits": ("dw",)}}


def jobs(config):
    """{run's name: (file, options)} of all that is to be trained."""
    if config.ablate:
        return {f"ablate-{name}-seed{seed}-e{config.epochs}": (FC, f"--split val --seed {seed} {BASE} {more}")
                for seed in config.seeds for name, more in ABLATION.items()}
    return {f"{method}-{split}-seed{seed}-e{config.epochs}": (
        METHODS[method][1], f"--split {split} --seed {seed} {METHODS[method][2]}"
        + " --references" * (method == "alae" and seed == config.seeds[0]))
        for seed in config.seeds for split in config.splits for method in config.methods}


def done(run):
    """The summary of a finished run, or None."""
    try:
        summary = json.loads((run / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if summary.get("status") == "done" else None


STOP = threading.Event()


def train(job, config, folder):
    """Trains one job in the folder, or goes on with it, unless it is done. Returns what went wrong, if anything."""
    name, (file, options) = job
    run, command = folder / Path(file).stem / name, [sys.executable, shared.ROOT / file, "--epochs", str(config.epochs)]
    command += ["--device", config.device, "--matmul", config.matmul] + ["--data-dir", config.data_dir] * bool(config.data_dir)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // config.workers))}
    with open(folder / f"{name}.log", "a") as log:
        while not STOP.is_set():  # the training holds this lock, even if the driver that started it was killed
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                STOP.wait(1)
        if STOP.is_set() or done(run):
            return ""
        if (checkpoint := run / "checkpoint.pt").exists():
            command += ["--resume", checkpoint]
        else:
            shutil.rmtree(run, ignore_errors=True)  # stopped before its first epoch was over
            command += [*options.split(), "--out-dir", folder, "--run-name", name] + ["--smoke"] * config.smoke
        print(f"{name}: {'goes on' if checkpoint.exists() else 'starts'}, see {log.name}", flush=True)
        code = subprocess.run(command + ["--wandb"] * config.wandb, stdout=log, stderr=subprocess.STDOUT,
                              env=threads | os.environ).returncode
    last = Path(log.name).read_text().strip().splitlines()[-1:]
    return f"{name} ended with code {code}: {''.join(last)}" if code else ""


def gather(folder, target):
    """Copies summaries and metrics of the finished runs in the folder to the target."""
    target.mkdir(parents=True, exist_ok=True)
    for run in sorted(path.parent for path in folder.glob("*/*/summary.json")):
        if summary := done(run):
            shared.write(target / f"{run.name}.json", summary)
            if (table := run / "metrics.csv").exists():  # not of --eval
                shared.write(target / f"{run.name}.csv", lambda temporary: temporary.write_bytes(table.read_bytes()))


def runs_of(*folders, smoke=False):
    """{(method, epochs): {split: {seed: summary}}} of the finished runs of METHODS below the folders, and {(change, epochs):
    {seed: summary}} of the ablation's."""
    rows, changes = {}, {}
    for path in sorted({path for folder in folders for path in folder.rglob("*.json")}):
        s = json.loads(path.read_text())
        setting = s.get("setting", "").replace("smoke True", "").strip(", ") if smoke else s.get("setting", "")
        method = next((key for key, (_, file, _, of) in METHODS.items() if s["dataset"] == "mnist"
                       and (Path(file).stem, of) == (s["experiment"], setting)), None)
        if s["status"] == "done" and s["run"].startswith("ablate-"):
            changes.setdefault((s["run"].removeprefix("ablate-").rsplit("-seed", 1)[0], s["epochs"]), {})[s["seed"]] = s
        elif s["status"] == "done" and method and s["split"] != "val":
            rows.setdefault((method, s["epochs"]), {}).setdefault(s["split"], {})[s["seed"]] = s
    return rows, changes


def cell(values):
    """mean ± std of a list, '–' of none."""
    if not values:
        return "–"
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def markdown(lines):
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def table(rows):
    """Ours with the difference to the paper's, in the paper's order; then what of the paper's order of methods holds."""
    lines = [["", "epochs", "seeds", *(f"{'1-NN' if kind == 'knn' else 'SVM'} {split.upper()}" for kind, split in COLUMNS)]]

    def accuracies(splits, section="eval"):
        return [[[s[key] for s in splits.get(split, {}).values() if (key := f"{section}/{kind}_acc_{length}") in s]
                 for length in ("short", "long")] for kind, split in COLUMNS]

    def with_difference(ours, paper):
        if not any(ours):
            return "–"
        return " / ".join(map(cell, ours)) + f" ({' / '.join(f'{statistics.fmean(v) - p:+.2f}' for v, p in zip(ours, paper))})"
    for method, (name, *_) in METHODS.items():
        if method not in LABELS or method == "alae":
            lines.append([f"**{name}**, paper", "", "5", *(f"{a:.2f} / {b:.2f}" for a, b in PAPER[name])])
        for (_, epochs), splits in sorted((item for item in rows.items() if item[0][0] == method)):
            seeds = [str(len(splits[split])) for split in ("sw", "dw") if split in splits]
            lines.append([LABELS.get(method, "ours"), str(epochs), ", ".join(seeds),
                          *map(with_difference, accuracies(splits), PAPER[name])])
    for section, name in (("pixels", "raw pixels"), ("untrained", "untrained encoder of ALAE")):
        found = {split: {s["seed"]: s for (method, _), splits in rows.items() if method == "alae"
                         for s in splits.get(split, {}).values() if f"{section}/svm_acc_short" in s} for split in ("sw", "dw")}
        if any(found.values()):
            lines.append([name, "0", ", ".join(str(len(runs)) for runs in found.values() if runs), *(
                " / ".join(cell(values) for values in cells if values) or "–" for cells in accuracies(found, section))])
    text = markdown(lines) + "\nAccuracy in %, on short / long features (difference to the paper's); mean ± standard deviation over " \
        "several seeds."
    for epochs in sorted({epochs for _, epochs in rows}):
        ours = {METHODS[method][0]: accuracies(splits) for (method, of), splits in rows.items() if of == epochs
                and method not in ("alae_paper", "alae_fast")}
        pairs = [(a, b, c, i) for a in ours for b in ours for c in range(len(COLUMNS)) for i in (0, 1)
                 if PAPER[a][c][i] > PAPER[b][c][i] + 1 and ours[a][c][i] and ours[b][c][i]]
        wrong = [f"{a} above {b} ({lines[0][3 + c]} {('short', 'long')[i]})" for a, b, c, i in pairs
                 if statistics.fmean(ours[a][c][i]) <= statistics.fmean(ours[b][c][i])]
        text += f" At {epochs} epochs {len(pairs) - len(wrong)} of the {len(pairs)} pairs that the paper has more than a point " \
                f"apart are in its order{'; not: ' + ', '.join(wrong) if wrong else ''}." if pairs else ""
    notes = [f"{LABELS.get(method, METHODS[method][0])}: `{s['command']}`, {s['wall_s'] / 60:.0f} minutes on {s['hardware']}, torch "
             f"{s['torch']}" for (method, _), splits in sorted(rows.items()) for _, (s, *_) in
             sorted((split, list(runs.values())) for split, runs in splits.items())]
    return text + "\n\n" + "<br>".join(notes) + "\n"


def ablation(changes):
    """A row for each change to BASE, on validation images."""
    lines = [["change", "epochs", "seeds", *MEASURES.values()]]
    for name, epochs in sorted((key for key in changes if key[0] in ABLATION), key=lambda key: (key[1], list(ABLATION).index(key[0]))):
        runs = changes[name, epochs].values()
        lines.append([f"`{ABLATION[name]}`" if ABLATION[name] else "none", str(epochs), str(len(runs)), *(
            f"{statistics.fmean(s[f'eval/{key}'] for s in runs):.{4 if key == 'recon_mse' else 2}f}" for key in MEASURES)])
    return markdown(lines) + f"\nChanges to `{BASE}`; all else is official. Validation images.\n"


def along(target, rows):
    """{label: {epoch: metrics}} on DW, of the first seed of each method that draws: along the longest run that has its csv in
    the target, and at the ends of all."""
    found = {}
    for (method, epochs), splits in sorted(rows.items()):
        if method not in ("l1", "lr", "jlr") and "dw" in splits:
            points, ends = found.setdefault(LABELS.get(method, METHODS[method][0]), ({}, {}))
            summary = splits["dw"][min(splits["dw"])]
            ends[epochs] = {key: value for key, value in summary.items() if key.startswith("eval/")}
            if (path := target / f"{summary['run']}.csv").exists():
                points.clear()
                with open(path) as file:
                    points |= {int(row["epoch"]): {k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)}
    for points, ends in found.values():  # of shorter runs only where the longest did not look itself: theirs may decay sooner
        old = not any("eval/fid" in row for row in points.values())
        points |= {epoch: row for epoch, row in ends.items() if old or epoch >= max(points)}
    return {label: dict(sorted(points.items())) for label, (points, _) in found.items()}


def clean(lines):
    """MSE / identity / LeNet-FID after so many epochs."""
    form = {"eval/recon_mse": ".4f", "eval/identity": ".1f", "eval/fid": ".1f"}
    epochs = sorted({e for points in lines.values() for e, row in points.items() if e and "eval/fid" in row}
                    & {1, 2, 3, 5, 10, 20, 25, 40, 50, 60, 80, 100, 200, 400, 600})
    return markdown([["MSE / identity % / LeNet-FID after epochs", *map(str, epochs)], *(
        [label, *(" / ".join(f"{row[key]:{form[key]}}" for key in form if key in row) or "–"
                  for row in (points.get(e, {}) for e in epochs))] for label, points in lines.items())])


def draw(rows, lines, target):
    """table.png: our accuracies against the paper's. clean.png: what gets clean along the training."""
    panels = (figure := shared.Figure(figsize=(11, 5.4), layout="constrained")).subplots(2, 4, sharey=True)
    for axes, (i, length, c) in zip(panels.flat, ((i, length, c) for i, length in enumerate(("short", "long")) for c in range(4))):
        kind, split = COLUMNS[c]
        axes.plot([PAPER[name][c][i] for name, *_ in METHODS.values()], range(len(METHODS)), "k|", ms=14)
        for (method, epochs), splits in sorted(rows.items()):
            values = [s[f"eval/{kind}_acc_{length}"] for s in splits.get(split, {}).values()]
            axes.plot(values, [list(METHODS).index(method)] * len(values), "o", mfc="none", color="C0",
                      ms=3 + 5 * epochs / max(e for _, e in rows))
        axes.set_yticks(range(len(METHODS)), [LABELS.get(method, name) for method, (name, *_) in METHODS.items()])
        axes.set(title=f"{'1-NN' if kind == 'knn' else 'SVM'}, {length}, {split.upper()}", xlabel="accuracy, %")
        axes.grid(alpha=0.3)
    panels[0, 0].invert_yaxis()
    figure.suptitle("Table 1 of the paper (bars) and our runs (circles; the larger, the more epochs)")
    panels = (second := shared.Figure(figsize=(11, 3.8), layout="constrained")).subplots(1, 3)
    for axes, (key, ylabel) in zip(panels, (("recon_mse", "test MSE"), ("identity", "identity, %"), ("fid", "LeNet-FID"))):
        for label, points in lines.items():
            pairs = [(e, row[f"eval/{key}"]) for e, row in points.items() if e and f"eval/{key}" in row]
            axes.plot([e for e, _ in pairs], [y for _, y in pairs], "o-", ms=4, label=label)
        axes.set(xscale="log", yscale="linear" if key == "identity" else "log", xlabel="epoch", ylabel=ylabel), axes.grid(alpha=0.3)
    second.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    second.suptitle("What gets clean, and when (MNIST, DW, first seed)")
    for name, picture in (("table", figure), ("clean", second)):
        shared.write(target / f"{name}.png", lambda temporary: picture.savefig(temporary, format="png", dpi=130, bbox_inches="tight"))


def main(config):
    for name, usual, instead in (("seed", 0, "--seeds"), ("split", "dw", "--splits"), ("run_name", "", "--out-dir"),
                                 ("dataset", "mnist", "nothing: the paper's table is of MNIST")):
        if getattr(config, name) != usual:
            shared.fail(f"--{name.replace('_', '-')} {getattr(config, name)}: use {instead}")
    if config.ablate and (config.methods, config.splits) != (tuple(METHODS), ("dw", "sw")):
        shared.fail("--ablate has methods and a split of its own: leave --methods, --splits and --quick out")
    folder = Path(config.out_dir, "paper_table_smoke" if config.smoke else "paper_table")
    target = folder / "results" if config.smoke else shared.ROOT / "results" / "paper_table"
    if config.smoke:
        config.epochs, config.splits, config.methods = 1, config.splits[:1], tuple(
            m for m in config.methods if m in ("l2", "alae")) or config.methods[:1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        shared.fail(f"cannot write {folder}: {error.strerror}")
    with ThreadPoolExecutor(config.workers) as pool:
        found = pool.map(lambda job: train(job, config, folder), (todo := jobs(config)).items())
        try:
            failures = [text for text in (shared.tqdm(found, "runs", len(todo)) if shared.tqdm else found) if text]
        except KeyboardInterrupt:
            STOP.set()  # the trainings were interrupted too, and are saving
    if STOP.is_set():
        shared.fail("interrupted; the same command goes on", 130)
    gather(folder, target)
    rows, changes = runs_of(target if config.smoke else shared.ROOT / "results", smoke=config.smoke)
    lines = along(target, rows)
    texts = {"table": table(rows), "clean": clean(lines), "ablation": ablation(changes)}
    for name, text in texts.items():
        shared.write(target / f"{name}.md", lambda temporary: temporary.write_text(text))
    draw(rows, lines, target)
    print(texts["ablation" if config.ablate else "table"] + f"\nWritten to {target}")
    failures and shared.fail("; ".join(failures), 1)


if __name__ == "__main__":
    main(shared.parse_config(Config))
