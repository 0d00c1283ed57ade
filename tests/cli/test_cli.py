"""The command line on a tiny model: every verb for real, results as JSON, exit codes, and nothing half-written."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

import hpr
import hpr.checkpoints.save
from hpr.cli import console, program
from hpr.cli.program import app
from hpr.data.files import suffixes
from hpr.nn.bank import parameters

VERBS = ("inspect", "profile", "plan", "share", "unshare", "export", "heal", "online", "eval", "bench", "report", "compress")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(35))]
FILES = {"config.json", "model.safetensors", "plan.json", "metrics.json", "report.html", "README.md"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny model of random weights, texts, and a profile and plan of it."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    config = tf.BertConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=40,
        max_position_embeddings=24,
        pad_token_id=0,
    )
    tf.BertModel(config).save_pretrained(folder / "model")
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    tf.BertTokenizer(str(folder / "vocab.txt"), model_max_length=24).save_pretrained(folder / "model")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS[5:], k=draw.randint(3, 9))) for _ in range(64)]
    (folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    model, profile, plan = (str(folder / name) for name in ("model", "profile.safetensors", "plan.json"))
    run("profile", model, "--data", str(folder / "texts.txt"), "-o", profile)
    run("plan", model, "--profile", profile, "--budget", "60%", "--no-align", "-o", plan)  # some tests share without it
    return folder


def run(*arguments, code=0):
    """Run a verb in this process and check its exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})
    assert result.exit_code == code, f"{result.exit_code}\n{result.output}\n{result.exception!r}"
    return result


def said(result):
    """What was written to stderr, on one line."""
    return " ".join(result.stderr.split())


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def left_behind(folder):
    """Files that a write began and did not end."""
    return [path.name for path in folder.rglob("*") if path.name.startswith(".") or "partial" in path.name]


# --- help, version, usage


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb):
    text = run(verb, "--help").stdout
    assert "Example" in text
    assert f"hpr {verb}" in text.split("Example")[1]
    assert max(map(len, text.splitlines())) <= 80


def test_help_names_every_verb_and_the_exit_codes():
    text = run("--help").stdout
    assert all(f" {verb} " in text for verb in VERBS)
    assert "2 bad input" in text


def test_help_of_data_lists_every_format():
    text = " ".join(run("profile", "--help").stdout.replace("│", " ").split())
    assert f"Data file ({suffixes()})" in text


def test_version():
    assert run("--version").stdout == f"hpr {hpr.__version__}\n"


def test_installed_command_exits_with_2_and_no_traceback():
    command = [sys.executable, "-c", "from hpr.cli import main; main()", "inspect", "/no/such/folder"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no folder at /no/such/folder: check the path\n"


@pytest.mark.parametrize("arguments", [["no-such-verb"], ["plan", "--no-such-option"], ["profile", "--examples", "0"]])
def test_wrong_usage(arguments):
    run(*arguments, code=2)


# --- the verbs


def test_inspect(home):
    found = json.loads(run("inspect", home / "model", "--json").stdout)
    (stack,) = found["stacks"]
    assert (stack["name"], stack["path"], stack["layers"]) == ("encoder", "encoder.layer", 3)
    assert stack["attention_reuse"] == {"0": "there is no layer below", "1": None, "2": None}
    assert [layer for layer, reason in stack["drop"].items() if reason is None] == ["1", "2"]
    assert sum(part["parameters"] for part in found["parts"]) == found["parameters"]
    query = next(part for part in found["parts"] if part["name"] == "encoder · attention.self.query")
    assert (query["sites"], query["shape"], query["parameters"]) == (3, [16, 16], 768)
    assert (found["ties"], found["not_swappable"], found["objective"]) == ([], {}, "hidden")
    text = run("inspect", home / "model").stdout
    assert "encoder: 3 layers" in text
    assert "encoder: attention weights can be reused: 1, 2" in text
    assert "a profile needs" in text
    assert max(map(len, text.splitlines())) <= 80


def test_inspect_names_ties(tmp_path, build):
    build("llama", tf.AutoModelForCausalLM).save_pretrained(tmp_path)
    assert "tied: embed_tokens = lm_head" in run("inspect", tmp_path).stdout


def test_inspect_says_why_attention_cannot_be_reused(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tf.MPNetModel(tf.MPNetConfig(**sizes, vocab_size=40)).save_pretrained(tmp_path)
    text = " ".join(run("inspect", tmp_path).stdout.split())
    assert "encoder: attention weights can be reused: no, MPNetLayer attends past transformers' attention interface" in text


def test_inspect_names_matrices_that_are_no_sites(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tf.ViTModel(tf.ViTConfig(**sizes, image_size=16, patch_size=4)).save_pretrained(tmp_path)
    found = json.loads(run("inspect", tmp_path, "--json").stdout)["uncovered"]
    assert found[0] == {"owner": "Conv2d", "parameter": "weight", "count": 1, "parameters": 768, "reason": "a convolution"}
    assert "no site: Conv2d.weight, 768 parameters: a convolution" in run("inspect", tmp_path).stdout


def test_profile(home, tmp_path):
    target = tmp_path / "new" / "profile.safetensors"
    result = run("profile", home / "model", "--data", home / "texts.txt", "--examples", 16, "-o", target, "--json")
    found = json.loads(result.stdout)
    assert (found["output"], found["about"]["examples"]) == (str(target), 16)
    assert len(found["layers"]["encoder"]["block_influence"]) == 3
    assert hpr.Profile.load(target).about["examples"] == 16
    assert "curvature" in result.stderr


def test_plan(home, tmp_path):
    target = tmp_path / "plan.json"
    common = ["plan", home / "model", "--profile", home / "profile.safetensors", "-o", target]
    found = json.loads(run(*common, "--budget", "60%", "--json").stdout)
    assert found["parameters"] <= found["budget"]["parameters"]
    text = run(*common, "--budget", "60%", "--only", "encoder.*", "--operators", "low-rank, tie+scale").stdout
    assert "Operators" in text
    used = {entry["operator"] for entry in read(target)["sites"].values()}
    assert used <= {"keep", "low rank", "tie + scale"}
    assert read(target)["sites"]["embeddings.word_embeddings"]["operator"] == "keep"


def test_plan_aligns_if_it_may(home, tmp_path):
    target = tmp_path / "plan.json"
    common = ["plan", home / "model", "--profile", home / "profile.safetensors", "-o", target, "--operators", "tie"]
    common += ["--budget", "60%", "--only", "encoder.*"]
    assert "layers are aligned first" not in run(*common, "--no-align").stdout
    plain = read(target)
    assert "alignment" not in plain
    assert "layers are aligned first" in run(*common, "--align").stdout
    aligned = read(target)
    assert aligned["alignment"]
    assert aligned["predicted_damage"] < plain["predicted_damage"]
    run("share", home / "model", "--plan", target, "--profile", home / "profile.safetensors", "-o", tmp_path / "out")


@pytest.mark.parametrize(
    ("budget", "verb"), [("60%", ["unshare"]), ("40%bytes", ["unshare"]), ("60%", ["export", "--to", "hf"])]
)
def test_unshare_and_export_write_what_plain_transformers_loads(home, tmp_path, budget, verb):
    plan, out, dense = tmp_path / "plan.json", tmp_path / "out", tmp_path / "dense"
    profile = home / "profile.safetensors"
    run("plan", home / "model", "--profile", profile, "--budget", budget, "-o", plan)
    run("share", home / "model", "--plan", plan, "--profile", profile, "-o", out)
    said_of = json.loads(run(*verb, out, "-o", dense, "--json").stdout)
    assert said_of["bytes"] == (dense / "model.safetensors").stat().st_size
    assert said_of["bytes_before"] == (out / "model.safetensors").stat().st_size
    code = (
        "import sys, torch, transformers as tf\n"
        f"model = tf.AutoModel.from_pretrained({str(dense)!r})\n"
        f"tokens = tf.AutoTokenizer.from_pretrained({str(dense)!r})(['word1 word2'], return_tensors='pt')\n"
        "assert 'hpr' not in sys.modules and 'quantization_config' not in model.config.to_dict()\n"
        "torch.save(model(**tokens).last_hidden_state.detach(), sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "outputs.pt")], check=True, timeout=120)
    tokens = tf.AutoTokenizer.from_pretrained(out)(["word1 word2"], return_tensors="pt")
    with torch.no_grad():
        expected = tf.AutoModel.from_pretrained(out)(**tokens).last_hidden_state
    torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), expected, rtol=1e-4, atol=1e-5)
    assert "is dense already" in said(run(*verb, dense, "-o", tmp_path / "again", code=2))
    assert not (tmp_path / "again").exists()


def test_share_eval_and_report(home, tmp_path):
    out = tmp_path / "out"
    made = run(
        "share", home / "model", "--plan", home / "plan.json", "--profile", home / "profile.safetensors", "-o", out, "--json"
    )
    assert json.loads(made.stdout)["bytes"] == (out / "model.safetensors").stat().st_size
    assert "`hpr eval` writes one" in said(run("report", out, code=2))
    measure = ["eval", out, "--teacher", home / "model", "--data", home / "texts.txt"]
    found = json.loads(run(*measure, "--json").stdout)
    assert found["sizes"]["after"]["parameters"] == json.loads(made.stdout)["parameters"]
    rows = len(read(out / "metrics.json")["quality"])
    assert "Divergence" in run(*measure).stdout
    assert len(read(out / "metrics.json")["quality"]) == rows
    (tmp_path / "more.txt").write_text("word1 word2\nword3 word4\n", encoding="utf-8")
    run(*measure[:-1], tmp_path / "more.txt")
    assert len(read(out / "metrics.json")["quality"]) == 2 * rows
    assert json.loads(run("report", out, "--json").stdout) == {"report": str(out / "report.html")}
    assert "more.txt" in (out / "report.html").read_text(encoding="utf-8").replace("<wbr>", "")
    assert not left_behind(tmp_path)


def test_heal(home, tmp_path):
    out, data, teacher = tmp_path / "out", home / "texts.txt", ("--teacher", home / "model")
    run("share", home / "model", "--plan", home / "plan.json", "-o", out)  # without a profile there is more to heal
    wanted = ["heal", out, *teacher, "--data", data, "--learning-rate", "0.005", "-o", tmp_path / "healed", "--json"]
    made = json.loads(run(*wanted, "--for", "20steps").stdout)
    assert made["healing"]["after"] < made["healing"]["before"]
    assert len(made["healing"]["history"]) == 10
    assert {path.name for path in (tmp_path / "healed").iterdir()} >= FILES
    assert read(tmp_path / "healed" / "metrics.json")["healing"] == made["healing"]
    assert made["sizes"]["after"]["parameters"] == parameters(tf.AutoModel.from_pretrained(out))
    begun = [*wanted[:-1], "--checkpoints", tmp_path / "run", "--json"]
    first = json.loads(run(*begun, "--for", "12steps").stdout)["healing"]
    again = json.loads(run(*begun, "--for", "12steps").stdout)["healing"]
    assert (again["recipe"], again["history"], again["after"]) == (first["recipe"], first["history"], first["after"])
    assert "other seconds (None, now 1.0)" in said(run(*begun, "--for", "1s", code=2))
    assert "is no amount of healing" in said(run("heal", out, *teacher, "--for", "a while", code=2))
    assert "content that is not from HPR" in said(run("heal", home / "model", *teacher, "--data", data, code=2))
    assert not left_behind(tmp_path)


def test_online(home, tmp_path):
    out, stream = tmp_path / "out", tmp_path / "stream.jsonl"
    texts = (home / "texts.txt").read_text(encoding="utf-8").splitlines()
    rows = [json.dumps({"text": text}) for text in texts[:30]]
    rows[3], rows[9] = '{"text": 5}', "no JSON"
    stream.write_text("\n".join(rows) + "\n", encoding="utf-8")
    run("share", home / "model", "--plan", home / "plan.json", "-o", out)
    command = ["online", out, "--teacher", home / "model", "--validation", home / "texts.txt", "--state", tmp_path / "state"]
    command += ["--batch", 4, "--every", 3, "--learning-rate", 0.005, "--data", stream, "-o", tmp_path / "later"]
    result = run(*command, "--json")
    found = json.loads(result.stdout)["online"]
    assert (found["batches"], found["refused"]) == (8, 0)
    assert found["validation"] < found["validation_at_start"]
    assert "line 4: 'text' is 5, not a text" in said(result)
    assert "line 10 is no JSON object" in said(result)
    assert {path.name for path in (tmp_path / "later").iterdir()} >= FILES
    assert read(tmp_path / "later" / "metrics.json")["online"] == found
    log = tmp_path / "state" / "updates.jsonl"
    assert [json.loads(row)["step"] for row in log.read_text(encoding="utf-8").splitlines()] == list(range(1, 9))
    again = json.loads(run(*command, "--json").stdout)["online"]  # nothing new in the file
    assert (again["batches"], again["validation"]) == (8, found["validation"])
    stream.write_text("\n".join([*rows, *['{"text": "word1"}'] * 4, *["[]"] * 4]) + "\n", encoding="utf-8")
    assert "batch 10 is refused: the batch is empty" in said(run(*command))
    taken = [json.loads(row)["line"] for row in log.read_text(encoding="utf-8").splitlines()]
    assert taken == [4, 8, 12, 16, 20, 24, 28, 30, 34, 38]
    log.write_text("\n".join(log.read_text(encoding="utf-8").splitlines()[:-1]) + '\n{"step": 1', encoding="utf-8")
    stream.write_text(stream.read_text(encoding="utf-8") + '{"text": "word2"}\n', encoding="utf-8")
    assert json.loads(run(*command, "--json").stdout)["online"]["batches"] == 11  # one more, and not one again
    assert "write the result to another folder" in said(run(*command[:-1], out, code=2))
    assert not left_behind(tmp_path)


def test_compress(home, tmp_path):
    out = tmp_path / "out"
    common = ["compress", home / "model", "--budget", "60%", "--data", home / "texts.txt", "-o", out, "--plans", 2]
    result = run(*common)
    assert {path.name for path in out.iterdir()} >= FILES
    assert "unique parameters" in result.stdout
    assert "report.html" in result.stdout.replace("\n", "")
    assert max(map(len, result.stdout.splitlines())) <= 80
    found = json.loads(run(*common, "--no-refit", "--json").stdout)
    assert found["output"] == str(out)
    assert found["sizes"]["after"]["parameters"] <= found["budget"]["parameters"]
    assert type(tf.AutoModel.from_pretrained(out)) is tf.BertModel
    assert not left_behind(tmp_path)


def test_compress_and_heal(home, tmp_path):
    out = tmp_path / "out"
    common = ["compress", home / "model", "--budget", "60%", "--data", home / "texts.txt", "-o", out, "--plans", 1]
    healed = json.loads(run(*common, "--heal", "12steps", "--json").stdout)["healing"]
    assert healed["after"] <= healed["before"]
    assert healed["stages"] == []
    assert 'id="healing"' in (out / "report.html").read_text(encoding="utf-8")
    assert "is no amount of healing" in said(run(*common, "--heal", "some", code=2))
    assert "12 steps in" in run(*common, "--heal", "12steps").stdout
    assert not left_behind(tmp_path)


def test_compress_to_bytes_and_heal(home, tmp_path):
    out = tmp_path / "out"
    common = ["compress", home / "model", "--budget", "12%bytes", "--data", home / "texts.txt", "-o", out, "--heal", "12steps"]
    found = json.loads(run(*common, "--json").stdout)
    assert found["healing"]["after"] <= found["healing"]["before"]
    assert [row["step"] for row in found["healing"]["history"]][-1] == 12
    assert 'id="healing"' in (out / "report.html").read_text(encoding="utf-8")
    assert (out / "model.safetensors").stat().st_size == found["sizes"]["after"]["bytes"]
    assert "12 steps in" in run(*common).stdout
    assert not left_behind(tmp_path)


def test_a_budget_in_parameters_with_the_size_of_the_file(home, tmp_path):
    out = tmp_path / "out"
    common = ["compress", home / "model", "--budget", "60%", "--data", home / "texts.txt", "-o", out, "--plans", 1]
    found = json.loads(run(*common, "--bytes", "25%bytes", "--json").stdout)
    sizes = found["sizes"]
    assert (out / "model.safetensors").stat().st_size == sizes["after"]["bytes"] <= 0.25 * sizes["before"]["bytes"]
    assert sizes["after"]["parameters"] <= 0.6 * sizes["before"]["parameters"]
    assert "integer_bytes" not in sizes["after"]
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "Damage of rounding" in report
    assert "parameters; the file has" in report
    assert "is no size" in said(run(*common, "--bytes", "60%", code=2))
    run("profile", home / "model", "--data", home / "texts.txt", "-o", tmp_path / "p")
    arguments = ["plan", home / "model", "--profile", tmp_path / "p", "--budget", "60%", "--bytes", "25%bytes"]
    planned = run(*arguments, "-o", tmp_path / "plan.json").stdout
    assert "by rounding" in planned
    run("share", home / "model", "--plan", tmp_path / "plan.json", "--profile", tmp_path / "p", "-o", tmp_path / "shared")
    assert (tmp_path / "shared" / "model.safetensors").stat().st_size <= 0.25 * sizes["before"]["bytes"]


def test_several_files_with_shares(home, tmp_path):
    first, second = home / "texts.txt", tmp_path / "more=2.tsv"
    texts = first.read_text(encoding="utf-8").splitlines()
    second.write_text("\n".join(["text", *reversed(texts)]), encoding="utf-8")
    data = ["--data", f"{first}=3", "--data", second]
    found = json.loads(run("profile", home / "model", *data, "--examples", 16, "-o", tmp_path / "p", "--json").stdout)
    assert found["about"]["examples"] == 16
    common = ["compress", home / "model", *data, "--plans", 1, "-o", tmp_path / "out", "--json"]
    made = json.loads(run(*common, "--heal", "2steps").stdout)
    assert made["calibration"]["source"] == "texts.txt, more=2.tsv"
    assert len(made["healing"]["history"]) == 2
    found = json.loads(run("eval", tmp_path / "out", "--teacher", home / "model", *data, "--json").stdout)
    assert {row["data"] for row in found["quality"]} == {"texts.txt, more=2.tsv"}
    assert run("heal", tmp_path / "out", "--teacher", home / "model", *data, "--for", "2steps").exit_code == 0
    wrong = (("other.txt=0", "must be above 0"), ("other.txt=much", "'much' is no number"), (first, "twice"))
    for given, message in wrong:
        assert message in said(run(*common, "--data", given, code=2))


def test_columns_of_texts_and_labels(home, tmp_path):
    """Every command with --data takes --column and --label, by name or number, one for all tables or one for each."""
    texts = (home / "texts.txt").read_text(encoding="utf-8").splitlines()
    csv, rows, bare = tmp_path / "reviews.csv", tmp_path / "posts.jsonl", tmp_path / "bare.tsv"
    csv.write_text("\n".join(["Review;Stars", *(f"{text}, then;{i % 5}" for i, text in enumerate(texts))]), encoding="utf-8")
    rows.write_text("\n".join(json.dumps({"body": text, "mark": 1}) for text in texts), encoding="utf-8")
    bare.write_text("\n".join(f"{i % 2}\t{text}" for i, text in enumerate(texts)), encoding="utf-8")
    profile = ["profile", home / "model", "--examples", 16, "-o", tmp_path / "p", "--json"]
    for data in (
        ["--data", csv, "--column", "review", "--label", "stars"],
        ["--data", bare, "--column", 1, "--label", 0],
        ["--data", csv, "--data", rows, "--column", "review", "--column", "body"],
        ["--data", home / "texts.txt", "--data", rows, "--column", "body"],
    ):
        assert json.loads(run(*profile, *data).stdout)["about"]["examples"] == 16
    data, out, teacher = ["--data", csv, "--column", "REVIEW"], tmp_path / "out", ["--teacher", home / "model"]
    run("compress", home / "model", "--budget", "60%", *data, "-o", out, "--plans", 1)
    assert json.loads(run("eval", out, *teacher, *data, "--json").stdout)["quality"][0]["data"] == "reviews.csv"
    run("heal", out, *teacher, *data, "--for", "1steps")
    online = [
        "online",
        out,
        *teacher,
        "-o",
        tmp_path / "later",
        "--data",
        rows,
        "--validation",
        csv,
        "--column",
        "review",
        "--json",
    ]
    found = run(*online, "--column", "body", "--state", tmp_path / "state")
    assert (json.loads(found.stdout)["online"]["refused"], "left out" in said(found)) == (0, False)
    rows.write_bytes(b'{"body": "caf\xe9"}\n')
    assert "is not UTF-8 at byte" in said(run(*online, "--state", tmp_path / "new", code=2))
    wrong = (
        (["--data", csv], "it has 'Review', 'Stars': name the column of texts, with --column NAME or --column NUMBER"),
        (["--data", csv, "--column", "body"], "has no column 'body', it has 'Review', 'Stars': name one, with --column"),
        (["--data", csv, "--column", 0, "--label", 7], "has no column number 7"),
        (["--data", home / "texts.txt", "--column", 0], "--column 0 needs a file with columns, not"),
        (["--column", 0], "--column 0 needs a file with columns, not no --data"),
        (["--data", csv, "--data", rows, *["--column", "a"] * 3], "is given for 3 files (a, a, a), but 2 have columns"),
    )
    for data, message in wrong:
        assert message in said(run(*profile, *data, code=2))


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "/no/such"], "no folder at /no/such"),
        (["plan", "MODEL", "--profile", "/no/such"], "no profile at /no/such"),
        (["plan", "MODEL", "--profile", "MODEL/model.safetensors"], "is no profile"),
        (["plan", "MODEL", "--profile", "PROFILE", "--budget", "lots"], "'lots' is no budget"),
        (["plan", "MODEL", "--profile", "PROFILE", "--budget", "1%"], "the smallest plan of this model needs"),
        (["plan", "MODEL", "--profile", "PROFILE", "--only", "nothing.*"], "matches no site"),
        (["plan", "MODEL", "--profile", "PROFILE", "--operators", "magic"], "no operator 'magic'"),
        (["share", "MODEL", "--plan", "/no/such"], "no plan at /no/such"),
        (["report", "/no/such"], "no plan.json in /no/such"),
        (["compress", "MODEL", "--budget", "1%", "--data", "TEXTS"], "a plan of this model needs at least"),
        (["compress", "MODEL", "--data", "/no/such.txt"], "no file at /no/such.txt"),
        (["compress", "MODEL", "--objective", "magic"], "no objective 'magic'"),
        (["profile", "MODEL", "--data", "EMPTY"], "is empty"),
        (["profile", "MODEL", "--data", "NAN"], "row 1 is not finite"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(home, tmp_path, arguments, message):
    (tmp_path / "empty.txt").touch()
    np.save(tmp_path / "nan.npy", np.array([[1.0], [np.nan]]))
    places = {
        "MODEL": home / "model",
        "PROFILE": home / "profile.safetensors",
        "TEXTS": home / "texts.txt",
        "EMPTY": tmp_path / "empty.txt",
        "NAN": tmp_path / "nan.npy",
    }
    for word, path in places.items():
        arguments = [argument.replace(word, str(path)) for argument in arguments]
    if arguments[0] not in ("inspect", "report"):
        arguments += ["-o", str(tmp_path / "out")]
    result = run(*arguments, code=2)
    assert message in said(result)
    assert said(result).count("error: ") == 1
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == {"empty.txt", "nan.npy"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda plan: plan["sites"].pop("pooler.dense"), "no entry for pooler.dense"),
        (lambda plan: plan["sites"].update(extra={"operator": "keep", "terms": []}), "names extra"),
        (lambda plan: plan["model"].update(fingerprint="0"), "fingerprint 0"),
        (lambda plan: plan["budget"].update(parameters=100), "allows 100"),
        (lambda plan: plan["sites"]["pooler.dense"].update(operator="tie"), "mixes the two"),
        (lambda plan: plan.pop("sites"), "not a plan"),
    ],
)
def test_an_edited_plan_that_does_not_fit(home, tmp_path, edit, message):
    plan = read(home / "plan.json")
    edit(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    result = run("share", home / "model", "--plan", tmp_path / "plan.json", "-o", tmp_path / "out", code=2)
    assert message in said(result)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_an_output_folder_with_other_content_is_left_alone(home, tmp_path):
    (tmp_path / "thesis.txt").write_text("two years of work", encoding="utf-8")
    for arguments in (["compress", home / "model"], ["share", home / "model", "--plan", home / "plan.json"]):
        assert "has content that is not from HPR" in said(run(*arguments, "-o", tmp_path, code=2))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_eval_wants_the_original(home, tmp_path, build):
    run("share", home / "model", "--plan", home / "plan.json", "-o", tmp_path / "out")
    other = build("bert")
    other.pooler.dense.weight.data.zero_()
    other.save_pretrained(tmp_path / "other")
    assert "name the original with --teacher" in said(run("eval", tmp_path / "out", "--teacher", tmp_path / "other", code=2))


def test_a_path_that_cannot_be_written(home, tmp_path):
    (tmp_path / "file").touch()
    result = run("share", home / "model", "--plan", home / "plan.json", "-o", tmp_path / "file" / "out", code=2)
    assert f"{tmp_path / 'file'}" in said(result)


# --- interrupted, and what nobody foresaw


def test_interrupted_while_writing(home, tmp_path, monkeypatch):
    write = hpr.checkpoints.save._write_model

    def interrupted(student, folder):
        write(student, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(hpr.checkpoints.save, "_write_model", interrupted)
    result = run("share", home / "model", "--plan", home / "plan.json", "-o", tmp_path / "out", code=console.INTERRUPTED)
    assert said(result).endswith("interrupted; no file was left half-written")
    assert not list(tmp_path.iterdir())


def test_terminated_runs_leave_through_the_same_door():
    with pytest.raises(SystemExit) as caught:
        program._leave(15, None)
    assert caught.value.code == 143


def test_unexpected_errors_keep_their_traceback(home, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr("hpr.pipeline.steps.share", broken)
    result = run("share", home / "model", "--plan", home / "plan.json", "-o", tmp_path / "out", code=1)
    assert isinstance(result.exception, RuntimeError)
