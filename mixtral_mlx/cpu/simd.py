"""Vectors for numba: what the loop vectorizer cannot be trusted to find is written out with these.

A vector has LANES elements, as many as a register of this processor holds. `f32` is the type of LANES floats, `i32` of
LANES integers. Everything here is an intrinsic: it becomes a few instructions where it is called. Arrays are flat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba.core.config
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from .jit import compiled, inlined


def _lanes() -> int:
    features = numba.core.config.CPU_FEATURES
    known = set(str(features).split(",")) if features is not None else _host_features()
    if "+avx512f" in known:
        return 16
    return 8 if "+avx" in known else 4


def _host_features() -> set[str]:
    return {f"+{name}" for name, present in binding.get_host_cpu_features().items() if present}


LANES = _lanes()

FLOAT, BYTE = ir.FloatType(), ir.IntType(8)
FLOATS, BYTES = ir.VectorType(FLOAT, LANES), ir.VectorType(BYTE, LANES)
_HALF, _SHORT, _INT, _LONG = ir.HalfType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_INTS = ir.VectorType(_INT, LANES)


class _Vector(types.Type):
    """Numba's name for a vector; `element` is what it is made of."""

    def __init__(self, name: str, element: ir.Type) -> None:
        super().__init__(f"{name}x{LANES}")
        self.element = element


f32 = _Vector("f32", FLOAT)
i32 = _Vector("i32", _INT)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(kind.element, LANES))


_Emit = Callable[[Any, Any, Any, Any], Any]
"""(context, builder, signature, arguments) → the value."""


# What an intrinsic is made of.


def address(context: Any, builder: Any, kind: Any, array: Any, index: Any, wanted: ir.Type) -> Any:
    """The address of `array[index]`, an array of the type `kind`, to be read or written as a `wanted`."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), wanted.as_pointer())


def prefetch_at(builder: Any, pointer: Any) -> None:
    """Begin to bring what is there into the cache; it may be nobody's memory."""
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _INT, _INT, _INT])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(fetch, [pointer, _INT(0), _INT(3), _INT(1)])  # to be read, soon, as data


def halves(builder: Any, pointer: Any) -> tuple[Any, Any]:
    """LANES bytes → their lower four bits as floats, and their upper ones."""
    some = builder.zext(builder.load(pointer, align=1), _INTS)
    low, high = builder.and_(some, _shift(15)), builder.lshr(some, _shift(4))
    return builder.sitofp(low, FLOATS), builder.sitofp(high, FLOATS)


def add_product(builder: Any, a: Any, b: Any, onto: Any) -> None:
    """Add a · b, lane by lane, to what is stored `onto`."""
    builder.store(_call(builder, f"llvm.fma.v{LANES}f32", [a, b, builder.load(onto)], FLOATS), onto)


def broadcast_to(builder: Any, value: Any, vector: ir.VectorType) -> Any:
    """`value` in every lane of a vector of that type."""
    nothing = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, value, _INT(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_INTS, [0] * LANES))


def _address(context: Any, builder: Any, signature: Any, wanted: ir.Type, array: Any, index: Any) -> Any:
    """`address` in the array that is the first argument."""
    return address(context, builder, signature.args[0], array, index, wanted)


def _call(builder: Any, name: str, arguments: Sequence[Any], result: ir.Type) -> Any:
    """Call an intrinsic of LLVM on vectors of floats."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


@intrinsic
def load(typing: Any, array: Any, index: Any) -> tuple[Any, _Emit]:
    """LANES floats from `array[index]` on."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_address(context, builder, signature, FLOATS, *arguments), align=4)

    return f32(array, types.intp), emit


@intrinsic
def store(typing: Any, array: Any, index: Any, vector: Any) -> tuple[Any, _Emit]:
    """Put a vector of floats at `array[index]`."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index, vector = arguments
        builder.store(vector, _address(context, builder, signature, FLOATS, array, index), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), emit


@intrinsic
def load_bytes(typing: Any, array: Any, index: Any) -> tuple[Any, _Emit]:
    """LANES bytes from `array[index]` on, as integers."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = _address(context, builder, signature, BYTES, *arguments)
        return builder.zext(builder.load(source, align=1), _INTS)

    return i32(array, types.intp), emit


