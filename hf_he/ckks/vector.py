"""Eight doubles as a numba value type, and exact modular arithmetic on them.

Residues are integers held in float64, moduli q < 2^50. Kernels are written in vectors, so that LLVM emits AVX-512, pairs of AVX2, or
NEON instructions without help from the auto-vectoriser and with numba's default settings. The modular product is FLINT's fft_small
idea: an error-free product by FMA, minus a rounded quotient.

Ranges, in units of q (A = |a|/q, W = |w|/q), used by every proof in this package:
- `mm(a, w, wi, q)` with wi the correctly rounded w/q: exact if A*W*q < 2^51, result within 1/2 + A*W*q*2^-53. For W <= 1/2 and
  q < 2^50 that is A < 4 and 1/2 + A/16. With wi = w * (1/q) (two roundings more) the result is within 1/2 + A/8.
  Why exact: h = fl(a*w) and l = a*w - h are exact by FMA; k*q is within |r| + |l| of h, so h - k*q is an integer below 2^53.
- `red(x, q, qi)`: exact for |x| < 2^51 * q with |x| < 2^53, result within (q + 1)/2.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

WIDTH = 8


class Vector8(types.Type):
    """The numba type of eight doubles; lives in registers only, never crosses a function boundary."""

    def __init__(self) -> None:
        super().__init__("vector8")


vector8 = Vector8()
_DOUBLE = ir.DoubleType()
_VECTOR = ir.VectorType(_DOUBLE, WIDTH)
_INT32 = ir.IntType(32)
_INTEGERS = {bits: ir.VectorType(ir.IntType(bits), WIDTH) for bits in (8, 16, 32, 64)}
# x + _MAGIC - _MAGIC rounds x to the nearest integer for |x| < 2^51.
_MAGIC = ir.Constant(_VECTOR, [ir.Constant(_DOUBLE, 1.5 * 2.0**52)] * WIDTH)


@register_model(Vector8)
class _Vector8Model(models.PrimitiveModel):
    def __init__(self, manager, fe_type) -> None:
        super().__init__(manager, fe_type, _VECTOR)


def _pointer(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _VECTOR.as_pointer())


def _fma(builder, x, y, z):
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), "llvm.fma.v8f64")
    return builder.call(function, [x, y, z])


def _round_product(builder, x, y):
    return builder.fsub(_fma(builder, x, y, _MAGIC), _MAGIC)


def _mask(indices):
    return ir.Constant(ir.VectorType(_INT32, WIDTH), indices)


@intrinsic
def ld(typingctx, array, index):
    """Eight doubles from a 1-D contiguous float64 array, starting at `index`."""

    def generate(context, builder, signature, args):
        return builder.load(_pointer(context, builder, signature.args[0], args[0], args[1]), align=8)

    return vector8(array, types.intp), generate


@intrinsic
def gather(typingctx, array, indices, position, offset):
    """array[indices[position + i] - offset] for lanes i, indices int32: one full-width store can take the place of eight narrow ones."""

    def generate(context, builder, signature, args):
        array, indices, position, offset = args
        data = context.make_array(signature.args[0])(context, builder, array).data
        chosen = context.make_array(signature.args[1])(context, builder, indices).data
        lanes = ir.Constant(_VECTOR, ir.Undefined)
        for i in range(WIDTH):
            index = builder.load(builder.gep(chosen, [builder.add(position, ir.Constant(position.type, i))]))
            element = builder.gep(data, [builder.sub(builder.sext(index, position.type), offset)])
            lanes = builder.insert_element(lanes, builder.load(element), _INT32(i))
        return lanes

    return vector8(array, indices, types.intp, types.intp), generate


@intrinsic
def st(typingctx, array, index, value):
    """Store eight doubles."""

    def generate(context, builder, signature, args):
        builder.store(args[2], _pointer(context, builder, signature.args[0], args[0], args[1]), align=8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector8), generate


def packed_width(modulus: int) -> int:
    """Bytes that a centred residue takes in `ld_packed`: 4, 6 or 7."""
    return 4 if modulus < 1 << 31 else 6 if modulus < 1 << 47 else 7


def _part(builder, address, offset, bits):
    """Pointer to eight integers of `bits` bits, `offset` bytes after `address`."""
    return builder.inttoptr(builder.add(address, ir.Constant(address.type, offset)), _INTEGERS[bits].as_pointer())


@intrinsic
def ld_packed(typingctx, address, width):
    """Eight integers from the bytes at an address: low 32 bits, then for width > 4 the next 16, for width 7 the last 8, every part signed."""

    def generate(context, builder, signature, args):
        address, width = args

        def part(offset, bits):
            return builder.load(_part(builder, address, offset, bits), align=1)

        def joined(high):
            return _fma(builder, builder.sitofp(high, _VECTOR), ir.Constant(_VECTOR, [ir.Constant(_DOUBLE, 2.0**32)] * WIDTH), low)

        low = builder.sitofp(part(0, 32), _VECTOR)
        start, more, most, end = builder.block, *(builder.append_basic_block(name) for name in ("more", "most", "end"))
        builder.cbranch(builder.icmp_signed("<=", width, ir.Constant(width.type, 4)), end, more)
        builder.position_at_end(more)
        middle = builder.sext(part(32, 16), _INTEGERS[32])
        six = joined(middle)
        builder.cbranch(builder.icmp_signed("<=", width, ir.Constant(width.type, 6)), end, most)
        builder.position_at_end(most)
        top = builder.shl(builder.sext(part(48, 8), _INTEGERS[32]), ir.Constant(_INTEGERS[32], [16] * WIDTH))
        seven = joined(builder.add(top, middle))
        builder.branch(end)
        builder.position_at_end(end)
        value = builder.phi(_VECTOR)
        for incoming, block in ((low, start), (six, more), (seven, most)):
            value.add_incoming(incoming, block)
        return value

    return vector8(types.intp, types.intp), generate


@intrinsic
def st_packed(typingctx, address, width, value):
    """The inverse of `ld_packed` for integers that fit: |x| < 2^31, 2^47 or 2^55."""

    def generate(context, builder, signature, args):
        address, width, value = args
        whole = builder.fptosi(value, _INTEGERS[64])
        for offset, bits, needed in ((0, 32, 0), (32, 16, 6), (48, 8, 7)):
            part = builder.trunc(whole, _INTEGERS[bits])
            with builder.if_then(builder.icmp_signed(">=", width, ir.Constant(width.type, needed))):
                builder.store(part, _part(builder, address, offset, bits), align=1)
            whole = builder.ashr(builder.sub(whole, builder.sext(part, _INTEGERS[64])), ir.Constant(_INTEGERS[64], [bits] * WIDTH))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, vector8), generate


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at an address, which may lie beyond any memory of the process."""

    def generate(context, builder, signature, args):
        byte_pointer = ir.IntType(8).as_pointer()
        signature_type = ir.FunctionType(ir.VoidType(), [byte_pointer, _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(builder.module, signature_type, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(args[0], byte_pointer), _INT32(0), _INT32(3), _INT32(1)])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def sp(typingctx, scalar):
    """A scalar in all eight lanes."""

    def generate(context, builder, signature, args):
        single = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), args[0], ir.Constant(_INT32, 0))
        return builder.shuffle_vector(single, single, _mask([0] * WIDTH))

    return vector8(types.float64), generate


