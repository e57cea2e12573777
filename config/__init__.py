"""
How a run is set up and kept: everything that is mechanical and the same in every stage, so that a stage holds only
its model, its data and its training step.

    settings     override, read_settings          defaults < config files < --key=value, left to right
    machine      pick_device, autocast, count_flops, matmul_peak
    processes    parts, sum_gradients             a batch cut into parts: torchrun, gradient accumulation
    training     optimizers, set_lr, Clock        Muon + AdamW; progress by steps or minutes
    keeping      save, load, resume, Log          checkpoints, out/<run>/log.csv
    pictures     plot, save_grid                  loss.png, grids of captioned images
    the world    open_images, to_pixels, download

A config file, config/<recipe>.py, is 10-20 lines of `name = value  # why`. It is parsed, never executed.
"""

import ast
import atexit
import contextlib
import csv
import difflib
import functools
import hashlib
import io
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

# ---------------------------------------------------------------------------------------------------------------------
# settings


def fail(message):
    """End the run with one line that says what to do, and exit status 1."""
    raise SystemExit(f"error: {message}")


def one_line_errors(main):
    """Decorator of a script's main(): Ctrl-C and a file system that refuses end in one line, without a traceback; of
    the processes that torchrun starts, the first alone speaks."""

    @functools.wraps(main)
    def wrapped(argv=None):
        if not is_main():
            sys.stdout = open(os.devnull, "w")
        try:
            return main(argv)
        except KeyboardInterrupt:
            raise SystemExit("\nstopped by hand; what was saved is kept (training goes on with --init_from=resume)")
        except OSError as e:  # no such folder, no permission, no space left on the disk
            fail(str(e))

    return wrapped


@contextlib.contextmanager
def one_line(exception):
    """Inside, an exception of that type is the person's: it ends the run with its message alone."""
    try:
        yield
    except exception as e:
        fail(str(e))


def read_settings(path, is_recipe=False):
    """{name: (value, comment)} of the lines `name = value  # why` at the top level of a Python file; runs nothing.

    Names are lower case and values literals; in a recipe, a config file, every other statement is an error.
    """
    source, found = Path(path).read_text(encoding="utf-8"), {}
    lines = source.splitlines()
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
            comment = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode().partition("#")[2]
            found[name] = (value, comment.strip())
    return found


def _cast(key, value, default, where):
    """value as default's type; a string (of the command line) is read as a literal unless a string is expected."""
    kind = type(default)
    if isinstance(value, str) and kind is not str:
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        fail(f"{key} expects {kind.__name__} (such as {default!r}), not {value!r}  ({where})")
    return value