@intrinsic
def prefetch(typing: Any, array: Any, index: Any) -> tuple[Any, _Emit]:
    """Begin to bring byte `index` of an array of bytes into the cache; it may lie beyond the end."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        prefetch_at(builder, _address(context, builder, signature, BYTE, *arguments))
        return context.get_dummy_value()

    return types.void(array, types.intp), emit


@intrinsic
def field(typing: Any, vector: Any, shift: Any, mask: Any) -> tuple[Any, _Emit]:
    """(vector >> shift) & mask as floats."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector, shift, mask = arguments
        shifted = builder.lshr(vector, broadcast_to(builder, shift, _INTS))
        return builder.sitofp(builder.and_(shifted, broadcast_to(builder, mask, _INTS)), FLOATS)

    return f32(vector, types.int32, types.int32), emit


@intrinsic
def load_word(typing: Any, array: Any, index: Any) -> tuple[Any, _Emit]:
    """Eight bytes from `array[index]` on, as one number, the first being its lowest."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_address(context, builder, signature, _LONG, *arguments), align=1)

    return types.uint64(array, types.intp), emit


@intrinsic
def eight_fields(typing: Any, low: Any, high: Any, bits: Any) -> tuple[Any, _Emit]:
    """LANES fields of so many bits as floats: eight from `low`, and as many from `high` where a vector holds 16."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low, high, bits = arguments
        longs = ir.VectorType(_LONG, LANES)
        words = broadcast_to(builder, low, longs)
        if LANES == 16:
            halves = ir.Constant(_INTS, [*range(8), *range(16, 24)])
            words = builder.shuffle_vector(words, broadcast_to(builder, high, longs), halves)
        places = ir.Constant(longs, [lane % 8 for lane in range(LANES)])
        shifts = builder.mul(places, broadcast_to(builder, bits, longs))
        mask = builder.sub(builder.shl(_LONG(1), bits), _LONG(1))
        fields = builder.and_(builder.lshr(words, shifts), broadcast_to(builder, mask, longs))
        return builder.sitofp(builder.trunc(fields, _INTS), FLOATS)

    return f32(types.uint64, types.uint64, types.int64), emit


@intrinsic
def broadcast(typing: Any, value: Any) -> tuple[Any, _Emit]:
    """A float in every lane."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return broadcast_to(builder, arguments[0], FLOATS)

    return f32(types.float32), emit


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> tuple[Any, _Emit]:
    """a · b + c, lane by lane."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, f"llvm.fma.v{LANES}f32", arguments, FLOATS)

    return f32(a, b, c), emit


@intrinsic
def multiply(typing: Any, a: Any, b: Any) -> tuple[Any, _Emit]:
    """a · b, lane by lane."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fmul(*arguments)

    return f32(a, b), emit


@intrinsic
def divide(typing: Any, a: Any, b: Any) -> tuple[Any, _Emit]:
    """a / b, lane by lane."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fdiv(*arguments)

    return f32(a, b), emit


@intrinsic
def add(typing: Any, a: Any, b: Any) -> tuple[Any, _Emit]:
    """a + b, lane by lane."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments)

    return f32(a, b), emit


@intrinsic
def greater(typing: Any, a: Any, b: Any) -> tuple[Any, _Emit]:
    """The greater of a and b, lane by lane."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, f"llvm.maxnum.v{LANES}f32", arguments, FLOATS)

    return f32(a, b), emit


@intrinsic
def greatest(typing: Any, vector: Any) -> tuple[Any, _Emit]:
    """The greatest of the lanes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", arguments, FLOAT)

    return types.float32(vector), emit


@intrinsic
def total(typing: Any, vector: Any) -> tuple[Any, _Emit]:
    """The sum over the lanes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(FLOAT, [FLOAT, FLOATS])
        add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return builder.call(add, [FLOAT(0.0), arguments[0]], fastmath=("reassoc",))

    return types.float32(vector), emit


# exp(x) = 2^n · e^r with n = round(x · log2 e) and |r| ≤ ln 2 / 2, e^r by its series.
_LOG2E = 1.4426950408889634


def _constant(value: float) -> Any:
    return ir.Constant(FLOATS, [value] * LANES)


