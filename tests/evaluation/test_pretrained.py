"""A pretrained model's answers under chosen attention: dense is its own, and every other is paired with it."""

import json
import re

import pytest
import torch
import transformers as hf
from support.pretrained import SIZES, byte_tokenizer, save_model

from flexprefill import FlexPrefillError, PrefillConfig, UnsupportedError, cli
from flexprefill.evaluation.comparison import Cell, Plan, compare, measure
from flexprefill.evaluation.methods import Attender, Method, make_methods
from flexprefill.evaluation.pretrained import PretrainedSubject, load_pretrained
from flexprefill.evaluation.prompts import read_corpus
from flexprefill.evaluation.report import task_table
from flexprefill.evaluation.scoring import Difference, student_95

pytestmark = pytest.mark.usefixtures("little_text")
CPU = torch.device("cpu")
RULE = PrefillConfig(alpha=0.9, block_size=64, sink_blocks=1, window_blocks=1, last_full_blocks=1)
EVERYTHING = PrefillConfig(block_size=64, window_blocks=2**20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def corpus(little_text):
    return read_corpus(lambda text: byte_tokenizer()(text, verbose=False).input_ids, [])


@pytest.fixture(scope="module")
def subject(folder, corpus):
    model, _ = load_pretrained(str(folder), CPU, "float32")
    return PretrainedSubject(model, corpus, 0, "tiny")


def attenders(subject, method):
    return [Attender(method) for _ in range(subject.layers)]


def test_dense_is_the_models_own_loss(folder, subject):
    own = hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    prompt = subject.prompt(2048, "needles", 0)
    at = torch.cat([torch.arange(start, stop) for start, stop in prompt.answers])
    with torch.no_grad():
        logits = own(prompt.tokens).logits[0, at - 1]
    expected = torch.nn.functional.cross_entropy(logits, prompt.tokens[0, at])
    answered = subject.answer(prompt, attenders(subject, Method("dense", None)))
    assert answered.loss == pytest.approx(expected.item(), rel=1e-5)
    right = (logits.argmax(-1) == prompt.tokens[0, at]).split([stop - start for start, stop in prompt.answers])
    assert (answered.right, answered.asked) == (sum(bool(part.all()) for part in right), 9)


PHIMOE = {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1}
FAMILIES = {
    "scale": hf.GraniteConfig(**{**SIZES, "attention_multiplier": 0.7, "logits_scaling": 3.0}),
    "window": hf.MistralConfig(**SIZES, sliding_window=300),
    "soft cap": hf.Gemma2Config(
        **SIZES, query_pre_attn_scalar=16, attn_logit_softcapping=5.0, final_logit_softcapping=0.1, sliding_window=300
    ),
    "a window in the mask alone": hf.PhimoeConfig(**PHIMOE, sliding_window=300),
    "scaled logits": hf.CohereConfig(**SIZES, logit_scale=0.0625, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "sinks": hf.GptOssConfig(
        **SIZES, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention", "sliding_attention"]
    ),
}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=pytest.mark.slow if family in ("soft cap", "sinks") else pytest.mark.release)
        for family in FAMILIES
    ],
)
def test_every_block_kept_is_dense_and_dense_is_the_models_own(family, corpus, tmp_path):
    save_model(tmp_path, FAMILIES[family])
    model, _ = load_pretrained(str(tmp_path), CPU, "float32")
    subject = PretrainedSubject(model, corpus, 0, family)
    prompt = subject.prompt(1024, "copy", 0)
    dense, everything = (
        subject.answer(prompt, attenders(subject, Method(name, config))).loss
        for name, config in (("dense", None), ("all", EVERYTHING))
    )
    own = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    at = torch.cat([torch.arange(start, stop) for start, stop in prompt.answers])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(own(prompt.tokens).logits[0, at - 1], prompt.tokens[0, at]).item()
    assert dense == pytest.approx(expected, rel=1e-5) and everything == pytest.approx(expected, rel=1e-5)
    if family in ("soft cap", "sinks"):
        with pytest.raises(UnsupportedError, match="whose soft caps or sinks prism does not know"):
            subject.answer(prompt, attenders(subject, Method("prism-own", RULE, "prism", own_rule=True)))


@pytest.mark.slow
def test_a_comparison_pairs_prompts_and_leaves_out_what_dense_cannot_do(subject, tmp_path):
    methods = make_methods([1.0], ["dense", "flashprefill", "random"], RULE)
    plan = Plan([1024], ["prose", "single"], methods, 3, 0, least_share=0.4)
    told = []
    cells = compare(subject, plan, tmp_path / "eval.json", lambda steps: None, told.append)
    # random weights answer nothing
    assert [(cell.task, cell.method) for cell in cells] == [
        ("prose", "dense"),
        ("prose", "flashprefill 1"),
        ("prose", "random 1"),
        ("single", "dense"),
    ]
    assert told == cells[3:] and told[0].right == 0 and told[0].samples == 3
    dense, sparse, _ = cells[:3]
    assert len(dense.losses) == 3 and dense.right is None and dense.density == 1 > sparse.density
    assert dense.loss == pytest.approx(sum(dense.losses) / 3) and dense.losses != sparse.losses
    assert compare(subject, plan, tmp_path / "eval.json", lambda steps: None) == cells
    assert measure(subject, plan, 1024, "prose", methods[1]).losses == sparse.losses
    header, rows = task_table(cells[:3])
    assert header[:5] == ["method", "density", "mass", "loss", "loss over dense"] and rows[0][4] == ""
    difference = Difference.of(sparse.losses, dense.losses)
    assert rows[1][4] == f"{difference.mean:+.3f} ± {difference.half:.3f}"
    with pytest.raises(FlexPrefillError, match="was made with another model"):
        compare(
            PretrainedSubject(subject.model, subject.corpus, 0, "other"), plan, tmp_path / "eval.json", lambda n: None
        )


