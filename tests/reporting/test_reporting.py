"""The report and the card: complete, honest about what is absent, self-contained, and safe with hostile names."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser

import pytest

from hpr.plans.table import read_plan
from hpr.reporting import formatting, sections
from hpr.reporting import svg as figures
from hpr.reporting.card import render_card
from hpr.reporting.report import render_report

VOID = {"meta", "br", "wbr", "link", "img", "hr", "input"}
SELF_CLOSED = {"rect", "line", "path", "circle", "polyline"}


def low_rank(name, rank, rows=None):
    return {"u": f"{name}.u", "v": f"{name}.v", "rank": rank} | ({"rows": rows} if rows else {})


def entry(operator, damage=0.0, *terms):
    return {"operator": operator, "damage": damage, "terms": list(terms)}


BASE, BLOCK, NESTED = low_rank("base", 61), low_rank("block", 31), "base + block + private"
PLAN = {
    "format": 2,
    "model": {"class": "BertModel", "fingerprint": "0123456789abcdef", "dense_parameters": 22_713_216},
    "budget": {"text": "50%", "parameters": 11_356_608},
    "predicted_damage": 0.25,
    "stacks": {"encoder": {"path": "encoder.layer", "layers": 3}},
    "sites": {
        "embeddings.word_embeddings": entry(
            "segments", 0.02, low_rank("w0", 317, [0, 1000]), low_rank("w1", 93, [1000, 30522])
        ),
        "encoder.layer.0.attention.self.query": entry("tie", 0.01, {"u": "q01"}),
        "encoder.layer.1.attention.self.query": entry("tie", 0.01, {"u": "q01"}),
        "encoder.layer.2.attention.self.query": entry("keep"),
        "encoder.layer.0.output.dense": entry(NESTED, 0.03, BASE, BLOCK, low_rank("o0", 7)),
        "encoder.layer.1.output.dense": entry(NESTED, 0.03, BASE, BLOCK, low_rank("o1", 7)),
        "encoder.layer.2.output.dense": entry(NESTED, 0.03, BASE, low_rank("o2", 9)),
        "pooler.dense": entry("low rank", 0.0, low_rank("p", 13)),
    },
    "diagnostics": {},
}
PLAN_KEYS = ("label", "budget", "parameters", "predicted", "measured", "quality", "chosen")
PLANS = [
    ("all operators", "50%", 11_350_000, 0.25, 0.3, 0.786, True),
    ("low rank", "80%", 18_100_000, 0.08, 0.09, 0.81, False),
    ("tie", "50%", 11_300_000, 1.2, 0.9, None),
]
METRICS = {
    "format": 1,
    "model": {"name": "sentence-transformers/all-MiniLM-L6-v2", "class": "BertModel", "fingerprint": "0123456789abcdef"},
    "created": "2025-01-02T03:04:05Z",
    "seed": 7,
    "versions": {"hpr": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"},
    "hashes": {"model.safetensors": "9f86d081884c7d65"},
    "budget": {"text": "50%", "parameters": 11_356_608},
    "sizes": {
        "before": {"parameters": 22_713_216, "bytes": 90_864_192, "flops_per_token": 21.3e6, "latency_ms": 10.7},
        "after": {"parameters": 11_354_000, "bytes": 45_400_000, "flops_per_token": 13.9e6, "latency_ms": 7.2},
    },
    "parts": [
        {"name": "embeddings.word_embeddings", "before": 11_720_448, "after": 3_940_000},
        {"name": "encoder · attention.self.query", "before": 884_736, "after": 442_368},
    ],
    "quality": [
        {"name": "STS-B", "data": "1,379 pairs", "before": 0.82, "after": 0.786, "unit": "", "higher_is_better": True},
        {"name": "Divergence", "data": "docstrings", "before": None, "after": 0.06, "unit": "nats", "higher_is_better": False},
    ],
    "layers": {
        "names": {"encoder": 3},
        "similarity": {"encoder": [[1.0, 0.9, 0.7], [0.9, 1.0, 0.8], [0.7, 0.8, 1.0]]},
        "block_influence": {"encoder": [0.3, 0.1, 0.2]},
        "context_dependence": {"encoder": [0.1, 0.2, None]},
    },
    "boundaries": {"encoder · attention.self.query": {"probabilities": [0.04, 0.97], "entropy": 0.31}},
    "plans": [dict(zip(PLAN_KEYS, values, strict=False)) for values in PLANS],
    "operator_gains": [{"operator": "low rank", "damage_without": 0.4, "damage_with": 0.25}],
    "solver": {"damage": 0.25, "bound": 0.247, "gap": 0.012, "multiplier": 3e-8},
    "timing": {"profile": 41.2, "plan": 6.1, "fit": None},
    "calibration": {"source": "docstrings", "examples": 1024, "tokens": 21_544},
}
MINIMAL = {"format": 1, "model": {"name": None}, "sizes": {"before": {"parameters": 200}, "after": {"parameters": 90}}}
BARE_PLAN = {"format": 2, "model": {"class": "GPT2Model"}, "sites": {}}


class Balance(HTMLParser):
    """Fails where a tag is closed that is not the last one opened."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.ids, self.hrefs = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for key, value in attrs if key == "id"]
        self.hrefs += [value for key, value in attrs if key == "href"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in SELF_CLOSED

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(page):
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def nulled(data):
    """Every leaf replaced by null, and every list kept with one item of nulls."""
    if isinstance(data, dict):
        return {key: nulled(value) for key, value in data.items()}
    return [nulled(data[0])] if isinstance(data, list) and data else None


@pytest.mark.parametrize(
    ("plan", "metrics"),
    [(PLAN, METRICS), (PLAN, MINIMAL), (BARE_PLAN, MINIMAL), (PLAN, nulled(METRICS)), (PLAN, dict.fromkeys(METRICS))],
    ids=["full", "minimal", "bare", "nulls inside", "nulls"],
)
def test_renders_well_formed_and_self_contained(plan, metrics):
    page = render_report(plan, metrics)
    parser = parse(page)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<img|src=", page, flags=re.IGNORECASE)
    assert len(set(parser.ids)) == len(parser.ids)
    assert all(href.startswith("#") and href[1:] in parser.ids for href in parser.hrefs)
    assert page.count("<svg") == page.count('role="img" aria-label="') - page.count('class="meter"')
    assert ">None<" not in page
    assert "nan" not in re.findall(r"[a-z]+", page.lower())
    assert "None" not in render_card(plan, metrics)


def test_inputs_are_left_as_they_are():
    plan, metrics = copy.deepcopy(PLAN), copy.deepcopy(METRICS)
    first = render_report(plan, metrics), render_card(plan, metrics)
    assert (plan, metrics) == (PLAN, METRICS)
    assert first == (render_report(plan, metrics), render_card(plan, metrics))


def test_every_site_and_rank_is_on_the_map():
    page = render_report(PLAN, METRICS).replace("<wbr>", "")
    for name in PLAN["sites"]:
        assert page.count(name.replace("encoder.layer.", "encoder.")) >= 2  # on the map and in the list
    for rank in ["61+31+7", "61+9", ">13<", "full", "rank 317", "rank 93", "rows 0–999", "rows 1,000–30,521"]:
        assert rank in page
    for operator in {entry["operator"] for entry in PLAN["sites"].values()}:
        assert operator in page


def test_kin_slots_of_two_stacks_are_one_row_of_boundaries():
    keep, shared = {"operator": "keep", "damage": 0.0, "terms": []}, {"operator": "tie", "damage": 0.1, "terms": [{"u": "f"}]}
    far = {"operator": "tie", "damage": 0.1, "terms": [{"u": "g"}]}
    names = ["encoder.layers.0.fc", "encoder.layers.1.fc", "decoder.layers.0.fc", "decoder.layers.1.fc"]
    stacks = {name: {"path": f"{name}.layers", "layers": 2} for name in ("encoder", "decoder")}
    for entries, taken in (([keep, shared, shared, keep], [True, False, True]), ([far, shared, far, shared], [True] * 3)):
        sites = dict(zip(names, entries, strict=True))
        plan = {"format": 2, "model": {"class": "Bart"}, "stacks": stacks, "sites": sites}
        metrics = {"boundaries": {"encoder · fc + decoder · fc": {"probabilities": [0.9, 0.2, 0.8], "entropy": 0.3}}}
        plan_map = read_plan(plan)
        (section,) = sections.boundaries(plan_map, metrics)
        assert (section["stack"], section["rows"][0]["slot"], section["gaps"]) == (
            "encoder + decoder",
            "fc",
            ["0|1", "1|0", "0|1"],
        )
        assert [cell["taken"] for cell in section["rows"][0]["cells"]] == taken
        encoder, decoder = plan_map.stacks
        assert encoder.rows[0].cells[1].groups == decoder.rows[0].cells[0 if taken[1] is False else 1].groups
        assert "encoder + decoder" in render_report(plan, metrics)


def test_groups_join_neighbours_and_widen():
    plan_map = read_plan(PLAN)
    (stack,) = plan_map.stacks
    query, output = stack.rows
    assert [cell.kind for cell in query.cells] == ["shared", "shared", "keep"]
    assert [cell.joins_right for cell in query.cells] == [True, False, False]
    assert query.boundaries == (False, True)
    assert [[len(group.sites) for group in cell.groups] for cell in output.cells] == [[2, 3], [2, 3], [3]]
    assert len({group.label for group in plan_map.groups}) == len(plan_map.groups) == 3
    assert len({group.hue for cell in output.cells for group in cell.groups}) == 2
    assert [cell.site for cell in plan_map.outside] == ["embeddings.word_embeddings", "pooler.dense"]
    assert query.cells[0].partners == ("encoder.1.attention.self.query",)


def test_joins_run_through_a_group_and_stop_at_strangers():
    tied, other = [{"u": "shared"}], [{"u": "alone"}]
    terms = [tied, tied, tied, other, tied]  # not contiguous: the last one shares but has no neighbour to join
    sites = {f"h.{layer}.fc": {"operator": "tie", "terms": found} for layer, found in enumerate(terms)}
    cells = read_plan({"stacks": {"h": {"path": "h", "layers": 5}}, "sites": sites}).stacks[0].rows[0].cells
    assert [cell.joins_left for cell in cells] == [False, True, True, False, False]
    assert [cell.joins_right for cell in cells] == [True, True, False, False, False]
    assert [cell.kind for cell in cells] == ["shared", "shared", "shared", "private", "shared"]


def test_sites_are_placed_by_the_stacks_of_the_plan():
    keep = {"operator": "keep", "terms": []}
    sites = {f"decoder.layers.{layer}.mlp.experts.0.up": keep for layer in (0, 2)}
    stacks = {"decoder": {"path": "decoder.layers", "layers": 3}}
    (stack,) = read_plan({"stacks": stacks, "sites": sites}).stacks
    assert (stack.name, stack.layers, stack.rows[0].slot) == ("decoder", 3, "mlp.experts.0.up")
    assert stack.rows[0].cells[1] is None
    assert [cell.site for cell in stack.cells] == ["decoder.0.mlp.experts.0.up", "decoder.2.mlp.experts.0.up"]
    assert [cell.site for cell in read_plan({"sites": sites}).outside] == list(sites)
    (root,) = read_plan({"stacks": {"": {"path": "", "layers": 1}}, "sites": {"0.up": keep, "1": keep}}).stacks
    assert [cell.site for cell in root.cells] == ["0.up"]


def test_overlapping_segments_get_lanes():
    terms = [{"u": "a"}, low_rank("b", 4, [0, 10]), low_rank("c", 8, [5, 20]), low_rank("d", 2, [12, 20])]
    (cell,) = read_plan({"sites": {"wte": {"operator": "segments", "terms": terms}}}).outside
    assert cell.whole == "full"
    assert [[(piece.start, piece.stop, piece.text) for piece in lane] for lane in cell.lanes] == [
        [(0, 10, "4"), (10, 12, ""), (12, 20, "2")],
        [(0, 5, ""), (5, 20, "8")],
    ]


def test_hostile_names_are_escaped():
    evil = '"><script>alert(1)</script>'
    plan, metrics = copy.deepcopy(PLAN), copy.deepcopy(METRICS)
    plan["sites"][f"encoder.layer.0.{evil}"] = {"operator": evil, "damage": 0.1, "terms": [low_rank(evil, 3)]}
    plan["sites"][evil] = {"operator": evil, "damage": 0.1, "terms": [low_rank(evil, 3)]}
    metrics["model"] = {"name": evil, "class": evil, "fingerprint": evil}
    metrics["quality"][0] |= {"name": evil, "data": f"a | b\n# {evil}", "unit": evil}
    metrics["plans"][0] |= {"label": evil, "budget": evil}
    metrics["layers"]["similarity"][evil] = [[1.0]]
    metrics["boundaries"][f"{evil} · {evil}"] = {"probabilities": [0.5], "entropy": 0.1}
    for key in ("versions", "hashes", "timing"):
        metrics[key][evil] = 1.5
    page, card = render_report(plan, metrics), render_card(plan, metrics)
    parse(page)
    assert "<script" not in page
    prose = re.sub(r"`[^`\n]*`|```.*?```", "", card, flags=re.DOTALL)
    assert "<script" not in prose
    assert "\n# &" not in prose.replace("# &quot;", "")
    assert "base_model" not in card


def test_what_is_absent_says_so():
    page = render_report(BARE_PLAN, MINIMAL)
    for phrase in ("treat this model as untested", "Times were not recorded", "names no site", "Layer features"):
        assert phrase in page
    card = render_card(BARE_PLAN, MINIMAL)
    assert "treat this model as untested" in card
    assert "Seed: not recorded" in card
    assert "GPT2Model" in card


def test_figures_of_the_run_are_stated():
    page = render_report(PLAN, METRICS).replace("\u00a0", " ")
    for phrase in ("22.7 M", "45.4 MB", "down by 0.0340", "within 1.20 %", "Spearman ρ = 1.00", "9f86d081884c7d65"):
        assert phrase in page
    assert "50%, that is 11,356,608 parameters" in page


def test_quality_against_size_needs_plans_of_other_budgets():
    assert "Quality against size" in render_report(PLAN, METRICS)
    same = METRICS | {"plans": [row | {"budget": "50%"} for row in METRICS["plans"]]}
    page = render_report(PLAN, same)
    parse(page)
    assert "Quality against size" not in page
    assert "<code>--curve</code>" in page


def test_boundaries_are_shown_if_the_plan_has_them():
    heading = "Where groups of layers end"
    page = render_report(PLAN, METRICS)
    assert heading in page
    assert "temperature of the probabilities was fitted" in page
    assert heading not in render_report(PLAN, {key: value for key, value in METRICS.items() if key != "boundaries"})


def test_healing_is_drawn():
    rows = [{"step": step, "loss": 1 / step, "validation": 0.5 / step} for step in (10, 20, 30)]
    stages = [
        {"stage": "block by block", "steps": 10, "before": 0.5, "after": 0.05},
        {"stage": "end to end", "steps": 20, "before": 0.05, "after": 0.016},
    ]
    healing = {"before": 0.5, "after": 0.016, "best_step": 30, "seconds": 62, "recipe": {"steps": 30}}
    healing |= {"history": rows, "stages": stages}
    page = render_report(PLAN, METRICS | {"healing": healing})
    parse(page)
    assert "30 steps in 1\u00a0min 02\u00a0s changed the divergence" in page
    assert page.count("<title>step 30:") == 2
    assert "block by block, 10 steps" in page
    assert "- Healed: 30 steps in 1 min 02 s changed the divergence" in render_card(PLAN, METRICS | {"healing": healing})
    lost = sections.healing({"healing": healing | {"best_step": 0, "stages": stages[:1]}})
    assert "no check was better than the start" in lost["reading"]
    assert lost["stages"] == []
    assert sections.healing({"healing": {"best_step": 3}})["curves"] == []
    assert sections.healing({}) is None


def test_card_has_front_matter_figures_and_snippet():
    card = render_card(PLAN, METRICS)
    _, front, body = card.split("---\n", 2)
    lines = front.strip().split("\n")
    assert lines[0] == "library_name: transformers"
    assert "- hpr" in lines
    assert json.loads(lines[-1].removeprefix("base_model: ")) == METRICS["model"]["name"]
    for phrase in ("22.7 M", "11.4 M", "| STS-B |", "import hpr\n", "AutoModel", "SentenceTransformer", "torch 2.13.0"):
        assert phrase in body
    assert "## Limits" in body
    assert "9f86d081884c7d65" in body


def test_local_paths_are_no_base_model():
    metrics = METRICS | {"model": {"name": "/some/folder/model"}}
    assert "base_model" not in render_card(PLAN, metrics)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(768, "768"), (999_960, "1.00 M"), (22_713_216, "22.7 M"), (None, "not recorded"), (float("nan"), "not recorded")],
)
def test_counts(value, expected):
    assert formatting.count(value).replace("\u00a0", " ") == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(0.42, "0.420 s"), (125, "2 min 05 s"), (59.7, "1 min 00 s"), (7260, "2 h 01 min")]
)
def test_seconds(value, expected):
    assert formatting.seconds(value).replace("\u00a0", " ") == expected