def override(stage, argv=None):
    """Set a stage's settings from the command line and return them as a dict.

    stage: the globals() of a script whose settings stand at its top as `name = value  # why`.
    argv: config files (*.py) and --key=value, applied from left to right; None takes sys.argv[1:].
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    defaults = read_settings(stage["__file__"])
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
                there_are = ", ".join(str(p) for p in sorted(Path("config").glob("[!_]*.py")))
                fail(f"{arg}: no such config file; there are {there_are}")
            changes, where = {key: value for key, (value, _) in read_settings(arg, is_recipe=True).items()}, arg
        else:
            fail(f"{arg}: neither a config file (*.py) nor --key=value")
        for key, value in changes.items():
            if key not in settings:
                near = difflib.get_close_matches(key, settings, 1)
                hint = f"did you mean {near[0]}?" if near else "--help lists them"
                fail(f"unknown setting {key} ({where}); {hint}")
            if value == "" and key in ("image", "prompt"):  # such as of a shell's empty variable
                fail(f"{key} is empty; without --{key} a run trains")
            settings[key] = _cast(key, value, defaults[key][0], where)
            print(f"{key} = {settings[key]!r}  ({where})")
    stage.update(settings)
    return settings


def recipe_of(run):
    """The config file whose out_dir is the folder run, with a space before it; empty where there is none."""
    for recipe in sorted(Path("config").glob("[!_]*.py")):
        folder, _ = read_settings(recipe).get("out_dir", ("", ""))
        if folder and Path(folder) == Path(run):
            return f" {recipe}"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# machine


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
        fail(f"device={device} is not to be had here; device=auto takes what there is")
    if several and not dist.is_initialized():
        if dev.type == "cuda":
            torch.cuda.set_device(dev)
        dist.init_process_group("nccl" if dev.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return dev


def autocast(device, dtype):
    """Context in which matrix products run in dtype: "float32", "bfloat16", or "auto" (bfloat16 on CUDA alone)."""
    one_of(("auto", "float32", "bfloat16"), dtype=dtype)
    bf16 = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def maybe_compile(model, wanted):
    """torch.compile(model) where it is asked for and works; the model as it is, with a warning, where it does not."""
    if not wanted:
        return model
    import torch._dynamo
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is, and torch warns
    try:
        return torch.compile(model)
    except RuntimeError as e:
        print(f"warning: torch.compile is not to be had here ({e}); going on without it")
        return model


def count_flops(model, example):
    """{part: FLOPs} of a forward and a backward pass: of the whole model, "Global", and of its modules, such as
    "ViT.patches". example: a function that runs model forward and returns the loss."""
    from torch.utils.flop_counter import FlopCounterMode
    fused = [module for module in model.modules() if getattr(module, "fused", False)]
    for module in fused:  # attention by hand: of torch's kernels some are not counted, others with what they do twice
        module.fused = False
    counter = FlopCounterMode(display=False)
    with counter:
        example().backward()
    for module in fused:
        module.fused = True
    model.zero_grad(set_to_none=True)
    return {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}


def matmul_peak(device, context):
    """The largest rate, in FLOP/s, of a product of two square matrices here, in the type that context computes in,
    times the number of processes."""
    best = 0.0
    for size in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        with context:
            dtype = (torch.ones(1, 1, device=device) @ torch.ones(1, 1, device=device)).dtype
            a = torch.randn(size, size, device=device).to(dtype)
            for _ in range(4):
                start = time.perf_counter()
                (a @ a)[0, 0].item()  # waits for the device
                best = max(best, 2 * size ** 3 / (time.perf_counter() - start))
    print(f"matrix products reach {best / 1e9:,.0f} GFLOP/s here ({dtype})".replace("torch.", ""))
    return best * n_processes()


# ---------------------------------------------------------------------------------------------------------------------
# processes


def is_main():
    """Whether this process is the one that prints and writes: the first of those that torchrun started, or the only."""
    return int(os.environ.get("RANK", 0)) == 0


def n_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def n_parts(batch_size, accumulation):
    """Into how many parts a step cuts its batch: accumulation of them one after the other in each process."""
    n = accumulation * n_processes()
    if accumulation < 1 or batch_size % n:
        fail(f"batch_size={batch_size} cannot be cut into {n} equal parts (accumulation={accumulation} a process)")
    return n


def parts(model, batch_size, accumulation, seed, step):
    """Yields the slices of a batch that this process computes, one after the other: all of it where nothing is cut.

    A run is to be the same however its batches are cut, so every process makes the whole batch, its random shifts and
    all, and takes its slices. What the model itself draws at random, dropout and samples, is drawn for the whole batch
    too: each part starts from the same seed, and modules with an attribute `part` keep what is theirs (model.Dropout).
    """
    n, first = n_parts(batch_size, accumulation), accumulation * (dist.get_rank() if dist.is_initialized() else 0)
    noisy = [module for module in model.modules() if hasattr(module, "part")]
    for i in range(first, first + accumulation):
        for module in noisy:
            module.part = (i, n)
        torch.manual_seed(-seed * 1_000_003 - step)  # other numbers than those that the batch was drawn with
        yield slice(i * batch_size // n, (i + 1) * batch_size // n)
    for module in noisy:
        module.part = (0, 1)


def sum_gradients(model, loss):
    """Add the gradients of the processes up, and their losses; returns the sum of the latter, a scalar tensor."""
    if dist.is_initialized():
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([loss.view(1).float(), *(g.flatten() for g in gradients)])
        dist.all_reduce(flat)
        for g, total in zip(gradients, flat[1:].split([g.numel() for g in gradients])):
            g.copy_(total.view_as(g))
        loss = flat[0].clone()  # not a view, which would keep all of flat
    return loss


def sum_numbers(*numbers, device="cpu"):
    """The sums of some numbers over the processes, as a list of float."""
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


# ---------------------------------------------------------------------------------------------------------------------
# training


def optimizers(model, muon_lr, adam_lr, weight_decay=0.0, betas=(0.9, 0.95)):
    """[Muon, AdamW] over the parameters that train: Muon turns the momentum of each weight matrix of a linear layer
    into its nearest semi-orthogonal matrix (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon); embeddings,
    positions, heads, convolutions, gains and biases take AdamW. muon_lr = 0 gives everything to AdamW."""
    muon, decayed, plain = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if muon_lr and p.ndim == 2 and not any(part in name for part in ("embedding", "positions", "head.")):
            muon.append(p)
        else:
            (decayed if p.ndim >= 2 else plain).append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    made = [torch.optim.Muon(muon, lr=muon_lr, weight_decay=weight_decay)] if muon else []
    made += [torch.optim.AdamW([g for g in groups if g["params"]], lr=adam_lr, betas=betas, fused=True)]
    for group in (group for optimizer in made for group in optimizer.param_groups):
        group["peak_lr"] = group["lr"]
    return made


def set_lr(optimizers, factor):
    """Put every learning rate at factor times its peak."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = factor * group["peak_lr"]


