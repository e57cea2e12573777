"""
Stage 2: a GPT learns Tiny Shakespeare character by character, or the language of photo captions
token by token.

    python prepare_shakespeare.py && python gpt.py config/shakespeare_cpu.py
    python gpt.py config/shakespeare_cpu.py --prompt="ROMEO:"
    python gpt.py config/shakespeare_cpu.py --eval_only=True --context=256 --yarn=4
    python prepare_flickr8k.py && python gpt.py config/captions_cpu.py   # mllm.py starts from it

A run writes log.csv, loss.png, sample.txt and the checkpoints best.pt and last.pt to out_dir.
"""

import time
from pathlib import Path

import numpy as np
import torch

import config
from config.tools import run
from config.tools.data import load_data, prepare_command
from config.tools.optim import lr_factor, make_optimizers, update
from config.tools.pictures import plot
from model import GPT, GPTConfig, evaluating, extend_context, tokenizer_from_state

# the run
out_dir = "out/shakespeare"  # checkpoints, log and samples
init_from = "scratch"  # or "resume": continue from out_dir/last.pt
eval_only = False  # evaluate out_dir/best.pt and stop
eval_split = "val"  # what eval_only evaluates; captions have a "test" split too
context = 0  # with eval_only and prompt: tokens that are read at once; 0: as in training
yarn = 1.0  # with context: context over block_size of the training, the factor of YaRN
device = "auto"  # cuda, mps or cpu
dtype = "auto"  # bfloat16 where the hardware has instructions for it, else float32
seed = 1337  # of everything random: weights, batches, dropout, samples
# data
dataset = "shakespeare"  # the folder under data/: shakespeare (characters) or flickr8k (captions)
batch_size = 64  # windows per step, over all processes
accumulation = 1  # parts that a process splits its share of the batch into, to need less memory
block_size = 256  # tokens per window: the longest context
# model
n_layer = 6  # blocks
n_head = 6  # attention heads per block
n_embd = 384  # channels; 6, 6 and 384 are the size of nanoGPT's recipe for one GPU
dropout = 0.2  # a million characters are soon memorised
activation = "gelu"  # relu, gelu or swiglu
norm = "layer"  # or rms
n_experts = 0  # feed-forward layers in each block, a mixture of experts; 0: one dense layer
experts_per_token = 2  # how many of them a token passes through, as a router chooses
# optimization
max_steps = 5000  # length of the run
muon_lr = 0.01  # peak rate of the weight matrices of linear layers; 0: AdamW for all
adam_lr = 2e-3  # peak rate of everything else
weight_decay = 0.1  # of matrices and embeddings, relative to the rate
warmup_steps = 50  # steps in which the rate rises to its peak
cooldown = 0.6  # the last part of the run, in which the rate falls to zero in a straight line
grad_clip = 1.0  # largest norm of the gradient; 0: none
eval_interval = 250  # steps between evaluations, each over the whole validation split
# sampling
prompt = ""  # continue this text and stop; \n in it is a line break
max_new_tokens = 500  # length of a sample
temperature = 0.8  # 0: always the likeliest token
top_k = 0  # sample only among the k likeliest tokens; 0: among all
top_p = 1.0  # sample only among the fewest tokens that together have this probability; 1: among all


def load_split(split):
    """Return the token ids of a split, (n,) int64, and the state of their tokenizer."""
    folder = Path("data", dataset)
    prepare = prepare_command(dataset)
    if "DIR" in prepare:
        prepare += f"; or from {folder}/input.txt: python prepare_shakespeare.py --out_dir={folder}"
    state = load_data(folder / "tokenizer.json", prepare)
    ids = load_data(folder / f"{split}.npy", prepare)
    return torch.from_numpy(ids.astype(np.int64)), state


def get_batch(ids, step):
    """Return this process's share of the random windows of a step: inputs and targets, (B, T) each,
    where the targets are one token later."""
    draw = run.shared_generator(seed, step)
    starts = torch.randint(len(ids) - block_size, (batch_size, 1), generator=draw)
    starts = run.my_share(starts).to(ids.device)
    windows = ids[starts + torch.arange(block_size + 1, device=ids.device)]  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def evaluate(model, ids, batch_size):
    """Return the mean loss in nats per token over all of ids, in consecutive windows of the model's
    block_size."""
    T = model.config.block_size
    n = (len(ids) - 1) // T * T
    inputs, targets = ids[:n].view(-1, T), ids[1 : n + 1].view(-1, T)
    batches = list(zip(inputs.split(batch_size), targets.split(batch_size))) if n else []
    if n < len(ids) - 1:  # the rest, as one shorter window
        batches.append((ids[None, n:-1], ids[None, n + 1 :]))
    device = run.device_of(model)
    total = 0.0
    with evaluating(model), run.autocast(model):
        for x, y in batches:
            _, loss = model(x.to(device), y.to(device))
            total += loss.item() * y.numel()
    return total / (len(ids) - 1)


