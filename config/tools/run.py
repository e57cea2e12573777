"""
What every run needs besides its model and its data.

    errors        fail, one_line_errors
    machine       pick_device, place, autocast
    processes     is_main, my_share, sum_over_processes
    randomness    shared_generator, seed_step, epoch_rows
    files         save, load, start, log

Under torchrun every process computes a share of each batch; the first one, rank 0, evaluates,
prints and writes.
"""

import atexit
import contextlib
import csv
import ctypes
import dataclasses
import functools
import math
import os
import sys
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist

from config import read_settings

# errors -------------------------------------------------------------------------------------------


def fail(message):
    """End the program: print a one-line error and exit with status 1."""
    show_progress("")
    raise SystemExit(f"error: {message}")


def one_line_errors(main):
    """Decorate main so that a failed assertion, an OSError and Ctrl-C end in one line and exit
    status 1.

    These are what a user can cause; any other exception is a bug and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        if not is_main():
            sys.stdout = open(os.devnull, "w")
        try:
            return main(argv)
        except KeyboardInterrupt:
            fail("stopped; --init_from=resume continues training from the last evaluation")
        except (AssertionError, OSError) as e:
            if not str(e):
                raise  # an assertion without a message is a bug
            fail(e)

    return wrapped


def show_progress(text):
    """Replace the last line of a terminal by text. Print nothing if the output goes to a file."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


# machine ------------------------------------------------------------------------------------------


def pick_device(device):
    """Return a torch.device: for "auto" cuda, mps or cpu, whichever is there first.

    Under torchrun the processes find each other here, and each takes a GPU of its own.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if torch.backends.mps.is_available() and not several:
            device = "mps"
    if several and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError):
        fail(f"device={device} is not available here; device=auto takes what there is")
    if several:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Make glibc keep freed memory, which the next training step needs again.

    Otherwise every large tensor is mapped anew, page by page. Other C libraries do without.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def pick_dtype(dtype, device):
    """Return torch.float32 or torch.bfloat16; for "auto" bfloat16 where the hardware has
    instructions for it."""
    assert dtype in ("auto", "float32", "bfloat16"), f"dtype={dtype}: auto, float32 or bfloat16"
    has_bfloat16 = dtype == "bfloat16"
    if dtype == "auto" and device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto" and device.type == "cpu":
        has_bfloat16 = torch.cpu._is_avx512_bf16_supported()  # so have all CPUs with AMX
    return torch.bfloat16 if has_bfloat16 else torch.float32


def place(model, device, dtype):
    """Move the model to the device; autocast(model) then computes in dtype."""
    model.compute_dtype = pick_dtype(dtype, device)
    return model.to(device)


def device_of(model):
    return next(model.parameters()).device


def dtype_of(model):
    return getattr(model, "compute_dtype", torch.float32)


def autocast(model):
    """Return a context in which matrix products run in the number type that place() has set."""
    dtype = dtype_of(model)
    return torch.autocast(device_of(model).type, dtype, enabled=dtype == torch.bfloat16)


# processes ----------------------------------------------------------------------------------------


def rank():
    return int(os.environ.get("RANK", 0))


def is_main():
    return rank() == 0


def n_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def check_batch(batch_size, accumulation):
    n_parts = accumulation * n_processes()
    assert batch_size % n_parts == 0, (
        f"batch_size={batch_size} cannot be split into {n_parts} equal parts"
    )


def my_share(batch):
    """Return the rows of a batch, a tensor or a list, that this process computes."""
    n = len(batch) // n_processes()
    return batch[rank() * n : (rank() + 1) * n]


def sum_over_processes(value, device):
    """Return the sum of a number over all processes."""
    total = torch.tensor(value, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item()


# randomness ---------------------------------------------------------------------------------------
# Everything random in a step is drawn from a generator seeded by (seed, step), so a resumed run
# continues exactly.


def shared_generator(seed, step):
    """Return the generator of what all processes draw alike in a step, such as the rows of its
    batch."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def seed_step(seed, step):
    """Seed what each process draws for itself in a step: augmentation, dropout, samples."""
    torch.manual_seed(seed * 1_000_003 + step + (rank() + 1) * 1_000_000_007)


