"""
How a run is set up and kept: what is mechanical and the same in every stage. A config file, config/<recipe>.py, is some
lines of `name = value  # why`; it is parsed, never executed. What a reader may skip is in config/tools/.

    settings     override, LIMITS                 defaults < config files < --key=value, left to right
    machine      pick_device, place, autocast     device and number type
    processes    my_share, sum_numbers, gather    torchrun: each process computes a share of the batch
    training     optimizers, lr_factor, update    Muon + AdamW, one step of them
    keeping      save, load, resume, Run          checkpoints, out/<run>/log.csv
"""

import ast
import atexit
import contextlib
import csv
import dataclasses
import difflib
import functools
import itertools
import math
import os
import signal
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist

from model import SettingError

# settings ------------------------------------------------------------------------------------------------------------

MOST = 10 ** 9  # of any number
LIMITS = {  # setting: its least and largest value, or the values it may have; a name means the same in every stage
    **dict.fromkeys("""batch_size accumulation eval_interval samples max_new_tokens
        captions_per_photo block_size patch_size image_size size n_val n_layer n_head n_embd vit_layer vit_head vit_embd
        gpt_layer gpt_head gpt_embd text_layer text_embd cross_every experts_per_token""".split(), (1, MOST)),
    **dict.fromkeys("""grad_clip temperature top_k muon_lr adam_lr lr weight_decay warmup_steps shift length_penalty
        first_size frames across_layer n_experts balance_weight context train_size max_sample_tokens
        max_surprise""".split(), (0, MOST)),
    **dict.fromkeys("beams num_captions num_samples".split(), (1, 1000)), "consensus": (0, 1000),
    **dict.fromkeys("crop jitter word_dropout cooldown growth top_p".split(), (0, 1)),
    **dict.fromkeys("dropout label_smoothing align_share patch_dropout".split(), (0, 0.99)),
    "max_tokens": (3, MOST), "n_drawn": (40, MOST), "max_tiles": (1, 4), "yarn": (1, MOST),
    "sample_temperature": (0.01, MOST),
    "dtype": {"auto", "float32", "bfloat16"},
    "eval_split": {"train", "val", "test"}, "fusion": {"prefix", "cross"}, "task": {"classify", "clip"},
    "baseline": {"greedy", "leave_one_out"},
}
# settings that a resumed run may change: how long it is, when it reports, what is done with its result
FREE = set("""init_from out_dir max_steps max_minutes eval_interval device compile accumulation max_new_tokens
    temperature top_k top_p num_samples beams length_penalty num_captions image texts eval_only eval_split baselines
    prompt chat frames context yarn consensus""".split())


def fail(message):
    """End the run with one line that says what to do, and exit status 1; of several processes, the first says it."""
    raise SystemExit(f"error: {message}" if is_main() else 1)


def one_line_errors(main):
    """Decorator of a script's main(): Ctrl-C and what goes wrong for a person's reason end in one line; of several
    processes, only the first prints."""

    @functools.wraps(main)
    def wrapped(argv=None):
        if not is_main():
            sys.stdout = open(os.devnull, "w")
        for stream in (sys.stdin, sys.stdout):  # a terminal may lack a character, a person's input be no UTF-8
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        try:
            try:
                return main(argv)
            finally:
                on_interrupt(signal.default_int_handler)
                sys.stdout.flush()
        except KeyboardInterrupt as e:  # a run says at which step
            goes_on = "; the same command with --init_from=resume goes on" if e.args else "; saved files are kept"
            raise SystemExit(f"\nstopped by hand{''.join(e.args)}{goes_on}" if is_main() else 1)
        except BrokenPipeError:  # such as of --help | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1)
        except (SettingError, OSError) as e:  # OSError: no such folder, no permission, no space left on the disk
            fail(str(e))
        except (MemoryError, RuntimeError, TypeError) as e:
            if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(e):
                fail("not enough memory; --accumulation=2 takes half of the batch at once, and smaller models less")
            if "loading state_dict" in str(e):
                fail("the checkpoint's weights do not fit its config: " + str(e).splitlines()[1].strip())
            if "Config.__init__()" in str(e):
                fail(f"the checkpoint was written by another version: {e}")
            raise

    return wrapped


