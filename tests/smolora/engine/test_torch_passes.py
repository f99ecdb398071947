"""The torch backend against the float64 reference, and the reference against itself."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smolora.engine import compiled, philox, torch_passes
from smolora.reference import philox_bytes, smolora_forward
from support.cases import OPTIONS, RANKS, SHAPES, plain
from support.oracle import PARAMETERS, Case, build, check, run
from support.strategies import cases

pytestmark = pytest.mark.usefixtures("without_compiled_code")

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("case", OPTIONS + SHAPES + RANKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(case: Case, dtype: torch.dtype):
    check(case, dtype, "torch")


@pytest.mark.parametrize("examples", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_any_case(examples: int):
    """Seeded cases over every option at once. Some are so ill-conditioned that the eager error is no measure, and
    that the reference's softmax is not right to float64 itself."""

    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(cases(limits=st.just(900), ranks=st.integers(1, 128)), st.sampled_from(DTYPES[1:]))
    def holds(case: Case, dtype: torch.dtype):
        check(case, dtype, "torch", slack=5)

    holds()


@pytest.mark.parametrize(
    "case",
    [plain.but(d=5, k=6, r=2, e=4, S=3, B=2, bias=False), plain.but(d=5, k=6, r=2, e=4, S=3, top_k=2, mask=True)],
    ids=str,
)
def test_gradcheck_of_the_reference(case: Case):
    """Finite differences know no algebra: the oracle itself is differentiated correctly."""
    layer, batch = build(case, torch.float64)
    inputs = [batch.x, *(getattr(layer, name).detach() for name in PARAMETERS)]
    for tensor in inputs:
        tensor.requires_grad_()
    keywords = dict(batch.keywords)
    emb = keywords.pop("instruction")

    def forward(x, *parameters):
        base = layer.base_layer
        return smolora_forward(x, base.weight, base.bias, *parameters, emb, scaling=2.0, top_k=case.top_k, **keywords)

    torch.autograd.gradcheck(forward, inputs, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("seed", "row", "stream", "words"),
    [  # the known answers of Random123's Philox4x32-10, as far as a counter of ours can spell them
        (0, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ],
)
def test_philox_known_answer(seed: int, row: int, stream: int, words: str):
    expected = b"".join(int(w, 16).to_bytes(4, "little") for w in words.split())
    assert philox_bytes(seed, row + 1, 16, stream)[row].tobytes() == expected


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 7, 2**62 + 3, -1])
def test_masks_are_those_of_the_reference(
    seed: int, dtype: torch.dtype, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
):
    """Three implementations of one random stream, over more columns than a counter block has."""
    monkeypatch.undo()
    if not is_compiled:
        monkeypatch.setattr(compiled, "module", None)
    elif compiled.module is None:
        pytest.skip("smolora was installed without a C++ compiler")
    for rows, columns in ((9, 41), (1, 16), (0, 16), (70, 1040)):
        masks = philox.keep_masks(torch.tensor([seed]), rows, columns, 64, (0, 1), dtype)
        for stream, mask in enumerate(masks):
            assert torch.equal(
                mask, torch.from_numpy(philox_bytes(seed % 2**64, rows, columns, stream) >= 64).to(dtype)
            )
        assert rows == 0 or not torch.equal(*masks)


def test_dropout_keeps_what_it_says():
    """The share that is kept is 1 - threshold / 256, to five standard deviations."""
    for threshold in (1, 13, 128, 255):
        (mask,) = philox.keep_masks(torch.tensor([3]), 500, 1000, threshold, (0,), torch.float32)
        p = threshold / 256
        assert abs((1 - mask.double().mean().item()) - p) < 5 * (p * (1 - p) / mask.numel()) ** 0.5


@pytest.mark.parametrize("threads", [1, 2])
def test_repeatable_on_several_threads(threads: int):
    """Bitwise equal forward and backward, 250 times: no product and no sum depends on which thread was first."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layer, batch = build(plain.but(B=4, S=64, d=96, k=160, dropout=0.05, top_k=2), torch.float32)
        first = run(layer, batch, "torch")
        for _ in range(250):
            again = run(layer, batch, "torch")
            assert all(torch.equal(first[name], again[name]) for name in first)
    finally:
        torch.set_num_threads(before)


def test_ties_take_the_lowest_expert():
    routes, gates = torch_passes.choose(torch.tensor([[1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]]), 2)
    assert routes.tolist() == [[1, 2], [0, 1]]
    assert torch.equal(gates, torch.full((2, 2), 0.5))
