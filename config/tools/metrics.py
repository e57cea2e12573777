"""Metrics of captions: words, BLEU, CIDEr-D, what an evaluation reports; and a baseline, captions of similar photos."""

import math
import re
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from config import show_progress

UNFINISHED = set("a an the in on of with and or at by for from to into onto over under near through while as is are "
                 "its his her their another two".split())  # a caption that ends so was cut off


def words_of(text):
    """The words of a caption as the PTB tokenizer of the COCO caption evaluation cuts them: lower case, contractions
    split (do n't, dog 's), hyphenated words whole, punctuation dropped. It differs in what hardly occurs in captions:
    abbreviations lose their last full stop, and brackets are dropped where COCO's leaves -lrb- and -rrb-."""
    text = re.sub(r"\bcannot\b", "can not", text.lower().replace("’", "'"))
    text = re.sub(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b", r" \1", text)
    return re.findall(r"(?<!\S)(?:n't|'(?:s|m|d|re|ve|ll))\b|[^\W_]+(?:[-./,'][^\W_]+)*|[&$%#@+=*/]", text)


def count_ngrams(words, n):
    return Counter(zip(*(words[i:] for i in range(n))))


def bleu(candidates, references):
    """[BLEU-1, ..., BLEU-4] of the corpus, 0 to 1 (Papineni et al. 2002); the closest reference length, no smoothing.
    candidates: list of str; references: a list of str for each candidate."""
    assert all(references), "for each candidate at least one reference"
    return bleu_of_words([words_of(c) for c in candidates], [[words_of(ref) for ref in refs] for refs in references])


def bleu_of_words(candidates, references, smooth=0):
    """bleu() of word lists. smooth: is added to matches and totals of two words and more; 1 for single sentences, of
    which many match no four words (Lin and Och 2004)."""
    matched, total, length, reference_length = [0] + 3 * [smooth], [0] + 3 * [smooth], 0, 0
    for words, refs in zip(candidates, references, strict=True):
        length += len(words)
        reference_length += min((abs(len(ref) - len(words)), len(ref)) for ref in refs)[1]
        for n in range(1, 5):
            allowed = Counter()
            for ref in refs:
                allowed |= count_ngrams(ref, n)  # the largest count in any one reference
            counts = count_ngrams(words, n)
            matched[n - 1] += (counts & allowed).total()
            total[n - 1] += counts.total()
    brevity = min(1.0, math.exp(1 - reference_length / length)) if length else 0.0
    precisions = [m / t if t else 0.0 for m, t in zip(matched, total)]
    return [brevity * math.prod(precisions[:n]) ** (1 / n) for n in range(1, 5)]


def document_frequencies(references):
    """references: for each image a list of word lists -> ({n-gram: in how many images' references it occurs, n = 1 to
    4}, how many images there are)"""
    df = Counter()
    for refs in references:
        df.update({ngram for ref in refs for n in range(1, 5) for ngram in count_ngrams(ref, n)})
    return df, len(references)


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) against references whose tf-idf vectors are computed once: for each image a list
    of word lists. df: what document_frequencies() gives; None counts these references."""

    sigma = 6.0

    def __init__(self, references, df=None):
        counts, n_images = df or document_frequencies(references)
        self.max_idf = math.log(max(1, n_images))  # of an n-gram that occurs nowhere
        self.idf = {ngram: self.max_idf - math.log(count) for ngram, count in counts.items()}
        self.references = [[self.vectors(ref) for ref in refs] for refs in references]

    def vectors(self, words):
        """The tf-idf vectors {n-gram: count * idf} for n = 1 to 4, their norms, and the length in bigrams."""
        vectors = []
        for n in range(1, 5):
            vectors.append({})
            for ngram in zip(*(words[i:] for i in range(n))):
                vectors[-1][ngram] = vectors[-1].get(ngram, 0.0) + self.idf.get(ngram, self.max_idf)
        return vectors, [math.hypot(*vector.values()) or 1.0 for vector in vectors], max(0, len(words) - 1)

    def score(self, caption, references):
        """What vectors() gives of a caption and of its references -> 10 times the mean, over references and n, of the
        cosine of the clipped vectors times a Gaussian penalty on the difference in length."""
        total, (vectors, norms, length) = 0.0, caption
        for ref_vectors, ref_norms, ref_length in references:
            penalty = math.exp(-(length - ref_length) ** 2 / (2 * self.sigma ** 2))
            for vector, norm, ref_vector, ref_norm in zip(vectors, norms, ref_vectors, ref_norms):
                if vector.keys().isdisjoint(ref_vector):
                    break  # they share no n words, so nothing longer either
                product = 0.0
                for ngram, value in vector.items():
                    if ngram in ref_vector:
                        product += min(value, ref_vector[ngram]) * ref_vector[ngram]
                total += penalty * product / (norm * ref_norm)
        return 10.0 * total / (4 * len(references))

    def scores(self, captions, images):
        """n word lists, and the index of each one's image -> (n,) scores, 0 to 10."""
        return np.array([self.score(self.vectors(words), self.references[image])
                         for words, image in zip(captions, images, strict=True)])


