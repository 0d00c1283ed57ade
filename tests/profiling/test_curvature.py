"""Curvature: sums against autograd example by example, dead rows and sites, ties, and a model that is left as it was."""

from collections.abc import Callable, Sequence

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at
from hpr.errors import HprError
from hpr.profiling import curvature
from hpr.profiling.curvature import measure_curvature, memory_needed
from hpr.profiling.distributions import GAUSSIAN
from hpr.profiling.objectives import OBJECTIVES, Objective
from hpr.profiling.profile import SiteStatistics
from hpr.runtime.batch import POSITIONAL, Batch

Build = Callable[..., nn.Module]


class Net(nn.Module):
    """Linear → tanh → Linear on (B, T, I), or on (B, I)."""

    def __init__(self, bias: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 7, bias=bias)
        self.second = nn.Linear(7, 4, bias=bias)
        self.unused = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fixed(name: str = "fixed") -> Objective:
    """Gaussian outputs whose drawn direction depends on the example, not on the batch; rows of zeros are not read."""

    class Fixed(Objective):
        def loss(self, outputs: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
            return (outputs * direction_for(outputs, batch[POSITIONAL])).sum()

    return Fixed(name, lambda outputs, batch: (outputs, torch.ones(outputs.shape[:-1])), distribution=GAUSSIAN)


def direction_for(outputs: Tensor, batch: Tensor) -> Tensor:
    key = batch.sum(-1, keepdim=True)
    reached = (batch.abs().amax(-1, keepdim=True) > 0).float()
    return reached * torch.cos(100 * key + torch.arange(outputs.shape[-1]))


def batches_with_padding(bare: bool = False) -> list[Tensor]:
    if bare:
        return [drawn(3, 5, seed=seed) for seed in range(4)]
    batches = [drawn(3, 6, 5, seed=seed) + 1 for seed in range(4)]
    for index, batch in enumerate(batches):
        batch[index % 3, 3:] = 0
    return batches


def brute_force(model: Net, batches: Sequence[Tensor]) -> dict[str, dict[str, Tensor | float]]:
    """Sums by autograd, one example at a time, float64; inputs around the mean that the first batch shows.

    ``left`` and ``right`` are put together with the traces of the first batch.
    """
    model = model.double()
    centres: dict[str, Tensor] = {}
    found: dict[str, dict[str, Tensor | float]] = {}
    sizes: dict[str, dict[str, float]] = {}
    for stage in ("mean", "sizes", "all"):
        found = {}
        for batch in batches if stage == "all" else batches[:1]:
            for example in batch.double():
                inputs = {"first": example[None], "second": torch.tanh(model.first(example[None]))}
                outputs = {"first": model.first(example[None])}
                outputs["second"] = model.second(torch.tanh(outputs["first"]))
                loss = (outputs["second"] * direction_for(outputs["second"], example[None])).sum()
                gradients = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
                for name in ("first", "second"):
                    g, x = gradients[name].reshape(-1, gradients[name].shape[-1]), inputs[name].detach()
                    x = x.reshape(-1, x.shape[-1])
                    reached = g.square().sum(1) > 0
                    g, x = g[reached], x[reached]
                    sums = found.setdefault(name, {"rows": 0.0, "mean": 0.0, "g": 0.0, "x": 0.0, "outer": 0.0, "inner": 0.0})
                    sums["rows"] += len(g)
                    sums["mean"] = sums["mean"] + x.sum(0)
                    x = x - centres.get(name, 0.0)
                    weight_gradient = g.T @ x
                    sums["g"] = sums["g"] + g.T @ g
                    sums["x"] = sums["x"] + (x * g.square().sum(1, keepdim=True)).T @ x
                    sums["outer"] = sums["outer"] + weight_gradient @ weight_gradient.T
                    sums["inner"] = sums["inner"] + weight_gradient.T @ weight_gradient
        if stage == "mean" and model.first.bias is not None:
            centres = {name: sums["mean"] / sums["rows"] for name, sums in found.items()}
        if stage == "sizes":
            sizes = {name: {part: float(sums[part].trace()) for part in ("g", "x", "outer")} for name, sums in found.items()}
    for name, sums in found.items():
        sums["left"] = sums["g"] / sizes[name]["g"] + sums["outer"] / sizes[name]["outer"]
        sums["right"] = sums["x"] / sizes[name]["x"] + sums["inner"] / sizes[name]["outer"]
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("formed", [True, False])
def test_sums_are_those_of_autograd_example_by_example(
    bias: bool, bare: bool, formed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curvature, "_worth_forming", lambda *_: formed)
    batches = batches_with_padding(bare)
    found, examples = measure_curvature(Net(bias), describe(Net(bias)), batches, fixed())
    assert examples == 12
    for name, sums in brute_force(Net(bias), batches).items():
        one = found[name]
        rows = sums["rows"] / examples
        trace = float(sums["outer"].trace()) / examples  # of the Fisher matrix: E ‖Σ g xᵀ‖²
        assert one.rows == pytest.approx(rows)
        left = sums["left"] / sums["left"].trace() * trace / rows
        right = sums["right"] / sums["right"].trace()
        torch.testing.assert_close(one.left, left, rtol=1e-4, atol=1e-5 * float(left.abs().max()))
        torch.testing.assert_close(one.right, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))
        assert one.rows * float(one.left.trace() * one.right.trace()) == pytest.approx(trace, rel=1e-4)
        if bias:
            torch.testing.assert_close(one.mean, sums["mean"] / sums["rows"], rtol=1e-4, atol=1e-5)
        else:
            assert one.mean is None
        assert one.left.dtype == one.right.dtype == torch.float64
    assert not bare or found["first"].rows == 1
    assert bare or found["first"].rows == 5  # of each three examples one has three rows of padding