def write_text(model, tokenizer, text, echo=False):
    """Return a continuation of text with its beginning. echo: print it while it is written."""
    bos = [tokenizer.bos_id] if hasattr(tokenizer, "bos_id") else []
    device = run.device_of(model)
    ids = torch.tensor([bos + tokenizer.encode(text)], device=device)
    if echo:
        print(text, end="", flush=True)
    generator = torch.Generator(device).manual_seed(seed)
    written, shown = [], ""
    with run.autocast(model):
        for token in model.stream(
            ids,
            max_new_tokens,
            getattr(tokenizer, "eos_id", -1),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
        ):
            written.append(token.item())
            new = tokenizer.decode(written)
            if echo and not new.endswith("\ufffd"):  # else a character with bytes still to come
                print(new[len(shown) :], end="", flush=True)
                shown = new
    return text + tokenizer.decode(written)


def use(device):
    """Evaluate a trained model, or continue a prompt with it."""
    checkpoint = run.load(Path(out_dir, "best.pt"), "gpt")
    model = GPT(GPTConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    assert context or yarn == 1, "yarn is for a longer context: give both"
    if context:
        extend_context(model, context, yarn)
    model = run.place(model, device, dtype)
    if eval_only:
        ids, state = load_split(eval_split)
        assert state == checkpoint["tokenizer"], (
            f"data/{dataset} has another tokenizer than {out_dir}/best.pt"
        )
        loss = evaluate(model, ids, batch_size)
        print(f"{out_dir}/best.pt, step {checkpoint['step']}: {eval_split} loss {loss:.4f}")
        return
    tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
    text = prompt.replace("\\n", "\n")
    write_text(model, tokenizer, text, echo=True)
    print()


@run.one_line_errors
def main(argv=None):
    settings = config.override(globals(), argv)
    out = Path(out_dir)
    dev = run.pick_device(device)
    if prompt or eval_only:
        return use(dev)

    train_ids, tokenizer_state = load_split("train")
    val_ids, _ = load_split("val")
    assert len(train_ids) > block_size and len(val_ids) > 1, (
        f"data/{dataset} is too small for block_size={block_size}"
    )
    run.check_batch(batch_size, accumulation)
    train_ids = train_ids.to(dev)
    tokenizer = tokenizer_from_state(tokenizer_state)
    beginning = "" if hasattr(tokenizer, "bos_id") else tokenizer.chars[0]  # such as "\n"

    torch.manual_seed(seed)
    model_config = GPTConfig(
        tokenizer.vocab_size,
        block_size,
        n_layer,
        n_head,
        n_embd,
        dropout,
        activation,
        norm,
        n_experts=n_experts,
        experts_per_token=experts_per_token,
    )
    model = run.place(GPT(model_config), dev, dtype)
    optimizers = make_optimizers(model, muon_lr, adam_lr, weight_decay)
    resumed = run.start("gpt", settings)
    step, seconds, best, samples = 0, 0.0, float("inf"), {}
    if resumed:
        step, seconds, best, samples = (
            resumed[name] for name in ("step", "seconds", "best", "samples")
        )
        run.restore(resumed, model, optimizers)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(train_ids):,} tokens, {n_parameters:,} parameters on {dev}")

    losses = []  # since the last evaluation
    start = time.perf_counter()
    while True:
        factor = lr_factor(step, max_steps, warmup_steps, cooldown)

        if step % eval_interval == 0 or step == max_steps:
            row = {"step": step, "lr": factor * adam_lr} | run.pace(
                losses, time.perf_counter() - start
            )
            seconds += time.perf_counter() - start  # of training, without evaluations
            if run.is_main():
                val = evaluate(model, val_ids, batch_size)
                run.log(
                    out,
                    row | {"val": val, "minutes": seconds / 60},
                    ("train", "val", "lr", "ms_per_step", "minutes"),
                )
                samples[step] = write_text(model, tokenizer, beginning)
                is_best, best = val <= best, min(val, best)
                checkpoint = run.checkpoint(
                    "gpt",
                    settings,
                    model,
                    optimizers,
                    step=step,
                    seconds=seconds,
                    best=best,
                    samples=samples,
                    tokenizer=tokenizer_state,
                )
                if is_best:
                    run.save(out / "best.pt", checkpoint)
                run.save(out / "last.pt", checkpoint)
            losses = []
            start = time.perf_counter()
        if step == max_steps:
            break

        x, y = get_batch(train_ids, step)
        run.seed_step(seed, step)  # of dropout
        loss = 0.0
        for x_part, y_part in zip(x.chunk(accumulation), y.chunk(accumulation)):
            with run.autocast(model):
                _, part_loss = model(x_part, y_part)
                # part of the loss of the batch
                part_loss = part_loss / (accumulation * run.n_processes())
            part_loss.backward()
            loss += part_loss.detach()
        losses.append(update(model, optimizers, loss, factor, grad_clip))
        step += 1
        run.show_step(out, step, max_steps, loss=losses)

    if run.is_main():
        plot(out)
        text = "\n\n".join(f"--- after {step} steps\n{sample}" for step, sample in samples.items())
        (out / "sample.txt").write_text(text + "\n", encoding="utf-8")
        print(samples[step])
        print(
            f"best validation loss {best:.4f} after {seconds / 60:.1f} minutes of training; "
            f"wrote {out}/loss.png, sample.txt"
        )


if __name__ == "__main__":
    main()
