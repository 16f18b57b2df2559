"""The stream cipher ChaCha20 as TensorFlow ops: random words that nobody can predict without the key.

Integer arithmetic only, so the words are the same wherever it runs, compiled by XLA or not. Knows no noise.
"""

import tensorflow as tf

__all__ = ["WORDS_PER_BLOCK", "chacha20"]

WORDS_PER_BLOCK = 16

_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"


def chacha20(key: tf.Tensor, first_block: tf.Tensor, blocks: int) -> tf.Tensor:
    """Blocks of the key stream, with a counter of 64 bits and a nonce of zeros: a key is for one stream.

    Args:
      key: uint32 [8].
      first_block: int64 scalar >= 0, the number of the first block; no block may be used twice.
      blocks: >= 1, how many.

    Returns:
      uint32 [16, blocks], each column one block.

    Example:
      >>> import tensorflow as tf
      >>> hex(chacha20(tf.zeros([8], tf.uint32), tf.constant(0, tf.int64), 1)[0, 0].numpy())
      '0xade0b876'

    Source: Bernstein 2008, "ChaCha, a variant of Salsa20"; RFC 8439 for the order of the words.
    """
    numbers = first_block + tf.range(blocks, dtype=tf.int64)
    low, high = tf.cast(numbers & 0xFFFFFFFF, tf.uint32), tf.cast(tf.bitwise.right_shift(numbers, 32), tf.uint32)
    zeros = tf.zeros_like(low)
    start = [
        _in_each_block(tf.constant(_CONSTANTS, tf.uint32), blocks),
        _in_each_block(key[:4], blocks),
        _in_each_block(key[4:], blocks),
        tf.stack([low, high, zeros, zeros]),
    ]
    # A loop, since XLA's fusions of twenty rounds written out are 25 times slower.
    _, *rows = tf.while_loop(
        lambda done, *rows: done < 10, lambda done, *rows: (done + 1, *_double_round(*rows)), [tf.constant(0), *start]
    )
    return tf.concat([row + before for row, before in zip(rows, start, strict=True)], 0)


def _in_each_block(words: tf.Tensor, blocks: int) -> tf.Tensor:
    return tf.broadcast_to(words[:, None], [4, blocks])


def _double_round(a: tf.Tensor, b: tf.Tensor, c: tf.Tensor, d: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """The rows of the states of all blocks, each [4, blocks]: a round on columns, and one on diagonals."""
    a, b, c, d = _quarter_rounds(a, b, c, d)
    a, b, c, d = _quarter_rounds(a, tf.roll(b, -1, 0), tf.roll(c, -2, 0), tf.roll(d, -3, 0))
    return a, tf.roll(b, 1, 0), tf.roll(c, 2, 0), tf.roll(d, 3, 0)


def _quarter_rounds(a: tf.Tensor, b: tf.Tensor, c: tf.Tensor, d: tf.Tensor) -> tuple[tf.Tensor, ...]:
    for left, right in ((16, 12), (8, 7)):
        a = a + b
        d = _rotated(tf.bitwise.bitwise_xor(d, a), left)
        c = c + d
        b = _rotated(tf.bitwise.bitwise_xor(b, c), right)
    return a, b, c, d


def _rotated(words: tf.Tensor, bits: int) -> tf.Tensor:
    return tf.bitwise.left_shift(words, bits) | tf.bitwise.right_shift(words, 32 - bits)