class Turned(Net):
    """The same with positions first inside."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


def test_rows_belong_to_their_examples_where_positions_come_first() -> None:
    batches = batches_with_padding()
    expected, _ = measure_curvature(Net(), describe(Net()), batches, fixed())
    found, _ = measure_curvature(Turned(), describe(Turned()), batches, fixed())
    for name, one in expected.items():
        torch.testing.assert_close(found[name].left, one.left, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found[name].right, one.right, rtol=1e-5, atol=1e-7)


def test_a_linear_that_reads_one_vector() -> None:
    class OneVector(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(torch.ones(5))

    found, _ = measure_curvature(OneVector(), describe(OneVector()), [drawn(3, 5)], OBJECTIVES["hidden"])
    assert found["first"].rows == 4 / 3  # three examples, and the vector


def test_sites_without_gradient_have_no_rows() -> None:
    found, _ = measure_curvature(Net(), describe(Net()), batches_with_padding(), fixed())
    dead = found["unused"]
    assert not dead.has_gradient
    assert dead.rows == 0
    assert float(dead.left.abs().sum() + dead.right.abs().sum()) == 0
    assert found["first"].has_gradient


def test_results_do_not_depend_on_the_batches() -> None:
    """But for the first look, which here sees the same first batch."""
    whole = torch.cat(batches_with_padding())
    anatomy = describe(Net(False))
    one, count = measure_curvature(Net(False), anatomy, [whole[:4], whole[4:]], fixed())
    for size in (1, 5):
        other, again = measure_curvature(Net(False), anatomy, [whole[:4], *whole[4:].split(size)], fixed())
        assert count == again == 12
        for name in ("first", "second"):
            assert one[name].rows == pytest.approx(other[name].rows)
            torch.testing.assert_close(one[name].left, other[name].left, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one[name].right, other[name].right, rtol=1e-4, atol=1e-5)


def test_many_batches_lose_nothing_between_flushes() -> None:
    batches = [drawn(1, 2, 5, seed=seed) for seed in range(2 * curvature._FLUSH + 3)]
    found, examples = measure_curvature(Net(False), describe(Net(False)), batches, fixed())
    sums = brute_force(Net(False), batches)["second"]
    assert found["second"].rows == pytest.approx(2)
    expected = float(sums["outer"].trace()) / examples
    assert found["second"].rows * float(found["second"].left.trace()) == pytest.approx(expected, rel=1e-4)


def test_sums_in_bands_are_the_upper_triangle() -> None:
    a = drawn(50, 500)
    total = torch.zeros(500, 500)
    curvature._add_upper(total, a, 2 * a)
    torch.testing.assert_close(curvature._mirrored(total), 2 * a.T @ a, rtol=1e-4, atol=1e-3)


def test_the_same_seed_gives_the_same_statistics() -> None:
    batches = batches_with_padding()
    first, second, third = (
        measure_curvature(Net(), describe(Net()), batches, OBJECTIVES["hidden"], seed)[0]["first"] for seed in (0, 0, 1)
    )
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)
    assert not torch.equal(first.left, third.left)


def test_wide_sides_keep_their_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = batches_with_padding()
    full, _ = measure_curvature(Net(), describe(Net()), batches, fixed())
    entire = memory_needed(describe(Net()))
    monkeypatch.setattr(curvature, "DIAGONAL_ABOVE", 6)
    found, _ = measure_curvature(Net(), describe(Net()), batches, fixed())
    assert found["first"].left.shape == found["second"].right.shape == (7,)
    torch.testing.assert_close(found["first"].left, full["first"].left.diagonal(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["first"].right, full["first"].right, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["second"].right, full["second"].right.diagonal(), rtol=1e-4, atol=1e-6)
    assert memory_needed(describe(Net())) == 8 * (7 + 25 + 16 + 7 + 4 + 9)
    assert entire == 8 * (49 + 25 + 16 + 49 + 4 + 9)


@pytest.mark.parametrize("batch", [torch.ones(1, 5), torch.ones(2, 3, 5), torch.zeros(2, 3, 5)])
def test_inputs_that_never_vary_give_finite_statistics(batch: Tensor) -> None:
    """Around their mean they are zero; the bias takes up any change."""
    objective = OBJECTIVES["hidden"]
    found, _ = measure_curvature(Net(), describe(Net()), [batch, batch], objective)
    for one in found.values():
        assert torch.isfinite(one.left).all()
        assert torch.isfinite(one.right).all()


# --- embeddings and ties


class Reader(nn.Module):
    """Embedding → += positions → Linear; ``tied`` reads the table as a head instead."""

    def __init__(self, tied: bool = False, vocabulary: int = 11):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(vocabulary, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, vocabulary if tied else 3, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x += 0.1
        return self.head(torch.tanh(self.inner(x)))


def test_embedding_counts() -> None:
    """Also: adding in place to the output of an embedding works while the hooks are on."""
    ids = torch.tensor([[1, 1, 2], [3, 1, 4]])
    model = Reader()
    found, examples = measure_curvature(model, describe(model), [ids, ids], OBJECTIVES["hidden"])
    one = found["table"]
    assert examples == 4
    assert one.rows == 3
    assert one.left.tolist() == pytest.approx([0, 3 / 6, 1 / 6, 1 / 6, 1 / 6, 0, 0, 0, 0, 0, 0])
    assert one.right.shape == (4, 4)
    assert float(one.right.trace()) > 0
    assert one.mean is None


def test_embedding_moment_against_autograd() -> None:
    ids = torch.tensor([[1, 1, 2], [3, 1, 4]])
    model = Reader()

    class Summed(Objective):
        def loss(self, outputs: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
            return outputs.square().sum()

    objective = Summed("sum", lambda outputs, batch: (outputs, torch.ones(outputs.shape[:2])), False)
    found, _ = measure_curvature(model, describe(model), [ids], objective)
    x = model.table(ids).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.head(torch.tanh(model.inner(x + 0.1))).square().sum(), x)
    rows = gradient.reshape(-1, 4).double()
    torch.testing.assert_close(found["table"].right, rows.T @ rows / 6, rtol=1e-4, atol=1e-7)


class Sliced(Reader):
    """Adds a slice of a table of positions, or its rows by number, as Whisper's decoder does."""

    def __init__(self, by_number: bool):
        super().__init__()
        self.positions = nn.Embedding(5, 4)
        self.by_number = by_number

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        rows = self.positions.weight[torch.arange(length).expand(ids.shape) if self.by_number else slice(length)]
        return self.head(torch.tanh(self.inner(self.table(ids) + rows)))


