"""CIFAR-10 on one GPU. On a GPU it has only been started."""
out_dir = "out/cifar"
max_steps = 5000
batch_size = 512
patch_size = 4  # 16x16 patches an image, as Compact Transformers have
n_layer = 7
n_head = 4
n_embd = 256
stem = "residual"  # see config/cifar_cpu.py
eval_interval = 1000
