"""Tables of finished runs: the local way to compare them, and the source of results/README.md.

    python results/table.py runs/                 # all runs below a folder
    python results/table.py                       # the committed ones in results/
    python results/table.py --collect RUN…        # keep summary and metrics of these run folders
    python results/table.py --readme              # renew results/README.md, and tables in READMEs

Runs that differ in nothing but the seed share a row: mean ± standard deviation (n − 1).

In a README, --readme writes what stands between `<!-- table: NAME -->` and `<!-- /table -->`. NAME:
one in results/paper_table, `all runs`, or `EXPERIMENTS | DATASET SPLIT | METRICS`, where
EXPERIMENT/PREFIX takes those of an experiment's runs whose names begin so.
"""

import argparse
import json
import re
import shutil
import signal
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "step3_official_alae"))
from shared import ROOT, fail

from paper_table import markdown, mean_std, summaries

NAMES = {  # of metrics, in the order of columns
    "recon_mse": "test MSE",
    "identity": "identity %",
    "fid": "LeNet-FID",
    "mse_train": "train MSE",
    "mse_test": "test MSE, not clipped",
    "ratio": "train MSE / optimum",
    "orthonormality": "‖CᵀC − I‖²",
    "ratio_test": "test MSE / PCA's",
    "pca_mse_train": "PCA's train MSE",
    "pca_mse_test": "PCA's test MSE",
    "angle": "largest angle, rad",
    "angle_E": "largest angle of E, rad",
    "angle_G": "of G",
    "least_A": "least eigenvalue of A",
    "knn_acc_short": "1-NN short",
    "knn_acc_long": "1-NN long",
    "svm_acc_short": "SVM short",
    "svm_acc_long": "SVM long",
    "mlp_acc_short": "MLP short",
    "error": "test error %",
    "empty_clusters": "empty clusters",
    "D_y_filled": "D_y at filled",
    "D_y_between": "halfway",
    "D_y_empty": "at empty",
    "prior_gap": "prior gap",
    "prior_gap_floor": "its floor",
    "prior_gap_train": "prior gap of training images",
    "fid_floor": "LeNet-FID of resized test images",
    "digit_kl": "KL of digits",
    "digit_min": "rarest digit %",
    "train/grad_norm_G": "‖gradient of G‖",
    "train/L_rec": "L_rec, last epoch",
    "train/L_prior": "L_prior, last epoch",
}
LINEAR = "linear_autoencoder", "linear_alae", "linear_latent_regressor"
NONLINEAR = "autoencoder_mnist", "latent_regressor_mnist", "bigan_mnist", "alae_mnist"
KINDS = dict.fromkeys(LINEAR, "Linear autoencoders")  # several experiments in one table
WIDTHS = "Autoencoders, E 784-1024-1024-50 and G 50-1024-1024-784"
KINDS |= dict.fromkeys((*NONLINEAR, "train_fc_alae"), WIDTHS)
DETAILS = r"train|perf|.*/(L_|digit_\d|explained|angle_mean)"  # left out
DETAILS += "|pixels|untrained"  # of an earlier version; raw_pixels.py and --epochs 0 replace them


def collect(run):
    """Copies a finished run's summary and metrics.csv to results/<experiment>/<run>.*."""
    path = run / "summary.json"
    if not path.exists() or not summaries(run):
        fail(f"{run} is not the folder of a finished run")
    summary = json.loads(path.read_text())
    target = ROOT / "results" / summary["experiment"] / f"{summary['run']}.json"
    if target.exists() and json.loads(target.read_text())["commands"][0] != summary["commands"][0]:
        fail(f"{target} is of another run of that name: delete it first, if it should go")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    shutil.copyfile(run / "metrics.csv", target.with_suffix(".csv"))
    print(target)


def length(summary):
    return f"{summary['epochs']} epochs" if "epochs" in summary else f"{summary['steps']} steps"


def group(found):
    """Lists of runs that differ in the seed alone, the last one of each seed."""
    groups = {}
    for s in found:
        trained = s.get("epochs", s.get("steps"))
        key = s["dataset"], s["split"], s["experiment"], trained, s["setting"]
        groups.setdefault(key, {})[s["seed"]] = s
    return [list(runs.values()) for _, runs in sorted(groups.items())]


def cell(metric, values):
    """mean ± std, with as many digits as make sense."""
    digits = ".5f" if max(map(abs, values)) >= 1e-3 else ".1e"
    if metric.endswith(("_short", "_long", "identity", "fid", "seconds", "digit_min", "error")):
        digits = ".2f"
    elif metric == "empty_clusters":
        digits = ".1f"
    elif metric == "steps":
        digits = ".0f"
    return mean_std(values, digits)


