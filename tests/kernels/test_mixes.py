"""The mixes' device functions, one by one, against their formulas and autograd in float64."""

import pytest
import torch
import triton
import triton.language as tl

from smolora.kernels.mixes import MIXES
from support.marks import DEVICE, on_device

pytestmark = on_device
T, BT = 13, 16  # three rows of the tile are not inside


@triton.jit
def _share(
    scores_ptr,
    out_ptr,  # (BT, KP)
    T,
    STATE: tl.constexpr,
    SHARE: tl.constexpr,
    bank: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BT: tl.constexpr,
):
    rows = tl.arange(0, BT)
    slot = tl.arange(0, KP)
    inside = rows < T
    state = STATE(scores_ptr, rows, inside, K, KP)
    b_share = tl.broadcast_to(SHARE(state, scores_ptr, rows, inside, slot, bank, K), [BT, KP])
    tl.store(out_ptr + rows[:, None] * KP + slot[None, :], b_share)


@triton.jit
def _scores_backward(
    scores_ptr,
    dshare_ptr,  # (BT, KP)
    out_ptr,  # (BT, KP)
    T,
    STATE: tl.constexpr,
    SCORES_BACKWARD: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BT: tl.constexpr,
):
    rows = tl.arange(0, BT)
    o_tile = rows[:, None] * KP + tl.arange(0, KP)[None, :]
    inside = rows < T
    state = STATE(scores_ptr, rows, inside, K, KP)
    b_dscores = SCORES_BACKWARD(state, scores_ptr, rows, inside, tl.load(dshare_ptr + o_tile), K, KP)
    tl.store(out_ptr + o_tile, b_dscores)


@triton.jit
def _fuse(
    h_ptr,
    w_ptr,
    ids_ptr,
    slot_weights_ptr,
    out_ptr,  # (BT,)
    T,
    FUSE: tl.constexpr,
    FIRST: tl.constexpr,
    K: tl.constexpr,
    DOWN: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    rows = tl.arange(0, BT)
    inside = rows < T
    b_logit = FUSE(h_ptr, w_ptr, ids_ptr, slot_weights_ptr, 0, rows, inside, FIRST, 2, K, DOWN, R, RP, BT, BC, BLOCKS)
    tl.store(out_ptr + rows, b_logit)


@triton.jit
def _fuse_backward(state_ptr, ph_ptr, out_ptr, FUSE_BACKWARD: tl.constexpr, BT: tl.constexpr):
    rows = tl.arange(0, BT)
    b_ph = (tl.load(ph_ptr + rows), tl.load(ph_ptr + BT + rows))
    b_first, b_second = FUSE_BACKWARD(tl.load(state_ptr + rows), b_ph)
    tl.store(out_ptr + rows, b_first)
    tl.store(out_ptr + BT + rows, b_second)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def share(mix: str, scores: torch.Tensor | None, K: int, bank: int = 0) -> torch.Tensor:
    """The shares (T, K) of a bank; those of rows past the last token are finite."""
    KP = triton.next_power_of_2(K)
    out = torch.full((BT, KP), torch.nan, device=DEVICE)
    functions = MIXES[mix]
    _share[(1,)](scores, out, T, STATE=functions.state, SHARE=functions.share, bank=bank, K=K, KP=KP, BT=BT)
    assert out[:, :K].isfinite().all()
    return out[:T, :K].double()


@pytest.mark.parametrize("K", [1, 3, 8])
def test_weighted_shares(K: int):
    """1, or the given number."""
    given = random(T, K)
    assert torch.equal(share("weighted", None, K), torch.ones(T, K, dtype=torch.float64, device=DEVICE))
    assert torch.equal(share("weighted", given, K), given.double())


@pytest.mark.parametrize("K", [1, 3, 8])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_softmax_shares(K: int, scale: float):
    """Over all experts of a token; large logits do not overflow."""
    logits = scale * random(T, K)
    torch.testing.assert_close(share("softmax", logits, K), torch.softmax(logits.double(), -1), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_smolora_shares(scale: float):
    """alpha and beta, both exact to rounding: 1 - alpha would lose a small beta."""
    logit = scale * random(T)
    for bank, sign in ((0, 1), (1, -1)):
        expected = torch.sigmoid(sign * logit.double())[:, None].expand(T, 2)
        torch.testing.assert_close(share("smolora", logit, 2, bank), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("mix", ["weighted", "softmax"])
@pytest.mark.parametrize("K", [1, 3, 8])
def test_gradients_of_scores(mix: str, K: int):
    """What autograd gives of the shares."""
    KP = triton.next_power_of_2(K)
    scores, dshare, out = random(T, K), random(BT, KP, seed=1), torch.full((BT, KP), torch.nan, device=DEVICE)
    dshare[:, K:] = 0
    functions = MIXES[mix]
    _scores_backward[(1,)](
        scores, dshare, out, T, STATE=functions.state, SCORES_BACKWARD=functions.scores_backward, K=K, KP=KP, BT=BT
    )
    leaf = scores.double().requires_grad_()
    shares = leaf if mix == "weighted" else torch.softmax(leaf, -1)
    (expected,) = torch.autograd.grad(shares, leaf, dshare[:T, :K].double())
    torch.testing.assert_close(out[:T, :K].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("K", "down", "BC"), [(1, 1, 16), (2, 2, 32), (3, 3, 16), (2, 1, 32)])
def test_the_fusion_logit(K: int, down: int, BC: int):
    """The sum of q w . h over the first bank's slots less that over the second's, also where slots share h."""
    r, RP, experts = 12, 16, (4, 3)
    h, w, q = random(T, 2, down, r), random(sum(experts), r, seed=1), random(1, 2, K, seed=2)
    ids = torch.stack([torch.randperm(e, generator=torch.Generator().manual_seed(e))[:K] for e in experts])
    ids = ids[None].to(DEVICE, torch.int32)
    out = torch.full((BT,), torch.nan, device=DEVICE)
    _fuse[(1,)](
        h,
        w,
        ids,
        q,
        out,
        T,
        FUSE=MIXES["smolora"].fuse,
        FIRST=(0, experts[0]),
        K=K,
        DOWN=down,
        R=r,
        RP=RP,
        BT=BT,
        BC=BC,
        BLOCKS=triton.cdiv(triton.next_power_of_2(K) * RP, BC),
    )
    rows = ids[0].long() + torch.tensor([[0], [experts[0]]], device=DEVICE)
    scores = (h.double() * (w[rows] * q[0][..., None]).double()).sum((2, 3))
    torch.testing.assert_close(out[:T].double(), scores[:, 0] - scores[:, 1], rtol=1e-5, atol=1e-5)
    assert out.isfinite().all()


def test_gradients_of_the_banks_scores():
    """With L = alpha ph_1 + beta ph_2, what autograd gives of the two scores."""
    scores, ph, out = random(2, BT), random(2, BT, seed=1), torch.empty(2, BT, device=DEVICE)
    _fuse_backward[(1,)](scores[0] - scores[1], ph, out, FUSE_BACKWARD=MIXES["smolora"].fuse_backward, BT=BT)
    leaf = scores.double().requires_grad_()
    loss = (torch.softmax(leaf, 0) * ph.double()).sum()
    (expected,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
