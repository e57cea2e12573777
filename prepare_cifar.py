"""
Download CIFAR-10 and write data/cifar10/{train,test}_{images,labels}.npy: uint8 pixels (50000 or
10000, 3, 32, 32) and uint8 labels. The binary version of the archive needs no unpickling.

    python prepare_cifar.py
"""

import tarfile

import numpy as np

import config
from config.tools.data import download, save_array, save_json
from config.tools.run import fail, one_line_errors

out_dir = "data/cifar10"  # where the download goes, and what vit.py reads

URLS = [
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/cifar-10-binary.tar.gz",
]
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
RECORD = 1 + 3 * 32 * 32  # bytes: a label, then red, green and blue, row by row
FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}


def read_split(tar, names):
    """Return labels (n,) and images (n, 3, 32, 32) of files with 10,000 records each."""
    content = b""
    for name in names:
        batch = tar.extractfile(f"cifar-10-batches-bin/{name}").read()
        assert len(batch) == 10_000 * RECORD, (
            f"{name} in the archive is too short; delete the archive"
        )
        content += batch
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, RECORD)
    return records[:, 0], records[:, 1:].reshape(-1, 3, 32, 32)


@one_line_errors
def main(argv=None):
    config.override(globals(), argv)
    archive = download(f"{out_dir}/cifar-10-binary.tar.gz", URLS, MD5)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            classes = tar.extractfile("cifar-10-batches-bin/batches.meta.txt").read().decode()
            splits = {split: read_split(tar, names) for split, names in FILES.items()}
    except (tarfile.TarError, EOFError, KeyError) as e:
        fail(f"{archive} is not CIFAR-10 or is damaged ({e}); delete it and run this again")
    save_json(f"{out_dir}/classes.json", classes.split())
    for split, (labels, images) in splits.items():
        save_array(f"{out_dir}/{split}_labels.npy", labels)
        save_array(f"{out_dir}/{split}_images.npy", images)
        print(
            f"{out_dir}: {len(images):,} {split} images, per class {np.bincount(labels).tolist()}"
        )


if __name__ == "__main__":
    main()
