"""Kernels of the simulator: normal noise added in the pass that copies, rotates or sums slots, and sums of slotwise products. All of them find the
largest magnitude of their result on the way.

Uniforms are hashes of a counter under keys drawn per block (SplitMix64); normals come from them by Box and Muller in single precision.
Nothing here is cryptographic: the simulator protects nothing.
"""

from __future__ import annotations

from math import factorial

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hf_he.ckks.jit import kernel

BLOCK = 8192
_I32, _U32, _F32 = np.int32, np.uint32, np.float32
_MAGNITUDE = 0x7FFF_FFFF_FFFF_FFFF
_LN2 = _F32(np.log(2.0))
_LN = tuple(_F32(c) for c in np.polynomial.Chebyshev.interpolate(np.log1p, 8, [0, 1]).convert(kind=np.polynomial.Polynomial).coef)
"""ln(1 + x) on [0, 1], within 4e-8 before rounding."""
_SIN = tuple(_F32((-1) ** k / factorial(2 * k + 1)) for k in range(5))
_COS = tuple(_F32((-1) ** k / factorial(2 * k)) for k in range(5))
_ANGLE = _F32(np.pi / 2**33)


class NoiseSource:
    """Kernels around one generator state. `values` are [*batch, n] float64; each method returns the new array and its largest magnitude."""

    def __init__(self, seed: int) -> None:
        self._state = np.array([seed % 2**64], dtype=np.uint64)

    def added(self, values: np.ndarray, deviation: float) -> tuple[np.ndarray, float]:
        """`values` with noise of standard deviation `deviation`."""
        out = np.empty(values.shape)
        largest = _added(_flat(values), deviation, self._state, out.reshape(-1))
        return out, _magnitude(largest)

    def rotated(self, values: np.ndarray, steps: tuple[int, ...], deviation: float) -> tuple[np.ndarray, float]:
        """[len(steps), *batch, n]: `values` rotated left by each step, with noise where it is not 0."""
        out = np.empty((len(steps), *values.shape))
        n = values.shape[-1]
        largest = _rotated(_flat(values).reshape(-1, n), np.array(steps), deviation, self._state, out.reshape(len(steps), -1, n))
        return out, _magnitude(largest)

    def sum_rotated(self, values: np.ndarray, steps: tuple[int, ...], deviation: float) -> tuple[np.ndarray, float]:
        """[g, *batch, n] to [*batch, n]: the sum of values[g] rotated left by steps[g], with the noise of each rotation."""
        out = np.empty(values.shape[1:])
        n = values.shape[-1]
        largest = _sum_rotated(_flat(values).reshape(len(steps), -1, n), np.array(steps), deviation, self._state, out.reshape(-1, n))
        return out, _magnitude(largest)


def largest_magnitude(values: np.ndarray) -> float:
    """max |value|, infinite or NaN where a value is."""
    return _magnitude(_largest(_flat(values)))


def product_sums(plain: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, float]:
    """sum_k plain[g, k] * values[k], plain [g, k, period] continued over the slots of values [k, *batch, n]: [g, *batch, n], and its largest magnitude."""
    count, period = plain.shape[1:]
    out = np.empty((len(plain), *values.shape[1:]))
    largest = _product_sums(np.ascontiguousarray(plain), _flat(values).reshape(count, -1, period), out.reshape(len(plain), -1, period))
    return out, _magnitude(largest)


def _flat(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1)


def _magnitude(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))


@intrinsic
def _as_int(typing_context, x):
    """The bits of a float32."""
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _as_float(typing_context, x):
    """The float32 of these bits."""
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.FloatType())


