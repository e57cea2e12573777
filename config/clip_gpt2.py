"""
Captions of Flickr8k photos from CLIP ViT-B/16 and GPT-2, joined as in LLaVA, on one GPU. It has
only been started, with random weights.

    python prepare_flickr8k.py --size=224
    python mllm.py config/clip_gpt2.py
"""

out_dir = "out/clip_gpt2"
dataset = "flickr8k"
image_size = 224  # as CLIP was trained: 196 image tokens
vit_ckpt = "openai/clip-vit-base-patch16"  # downloaded once, 600 MB
gpt_ckpt = "gpt2"  # 550 MB
fusion = "prefix"
connector = "mlp"
train = "connector,gpt"
align_share = 0.2  # the connector first
captions_per_photo = 5
max_steps = 3000
muon_lr = 0.0
adam_lr = 1e-4  # a twentieth of that of a new model: GPT-2 knows its language
dropout = 0.1
eval_interval = 500
