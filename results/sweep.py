"""Runs W&B sweep files on this machine, offline: every combination of their parameters is a run.

    python results/sweep.py step1_linear/sweeps/ablation.yaml --workers 2
    python results/sweep.py step3_official_alae/sweeps/table1_*.yaml --dry     # print the commands
    python results/sweep.py step2_gan/sweeps/gan_losses.yaml -- --wandb        # more for every run

Commands are built by W&B's own code, so that `wandb sweep FILE` and `wandb agent ID` run the same.
A run is OUT_DIR/<experiment>/<file>-<its choice of values>, with a log beside it. What is done is
skipped and what was stopped goes on, so this may be stopped, and started again, at any moment.
"""

import argparse
import fcntl
import importlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared
from shared import ROOT, fail

from wandb.sdk.launch.sweeps import utils


class Job(NamedTuple):
    folder: Path
    program: list  # the command up to the program's file
    arguments: list  # those of the sweep file
    more: list
    data: tuple


def word(name, value):
    """What a run's name says of a parameter: of seed 0 'seed0', of text the text."""
    return value.replace("/", "-") if isinstance(value, str) else f"{name}{value}"


def expand(path):
    """A sweep file's runs, {name: command}, as W&B's grid and agent make them."""
    sweep = utils.load_sweep_config(str(path))
    if not sweep or sweep.get("method") != "grid":
        fail(f"{path}: not a sweep file with 'method: grid'")
    parameters = sweep["parameters"]
    choices = {name: p.get("values", [p.get("value")]) for name, p in parameters.items()}
    macros = {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]]}
    commands = {}
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        args = {name: {"value": value} for name, value in chosen.items()}
        macros |= utils.create_sweep_command_args({"args": args})
        command = []
        for part in utils.create_sweep_command(sweep.get("command")):
            command += macros[part[2:-1]] if part.startswith("${") else [part]
        words = [word(name, chosen[name]) for name in chosen if "values" in parameters[name]]
        commands["-".join([Path(path).stem, *words])] = command
    return commands


def read_job(name, command, options):
    """The Job of a command, whose options must be good ones."""
    place = next(i for i, part in enumerate(command) if part.endswith(".py"))
    program, arguments = command[: place + 1], command[place + 1 :]
    path = ROOT / program[-1]
    sys.path.insert(0, str(path.parent))
    module = importlib.import_module(path.stem)
    presets = getattr(module, "PRESETS", None)
    config = shared.parse_config(module.Config, presets, arguments + options.more)
    out_dir = os.path.relpath(options.out_dir, ROOT)
    more = [*options.more, "--out-dir", out_dir, "--run-name", name]
    folder = options.out_dir.absolute() / path.stem / name
    return Job(folder, program, arguments, more, (config.dataset, config.data_dir))


def is_done(job):
    """Whether the run has ended well. Stops if the folder is of another command."""
    try:
        summary = json.loads((job.folder / "summary.json").read_text())
    except (OSError, ValueError):
        return False
    if not set(job.arguments) <= set(shlex.split(summary["commands"][0])):
        fail(f"{job.folder} is of another command: {summary['commands'][0]}")
    return summary["status"] == "done"


def start(job, workers):
    """The process that trains a job or goes on with it, and locks its log so long; None if done."""
    checkpoint, command = job.folder / "checkpoint.pt", job.program + job.arguments + job.more
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{job.folder}.log", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: another sweep is at it
        if is_done(job):
            return None
        if checkpoint.exists():
            command = [*job.program, "--resume", str(checkpoint)]
        else:
            shutil.rmtree(job.folder, ignore_errors=True)  # stopped before its first epoch was over
        print(f"{job.folder.name} {'goes on' if '--resume' in command else 'starts'}", flush=True)
        env = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // workers))} | os.environ
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # python: this one
        how = {"cwd": ROOT, "env": env, "stdout": log, "stderr": log, "start_new_session": True}
        return subprocess.Popen(command, **how)


def run_all(jobs, workers):
    """Trains the jobs, so many at a time; returns how many failed."""
    waiting, running, failed = list(jobs), {}, 0

    def stop(*_):
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            process.wait()
        fail("stopped; the same command goes on", 130)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    while waiting or running:
        if waiting and len(running) < workers:
            job = waiting.pop(0)
            try:
                process = start(job, workers)
                if process is not None:
                    running[process] = job
            except BlockingIOError:
                waiting.append(job)
        time.sleep(0.1)
        for process in [process for process in running if process.poll() is not None]:
            job = running.pop(process)
            last = Path(f"{job.folder}.log").read_text().splitlines()[-1:]
            failed += process.returncode != 0
            print(f"{job.folder.name} ended with code {process.returncode}: {''.join(last)}")
    return failed


def main(options):
    if options.workers < 1:
        fail(f"--workers {options.workers}: must be at least 1")
    jobs = []
    for path in options.files:
        jobs += [read_job(name, command, options) for name, command in expand(path).items()]
    todo = [job for job in jobs if not is_done(job)]
    print(f"{len(jobs)} runs, {len(todo)} to do", flush=True)
    if options.dry:
        print(*(shlex.join(job.program + job.arguments + job.more) for job in todo), sep="\n")
        return
    for dataset, data_dir in {job.data for job in todo}:
        if dataset in shared.DATASETS:  # unpacked here: two first runs would disturb each other
            shared.load_archives(dataset, data_dir)
    failed = run_all(todo, options.workers)
    if failed:
        fail(f"{failed} of {len(todo)} runs failed", 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = fail
    parser.add_argument("files", nargs="+", metavar="FILE", help="sweep files")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--out-dir", type=Path, default=Path("runs"), help="(default: runs)")
    parser.add_argument("--dry", action="store_true", help="print the commands that are to do")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:end])
    options.more = sys.argv[end + 1 :]
    main(options)