def on_interrupt(handler):
    """Call handler(number, frame) at Ctrl-C, and where the system asks the process to end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def read_settings(path, is_recipe=False):
    """{name: (value, comment)} of the lines `name = value  # why` at the top level of a Python file; runs nothing.
    Names are lower case and values literals; in a recipe, a config file, every other statement is an error."""
    source, found = Path(path).read_text(encoding="utf-8"), {}
    try:
        body = ast.parse(source).body
    except SyntaxError as e:
        fail(f"{path}, line {e.lineno}: {e.msg}")
    for node in body:
        try:
            (target,) = node.targets
            name, value = target.id, ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if is_recipe and not is_docstring:
                fail(f"{path}, line {node.lineno}: a config file holds only lines of the form `name = value  # why`")
            continue
        if name.islower() or is_recipe:
            rest = source.splitlines()[node.end_lineno - 1].encode()[node.end_col_offset:].decode()
            found[name] = (value, rest.partition("#")[2].strip())
    return found


def _cast(key, value, default, where):
    """value as default's type, within LIMITS; a string is read as a literal unless a string is expected."""
    kind, limits = type(default), LIMITS.get(key, (-MOST, MOST))
    if isinstance(value, str) and kind is not str:
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        fail(f"{key} expects {kind.__name__} (such as {default!r}), not {value!r}  ({where})")
    if isinstance(limits, set) and value not in limits:
        fail(f"{key}={value}: {' or '.join(sorted(limits))}  ({where})")
    if isinstance(limits, tuple) and kind in (int, float) and not limits[0] <= value <= limits[1]:
        most = f" and at most {limits[1]}" if limits[1] < MOST or value > MOST else ""
        fail(f"{key}={value}: at least {limits[0]}{most}  ({where})")
    if value == "" and key in ("image", "prompt", "out_dir"):  # such as of a shell's empty variable
        fail(f"{key} is empty; leave --{key} out for the default")
    return os.path.expanduser(value) if kind is str and value.startswith("~/") else value


def override(stage, argv=None):
    """Set a stage's settings, by config files (*.py) and --key=value from left to right; returns them as a dict. stage:
    the globals() of a script with `name = value  # why` at its top. argv: None takes sys.argv[1:]."""
    argv, defaults = sys.argv[1:] if argv is None else list(argv), read_settings(stage["__file__"])
    settings = {name: value for name, (value, _) in defaults.items()}
    if "--help" in argv or "-h" in argv:
        print(stage["__doc__"].strip(), "\n\nsettings (override with --name=value, or in a config file):")
        for name, (value, comment) in defaults.items():
            print(f"  {f'--{name}={value}':<30} {comment}")
        raise SystemExit(0)
    for arg in argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            if not equals:
                fail(f"{arg}: write --key=value")
            changes, where = {key: text}, "command line"
        elif arg.endswith(".py"):
            if not Path(arg).is_file():
                there_are = ", ".join(map(str, sorted(Path("config").glob("[!_]*.py"))))
                fail(f"{arg}: no such config file; there are {there_are}")
            changes, where = {key: value for key, (value, _) in read_settings(arg, is_recipe=True).items()}, arg
        else:
            fail(f"{arg}: neither a config file (*.py) nor --key=value")
        for key, value in changes.items():
            if key not in settings:
                hints = [f"did you mean {near}?" for near in difflib.get_close_matches(key, settings, 1)]
                fail(f"unknown setting {key} ({where}); {(hints or ['--help lists them'])[0]}")
            settings[key] = _cast(key, value, defaults[key][0], where)
            print(f"{key} = {settings[key]!r}  ({where})")
    stage.update(settings)
    return settings


def recipe_of(folder):
    """The config file whose out_dir is this folder, with a space before it; empty where there is none."""
    recipes = {read_settings(recipe).get("out_dir", [""])[0]: recipe for recipe in Path("config").glob("[!_]*.py")}
    return f" {recipes[str(folder)]}" if str(folder) in recipes else ""


