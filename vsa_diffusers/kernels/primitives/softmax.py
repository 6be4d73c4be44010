"""The softmax step that the sparse kernels share, and the numbers of its bounded form.

M = BLOCK_M query rows, K_N = BLOCK_N keys of one step.
"""

import math

import triton
import triton.language as tl

LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(math.log2(math.e))
# Where |logit| (base 2) cannot exceed FARTHEST, exp2(logit - offset) needs no running maximum: the exponents of bf16
# weights and fp32 sums go up to 127, and HEADROOM leaves room for the sums. A row whose logits all lie so low that its
# weights might have underflowed shows it by its sum, and is done again.
MAX_BOUNDED_LOGIT = tl.constexpr(180.0)
HEADROOM = tl.constexpr(90.0)
MIN_ROW_SUM = tl.constexpr(2.0**-100)


@triton.jit
def softmax_step(k, v, position, exists, bias, own, state, BOUNDED: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the softmax in base 2, as `tile_loop.py` calls it.

    `own` is `(q, scale)`, `state` is `(row_max, row_sum, acc)`.

    Bounded logits are taken relative to a fixed `highest`: there is no maximum to find and nothing to shrink, and since
    nothing but the product touches the accumulator, the next step's products queue up behind it.
    """
    q, scale = own
    row_max, row_sum, acc = state
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, K_N]
    if BOUNDED:
        shift = -row_max[:, None]
        if bias is not None:
            shift = bias[None, :] - row_max[:, None]
        p = tl.math.exp2(tl.fma(s, scale, shift))
        row_sum += tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    else:
        s = s * scale
        if bias is not None:
            s += bias[None, :]
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p = tl.math.exp2(s - new_max[:, None])
        rescale = tl.math.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        row_max = new_max
    return row_max, row_sum, acc
