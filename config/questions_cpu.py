"""Questions about drawn images, pairs of images and clips, on two CPU cores: ten minutes, no download."""
out_dir = "out/questions"
dataset = "questions"
n_drawn = 25000  # groups of conversations about the same images: of 10,000 the model remembers too much
fusion = "prefix"
gpt_head = 2  # fewer heads than usual: a step is a tenth faster
connector = "pixel_shuffle"  # 9 tokens an image, one for each place: a clip has up to eight images
align_share = 0.07  # captions first, so that the ViT knows what is there
train_vit = False  # then it is frozen, and sees each image once
captions_per_photo = 6  # conversations of a group in a step
batch_size = 64  # groups
accumulation = 2  # a part has rows of about equal length
max_tokens = 64
max_steps = 1800
eval_interval = 800
beams = 1  # answers are short and certain