def shares(**settings):
    """End the run in one line where one of the settings is not from 0 to 1."""
    for name, value in settings.items():
        if not 0 <= value <= 1:
            fail(f"{name}={value}: a share, from 0 to 1")


def at_least(least, **settings):
    """End the run in one line where one of the settings is smaller than least."""
    for name, value in settings.items():
        if value < least:
            fail(f"{name}={value}: at least {least}")


def one_of(choices, **settings):
    """End the run in one line where one of the settings is not among the choices."""
    for name, value in settings.items():
        if value not in choices:
            fail(f"{name}={value}: {', '.join(choices[:-1])} or {choices[-1]}")


def check_finite(loss, step, out_dir):
    """The loss, a number or a scalar tensor, as a float; where it is not finite the run ends and names the step."""
    if not math.isfinite(loss):
        fail(f"the loss is {float(loss)} at step {step}; {Path(out_dir) / 'last.pt'} is the last good checkpoint")
    return float(loss)


class Clock:
    """Training time, evaluations not counted, and how far the run is: by steps or by minutes, whichever is further."""

    def __init__(self, max_steps, max_minutes, seconds=0.0):
        if max_steps <= 0 and max_minutes <= 0:
            fail("a run needs an end: max_steps or max_minutes above 0")
        self.max_steps, self.max_seconds = max_steps, 60 * max_minutes
        self.start, self.stopped = time.time() - seconds, None

    def seconds(self):
        return (self.stopped or time.time()) - self.start

    def progress(self, step):
        """In [0, 1]; at 1 the run is over."""
        by_steps = step / self.max_steps if self.max_steps > 0 else 0.0
        by_time = self.seconds() / self.max_seconds if self.max_seconds > 0 else 0.0
        return min(1.0, max(by_steps, by_time))

    def shared_progress(self, step, device):
        """progress(), the same in all processes: where minutes count, the first process's clock decides."""
        progress = self.progress(step)
        if dist.is_initialized() and self.max_seconds > 0:
            said = torch.tensor([progress], device=device)
            dist.broadcast(said, 0)
            progress = said.item()
        return progress

    @contextlib.contextmanager
    def paused(self):
        self.stopped = time.time()
        yield
        self.start += time.time() - self.stopped
        self.stopped = None


