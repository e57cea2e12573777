"""Metrics of captions: BLEU, CIDEr-D, a language model's surprise; what an evaluation reports."""

import math
import re
import unicodedata
from collections import Counter
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F

from config.tools.data import pad_texts
from config.tools.run import autocast, device_of, place
from model import GPT, GPTConfig, tokenizer_from_state

WORD = re.compile(
    r"""
    (?<!\S) (?: n't | '(?:s|m|d|re|ve|ll) )\b  # the second half of a contraction, once it is split
    | [\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]  # a Chinese or Japanese character is a word
    | [^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+
      (?: [-./,'] [^\W_]+ )*                   # letters and digits; t-shirt and 3.5 are one word
    | [&$%#@+=*/]                              # symbols that are read aloud
""",
    re.VERBOSE,
)


def words_of(text):
    """Return the words of a caption as the COCO caption evaluation splits them.

    As with its PTB tokenizer, words are in lower case, contractions are split (do n't, dog 's),
    hyphenated words stay whole, and punctuation is dropped; Chinese is scored by characters, as the
    field does, and an accent is part of its letter (NFC). Two differences are rare in captions:
    abbreviations lose their last full stop, and brackets are dropped where COCO keeps -lrb- and
    -rrb-.
    """
    text = unicodedata.normalize("NFC", text.lower()).replace("’", "'")
    text = re.sub(r"\bcannot\b", "can not", text)
    text = re.sub(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b", r" \1", text)
    return WORD.findall(text)


def words_of_all(candidates, references):
    """Return n str and n lists of str as n word lists and n lists of word lists."""
    assert all(references), "every caption needs at least one reference"
    references = [list(map(words_of, refs)) for refs in references]
    return list(map(words_of, candidates)), references


def count_ngrams(words, n):
    """Return a Counter of the n-grams, tuples of n successive words."""
    return Counter(zip(*(words[i:] for i in range(n))))


def bleu(candidates, references):
    """Return [BLEU-1, ..., BLEU-4] of a corpus, each from 0 to 1 (Papineni et al. 2002).

    The length of the closest reference counts, and nothing is smoothed.
    candidates: n str; references: n lists of str.
    """
    return bleu_of_words(*words_of_all(candidates, references))


def bleu_of_words(candidates, references, smooth=0):
    """Return bleu() of lists of words.

    smooth is added to the matches and totals of bigrams and longer n-grams. 1 suits single
    sentences, many of which share no four words with a reference (Lin and Och 2004).
    """
    matched = [0, smooth, smooth, smooth]
    total = list(matched)
    length = 0
    reference_length = 0
    for words, refs in zip(candidates, references, strict=True):
        length += len(words)
        reference_length += min((abs(len(ref) - len(words)), len(ref)) for ref in refs)[1]
        for n in range(1, 5):
            counts = count_ngrams(words, n)
            allowed = Counter()  # the largest count of an n-gram in any one reference
            for ref in refs:
                allowed |= count_ngrams(ref, n)
            matched[n - 1] += (counts & allowed).total()
            total[n - 1] += counts.total()
    brevity = min(1.0, math.exp(1 - reference_length / length)) if length else 0.0
    precisions = [m / t if t else 0.0 for m, t in zip(matched, total)]
    return [brevity * math.prod(precisions[:n]) ** (1 / n) for n in range(1, 5)]


def document_frequencies(references):
    """Return {n-gram: number of images whose references contain it}, n = 1 to 4."""
    frequencies = Counter()
    for refs in references:
        frequencies.update(
            {gram for ref in refs for n in range(1, 5) for gram in count_ngrams(ref, n)}
        )
    return frequencies


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) against references whose tf-idf vectors are computed once.

    references: a list of word lists per image.
    """

    sigma = 6.0

    def __init__(self, references):
        counts = document_frequencies(references)
        self.max_idf = math.log(len(references))  # of an n-gram that no reference contains
        self.idf = {ngram: self.max_idf - math.log(count) for ngram, count in counts.items()}
        self.references = [list(map(self.vectors, refs)) for refs in references]

    def vectors(self, words):
        """Return [(vector, norm), ...] for n = 1 to 4, and the number of words. A vector is
        {n-gram: count * idf}, max_idf if no reference contains it; a norm of 0 is replaced by 1.
        """
        vectors = []
        for n in range(1, 5):
            vector = count_ngrams(words, n)
            for ngram in vector:
                vector[ngram] *= self.idf.get(ngram, self.max_idf)
            vectors.append((vector, math.hypot(*vector.values()) or 1.0))
        return vectors, len(words)

    def score(self, words, references):
        """Return 10 times the similarity of a caption to its references, averaged over them and n.

        The similarity is the product of the tf-idf vectors, the caption's clipped to the
        reference's, over both norms, which are those before clipping; times exp(-d**2 / (2
        sigma**2)), where d is the difference in length. This is CIDEr-D, the variant that the paper
        proposes for evaluation servers.
        references: a list of results of vectors().
        """
        vectors, length = self.vectors(words)
        total = 0.0
        for ref_vectors, ref_length in references:
            penalty = math.exp(-((length - ref_length) ** 2) / (2 * self.sigma**2))
            for (vector, norm), (ref_vector, ref_norm) in zip(vectors, ref_vectors):
                product = sum(
                    min(value, ref_vector[ngram]) * ref_vector[ngram]
                    for ngram, value in vector.items()
                    if ngram in ref_vector
                )
                total += penalty * product / (norm * ref_norm)
        return 10.0 * total / (4 * len(references))

    def scores(self, captions, images):
        """Return the (n,) scores, from 0 to 10, of n word lists about these n images (indices)."""
        return np.array(
            [
                self.score(words, self.references[image])
                for words, image in zip(captions, images, strict=True)
            ]
        )


def cider(candidates, references):
    """Return the mean and the (n,) scores of CIDEr-D, from 0 to 10; papers print them times 100.

    candidates: n str; references: n lists of str. A caption of at least four words that equals its
    only reference scores 10, unless all images share its words.
    """
    candidates, references = words_of_all(candidates, references)
    scores = CiderD(references).scores(candidates, range(len(references)))
    return fmean(scores), scores


def caption_scores(captions, references):
    """Return {name: value} of what an evaluation reports about n str and n lists of str.

    cider, bleu1 to bleu4: times 100, as papers print them.
    shuffled: CIDEr against the references of the next image; as high as cider if the model ignores
        the images.
    """
    n = len(captions)
    words, references = words_of_all(captions, references)
    scorer = CiderD(references)
    scores = {"cider": 100 * fmean(scorer.scores(words, range(n)))}
    for order, value in enumerate(bleu_of_words(words, references), 1):
        scores[f"bleu{order}"] = 100 * value
    scores["shuffled"] = 100 * fmean(scorer.scores(words, np.roll(range(n), -1)))
    return scores


class LanguageJudge:
    """How surprising a caption is to the language model of stage 2.

    checkpoint: a dict of gpt.py with config, tokenizer and model.
    """

    def __init__(self, checkpoint, device, dtype):
        self.tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
        self.gpt = place(GPT(GPTConfig(**checkpoint["config"])), device, dtype).eval()
        self.gpt.load_state_dict(checkpoint["model"])

    @torch.no_grad()
    def nats(self, captions):
        """Return (n, T): minus the log-probability of each token of n captions, in nats.

        The end token is the last that counts; after it there are zeros. A caption that is longer
        than the context of the GPT is cut off.
        """
        ids = pad_texts(captions, self.tokenizer, self.gpt.config.block_size)
        pad_id = self.tokenizer.pad_id
        ids = ids[:, (ids != pad_id).any(dim=0)].to(device_of(self.gpt))  # (n, T + 1)
        with autocast(self.gpt):
            logits, _ = self.gpt(ids[:, :-1])  # (n, T, vocab_size)
        targets = ids[:, 1:]
        nats = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=pad_id, reduction="none"
        )
        return nats.view_as(targets).cpu()


def recalls(cosines, owner):
    """Return recalls in per cent of (n, m) cosines of photos and captions; owner (m,): the photo of
    each caption.

    text5: photos that have an own caption among the five nearest captions. photo5: captions that
    have their photo among the five nearest photos.
    """
    n, m = cosines.shape
    scores = {}
    for k in (1, 5, 10):
        found = owner[cosines.topk(min(k, m), dim=1).indices] == torch.arange(n)[:, None]  # (n, k)
        scores[f"text{k}"] = 100 * found.any(dim=1).float().mean().item()
        found = cosines.topk(min(k, n), dim=0).indices == owner  # (k, m)
        scores[f"photo{k}"] = 100 * found.any(dim=0).float().mean().item()
    return scores
