"""Mix: what SMoLoRA does in rank space between shrink and expand, and its derivative.

The passes around it (shrink x into rank space, expand to y, and their transposes) know nothing of the method: another
mixture of low-rank experts is another pair of functions here.
"""

import triton
import triton.language as tl


@triton.jit
def mix(score_vu, score_if):
    """The lead of the VU branch [BT], from the branches' scores I . x of Eq. 8.

    The two-way softmax over the scores gives the shares alpha = sigmoid(lead) and beta = sigmoid(-lead).
    """
    return score_vu - score_if


@triton.jit
def mix_backward(lead, ph_vu, ph_if):
    """Gradient of the lead [BT]; ph is the sum of q p . h over a branch."""
    return tl.sigmoid(lead) * tl.sigmoid(-lead) * (ph_vu - ph_if)


@triton.jit
def gradient_h(share, delta, b_p, b_w, b_q):
    """Gradient of a branch's h [BT, BC]: share p through the expand, delta w through the score, gated by q [BC]."""
    return b_q[None, :] * (share[:, None] * b_p + delta[:, None] * b_w[None, :])
