"""What every experiment shares and no paper owns: options, data, a run's files, pictures, and the instruments that
measure all methods alike. Networks, losses, optimizers and update orders stay in the experiments."""
import argparse, csv, ctypes, inspect, io, json, os, platform, re, shlex, signal, subprocess, sys, time, uuid  # noqa: E401
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, one_hot, pad
try:
    from tqdm import tqdm
except ImportError:  # a plain line now and then will do
    tqdm = None

ROOT = Path(__file__).resolve().parent
TOYS = ("swiss_roll", "sine_sheet")
FREE_ON_RESUME = {"resume", "epochs", "device", "data_dir", "wandb", "eval_every", "eval_weights"}  # all else must agree
FREE_ON_EVAL = {"eval", "resume", "device", "data_dir", "dataset", "split", "out_dir", "run_name", "wandb", "smoke", "matmul"}
NO_SETTING = FREE_ON_RESUME - {"eval_weights"} | {"seed", "dataset", "split", "out_dir", "run_name", "matmul", "references"}

def fail(message, code=2):
    """One clear line on stderr and exit code 2: for all that a user can get wrong."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)

def option(default, help, choices=None, low=None, high=1e300):  # a dataclass field; the bounds are inclusive
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})

@dataclass
class Protocol:
    """The options that all experiments have in common; each Config adds its own."""
    seed: int = option(0, "seed of the initial weights, the shuffling and z", low=0, high=2 ** 32 - 1)
    device: str = option("auto", "auto takes cuda, else mps, else cpu", choices=("auto", "cpu", "cuda", "mps"))
    data_dir: str = option("", "folder of the datasets, laid out as torchvision does (default: this repository's data)")
    dataset: str = option("mnist", "mnist, fashion_mnist, cifar10, celeba or folder:PATH (your own pictures)")
    split: str = option("dw", "test on dw: the official images; sw: a sixth of the training images; val: another sixth, "
                        "to choose hyperparameters", ("dw", "sw", "val"))
    out_dir: str = option(os.path.relpath(ROOT / "runs"), "a run is written to OUT_DIR/<experiment>/<run-name>")
    run_name: str = option("", "name of the run (default: time and seed)")
    wandb: bool = option(False, "mirror the run to Weights & Biases (WANDB_MODE=offline works too)")
    smoke: bool = option(False, "a tiny subset and a few steps through the whole path, in seconds")
    matmul: str = option("auto", "fp32 products; auto: medium if as exact, else highest", ("auto", "highest", "medium"))
    recipes = {}  # no field: {(field, value): {other field: its default then}}; a value's end, from a colon on, is ignored

    @classmethod
    def defaults(cls, chosen):
        return {k: v for (key, value), fields in cls.recipes.items() if str(chosen.get(key)).split(":")[0] == str(value)
                for k, v in fields.items()}

def parse_config(Config, argv=None):
    """Command line → Config; the defaults are --resume's, else those of Config.recipes. Bad input: one line, exit 2."""
    parser = argparse.ArgumentParser(None, None, sys.modules[Config.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    flags = {f.name: "--" + f.name.replace("_", "-") for f in fields(Config)}
    for f in fields(Config):
        text = (f.metadata["help"] + f" (default: {f.default})" * (f.default != "")).replace("%", "%%")
        first = f.default[0] if (several := isinstance(f.default, tuple)) else f.default
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(first, bool) else {
            "type": (lambda d: d and os.path.abspath(d)) if f.name == "data_dir" else type(first), "choices": f.metadata["choices"],
            "metavar": "|".join(f.metadata["choices"] or [f.name.upper()]), "nargs": "+" if several else None}
        parser.add_argument(flags[f.name], default=argparse.SUPPRESS, help=text, **kind)
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in vars(parser.parse_args(argv)).items()}
    if path := given.get("resume") or given.get("eval"):
        saved, file = (load_checkpoint(path, Config)[key] for key in ("config", "file"))
        model, free = file != "checkpoint.pt", FREE_ON_RESUME
        if given.get("resume"):
            model and fail(f"{path} holds a trained model, not the checkpoint of a run")
        else:  # --eval: of a model all that it was trained with stays
            free = FREE_ON_EVAL | (set() if model else {"eval_weights"})
            saved = {key: v for key, v in saved.items() if key not in FREE_ON_EVAL - {"dataset", "split"}}
        for key in (key for key in given.keys() - free if given[key] not in (saved[key], "auto")):
            fail(f"{path} was trained with {flags[key]} {saved[key]}, not {given[key]}")
        given = saved | {key: v for key, v in given.items() if key in free or v != "auto"}
    given = Config.defaults(given) | given
    for f, low, high in ((f, f.metadata["low"], f.metadata["high"]) for f in fields(Config)):
        for value in np.atleast_1d(given.get(f.name, f.default)) if low is not None else ():
            low <= value <= high or fail(f"{flags[f.name]} {value}: must be at least {low}" + f", at most {high}" * (high < 1e300))
    return Config(**given)

def probe_matmul(device):
    """'medium' where it keeps fp32 accuracy (CPUs where it only picks another library), 'highest' where it rounds."""
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    torch.set_float32_matmul_precision("medium")
    product, exact = (a.to(device) @ b.to(device)).cpu().double(), a.double() @ b.double()
    return "medium" if (product - exact).norm() < 2e-6 * exact.norm() else "highest"

def setup(config):
    """Seeds, resolves --matmul auto in the config, makes a CPU fast; returns the torch.device."""
    torch.manual_seed(config.seed)  # of all devices; nothing here draws from numpy's or Python's global generators
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind in have if have[kind]) if config.device == "auto" else config.device
    device = torch.device(name) if have[name] else fail(f"--device {name}: there is no such device here")
    if platform.libc_ver()[0] == "glibc":  # keep freed tensors in the process: no page faults in the inner loop
        ctypes.CDLL(None).mallopt(-3, 1 << 30), ctypes.CDLL(None).mallopt(-1, 1 << 30)  # M_MMAP_, M_TRIM_THRESHOLD
    config.matmul = probe_matmul(device) if config.matmul == "auto" else config.matmul
    torch.set_float32_matmul_precision(config.matmul)
    return device

