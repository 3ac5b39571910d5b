"""The sparsest setting within a loss, against trying every setting; and the command on a model of random weights."""

import json
import re
from dataclasses import dataclass, replace

import pytest
import torch
from support.inputs import make_qkv
from support.pretrained import save_model

from flexprefill import AttentionVariant, FlexPrefillError, PrefillConfig, attention_recall, cli, search_blocks
from flexprefill.evaluation.comparison import Answered, Plan
from flexprefill.evaluation.loss_calibration import (
    LOG2_ALPHAS,
    PROBE_SHARES,
    RECALLS,
    Calibrator,
    RecallCurve,
    calibrate_by_loss,
    tries,
)
from flexprefill.evaluation.methods import Attender, attend_densely

RULE = PrefillConfig(block_size=16, sink_blocks=1, window_blocks=1, last_full_blocks=1)


@dataclass(frozen=True)
class Layers:
    """Two layers whose loss is how far their outputs are from dense attention's."""

    device = torch.device("cpu")
    layers = 2
    heads = (4, 2)

    def identity(self):
        return {}

    def prompt(self, length, task, number):
        seeds = (10 * number + layer + 1000 * len(task) for layer in range(2))
        return [make_qkv(length, heads=4, kv_heads=2, head_dim=16, seed=seed) for seed in seeds]

    def answer(self, prompt, attenders):
        loss = 0.0
        for attender, (query, key, value) in zip(attenders, prompt, strict=True):
            dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            loss += (attender(query, key, value) - dense).abs().mean().item()
        return Answered(0, 0, loss)


@pytest.fixture(scope="module")
def calibrator():
    return Calibrator(Layers(), Plan([200], ["one", "other"], [], 1, 0), RULE)


def test_a_curve_has_the_recall_of_each_alpha_and_the_largest_alpha_for_a_recall():
    curve = RecallCurve(RULE)
    texts = [make_qkv(320, heads=4, kv_heads=2, head_dim=16, seed=seed) for seed in (0, 1)]
    for text in texts:
        curve(*text)
    assert curve.shares.shape == (len(LOG2_ALPHAS), 4)
    for step in (0, 5, 20):
        config = replace(RULE, alpha=2.0 ** LOG2_ALPHAS[step])
        rows = range(0, 304, 4)
        kept = [attention_recall(q, k, search_blocks(q, k, config), rows=rows).mean[0] for q, k, _ in texts]
        torch.testing.assert_close(curve.shares[step], torch.stack(kept).amin(0))
    for recall in (0.5, 0.9, 0.99):
        config = curve.config_for(recall)
        for head, alpha in enumerate(config.alpha):
            keeps = [share >= recall for share in curve.shares[:, head].tolist()]
            step = LOG2_ALPHAS.index(torch.tensor(alpha).log2().item())
            assert all(keeps[step:]) and (step == 0 or not keeps[step - 1])
    # no alpha of the grid keeps so much: the smallest one
    curve.shares[:, 1] = 0.5
    assert curve.config_for(0.9).alpha[1] == 2.0 ** LOG2_ALPHAS[-1]
    shared = replace(curve, config=replace(RULE, mask_heads="kv")).config_for(0.9).alpha
    assert shared[0] == shared[1] == 2.0 ** LOG2_ALPHAS[-1] and shared[2] == shared[3]


def test_a_layer_with_a_window_is_left_as_it_is():
    curve = RecallCurve(RULE)
    query, key, value = make_qkv(320, heads=4, kv_heads=2, head_dim=16)
    curve(query, key, value, None, AttentionVariant(sliding_window=50))
    assert curve.shares is None and curve.config_for(0.9) == RULE


@pytest.mark.slow
def test_the_sparsest_within_the_loss_is_taken(calibrator, monkeypatch):
    # every third setting, because each is tried
    recalls, alphas, shares = RECALLS[::3], LOG2_ALPHAS[::3], PROBE_SHARES[::3]
    for name, steps in (("RECALLS", recalls), ("LOG2_ALPHAS", alphas), ("PROBE_SHARES", shares)):
        monkeypatch.setattr(f"flexprefill.evaluation.loss_calibration.{name}", steps)
    dense, curves = calibrator.dense(), calibrator.curves()
    by_recall = [calibrator.tried("", [curve.config_for(recall) for curve in curves], dense) for recall in recalls]
    by_alpha = [calibrator.tried("", [replace(RULE, alpha=2.0**log2)] * 2, dense) for log2 in alphas]
    base = replace(PrefillConfig.recommended(), block_size=RULE.block_size)
    by_share = [calibrator.tried("", [replace(base, probe_share=share)] * 2, dense) for share in shares]
    for most in (0.02, 0.1):
        told, steps = [], []
        best = calibrate_by_loss(replace(calibrator, advance=steps.append), dense, most, told.append)
        assert best.worst <= most and best in told and sum(steps) <= tries(calibrator.plan)
        sparsest = []
        for family in (by_recall, by_alpha, by_share):
            within = [tried.worst <= most for tried in family]
            if sorted(within) == within:  # where loss falls with density, bisection finds the first
                sparsest.append(family[within.index(True)].density)
        assert len(sparsest) == 3 and best.density == pytest.approx(min(sparsest))


