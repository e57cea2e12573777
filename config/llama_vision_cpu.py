r"""Drawn scenes, wide, square and tall, on tiles as in Llama 3.2 Vision, on two CPU cores.

First a ViT that knows shapes, and a GPT that knows the captions as text. The GPT then stays frozen,
so on text without images it stays exactly as it was:

    python mllm.py --fusion=prefix --max_steps=800 --out_dir=out/shapes_prefix
    python mllm.py config/llama_vision_cpu.py --vit_ckpt= --gpt_ckpt= --train=gpt --adam_lr=3e-3 \
        --max_steps=300 --out_dir=out/llama_gpt
"""

out_dir = "out/llama_vision_cpu"
dataset = "wide"
n_drawn = 10000
vit_ckpt = "out/shapes_prefix/sft.pt"
gpt_ckpt = "out/llama_gpt/sft.pt"
train = "vit,connector"  # cross-attention and all gates belong to the connector
gpt_layer = 4
max_tiles = 4
across_layer = 1
vit_layer = 2  # where there is no vit_ckpt
keep_blocks = (0,)  # intermediate features: those of the first block
fusion = "cross"
image_size = 48  # of a tile: 6 x 6 patches
max_tokens = 80
adam_lr = 0.01  # the gates open faster
max_steps = 1200
eval_interval = 400
