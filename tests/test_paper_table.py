"""Table 1: its arithmetic, and a driver that skips what is done, goes on with what is not and can be killed."""
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT

import paper_table

FILE = "step3_official_alae/paper_table.py"
COMMITTED = ROOT / "results" / "paper_table"


def summary(method, split, seed, value, epochs=7, run=None):
    accuracies = {f"eval/{kind}_acc_{length}": value for kind in ("knn", "svm") for length in ("short", "long")}
    _, file, _, setting = paper_table.METHODS[method]
    return {"status": "done", "run": run or f"{method}-{split}-seed{seed}-e{epochs}", "split": split, "seed": seed, "epochs": epochs,
            "experiment": Path(file).stem, "setting": setting, "dataset": "mnist", "command": "python it", "wall_s": 60.0,
            "hardware": "CPU", "torch": "2", **accuracies, "eval/recon_mse": 0.01, "eval/identity": 90.0, "eval/fid": 10.0}


def test_cells_differences_and_order(tmp_path):
    for s in (summary("alae", "dw", 0, 94.0), summary("alae", "dw", 1, 96.0), summary("lr", "dw", 0, 93.0),
              summary("bigan", "dw", 0, 92.0), summary("alae", "val", 0, 1.0), summary("alae_fast", "sw", 0, 94.0, 9)):
        (tmp_path / f"{s['run']}.json").write_text(json.dumps(s))
    text = paper_table.table(paper_table.runs_of(tmp_path)[0])
    assert "| **ALAE**, paper |  | 5 | 93.79 / 97.61 | 93.47 / 98.20 | 94.59 / 97.47 | 94.23 / 98.64 |" in text
    pair = "95.00 ± 1.41 / 95.00 ± 1.41"
    assert f"| ALAE, official setting | 7 | 2 | – | – | {pair} (+0.41 / -2.47) | {pair} (+0.77 / -3.64) |" in text
    assert "| ALAE, recipe fast | 9 | 1 | 94.00 / 94.00 (+0.21 / -3.61) | 94.00 / 94.00 (+0.53 / -4.20) | – | – |" in text
    # On DW the paper has BiGAN over LR by more than a point in both short cells, ALAE over LR too, ALAE over BiGAN by SVM.
    assert "3 of the 5 pairs" in text and "not: BiGAN above LR (1-NN DW short), BiGAN above LR (SVM DW short)" in text


def test_the_ablation_has_a_row_for_each_change(tmp_path):
    for name in ("chosen", "slope-0.01"):
        run = f"ablate-{name}-seed0-e2"
        (tmp_path / f"{run}.json").write_text(json.dumps(summary("alae", "val", 0, 50.0, 2, run)))
    rows, changes = paper_table.runs_of(tmp_path)
    assert not rows and changes.keys() == {("chosen", 2), ("slope-0.01", 2)}
    assert "| `--slope 0.01` | 2 | 1 | 0.0100 | 90.00 | 10.00 | 50.00 |" in paper_table.ablation(changes)


def test_committed_tables_are_those_of_the_committed_runs():
    rows, changes = paper_table.runs_of(ROOT / "results")
    lines = paper_table.along(COMMITTED, rows)
    for name, text in {"table": paper_table.table(rows), "clean": paper_table.clean(lines),
                       "ablation": paper_table.ablation(changes)}.items():
        assert (COMMITTED / f"{name}.md").read_text() == text, f"{name}.md is stale: run {FILE} --methods with no more to do"


def start(tmp_path, *args):
    return subprocess.Popen([sys.executable, str(ROOT / FILE), "--smoke", "--methods", "l2", "--out-dir", str(tmp_path), *args],
                            env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_waits_for_a_training_that_outlived_its_driver_then_goes_on_then_skips(tmp_path):
    folder, name = tmp_path / "paper_table_smoke", "l2-dw-seed0-e1"
    run = folder / "autoencoder_mnist" / name
    run.mkdir(parents=True)
    (run / "config.json").write_text("of a training under way")
    with open(folder / f"{name}.log", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        first = start(tmp_path)
        with pytest.raises(subprocess.TimeoutExpired):
            first.wait(10)  # longer than its start takes
        assert (run / "config.json").exists()
        first.kill()  # the driver alone
    assert start(tmp_path).wait() == 0
    summary_file = run / "summary.json"
    summary_file.write_text(summary_file.read_text().replace('"done"', '"running"'))  # as if killed after its last epoch
    third = start(tmp_path)
    assert "goes on" in third.communicate()[0] and third.returncode == 0
    assert json.loads(summary_file.read_text())["status"] == "done"
    at = summary_file.stat().st_mtime_ns
    fourth = start(tmp_path)
    out = fourth.communicate()[0]
    assert fourth.returncode == 0 and "starts" not in out and "goes on" not in out
    assert summary_file.stat().st_mtime_ns == at
    assert "\n| ours | 1 | 1 | – | – | " in out and "| 1 |" in (folder / "results/clean.md").read_text()
    assert (folder / "results/clean.png").exists() and (folder / "results/table.png").exists()


def test_a_training_that_fails_is_named(tmp_path, command):
    done = command(FILE, "--smoke", "--methods", "l2", "--data-dir", tmp_path / "nothing")
    assert done.returncode == 1 and "l2-dw-seed0-e1 ended with code 2" in done.stderr and "Traceback" not in done.stderr
    assert "**AE(l2)**, paper" in done.stdout


def test_ctrl_c(tmp_path):
    driver = subprocess.Popen([sys.executable, str(ROOT / FILE), "--smoke", "--methods", "l2", "--out-dir", str(tmp_path)],
                              env=ENVIRONMENT, text=True, stderr=subprocess.PIPE, start_new_session=True)
    while not list(tmp_path.rglob("metrics.csv")) and driver.poll() is None:
        time.sleep(0.01)
    os.killpg(driver.pid, signal.SIGINT)
    err = driver.communicate()[1]
    assert driver.returncode == 130 and "the same command goes on" in err and "Traceback" not in err


def test_quick_is_a_first_look():
    config = paper_table.shared.parse_config(paper_table.Config, ["--quick", "--seeds", "4"])
    assert (config.epochs, config.splits, config.seeds) == (3, ("dw",), (4,))
