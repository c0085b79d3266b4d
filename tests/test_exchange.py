"""Gradients that replicas exchange as integers: `exchange`, against `reference.exchange`."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from keras_dfp import exchange, reference
from keras_dfp.optimizers import DFPSGD


@pytest.mark.parametrize("replicas", [2, 3, 4, 5, 16, 17, 256])
def test_halves_add_up(replicas):
    largest = 2 ** (exchange.mantissa_bits(replicas) - 1) - 1
    random = np.random.default_rng(replicas)
    shares = random.integers(-largest, largest + 1, (replicas, 1001)).astype(np.int16)
    # All at their largest, in the four combinations of signs, and what borrows from the other half.
    for column, pair in enumerate(itertools.product((largest, -largest, -1, 0), repeat=2)):
        shares[:, [column, 501 + column]] = pair
    expected = shares.astype(np.int64).sum(0)
    assert np.abs(expected).max() < 2**15
    for order in (range(replicas), reversed(range(replicas)), random.permutation(replicas)):
        total = np.zeros(501, np.int32)
        for number in order:
            total += exchange.pack(tf.constant(shares[number])).numpy()
        np.testing.assert_array_equal(exchange.unpack(tf.constant(total))[:1001], expected)


def test_bits_of_mantissas():
    bits = {1: 14, 2: 14, 3: 14, 4: 14, 5: 13, 8: 13, 9: 12, 16: 12, 17: 11, 128: 9, 256: 8}
    assert {n: exchange.mantissa_bits(n) for n in bits} == bits
    with pytest.raises(ValueError, match="up to 256 replicas; got 257"):
        exchange.mantissa_bits(257)


def test_the_sum_of_the_reference():
    shares = np.float32([[1.0, -0.5, 3e-5, 0.0], [3.0, 0.25, -3e-4, 1e-30]])
    # The largest is 3: units of 2**(1 - 12).
    unit = 2.0**-11
    expected = unit * (np.round(shares[0] / unit) + np.round(shares[1] / unit))
    np.testing.assert_array_equal(reference.exchange(list(shares)), expected)
    for wrong in (np.nan, np.inf):
        spoiled = shares.copy()
        spoiled[1, 2] = wrong
        assert np.isnan(reference.exchange(list(spoiled))).all()
    np.testing.assert_array_equal(reference.exchange(list(np.zeros((3, 2), "f"))), np.zeros(2))


def test_one_replica_exchanges_nothing():
    gradients = [tf.constant([1.0, 1e-9]), None]
    assert exchange.summed(gradients, "dfp16")[0] is gradients[0]


def test_the_option_of_an_optimizer():
    optimizer = DFPSGD(0.1, gradient_exchange="dfp16")
    assert DFPSGD.from_config(optimizer.get_config()).gradient_exchange == "dfp16"
    with pytest.raises(ValueError, match="must be 'float32' or 'dfp16'; got 'int8'"):
        DFPSGD(gradient_exchange="int8")
