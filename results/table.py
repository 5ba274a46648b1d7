"""Tables of finished runs: the local way to compare them, and the source of results/README.md.

    python results/table.py runs/                 # a table of all runs below a folder
    python results/table.py                       # the committed ones in results/
    python results/table.py --collect RUN…        # keep the summaries of these run folders in results/
    python results/table.py --readme              # renew results/README.md, and the README between its markers

Runs that differ in nothing but the seed share a row: mean ± standard deviation (n − 1) over n seeds.
"""
import argparse
import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import ROOT, fail, write

NAMES = {"recon_mse": "test MSE", "identity": "identity %", "fid": "LeNet-FID", "mse_train": "train MSE",
         "mse_test": "test MSE, not clipped", "ratio": "train MSE / optimum", "orthonormality": "‖EEᵀ − I‖²",
         "ratio_test": "test MSE / PCA's", "pca_mse_train": "PCA's train MSE", "pca_mse_test": "PCA's test MSE",
         "explained": "variance explained %", "angle": "largest angle, rad", "angle_E": "angle of E, largest, rad",
         "angle_mean_E": "E, mean", "angle_G": "G, largest", "angle_mean_G": "G, mean", "steps": "steps",
         "seconds": "seconds"}
NAMES |= {f"{a}_acc_{b}": f"{label} {b}" for a, label in (("knn", "1-NN"), ("svm", "SVM"), ("mlp", "MLP"))
          for b in ("short", "long")}
NAMES |= {"error": "test error %", "prior_gap": "prior gap", "prior_gap_floor": "its floor",
          "prior_gap_train": "prior gap of training images", "fid_floor": "LeNet-FID of resized test images"}
NAMES |= {"digit_kl": "KL of digits", "digit_min": "rarest digit %", "grad_norm_G": "‖gradient of G‖"}
TOGETHER = {"linear autoencoders": ("linear_alae", "linear_latent_regressor"),  # one table for several experiments
            "nonlinear autoencoders: E 784-1024-1024-50, G 50-1024-1024-784": (
                "autoencoder_mnist", "latent_regressor_mnist", "bigan_mnist", "alae_mnist", "train_fc_alae")}
BASELINES = {"vae_gan": "VAE-GAN", "aae": "AAE", "aae_semi_supervised": "semi-supervised AAE", "train_fc_alae": "ALAE"}


def summaries(folder):
    """The summary.json files below a folder of runs, or the collected ones in a folder like results/."""
    folder = Path(folder)
    paths = sorted(folder.rglob("summary.json")) or sorted(folder.rglob("*.json"))
    return [summary for summary in map(read, paths) if summary["status"] == "done"]


def read(path):
    """A run's summary; exit 2 unless the file is one."""
    try:
        summary = json.loads(path.read_text())
        return {"setting": ""} | {key: summary[key] for key in ("status", "experiment", "run")} | summary
    except FileNotFoundError:
        fail(f"{path.parent}: no summary.json there")
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{path} is not the summary of a run")


def collect(run):
    """Copy a finished run's summary, and its table.md if it has one, to results/<experiment>/<run-name>; exit 2 rather than
    replace another's."""
    summary = read(Path(run, "summary.json"))
    if summary["status"] != "done":
        fail(f"{run}: not finished, but {summary['status']}")
    target = ROOT / "results" / summary["experiment"] / f"{summary['run']}.json"
    if target.exists() and read(target) != summary:
        fail(f"{target} is of another run of that name: delete it first, if it should go")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write {target}: {error}")
    write(target, summary)
    if (table := Path(run, "table.md")).exists():  # the comparison's own
        write(target.with_suffix(".md"), lambda temporary: temporary.write_text(table.read_text()))
    print(target)


def kind_of(s):
    """The table to which a summary belongs."""
    if "ablate True" in s["setting"] or "compare True" in s["setting"]:
        return f"{s['experiment']}, one thing changed at a time"
    return next((kind for kind, members in TOGETHER.items() if s["experiment"] in members), s["experiment"])


def cell(metric, values):
    """mean ± std, with as many digits as make sense."""
    if metric.endswith(("_short", "_long", "identity", "fid", "seconds", "digit_min", "error")):
        digits = "{:.2f}"
    elif metric == "steps":
        digits = "{:.0f}"
    else:
        digits = "{:.5f}" if max(map(abs, values)) >= 1e-3 else "{:.1e}"
    spread = f" ± {digits.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return digits.format(statistics.fmean(values)) + spread


