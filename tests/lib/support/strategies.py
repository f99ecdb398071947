"""Hypothesis strategies: any layer with any batch."""

from hypothesis import strategies as st

from support.oracle import Case


@st.composite
def cases(
    draw, *, limits: st.SearchStrategy[int], ranks: st.SearchStrategy[int], experts: int = 9, top_k: int = 9
) -> Case:
    """Any option of a layer and its batch at once.

    Args:
        limits: how many tokens a batch may have.
        ranks: r.
        experts: the most of a branch.
        top_k: the most that are chosen.
    """
    limit, B = draw(limits), draw(st.integers(1, 6))
    M, N = draw(st.tuples(st.integers(1, experts), st.integers(1, experts)))
    lengths = None
    if draw(st.booleans()):
        lengths = tuple(draw(st.lists(st.integers(0, limit // 3), min_size=1, max_size=6)))
        while sum(lengths) > limit:
            lengths = lengths[:-1]
    return Case(
        B=B,
        S=draw(st.integers(0, limit // B)),
        lengths=lengths,
        d=draw(st.integers(1, 100)),
        k=draw(st.integers(1, 100)),
        r=draw(ranks),
        M=M,
        N=N,
        e=draw(st.integers(1, 50)),
        top_k=draw(st.integers(1, min(M, N, top_k))),
        fusion=draw(st.sampled_from(["adaptive"] * 3 + ["mean", "vu", "if"])),
        router_grad=draw(st.sampled_from(["none", "straight_through"])),
        dropout=draw(st.sampled_from([0.0, 0.05, 0.5])),
        bias=draw(st.booleans()),
        mask=draw(st.booleans()),
        shared=draw(st.booleans()),
        given=draw(st.sampled_from([False, False, True])),
        spread=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )
