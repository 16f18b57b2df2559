"""Tables as files, for several tests."""

import numpy as np
import pytest


def write_table(folder, table, ending="npz"):
    path = folder / f"table.{ending}"
    if ending == "npz":
        np.savez(path, **table)
        return path
    pandas = pytest.importorskip("pandas", reason="needs the extra 'tables'")
    frame = pandas.DataFrame(table)
    if ending == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",")
    return path
