"""CLIP on Flickr8k's photos and captions, on two CPU cores: 8 minutes of training."""
out_dir = "out/clip_cpu"
task = "clip"
dataset = "flickr8k"
vit_ckpt = "out/cifar_cpu/best.pt"  # python vit.py config/cifar_cpu.py --max_minutes=20; empty: from nothing
max_minutes = 8.0  # by then it has memorised the training photos' captions
max_steps = 0
batch_size = 250  # photos: each caption is compared with 249 others
image_size = 96  # as prepare_flickr8k.py packs them
first_size = 48  # pixels a side at the beginning: they grow during 70% of the run
n_layer = 4  # these three are vit_ckpt's, where there is one
n_head = 4
n_embd = 128
dropout = 0.1
eval_interval = 50
