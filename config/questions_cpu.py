"""Questions about drawn images, pairs of images and clips, on two CPU cores."""
out_dir = "out/questions"
dataset = "questions"
n_drawn = 25000  # groups of conversations about the same images; 10,000 are memorised
fusion = "prefix"
gpt_head = 2  # a step is a tenth faster than with 4
connector = "pixel_shuffle"  # 9 tokens per image, one for each place: a clip has up to 8 images
align_share = 0.07  # captions first, so that the ViT knows what is there
train_vit = False  # after that it is frozen, and sees each image once
captions_per_photo = 6  # conversations of each group in a step
batch_size = 64  # groups
accumulation = 2  # the rows of a part are about equally long
max_tokens = 64
max_steps = 1800
eval_interval = 800
beams = 1  # answers are short and certain
