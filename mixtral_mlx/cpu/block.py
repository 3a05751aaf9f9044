"""The innermost loop over 4-bit weights, for several rows of them and of x at once.

Numba keeps no list of vectors in registers, so the program writes out each size itself: every code is taken from its
byte once, every vector of x is loaded once, and all sums stay where they are added up. What lies where is `products`'
business."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import BYTE, BYTES, FLOAT, FLOATS, LANES, add_product, address, broadcast_to, halves, prefetch_at

_INDEX = ir.IntType(64)


def scaled_block(rows: int, columns: int, stride: int, ahead: int) -> Any:
    """An intrinsic that adds scale · code · x to rows × columns sums, lane by lane and in the order of a single row's.

    Rows of weights are `w_step` bytes apart, their scales `scales_step`; vectors of x lie side by side, `columns` of
    every `stride`, and so do a row's sums in `work`. The rows that come `ahead` rows later are brought nearer."""

    @intrinsic
    def block(
        typing: Any, work: Any, sums_at: Any, packed: Any, w_at: Any, w_step: Any, x: Any, x_at: Any,
        scales_at: Any, scales_step: Any, groups: Any, group: Any,
    ) -> Any:  # fmt: skip
        number = types.intp
        return types.void(work, number, packed, number, number, x, number, number, number, number, number), emit

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        work, sums_at, packed, w_at, w_step, x, x_at, scales_at, scales_step, groups, group = arguments
        of_work, of_packed, of_x = signature.args[0], signature.args[2], signature.args[5]
        places = [(r, c) for r in range(rows) for c in range(columns)]

        def moved(index: Any, by: Any, times: int = 1) -> Any:
            by = by if isinstance(by, ir.Value) else _INDEX(by)
            return builder.add(index, builder.mul(by, _INDEX(times)))

        def sum_of(r: int, c: int) -> Any:
            return address(context, builder, of_work, work, moved(sums_at, (r * stride + c) * LANES), FLOATS)

        def weights(r: int, kind: ir.Type) -> Any:
            return address(context, builder, of_packed, packed, moved(builder.load(byte), w_step, r), kind)

        # What is stored here stays in registers: these are variables, not memory.
        sums = {at: cgutils.alloca_once_value(builder, builder.load(sum_of(*at), align=4)) for at in places}
        parts = {at: cgutils.alloca_once(builder, FLOATS) for at in places}
        byte, vector = cgutils.alloca_once_value(builder, w_at), cgutils.alloca_once_value(builder, x_at)
        with cgutils.for_range(builder, groups) as loop:
            for part in parts.values():
                builder.store(FLOATS([0.0] * LANES), part)
            for r in range(rows):
                prefetch_at(builder, weights(r + ahead, BYTE))
            with cgutils.for_range(builder, builder.sdiv(group, _INDEX(2 * LANES))):
                codes = [halves(builder, weights(r, BYTES)) for r in range(rows)]
                for half in range(2):
                    for c in range(columns):
                        index = moved(builder.load(vector), (half * stride + c) * LANES)
                        some = builder.load(address(context, builder, of_x, x, index, FLOATS), align=4)
                        for r in range(rows):
                            add_product(builder, codes[r][half], some, parts[r, c])
                builder.store(moved(builder.load(byte), LANES), byte)
                builder.store(moved(builder.load(vector), 2 * stride * LANES), vector)
            for r in range(rows):
                index = builder.add(moved(scales_at, scales_step, r), loop.index)
                scale = builder.load(address(context, builder, of_work, work, index, FLOAT))
                for c in range(columns):
                    add_product(builder, builder.load(parts[r, c]), broadcast_to(builder, scale, FLOATS), sums[r, c])
        for at in places:
            builder.store(builder.load(sums[at]), sum_of(*at), align=4)
        return context.get_dummy_value()

    return block
