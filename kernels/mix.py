"""Mix: what SMoLoRA does in rank space between shrink and expand, and its derivative.

The passes around it (shrink x into rank space, expand to y, and their transposes) know nothing of the method: another
mixture of low-rank experts is another pair of functions here.
"""

import triton
import triton.language as tl


@triton.jit
def mix(score_vu, score_if):
    """The VU branch's share of Eq. 8 from the branches' scores I . x_vu and I . x_if, [BT] each: a two-way softmax."""
    return tl.sigmoid(score_vu - score_if)


@triton.jit
def mix_backward(alpha, ph_vu, ph_if):
    """Gradient of the VU branch's score, the negative of the IF branch's, [BT]; ph = sum of q p . h of a branch."""
    return alpha * (1 - alpha) * (ph_vu - ph_if)


@triton.jit
def gradient_h(share, delta, b_p, b_w, b_q):
    """Gradient of a branch's h [BT, BC]: through the expand, share p, and through the score, delta w; gated by q [BC]."""
    return b_q[None, :] * (share[:, None] * b_p + delta[:, None] * b_w[None, :])
