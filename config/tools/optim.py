"""Optimization: Muon for the weights of linear layers and convolutions, AdamW for everything else;
the schedule; one update."""

import math

import torch
import torch.distributed as dist

from config.tools.run import dtype_of
from model import OutputLayer


class Muon(torch.optim.Optimizer):
    """Take steps along the momentum of each weight matrix, made nearly semi-orthogonal (Jordan et
    al. 2024, https://kellerjordan.github.io/posts/muon).

    Equal to torch.optim.Muon, except that it computes in dtype. torch's computes in bfloat16, which
    is 30 times slower than float32 on a CPU without instructions for it. groups: of parameters
    of equal shape, each with its "lr".
    """

    def __init__(self, groups, weight_decay, dtype):
        super().__init__(groups, {"weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            directions = []
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                direction = p.grad.lerp(momentum, 0.95)  # Nesterov momentum
                directions.append(direction.flatten(1))  # of a convolution: (out, in * 3 * 3)
            updates = orthogonalize(torch.stack(directions).to(self.dtype))
            _, n_out, n_in = updates.shape
            for p, update in zip(group["params"], updates):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-group["lr"] * max(1, n_out / n_in) ** 0.5)


def orthogonalize(x):
    """Return about U V^T for each matrix of x (n, rows, columns) with the singular value
    decomposition U S V^T.

    A Newton-Schulz iteration needs only matrix products. These coefficients do not make it
    converge: after five steps most singular values are between 0.7 and 1.2, which is good enough
    and takes fewer steps.
    """
    if x.size(1) > x.size(2):
        return orthogonalize(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # now no singular value is above 1
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x


def make_optimizers(model, muon_lr, adam_lr, weight_decay, conv_lr=0.0):
    """Return [Muon, AdamW] over the parameters that train, or [AdamW] if both rates of Muon are 0.
    update() sets their rates.

    Muon takes the weights of linear layers except output layers, with muon_lr above 0, and those of
    convolutions, with conv_lr above 0. Biases and gains do not decay.
    """
    linear = {
        module.weight
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and not isinstance(module, OutputLayer)
    }
    groups = {}  # of Muon, by rate and shape: matrices of equal shape are faster together
    matrices = {"params": [], "peak_lr": adam_lr, "weight_decay": weight_decay}  # of AdamW
    vectors = {"params": [], "peak_lr": adam_lr, "weight_decay": 0.0}
    for p in model.parameters():
        rate = muon_lr if p in linear else conv_lr * (p.ndim == 4)
        if not p.requires_grad:
            continue
        group = matrices if p.ndim >= 2 else vectors
        if rate:
            group = groups.setdefault((rate, p.shape), {"params": [], "peak_lr": rate})
        group["params"].append(p)
    optimizers = [torch.optim.AdamW([matrices, vectors], betas=(0.9, 0.95), fused=True)]
    if groups:
        optimizers.insert(0, Muon(groups.values(), weight_decay, dtype_of(model)))
    return optimizers


def lr_factor(step, max_steps, warmup_steps, cooldown):
    """Return the learning rate over its peak: a linear warm-up, a plateau, then a straight line to
    zero over the last part `cooldown` of the run."""
    warmup = (step + 1) / max(1, warmup_steps)
    decay = (max_steps - step) / max(1, cooldown * max_steps)
    return min(1.0, warmup, decay)


def update(model, optimizers, loss, factor, grad_clip):
    """Take one step of the optimizers, at factor times their peak rates.

    Gradients and losses of all processes are summed first, then the norm of the gradient is clipped
    to grad_clip (0: not at all). loss: this process's share of the batch's loss, a scalar tensor
    without gradient. Returns the loss of the whole batch.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        if p.grad is None:  # not used in this batch; every process must contribute the same tensors
            p.grad = torch.zeros_like(p)
    if dist.is_initialized():
        flat = torch.cat([loss.view(1), *(p.grad.flatten() for p in trained)])
        dist.all_reduce(flat)
        loss, *gradients = flat.split([1, *(p.numel() for p in trained)])
        loss = loss[0].clone()  # a view would keep all of flat in memory
        for p, gradient in zip(trained, gradients):
            p.grad.copy_(gradient.view_as(p))
    torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss
