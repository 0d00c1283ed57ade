"""A class whose older files have other names and joined weights: HPR's files have the names of its modules."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from transformers import conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

import hpr

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PARTS = [f".{name}.weight" for name in ("query", "key", "value")]
OLDER = [  # the first changes a name that the modules have, as those of TIPS v2 do
    WeightRenaming(r"word_embeddings\.", "embeddings.word_embeddings."),
    WeightConverter(source_patterns=r"\.in_proj_weight", target_patterns=PARTS, operations=[Chunk(dim=0)]),
]


class Older(tf.BertModel):
    """BERT, with older files of another kind."""


@pytest.mark.parametrize("budget", ["75%", "40%bytes"])
def test_a_class_with_joined_weights_in_its_older_files(budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversion_mapping.get_checkpoint_conversion_mapping("bert")  # fills the table
    table = conversion_mapping._checkpoint_conversion_mapping_cache
    monkeypatch.setitem(table, "Older", OLDER)
    monkeypatch.setattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", {"Older"})
    torch.manual_seed(0)
    model = Older(tf.BertConfig(**SMALL)).eval()  # type: ignore[arg-type]
    batches = [{"input_ids": torch.randint(3, 64, (4, 9))} for _ in range(3)]
    profile = hpr.profile(model, batches)
    student = hpr.share(model, hpr.plan(model, profile, budget), profile)
    with torch.no_grad():
        expected = student(**batches[0]).last_hidden_state
        again = Older.from_pretrained(hpr.save(student, tmp_path / "out")).eval()
        assert torch.equal(again(**batches[0]).last_hidden_state, expected)
        once_more = Older.from_pretrained(hpr.save(again, tmp_path / "again")).eval()
        assert torch.equal(once_more(**batches[0]).last_hidden_state, expected)
        hpr.unshare(again).save_pretrained(tmp_path / "dense")  # in the names of the older files
        dense = Older.from_pretrained(tmp_path / "dense").eval()
        torch.testing.assert_close(dense(**batches[0]).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