@kernel
def _mixed(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@kernel
def _hash(counter, key):
    """Wellons' lowbias32 of counter + key."""
    x = _U32(counter + key)
    x = _U32((x ^ _U32(x >> _U32(16))) * _U32(0x7FEB352D))
    x = _U32((x ^ _U32(x >> _U32(15))) * _U32(0x846CA68B))
    return _U32(x ^ _U32(x >> _U32(16)))


@kernel
def _normals(state, z):
    """Fill z, an even number of float32, with independent standard normals."""
    half = z.size // 2
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    keys = _mixed(state[0])
    first, second = _U32(keys), _U32(keys >> np.uint64(32))
    cosines, sines = z[:half], z[half:]
    for i in range(half):
        uniform = (_F32(_I32(_hash(_U32(i), first) >> _U32(8))) + _F32(0.5)) * _F32(2.0**-24)
        bits = _as_int(uniform)
        x = _as_float(_I32(_I32(bits & _I32(0x7FFFFF)) | _I32(0x3F800000))) - _F32(1)
        ln = _LN[8]
        for c in (_LN[7], _LN[6], _LN[5], _LN[4], _LN[3], _LN[2], _LN[1], _LN[0]):
            ln = ln * x + c
        ln += _F32(_I32(bits >> _I32(23)) - _I32(127)) * _LN2
        radius = np.sqrt(max(_F32(-2) * ln, _F32(0)))
        drawn = _I32(_hash(_U32(i), second))
        t = _F32(drawn) * _ANGLE
        u = t * t
        s = t * (_SIN[0] + u * (_SIN[1] + u * (_SIN[2] + u * (_SIN[3] + u * _SIN[4]))))
        c = _COS[0] + u * (_COS[1] + u * (_COS[2] + u * (_COS[3] + u * _COS[4])))
        radius = radius if drawn & _I32(1) else -radius
        swap = drawn & _I32(2)
        cosines[i] = radius * (s if swap else c)
        sines[i] = radius * (c if swap else s)


@kernel
def _copied(values, z, deviation, out):
    """out = values + deviation * z; the largest magnitude as the bits of a double."""
    magnitudes = out.view(np.int64)
    largest = np.int64(0)
    for i in range(out.size):
        out[i] = values[i] + deviation * z[i]
    for i in range(out.size):
        largest = max(largest, magnitudes[i] & _MAGNITUDE)
    return largest


@kernel
def _largest(values):
    magnitudes = values.view(np.int64)
    largest = np.int64(0)
    for i in range(values.size):
        largest = max(largest, magnitudes[i] & _MAGNITUDE)
    return largest


@kernel
def _added(values, deviation, state, out):
    largest = np.int64(0)
    z = np.empty(min(BLOCK, values.size + values.size % 2), dtype=np.float32)
    for start in range(0, values.size, BLOCK):
        _normals(state, z)
        end = min(start + BLOCK, values.size)
        largest = max(largest, _copied(values[start:end], z, deviation, out[start:end]))
    return largest


@kernel
def _rotated(values, steps, deviation, state, out):
    largest = np.int64(0)
    rows, n = values.shape
    z = np.empty(n, dtype=np.float32)
    for g in range(steps.size):
        step = steps[g]
        noise = deviation if step else 0.0
        for row in range(rows):
            if step:
                _normals(state, z)
            elif row == 0:
                z[:] = 0
            largest = max(largest, _copied(values[row, step:], z, noise, out[g, row, : n - step]))
            if step:
                largest = max(largest, _copied(values[row, :step], z[n - step :], noise, out[g, row, n - step :]))
    return largest


@kernel
def _sum_rotated(values, steps, deviation, state, out):
    largest = np.int64(0)
    groups, rows, n = values.shape
    z = np.empty(n, dtype=np.float32)
    deviation *= np.sqrt(np.count_nonzero(steps))
    for row in range(rows):
        _normals(state, z)
        total = out[row]
        for i in range(n):
            total[i] = deviation * z[i]
        for g in range(groups):
            step, source = steps[g], values[g, row]
            for i in range(n - step):
                total[i] += source[i + step]
            for i in range(n - step, n):
                total[i] += source[i + step - n]
        largest = max(largest, _largest(total))
    return largest


@kernel
def _product_sums(plain, values, out):
    """out[g, r] = sum_k plain[g, k] * values[k, r], four products a pass."""
    largest = np.int64(0)
    groups, count, period = plain.shape
    for r in range(values.shape[1]):
        for g in range(groups):
            total = out[g, r]
            total[:] = 0
            for k in range(0, count - 3, 4):
                w0, w1, w2, w3 = plain[g, k], plain[g, k + 1], plain[g, k + 2], plain[g, k + 3]
                x0, x1, x2, x3 = values[k, r], values[k + 1, r], values[k + 2, r], values[k + 3, r]
                for p in range(period):
                    total[p] += (w0[p] * x0[p] + w1[p] * x1[p]) + (w2[p] * x2[p] + w3[p] * x3[p])
            for k in range(count // 4 * 4, count):
                w0, x0 = plain[g, k], values[k, r]
                for p in range(period):
                    total[p] += w0[p] * x0[p]
            largest = max(largest, _largest(total))
    return largest
