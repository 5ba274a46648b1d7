"""Speed of a training step of every trained experiment, or of those named.

    python tests/benchmark.py                          # all
    python tests/benchmark.py train_fc_alae bigan_mnist --steps 100
    python tests/benchmark.py vae_gan -- --width 1 --image-size 64      # options of the experiment
    python tests/benchmark.py vae_gan --public -- --width 1 --image-size 64
    python tests/benchmark.py aae_pytorch --public
    python tests/benchmark.py bigan_mnist --precisions # fp32 and bf16 in turns
    python tests/benchmark.py --profile                # what takes a step's time, in %
    python tests/benchmark.py --scale                  # FC ALAE by batch size and width
    python tests/benchmark.py --waiting                # what waiting threads cost

ms per iteration (median), images/s, executed FLOP/s over torch.mm's on 128×1024 by 1024×1024, peak
memory. The loop is the experiment's own: what is timed is all between two calls of Run.step.
--public: beside the public code's order of computation (rishabhd786/VAE-GAN-PYTORCH,
fducau/AAE_pytorch) on the same nets, in turns.
"""

import argparse
import contextlib
import csv
import importlib
import itertools
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

import torch
from matplotlib.figure import Figure
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

FOLDERS = ("step1_linear", "step2_gan", "step3_official_alae", "baselines")
sys.path.extend(str(shared.ROOT / folder) for folder in FOLDERS)
vae_gan = importlib.import_module("vae_gan")
aae_pytorch = importlib.import_module("aae_pytorch")
WAITING = {
    "OpenMP's default": {"GOMP_SPINCOUNT": "300000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=2000": {"GOMP_SPINCOUNT": "2000"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
}

KINDS = {  # of operations, by their names in PyTorch's profiler
    "products, convolutions": "mm$|conv",
    "casts, copies": "copy_$",
    "optimizers, averages": "adam|Optimizer|lerp|_foreach",
    "batch norm": "batch_norm",
}
SCALE = {"batch-size": (64, 128, 256, 512, 1024, 2048, 4096), "width": (256, 512, 1024, 2048, 4096)}


class Enough(Exception):
    """So many steps were timed."""


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def best_device():
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


class CountFlops(TorchDispatchMode):
    """Adds up the FLOPs of products and convolutions, those of gradients included."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        if count:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def watched(steps, times, counted):
    """A Run.step that notes the time of each step, counts the FLOPs of the second, and ends it."""
    counter = CountFlops()

    def step(run, losses, images):
        synchronize()
        times.append(time.perf_counter())
        if len(times) == 1:
            counter.__enter__()
        elif len(times) == 2:
            counter.__exit__(None, None, None)
            counted.extend([counter.flops, images])
        elif len(times) == steps + 3:
            raise Enough

    return step


def run_main(name, options):
    module = importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [module.__file__, "--out-dir", folder, *options]
        module.main(shared.parse_config(module.Config, getattr(module, "PRESETS", None)))


def run_steps(name, steps, options):
    """Times of the steps of an experiment's own loop; FLOPs and images of one."""
    times, counted = [], []
    shared.Run.step = watched(steps, times, counted)
    with contextlib.suppress(Enough):
        run_main(name, options)
    return [b - a for a, b in itertools.pairwise(times[2:])], *counted


def mm_rate(n=100, dtype=torch.float32):
    """FLOP/s of torch.mm, median."""
    a, b = (torch.randn(rows, 1024, device=best_device()).to(dtype) for rows in (128, 1024))
    times = []
    for _ in range(n):
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * 128 * 1024 * 1024 / statistics.median(times)


def peak_memory():
    """In MiB: a GPU's, of tensors; else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def benchmark(name, steps, options):
    seconds, flops, images = run_steps(name, steps, options)  # which also sets up the machine
    rate = mm_rate()
    median = statistics.median(seconds)
    print(
        f"{name:24s} {1e3 * median:9.2f} ms  {images / median:9.0f} images/s  "
        f"{flops / median / rate:5.2f} of torch.mm ({rate / 1e9:.0f} GFLOP/s)  "
        f"{peak_memory():6.0f} MiB",
        flush=True,
    )


def profile_steps(name, steps, options):
    """What a step's time goes to: shares of KINDS, and the operations that lead the rest."""
    done = []
    profiler = torch.profiler.profile()

    def step(run, losses, images):
        done.append(images)
        if len(done) == 3:
            profiler.start()
        elif len(done) == 3 + steps:
            profiler.stop()
            raise Enough

    shared.Run.step = step
    with contextlib.suppress(Enough):
        run_main(name, options)
    us = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total, cells = sum(us.values()), []
    for pattern in KINDS.values():
        of_this_kind = [key for key in us if re.search(pattern, key)]
        cells.append(f"{100 * sum(us.pop(key) for key in of_this_kind) / total:.0f}")
    leading = sorted(us, key=us.get, reverse=True)[:3]
    cells += [", ".join(f"{key.split('::')[-1]} {100 * us[key] / total:.0f}" for key in leading)]
    words = " ".join([name, *options])
    print(f"| {words} | {total / 1e3 / steps:.0f} | {' | '.join(cells)} |", flush=True)


def compare_precisions(name, steps, options):
    """Ten steps in fp32, then ten in bf16, and so on; the first of each ten is not counted."""
    times = {"fp32": [], "bf16": []}
    done = []

    def step(run, losses, images):
        synchronize()
        precision, now = run.config.precision, time.perf_counter()
        if len(done) % 10 > 0:
            times[precision].append(now - done[-1])
        done.append(now)
        if len(done) % 10 == 0:
            run.config.precision = "fp32" if precision == "bf16" else "bf16"
        if len(done) == 2 * steps:
            raise Enough

    flops = run_steps(name, 3, options)[1]  # which also sets up the machine
    rates = {"fp32": mm_rate(), "bf16": mm_rate(dtype=torch.bfloat16)}
    with contextlib.suppress(Enough):
        shared.Run.step = step
        run_main(name, options)
    medians = {precision: statistics.median(part) for precision, part in times.items()}
    cells = [f"{medians['bf16'] / medians['fp32']:.3f}"]
    for precision, seconds in medians.items():
        cells += [f"{1e3 * seconds:.2f}", f"{flops / seconds / rates[precision]:.2f}"]
    cells.append(f"{rates['bf16'] / rates['fp32']:.2f}")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def scale(steps):
    """FC ALAE's step against batch size and width, in both precisions: results/scale.csv, .png."""
    rows = []
    for option, sizes in SCALE.items():
        for size, precision in itertools.product(sizes, ("fp32", "bf16")):
            options = ["--", f"--{option}", str(size), "--precision", precision]
            command = [sys.executable, __file__, "train_fc_alae", "--steps", str(steps), *options]
            words = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.split()
            row = {"option": option, "size": size, "precision": precision, "ms": words[1]}
            rows.append(row | {"images_per_s": words[3], "MiB": words[-2]})
            print(rows[-1], flush=True)
    with open(shared.ROOT / "results/scale.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw_scale(rows)


def draw_scale(rows):
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    figure.suptitle(f"A step of FC ALAE on {shared.hardware(best_device())}")
    panels = figure.subplots(2, 2, sharex="col")
    for column, option in zip(panels.T, SCALE, strict=True):
        for precision in ("fp32", "bf16"):
            part = [r for r in rows if (r["option"], r["precision"]) == (option, precision)]
            sizes = [int(row["size"]) for row in part]
            for axes, name in zip(column, ("images_per_s", "MiB"), strict=True):
                axes.plot(sizes, [float(row[name]) for row in part], "o-", label=precision)
                axes.set(xscale="log", ylabel=name.replace("_per_", "/"))
                axes.set_xticks(sizes, sizes)
                axes.minorticks_off()
                axes.grid(alpha=0.3)
        column[1].set_xlabel(f"--{option}")
    for axes in panels.flat:
        axes.set_ylim(bottom=0)
    panels[0, 0].legend()
    figure.savefig(shared.ROOT / "results/scale.png", dpi=130)


def vae_gan_public_step(nets, opts, x, config):
    """An iteration of the VAE-GAN in the order of github.com/rishabhd786/VAE-GAN-PYTORCH: ten
    forward passes of Dis, and gradients that nobody wants."""
    Enc, Dec, Dis = nets["Enc"], nets["Dec"], nets["Dis"]

    def autoencode():
        mu, log_var = Enc(x)
        return mu, log_var, Dec(mu + (log_var / 2).exp() * torch.randn_like(mu))

    def features_and_logits(*images):
        features = [Dis[0](part) for part in images]
        return features, [Dis[1](part) for part in features]

    def update(name, loss):
        opts[name].zero_grad()
        loss.backward(retain_graph=True)
        opts[name].step()

    mu, _, x_rec = autoencode()
    x_p = Dec(torch.randn_like(mu))
    _, logits = features_and_logits(x, x_rec, x_p)
    update("Dis", vae_gan.L_GAN(logits))

    _, logits = features_and_logits(x, x_rec, x_p)
    gan = vae_gan.L_GAN(logits)
    features, _ = features_and_logits(x, x_rec)
    update("Dec", config.gamma * vae_gan.L_llike(*features) - gan)

    mu, log_var, x_rec = autoencode()
    features, _ = features_and_logits(x, x_rec)
    llike = vae_gan.L_llike(*features)
    update("Enc", vae_gan.kl(mu, log_var).mean() + config.gamma_enc * llike)


def aae_public_step(nets, opts, x, config):
    """An iteration in the order of github.com/fducau/AAE_pytorch: D's loss also goes back through
    Q, and Q's through D's weights, whose gradients nobody wants."""
    Q, P, D = nets["Q"], nets["P"], nets["D"]

    def update(loss, *roles):
        nets.zero_grad()
        loss.backward()
        for role in roles:
            opts[role].step()

    update(aae_pytorch.L_rec(P(Q(x)), x), "P", "Q_rec")
    z = aae_pytorch.sample_prior(x, config)
    update(aae_pytorch.L_D(D, z, Q.eval()(x)), "D")
    update(aae_pytorch.L_Q(D, Q.train()(x)), "Q_reg")


PUBLIC = {"vae_gan": (vae_gan, vae_gan_public_step), "aae_pytorch": (aae_pytorch, aae_public_step)}


def compare_with_public_order(name, steps, options):
    """Our step and the public code's order of computation, in turns in one training."""
    module, public_step = PUBLIC[name]
    ours, seconds = module.train_step, {"ours": [], "public": []}

    def timed(label, step, arguments):
        start = time.perf_counter()
        losses = step(*arguments)
        synchronize()
        seconds[label].append(time.perf_counter() - start)
        return losses

    def both(*arguments):
        timed("public", public_step, arguments)
        return timed("ours", ours, arguments)

    module.train_step = both
    run_steps(name, steps, options)
    mine, theirs = (statistics.median(found[2:]) for found in seconds.values())
    both_ms = f"ours {1e3 * mine:.0f} ms, in the public order {1e3 * theirs:.0f}"
    print(f"{name}: {both_ms}: {mine / theirs:.3f}", flush=True)


def waiting(steps, rounds=3):
    """train_fc_alae with two threads: alone, beside a busy process, two at once; all in turns."""
    command = [sys.executable, __file__, "train_fc_alae", "--steps", str(steps)]
    beside = {
        "alone": [],
        "beside a busy process": [sys.executable, "-c", "while True: pass"],
        "two at once": command,
    }
    usual = {k: v for k, v in os.environ.items() if not k.startswith(("OMP", "GOMP"))}
    times = {pair: [] for pair in itertools.product(WAITING, beside)}
    for _ in range(rounds):
        for label, case in times:
            env = usual | WAITING[label] | {"OMP_NUM_THREADS": "2"}
            quiet = {"env": env, "stderr": subprocess.DEVNULL, "text": True}
            first = subprocess.Popen(command, stdout=subprocess.PIPE, **quiet)
            if beside[case]:
                other = subprocess.Popen(beside[case], stdout=subprocess.DEVNULL, **quiet)
            times[label, case].append(float(first.communicate()[0].split()[1]))
            if beside[case]:
                other.terminate()
                other.wait()
    print(f"| setting | {' | '.join(beside)} |\n| --- | --- | --- | --- |")
    for label in WAITING:
        cells = [f"{statistics.median(times[label, case]):.1f}" for case in beside]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = shared.fail
    parser.add_argument("names", nargs="*", help="of experiments (default: all)")
    parser.add_argument("--steps", type=int, default=50, help="how many are timed")
    kind = parser.add_mutually_exclusive_group()
    for name in ("public", "precisions", "profile", "scale", "waiting"):
        kind.add_argument(f"--{name}", action="store_true", help="see above")
    own, options = sys.argv[1:], []
    if "--" in own:
        own, options = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    if args.steps < 1:
        shared.fail(f"--steps {args.steps}: must be at least 1")
    paths = sorted(p for p in shared.ROOT.glob("*/*.py") if p.parent.name in FOLDERS)
    loop = "shared.products(" if args.precisions else "run.epochs("
    known = [path.stem for path in paths if loop in path.read_text()]
    if args.public:
        known = list(PUBLIC)
    names = args.names or known
    for name in names:
        if name not in known:
            shared.fail(f"{name}: choose {', '.join(known)}")
    if args.waiting:
        waiting(args.steps)
    elif args.scale:
        scale(args.steps)
    elif args.public:
        for name in names:
            compare_with_public_order(name, args.steps, options)
    elif args.profile:
        print(f"| experiment | ms | {' | '.join(KINDS)} | of the rest, most |")
        print("|---" * (3 + len(KINDS)) + "|")
        for name in names:
            profile_steps(name, args.steps, options)
    elif args.precisions:
        print(
            "| experiment | bf16 / fp32 | fp32, ms | of torch.mm | bf16, ms | of torch.mm | ",
            end="",
        )
        print("torch.mm's bf16 / fp32 |\n|---|---|---|---|---|---|---|", flush=True)
        for name in names:
            compare_precisions(name, args.steps, options)
    elif len(names) == 1:
        benchmark(names[0], args.steps, options)
    else:
        for name in names:
            command = [sys.executable, __file__, name, "--steps", str(args.steps), "--", *options]
            subprocess.run(command, check=True)
