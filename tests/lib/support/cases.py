"""The cases that every backend must pass, each with what it stresses."""

from support.oracle import Case

plain = Case()

OPTIONS = [
    plain,  # the paper's setting in small
    plain.but(dropout=0.25),  # two independent masks, forward and backward
    plain.but(mask=True, dropout=0.1),  # the mean of some tokens, tiles laid from the first routed one
    plain.but(shared=True, bias=False),  # one instruction for all, no bias
    plain.but(top_k=2, M=3, N=5),  # gates below 1, so router gradients; expert numbers that are no power of two
    plain.but(top_k=3, M=3, N=5, dropout=0.3, mask=True),  # every VU expert chosen
    plain.but(router_grad="straight_through"),  # the router learns at top-1
    plain.but(router_grad="straight_through", top_k=2, mask=True, dropout=0.2),
    plain.but(fusion="mean", dropout=0.1),
    plain.but(fusion="vu", mask=True, dropout=0.1),  # one branch alone keeps its dropout stream
    plain.but(fusion="if", dropout=0.1),  # the IF branch's masks are stream 1 here too
    plain.but(fusion="mean", top_k=2),
    plain.but(fusion="vu", top_k=2, router_grad="straight_through"),
    plain.but(fusion="if", top_k=2),
    plain.but(given=True),  # nothing is routed
    plain.but(given=True, top_k=2, M=5),
    plain.but(given=True, router_grad="straight_through"),  # given routes teach no router
]

SHAPES = [
    plain.but(S=0),  # no token
    plain.but(B=0),  # no instance
    plain.but(lengths=()),
    plain.but(S=1),  # decoding
    plain.but(B=1, S=1, M=1, N=1),  # one expert
    plain.but(B=2, S=63),  # around the tile of 64 tokens
    plain.but(B=2, S=64),
    plain.but(B=2, S=65, mask=True),
    plain.but(B=1, S=130, top_k=2),  # several tiles an instance
    plain.but(spread=False, B=4, S=3),  # instances alike: all to one expert
    plain.but(B=2, M=6, N=7),  # experts that nobody uses
    plain.but(d=41, k=57, r=12),  # nothing a multiple of anything
    plain.but(d=1, k=3),
    plain.but(d=130, k=1),
    plain.but(d=200, k=150, S=20),  # several blocks of d and k
    plain.but(lengths=(5, 0, 17, 1)),  # packed, one instance empty
    plain.but(lengths=(40, 3, 90, 7), mask=True, dropout=0.1, top_k=2),
    plain.but(lengths=(0, 0, 3)),
    plain.but(lengths=(64, 65, 63), router_grad="straight_through", mask=True),  # packed, at the edges of tiles
]

RANKS = [plain.but(r=r, k=70, d=50, dropout=0.1) for r in (1, 4, 16, 24, 32, 48, 64, 128)]
RANKS += [
    plain.but(r=64, top_k=2, M=2, N=2),  # more columns than a block holds
    plain.but(r=128, top_k=2, S=20, dropout=0.1, mask=True, router_grad="straight_through"),
    plain.but(r=48, M=5, top_k=3, lengths=(30, 9)),
    plain.but(r=128, fusion="vu", mask=True),
]
