"""CLIP on Flickr8k's photos and captions, on two CPU cores: 10 minutes of training."""
out_dir = "out/clip_cpu"
task = "clip"
dataset = "flickr8k"
vit_ckpt = "out/cifar_cpu/best.pt"  # python vit.py config/cifar_cpu.py; empty: from nothing
max_steps = 660  # by then it has memorised the training photos' captions
batch_size = 250  # photos: each caption is compared with 249 others
image_size = 112  # as prepare_flickr8k.py packs them
train_size = 96  # of a part of a photo, in which things look larger
first_size = 48  # pixels a side at the beginning: they grow during 70% of the run
patch_dropout = 0.5  # half as much work for the blocks, and harder to memorise
words_weight = 1.0  # recall at 10 of 28% instead of 26% after 600 steps
n_layer = 4  # these four are vit_ckpt's, where there is one
n_head = 4
n_embd = 128
stem = "residual"  # see config/cifar_cpu.py
dropout = 0.1
eval_interval = 50
