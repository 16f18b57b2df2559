"""Adult: a private linear head at epsilon 1; target accuracy 0.845, on the published test set.

Categories are those that the data's own description lists, numbers are told by which of fixed bounds they reach, chosen by
what ages, years of school, hours and dollars are in general. The final weight of the census is left out. The data are read
from the folder in the environment variable TFPRIVACY_FT_DATA, or from ../shared/data.
"""

import csv
import gzip
import io
import re

import _finetune
import numpy as np

from tfprivacy_ft import datasets

NAMES, NAMES_SHA256 = "adult.names", "c248284c0b5de30c9e1958d6cdd168a34a654758b620e68f46aefa83fc0a576a"
FILES = {
    "adult_train.csv.gz": "33518054b3b257d17cc033d35a81a9650ae2e402a7c1a3150f0e788b555488f1",
    "adult_test.csv.gz": "fb275b5ea0af63bb7744ff1ae9ee95e747b6deabcf73ebf0f404195a2fabf25b",
}
URL = "https://archive.ics.uci.edu/dataset/2/adult"
BOUNDS = {
    "age": (20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 80),
    "education_num": tuple(range(2, 17)),
    "hours_per_week": (10, 20, 30, 35, 40, 41, 45, 50, 55, 60, 70, 80),
    "capital_gain": (1, *range(1000, 9000, 1000), 10_000, 15_000, 20_000, 50_000, 99_999),
    "capital_loss": (1, 500, 1000, 1250, *range(1500, 2001, 100), 2250, 2500, 3000, 4000),
}


def public_categories():
    """Column -> its categories, from the description."""
    text = datasets._read_checked(NAMES, "adult", (NAMES_SHA256,), URL).decode()
    listed = {
        column.replace("-", "_"): [value.strip() for value in values.split(",")]
        for column, values in re.findall(r"^([a-z-]+): (.*)\.\s*$", text, re.MULTILINE)
    }
    return {column: values for column, values in listed.items() if values != ["continuous"]}


def read(file, categories):
    """Features [n, columns], and whether each earns more than 50,000."""
    content = gzip.decompress(datasets._read_checked(file, "adult", (FILES[file],), URL)).decode()
    records = list(csv.DictReader(io.StringIO(content)))
    columns = []
    for column, values in categories.items():
        found = np.array([record[column].strip() for record in records])
        ones = found[:, None] == np.array(values)
        columns += [ones, ~ones.any(axis=1, keepdims=True)]  # the last is for what is missing
    for column, bounds in BOUNDS.items():
        numbers = np.array([float(record[column]) for record in records])
        columns.append(0.5 * (numbers[:, None] >= np.array(bounds)))
    y = np.array([record["income"].strip().startswith(">") for record in records], np.int32)
    return np.concatenate(columns, axis=1).astype(np.float32), y


def splits(runs):
    categories = public_categories()
    (x, y), (x_test, y_test) = (read(file, categories) for file in FILES)
    return [_finetune.Split(x, y, x_test, y_test)] * runs


if __name__ == "__main__":
    _finetune.main(__doc__, splits, measure="accuracy", target_epsilon=1.0, target=0.845)
