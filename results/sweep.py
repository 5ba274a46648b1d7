"""Runs W&B sweep files on this machine, offline: every combination of their parameters is a run.

    python results/sweep.py step1_linear/sweeps/ablation.yaml --workers 2
    python results/sweep.py step3_official_alae/sweeps/table1_*.yaml --dry     # print the commands
    python results/sweep.py step2_gan/sweeps/gan_losses.yaml -- --wandb        # more for every run

Commands are built by W&B's own code, so that `wandb sweep` and `wandb agent` run the same.
A run is OUT_DIR/<experiment>/<file>-<its choice of values>, with a log beside it. What is done is
skipped and what was stopped goes on, so this may be stopped, and started again, at any moment.
A boolean that is false is left out of the command: it cannot switch off what is on by default.
"""

import argparse
import fcntl
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shared import ROOT, fail

from wandb.sdk.launch.sweeps import utils

RUNNING = []  # processes; some have ended
STOPPED = threading.Event()  # by Ctrl-C


def expand(path):
    """A sweep file's runs, {name: command}, as W&B's grid and agent make them."""
    sweep = utils.load_sweep_config(str(path))
    if not isinstance(sweep, dict) or sweep.get("method") != "grid":
        fail(f"{path}: not a sweep file with 'method: grid'")
    parameters = sweep.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        fail(f"{path}: needs 'parameters'")
    if not str(sweep.get("program")).endswith(".py"):
        fail(f"{path}: needs 'program', a Python file")
    for name, parameter in parameters.items():
        if not isinstance(parameter, dict) or not {"value", "values"} & parameter.keys():
            fail(f"{path}: parameter {name} needs 'value' or 'values'")
        if not isinstance(parameter.get("values", []), list):
            fail(f"{path}: parameter {name} needs a list of values")
    choices = [p.get("values", [p.get("value")]) for p in parameters.values()]
    macros = {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]]}
    commands = {}
    for values in itertools.product(*choices):
        words, args = [Path(path).stem], {}
        for name, value in zip(parameters, values, strict=True):
            args[name] = {"value": value}
            if "values" in parameters[name]:
                words.append(value if isinstance(value, str) else f"{name}{value}")
        macros |= utils.create_sweep_command_args({"args": args})
        command = []
        for part in utils.create_sweep_command(sweep.get("command")):
            command += macros[part[2:-1]] if part.startswith("${") else [part]
        commands["-".join(words).replace("/", "-")] = command
    return commands


def options_of(command):
    """What stands between the program and --out-dir: the sweep file's options, and MORE."""
    words = itertools.dropwhile(lambda word: not word.startswith("--"), command)
    return set(itertools.takewhile(lambda word: word != "--out-dir", words)) - {"--wandb"}


def is_done(folder, command):
    """Whether the run has ended well; its folder must be of this command."""
    if not (folder / "summary.json").exists():
        return False
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except ValueError:
        fail(f"{folder / 'summary.json'}: not readable; without that folder the run is made anew")
    first = summary["commands"][0]
    if options_of(command) != options_of(shlex.split(first)):
        fail(f"{folder} is of another command: {first}")
    return summary["status"] == "done"


def lock(file):
    """Whether no other process has the file, which is ours from now on, and our children's."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def train(folder, command):
    """Trains a run, or goes on with it; returns its exit code. Its words go to a log."""
    checkpoint = folder / "checkpoint.pt"
    with open(f"{folder}.log", "a+") as log:
        if not lock(log):
            print(f"{folder.name} is in another process's hands", flush=True)
            return 1
        if checkpoint.exists():
            program = itertools.takewhile(lambda word: not word.startswith("--"), command)
            command = [*program, "--resume", str(checkpoint)]
        else:
            shutil.rmtree(folder, ignore_errors=True)  # stopped before its first epoch was over
        print(f"{folder.name} {'goes on' if '--resume' in command else 'starts'}", flush=True)
        kwargs = {"cwd": ROOT, "stdout": log, "stderr": log, "start_new_session": True}
        process = subprocess.Popen(command, **kwargs)
        RUNNING.append(process)
        if STOPPED.is_set():  # Ctrl-C came while it was being started
            process.send_signal(signal.SIGINT)
        code = process.wait()
        log.seek(0)
        last = log.read().splitlines()[-1:]
    print(f"{folder.name} ended with code {code}: {''.join(last)}", flush=True)
    return code


def main(options):
    if options.workers < 1:
        fail(f"--workers {options.workers}: must be at least 1")
    out_dir = os.path.relpath(options.out_dir, ROOT)
    todo = {}
    for path in options.files:
        for name, command in expand(path).items():
            program = next(word for word in command if word.endswith(".py"))
            folder = options.out_dir.absolute() / Path(program).stem / name
            command += options.more
            if not is_done(folder, command):
                todo[folder] = [*command, "--out-dir", out_dir, "--run-name", name]
    print(f"{len(todo)} runs to do", flush=True)
    if options.dry:
        print("\n".join(shlex.join(command) for command in todo.values()))
        return
    try:
        for folder in todo:
            folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make {error.filename}: {error.strerror}; another --out-dir?")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // options.workers)))
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # python
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, even if it was ignored; kill
        signal.signal(number, signal.default_int_handler)
    STOPPED.clear()
    with ThreadPoolExecutor(options.workers) as pool:
        try:
            codes = list(pool.map(train, todo, todo.values()))
        except KeyboardInterrupt:  # what waits is given up
            STOPPED.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in RUNNING:
                process.send_signal(signal.SIGINT)
            fail("stopped; the same command goes on", 130)
    failed = sum(code != 0 for code in codes)
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
