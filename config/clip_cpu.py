"""CLIP on Flickr8k's photos and captions, on two CPU cores: 10 minutes of training."""
out_dir = "out/clip_cpu"
dataset = "flickr8k"
dtype = "bfloat16"  # with AVX512-BF16 or AMX; float32 elsewhere
vit_ckpt = "out/cifar_cpu/best.pt"  # python vit.py config/cifar_cpu.py
max_minutes = 10.0
max_steps = 0
batch_size = 250  # photos, each the other's negative
growth = 0.0  # photos have their full size from the start
dropout = 0.1
n_layer = 4
n_head = 4
n_embd = 128
eval_interval = 50
