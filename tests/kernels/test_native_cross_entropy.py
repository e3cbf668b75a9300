"""The C++ side of linear cross-entropy: its kernels on every instruction set, and what stands around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from antlm_fast.kernels.linear_cross_entropy import linear_cross_entropy, native_impl, native_products
from antlm_fast.kernels.linear_cross_entropy.contract import LossOptions
from antlm_fast.kernels.native import weight_gradient
from antlm_fast.kernels.native.build import FOLDER, LIBRARY
from antlm_fast.kernels.native.library import INSTRUCTION_SETS, Library, library, unavailable_reason
from antlm_fast.kernels.working_copies import KeptCopies
from antlm_fast.testing.budget import assert_within_budget

REASON = unavailable_reason("cpu", torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = (torch.float32, torch.bfloat16)
# around a vector, four of them, and a piece of a row
VOCABULARIES = (1, 7, 15, 16, 17, 63, 64, 65, 130, 1023, 1024, 1025, 2100)
OPTIONS: tuple[dict[str, float], ...] = (
    {},
    {"softcap": 3.0},
    {"z_loss": 0.1},
    {"smoothing": 0.2},
    {"softcap": 30.0, "z_loss": 0.02, "smoothing": 0.1},
)
GUARD = 77.0


@pytest.fixture(params=INSTRUCTION_SETS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """The library with one instruction set, which the Python around it calls too."""
    if request.param not in library().available:
        pytest.skip(f"this machine has no {request.param}")
    chosen = Library(FOLDER / LIBRARY, request.param)
    for module in (native_impl, native_products, weight_gradient):
        monkeypatch.setattr(module, "library", lambda: chosen)
    yield chosen
    Library(FOLDER / LIBRARY)  # whether tiles are used is the whole process's: as the last Library says


def _guarded(values: torch.Tensor, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows with a stride, at an odd address; the memory around them, which holds a number)."""
    rows, columns = values.shape
    memory = torch.full((rows * stride + 40,), GUARD, dtype=values.dtype)
    inside = memory[1 : 1 + rows * stride].view(rows, stride)
    inside[:, :columns] = values
    return inside, memory


def _is_untouched(inside: torch.Tensor, memory: torch.Tensor) -> bool:
    around = torch.cat([memory[:1], memory[1 + inside.numel() :]])
    return bool((around == GUARD).all())


