"""CIFAR-10 on two CPU cores: 20 minutes of training."""
out_dir = "out/cifar_cpu"
max_steps = 4600
batch_size = 128
n_layer = 4  # of 128 channels: larger ones see too few images in these minutes
n_head = 4
n_embd = 128
stem = "residual"  # 71.9% instead of 71.0% in four minutes
eval_interval = 1000