def load_images(name, data_dir="", split="dw", device="cpu", size=None, limit=None):
    """x_train, y_train, x_test, y_test: images (N, C, H, W) in [0, 1] and labels (N,), or None, on the device.
    split: sw holds out a sixth of the training images, val another sixth, always the same; a folder's dw is its sw.
    size: of the square images (default: their own, or 64). limit: so many training images, half as many for test."""
    from torchvision import datasets
    classes = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "celeba": "CelebA"}
    cls, folder = getattr(datasets, classes.get(name, ""), None), Path(data_dir or ROOT / "data")
    if name.startswith("folder:"):
        folder = Path(name.removeprefix("folder:")).expanduser()
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".gif"))
        if len(paths) < 6:
            fail(f"--dataset {name}: " + (f"only {len(paths)} pictures there" if folder.is_dir() else "no such folder"))
        parts = [(read_pictures(paths[:limit], size or 64), None)]
    elif not cls:
        fail(f"--dataset {name}: unknown; choose {', '.join(classes)} or folder:PATH")
    else:
        for file, md5 in ((folder / cls.__name__ / "raw" / file, md5) for file, md5 in getattr(cls, "resources", [])):
            if file.exists() and not datasets.utils.check_integrity(file, md5):
                fail(f"{file} is corrupt (wrong MD5): delete it and run again to fetch it anew")
        for last in (False, True):
            try:
                parts = [cls(folder, p, download=True) for p in (("train", "test") if name == "celeba" else (True, False))]
                break
            except Exception as error:  # torchvision raises many kinds: no network, no permission, a damaged file
                last and fail(f"{name} is not in {folder} and could not be fetched, or is damaged there ({error})")
                time.sleep(2)  # another run may just be unpacking it
        parts = [(read_pictures([folder / "celeba/img_align_celeba" / f for f in p.filename[:limit]], size or 64), None)
                 if name == "celeba" else (torch.as_tensor(p.data), torch.as_tensor(p.targets)) for p in parts]

    if split != "dw" or len(parts) == 1:
        (x, y), n = parts[0], len(parts[0][0]) // 6  # val never sees the test images of sw:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[n if split == "val" else 0:]
        parts = [(x[i], None if y is None else y[i]) for i in (order[n:], order[:n])]
    result = []
    for (x, y), n in zip(parts, (limit, limit and limit // 2)):
        x = x[:n].reshape(*x[:n].shape[:3], -1).permute(0, 3, 1, 2).to(device).float().div_(255).contiguous()
        x = interpolate(x, (size, size), mode="bilinear", antialias=True) if size and size != x.shape[-1] else x
        result += [x, None if y is None else y[:n].to(device)]
    return result

def load_vectors(config, device, toys=True, size=None):
    """x_train (N, d), y_train, x_test, y_test and the shape of an image; the toys, for linear maps, have no labels.
    size: of photographs, which have none of their own (celeba, folder)."""
    if not toys or config.dataset not in TOYS:
        size = size if config.dataset.startswith(("celeba", "folder:")) else None
        x, y, u, v = load_images(config.dataset, config.data_dir, config.split, device, size, 2000 * config.smoke or None)
        return x.flatten(1), y, u.flatten(1), v, x.shape[1:]
    rng, roll = np.random.default_rng(0), config.dataset == "swiss_roll"
    u, v = rng.uniform(size=(2, 5000))
    t = np.pi * (1.5 + 3 * u if roll else 4 * u - 2)
    points = [t * np.cos(t), 21 * v, t * np.sin(t)] if roll else [t, 6 * v, np.sin(t)]
    x = torch.tensor(np.stack(points, 1) + rng.normal(0, 0.1, (5000, 3))).float().to(device)
    return x[:4000], None, x[4000:], None, None

def read_pictures(paths, size):
    """Decode, crop to the central square and resize: uint8 (N, size, size, 3), or (…, 1) if all are grey."""
    from PIL import Image, ImageOps
    pictures = []
    for path in tqdm(paths, "reading pictures", leave=False, delay=1) if tqdm else paths:
        try:
            pictures.append(np.asarray(ImageOps.fit(Image.open(path).convert("RGB"), (size, size), Image.LANCZOS)))
        except Exception as error:  # PIL raises many kinds
            fail(f"{path}: not a readable picture ({error})")
    x = torch.from_numpy(np.stack(pictures))
    return x[..., :1] if (x == x[..., :1]).all() else x

def batches(n, size, generator, skip=0):
    """Indices of one epoch's shuffled batches on the generator's device; the last, partial batch is dropped."""
    yield from torch.randperm(n, device=generator.device, generator=generator)[:n - n % size].view(-1, size)[skip:]

def in_chunks(function, x, size=2000):
    """function(x), computed chunk by chunk without gradients."""
    with torch.no_grad():
        return torch.cat([function(part) for part in x.split(size)])

def write(path, save):
    """save(temporary name), renamed onto `path` only if all went well; a dict is written as JSON."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save(temporary) if callable(save) else temporary.write_text(json.dumps(save, indent=1) + "\n")
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter from torch.save
        fail(f"cannot write {path}: {error}")
    finally:
        temporary.unlink(missing_ok=True)

def load_checkpoint(path, Config):
    """What Run.save wrote, on the CPU; exit 2 unless it is that, of Config's experiment and with its fields."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        of, has, _ = checkpoint["experiment"], checkpoint["config"].keys(), checkpoint["file"]
    except Exception as error:  # torch.load raises many kinds for a file that is none of its own
        fail(f"{path}: " + ("no such file" if isinstance(error, FileNotFoundError) else "no checkpoint, or a damaged one"))
    if (of, has) != (experiment := Path(inspect.getfile(Config)).stem, {f.name for f in fields(Config)}):
        fail(f"{path} is a checkpoint of {of}" + (f", not of {experiment}" if of != experiment else "'s other version"))
    return checkpoint

class Run:
    """A run's folder with all its files (see README), progress bar, answer to Ctrl-C and NaN, and mirror in W&B.
    params: number of trainable parameters; unit: 'epoch' or 'step'. Given a checkpoint, the run goes on in its folder."""
    done, rows = property(lambda self: self.at["done"]), property(lambda self: self.at["rows"])

    def __init__(self, config, device, params, checkpoint=None, unit="epoch"):
        file = Path(inspect.getfile(type(config)))
        self.config, self.unit, self.mark, self.trained, self.stop, self.bar = config, unit, None, [0, 0.0], False, None
        self.at = {"id": uuid.uuid4().hex[:8], "done": 0, "steps": 0, "images": 0, "wall_s": 0, "rows": [], "commands": []}
        if checkpoint:
            self.at, self.dir = checkpoint["run"], Path(config.resume).absolute().parent
            if self.done > getattr(config, "epochs", self.done):
                fail(f"--epochs {config.epochs}: {config.resume} has {self.done} already")
            for restore, state in zip((torch.set_rng_state, torch.cuda.set_rng_state_all), checkpoint["random"]):
                restore(state)
        else:
            name = config.run_name or f"{time.strftime('%Y%m%d-%H%M%S')}-seed{config.seed}-{self.at['id'][:3]}"
            self.dir = Path(config.out_dir, file.stem, name)
            try:
                Path(name).name == name or fail(f"--run-name {name}: a plain name, please")
                self.dir.mkdir(parents=True)
            except OSError as error:
                fail(f"{self.dir} exists: choose another --run-name, or go on with it by --resume" if self.dir.is_dir()
                     else f"cannot write {self.dir}: {error.strerror}")
        self.at["commands"].append(f"python {file.parent.name}/{file.name} {shlex.join(sys.argv[1:])}".strip())
        self.born, config.run_name = time.time() - self.at["wall_s"], self.dir.name
        git = subprocess.run("git describe --always --dirty --abbrev=40 --exclude='*'", shell=True, cwd=ROOT, text=True,
                             capture_output=True).stdout
        cpu = re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
        usual = {f.name: f.default for f in fields(config)} | config.defaults(asdict(config))
        setting = ", ".join(f"{k} {v}" for k, v in asdict(config).items() if v != usual[k] and k not in NO_SETTING)
        self.facts = {"experiment": file.stem, "run": config.run_name, "dataset": config.dataset, "split": config.split,
                      "setting": setting, "seed": config.seed, "command": " && ".join(self.at["commands"]),
                      "hardware": torch.cuda.get_device_name() if device.type == "cuda" else
                      f"{(cpu or [platform.processor()])[0]}, {torch.get_num_threads()} threads", "params": params,
                      "torch": torch.__version__, "commit": git[:40].strip(), "dirty": "-dirty" in git}
        self.wandb = self._start_wandb(file, checkpoint) if config.wandb else None
        write(self.dir / "config.json", {"config": asdict(config), **self.facts, "id": self.at["id"],
                                         "python": sys.version, "numpy": np.__version__})
        self.summarize("running")
        signal.signal(signal.SIGINT, self._interrupt), signal.signal(signal.SIGTERM, self._interrupt)

    def _start_wandb(self, file, checkpoint):
        try:
            import wandb
            if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
                raise RuntimeError("nobody is logged in: run 'wandb login' first, or set WANDB_MODE=offline")
            return wandb.init(project="alae", group=file.stem, job_type=file.parent.name, name=self.dir.name, id=self.at["id"],
                              resume="allow", tags=[self.config.dataset, self.config.split], config=asdict(self.config))
        except Exception as error:  # not installed, nobody logged in, no network
            checkpoint or self.dir.rmdir()
            fail(f"--wandb: {error}")

    def _mirror(self, function):  # W&B never stops a training: after its first failure it is left alone
        try:
            self.wandb and function(self.wandb)
        except Exception as error:
            self.wandb = print(f"W&B failed, training goes on without it: {error}", file=sys.stderr)

    def _interrupt(self, *_):
        self.stop = True  # the training loop looks at it after each step
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second time: at once

    def tick(self, images, loss, steps):
        """After each of `steps` training steps: bar, throughput, and now and then the loss, which must be finite."""
        self.at["images"], self.at["steps"], now = self.at["images"] + images, self.at["steps"] + 1, time.perf_counter()
        if self.mark:  # the first step after a start or an evaluation is left out
            self.trained = [self.trained[0] + images, self.trained[1] + now - self.mark]
        self.mark, n = now, self.at["steps"]
        if tqdm and not self.bar:
            self.bar = tqdm(None, self.facts["experiment"], steps, initial=n - 1, mininterval=1 if sys.stderr.isatty() else 30)
        if n % 50 == 0 and self.bar:
            self.bar.set_postfix_str(f"loss {self.finite(loss):.4g}", refresh=False)
            self.bar.update(n - self.bar.n)
        elif n % 500 == 0:
            print(f"step {n} of {steps}, loss {self.finite(loss):.4g}", flush=True)

    def finite(self, loss):
        return loss if np.isfinite(loss := float(loss)) else self._abort(
            "diverged", f"the loss became {loss} after {self.unit} {self.done}: stopped", 1)

    def _abort(self, status, message, code):
        self.bar and self.bar.close(), self.summarize(status)
        self._mirror(lambda w: (w.summary.update(self.summary), w.finish(exit_code=code)))
        fail(message, code)

    def log(self, row):
        """Add a row (the contract's keys, and the unit) to metrics.csv; mirror it in summary.json and W&B."""
        self.at["done"], self.mark = row[self.unit], None
        row = row | ({"perf/images_per_s": self.trained[0] / self.trained[1]} if self.trained[1] else {})
        self.rows.append(row)
        writer = csv.DictWriter(table := io.StringIO(), dict.fromkeys(key for row in self.rows for key in row))
        writer.writeheader(), writer.writerows(self.rows)
        write(self.dir / "metrics.csv", lambda temporary: temporary.write_text(table.getvalue()))
        self.summarize("running")
        self._mirror(lambda w: w.log(row, step=self.done))

    def summarize(self, status, **metrics):
        last = {key: value for row in self.rows for key, value in row.items() if key != self.unit}
        self.summary = self.facts | {f"{self.unit}s": self.done, "images_seen": self.at["images"], "status": status,
                                     "wall_s": round(time.time() - self.born, 1)} | last | metrics
        write(self.dir / "summary.json", self.summary)

    def picture(self, name, figure):
        """Save a matplotlib figure as <name>.png."""
        write(path := self.dir / f"{name}.png", lambda t: figure.savefig(t, format="png", dpi=150, bbox_inches="tight"))
        self._mirror(lambda w: w.log({f"media/{name}": sys.modules["wandb"].Image(str(path))}, step=self.done))

    def animation(self, name, sheets, duration):
        """Save PIL images as <name>.gif; duration in ms: of all alike, or of each."""
        write(path := self.dir / f"{name}.gif", lambda temporary: sheets[0].save(
            temporary, "GIF", save_all=True, append_images=sheets[1:], duration=duration, loop=0))
        self._mirror(lambda w: w.log({f"media/{name}": sys.modules["wandb"].Video(str(path), format="gif")}, step=self.done))

    def save(self, name, **content):
        """torch.save of the content, with all that load_checkpoint and a continuation need."""
        self.at["wall_s"] = time.time() - self.born
        content |= {"experiment": self.facts["experiment"], "file": name, "config": asdict(self.config), "run": self.at,
                    "random": [torch.get_rng_state()] + [torch.cuda.get_rng_state_all()] * torch.cuda.is_available()}
        write(self.dir / name, lambda temporary: torch.save(content, temporary))

    def leave(self, advice="go on with: python {} --resume {}/checkpoint.pt"):
        """After Ctrl-C, once the checkpoint is saved: say how to go on, and exit."""
        self._abort("interrupted", "interrupted; " + advice.format(sys.argv[0], self.dir), 130)

    def finish(self, **metrics):
        """Add the final metrics to the summary, close the run and print them."""
        self.bar and self.bar.close(), self.summarize("done", **metrics)
        self._mirror(lambda w: (w.summary.update(self.summary), w.finish()))
        print(*(f"{k:24s} {v:10.4g}" for k, v in self.summary.items() if k.startswith(("eval/", "perf/"))), sep="\n")
        print(f"{self.dir}: {len(list(self.dir.glob('*.png')))} pictures, {self.summary['wall_s']:.0f} s")

def recon_mse(x, x_hat):
    """Mean over images and pixels of (x − x̂)², x̂ clipped to [0, 1]."""
    return (x - x_hat.clamp(0, 1)).square().mean().item()

@torch.no_grad()
def knn_accuracy(train, y_train, test, y_test):
    """% right of the nearest neighbour (L2) of each test row (M, d) among the training rows (N, d)."""
    train, test = train - (centre := train.mean(0)), test - centre  # for the accuracy of ‖a‖² − 2ab
    norms = train.square().sum(1)
    nearest = in_chunks(lambda part: torch.addmm(norms, part, train.T, alpha=-2).argmin(1), test, 500)
    return 100 * (y_train[nearest] == y_test).sum().item() / len(y_test)

@torch.no_grad()
def svm_accuracy(train, y_train, test, y_test, C=0.02):
    """% right of liblinear's LinearSVC: one-vs-rest, min ½‖w‖² + C Σ max(0, 1 − y w·x)², the bias a regularised weight of
    a constant feature. L-BFGS to the optimum, in v = Lᵀw with LLᵀ = I + 2C XᵀX, the Hessian at 0."""
    X, X_test = pad(train, (0, 1), value=1.0), pad(test, (0, 1), value=1.0)
    Y = 2 * one_hot(y_train).to(X) - 1  # (N, classes)
    L = torch.linalg.cholesky(torch.eye(X.shape[1], device=X.device) + 2 * C * (X.T @ X))
    v = torch.zeros(X.shape[1], Y.shape[1], device=X.device, requires_grad=True)
    def loss():
        w = torch.linalg.solve_triangular(L.T, v, upper=True)
        slack = (1 - Y * (X @ w)).clamp_(min=0)
        v.grad = torch.linalg.solve_triangular(L, w - 2 * C * (X.T @ (Y * slack)), upper=False).contiguous()
        return 0.5 * w.square().sum() + C * slack.square().sum()
    torch.optim.LBFGS([v], max_iter=200, tolerance_grad=1e-4, tolerance_change=0, line_search_fn="strong_wolfe").step(loss)
    return 100 * ((X_test @ torch.linalg.solve_triangular(L.T, v, upper=True)).argmax(1) == y_test).sum().item() / len(y_test)

def mlp_accuracy(train, y_train, test, y_test, epochs=20, width=128):
    """% right of an MLP with one hidden layer on standardised features (Adam 1e-3, batch 250; seed 0, always)."""
    mean, std, generator = train.mean(0), train.std(0) + 1e-6, torch.Generator(train.device).manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the CPU's alone, where the net begins
        net = nn.Sequential(nn.Linear(train.shape[1], width), nn.ReLU(), nn.Linear(width, int(y_train.max()) + 1))
    optimizer = torch.optim.Adam(net.to(train.device).parameters(), fused=True)
    for i in (i for _ in range(epochs) for i in batches(len(train), min(250, len(train)), generator)):
        optimizer.zero_grad(), cross_entropy(net((train[i] - mean) / std), y_train[i]).backward(), optimizer.step()
    return 100 * (net((test - mean) / std).argmax(1) == y_test).sum().item() / len(y_test)

def accuracies(kind, *features, prefix="eval"):
    """The contract's accuracies; features: train (N, d), y_train, test (M, d), y_test; kind: short, or long (no MLP)."""
    len(features[1].unique()) > 1 or fail("all labels are the same: there is nothing to classify")
    methods = {"knn": knn_accuracy, "svm": svm_accuracy} | ({"mlp": mlp_accuracy} if kind == "short" else {})
    return {f"{prefix}/{name}_acc_{kind}": method(*features) for name, method in methods.items()}

def evaluate(config, data, maps, full, prefix="eval"):
    """The contract's metrics, or those of pictures and 1-NN on short features. data: x (N, X) in [0, 1],
    y, x_test, y_test, an image's shape (what x has in further columns is for encode, short and long alone); maps: encode
    (x → code), decode (code → x), prior (n → n codes), short and long (x → features)."""
    (x, y, u, v, shape), images = data, data[2][:, :data[4].numel()].unflatten(1, data[4])
    x_hat = in_chunks(lambda part: maps["decode"](maps["encode"](part)), u).unflatten(1, shape)
    row = {f"{prefix}/recon_mse": recon_mse(images, x_hat)}
    for kind in ("short", "long")[:1 + full] if v is not None else ():
        features = in_chunks(maps[kind], x), y, in_chunks(maps[kind], u), v
        row |= accuracies(kind, *features, prefix=prefix) if full else {f"{prefix}/knn_acc_short": knn_accuracy(*features)}
    if config.dataset == "mnist":
        samples = in_chunks(maps["decode"], maps["prior"](1000 if config.smoke else 10_000)).unflatten(1, shape)
        row |= {f"{prefix}/identity": identity(x_hat, v), f"{prefix}/fid": fid(images, samples)}
    return row

def untrained(config, data, maps):
    """The row before training: the same; with --references all of the untrained encoder's and of raw pixels."""
    row, (x, y, u, v, shape) = evaluate(config, data, maps, full=False), data
    return row | (evaluate(config, data, maps, full=True, prefix="untrained") | accuracies(
        "short", x[:, :shape.numel()], y, u[:, :shape.numel()], v, prefix="pixels") if config.references and y is not None else {})

def benchmark(step, images, config):
    """Print the median time of step(), a training step on so many images."""
    from torch.utils.benchmark import Timer
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads()).blocked_autorange(
        min_run_time=0.2 if config.smoke else 5)
    print(f"--matmul {config.matmul}: {1e3 * timer.median:.1f} ms per step (interquartile range {1e3 * timer.iqr:.1f}), "
          f"{images / timer.median:.0f} images/s")

@cache
def lenet(device, trained=True):
    """The classifier behind identity and fid, net[:-1] its 84 features; made once, by `python assets/train_lenet.py`."""
    with torch.random.fork_rng(devices=[]):  # a training's random numbers are left alone
        net = nn.Sequential(
            nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(800, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)).to(device)
    trained and net.load_state_dict(torch.load(ROOT / "assets/lenet.pt", map_location=device, weights_only=True))
    return net

def judge(x, net):
    """LeNet, or a part of it, on any images: grey, antialiased to 28×28 where larger, clipped to [0, 1]."""
    x = x if x.shape[-1] == 28 else interpolate(x, (28, 28), mode="bilinear", antialias=True)
    return in_chunks(net, x.mean(1, keepdim=True).clamp(0, 1))

def identity(x_hat, y):
    """% of reconstructions that LeNet gives the true label."""
    return 100 * (judge(x_hat, lenet(x_hat.device)).argmax(1) == y).sum().item() / len(y)

def fid(x, x_fake):
    """LeNet-FID ‖μ − μ'‖² + tr(C + C' − 2(CC')^½), on the 84 penultimate features; comparable with itself alone."""
    f, g = (judge(images, lenet(x.device)[:-1]).cpu().double().numpy() for images in (x, x_fake))
    C, D = np.cov(f.T), np.cov(g.T)  # tr (CD)^½ is the sum of the roots of CD's eigenvalues
    return float(np.square(f.mean(0) - g.mean(0)).sum() + np.trace(C + D - 2 * np.diag(
        np.sqrt(np.linalg.eigvals(C @ D).astype(complex)).real)))

def grid(images, columns, title, rows=()):
    """A figure of images (N, C, H, W), row by row; rows: names of the rows."""
    images, lines = pad(images.detach().float().cpu().clamp(0, 1), (1, 1, 1, 1), value=1), -(-len(images) // columns)
    sheet = torch.cat([torch.cat(list(line), 2) for line in images.split(columns)], 1).permute(1, 2, 0).numpy()
    axes = (figure := Figure(figsize=(8, 0.5 + 8 * lines / columns))).add_subplot(title=title)
    axes.imshow(sheet if sheet.shape[2] > 1 else sheet[..., 0], cmap="gray", interpolation="nearest")
    axes.set(xticks=[], yticks=[(i + 0.5) * len(sheet) / lines for i in range(len(rows))], yticklabels=rows)
    return figure

@torch.no_grad()
def draw(run, data, maps, panels, title):
    """Samples, reconstructions and interpolations of the same codes and test images every time; curves of run.rows.
    data, maps: as for evaluate, but a GAN has decode and prior alone; panels: {ylabel: keys of rows}."""
    (_, _, u, _, shape), title = data, f"{title}, {run.unit} {run.done}"
    n, codes = min(10, len(u)), maps["encode"](u[:16]) if "encode" in maps else maps["prior"](16)
    def picture(name, x, columns, what, rows=()):
        run.picture(name, grid(x.reshape(-1, *shape), columns, f"{title}: {what}", rows))
    picture("samples", maps["decode"](maps["prior"](100)), 10, "samples")
    if "encode" in maps:
        x = u[:min(50, len(u)) // n * n]
        pairs = torch.stack([x[:, :shape.numel()], maps["decode"](maps["encode"](x))]).unflatten(1, (-1, n)).transpose(0, 1)
        picture("reconstructions", pairs, n, "test images x and their reconstructions", ["x", "rec."] * len(pairs))
    t = torch.linspace(0, 1, 10, device=u.device)[:, None]
    between = maps["decode"](((1 - t) * codes[:8, None] + t * codes.flip(0)[:8, None]).flatten(0, 1))
    picture("interpolations", between, 10, f"decoded on the way between two {'test codes' if 'encode' in maps else 'z'}")
    lines = {ylabel: {key.split("/")[1]: zip(*points) for key in keys if (points := [
        (row[run.unit], row[key]) for row in run.rows if key in row])} for ylabel, keys in panels.items()}
    run.picture("curves", curves({ylabel: line for ylabel, line in lines.items() if line}, run.unit, title))

def curves(panels, xlabel, title, **scales):
    """A figure with a panel for each {ylabel: {label: (xs, ys[, format])}}; scales: xscale, yscale."""
    figure = Figure(figsize=(max(3.6 * len(panels), 6), 3.4), layout="constrained")
    for axes, (ylabel, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for label, line in lines.items():
            axes.plot(*line, label=label)
        axes.set(xlabel=xlabel, ylabel=ylabel, **scales), axes.grid(alpha=0.3), axes.legend(fontsize=8)
    figure.suptitle(title)
    return figure
