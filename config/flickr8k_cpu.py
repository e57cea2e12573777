"""Captions of Flickr8k photos, from the ViT of CLIP and the GPT of stage 2, on two CPU cores."""

out_dir = "out/flickr8k_cpu"
dataset = "flickr8k"
vit_ckpt = "out/clip_cpu/best.pt"  # python vit.py config/clip_cpu.py
gpt_ckpt = "out/captions_cpu/best.pt"  # python gpt.py config/captions_cpu.py
image_size = 112  # as prepare_flickr8k.py packs them
train_size = 96  # this and the next are as in config/clip_cpu.py
patch_dropout = 0.5
fusion = "cross"  # better than image tokens as a prefix in a short run, and as fast
connector = "mlp"  # 196 image tokens, one per patch: they cost little outside the sequence
max_steps = 2600
align_share = 0.05  # for the connector and the cross-attention, which are new
captions_per_photo = 2
max_tokens = 32
crop = 0.5  # this and the next five delay memorising; the lab notebook has trials of most
jitter = 0.2
mirror = True
word_dropout = 0.1
dropout = 0.25
label_smoothing = 0.1
muon_lr = 0.01
conv_lr = 0.0
adam_lr = 1.5e-3
cooldown = 0.8
eval_interval = 500
