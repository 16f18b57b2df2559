"""Heart disease, the records of four hospitals in one place: a private linear head at epsilon 3; target AUC 0.89.

Features are those of `federated_records.py`: clinical ranges and public categories, and which hospital the record is from.
Each run holds out another quarter of each hospital's records of each label. The data are read from the folder in the
environment variable TFPRIVACY_FT_DATA, or from ../shared/data.
"""

import _finetune
import federated_records
import numpy as np


def splits(runs):
    x, y, hospitals = federated_records.load()
    x = np.concatenate([x, hospitals[:, None] == np.unique(hospitals)], axis=1).astype(np.float32)
    held_out = [federated_records.held_out(y, hospitals, seed) for seed in range(runs)]
    return [_finetune.Split(x[~test], y[~test], x[test], y[test]) for test in held_out]


if __name__ == "__main__":
    _finetune.main(__doc__, splits, measure="AUC", target_epsilon=3.0, target=0.89)