@intrinsic
def exp(typing: Any, vector: Any) -> tuple[Any, _Emit]:
    """e to the power of each lane; 0 below -87, e^88 above 88."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        below = builder.fcmp_ordered("<", arguments[0], _constant(-87.0))
        x = _call(builder, f"llvm.maxnum.v{LANES}f32", [arguments[0], _constant(-87.0)], FLOATS)
        x = _call(builder, f"llvm.minnum.v{LANES}f32", [x, _constant(88.0)], FLOATS)
        n = _call(builder, f"llvm.rint.v{LANES}f32", [builder.fmul(x, _constant(_LOG2E))], FLOATS)
        # x - n · ln 2 in two steps, since ln 2 has more digits than a float.
        x = _call(builder, f"llvm.fma.v{LANES}f32", [n, _constant(-0.693359375), x], FLOATS)
        x = _call(builder, f"llvm.fma.v{LANES}f32", [n, _constant(2.12194440e-4), x], FLOATS)
        power = _exp_near_zero(builder, x)
        exponent = builder.shl(builder.add(builder.fptosi(n, _INTS), ir.Constant(_INTS, [127] * LANES)), _shift(23))
        return builder.select(below, _constant(0.0), builder.fmul(power, builder.bitcast(exponent, FLOATS)))

    return f32(vector), emit


def _exp_near_zero(builder: Any, x: Any) -> Any:
    """e^x for |x| ≤ ln 2 / 2: Taylor's series up to x^7."""
    result = _constant(1 / 5040)
    for divisor in (720, 120, 24, 6, 2, 1, 1):
        result = _call(builder, f"llvm.fma.v{LANES}f32", [result, x, _constant(1 / divisor)], FLOATS)
    return result


def _shift(bits: int) -> Any:
    return _INTS([bits] * LANES)


_Convert = Callable[[Any, Any, ir.Type, ir.Type], Any]
"""(builder, what is stored, float type, integer type) → floats; the types are vectors where what is stored is one."""


def _reader(convert: _Convert, stored: ir.Type, nbytes: int, lanes: int) -> Any:
    """An intrinsic (array of bytes, index) that reads the `index`-th of the `stored`s in it, or `lanes` from there."""
    floats, integers = (FLOATS, _INTS) if lanes > 1 else (FLOAT, _INT)
    wanted = ir.VectorType(stored, lanes) if lanes > 1 else stored

    def read(typing: Any, array: Any, index: Any) -> tuple[Any, _Emit]:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array, index = arguments
            at = builder.mul(index, ir.Constant(index.type, nbytes))
            source = _address(context, builder, signature, wanted, array, at)
            return convert(builder, builder.load(source, align=1), floats, integers)

        return (f32 if lanes > 1 else types.float32)(array, types.intp), emit

    return intrinsic(read)


def _from_float32(builder: Any, value: Any, floats: ir.Type, integers: ir.Type) -> Any:
    return value


def _from_bfloat16(builder: Any, value: Any, floats: ir.Type, integers: ir.Type) -> Any:
    shift = _shift(16) if integers is _INTS else _INT(16)
    return builder.bitcast(builder.shl(builder.zext(value, integers), shift), floats)


def _from_e8m0(builder: Any, value: Any, floats: ir.Type, integers: ir.Type) -> Any:
    # An exponent alone: where a float has its own.
    shift = _shift(23) if integers is _INTS else _INT(23)
    return builder.bitcast(builder.shl(builder.zext(value, integers), shift), floats)


def _from_float16(builder: Any, value: Any, floats: ir.Type, integers: ir.Type) -> Any:
    return builder.fpext(value, floats)


read_float32 = _reader(_from_float32, FLOAT, 4, 1)
read_bfloat16 = _reader(_from_bfloat16, _SHORT, 2, 1)
read_float16 = _reader(_from_float16, _HALF, 2, 1)
load_float32 = _reader(_from_float32, FLOAT, 4, LANES)
load_bfloat16 = _reader(_from_bfloat16, _SHORT, 2, LANES)
load_float16 = _reader(_from_float16, _HALF, 2, LANES)
read_e8m0 = _reader(_from_e8m0, BYTE, 1, 1)
load_e8m0 = _reader(_from_e8m0, BYTE, 1, LANES)


@inlined
def vector_dot(a: Any, a_at: int, b: Any, b_at: int, count: int) -> Any:
    """a · b over `count` elements, a multiple of LANES, still in lanes."""
    result = broadcast(np.float32(0))
    for n in range(0, count, LANES):
        result = fma(load(a, a_at + n), load(b, b_at + n), result)
    return result


@compiled
def add_scaled(out: Any, at: int, values: Any, values_at: int, width: int, scale: float) -> None:
    """out += scale · values over `width` elements, a multiple of LANES."""
    factor = broadcast(scale)
    for n in range(0, width, LANES):
        store(out, at + n, fma(load(values, values_at + n), factor, load(out, at + n)))
