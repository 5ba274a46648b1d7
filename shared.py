"""What every experiment shares and no paper owns: options, data, a run's folder, pictures.

Networks, losses, optimizers, schedules and the order of updates stay in the experiments. Their main
loops are alike; a line that only some have is marked `# its own`. Instruments are in assets/.
"""

import argparse
import csv
import ctypes
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import ChainMap
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

# Before torch is loaded: idle OpenMP threads shall sleep, not spin (results/waiting_threads.md)
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"

from assets import batch_norm, classifiers, lenet, pca, prior  # noqa: F401 (for the experiments)
from assets.classifiers import code_metrics  # noqa: F401
from assets.lenet import image_metrics  # noqa: F401

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import nn
from torchvision import datasets
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
DATASETS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
OF_THE_MACHINE = {"device", "data_dir", "out_dir", "run_name", "wandb", "resume", "eval"}
BESIDE_RESUME = {"resume", "epochs", "device", "data_dir", "wandb"}  # allowed beside --resume
BESIDE_EVAL = OF_THE_MACHINE | {"dataset", "split", "smoke", "eval_weights"}  # beside --eval
NO_SETTING = OF_THE_MACHINE | {"epochs", "eval_every", "seed", "dataset", "split", "model"}


def fail(message, code=2):
    """One clear line on stderr and an exit code: for all that a user can get wrong."""
    tqdm.write(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", sys.stderr)
    raise SystemExit(code)


def option(default, help, choices=None, low=None, high=2**63):
    """A dataclass field that becomes a command-line option, with low ≤ its value < high."""
    kwargs = {"type": type(default), "choices": choices}
    if isinstance(default, bool):
        kwargs = {"action": argparse.BooleanOptionalAction}
    kwargs["help"] = f"{help} (default: {default})".replace("%", "%%").replace(" (default: )", "")
    return field(default=default, metadata={"low": low, "high": high, "argument": kwargs})


@dataclass
class Protocol:
    """The options that all experiments have in common; each Config adds its own."""

    seed: int = option(0, "of the initial weights, the shuffling and z", low=0, high=2**32)
    device: str = option("auto", "auto: cuda, else mps, else cpu", ("auto", "cpu", "cuda", "mps"))
    dataset: str = option("mnist", f"{', '.join(DATASETS)} or folder:PATH, your own pictures")
    data_dir: str = option("", "folder of the datasets, as torchvision has it (default: data/)")
    split: str = option("dw", "test images: official (dw), held out (sw, val)", ("dw", "sw", "val"))
    out_dir: str = option("runs", "a run is written to OUT_DIR/<experiment>/<run-name>")
    run_name: str = option("", "name of the run (default: time and seed)")
    eval_every: int = option(5, "epochs between cheap evaluations, and pictures", low=1)
    resume: str = option("", "checkpoint.pt to go on from")
    eval: str = option("", "model.pt or checkpoint.pt to evaluate and draw, without training")
    wandb: bool = option("WANDB_SWEEP_ID" in os.environ, "mirror the run to Weights & Biases")
    smoke: bool = option(False, "a tiny subset through the whole path, in seconds")


def parse_config(Config, presets=None, argv=None):
    """Command line, names with - or _, → Config; --preset, --resume, --eval change its defaults."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.description = sys.modules[Config.__module__].__doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = fail
    for f in fields(Config):
        parser.add_argument(f"--{f.name.replace('_', '-')}", **f.metadata["argument"])
    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in argv]
    given = vars(parser.parse_args(argv))
    for f in fields(Config):
        low, high, value = f.metadata["low"], f.metadata["high"], given.get(f.name)
        if low is not None and value is not None and not low <= value < high:
            fail(f"--{f.name.replace('_', '-')} {value}: must be in [{low}, {high:.3g})")
    defaults = presets[given.get("preset", Config.preset)] if presets else {}
    path = given.get("resume", given.get("eval"))
    if path is not None:
        checkpoint = load_checkpoint(path, Config)
        defaults = checkpoint["config"]
        beside = BESIDE_RESUME if "resume" in given else BESIDE_EVAL
        if "random" not in checkpoint:  # a model.pt: one kind of weights
            beside = beside - {"eval_weights"}
        if defaults.get("decay"):  # where there are epochs, the rate falls towards the last
            beside = beside - {"epochs"}
        for name in sorted(given.keys() - beside):
            fail(f"--{name.replace('_', '-')}: leave it out, {path} has its own")
        asked = defaults | given  # the splits' order: dw, sw, val
        if asked["dataset"] == defaults["dataset"] and asked["split"] > defaults["split"]:
            fail(f"--split {asked['split']}: {path} may have been trained on its test images")
    if "eval" in given:
        defaults = {name: defaults[name] for name in defaults.keys() - OF_THE_MACHINE}
    return Config(**(defaults | given))


def load_checkpoint(path, Config):
    """A model.pt or checkpoint.pt of Config's experiment, on the CPU."""
    ours = Path(sys.modules[Config.__module__].__file__).stem
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        experiment, values = checkpoint["experiment"], checkpoint["config"].items()
    except Exception as error:  # torch.load raises many kinds for a file that is none of its own
        fail(f"{path}: no checkpoint that can be read ({type(error).__name__})")
    choices = {f.name: f.metadata["argument"].get("choices") for f in fields(Config)}
    fits = all(key in choices and value in (choices[key] or [value]) for key, value in values)
    if experiment != ours or not fits:
        fail(f"{path} is a checkpoint of {experiment}, not of this version of {ours}")
    return checkpoint


# The machine


def setup(config):
    """Seeds PyTorch, makes a CPU fast, shortens a smoke run; returns the torch.device."""
    signal.signal(signal.SIGINT, lambda *_: fail("interrupted, nothing was written", 130))
    torch.manual_seed(config.seed)
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or config.device == "cpu":
        device = torch.device("cpu")
    if config.device not in ("auto", device.type):
        fail(f"--device {config.device}: there is no such device here")
    has_bf16 = any(able for name, able in torch.cpu.get_capabilities().items() if "bf16" in name)
    if getattr(config, "precision", "") == "bf16" and device.type == "cpu" and not has_bf16:
        print("--precision bf16: not on this processor, fp32 it is", file=sys.stderr)
        config.precision = "fp32"
    if config.smoke and not (config.resume or config.eval) and hasattr(config, "epochs"):
        config.epochs, config.eval_every = min(config.epochs, 2), 1
    if config.smoke and not (config.resume or config.eval) and hasattr(config, "steps"):
        config.steps, config.eval_every = min(config.steps, 60), 20
    if platform.libc_ver()[0] == "glibc":  # keeps freed tensors: no page faults in the inner loop
        for name, bits in ((-1, 30), (-3, 25), (-3, 30)):  # M_TRIM_, M_MMAP_THRESHOLD, old and new
            ctypes.CDLL(None).mallopt(name, 1 << bits)
    torch.set_float32_matmul_precision(fastest_exact_matmul(device))
    torch.backends.cudnn.allow_tf32 = False  # nor do a GPU's convolutions lose accuracy
    return device


def fastest_exact_matmul(device):
    """'medium' where it keeps fp32 accuracy (CPUs on which it only picks another library)."""
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double()
    torch.set_float32_matmul_precision("medium")
    error = (a.to(device) @ b.to(device)).cpu().double() - exact
    return "medium" if error.norm() < 2e-6 * exact.norm() else "highest"


def products(config, device):
    """Products in bf16, if config says so; for one step of an algorithm, see results/bf16.md."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def fp32(x):
    """x in fp32 if it is in bf16; float64 stays."""
    return x.float() if x.dtype == torch.bfloat16 else x


class Float32(nn.Sequential):
    """Layers that stay in fp32."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(fp32(x))


def hardware(device):
    """A GPU's name; the processor's name, family and model, its cores and the threads used."""
    gpu = f"{torch.cuda.get_device_name()}, " if device.type == "cuda" else ""
    name, cpu = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    text = cpu.read_text() if cpu.exists() else ""
    facts = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)", text, re.M))
    if len(facts) == 3:
        name = "{model name} (family {cpu family}, model {model})".format_map(facts)
    return f"{gpu}{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