def _row_losses(
    x: torch.Tensor, targets: torch.Tensor, *, softcap: float = 0.0, z_loss: float = 0.0, smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    lse = x.logsumexp(1)
    nll = lse - x.gather(1, targets[:, None]).squeeze(1)
    losses = (1 - smoothing) * nll + z_loss * lse.square()
    return losses + smoothing * (lse - x.mean(1)) if smoothing else losses, lse


class _Case:
    """Logits of some rows, and what the kernel makes of them."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, *, biased: bool = True, masked: bool = True) -> None:
        generator = torch.Generator().manual_seed(rows * 10_000 + vocab)
        self.logits = (3 * torch.randn(rows, vocab, generator=generator)).to(dtype)
        self.bias = torch.randn(vocab, generator=generator).to(dtype) if biased else None
        self.targets = torch.randint(vocab, (rows,), generator=generator)
        self.counts = torch.rand(rows, generator=generator) < 0.7 if masked else None
        self.upstream = torch.randn(rows, generator=generator) if masked else None

    def run(self, kernels: Library, *, gradient: bool = True, stride: int | None = None, **options: float) -> list[Any]:
        """[losses, lse, correct, d_logits]; checks that nothing around the logits was written to."""
        rows, vocab = self.logits.shape
        inside, memory = _guarded(self.logits, stride or vocab)
        losses, lse = torch.full((rows,), torch.nan), torch.full((rows,), torch.nan)
        correct = torch.ones(rows, dtype=torch.bool)
        targets = self.targets if self.counts is None else self.targets.where(self.counts, 10**9)
        kernels.call(
            "cross_entropy_rows",
            *(inside, self.bias, targets, self.counts, self.upstream, losses, lse, correct),
            *(rows, vocab, inside.shape[1], inside.dtype == torch.bfloat16, gradient),
            *(options.get(name, 0.0) for name in ("softcap", "z_loss", "smoothing")),
        )
        assert _is_untouched(inside, memory)
        assert not gradient or not inside[:, vocab:].any()
        return [losses, lse, correct, inside[:, :vocab].clone()]

    def expected(self, dtype: torch.dtype, **options: float) -> list[torch.Tensor]:
        """[losses, lse, d_logits] by the formula."""
        x = self.logits.to(dtype).requires_grad_()
        y = x if self.bias is None else x + self.bias.to(dtype)
        losses, lse = _row_losses(y, self.targets, **options)
        if self.counts is not None:
            losses, lse = losses.where(self.counts, 0.0), lse.where(self.counts, 0.0)
        upstream = torch.ones_like(losses) if self.upstream is None else self.upstream.to(dtype)
        (d_logits,) = torch.autograd.grad(losses, x, upstream)
        return [losses.detach(), lse.detach(), d_logits]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_match_the_formula(kernels: Library, dtype: torch.dtype, options: dict[str, float]) -> None:
    for vocab in VOCABULARIES:
        for biased, rows in ((False, 1), (True, 19)):
            case = _Case(rows, vocab, dtype, biased=biased, masked=biased)
            losses, lse, correct, d_logits = case.run(kernels, stride=vocab + 5 * biased, **options)
            exact, plain = case.expected(torch.float64, **options), case.expected(torch.float32, **options)
            plain[2] = plain[2].to(dtype)
            for name, actual, wanted, eager in zip(
                ("losses", "lse", "d_logits"), (losses, lse, d_logits), exact, plain, strict=True
            ):
                # one class: everything cancels
                assert_within_budget(name, actual, wanted, eager, 3.0, scale=case.logits.abs().max().item())
            x = case.logits.float() if case.bias is None else case.logits.float() + case.bias.float()
            right = x.gather(1, case.targets[:, None]).squeeze(1) >= x.amax(1)
            assert torch.equal(correct, right if case.counts is None else right & case.counts)
            again = case.run(kernels, gradient=False, **options)
            assert all(torch.equal(a, b) for a, b in zip(again[:3], (losses, lse, correct), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_threads(kernels: Library, dtype: torch.dtype) -> None:
    case, before = _Case(40, 517, dtype), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.run(kernels, smoothing=0.1))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_logits_are_capped_exactly(kernels: Library, dtype: torch.dtype) -> None:
    """softcap * tanh(x / softcap) is x where x is small; 1 - exp(-2x) would lose it."""
    case = _Case(1, 33, torch.float32, biased=False, masked=False)
    case.logits = (case.logits * 1e-3).to(dtype)
    losses, lse, _, d_logits = case.run(kernels, softcap=50.0)
    for actual, wanted in zip((losses, lse, d_logits), case.expected(torch.float64, softcap=50.0), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_infinities_and_nan(kernels: Library, dtype: torch.dtype, softcap: float) -> None:
    """As the formula has them: -inf is a class that cannot be; inf, NaN and nothing but -inf make a row NaN."""
    inf, vocab = torch.inf, 37
    case = _Case(6, vocab, dtype, biased=False, masked=False)
    case.targets = torch.full((6,), 20)
    case.logits[0, 5] = -inf
    case.logits[1, 20] = -inf
    case.logits[2, 36] = inf
    case.logits[3, 8] = torch.nan
    case.logits[3, 20] = 50.0  # the largest of what is a number
    case.logits[4] = -inf
    losses, lse, correct, d_logits = case.run(kernels, softcap=softcap)
    wanted, wanted_lse, wanted_d = case.expected(torch.float64, softcap=softcap)
    rows = [0, 1, 5] if not softcap else [0, 1, 2, 4, 5]
    close: dict[str, Any] = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(losses[rows].double(), wanted[rows], **close)
    torch.testing.assert_close(lse[rows].double(), wanted_lse[rows], **close)
    others = [row for row in range(6) if row not in rows]
    assert losses[others].isnan().all()
    assert not correct[others].any()
    assert not correct[1]
    if not softcap:
        assert losses[1] == inf
        assert d_logits[0, 5] == 0.0
        torch.testing.assert_close(d_logits[0].double(), wanted_d[0], **close)
        assert d_logits[1, 20] == -1.0


def test_probabilities_that_vanish_are_zero(kernels: Library) -> None:
    case = _Case(1, 20, torch.float32, biased=False, masked=False)
    case.logits = torch.linspace(-1e4, 1e4, 20)[None]
    case.targets = torch.tensor([19])
    losses, lse, correct, d_logits = case.run(kernels)
    assert (losses.item(), lse.item(), correct.item()) == (0.0, 1e4, True)
    assert not d_logits.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_column_sums(kernels: Library, dtype: torch.dtype, weighted: bool) -> None:
    for rows in (0, 1, 3, 64, 65, 200):
        for columns in (1, 15, 16, 17, 63, 64, 65, 130):
            generator = torch.Generator().manual_seed(rows * 1000 + columns)
            values = torch.randn(rows, columns, generator=generator).to(dtype)
            of_rows = torch.randn(rows, generator=generator) if weighted else None
            inside, _ = _guarded(values, columns + 3)
            total, memory = _guarded(torch.full((1, columns), 0.5), columns)
            kernels.call(
                "cross_entropy_column_sums",
                *(inside, of_rows, total, rows, columns, columns + 3, dtype == torch.bfloat16),
            )
            factors = torch.ones(rows) if of_rows is None else of_rows
            wanted = 0.5 + (values.double() * factors.double()[:, None]).sum(0)
            torch.testing.assert_close(total[0].double(), wanted, rtol=1e-5, atol=1e-5)
            assert _is_untouched(total, memory)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_many_chunks_are_one(kernels: Library, dtype: torch.dtype, reduction: str) -> None:
    """33 rows of a vocabulary of 70,000: 3 rows of float32 or 7 of bfloat16 logits a MiB."""
    torch.manual_seed(0)
    inputs = [torch.randn(33, 24), torch.randn(70_000, 24), torch.randn(70_000)]
    targets = torch.randint(70_000, (33,))

    def results(impl: str, kind: torch.dtype, mib: int, rows_at_once: int = 33) -> list[torch.Tensor]:
        found = []
        for first in range(0, 33, rows_at_once):
            rows = slice(first, first + rows_at_once)
            leaves = [x.to(dtype).to(kind).requires_grad_() for x in (inputs[0][rows], *inputs[1:])]
            loss = linear_cross_entropy(
                *leaves[:2], targets[rows], bias=leaves[2], reduction=reduction, impl=impl, workspace_mib=mib
            )
            part = leaves[0].shape[0] / 33
            upstream = (
                torch.linspace(-2.0, 3.0, 33)[rows].to(loss) if loss.dim() else torch.tensor(-2.5 * part).to(loss)
            )
            found.append([loss.detach() * (1.0 if loss.dim() else part), *torch.autograd.grad(loss, leaves, upstream)])
        losses, d_hidden, *rest = zip(*found, strict=True)
        loss = torch.cat(losses) if reduction == "none" else sum(losses)
        return [loss, torch.cat(d_hidden), *(sum(each) for each in rest)]

    exact = results("reference", torch.float64, 64)
    # plain code on as many rows at a time: how near a library's sum of 70,000 products comes depends on their number
    chunk = 3 if dtype == torch.float32 else 7
    plain = {1: results("reference", dtype, 64, chunk), 64: results("reference", dtype, 64)}
    ours = [results("native", dtype, mib) for mib in plain]
    for actual, eager in zip(ours, plain.values(), strict=True):
        for name, *numbers in zip(("loss", "d_hidden", "d_weight", "d_bias"), actual, exact, eager, strict=True):
            assert_within_budget(name, *numbers, 3.0)
    torch.testing.assert_close(ours[0][0], ours[1][0], rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_are_projected_in_blocks_of_columns(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(20, 8), torch.randn(100, 8), torch.randint(100, (20,))
    results = []
    for columns, rows in ((4096, 1024), (32, 20), (33, 20)):
        monkeypatch.setattr(native_products, "_PROJECTED_COLUMNS", columns)
        monkeypatch.setattr(native_products, "_MANY_ROWS", rows)
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        loss = linear_cross_entropy(*leaves, targets, impl="native")
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_whole_number_for_an_option_is_that_number() -> None:
    leaves, targets = _large(0)
    whole, real = (_loss_of(leaves, targets, softcap=cap, z_loss=z) for cap, z in ((3, 1), (3.0, 1.0)))
    assert torch.equal(whole, real)
    assert torch.equal(_loss_of(leaves, targets, softcap=2.5), linear_cross_entropy(*leaves, targets, softcap=2.5))


def test_chunks_are_about_as_large_and_fit() -> None:
    weight = torch.empty(1000, 1)
    row_bytes = 4 * native_products.padded(1000)
    for rows in (0, 1, 262, 263, 600, 5000):
        chunks = native_impl._chunks(torch.empty(rows, 1), weight, 1)
        sizes = [chunk.stop - chunk.start for chunk in chunks]
        assert sum(sizes) == rows
        assert [chunk.start for chunk in chunks[1:]] == [chunk.stop for chunk in chunks[:-1]]
        assert max(sizes) * row_bytes <= 2**20
        assert len(chunks) == max(1, -(-rows // (2**20 // row_bytes)))
        assert max(sizes) - min(sizes) < len(chunks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace_mib", [1, 64])
def test_inputs_may_lie_in_memory_as_they_like(dtype: torch.dtype, workspace_mib: int) -> None:
    """Rows with gaps that hold NaN, columns for rows, strided targets, an upstream of one number."""
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(67, 20).to(dtype),
        torch.randn(20_000, 20).to(dtype),
        torch.randn(20_000).to(dtype),
    )
    targets = torch.randint(20_000, (67,))
    gaps = torch.full((67, 37), torch.nan, dtype=dtype)
    gaps[:, :20] = hidden
    views = [gaps[:, :20], weight.t().contiguous().t(), torch.stack([bias, bias], 1)[:, 0]]
    results = []
    for leaves, places in (([hidden, weight, bias], targets), (views, torch.stack([targets, targets], 1)[:, 1])):
        leaves = [x.detach().requires_grad_() for x in leaves]
        losses = linear_cross_entropy(
            *leaves[:2], places, bias=leaves[2], reduction="none", impl="native", workspace_mib=workspace_mib
        )
        results.append([losses.detach(), *torch.autograd.grad(losses, leaves, torch.ones(()).expand(67))])
    for actual, wanted in zip(results[1], results[0], strict=True):
        assert torch.isfinite(actual).all()
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("workspace_mib", [1, 64])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_autocast_around_the_backward_changes_nothing(workspace_mib: int, reduction: str) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(64, 8).requires_grad_(), torch.randn(20000, 8).requires_grad_()]
    targets = torch.randint(20000, (64,))
    loss = linear_cross_entropy(*leaves, targets, reduction=reduction, impl="native", workspace_mib=workspace_mib)
    upstream = torch.full_like(loss, 0.7)
    wanted = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        again = torch.autograd.grad(loss, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("workspace_mib", [1, 64], ids=["chunks", "one chunk"])
def test_the_weight_alone_has_a_gradient_in_grad_dtype(workspace_mib: int, reduction: str) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(600, 48), torch.randn(1500, 48), torch.randn(1500)
    targets = torch.randint(1500, (600,))

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        leaves[1].grad_dtype = dtype
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(
                leaves[0], leaves[1], targets, bias=leaves[2], reduction=reduction, workspace_mib=workspace_mib,
                impl="native",
            )  # fmt: skip
        loss.sum().backward()
        return [leaf.grad for leaf in leaves]

    wide, narrow = gradients(torch.float32), gradients(torch.bfloat16)
    assert [each.dtype for each in narrow] == [torch.float32, torch.bfloat16, torch.float32]
    assert torch.equal(narrow[0], wide[0])
    assert torch.equal(narrow[1], wide[1].bfloat16())
    assert torch.equal(narrow[2], wide[2])


def test_a_kept_copy_of_the_weight_follows_it() -> None:
    """Where copies are kept, it must be another after a change, and the backward must have its own."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 32, requires_grad=True), torch.randn(50, 32, requires_grad=True)
    targets = torch.randint(50, (20,))

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(hidden, weight, targets, impl="native")

    copies = KeptCopies()
    with copies.in_use():
        before = loss()
    (wanted,) = torch.autograd.grad(before, hidden, retain_graph=True)
    with torch.no_grad():
        weight.mul_(2.0)
    assert torch.equal(torch.autograd.grad(before, hidden, retain_graph=True)[0], wanted)
    with copies.in_use():
        after = loss()
    fresh = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, impl="native")
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(before, hidden)


