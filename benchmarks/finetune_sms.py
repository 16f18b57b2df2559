"""SMS spam: a private linear head on hashed characters at epsilon 3; target accuracy 0.96.

Features are hashed runs of one to three characters, in which all digits look the same: the hash is fixed, so no vocabulary is
learnt from the messages. Each run holds out another fifth of the messages, taken by their distinct texts, so that no
text is on both sides. The data are read from the folder in the environment variable TFPRIVACY_FT_DATA, or from ../shared/data.
"""

import re

import _finetune
import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer

from tfprivacy_ft import datasets

FILE, SHA256 = "SMSSpamCollection.tsv", "0497dbcb8ff438156d7b8f279376629501ec23f5de8f80d00818f05ae8d6654d"
URL = "https://archive.ics.uci.edu/dataset/228/sms+spam+collection"
FEATURES, HELD_OUT = 4096, 0.2


def plain(text):
    return re.sub(r"\d", "0", text.lower())


def splits(runs):
    lines = datasets._read_checked(FILE, "sms_spam", (SHA256,), URL).decode().splitlines()
    labels, texts = zip(*(line.split("\t", 1) for line in lines), strict=True)
    vectorizer = HashingVectorizer(
        n_features=FEATURES, analyzer="char_wb", ngram_range=(1, 3), binary=True, norm="l2", preprocessor=plain
    )
    x = vectorizer.transform(texts).toarray().astype(np.float32)
    y = np.array([label == "spam" for label in labels], np.int32)
    found = []
    for seed in range(runs):
        distinct, which = np.unique(texts, return_inverse=True)
        test = (np.random.default_rng(seed).permutation(len(distinct)) < HELD_OUT * len(distinct))[which]
        found.append(_finetune.Split(x[~test], y[~test], x[test], y[test]))
    return found


if __name__ == "__main__":
    _finetune.main(__doc__, splits, measure="accuracy", target_epsilon=3.0, target=0.96)
