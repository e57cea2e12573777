"""
Download Tiny Shakespeare and write data/shakespeare/{train,val}.npy: 1,115,394 characters, a uint32
id per character, split 90/10 as in nanoGPT.

    python prepare_shakespeare.py
"""

import numpy as np

import config
from config import read_text
from config.tools.data import download, save_array, save_json
from config.tools.run import one_line_errors
from model import CharTokenizer

out_dir = "data/shakespeare"  # where the download goes, and what gpt.py reads

URLS = [
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
]
MD5 = "6fb458f1232090904fb40fe944165e91"


@one_line_errors
def main(argv=None):
    config.override(globals(), argv)
    text = read_text(download(f"{out_dir}/input.txt", URLS, MD5)).replace("\r\n", "\n")
    assert len(text) >= 20, f"{out_dir}/input.txt has only {len(text)} characters"
    tokenizer = CharTokenizer(text)
    ids = np.array(tokenizer.encode(text), dtype=np.uint32)
    n_train = len(ids) * 9 // 10  # validation is the last tenth, so that no scene is in both
    save_array(f"{out_dir}/train.npy", ids[:n_train])
    save_array(f"{out_dir}/val.npy", ids[n_train:])
    save_json(f"{out_dir}/tokenizer.json", tokenizer.state())
    print(
        f"{out_dir}: {n_train:,} characters to train on, {len(ids) - n_train:,} for validation; "
        f"{tokenizer.vocab_size} different ones"
    )


if __name__ == "__main__":
    main()