# Data


class Data(NamedTuple):
    """Images as vectors in [0, 1] on the device, and labels, or None where there are none."""

    name: str
    x_train: torch.Tensor  # (N, X)
    y_train: torch.Tensor | None  # (N,)
    x_test: torch.Tensor  # (M, X)
    y_test: torch.Tensor | None  # (M,)
    shape: torch.Size  # (C, H, W) with X = C H W

    def images(self, x):
        """x (n, X) → (n, C, H, W)."""
        return x.unflatten(1, self.shape)


def load_data(config, device, size=64, boxes=None):
    """Data of config.dataset and config.split; a folder's pictures become squares of that size.
    Test images: dw official, sw a sixth of the others, val another sixth; a folder's dw is its sw.
    boxes: as in read_pictures."""
    name, limit = config.dataset, (2000 if config.smoke else 10**9)
    if re.match("folder:.", name):
        x = read_pictures(Path(name.removeprefix("folder:")).expanduser(), size, limit, boxes)
        y, x_test = torch.zeros(len(x)), None
    elif name in DATASETS:
        (x, y), (x_test, y_test) = load_archives(name, config.data_dir)
    else:
        fail(f"--dataset {name}: unknown; choose {', '.join(DATASETS)} or folder:PATH")
    if config.split != "dw" or x_test is None:
        n = len(x) // 6
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        if config.split == "val":
            order = order[n:]  # without the test images of sw
        x_test, y_test = x[order[:n]], y[order[:n]]
        x, y = x[order[n:]], y[order[n:]]
    x, y = to_images(x[:limit], device), y[:limit].to(device)
    x_test, y_test = to_images(x_test[: limit // 2], device), y_test[: limit // 2].to(device)
    if len(x) < getattr(config, "batch_size", 1):
        fail(f"--batch-size {config.batch_size}: there are only {len(x)} training images")
    data = Data(name, x.flatten(1), y, x_test.flatten(1), y_test, x.shape[1:])
    return data._replace(y_train=None, y_test=None) if name.startswith("folder:") else data


def to_images(x, device):
    """uint8 (N, H, W[, C]) → (N, C, H, W) in [0, 1]."""
    x = x.reshape(*x.shape[:3], -1).permute(0, 3, 1, 2)
    return x.to(device).float().div_(255).contiguous()


def load_archives(name, data_dir):
    """Training and test images of a dataset, uint8, with labels; torchvision fetches them."""
    cls, folder = getattr(datasets, DATASETS[name]), Path(data_dir or ROOT / "data").expanduser()
    try:
        parts = [cls(folder, train, download=True) for train in (True, False)]
    except Exception as error:  # no network, no permission, a wrong MD5: many kinds
        fail(f"{name} is not in {folder} and could not be fetched, or is damaged: {error}")
    return [(torch.as_tensor(part.data), torch.as_tensor(part.targets)) for part in parts]


def read_pictures(folder, size, limit, boxes=None):
    """Central squares of a folder's pictures: uint8 (N, size, size, 3), or (…, 1) if all grey.
    boxes, {(W, H): (left, top, right, bottom)}: what is cut from those of W×H pixels before."""
    known = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = sorted(path for path in folder.rglob("*.*") if path.suffix.lower() in known)
    if len(paths) < 100:
        fail(f"--dataset folder:{folder}: {len(paths)} pictures there, at least 100 are needed")
    pictures = []
    for path in tqdm(paths[:limit], "reading pictures", leave=False, delay=1, disable=None):
        try:
            image = ImageOps.exif_transpose(Image.open(path))
            if image.mode[0] in "IF":
                raise ValueError(f"mode {image.mode}, but 8 bits a channel are needed")
            image = image.convert("RGB").crop(boxes and boxes.get(image.size))
            pictures.append(np.asarray(ImageOps.fit(image, (size, size), Image.LANCZOS)))
        except Exception as error:  # PIL raises many kinds
            fail(f"{path}: not a readable picture ({error})")
    x = torch.from_numpy(np.stack(pictures))
    return x[..., :1] if (x == x[..., :1]).all() else x


@lru_cache(1)  # step_batches asks for the same epoch at every step
def batches(x, batch_size, seed, epoch):
    """An epoch's shuffled batches of indices (steps, batch_size), the last partial one left out."""
    generator = torch.Generator(x.device).manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(len(x), device=x.device, generator=generator)
    return order[: len(x) - len(x) % batch_size].view(-1, batch_size)


def step_batches(x, config, end):
    """For files that count steps: (step, indices) of the row of metrics that ends with `end`."""
    for step in range((end - 1) // config.eval_every * config.eval_every, end):
        epoch, place = divmod(step, len(x) // config.batch_size)
        yield step + 1, batches(x, config.batch_size, config.seed, epoch)[place]


@torch.no_grad()
def chunked(function, x, size=2000):
    """function(x), computed in chunks of rows without gradients."""
    return torch.cat([function(part) for part in x.split(size)])


# A run


def write_file(path, save):
    """save(temporary name), renamed onto path when all went well: a kill leaves the old file."""
    temporary = path.with_name(f".{path.name}")
    save(temporary)
    os.replace(temporary, path)


def write_json(path, content):
    write_file(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


class Run:
    """The folder of a run, its table of metrics, its pictures, and its mirror in W&B.

    nets: an nn.ModuleDict of what is evaluated and kept as model.pt. epoch_steps: steps an epoch.
    If config counts steps, an 'epoch' is a row of the table: eval_every steps, named by the last.
    """

    def __init__(self, config, device, nets, epoch_steps=1):
        self.config, self.nets, self.epoch_steps = config, nets, epoch_steps
        self.unit = "epoch" if hasattr(config, "epochs") else "step"
        self.total = getattr(config, f"{self.unit}s")
        self.file = Path(sys.modules[type(config).__module__].__file__)
        self.bar = tqdm(disable=True)
        self.history = {"commands": [], "commits": [], "images_seen": 0, "wall_s": 0.0}
        self.source = config.resume or config.eval
        self.saved = load_checkpoint(self.source, type(config)) if self.source else {}
        self.history |= self.saved.get("history", {})
        self.epoch = self.saved.get("epoch", 0)
        if config.resume:
            if "random" not in self.saved or self.epoch > self.total:
                fail(f"{config.resume}: no checkpoint.pt with at most {self.total} {self.unit}s")
            self.dir = Path(config.resume).absolute().parent
        else:
            self.history |= {"id": os.environ.get("WANDB_RUN_ID", os.urandom(4).hex()), "rows": []}
            name = time.strftime(f"%Y%m%d-%H%M%S-seed{config.seed}-{self.history['id'][:3]}")
            self.dir = Path(config.out_dir, self.file.stem, config.run_name or name).expanduser()
            try:
                self.dir.mkdir(parents=True)
            except OSError as error:
                fail(f"cannot make {self.dir}: {error.strerror}; another --run-name or --out-dir?")
        self.rows = self.history["rows"]
        self.start = time.time() - self.history["wall_s"]
        config.run_name = self.dir.name
        self.facts = self._facts(device)
        self.wandb = self._start_wandb() if config.wandb else None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def _facts(self, device):
        """Where the numbers come from; each process that takes part adds its command and commit."""
        git = "git describe --always --dirty --abbrev=40 --exclude='*'"  # '' where there is no git
        answer = subprocess.run(git, shell=True, cwd=ROOT, capture_output=True, text=True)
        words = ["python", f"{self.file.parent.name}/{self.file.name}", *sys.argv[1:]]
        self.history["commands"].append(shlex.join(words))
        self.history["commits"].append(answer.stdout.strip())
        values, usual = asdict(self.config), asdict(type(self.config)())
        if "preset" in usual:
            usual |= sys.modules[type(self.config).__module__].PRESETS[self.config.preset]
        own = [f"{k} {v}" for k, v in values.items() if v != usual[k] and k not in NO_SETTING]
        facts = {"experiment": self.file.stem, "run": self.dir.name, "setting": ", ".join(own)}
        facts |= {name: self.history[name] for name in ("commands", "commits")}
        facts |= {name: values[name] for name in ("dataset", "split", "seed")}
        facts |= {"matmul": torch.get_float32_matmul_precision(), "hardware": hardware(device)}
        facts["params"] = sum(p.numel() for p in self.nets.parameters())
        return facts | {"python": platform.python_version(), "torch": torch.__version__}

    def _start_wandb(self):
        names = {"project": "alae", "group": self.file.stem, "job_type": self.file.parent.name}
        names |= {"name": self.dir.name, "tags": [self.config.dataset[:64], self.config.split]}
        try:
            import wandb

            self.image = wandb.Image
            kwargs = {"resume": "allow", "config": asdict(self.config)}
            return wandb.init(id=self.history["id"], **names, **kwargs)
        except (Exception, KeyboardInterrupt) as error:  # not installed, not logged in, no network
            if not self.config.resume:
                self.dir.rmdir()
            fail(f"--wandb: {str(error) or 'interrupted'}")

    def _mirror(self, function):
        """function(the run in W&B). W&B never stops a training: once it fails it is left alone."""
        try:
            if self.wandb:
                function(self.wandb)
        except Exception as error:
            print(f"W&B failed, training goes on without it: {error}", file=sys.stderr)
            self.wandb = None

    def epochs(self, parts):
        """The epochs to train, none with --eval; restores parts {name: what has a state_dict}."""
        if self.saved:
            self._restore(parts if "random" in self.saved else self.nets)
        write_json(self.dir / "config.json", self.facts | {"config": asdict(self.config)})
        self._summarize("running")
        if self.config.eval:
            return
        every = 1 if self.unit == "epoch" else self.config.eval_every
        kwargs = {"initial": self.epoch * self.epoch_steps, "total": self.total * self.epoch_steps}
        self.bar = tqdm(desc=self.file.stem, mininterval=1 if sys.stderr.isatty() else 30, **kwargs)
        for before in range(self.epoch, self.total, every):
            self.epoch = min(before + every, self.total)
            self.sums, self.step_in_epoch = {}, 0
            yield self.epoch

    def _restore(self, parts):
        """Loads a checkpoint, random states included, or a trained model."""
        try:
            for name, part in parts.items():
                part.load_state_dict(self.saved[name])
        except (RuntimeError, KeyError, ValueError) as error:  # shapes that differ, another version
            if not self.config.resume:
                self.dir.rmdir()  # nothing was written yet
            fail(f"{self.source} does not fit this data, or version: {error}")
        if self.config.resume:
            torch.set_rng_state(self.saved["random"])
            torch.cuda.set_rng_state_all(self.saved["random_cuda"][: torch.cuda.device_count()])

    @property
    def progress(self):
        """Share of the training that is behind us, where config has epochs; for schedules."""
        return (self.epoch - 1 + self.step_in_epoch / self.epoch_steps) / self.total

    def step(self, losses, images):
        """After each training step on so many images: its losses {name: tensor () or bool}."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss
        self.step_in_epoch += 1
        self.history["images_seen"] += images
        if self.step_in_epoch == 1:  # from here on the speed is measured
            self.begin, self.images_before = time.perf_counter(), self.history["images_seen"]
        self.bar.update()
        if self.step_in_epoch % 100 == 0:
            self._mean_losses()

    def _mean_losses(self):
        """The epoch's mean losses so far, the first of them in the bar; stops if one is NaN."""
        means = {f"train/{k}": float(v) / self.step_in_epoch for k, v in self.sums.items()}
        for name, mean in means.items():
            if not np.isfinite(mean):
                self._end("diverged", f"{name} became {mean} by {self.unit} {self.epoch}", 1)
        name, mean = next(iter(means.items()))
        self.bar.set_postfix_str(f"{self.unit} {self.epoch}, {name} {mean:.4g}", refresh=False)
        return means

    def log_losses(self):
        """The epoch's mean losses, and images per second, as a new row of metrics.csv."""
        losses = self._mean_losses()  # waits for the device
        seconds = time.perf_counter() - self.begin
        images = self.history["images_seen"] - self.images_before
        self.log(losses | ({"perf/images_per_s": images / seconds} if images else {}))

    def log(self, metrics):
        """Adds metrics to this epoch's row, in metrics.csv, summary.json and W&B."""
        if not self.rows or self.rows[-1][self.unit] != self.epoch:
            self.rows.append({self.unit: self.epoch})
        self.rows[-1] |= metrics
        write_file(self.dir / "metrics.csv", self._write_rows)
        self._summarize("running")
        self._mirror(lambda web: web.log(metrics, step=self.epoch))

    def _write_rows(self, path):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(ChainMap(*reversed(self.rows))))  # all their names
            writer.writeheader()
            writer.writerows(self.rows)

    def is_due(self):
        """Whether to evaluate after this epoch; after the last one all is evaluated anyway."""
        return self.epoch % self.config.eval_every == 0 and self.epoch < self.total

    def save(self, parts, name="checkpoint.pt"):
        """The parts' states, and what --resume needs to go on bit for bit."""
        content = {key: part.state_dict() for key, part in parts.items()}
        content |= {"experiment": self.file.stem, "config": asdict(self.config)}
        content |= {"epoch": self.epoch, "history": self.history}
        if name == "checkpoint.pt":
            content["random"] = torch.get_rng_state()
            content["random_cuda"] = torch.cuda.get_rng_state_all()
        write_file(self.dir / name, lambda temporary: torch.save(content, temporary))

    def finish(self, metrics):
        """model.pt, curves.png, and the final metrics in summary.json and on the screen."""
        self.log(metrics)
        if len(self.rows) > 1:
            self.picture("curves", curves(self.rows, self.unit, self.dir.name))
        self.save(self.nets, "model.pt")
        self._end("done")
        for name, value in metrics.items():
            print(f"{name:24s} {value:10.4g}")
        print(f"{self.dir}: {len(list(self.dir.glob('*.png')))} pictures")

    def picture(self, name, figure):
        """A matplotlib figure as <name>.png."""
        path = self.dir / f"{name}.png"
        write_file(path, lambda temporary: figure.savefig(temporary, dpi=150, bbox_inches="tight"))
        self._mirror(lambda web: web.log({f"media/{name}": self.image(str(path))}, step=self.epoch))

    def _summarize(self, status):
        self.history["wall_s"] = round(time.time() - self.start, 1)
        self.summary = self.facts | {f"{self.unit}s": self.epoch, "status": status}
        self.summary |= {name: self.history[name] for name in ("images_seen", "wall_s")}
        self.summary |= ChainMap(*reversed(self.rows))  # the last value of each
        write_json(self.dir / "summary.json", self.summary)

    def _interrupt(self, *_):
        path = self.dir / "checkpoint.pt"
        advice = f"go on with: {shlex.join(['python', sys.argv[0], '--resume', str(path)])}"
        self._end("interrupted", advice if path.exists() else "nothing was saved yet", 130)

    def _end(self, status, message="", code=0):
        """The summary's last word; with a message, the program's too."""
        self.bar.close()
        signal.signal(signal.SIGINT, lambda *_: fail(f"{status}: {message or self.dir}", 130))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._summarize(status)
        self._mirror(lambda web: web.summary.update(self.summary))
        self._mirror(lambda web: web.finish(exit_code=code))
        if message:
            fail(f"{status}: {message}", code)


# Pictures


def grid(images, columns, title, rows=()):
    """A figure of images (N, C, H, W), row by row; rows: their names."""
    images = nn.functional.pad(images.detach().float().cpu().clamp(0, 1), (1, 1, 1, 1), value=1)
    lines = [torch.cat(list(line), 2) for line in images.split(columns)]
    sheet = torch.cat(lines, 1).permute(1, 2, 0).squeeze(2).numpy()
    figure = Figure(figsize=(8, 0.5 + 8 * len(lines) / columns))
    axes = figure.add_subplot(title=title, xticks=[])
    axes.imshow(sheet, cmap="gray", interpolation="nearest")
    axes.set_yticks([(i + 0.5) * len(sheet) / len(lines) for i in range(len(rows))], rows)
    return figure


def pairs(images, reconstructions, title):
    """A figure of images (N, C, H, W), ten a row, each row above that of their reconstructions."""
    lines = len(images) // 10
    both = torch.stack([images, reconstructions])[:, : 10 * lines]
    both = both.unflatten(1, (lines, 10)).transpose(0, 1).flatten(0, 2)
    return grid(both, 10, title, ["x", "rec."] * lines)


def curves(rows, unit, title):
    """A figure with a panel for each number in the rows, against the unit."""
    names = sorted(k for k in {*ChainMap(*rows)} - {unit} if sum(k in row for row in rows) > 1)
    figure = Figure(figsize=(13, 2.8 * -(-len(names) // 4)), layout="constrained")
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(-(-len(names) // 4), 4, place, xlabel=unit, title=name)
        known = [row for row in rows if name in row]
        axes.plot([row[unit] for row in known], [row[name] for row in known], ".-")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    return figure