def cider(candidates, references, df=None):
    """CIDEr-D as the field reports it, over 100: (mean, (n,) array of each image's). candidates: list of str;
    references: a list of str for each; df: document_frequencies() of other references. A caption of four words or more
    that is its only reference scores 10 (unless all images share its words)."""
    assert len(candidates) == len(references) and all(references), "for each candidate at least one reference"
    scorer = CiderD([[words_of(ref) for ref in refs] for refs in references], df)
    scores = scorer.scores([words_of(c) for c in candidates], range(len(candidates)))
    return float(scores.mean()), scores


def ends_badly(words, ended):
    """Whether a caption lacks a proper ending: no end token, or a last word after which something must follow."""
    return not ended or not words or words[-1] in UNFINISHED


def caption_scores(captions, ended, references):
    """{name: value} of what is reported about captions of photos; CIDEr and BLEU times 100, as papers print them.
    shuffled: CIDEr against other photos' references, the mean of five fixed derangements; as high as cider where a
    model does not look. broken: the share without a proper ending. distinct: different captions over all captions."""
    scorer = CiderD([[words_of(ref) for ref in refs] for refs in references])
    words, n = [words_of(caption) for caption in captions], len(captions)
    mean_cider = lambda k: 100 * float(scorer.scores(words, (np.arange(n) + k) % n).mean())
    return {"cider": mean_cider(0), **{f"bleu{n}": 100 * b for n, b in enumerate(bleu(captions, references), 1)},
            "shuffled": float(np.mean([mean_cider(k) for k in range(1, min(6, n))] or [0.0])),
            "length": float(np.mean([len(each) for each in words])),
            "broken": 100 * float(np.mean([ends_badly(each, end) for each, end in zip(words, ended)])),
            "distinct": 100 * len(set(captions)) / len(captions)}


def most_alike(texts, scorer, vectors=None):
    """Of some captions of an image the place of the one that is most similar to all, by CIDEr-D (Devlin et al. 2015):
    their consensus. scorer: a CiderD with document frequencies; vectors: what scorer.vectors() gives of the texts."""
    vectors = vectors or [scorer.vectors(words_of(text)) for text in texts]
    return int(np.argmax([scorer.score(each, vectors) for each in vectors]))  # to itself each is equally similar


def thumbnails(images):
    """(n, 3, H, W) uint8 -> (n, 192) unit vectors: the pixels of the images when reduced to 8x8, less their means."""
    small = torch.cat([F.adaptive_avg_pool2d(some.float(), 8).flatten(1) for some in images.split(500)])  # (n, 192)
    return F.normalize(small - small.mean(dim=0), dim=1)


def nearest_captions(vectors, captions, train, photos, k=20):
    """For each of the photos the consensus caption of the k training photos most like it. A list of str. vectors:
    (n, d), of unit length; captions: a list of str for each; train, photos: indices of both."""
    near, chosen = (vectors[photos] @ vectors[train].T).topk(min(k, len(train)), dim=1).indices.tolist(), []  # (n, k)
    scorer = CiderD([[words_of(caption) for caption in captions[p]] for p in train])
    for row in near:
        texts = [caption for i in row for caption in captions[train[i]]]
        vectors = [each for i in row for each in scorer.references[i]]
        chosen.append(texts[most_alike(texts, scorer, vectors)])
        show_progress(f"nearest photos of {len(chosen)}/{len(photos)}")
    show_progress("")
    return chosen