def _binary(emit):
    @intrinsic
    def operation(typingctx, x, y):
        return vector8(vector8, vector8), lambda context, builder, signature, args: emit(builder, *args)

    return operation


def _ternary(emit):
    @intrinsic
    def operation(typingctx, x, y, z):
        return vector8(vector8, vector8, vector8), lambda context, builder, signature, args: emit(builder, *args)

    return operation


add = _binary(lambda builder, x, y: builder.fadd(x, y))
sub = _binary(lambda builder, x, y: builder.fsub(x, y))
mul = _binary(lambda builder, x, y: builder.fmul(x, y))
round_mul = _binary(_round_product)
fma = _ternary(_fma)
red = _ternary(lambda builder, x, q, qi: _fma(builder, builder.fneg(_round_product(builder, x, qi)), q, x))


@intrinsic
def larger(typingctx, x, y):
    """Lane by lane the larger of x and |y|."""

    def generate(context, builder, signature, args):
        size = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR]), "llvm.fabs.v8f64")
        most = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 2), "llvm.maxnum.v8f64")
        return builder.call(most, [args[0], builder.call(size, [args[1]])])

    return vector8(vector8, vector8), generate


@intrinsic
def mm(typingctx, a, w, wi, q):
    """a*w mod q, centred; wi = w/q (see the module's ranges). Six instructions."""

    def generate(context, builder, signature, args):
        a, w, wi, q = args
        high = builder.fmul(a, w)
        low = _fma(builder, a, w, builder.fneg(high))
        return builder.fadd(_fma(builder, builder.fneg(_round_product(builder, a, wi)), q, high), low)

    return vector8(vector8, vector8, vector8, vector8), generate


@intrinsic
def transpose8(typingctx, source, start, stride, target, target_start, target_stride):
    """Transpose the 8x8 tile whose rows begin at source[start + i*stride] into rows target[target_start + i*target_stride]."""

    def generate(context, builder, signature, args):
        source, start, stride, target, target_start, target_stride = args

        def row(base, step, i):
            return builder.add(base, builder.mul(step, ir.Constant(base.type, i)))

        rows = [builder.load(_pointer(context, builder, signature.args[0], source, row(start, stride, i)), align=8) for i in range(WIDTH)]
        for distance, low in ((1, [0, 8, 2, 10, 4, 12, 6, 14]), (2, [0, 1, 8, 9, 4, 5, 12, 13]), (4, [0, 1, 2, 3, 8, 9, 10, 11])):
            new = list(rows)
            for i in range(WIDTH):
                if not i & distance:
                    new[i] = builder.shuffle_vector(rows[i], rows[i + distance], _mask(low))
                    new[i + distance] = builder.shuffle_vector(rows[i], rows[i + distance], _mask([lane + distance for lane in low]))
            rows = new
        for i in range(WIDTH):
            builder.store(rows[i], _pointer(context, builder, signature.args[3], target, row(target_start, target_stride, i)), align=8)
        return context.get_dummy_value()

    index = types.intp
    return types.void(source, index, index, target, index, index), generate