def test_verdicts():
    row = {"before": 92.5, "after": 92.3, "unit": "%", "higher_is_better": True}
    assert formatting.verdict(row).replace("\u00a0", " ") == "down by 0.2 points, worse than the original"
    assert formatting.verdict(row | {"higher_is_better": False}).endswith("better than the original")
    assert formatting.verdict(row | {"before": None}).startswith("measured against the original")
    assert formatting.verdict({}) == "not measured"


def test_spearman():
    assert figures.spearman([(1, 2), (2, 3), (3, 9)]) == pytest.approx(1.0)
    assert figures.spearman([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1.0)
    assert figures.spearman([(1, 1), (2, 1), (3, 1)]) is None
    assert figures.spearman([(1, 1)]) is None


@pytest.mark.parametrize("size", [1, 6, 48])
def test_heatmaps_of_any_depth(size):
    svg = figures.heatmap([[1.0 if i == j else 0.5 for j in range(size)] for i in range(size)], "Similarity")
    parse(str(svg))
    assert svg.count("<title>") == size * size


def test_a_coded_plan_shows_bits_and_ranks_and_how_far_it_is_from_the_limit() -> None:
    sites = {name: entry("keep", 0.01) for name in PLAN["sites"]}
    thin = "encoder.layer.1.attention.self.query"
    sites[thin] = entry("low rank", 0.02, low_rank(thin, 26))
    diagnostics = {"solver": "coded rounding", "bytes": 4_000_000, "bits": dict.fromkeys(sites, 1.4), "decibels": 2.54}
    plan = PLAN | {"sites": sites, "rounding": {"step": 2e-4}, "diagnostics": diagnostics}
    metrics = METRICS | {"solver": "coded rounding", "rounding": {"step": 2e-4, "damage": 0.05, "decibels": 2.54}}
    page = re.sub(r"\s+", " ", render_report(plan, metrics))
    assert "1 is a product of two rounded factors" in page
    assert "5 are rounded and coded" in page
    assert "compressed on its own" not in page
    assert "2.5 dB" in page
    assert "2.5 decibels above" in page
    bare = render_report(plan, metrics | {"rounding": {"step": 2e-4, "damage": 0.05}})
    assert "limit of a code of so many bits was not recorded" in bare
    assert "\u00a0dB" not in bare
    assert "rounded and coded" in render_card(plan, metrics)