# machine -------------------------------------------------------------------------------------------------------------

def pick_device(device):
    """"auto" takes cuda, else mps, else cpu; anything else is passed to torch. Under torchrun the processes find each
    other here, each with a GPU of its own where there are GPUs."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if device == "auto":
        mps = torch.backends.mps.is_available() and not several
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if several and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        dev = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError):
        fail(f"device={device} is not available here; device=auto takes what there is")
    if several and not dist.is_initialized():
        if dev.type == "cuda":
            torch.cuda.set_device(dev)
        dist.init_process_group("nccl" if dev.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return dev


def pick_dtype(dtype, device):
    """"float32" or "bfloat16". dtype "auto" times a matrix product in both and takes bfloat16 where it is at least 1.3
    times as fast: on GPUs, and on CPUs that have instructions for it."""
    if dtype != "auto":
        return dtype
    n, rates = 1024 if device.type == "cpu" else 4096, []
    for kind in (torch.float32, torch.bfloat16):
        a, seconds = torch.randn(n, n, device=device).to(kind), []
        (a[:64] @ a).sum().item()  # loads what it takes
        while len(seconds) < 5 and sum(seconds) < 0.5:  # CPUs without instructions for bfloat16 take seconds for one
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for the device
            seconds.append(time.perf_counter() - start)
        rates.append(2e-9 * n ** 3 / min(seconds))
    chosen = torch.tensor(rates[1] > 1.3 * rates[0], device=device)
    if dist.is_initialized():
        dist.broadcast(chosen, 0)
    chosen = "bfloat16" if chosen else "float32"
    print(f"dtype: {chosen} (matrix products: {rates[0]:,.0f} GFLOP/s in float32, {rates[1]:,.0f} in bfloat16)")
    return chosen


def place(model, device, dtype):
    """The model on the device; autocast(model) computes in dtype. Convolutions on CPUs prefer channels last."""
    model.compute_dtype = pick_dtype(dtype, device)
    return model.to(device, memory_format=torch.channels_last)


def device_of(model):
    return next(model.parameters()).device


def number_type(model):
    return getattr(torch, getattr(model, "compute_dtype", "float32"))


def autocast(model):
    """Context in which the model's matrix products run in the number type that place() has set, else in float32."""
    return torch.autocast(device_of(model).type, torch.bfloat16, enabled=number_type(model) == torch.bfloat16)


def maybe_compile(model, wanted):
    """torch.compile(model) where that is wanted; what cannot be compiled runs as it is, with torch's warning."""
    if wanted:
        import torch._dynamo
        torch._dynamo.config.suppress_errors = True
    return torch.compile(model) if wanted else model


def show_progress(text):
    """Overwrite the last line of a terminal with text; prints nothing where the output goes to a file."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


# processes -----------------------------------------------------------------------------------------------------------

def rank():
    return int(os.environ.get("RANK", 0))  # of this process, among those that torchrun started


def is_main():
    return rank() == 0  # the process that prints and writes


def n_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def check_batch(batch_size, accumulation):
    """End the run in one line where the batch cannot be cut into equal parts, accumulation of them per process."""
    if batch_size % (accumulation * n_processes()):
        fail(f"batch_size={batch_size} cannot be cut into {accumulation * n_processes()} equal parts")


def my_share(batch):
    """The rows of a batch, a tensor or a list, that this process computes."""
    n = len(batch) // n_processes()
    return batch[rank() * n:(rank() + 1) * n]


def sum_numbers(*numbers, device="cpu"):
    """The sums of numbers over the processes, as a list of float."""
    if not dist.is_initialized():
        return list(map(float, numbers))
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather(tensor):
    """[the tensor of the first process, that of the second, ...]; all of one shape, and without gradients."""
    if not dist.is_initialized():
        return [tensor.detach()]
    everyone = [torch.empty_like(tensor) for _ in range(n_processes())]
    dist.all_gather(everyone, tensor.detach().contiguous())
    return everyone


# training ------------------------------------------------------------------------------------------------------------

def shared_generator(seed, step):
    """For what all processes draw alike at a step: which rows, which captions."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def seed_step(seed, step):
    """Seed what each process draws for itself at a step: augmentation, dropout, samples."""
    torch.manual_seed(seed * 1_000_003 + step + rank() * 1_000_000_007)


