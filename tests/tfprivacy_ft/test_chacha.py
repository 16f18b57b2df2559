"""The cipher against published and independent vectors."""

import numpy as np
import pytest
import tensorflow as tf

from tfprivacy_ft.chacha import chacha20

ONE = bytes(31) + b"\x01"
# Key, number of the block, its 64 bytes. RFC 8439, A.1, vectors 1, 2 and 3, and two from OpenSSL's chacha20: block 0, and
# block 2^32, at which the counter's upper word begins.
VECTORS = [
    (
        bytes(32),
        0,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        bytes(32),
        1,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        ONE,
        1,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    (
        ONE,
        0,
        "4540f05a9f1fb296d7736e7b208e3c96eb4fe1834688d2604f450952ed432d41"
        "bbe2a0b6ea7566d2a5d1e7e20d42af2c53d792b1c43fea817e9ad275ae546963",
    ),
    (
        ONE,
        2**32,
        "c04792b51be7417e1b74d9bf84a693e695756ebf973f6adbcbadd86661bae366"
        "f0da25089fa453d291798fe0570865307f282a6357a33ba9fb7052c10a0bf52b",
    ),
]


def stream(key, first, blocks, jit=False):
    words = tf.constant(np.frombuffer(key, np.uint32))
    drawn = tf.function(chacha20, jit_compile=jit)(words, tf.constant(first, tf.int64), blocks)
    return drawn.numpy().T.tobytes()


@pytest.mark.parametrize("jit", [False, True])
def test_published_vectors(jit):
    for key, block, expected in VECTORS:
        assert stream(key, block, 1, jit).hex() == expected


@pytest.mark.parametrize("jit", [False, True])
def test_several_blocks_are_those_one_after_the_other(jit):
    first = 2**32 - 2
    together = stream(ONE, first, 4, jit)
    assert together == b"".join(stream(ONE, first + i, 1) for i in range(4))
    assert together[128:192].hex() == VECTORS[-1][2]
