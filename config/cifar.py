"""CIFAR-10 on one GPU. On a GPU it has only been started."""

out_dir = "out/cifar"
max_steps = 5000
batch_size = 512
patch_size = 4  # 16x16 patches per image, as in Compact Transformers
n_layer = 7
n_head = 4
n_embd = 256
eval_interval = 1000