def tables(found):
    """Markdown: a table for an experiment or several, a row a setting, and the commands, times and hardware below it."""
    text = []
    kinds = [kind_of(s) for s in found]
    for kind in sorted(set(kinds)):
        groups = {}
        for s in (s for s, of in zip(found, kinds) if of == kind):
            unit = "epochs" if "epochs" in s else "steps"
            members = TOGETHER.get(kind, ())
            name = ", ".join([s["experiment"]] * bool(members) + [f"{s[unit]} {unit}"] + [s["setting"]] * bool(s["setting"]))
            place = members.index(s["experiment"]) if members else 0
            group = s["dataset"], s["split"], place, s[unit], name
            groups.setdefault(group, {})[s["seed"]] = s
        rows, notes = [], []
        for (dataset, split, _, _, setting), runs in sorted(groups.items()):
            runs, lines = list(runs.values()), {}
            for key in dict.fromkeys(key for s in runs for key in s if "/" in key):
                row, metric = key.rsplit("/", 1)
                if row not in ("train", "perf") and not re.fullmatch(r"digit_\d", metric):
                    lines.setdefault(row, {})[metric] = cell(metric, [s[key] for s in runs if key in s])
            for row, cells in sorted(lines.items(), key=lambda line: line[0] != "eval"):
                n = sum(any(key.startswith(f"{row}/") for key in s) for s in runs)
                name = {"eval": setting, "pixels": "raw pixels", "untrained": f"untrained encoder of {runs[0]['experiment']}"}
                line = [name.get(row, row), f"{dataset} {split}", str(n)], cells
                repeated = any(cells.items() <= other.items() for name, other in lines.items() if name != row)
                if line not in rows and not repeated:
                    rows.append(line)
            minutes = statistics.fmean(s["wall_s"] for s in runs) / 60
            notes.append(f"{setting}, {dataset} {split}: `{runs[0]['command']}`; seeds "
                         f"{', '.join(str(s['seed']) for s in runs)}; {minutes:.1f} minutes on {runs[0]['hardware']}; "
                         f"torch {runs[0]['torch']}")
        columns = [c for c in dict.fromkeys([*NAMES, *(m for _, cells in rows for m in cells)])
                   if any(c in cells for _, cells in rows)]
        lines = [["run", "data", "seeds", *(NAMES.get(c, c) for c in columns)], ["---"] * (3 + len(columns)),
                 *(head + [cells.get(c, "") for c in columns] for head, cells in rows)]
        text += [f"**{kind}**", "", *(f"| {' | '.join(line)} |" for line in lines), "", "<br>".join(notes), ""]
    return "\n".join(text).rstrip() + "\n"


def baselines(found):
    """The baselines' rows of the README, on MNIST's test images, beside the best ALAE: the metrics that they share."""
    found = [s for s in found if s["dataset"] == "mnist" and s["split"] == "dw" and s["experiment"] in BASELINES
             and (s["experiment"] != "train_fc_alae" or (s["setting"], s["epochs"]) == ("recipe fast", 50))]
    columns = ["recon_mse", "identity", "fid", "knn_acc_short", "svm_acc_short", "error", "prior_gap", "prior_gap_floor"]
    groups = {}
    for s in sorted(found, key=lambda s: ([*BASELINES].index(s["experiment"]), s["setting"], s["epochs"], s["seed"])):
        groups.setdefault((BASELINES[s["experiment"]], s["setting"], s["epochs"]), {})[s["seed"]] = s
    lines = [["", "epochs", "minutes", "seeds", *(NAMES[c] for c in columns)], ["---"] * (4 + len(columns))]
    for (name, setting, epochs), runs in groups.items():
        runs, told = list(runs.values()), "labels True" in setting  # the class: identity says nothing
        values = {c: [s[f"eval/{c}"] for s in runs if f"eval/{c}" in s and not (told and c == "identity")] for c in columns}
        cells = [cell(c, v) if v else "" for c, v in values.items()]
        minutes = statistics.fmean(s["wall_s"] for s in runs) / 60
        lines.append([name + f", {setting}" * bool(setting), str(epochs), f"{minutes:.0f}", str(len(runs)), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def every_run():
    """results/README.md: a table of all committed runs."""
    return ("# All committed runs\n\nWritten by `python results/table.py --readme` from the summaries here. `val`: validation "
            "images, on which hyperparameters were chosen.\n\n" + tables(summaries(ROOT / "results")))


def readme(text):
    """The README with the tables that step3_official_alae/paper_table.py wrote, and the baselines', between its markers."""
    contents = {name: (ROOT / f"results/paper_table/{name}.md").read_text() for name in ("table", "clean")}
    for name, content in (contents | {"baselines": baselines(summaries(ROOT / "results"))}).items():
        text = re.sub(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: m[1] + content + m[2], text, flags=re.S)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("folder", nargs="?", default=ROOT / "results", type=Path)
    parser.add_argument("--collect", nargs="+", metavar="RUN", default=[])
    parser.add_argument("--readme", action="store_true")
    args = parser.parse_args()
    for run in args.collect:
        collect(run)
    if args.readme:
        for path, text in ((ROOT / "README.md", readme((ROOT / "README.md").read_text())),
                           (ROOT / "results/README.md", every_run())):
            write(path, lambda temporary: temporary.write_text(text))
    elif not args.collect:
        if not args.folder.is_dir():
            fail(f"{args.folder}: no such folder")
        print(tables(summaries(args.folder)) if summaries(args.folder) else f"no finished run in {args.folder}")