def epoch_rows(n, batch_size, step, seed):
    """(batch_size,) numbers below n: the rows of a step's batch, each once per epoch; the same in all processes."""
    epoch, position = divmod(step, n // batch_size)
    order = torch.randperm(n, generator=shared_generator(seed, epoch))
    return order[position * batch_size:(position + 1) * batch_size]


class Muon(torch.optim.Optimizer):
    """Makes the momentum of each weight matrix nearly semi-orthogonal, then takes a step along it (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon). The same as torch.optim.Muon, but computes in dtype, where torch's takes
    bfloat16, 30 times slower than float32 on a CPU without instructions for it."""

    def __init__(self, params, lr, weight_decay, dtype):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum_buffer"].lerp_(p.grad, 0.05)
                update = orthogonalize(p.grad.lerp(momentum, 0.95).to(self.dtype))  # Nesterov momentum
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)


def orthogonalize(x, steps=5):
    """(m, n) matrix with the singular value decomposition U S V^T -> about U V^T, by matrix products alone: a
    Newton-Schulz iteration, whose coefficients bring most singular values to between 0.7 and 1.2 in five steps."""
    if x.size(0) > x.size(1):
        return orthogonalize(x.T, steps).T
    x = x / x.norm().clamp(min=1e-7)  # now no singular value is above 1
    for _ in range(steps):
        gram = x @ x.T  # (m, m)
        polynomial = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)  # 3.4445 x - 4.775 (x x^T) x + 2.0315 (x x^T)^2 x
    return x


def optimizers(model, muon_lr, adam_lr, weight_decay=0.0, betas=(0.9, 0.95)):
    """[Muon, AdamW] over the parameters that train. Muon takes the weights of linear layers that are no output layers
    (*head); everything else takes AdamW, and so does all with muon_lr = 0."""
    hidden = {id(module.weight) for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear) and not name.endswith("head")}
    muon, matrices, vectors = [], [], []
    for p in (p for p in model.parameters() if p.requires_grad):
        (muon if muon_lr and id(p) in hidden else matrices if p.ndim >= 2 else vectors).append(p)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    made = [Muon(muon, muon_lr, weight_decay, number_type(model))] if muon else []
    made += [torch.optim.AdamW([g for g in groups if g["params"]], lr=adam_lr, betas=betas, fused=True)]
    for group in (group for optimizer in made for group in optimizer.param_groups):
        group["peak_lr"] = group["lr"]
    return made


def lr_factor(step, progress, warmup_steps, cooldown):
    """The learning rates over their peaks: a linear warm-up, a plateau, then a straight line to zero at progress 1."""
    return min(1.0, (step + 1) / max(1, warmup_steps), (1.0 - progress) / max(cooldown, 1e-8))


def update(model, optimizers, loss, factor, grad_clip):
    """One step of the optimizers, at factor times their peak rates, after the gradients of all processes are summed and
    their norm is clipped to grad_clip (0: not). loss: this process's share of the batch's loss, a scalar tensor.
    Returns the loss of the whole batch; NaN where the gradient is not finite."""
    if dist.is_initialized():
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([loss.view(1).float(), *(g.flatten() for g in gradients)])
        dist.all_reduce(flat)
        for g, total in zip(gradients, flat[1:].split([g.numel() for g in gradients])):
            g.copy_(total.view_as(g))
        loss = flat[0].clone()  # not a view, which would keep all of flat
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.where(grad_norm.isfinite(), loss, math.nan)


