"""What the benchmark scripts count, against direct computations on tiny random models."""

import math
from dataclasses import replace

import pytest
import torch
import transformers as tf
from torch import nn

import heal_minilm
import hpr
import phonemes
import shapes
import stories
from common import peers, tables, texts
from common.comparison import Ground, dropped, ground, spanning, students
from common.paths import shared
from common.tasks import sts_pairs
from hpr.anatomy.lookup import weight_at
from hpr.data.batches import Batches
from hpr.data.splits import Splits
from hpr.plans.plan import keep_all
from hpr.plans.terms import KEEP, Entry, Term
from hpr.profiling.objectives import OBJECTIVES


class Letters:
    """Letters as ids, after a start token."""

    pad_token_id = 0

    def __call__(self, text: str, **settings: object) -> dict[str, list[int]]:
        return {"input_ids": [1, *(ord(letter) - 90 for letter in text)]}


@pytest.fixture
def llama(build) -> nn.Module:
    model = build("llama", tf.AutoModelForCausalLM)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def grounds(model: nn.Module) -> Ground:
    ids = torch.randint(3, 40, (8, 12), generator=torch.Generator().manual_seed(2))
    batches = Batches([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], range(8))
    return ground(model, Splits(batches, batches, batches, "random", True), OBJECTIVES["causal-lm"], "layers.*")


def test_bits_per_character(llama):
    documents = ["abcdefghijklmnopq", "ab", "a", "qponmlkjihgf"]
    context = 8
    total = 0.0
    for document in documents:
        ids = Letters()(document)["input_ids"]
        for place in range(1, len(ids)):  # one token at a time, by the rule of the windows
            start = 0 if place < context else (place - context) // (context // 2) * (context // 2) + context // 2
            before = torch.tensor([ids[start:place]])
            assert place < context or context // 2 <= before.shape[1] < context
            with torch.no_grad():
                total -= float(llama(input_ids=before).logits[0, -1].double().log_softmax(-1)[ids[place]]) / math.log(2)
    found = stories.bits_per_character(llama, Letters(), documents, context)
    assert found == pytest.approx(total / sum(map(len, documents)), rel=1e-5)


def test_exact_match(build):
    torch.manual_seed(0)
    model = build("bart", tf.AutoModelForSeq2SeqLM)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    signs = "____abcdefghijklmnopqrstuvwxyzABCDEFGHIJ"
    speller = phonemes.Speller(signs, signs)
    words = ["abc", "zebra", "a", "hello", "xyz?"]
    expected = []
    for word in words:
        ids = torch.tensor([speller([word])["input_ids"][0]])
        written = [2]  # where the decoder starts
        while len(written) < 23 and len(written) <= ids.shape[1] + 32:
            with torch.no_grad():
                logits = model(input_ids=ids, decoder_input_ids=torch.tensor([written])).logits
            written.append(int(logits[0, -1].argmax()))
            if written[-1] == 2:
                break
        expected.append("".join(signs[number] for number in written[1:] if number > 3))
    truth = [*expected[:3], "wrong", "wrong"]
    assert phonemes.exact_match(model, speller, words, truth) == 0.6


def test_peers_keep_what_they_say(llama):
    on = grounds(llama)
    for name in ("svd", "svd_llm", "basis_sharing"):
        for share in (0.7, 0.5):
            student, parameters = getattr(peers, name)(llama, on.sites, on.profile, share)
            assert share * on.dense <= parameters <= (share + 0.15) * on.dense
            weights = {site.name: weight_at(student, site) for site in on.sites}
            ranks = {name: int(torch.linalg.matrix_rank(weight, rtol=1e-4)) for name, weight in weights.items()}
            if name != "basis_sharing":
                assert parameters == sum(ranks[site.name] * (site.out_features + site.in_features) for site in on.sites)
            assert any(ranks[site.name] < min(site.out_features, site.in_features) for site in on.sites)


