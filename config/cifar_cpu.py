"""CIFAR-10 on two CPU cores: 40 minutes of training."""
out_dir = "out/cifar_cpu"
dtype = "bfloat16"  # with AVX512-BF16 or AMX: 2 to 5 times as fast as float32, which is the choice elsewhere
max_minutes = 40.0
max_steps = 0
batch_size = 128
n_layer = 4  # of 128 channels: larger ones see too few images in these minutes
n_head = 4
n_embd = 128
eval_interval = 1000
