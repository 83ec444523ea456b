"""What the flat index promises beyond the contract."""

import numpy as np

from iccache.examples.index.flat import SMALLEST, FlatIndex


def test_memory_follows_the_number_of_vectors() -> None:
    index = FlatIndex(4)
    index.add_many([str(i) for i in range(10_000)], np.ones((10_000, 4), np.float32))
    assert index._vectors.shape[0] < 25_000
    for i in range(9_990):
        index.remove(str(i))
    assert index._vectors.shape[0] <= 4 * SMALLEST


def test_a_removed_vector_is_not_kept_in_memory() -> None:
    index = FlatIndex(4)
    index.add_many(["a", "b", "c"], np.eye(4, dtype=np.float32)[:3])
    index.remove("a")
    assert not (index._vectors[:, 0] == 1.0).any()
    assert index._vectors.sum() == 2.0
