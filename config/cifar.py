"""CIFAR-10 on one GPU. Started on a CPU for a few steps, and never yet run to its end on a GPU, so that README has no
row for it."""
out_dir = "out/cifar"
max_minutes = 8.0
max_steps = 0
batch_size = 512
patch_size = 4  # 16x16 patches an image, as Compact Transformers have
n_layer = 7
n_head = 4
n_embd = 256
eval_interval = 1000