# keeping -------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def new_file(path):
    """A temporary path, whose file is moved to path when the block has ended well and removed when not: a run that is
    killed, and a full disk, leave the file that was there."""
    partial = Path(f"{path}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:  # RuntimeError: torch's own writer
        fail(f"could not write {path} (is the disk full?): {str(e).splitlines()[0]}")
    finally:
        partial.unlink(missing_ok=True)


def save(path, checkpoint):
    """Write a checkpoint, of tensors and plain values."""
    with new_file(path) as partial:
        torch.save(checkpoint, partial)


def load(path, *stages):
    """The checkpoint at path, on the CPU, saved by one of the stages ("vit", "gpt", ...). Without the file, the message
    names the command that makes it."""
    if not Path(path).is_file():
        old = sorted(Path(path).parent.glob(f"{Path(path).stem}.old*.pt"), key=lambda p: p.stat().st_mtime)
        earlier = f"; {old[-1]} is of the run before" if old else ""
        fail(f"no checkpoint {path} yet; train one first: python {stages[0]}.py{recipe_of(Path(path).parent)}{earlier}")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch does not look at the CRCs
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises a dozen types on a file that is no checkpoint
        fail(f"{path} is no checkpoint that can be read: {(str(e) or type(e).__name__).splitlines()[0]}")
    if broken:
        fail(f"{path} is damaged: {broken} in it has changed since it was written")
    stage = checkpoint.get("stage") if isinstance(checkpoint, dict) else None
    if stage not in stages:
        fail(f"{path} is no checkpoint of {' or '.join(stages)}, but of {stage or 'an older version'}")
    missing = {"settings", "config", "model", "step", "dtype"} - checkpoint.keys()
    if missing:
        fail(f"{path} was written by another version of {stage}.py: it lacks {', '.join(sorted(missing))}")
    return checkpoint


def resume(stage, settings, start="scratch", tokenizer=None):
    """With init_from=resume the checkpoint that the run continues from, out_dir/last.pt; None with init_from=start. A
    resumed run is the same run: it is an error if a setting has changed, unless it is one of FREE, or the tokenizer
    (its state(), of the data)."""
    init_from, out_dir = settings["init_from"], Path(settings["out_dir"])
    if init_from not in (start, "resume"):
        fail(f"init_from={init_from}: {start} or resume")
    if init_from == start:
        return None
    checkpoint = load(out_dir / "last.pt", stage)
    for name, was in checkpoint["settings"].items():
        if name in settings and settings[name] != was:
            if name not in FREE:
                fail(f"{name} is {settings[name]!r} and was {was!r} in the run to resume; it takes the same settings")
            print(f"note: {name} is {settings[name]!r}, and was {was!r} when the run began")
    if tokenizer and checkpoint["tokenizer"] != tokenizer:
        fail(f"the data has another tokenizer than when {out_dir} began; start anew, with --init_from={start}")
    print(f"resuming from {out_dir / 'last.pt'}, step {checkpoint['step']}")
    return checkpoint


def set_aside(out_dir, dataset):
    """Rename the checkpoints that a new run finds in its folder to *.old.pt, *.old1.pt, ...; an error if they are of
    another dataset."""
    if (out_dir / "last.pt").is_file():
        other = dataset
        with contextlib.suppress(SystemExit):  # one that cannot be read is set aside as well
            other = load(out_dir / "last.pt", "vit", "gpt", "mllm", "scst").get("dataset")
        if other != dataset:
            fail(f"{out_dir} holds a run on {other}, this one is on {dataset}; give it --out_dir={out_dir}_{dataset}")
    for old in [p for p in sorted(out_dir.glob("*.pt")) if ".old" not in p.name]:
        names = (old.with_suffix(f".old{n or ''}.pt") for n in itertools.count())
        print(f"renamed {old} to {old.replace(next(name for name in names if not name.exists())).name}")


@functools.cache
def lock(folder):
    """Keep other processes from training in the folder until this one ends, however it ends; returns the open file that
    holds the lock."""
    file = open(folder / "lock", "w")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail(f"another run is writing to {folder}; wait for it, or choose another --out_dir")
    except OSError:  # a file system without locks
        pass
    return file


class Run:
    """A training run, or a phase of it: how far it is, its log and its checkpoints."""

    def __init__(self, stage, settings, dataset, model, optimizers, resumed, best="best.pt", end=1.0, before=None,
                 **more):
        """resumed: the checkpoint that the run continues from. best: file name of the best checkpoint. end: the
        share of max_steps and max_minutes at which this phase ends. before: the Run of the phase before it. more: what
        else the checkpoints are to hold."""
        if settings["max_steps"] <= 0 and settings["max_minutes"] <= 0:
            fail("a run needs an end: max_steps or max_minutes above 0")
        self.stage, self.dataset, self.settings, self.out = stage, dataset, settings, Path(settings["out_dir"])
        self.model, self.optimizers, self.best_path, self.best = model, optimizers, self.out / best, -math.inf
        self.max_steps, self.max_seconds = math.ceil(end * settings["max_steps"]), 60 * end * settings["max_minutes"]
        self.first = (before.step, before.seconds()) if before else resumed["first"] if resumed else (0, 0.0)
        (self.step, seconds), self.rows = self.first, before.rows if before else []  # of the log
        self.evaluated = self.step if before else -1  # the step of the last evaluation
        self.history, self.more = [], more  # (loss, numbers) of each step since then
        if is_main():
            self.out.mkdir(parents=True, exist_ok=True)
            lock(self.out.resolve())
        if resumed:
            self.step, seconds, self.best, self.rows = (resumed[key] for key in ("step", "seconds", "best", "rows"))
            self.evaluated, self.history = resumed.get("evaluated", self.step), resumed.get("history", [])
            model.load_state_dict(resumed["model"])
            for optimizer, state in zip(optimizers, resumed["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        elif is_main() and not before:
            set_aside(self.out, dataset)
        self.began, self.stopped, self.paced = time.monotonic() - seconds, None, (self.step, seconds)
        self.interrupted = self.in_evaluation = False
        on_interrupt(self.interrupt)

    def interrupt(self, number, frame):
        """Ctrl-C: a step is finished first, an evaluation is not; a second Ctrl-C ends the run at once."""
        on_interrupt(signal.default_int_handler)
        self.interrupted = True
        if self.in_evaluation and not dist.is_initialized():
            raise KeyboardInterrupt

    def keep(self):
        """Save where the run stands, and end it."""
        self.in_evaluation = False
        if is_main():
            show_progress("")
            if self.history:
                self._finite(float(self.history[-1][0]), self.step - 1)
            save(self.out / "last.pt", self.state())
        raise KeyboardInterrupt(f" at step {self.step}")

    def seconds(self):
        """Of training so far, evaluations not counted."""
        return (time.monotonic() if self.stopped is None else self.stopped) - self.began

    def stop(self):
        """Training is over."""
        self.stopped = time.monotonic()
        on_interrupt(signal.default_int_handler)

    @contextlib.contextmanager
    def paused(self):
        """An evaluation: not counted as training; where it is interrupted, a resumed run does it again."""
        self.stopped, before = time.monotonic(), (self.best, self.rows, self.evaluated, self.history)
        self.in_evaluation = True
        try:
            if self.interrupted and not dist.is_initialized():
                raise KeyboardInterrupt
            yield
        except KeyboardInterrupt:
            self.best, self.rows, self.evaluated, self.history = before
            self.keep()
        self.in_evaluation = False
        self.began, self.stopped = self.began + time.monotonic() - self.stopped, None

    def progress(self):
        """How far the phase is, in [0, 1], by steps or by minutes, whichever is further; at 1 it is over. The same in
        all processes: the first one's clock decides."""
        share = lambda now, first, last: (now - first) / max(last - first, 1e-9) if last > 0 else 0.0
        self.done = min(1.0, max(share(self.step, self.first[0], self.max_steps),
                                 share(self.seconds(), self.first[1], self.max_seconds)))
        if dist.is_initialized():
            first = torch.tensor([self.done, self.interrupted], dtype=torch.float64, device=device_of(self.model))
            dist.broadcast(first, 0)
            self.done, stop = first.tolist()  # a signal that comes meanwhile is for the next step
        else:
            stop = self.interrupted
        if stop:
            self.keep()
        return self.done

    def due(self):
        """Whether this process is to evaluate, log and save now."""
        if self.step % self.settings["eval_interval"] and self.done < 1 or self.evaluated == self.step:
            return False
        if not is_main():
            self.history = []
        return is_main()

    def advance(self, loss, numbers=None):
        """A step is done, with this loss, and numbers whose means are to stand in the log. The loss is read one step
        late, so that a GPU continues to work meanwhile."""
        self.history.append((loss, numbers or {}))
        self.step += 1
        if len(self.history) > 1:
            previous = self._finite(float(self.history[-2][0]), self.step - 2)
            show_progress(f"step {self.step} | loss {previous:.3f}")

    def _finite(self, loss, step):
        if not math.isfinite(loss):
            fail(f"the loss is {loss} at step {step}; {self.out / 'last.pt'} is the last good checkpoint")
        return loss

    def log(self, numbers, lr=None, items=None, unit="", file_only=None):
        """Print one line, and add it as a row to out_dir/log.csv. numbers: {column: number or str}; file_only: more of
        them, not printed. items: how many units (tokens, images) one step takes. With lr the means since the last
        evaluation are added, of the loss as the column train."""
        if lr is not None and self.history:
            losses, more = zip(*self.history)
            train = self._finite(torch.tensor([*map(float, losses)]).mean().item(), self.step)
            means = {name: sum(row[name] for row in more) / len(more) for name in more[0]}
            numbers = {"train": train} | means | numbers
        self._finite(numbers.get("val", 0.0), self.step)
        last = f"/{self.settings['max_steps']}" if self.settings["max_steps"] > 0 else ""
        written = lambda value, form: value if isinstance(value, str) else format(value, form)
        row = {"step": self.step} | {k: written(value, ".6g") for k, value in (numbers | (file_only or {})).items()}
        text = [f"step {self.step}{last}", *(f"{name} {written(value, '.4g')}" for name, value in numbers.items())]
        seconds, (last_step, last_seconds) = self.seconds(), self.paced
        if lr is not None:
            text.append(f"lr {lr:.1e}")
            row["lr"] = f"{lr:.4e}"
        if items and self.step > last_step:
            pace = (seconds - last_seconds) / (self.step - last_step)
            left = int((seconds - self.first[1]) * (1 - self.done) / self.done)
            short = f"{items / pace / 1000:.1f}k" if items / pace > 9999 else f"{items / pace:.0f}"
            text += [f"{1000 * pace:.0f} ms/step", f"{short} {unit}/s", f"{left // 60}m{left % 60:02d}s left"]
            row |= {"ms_per_step": f"{1000 * pace:.1f}", "items_per_second": f"{items / pace:.1f}"}
            self.paced = (self.step, seconds)
        show_progress("")
        if len(text) > 1:
            print(" | ".join(text), flush=True)
        self.rows = [*self.rows, row | {"minutes": f"{seconds / 60:.3f}"}]
        with new_file(self.out / "log.csv") as partial, open(partial, "w", newline="") as f:
            writer = csv.DictWriter(f, dict.fromkeys(name for row in self.rows for name in row), restval="")
            writer.writeheader()
            writer.writerows(self.rows)

    def state(self):
        """What a checkpoint holds."""
        return {"stage": self.stage, "dataset": self.dataset, "settings": self.settings, "step": self.step,
                "first": self.first, "seconds": self.seconds(), "best": self.best, "rows": self.rows,
                "evaluated": self.evaluated, "history": [(float(loss), numbers) for loss, numbers in self.history],
                "dtype": self.model.compute_dtype, "config": dataclasses.asdict(self.model.config),
                "model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers], **self.more}

    def save(self, score):
        """Write last.pt, and the best checkpoint where score is higher than ever."""
        is_best, self.best, self.evaluated, self.history = score > self.best, max(score, self.best), self.step, []
        if is_best:
            save(self.best_path, self.state())
        save(self.out / "last.pt", self.state())  # last: a run killed in between does this evaluation again
