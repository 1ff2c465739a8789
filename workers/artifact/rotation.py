"""The rotation of groups of 32 before they are quantised: a Walsh-Hadamard transform.

A group's scale is set by its largest value, so that one outlier costs the other 31 their precision.
Rotated, every value carries a share of all 32 and none stands out; products stay the same, since
w . x = (H w / 4) . (H x / 8) for the matrix H of plus and minus ones with H H = 32.

Source: Ashkboos et al. 2024, "QuaRot", which rotates whole rows; within a group it needs no change
to the rest of the model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Powers of two, so that they cost no rounding; together they are 1 / 32.
WEIGHTS_FACTOR = np.float32(1 / 4)
INPUTS_FACTOR = np.float32(1 / 8)  # also turns stored weights back: w = (1 / 8) H (H w / 4)


def hadamard(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """H times each group of 32 along the last axis, whose size is a multiple of 32; a new array.

    The sums are made in one order, at distances 1, 2, 4, 8 and 16, so that every implementation
    that keeps to it gives the same bits.
    """
    rotated = np.array(values, np.float32, order="C")
    for distance in (1, 2, 4, 8, 16):
        pairs = rotated.reshape(-1, 2, distance)
        sums, differences = pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]
        pairs[:, 0], pairs[:, 1] = sums, differences
    return rotated