def test_a_table_that_is_sliced_counts_like_one_that_is_looked_up() -> None:
    batches = [torch.randint(0, 11, (20, 3), generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    found = []
    for by_number in (False, True):
        model = Sliced(by_number)
        found.append(measure_curvature(model, describe(model), batches, OBJECTIVES["hidden"])[0]["positions"])
    assert all(one.left.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0]) for one in found)
    assert [one.rows for one in found] == [3 / 20, 3]  # a slice is shared by the examples of a batch
    assert found[0].fisher_trace == pytest.approx(found[1].fisher_trace, rel=0.25)


def test_a_slice_of_columns_is_no_look_up() -> None:
    model = Reader()
    model.forward = lambda ids: model.inner(model.table.weight[:, :2].repeat(1, 2))[ids]  # type: ignore[method-assign]
    found, _ = measure_curvature(model, describe(model), [torch.tensor([[1, 2]])], OBJECTIVES["hidden"])
    assert not found["table"].has_gradient
    assert found["inner"].has_gradient


@pytest.mark.parametrize("large", [False, True])
def test_a_tied_table_and_head_are_one_site_with_both_uses(monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    if large:
        monkeypatch.setattr(curvature, "DIAGONAL_ABOVE", 10)
    ids = torch.randint(1, 8, (6, 5), generator=torch.Generator().manual_seed(0))
    model = Reader(tied=True)
    anatomy = describe(model)
    assert anatomy["table"].aliases == ("head",)
    found, _ = measure_curvature(model, anatomy, [ids], OBJECTIVES["causal-lm"])
    assert set(found) == {"table", "inner"}
    one = found["table"]
    assert one.left.shape == (11,)
    assert one.right.shape == (4, 4)
    assert (one.left > 0).all()  # the head reads every row, also of tokens 8 to 10 that never come up
    assert float(one.left.sum() * one.right.trace()) == pytest.approx(1)
    assert one.mean is None
    with torch.no_grad():
        model.head.weight = nn.Parameter(model.table.weight.clone())  # the same numbers, untied: the uses apart
    apart, _ = measure_curvature(model, describe(model), [ids], OBJECTIVES["causal-lm"])
    traces = [part.rows * trace(part.left) * trace(part.right) for part in (apart["table"], apart["head"])]
    assert one.rows == pytest.approx(sum(traces), rel=1e-4)


def trace(moment: Tensor) -> float:
    return float(moment.sum() if moment.dim() == 1 else moment.trace())


def test_a_small_tied_masked_language_model(build: Build, ids: Tensor) -> None:
    model = build("bert", tf.AutoModelForMaskedLM)
    found, _ = measure_curvature(model, describe(model), [{"input_ids": ids}], OBJECTIVES["masked-lm"])
    assert all(one.has_gradient for name, one in found.items() if "pooler" not in name)


# --- failures, and what is left behind


def traces(model: nn.Module) -> tuple:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    return [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()], hooks


@pytest.mark.parametrize("bad", [None, 0, 3])
def test_the_model_is_left_as_it_was_and_a_bad_batch_is_named(bad: int | None) -> None:
    model = Net().train()
    model.second.eval()
    model.first.bias.requires_grad_(False)
    before, weights = traces(model), [p.detach().clone() for p in model.parameters()]
    batches = batches_with_padding()
    if bad is None:
        measure_curvature(model, describe(model), batches, fixed())
    else:
        batches[bad][0, 0, 0] = float("nan")
        with pytest.raises(HprError, match=f"batch {bad} is nan"):
            measure_curvature(model, describe(model), batches, OBJECTIVES["hidden"])
    assert traces(model) == before
    assert all(torch.equal(p, old) and p.grad is None for p, old in zip(model.parameters(), weights, strict=True))


def test_other_exceptions_leave_nothing_behind() -> None:
    model = Net().train()
    before = traces(model)
    with pytest.raises(HprError, match=r"cannot read batch 1 \(float32 \(2, 3\)\)"):
        measure_curvature(model, describe(model), [torch.ones(2, 5), torch.ones(2, 3)], fixed())
    assert traces(model) == before
    model.forward = lambda x: torch.empty(1 << 50)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="memory"):
        measure_curvature(model, describe(model), [torch.ones(2, 5)], fixed())
    del model.forward
    assert traces(model) == before


