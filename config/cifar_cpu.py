"""CIFAR-10 on two CPU cores."""

out_dir = "out/cifar_cpu"
max_steps = 4600
batch_size = 128
n_layer = 4  # blocks of 128 channels: larger ones see too few images in as many minutes
n_head = 4
n_embd = 128
eval_interval = 1000