def test_dropped_layers_are_the_cheapest_and_generate(llama):
    on = grounds(llama)
    made, within = dropped(on, 0.5)
    assert (made.parameters, len(made.facts["dropped"])) == (on.dense * 2 // 3, 1)  # of three layers
    assert (within.parameters, within.facts["dropped"][0]) == (on.dense // 3, made.facts["dropped"][0])
    losses = []
    for layer in range(3):
        batch = on.data.rescoring[0]
        with torch.no_grad():
            logits = peers.drop_layers(llama, [layer], "layers")(**batch).logits[:, :-1]
        losses.append(float(nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:])))
    assert made.facts["dropped"] == [losses.index(min(losses))]
    for layer in range(3):
        student = peers.drop_layers(llama, [layer], "layers")
        prompt = torch.tensor([[1, 5, 9]])
        runs = [student.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)]
        assert torch.equal(*runs)


def test_students_stay_within_the_budget(llama):
    on = grounds(llama)
    made = list(students(on, 0.6))
    assert [one.method for one in made] == ["hpr, no refit", "hpr, refit", "peer: svd_llm", "peer: basis_sharing"]
    for one in made[:2]:
        assert one.parameters <= 0.6 * on.dense
    plan = made[0].plan
    assert plan is not None
    assert tables.count(plan) == made[0].facts["operators"]
    assert sum(parameter.numel() for parameter in made[0].student.parameters()) <= plan.parameters(on.draft.anatomy)


def test_spanning_groups(build):
    anatomy = hpr.describe(build("bart"))
    entries = {site.name: Entry(KEEP) for site in anatomy.sites}
    names = ("encoder.layers.0.fc1", "decoder.layers.1.fc1")
    entries |= {name: Entry("tie", (Term("one"),)) for name in names}
    entries |= {name: Entry("tie", (Term("two"),)) for name in ("encoder.layers.0.fc2", "encoder.layers.1.fc2")}
    plan = replace(keep_all(anatomy), entries=entries)
    assert [set(group) for group in spanning(plan, anatomy)] == [set(names)]


def test_tables():
    table = tables.markdown([{"name": "a", "bits": 1.25}, {"name": "b", "bits": None}], {"name": "", "bits": ".1f"})
    assert table.splitlines() == ["| name | bits |", "|---|---|", "| a | 1.2 |", "| b |  |"]


def test_shapes_are_those_of_their_names():
    counts = {}
    for name, shape in shapes.SHAPES.items():
        with torch.device("meta"):
            model = getattr(tf, shape.model)(shape.config())
        counts[name] = round(sum(parameter.numel() for parameter in model.parameters()) / 1e6)
    assert counts == {"bert-base": 109, "gpt2-small": 124, "t5-small": 61, "whisper-tiny": 38, "vit-b-16": 87}


def test_probes_are_those_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    draw = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(400, 8, generator=draw, dtype=torch.float64), dim=-1)
    labels = (rows[:, 0] + 0.3 * torch.randn(400, generator=draw) > 0).long()
    weight = heal_minilm.fit_probe(rows, labels)
    found = heal_minilm._logits(weight, rows).argmax(-1)
    expected = LogisticRegression(C=1e4, max_iter=5000).fit(10 * rows.numpy(), labels.numpy()).predict(10 * rows.numpy())
    assert float((found == torch.from_numpy(expected)).double().mean()) > 0.99


def test_the_mixture_holds_no_sentence_that_is_tested_on():
    try:
        data = shared() / "data"
    except FileNotFoundError as error:
        pytest.skip(str(error))
    known = {
        text for name in ("dev", "test") for side in sts_pairs(data / "sts-b" / f"stsb-en-{name}.csv")[:2] for text in side
    }
    kinds = texts.unlabelled()
    assert len(kinds) == 6
    assert all(len(several) > 4000 and len(set(several)) == len(several) for several in kinds.values())
    assert not known & {text for several in kinds.values() for text in several}
    assert texts.mixture(3) == texts.mixture(3)
