r"""Drawn scenes, wide, square and tall, on tiles as in Llama 3.2 Vision, on two CPU cores.

The ViT and the GPT are those of a captioner of the same scenes, squeezed to squares. The GPT stays
frozen, so on text without images it stays exactly as it was:

    python mllm.py config/llama_vision_cpu.py --vit_ckpt= --gpt_ckpt= --train=vit,connector,gpt \
        --max_tiles=1 --across_layer=0 --keep_blocks=() --adam_lr=3e-3 --max_steps=600 \
        --out_dir=out/llama_squares
"""

out_dir = "out/llama_vision_cpu"
dataset = "wide"
n_drawn = 10000
vit_ckpt = "out/llama_squares/sft.pt"
gpt_ckpt = "out/llama_squares/sft.pt"
train = "vit,connector"  # cross-attention and all gates belong to the connector
max_tiles = 4
across_layer = 1
vit_layer = 2
keep_blocks = (0,)  # intermediate features: those of the first block
fusion = "cross"
image_size = 48  # of a tile: 6 x 6 patches
max_tokens = 80
adam_lr = 0.01  # the gates open faster
max_steps = 1200
eval_interval = 400
