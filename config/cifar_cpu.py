"""CIFAR-10 on two CPU cores in 15 minutes."""
out_dir = "out/cifar_cpu"
dtype = "bfloat16"  # with AVX512-BF16 or AMX; float32 elsewhere
max_minutes = 15.0
max_steps = 0
batch_size = 128
n_layer = 5
n_head = 4
n_embd = 192
eval_interval = 200
