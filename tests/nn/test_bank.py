"""The bank's forward passes against dense float64 references, gradients, copies and dtypes."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hpr.anatomy.model import Site
from hpr.errors import HprError
from hpr.nn.bank import FactorBank
from hpr.nn.embedding import SharedEmbedding
from hpr.nn.linear import SharedLinear
from hpr.nn.site import SharedSite
from hpr.plans.terms import FactorShape, Term

OUT, IN, RANK = 9, 7, 3

TERMS: dict[str, tuple[Term, ...]] = {
    "full": (Term("w"),),
    "low rank": (Term("u", "v", RANK),),
    "row scale": (Term("w", row_scale="r"),),
    "column scale": (Term("u", "v", RANK, column_scale="c"),),
    "both scales": (Term("w", row_scale="r", column_scale="c"),),
    "identity rows": (Term("u", "v", RANK, identity="u"),),
    "identity columns": (Term("u", "v", RANK, identity="v"),),
    "identity rows and scale": (Term("u", "v", RANK, row_scale="r", identity="u"),),
    "sum": (Term("w"), Term("u", "v", RANK)),
    "row segments": (
        Term("a", rows=(0, 2)),
        Term("u", "v", RANK, rows=(2, 7), row_scale="r"),
        Term("b", "v2", 1, rows=(7, OUT)),
    ),
    "segments in another order, one of two terms": (
        Term("b", rows=(6, OUT)),
        Term("u", "v", RANK, rows=(0, 6)),
        Term("u2", "v2", 2, rows=(0, 6), column_scale="c"),
    ),
    "segments that overlap": (Term("a", rows=(0, 6)), Term("u", "v", RANK, rows=(3, OUT), row_scale="r")),
    "sum with a segment": (Term("u", "v", RANK), Term("a", rows=(4, 6))),
}


def make_bank(terms: tuple[Term, ...], dtype: torch.dtype = torch.float64) -> FactorBank:
    site = Site("s", "linear", OUT, IN, has_bias=False)
    shapes = {name: shape for term in terms for name, shape in term.shapes(site).items()}
    bank = FactorBank(shapes, dtype)
    draw = torch.Generator().manual_seed(0)
    values: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        values[name] = torch.randn(shape.stored, generator=draw)
        if shape.identity:
            values[f"{name}.order"] = torch.randperm(max(shape.rows, shape.columns), generator=draw)
    bank.load(values)
    return bank


def reference(bank: FactorBank, terms: tuple[Term, ...]) -> Tensor:
    """Σ diag(r) U V diag(c), from the stored numbers, entry by entry where there is an identity block."""
    total = torch.zeros(OUT, IN, dtype=torch.float64)
    for term in terms:
        product = written_out(bank, term.u)
        if term.v is not None:
            product = product @ written_out(bank, term.v)
        if term.row_scale is not None:
            product = torch.diag(bank[term.row_scale].weight[0].double()) @ product
        if term.column_scale is not None:
            product = product @ torch.diag(bank[term.column_scale].weight[0].double())
        start, stop = term.rows or (0, OUT)
        total[start:stop] += product
    return total


def written_out(bank: FactorBank, name: str) -> Tensor:
    factor = bank[name]
    stored, shape = factor.weight.double(), factor.shape
    if not shape.identity:
        return stored
    full = torch.zeros(shape.rows, shape.columns, dtype=torch.float64)
    if shape.identity == "rows":
        for row, place in enumerate(factor.order.tolist()):
            full[row] = torch.eye(shape.columns)[place] if place < shape.columns else stored[place - shape.columns]
    else:
        for column, place in enumerate(factor.order.tolist()):
            full[:, column] = torch.eye(shape.rows)[place] if place < shape.rows else stored[:, place - shape.rows]
    return full


@pytest.mark.parametrize("kind", TERMS)
def test_linear_equals_the_dense_one(kind: str) -> None:
    terms = TERMS[kind]
    bank = make_bank(terms)
    source = nn.Linear(IN, OUT).double()
    site = SharedLinear(bank, terms, source)
    x = torch.randn(2, 5, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weight = reference(bank, terms)
    torch.testing.assert_close(site(x), x @ weight.T + source.bias)
    torch.testing.assert_close(site.dense_weight(), weight)
    site(x).square().sum().backward()
    for name, parameter in [*bank.named_parameters(), ("bias", site.bias)]:
        assert parameter is not None
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", TERMS)
def test_embedding_equals_the_dense_one(kind: str) -> None:
    terms = TERMS[kind]
    bank = make_bank(terms)
    site = SharedEmbedding(bank, terms, nn.Embedding(OUT, IN, padding_idx=0))
    ids = torch.arange(OUT).repeat(2).view(2, OUT)
    torch.testing.assert_close(site(ids), reference(bank, terms)[ids])
    site(ids).square().sum().backward()
    for name, parameter in bank.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["full", "low rank", "identity rows", "row segments"])
@pytest.mark.parametrize("wrong", [OUT, -1])
def test_an_id_beyond_the_table_raises_as_it_does_in_torch(kind: str, wrong: int) -> None:
    site = SharedEmbedding(make_bank(TERMS[kind]), TERMS[kind], nn.Embedding(OUT, IN))
    with pytest.raises(IndexError):
        site(torch.tensor([wrong]))


@pytest.mark.parametrize("bias", [True, False])
def test_rows_without_a_term_are_zero(bias: bool) -> None:
    terms = (Term("u", "v", RANK, rows=(5, 7)), Term("a", rows=(1, 3)))
    bank = make_bank(terms)
    site = SharedLinear(bank, terms, nn.Linear(IN, OUT, bias=bias).double())
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    expected = x @ reference(bank, terms).T
    torch.testing.assert_close(site(x), expected if site.bias is None else expected + site.bias)
    assert [(run.start, run.stop, len(run.terms)) for run in site.runs] == [
        (0, 1, 0),
        (1, 3, 1),
        (3, 5, 0),
        (5, 7, 1),
        (7, OUT, 0),
    ]


def test_other_terms_are_read_once_they_are_set() -> None:
    terms = TERMS["sum"]
    bank = make_bank(terms)
    site = SharedLinear(bank, terms, nn.Linear(IN, OUT).double())
    site.set_terms(terms[1:])
    x = torch.randn(3, IN, dtype=torch.float64)
    torch.testing.assert_close(site(x), x @ reference(bank, terms[1:]).T + site.bias)


def test_conv1d_is_read_as_out_by_in() -> None:
    source = Conv1D(OUT, IN).double()
    terms = TERMS["low rank"]
    bank = make_bank(terms)
    site = SharedLinear(bank, terms, source)
    x = torch.randn(3, IN, dtype=torch.float64)
    assert (site.out_features, site.in_features) == (OUT, IN)
    torch.testing.assert_close(site(x), x @ reference(bank, terms).T + source.bias)


def test_two_sites_add_up_their_gradients() -> None:
    terms = TERMS["full"]
    bank = make_bank(terms)
    first, second = (SharedLinear(bank, terms, nn.Linear(IN, OUT, bias=False)) for _ in range(2))
    x = torch.ones(1, IN, dtype=torch.float64)
    (first(x) + second(2 * x)).sum().backward()
    torch.testing.assert_close(bank["w"].weight.grad, torch.full((OUT, IN), 3.0, dtype=torch.float64))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bank = make_bank(TERMS["sum"], torch.float32)
        self.site = SharedLinear(self.bank, TERMS["sum"], nn.Linear(IN, OUT))

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x)


def test_a_copy_reads_its_own_bank() -> None:
    model = Whole()
    twin = copy.deepcopy(model)
    x = torch.ones(1, IN)
    before = model(x)
    with torch.no_grad():
        twin.bank["w"].weight.zero_()
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)
    assert twin.site.bank is twin.bank


def test_replaced_parameters_are_seen() -> None:
    model = Whole()
    x = torch.ones(1, IN)
    model.bank["w"].weight = nn.Parameter(torch.zeros(OUT, IN))
    torch.testing.assert_close(model(x), x @ model.site.dense_weight().T + model.site.bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = Whole()
    expected = model(torch.ones(1, IN))
    found = model.to(dtype)(torch.ones(1, IN, dtype=dtype))
    assert found.dtype == dtype
    assert model.site.weight.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_factors_are_stored_once() -> None:
    terms = TERMS["low rank"]
    bank = make_bank(terms)
    model = nn.ModuleList([SharedLinear(bank, terms, nn.Linear(IN, OUT, bias=False)) for _ in range(3)])
    model.append(bank)
    assert sum(parameter.numel() for parameter in model.parameters()) == RANK * (OUT + IN)
    assert all(isinstance(site, SharedSite) and site.flops_per_row() == 2 * RANK * (OUT + IN) for site in list(model)[:3])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "missing"),
        ({"w": torch.zeros(2, 2)}, r"of shape \(2, 2\)"),
        ({"w": torch.full((OUT, IN), torch.nan)}, "not finite"),
    ],
)
def test_load_names_the_bad_factor(values: dict[str, Tensor], words: str) -> None:
    bank = FactorBank({"w": FactorShape(OUT, IN)})
    with pytest.raises(HprError, match=rf"factor W\.weight is .*{words}"):
        bank.load(values)


@pytest.mark.parametrize("names", [("a.b", "a-b"), ("a.b", "A.B")])
def test_names_that_cannot_be_keys(names: tuple[str, ...]) -> None:
    with pytest.raises(HprError, match="another name"):
        FactorBank({name: FactorShape(2, 2) for name in names})