def sections(run, metrics):
    """{section: {metric: value}} of a run: eval, and what else it measured. If metrics are chosen,
    those alone; losses are chosen by their whole names, and count as eval's."""
    found = {} if metrics else {"eval": {}}
    for key, value in run.items():
        section, _, metric = key.rpartition("/")
        if section and key in metrics:
            found.setdefault("eval", {})[key] = value
        elif section and not re.match(DETAILS, key) and (not metrics or metric in metrics):
            found.setdefault(section, {})[metric] = value
    return found


def lines_of(runs, label, metrics):
    """[(the row's head, {metric: cell})] of runs of one setting, one for each of their sections."""
    values = {}
    for run in runs:
        for section, measured in sections(run, metrics).items():
            for metric, value in measured.items():
                values.setdefault(section, {}).setdefault(metric, []).append(value)
    lines = []
    for section, numbers in values.items():
        cells = {metric: cell(metric, of_seeds) for metric, of_seeds in numbers.items()}
        if cells and not any(cells.items() <= other.items() for _, other in lines):  # new
            data = f"{runs[0]['dataset']} {runs[0]['split']}"
            n = max(len(of_seeds) for of_seeds in numbers.values())
            name = section if "eval" in values else f"{label}, {section}"
            name = label if section == "eval" else name
            lines.append(([name, length(runs[0]), data, str(n)], cells))
    return lines


def table(found, metrics=()):
    """Markdown: a line for each setting, and for what else its runs measured; or chosen metrics."""
    several = len({s["experiment"] for s in found}) > 1
    rows, measured = [], {}
    for runs in group(found):
        setting = re.sub(r"(, )?\bsteps \d+", "", runs[0]["setting"])  # the length says that
        names = [runs[0]["experiment"] if several else "", setting]
        label = ", ".join(name for name in names if name) or "default"
        for line in lines_of(runs, label, metrics):
            if line not in rows:
                rows.append(line)
                measured |= line[1]
    columns = [name for name in metrics or NAMES | measured if name in measured]
    lines = [["run", "length", "data", "seeds", *(NAMES.get(name, name) for name in columns)]]
    for head, cells in rows:
        lines.append([*head, *(cells.get(name, "") for name in columns)])
    return markdown(lines)


def commands(found):
    """A bullet for each command, with seeds, time and hardware."""
    bullets = ""
    for runs in group(found):
        s = runs[0]
        seeds = ", ".join(str(run["seed"]) for run in runs)
        minutes = statistics.fmean(run["wall_s"] for run in runs) / 60
        bullets += "".join(f"- `{command}`, then\n" for command in s["commands"][:-1])
        bullets += f"- `{s['commands'][-1]}`: {length(s)}, {s['split']}, seeds {seeds}, "
        machines = ", and ".join(dict.fromkeys(run["hardware"] for run in runs))
        bullets += f"{minutes:.1f} minutes on {machines}, torch {s['torch']}\n"
    return bullets


def tables(found):
    """Of every kind of runs the table and the commands."""
    kinds = {}
    for run in found:
        kind = KINDS.get(run["experiment"], run["experiment"])
        kinds.setdefault(kind, []).append(run)
    text = ""
    for kind, runs in sorted(kinds.items()):
        text += f"\n## {kind}\n\n{table(runs)}\n{commands(runs)}"
    return text


def renew(text):
    """A README with the tables between its markers as they are now."""
    every = summaries(ROOT / "results")

    def content(marker):
        wanted = marker[2]
        if wanted == "all runs":
            new = f"{tables(every)}\n"
        elif "|" in wanted:
            experiments, data, metrics = (part.split() for part in wanted.split("|"))
            starts = tuple(name if "/" in name else f"{name}/" for name in experiments)
            found = [run for run in every if f"{run['experiment']}/{run['run']}".startswith(starts)]
            new = table([run for run in found if [run["dataset"], run["split"]] == data], metrics)
        else:
            new = (ROOT / f"results/paper_table/{wanted}.md").read_text()
        return marker[1] + new + marker[3]

    return re.sub(r"(<!-- table: (.+?) -->\n).*?(<!-- /table -->)", content, text, flags=re.DOTALL)


def readmes():
    """{path: what it should contain} of all pages."""
    paths = [ROOT / "README.md", *sorted(ROOT.glob("*/*.md"))]
    return {path: renew(path.read_text()) for path in paths}


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # … | head ends it quietly
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = fail
    parser.add_argument("folder", nargs="?", default=ROOT / "results", type=Path)
    parser.add_argument("--collect", nargs="+", metavar="RUN", default=[], type=Path)
    parser.add_argument("--readme", action="store_true")
    options = parser.parse_args()
    for run in options.collect:
        collect(run)
    if options.readme:
        for path, text in readmes().items():
            path.write_text(text)
    elif not options.collect:
        found = summaries(options.folder)
        if not found:
            fail(f"no finished run below {options.folder}")
        print(tables(found))
