"""Captions of Flickr8k photos (python prepare_flickr8k.py --size=128) on one GPU. On a GPU it has
only been started."""

out_dir = "out/flickr8k"
dataset = "flickr8k"
vit_ckpt = "out/clip/best.pt"  # python vit.py config/clip.py; 32x32 patches of 4 pixels
gpt_ckpt = "out/captions_cpu/best.pt"  # python gpt.py config/captions_cpu.py
image_size = 128
train_size = 112
fusion = "cross"
connector = "pixel_shuffle"  # 256 image tokens instead of 1,024
max_steps = 2000
align_share = 0.04
crop = 0.5
jitter = 0.3
mirror = True
word_dropout = 0.1
batch_size = 128
captions_per_photo = 5  # a photo's image tokens serve all of its captions
max_tokens = 32
dropout = 0.3
label_smoothing = 0.1
muon_lr = 0.01
conv_lr = 0.0
adam_lr = 1.5e-3
cooldown = 0.8
eval_interval = 200