def test_a_weight_that_changed_before_the_backward_is_an_error() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2]), impl="native")
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _large(seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """So many logits that their memory is the pool's."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((80, 8), (5000, 8))]
    return leaves, torch.randint(5000, (80,), generator=generator)


def _loss_of(leaves: list[torch.Tensor], targets: torch.Tensor, **options: Any) -> torch.Tensor:
    return linear_cross_entropy(*leaves, targets, impl="native", **options)


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("workspace_mib", [1, 64])
def test_one_opaque_node_of_a_compiled_graph(reduce: bool, workspace_mib: int) -> None:
    options = LossOptions(torch.float32, reduce, 0.1, 0.1, None, wants_correct=True, workspace_mib=workspace_mib)
    (hidden, weight), targets = _large(0)
    bias = torch.randn(5000).requires_grad_()

    def loss(*tensors: torch.Tensor) -> Any:
        return native_impl.forward(*tensors, targets, None, options)

    inputs = hidden, weight, bias
    wanted, found = loss(*inputs), torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    upstream = torch.full_like(wanted.loss, 0.3)
    gradients = [torch.autograd.grad(each.loss, inputs, upstream) for each in (wanted, found)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("workspace_mib", [1, 64])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("impl", ["native", "auto"])
def test_one_graph_whatever_rows_are_labelled(impl: str, reduction: str, workspace_mib: int) -> None:
    """How many rows are labelled is a value, on which a graph cannot depend."""
    leaves, targets = _large(0)
    options: dict[str, Any] = {"reduction": reduction, "workspace_mib": workspace_mib, "impl": impl}
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=graphs)
    for every in (1, 2, 7):
        some = targets.clone()
        some[torch.arange(len(some)) % every > 0] = -100
        losses = [call(*leaves, some, **options) for call in (linear_cross_entropy, compiled)]
        torch.testing.assert_close(losses[1], losses[0])
        gradients = [torch.autograd.grad(loss.sum(), leaves) for loss in losses]
        for expected, actual in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_target_out_of_range_is_refused_in_a_graph_too(reduction: str) -> None:
    leaves, targets = _large(0)
    targets[3] = 5000
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"targets must be in \[0, 5000\) or ignore_index; got 5000"):
        compiled(*leaves, targets, reduction=reduction, impl="native")


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("workspace_mib", [1, 64])
def test_custom_ops_hold_to_their_contracts(reduce: bool, workspace_mib: int) -> None:
    (hidden, weight), targets = _large(0)
    factors = hidden.detach().clone(), weight.detach().clone(), None
    arguments = (
        hidden,
        weight,
        None,
        *factors,
        targets,
        None,
        0.1,
        0.0,
        None,
        workspace_mib,
        reduce,
        [True, True, False],
    )
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.antlm_fast.linear_cross_entropy_native, arguments, test_utils=checks)
