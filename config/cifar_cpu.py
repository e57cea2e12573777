"""CIFAR-10 on two CPU cores: 17 minutes of training, 19 with the evaluations."""
out_dir = "out/cifar_cpu"
dtype = "bfloat16"  # with AVX512-BF16 or AMX: 2 to 5 times as fast as float32, which is the choice elsewhere
max_minutes = 17.0
max_steps = 0
batch_size = 128
n_layer = 4  # in the same minutes 192 channels and 5 layers see half as many images and learn less
n_head = 4
n_embd = 128
eval_interval = 500