class NothingHelps(Layers):
    """Every setting costs one nat."""

    def answer(self, prompt, attenders):
        super().answer(prompt, attenders)
        sparse = any(isinstance(each, Attender) and each.method.config is not None for each in attenders)
        return Answered(0, 0, float(sparse))


def test_a_loss_that_no_setting_reaches_is_said(calibrator):
    never = replace(calibrator, subject=NothingHelps())
    with pytest.raises(
        FlexPrefillError, match=r"--loss must be at least 1000.0 milli-nats for these prompts, got 0.001"
    ):
        calibrate_by_loss(never, never.dense(), 1e-6, lambda tried: None)


class Sharp(Layers):
    """One key that its block's mean does not show holds the mass."""

    def prompt(self, length, task, number):
        query, key, value = make_qkv(length, heads=4, kv_heads=2, head_dim=16, seed=number)
        query, key = 0.01 * query, 0.01 * key
        query[:, :, 100:, 0] = 90.0
        key[:, :, 40, 0], key[:, :, 41:47, 0] = 20.0, -4.0
        key[:, :, 48:, 0] += 0.2
        key[:, :, 32:40, 0] = -6.0
        return [(query, key, value)] * 2


class SharpWithASoftCap(Sharp):
    def answer(self, prompt, attenders):
        variant = AttentionVariant(soft_cap=1e4)
        outputs = [attend(*layer, None, variant) for attend, layer in zip(attenders, prompt, strict=True)]
        dense = [attend_densely(*layer, None, variant) for layer in prompt]
        return Answered(0, 0, sum((out - own).abs().mean().item() for out, own in zip(outputs, dense, strict=True)))


@pytest.mark.slow
def test_a_key_that_alphas_do_not_find_is_found_by_probes_unless_they_do_not_know_the_attention(calibrator):
    sharp = replace(calibrator, subject=Sharp())
    best = calibrate_by_loss(sharp, sharp.dense(), 1e-3, lambda tried: None)
    assert best.name.startswith("two-sided, share ") and best.configs[0].two_sided
    capped = replace(calibrator, subject=SharpWithASoftCap())
    with pytest.raises(FlexPrefillError, match=r"so much costs (recall|alpha) [\d.e-]+, the densest"):
        calibrate_by_loss(capped, capped.dense(), 1e-3, lambda tried: None)


@pytest.mark.slow
@pytest.mark.usefixtures("little_text")
def test_the_command_writes_what_eval_compares(tmp_path, capsys):
    folder = save_model(tmp_path / "model")
    file = tmp_path / "new" / "mine.json"
    arguments = [
        "calibrate",
        "--model",
        folder,
        "--loss",
        "5",
        "--length",
        "1024",
        "--texts",
        "3",
        "--tasks",
        "prose,single",
    ]
    assert cli.main([*map(str, arguments), "--output", str(file), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "left out: single at 1,024 tokens" in printed and "unseen prompts" in printed
    configs = PrefillConfig.load_layers(file)
    record = json.loads(file.read_text())
    assert len(configs) == 2 and record["loss"] == 5 and record["tasks"] == ["prose"]
    arguments = ["eval", "--model", folder, "--lengths", "1024", "--methods", "dense", "--tasks", "prose"]
    arguments += [
        "--samples",
        "2",
        "--alphas",
        "0.5",
        "--config",
        file,
        "--output",
        tmp_path / "eval",
        "--device",
        "cpu",
    ]
    assert cli.main(list(map(str, arguments))) == 0
    assert "calibrated mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m.safetensors", "--loss", "5"], "--loss: needs a pretrained model"),
        (["--model", "m"], "--loss: is needed for a pretrained model, such as --loss 5"),
        (["--model", "m", "--loss", "-1"], "--loss: must be a finite number above 0, got '-1'"),
        (["--model", "m", "--loss", "5", "--recall", "0.9"], "not allowed with argument"),
        (["--model", "m", "--loss", "5", "--tasks", "poem"], "--tasks: must be of prose, .*, got 'poem'"),
        (["--model", "m", "--loss", "5", "--length", "512"], "--length: must be at least 1024, got 512"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["calibrate", *arguments])
    assert ended.value.code == 2 and re.search(message, capsys.readouterr().err)
