"""CLIP on the photos and captions of Flickr8k (python prepare_flickr8k.py --size=128), on one GPU.
On a GPU it has only been started."""

out_dir = "out/clip"
task = "clip"
dataset = "flickr8k"
vit_ckpt = "out/cifar/best.pt"  # python vit.py config/cifar.py
max_steps = 800
batch_size = 250  # photos: each caption is compared with 249 others
image_size = 128
train_size = 112
first_size = 64  # pixels a side at the beginning
patch_size = 4  # this and the next three are vit_ckpt's
n_layer = 7
n_head = 4
n_embd = 256
patch_dropout = 0.5  # as in config/clip_cpu.py
dropout = 0.1
eval_interval = 250
