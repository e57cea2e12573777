r"""
Captions of Flickr8k photos from OpenAI's CLIP ViT-B/16, frozen, and a small GPT, on two CPU cores.
It has only been started, with random weights. The first command replaces the photos of 112 pixels
that other recipes need, and the third one writes the features of all photos, 2.4 GB, to
data/flickr8k.

    python prepare_flickr8k.py --size=224
    python gpt.py config/captions_cpu.py
    python mllm.py config/clip_flickr8k_cpu.py
    python scst.py config/flickr8k_scst_cpu.py --sft_dir=out/clip_flickr8k_cpu \
        --out_dir=out/clip_flickr8k_scst_cpu
"""

out_dir = "out/clip_flickr8k_cpu"
dataset = "flickr8k"
vit_ckpt = "openai/clip-vit-base-patch16"  # downloaded once, 600 MB
gpt_ckpt = "out/captions_cpu/best.pt"
train = "connector,gpt"  # the ViT sees each photo once
image_size = 224  # as CLIP was trained: 196 image tokens
connector = "mlp"
max_steps = 1500
align_share = 0.05  # for the connector and the cross-attention, which are new
captions_per_photo = 2
max_tokens = 32
word_dropout = 0.1
dropout = 0.25
label_smoothing = 0.1
muon_lr = 0.01
adam_lr = 1.5e-3
eval_interval = 250
