"""Captions of Flickr8k photos, from the ViT and the GPT of stages 1 and 2, on two CPU cores."""
out_dir = "out/flickr8k_cpu"
dataset = "flickr8k"
dtype = "bfloat16"  # with AVX512-BF16 or AMX; float32 elsewhere
vit_ckpt = "out/cifar_cpu/best.pt"  # python vit.py config/cifar_cpu.py
gpt_ckpt = "out/captions_cpu/best.pt"  # python gpt.py config/captions_cpu.py
image_size = 64
max_minutes = 26.0
align_share = 0.05
shift = 4
mirror = True
batch_size = 64
captions_per_photo = 2
max_tokens = 32
dropout = 0.1
eval_interval = 200