def epoch_rows(n, batch_size, step, seed):
    """Return the (batch_size,) indices of this step's batch: sampled without replacement within an
    epoch over n rows, and identical on all ranks."""
    epoch, position = divmod(step, n // batch_size)
    order = torch.randperm(n, generator=shared_generator(seed, epoch))
    return order.split(batch_size)[position]


# files --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_file(path):
    """Yield a temporary path, which is renamed to path if the block ends well: no half-written file
    gets the name."""
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:  # RuntimeError: of torch.save
        fail(f"could not write {path} (is the disk full?): {str(e).splitlines()[0]}")
    finally:
        partial.unlink(missing_ok=True)


def save(path, checkpoint):
    """Write a checkpoint, a dict of tensors and plain values."""
    with new_file(path) as partial:
        torch.save(checkpoint, partial)


def checkpoint(stage, settings, model, optimizers, **values):
    """Return what a run saves: the state of the model and the optimizers, and values such as the
    step."""
    return {
        "stage": stage,
        "settings": settings,
        "config": dataclasses.asdict(model.config),
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        **values,
    }


def restore(checkpoint, model, optimizers):
    """Load the state of the model and the optimizers from a checkpoint."""
    model.load_state_dict(checkpoint["model"])
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(state)


def load(path, *stages):
    """Return the checkpoint at path, on the CPU, which one of the stages ("vit", "gpt", ...) has
    saved."""
    path = Path(path)
    assert path.is_file(), (
        f"no checkpoint {path} yet; train one first: python {stages[0]}.py{recipe_of(path.parent)}"
    )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        stage = checkpoint.get("stage", "another project")
    except Exception as e:  # of many types, depending on what the file is
        fail(f"{path} is damaged, or no checkpoint of this project ({type(e).__name__})")
    assert stage in stages, f"{path} is a checkpoint of {stage}, not of {' or '.join(stages)}"
    return checkpoint


def recipe_of(out_dir):
    """Return the recipe with this out_dir, after a space, or "" if there is none."""
    for recipe in Path("config").glob("[!_]*.py"):
        if str(out_dir) in read_settings(recipe).get("out_dir", ()):  # (value, comment)
            return f" {recipe}"
    return ""


def start(stage, settings):
    """Begin a run in out_dir. Return the checkpoint to resume from, or None for a new run.

    A new run renames the checkpoints of an earlier one to *.old.pt and begins a new log.
    """
    out = Path(settings["out_dir"])
    init_from = settings["init_from"]
    first = "sft" if stage == "scst" else "scratch"
    assert init_from in (first, "resume"), f"init_from={init_from}: {first} or resume"
    if init_from == "resume":
        checkpoint = load(out / "last.pt", stage)
        print(f"resuming from {out / 'last.pt'}, step {checkpoint['step']}")
        return checkpoint
    if is_main():
        (out / "log.csv").unlink(missing_ok=True)
        for path in sorted(out.glob("*.pt")):
            if not path.name.endswith(".old.pt"):
                path.replace(path.with_suffix(".old.pt"))
                print(f"renamed {path} of an earlier run to {path.stem}.old.pt")


def show_step(out_dir, step, max_steps, **curves):
    """Log and show the means of curves over the last steps, about 100 times in a run; reading them
    at every step would make a GPU wait. curves: lists of numbers or scalar tensors, one value a
    step; loss=... is shown."""
    n = max_steps // 100 + 1
    if step % n == 0 and is_main():
        row = {name: fmean(map(float, values[-n:])) for name, values in curves.items()}
        log(out_dir, {"step": step} | row)
        show_progress(f"step {step}/{max_steps} | loss {row['loss']:.3f}")


def pace(losses, seconds):
    """Return the log's columns about the steps since the last evaluation: their mean loss and time
    per step."""
    n = len(losses)
    return {"train": sum(losses).item() / n, "ms_per_step": 1000 * seconds / n} if n else {}


def log(out_dir, row, brief=()):
    """Write a row, {"step": ..., name: value, ...}, to log.csv in out_dir, a Path, and print its
    columns named in brief.

    Values of a step that is already in the log are added to its row; rows of later steps, which a
    run wrote before it was interrupted, are dropped.
    """
    assert math.isfinite(row.get("train", 0.0) + row.get("val", 0.0)), (
        f"the loss is not finite before step {row['step']}"
    )
    path = out_dir / "log.csv"
    rows = []
    if path.is_file():
        with open(path, newline="") as f:
            rows = [r for r in csv.DictReader(f) if int(r["step"]) <= row["step"]]
    if not rows or int(rows[-1]["step"]) < row["step"]:
        rows.append({})
    rows[-1] |= {
        name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()
    }
    columns = dict.fromkeys(name for r in rows for name in r)
    with new_file(path) as partial, open(partial, "w", newline="") as f:
        writer = csv.DictWriter(f, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    show_progress("")
    texts = [f"{name} {row[name]:.4g}" for name in brief if name in row]
    if texts:
        print(f"step {row['step']} | " + " | ".join(texts), flush=True)