def shift_and_mirror(images, shift, mirrored):
    """(B, 3, H, W) images, each moved by up to shift pixels in both directions (what comes in is black) and, where the
    (B,) booleans say so, mirrored. Draws from torch's global generator."""
    (B, _, H, W), dev = images.shape, images.device
    padded = torch.nn.functional.pad(images, (shift,) * 4)
    top, left = torch.randint(2 * shift + 1, (2, B, 1), device=dev)
    rows, columns = top + torch.arange(H, device=dev), left + torch.arange(W, device=dev)  # (B, H), (B, W)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    each = torch.arange(B, device=dev)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)


def augment_photos(images, captions, crop, jitter, mirror):
    """(B, 3, H, W) photos -> (B, 3, H, W) float: of each a part with a share from crop to 1 of its area and sides that
    are stretched by up to 4 / 3, brought back to H x W; with mirror half of them mirrored, but none of which a caption
    (captions: a list for each photo) says left or right; brightness, contrast and saturation changed by factors from
    1 - jitter to 1 + jitter. Draws from torch's global generator."""
    B, dev, images = len(images), images.device, images.float()
    sided = torch.tensor([any(re.search(r"\b(left|right)\b", caption) for caption in each) for each in captions])
    mirrored = (torch.rand(B) < 0.5) & ~sided & mirror
    area, stretch = 1 - (1 - crop) * torch.rand(B), (4 / 3) ** (2 * torch.rand(B) - 1)
    stretch = stretch.clamp(area, 1 / area)  # a part is nowhere larger than the photo
    sides = torch.stack((area * stretch, area / stretch)).sqrt()  # (2, B), shares of width and height
    middle = (2 * torch.rand(2, B) - 1) * (1 - sides)  # of the part; a photo's borders are at -1 and 1
    gain = 1 + jitter * (2 * torch.rand(3, B, 1, 1, 1, device=dev) - 1)  # brightness, contrast, saturation
    if crop < 1 or mirrored.any():
        theta = torch.zeros(B, 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = torch.where(mirrored, -sides[0], sides[0]), sides[1]
        theta[:, :, 2] = middle.T
        where = torch.nn.functional.affine_grid(theta.to(dev), images.shape, align_corners=False)
        images = torch.nn.functional.grid_sample(images, where, padding_mode="border", align_corners=False)
    if jitter:
        images = images * gain[0]
        images = images.mean(dim=(1, 2, 3), keepdim=True).lerp(images, gain[1])
        images = images.mean(dim=1, keepdim=True).lerp(images, gain[2]).clamp(0, 255)
    return images


def show_progress(text):
    """Overwrite the last line of a terminal with text; says nothing where the output goes to a file."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# keeping


def save(path, checkpoint):
    """Write a checkpoint (tensors and plain values) to a temporary name and move it into place."""
    partial = Path(f"{path}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:
        partial.unlink(missing_ok=True)
        fail(f"could not write {path} (is the disk full?): {str(e).splitlines()[0]}")


def load(path, train_with, device="cpu", has=None):
    """The checkpoint at path; train_with is the command that makes one, for the message when there is none (with the
    recipe that writes to its folder, if one does); has: names of which the config of such a checkpoint holds one, as
    those of other stages do not."""
    if not Path(path).is_file():
        recipe = recipe_of(Path(path).parent)
        train_with = " ".join(train_with.split()[:2]) + recipe if recipe else train_with
        fail(f"no checkpoint {path} yet; train one first: {train_with}")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # torch raises a dozen types on a file that is no checkpoint
        fail(f"{path} is no checkpoint that can be read: {str(e).splitlines()[0]}")
    ours = isinstance(checkpoint, dict) and "config" in checkpoint
    if not ours or (has and not any(name in checkpoint["config"] for name in has)):
        fail(f"{path} is a checkpoint of another kind than is needed here")
    return checkpoint


def resume(out_dir, init_from, settings, train_with, start="scratch", tokenizer=None):
    """With init_from=resume the checkpoint to go on from, out_dir/last.pt; None with the stage's other word, start.

    A resumed run is the same run: a setting that has changed is an error, unless it only tells how long the run is or
    when it speaks; and so is another tokenizer (its state(), of the data) than the run began with.
    """
    one_of((start, "resume"), init_from=init_from)
    if init_from == start:
        return None
    checkpoint = load(Path(out_dir) / "last.pt", train_with)
    free = {"init_from", "out_dir", "max_steps", "max_minutes", "eval_interval", "device", "compile", "accumulation",
            "max_new_tokens", "temperature", "top_k", "top_p", "num_samples", "beams", "length_penalty", "num_captions",
            "image", "texts", "mirror_eval", "eval_only", "eval_split", "judgements", "baselines"}
    for name, was in checkpoint["settings"].items():
        if name in settings and settings[name] != was:
            if name not in free:
                fail(f"{name} is {settings[name]!r} and was {was!r} in the run to resume; it takes the same settings")
            print(f"note: {name} is {settings[name]!r}, and was {was!r} when the run began")
    if tokenizer and checkpoint["tokenizer"] != tokenizer:
        fail(f"the data has another tokenizer than when {out_dir} began; start anew, with init_from={start}")
    print(f"going on from {Path(out_dir) / 'last.pt'}, step {checkpoint['step']}")
    return checkpoint


def set_aside(out_dir):
    """Rename the checkpoints that a new run finds in its folder to *.old.pt."""
    for old in [p for p in sorted(Path(out_dir).glob("*.pt")) if not p.name.endswith(".old.pt")]:
        old.replace(old.with_suffix(".old.pt"))
        print(f"renamed {old} to {old.with_suffix('.old.pt').name}")


class Log:
    """One printed line an interval, and the same as a row of out_dir/log.csv."""

    def __init__(self, out_dir, columns, clock, resume=None, flops=0.0, peak=0.0):
        """columns: the names of the numbers that write() may be given; resume: the checkpoint that the run goes on
        from, whose later rows are dropped; without one the run is new, and checkpoints in its folder are set aside.
        flops: the arithmetic of one item (token, image) in a step; peak: the FLOP/s that the processes could reach."""
        self.path, self.clock, self.flops, self.peak = Path(out_dir) / "log.csv", clock, flops, peak
        self.columns = ["step", *columns, "lr", "ms_per_step", "items_per_second", "share_of_peak", "minutes"]
        if not is_main():
            return
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        if resume is None:
            set_aside(out_dir)
        self.last = (resume["step"] if resume else 0, clock.seconds())
        rows = []
        if resume and self.path.is_file():
            with open(self.path, newline="") as f:
                rows = [row for row in csv.DictReader(f) if int(row["step"]) <= resume["step"]
                        and not any(value for name, value in row.items() if "test" in name)]  # of the end of a run
        with open(self.path, "w", newline="") as f:
            csv.DictWriter(f, self.columns, restval="").writeheader()
            csv.DictWriter(f, self.columns, restval="").writerows(rows)

    def write(self, step, numbers, lr=None, items=None, unit="", file_only=None):
        """numbers: {column: number or str}; file_only: more of them, not printed; items: how many units (tokens,
        images) one step takes. The share of the peak is that of the matrix products, at the measured pace."""
        text, row = [f"step {step}" + (f"/{self.clock.max_steps}" if self.clock.max_steps > 0 else "")], {"step": step}
        for name, value in (numbers | (file_only or {})).items():
            row[name] = value if isinstance(value, str) else f"{value:.6g}"
            if name in numbers:
                text.append(f"{name} {value}" if isinstance(value, str) else f"{name} {value:.4g}")
        if lr is not None:
            (last_step, last_seconds), seconds = self.last, self.clock.seconds()
            pace, self.last = (seconds - last_seconds) / max(1, step - last_step), (step, seconds)
            done = self.clock.progress(step)
            left = seconds * (1 - done) / done if done else 0
            text.append(f"lr {lr:.1e}")
            if step > last_step:
                rate = items / pace
                short = f"{rate / 1000:.1f}k" if rate > 9999 else f"{rate:.0f}"
                share = rate * self.flops / self.peak if self.peak else 0.0
                text += [f"{1000 * pace:.0f} ms/step", f"{short} {unit}/s", f"{100 * share:.0f}% of peak"]
                text += [f"{int(left) // 60}m{int(left) % 60:02d}s left"]
                row |= {"ms_per_step": f"{1000 * pace:.1f}", "items_per_second": f"{rate:.1f}",
                        "share_of_peak": f"{share:.4f}"}
            row |= {"lr": f"{lr:.4e}"}
        row["minutes"] = f"{self.clock.seconds() / 60:.3f}"
        show_progress("")
        if len(text) > 1:
            print(" | ".join(text), flush=True)
        with open(self.path, "a", newline="") as f:
            csv.DictWriter(f, self.columns, restval="").writerow(row)


# ---------------------------------------------------------------------------------------------------------------------
# pictures


def plot(out_dir, left=("train", "val"), right=(), ylabel="loss"):
    """Draw columns of out_dir/log.csv over the step into out_dir/loss.png; the right ones have an axis of their own."""
    import matplotlib
    matplotlib.use("Agg")  # a file, never a window
    import matplotlib.pyplot as plt
    with open(Path(out_dir) / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axes = [(axis, column, "-") for column in left]
    if right:
        axes += [(second, column, "--") for second in [axis.twinx()] for column in right]
        axes[-1][0].set_ylabel(", ".join(right))
    for i, (a, column, style) in enumerate(axes):
        points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        if points:
            a.plot(*zip(*points), style, color=f"C{i}", label=column)
    axis.set(xlabel="step", ylabel=ylabel, title=Path(out_dir).name)
    figure.legend(loc="outside lower center", ncols=len(axes))
    figure.savefig(Path(out_dir) / "loss.png", dpi=110)
    plt.close(figure)


def save_grid(path, images, titles, columns=4, width=34):
    """Write a picture of images (a list of (3, H, W) uint8 tensors), each with its text under it, columns in a row."""
    import textwrap
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = math.ceil(len(images) / columns)
    wrapped = ["\n".join(textwrap.fill(line, width) for line in title.splitlines()) for title in titles]
    deepest = max(text.count("\n") + 1 for text in wrapped)
    height = rows * (2.6 + 0.19 * deepest)  # inches
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, height), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, text in zip(axes.flat, images, wrapped):
        axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")  # (H, W, 3)
        axis.text(0.5, -0.03, text, transform=axis.transAxes, ha="center", va="top", fontsize=9,
                  parse_math=False)  # a caption may hold a $
    figure.subplots_adjust(0.02, 0.19 * deepest / height, 0.98, 0.99, wspace=0.05, hspace=0.22 * deepest / 2.6)
    figure.savefig(path, dpi=90)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# the world


def to_pixels(image, size):
    """A PIL image as a (3, size, size) uint8 tensor: turned upright, to RGB, resized without keeping the proportions
    (the whole photo is seen, and training and inference see it alike)."""
    import numpy as np
    from PIL import Image, ImageOps
    image = ImageOps.exif_transpose(image).convert("RGB").resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (H, W, 3) -> (3, H, W)


def open_images(where):
    """[(name, PIL image)] of an image file, of each image in a folder, or of a URL; large ones are reduced to 1024
    pixels, which a folder full of photos needs."""
    from PIL import Image
    where = os.path.expanduser(where)
    if where.startswith(("http://", "https://")):
        import requests
        try:
            reply = requests.get(where, timeout=30)
            reply.raise_for_status()
        except requests.RequestException as e:
            fail(f"could not fetch {where} (no network?): {type(e).__name__}")
        sources = [(where.rsplit("/", 1)[-1], io.BytesIO(reply.content))]
    elif Path(where).is_dir():
        endings = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
        sources = [(p.name, p) for p in sorted(Path(where).iterdir()) if p.suffix.lower() in endings]
        if not sources:
            fail(f"{where}: a folder without images ({', '.join(endings)})")
    elif Path(where).is_file():
        sources = [(Path(where).name, Path(where))]
    else:
        fail(f"{where}: no such image file or folder")
    images = []
    for name, source in sources:
        try:
            image = Image.open(source)
            image.thumbnail((1024, 1024))
            image.load()
            images.append((name, image))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # all that Pillow raises
            fail(f"{name}: not an image that Pillow can read")
    return images


def download(path, urls, md5=None):
    """Fetch path from the first of urls that answers, resuming a partial file; a file already there is used as it is.

    md5: the official checksum, or None where none is known. A download that differs is an error, a file that already
    lay there and differs is used with one printed line.
    """
    path = Path(path)
    if path.is_file():
        if md5 and md5_of(path) != md5:
            print(f"note: {path} lay here already and is not the official file (its md5 differs); using it as it is")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, problems = Path(f"{path}.partial"), []
    for url in urls:
        try:
            _fetch(url, partial)
        except OSError as e:  # requests' exceptions are OSErrors too
            problems.append(f"{url} ({type(e).__name__})")
            continue
        if md5 and md5_of(partial) != md5:
            partial.unlink()
            problems.append(f"{url} (its md5 differs)")
            continue
        os.replace(partial, path)
        return path
    fail(f"could not download {path.name}; fetch it by hand and put it at {path}. Tried " + ", ".join(problems))


def _fetch(url, partial):
    """Append what is missing of url to the file partial."""
    import requests
    have = partial.stat().st_size if partial.is_file() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, stream=True, timeout=30, headers=headers) as reply:
        if reply.status_code == 416:  # nothing is missing
            return
        reply.raise_for_status()
        have = have if reply.status_code == 206 else 0  # 200: the server sends it all again
        total = have + int(reply.headers.get("Content-Length", 0))
        with open(partial, "ab" if have else "wb") as f:
            for chunk in reply.iter_content(1 << 20):
                f.write(chunk)
                have += len(chunk)
                show_progress(f"{partial.stem}: {have / 1e6:.0f} of {total / 1e6:.0f} MB")
        show_progress("")
        if have < total:
            raise ConnectionError("the connection broke off")


def save_array(path, array):
    """np.save to a temporary name, then moved into place."""
    import numpy as np
    np.save(f"{path}.partial.npy", array)
    os.replace(f"{path}.partial.npy", path)


def save_json(path, value):
    """json.dump to a temporary name, then moved into place."""
    Path(f"{path}.partial").write_text(json.dumps(value), encoding="utf-8")
    os.replace(f"{path}.partial", path)


def load_data(path, prepare_with):
    """The memory-mapped array (*.npy) or the value (*.json) at path; prepare_with is the command that makes it."""
    import numpy as np
    if not Path(path).is_file():
        fail(f"no data at {path} yet; make it first: {prepare_with}")
    return np.load(path, mmap_mode="r") if str(path).endswith(".npy") else json.loads(Path(path).read_text("utf-8"))


def prepare_captions(dataset):
    """The command that makes the folder data/<dataset> of photos and captions."""
    return "python prepare_flickr8k.py" + (f" --source=DIR --out_dir=data/{dataset}" if dataset != "flickr8k" else "")


def load_captioned(dataset, image_size):
    """The folder data/<dataset> that prepare_flickr8k.py wrote: images, a memory-mapped (n, 3, image_size, image_size)
    uint8 array; the table of names, captions and splits; and the state of the tokenizer."""
    prepare = prepare_captions(dataset)
    images, table, state = (load_data(f"data/{dataset}/{name}", prepare)
                            for name in ("images.npy", "captions.json", "tokenizer.json"))
    if images.shape[-1] != image_size:
        fail(f"data/{dataset} holds images of {images.shape[-1]} pixels, and image_size is {image_size}; "
             f"run {prepare} --size={image_size}")
    return images, table, state


def md5_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "md5").hexdigest()