@pytest.mark.slow
def test_methods_that_do_not_know_a_models_attention_are_left_out_and_named(tmp_path, capsys):
    folder = save_model(tmp_path / "gemma2", FAMILIES["soft cap"])
    arguments = [
        "eval",
        "--model",
        folder,
        "--lengths",
        "1024",
        "--alphas",
        "0.9",
        "--tasks",
        "prose",
        "--samples",
        "1",
    ]
    assert cli.main([*map(str, arguments), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for method, unknown in (
        ("mean-correction", "mean correction"),
        ("guard", "the guard"),
        ("xattention", "xattention"),
    ):
        assert (
            f"left out: methods must be without {method} 0.9 for this model, whose soft caps or sinks {unknown}"
            in printed
        )
    cells = json.loads((tmp_path / "out" / "eval.json").read_text())["cells"]
    assert [cell["method"] for cell in cells] == ["dense", "flashprefill 0.9", "random 0.9", "exact 0.9"]


@pytest.mark.slow
def test_without_dense_there_is_no_picture_and_longer_than_the_context_is_refused(folder, tmp_path, capsys):
    arguments = [
        "eval",
        "--model",
        str(folder),
        "--tasks",
        "prose",
        "--samples",
        "1",
        "--alphas",
        "0.9",
        "--device",
        "cpu",
    ]
    arguments += ["--output", str(tmp_path / "out"), "--methods", "flashprefill"]
    assert cli.main([*arguments, "--lengths", "1024"]) == 0
    assert "picture  skipped: needs the method dense" in capsys.readouterr().out
    for command in (
        [*arguments, "--lengths", "8192"],
        ["calibrate", *arguments[1:5], "--loss", "5", "--length", "8192"],
    ):
        with pytest.raises(SystemExit):
            cli.main(command)
        assert "prompts must be of at most the model's 4,096 tokens, got 8,192" in capsys.readouterr().err


def test_paired_differences_have_students_interval():
    # scipy.stats.t.ppf(0.975, n)
    for freedom, right in ((2, 4.3027), (3, 3.1824), (5, 2.5706), (9, 2.2622), (29, 2.0452)):
        assert student_95(freedom) == pytest.approx(right, rel=0.01)
    difference = Difference.of([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])
    assert difference.mean == 2 and difference.half == pytest.approx(4.3027 / 3**0.5, rel=0.01)
    assert Difference.of([3.0, 5.0], [1.0, 2.0]) == Difference(2.5, None)


def test_a_table_of_one_task():
    dense = Cell(4096, "copy", "dense", 90, 100, 0.5, 1.0, 1.0, 1.0, 0.5, (0.4, 0.5, 0.6), (0.9, 0.9, 0.9))
    sparse = Cell(4096, "copy", "exact-own", 80, 100, 0.7, 0.3, 0.9, 0.8, 0.25, (0.6, 0.7, 0.8), (0.7, 0.8, 0.9))
    _, rows = task_table([dense, sparse])
    assert rows == [
        ["dense", "100.0 %", "100.0 %", "0.500", "", "90.0 % ± 0.0", "", "0.50"],
        ["exact-own", "30.0 %", "90.0 %", "0.700", "+0.200 ± 0.000", "80.0 % ± 24.7", "-10.0 ± 24.7", "0.25"],
    ]
    _, rows = task_table([Cell(4096, "copy", "dense", 90, 100, 0.5, 1.0, 1.0, 1.0, 0.5, (0.5, 0.5), (0.9, 0.9))])
    assert rows[0][5] == "90.0 % (82.6 – 94.5)"  # of two prompts: by the answers


@pytest.mark.slow
def test_the_command_on_a_folder(folder, tmp_path, capsys):
    output = tmp_path / "new"
    arguments = ["eval", "--model", folder, "--lengths", "1024", "--alphas", "0.9", "--tasks", "prose,copy"]
    arguments += ["--methods", "dense,flashprefill", "--samples", "2", "--output", output, "--device", "cpu"]
    assert cli.main(list(map(str, arguments))) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^prose, 1,024 tokens, 2 prompts\nmethod +density +mass +loss +loss over dense +s\n", printed)
    assert "left out: copy at 1,024 tokens, of which dense attention answers 0" in printed
    record = json.loads((output / "eval.json").read_text())
    assert [cell["method"] for cell in record["cells"]] == ["dense", "flashprefill 0.9", "dense"]
    assert record["identity"]["dtype"] == "float32" and str(folder) in record["identity"]["model"]


def test_models_that_cannot_be_asked(tmp_path, capsys):
    bloom = hf.BloomConfig(vocab_size=256, hidden_size=32, n_layer=1, n_head=2)
    save_model(tmp_path / "bloom", bloom)
    with pytest.raises(UnsupportedError, match="BloomForCausalLM"):
        load_pretrained(str(tmp_path / "bloom"), CPU, "float32")
    with pytest.raises(FlexPrefillError, match=r"transformers cannot load the model '.*nothing'"):
        load_pretrained(str(tmp_path / "nothing"), CPU, "float32")
    with pytest.raises(SystemExit):
        cli.main(["eval", "--model", str(tmp_path / "bloom"), "--lengths", "512"])
    assert "--lengths: must be at least 1024 for a pretrained model, got 512" in capsys.readouterr().err
