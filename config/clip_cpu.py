"""CLIP on the photos and captions of Flickr8k, on two CPU cores."""

out_dir = "out/clip_cpu"
task = "clip"
dataset = "flickr8k"
vit_ckpt = "out/cifar_cpu/best.pt"  # python vit.py config/cifar_cpu.py; empty: random weights
max_steps = 660  # by then it has memorised the captions of the training photos
batch_size = 250  # photos: each caption is compared with 249 others
image_size = 112  # as prepare_flickr8k.py packs them
train_size = 96  # of what is seen of a photo: things look larger in crops
first_size = 48  # pixels a side at the beginning
patch_dropout = 0.5  # half as much work for the blocks, and harder to memorise
n_layer = 4  # this and the next two are vit_ckpt's
n_head = 4
n_embd = 128
dropout = 0.1
eval_interval = 50