def test_no_batches() -> None:
    with pytest.raises(HprError, match="at least one"):
        measure_curvature(Net(), describe(Net()), [], fixed())


# --- the unit: predicted damage against the true divergence of a small change


def predicted(one: SiteStatistics, change: Tensor) -> float:
    """½ N tr(left Δ right Δᵀ), without any damping or smoothing."""
    left, right = (side.diag() if side.dim() == 1 else side for side in (one.left, one.right))
    return 0.5 * one.rows * float((left @ change @ right @ change.T).trace())


@pytest.mark.parametrize(
    ("objective", "head"),
    [("classification", tf.AutoModelForSequenceClassification), ("embedding", tf.AutoModel), ("masked-lm", None)],
)
@torch.no_grad()
def test_predicted_damage_has_the_unit_of_the_true_divergence(build: Build, objective: str, head: type | None) -> None:
    model = build("bert", head or tf.AutoModelForMaskedLM)
    if head is None:
        model.cls.predictions.decoder.weight = nn.Parameter(model.cls.predictions.decoder.weight.clone())
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(4)  # so that the layers do something
    goal, anatomy = OBJECTIVES[objective], describe(model)
    draw = torch.Generator().manual_seed(1)
    batches = []
    for length in (4, 7, 9, 11) * 4:
        mask = torch.ones(32, length, dtype=torch.long)
        mask[::4, length // 2 :] = 0
        batches.append({"input_ids": torch.randint(3, 40, (32, length), generator=draw), "attention_mask": mask})
    found, examples = measure_curvature(model, anatomy, batches, goal)
    assert examples == 512
    ratios = []
    model.double()

    def divergence(expected: list) -> float:
        """As the objective has it, but float64: the changes are tiny."""
        total = 0.0
        for old, batch in zip(expected, batches, strict=True):
            read, weight = goal.read(model(**batch), batch)
            if goal.distribution.logits:
                old, read = old.log_softmax(-1), read.log_softmax(-1)
                total += float(((old.exp() * (old - read)).sum(-1) * weight).sum())
            else:
                total += 0.5 * float(((old - read).square().sum(-1) * weight).sum())
        return total / examples

    expected = [goal.read(model(**batch), batch)[0] for batch in batches]
    for site in anatomy.sites:
        one = found[site.name]
        if not one.has_gradient or site.name.endswith(("position_embeddings", "token_type_embeddings")):
            continue
        module = module_at(model, site.name)
        weight, bias = module.weight.clone(), getattr(module, "bias", None)
        old = None if bias is None else bias.clone()
        change = torch.randn(weight.shape, generator=draw).double() * 0.02 * weight.std()
        module.weight += change
        if one.mean is not None:
            bias -= change @ one.mean
        ratios.append(predicted(one, change) / divergence(expected))
        module.weight.copy_(weight)
        if old is not None:
            bias.copy_(old)
    values = torch.tensor(ratios).log2()
    assert len(values) > 15
    assert values.median().abs() < 0.5, values
    assert (values.abs() < 1.6).all(), values
