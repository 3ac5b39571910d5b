"""flexprefill eval: what sparse attention costs a model, by its answers and its loss."""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexprefill.cli.table import print_table
from flexprefill.cli.values import add_device, add_options, list_of, parse_share, whole
from flexprefill.config import PrefillConfig, check_alphas
from flexprefill.errors import FlexPrefillError
from flexprefill.evaluation import TASKS, load_model, prompts, read_text
from flexprefill.evaluation.comparison import Cell, Plan, Subject, compare
from flexprefill.evaluation.decoder_subject import TEXT, DecoderSubject
from flexprefill.evaluation.methods import DENSE, KINDS, OWN_KINDS, TWO_SIDED, USUAL, make_methods
from flexprefill.evaluation.pretrained import PretrainedSubject, load_pretrained
from flexprefill.evaluation.report import accuracy_points, loss_points, table, task_table
from flexprefill.plotting import plot_trade_off
from flexprefill.runtime.progress import stage

DESCRIPTION = (
    "Asks a model with dense attention and with blocks chosen by each method, and compares exact answers, loss, kept "
    "blocks, kept attention mass and time. MODEL is a folder or name that transformers loads, a GGUF file, or a file "
    "of train_needle_model.py. A pretrained model is judged by its tokens: the loss on prose and code, passages copied "
    "from far earlier, and needles asked inside a prompt, at its end, and among many others. Every method is paired "
    "with dense attention on the same prompts. Tasks that dense attention cannot do at a length are named and left "
    "out there. All methods of an alpha keep as many blocks in each row as FlashPrefill does there; 'exact' keeps "
    "those with the most attention mass, 'random' any, beside sinks and window. A name with '-own' behind it keeps "
    "what the method's own rule keeps. Every figure is written to eval.json as soon as it is there. An interrupted "
    "run goes on from that file. With matplotlib, eval.png is drawn. Lists are separated by commas."
)
MIN_LENGTH = 256
DTYPES = ("float32", "bfloat16", "float16")
LONGEST = 32768  # asked of a pretrained model unless lengths are given
LEAST_SHARE = 0.4  # of exact answers by dense attention, below which a task cannot be done


@dataclass(frozen=True)
class Usual:
    """What is compared on a kind of model where the command line does not say."""

    lengths: Sequence[int]
    tasks: Sequence[str]
    samples: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    methods = f"methods to compare, of {', '.join((DENSE, TWO_SIDED, *KINDS, *OWN_KINDS))}"
    lengths = f"2048, 4096 and so on up to the context or {LONGEST:,}; for a needle model 4096,8192,16384,32768"
    tasks = f"all of {', '.join(prompts.TASKS)}; for a needle model of {', '.join((*TASKS, TEXT))}"
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="folder, name, GGUF file or needle model (.safetensors)"
    )
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        metavar="FILE",
        default=[],
        help="also compare this file of 'flexprefill calibrate'; may be given more than once",
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        default=[],
        help="prose for a pretrained model's prompts, in UTF-8 (default: Python's manual)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of a pretrained model (default: bfloat16 on a GPU, float32 on the CPU)"
    )
    for name, parse, metavar, meaning in (
        ("--lengths", list_of(whole(MIN_LENGTH)), "TOKENS", f"prompt lengths (default: {lengths})"),
        ("--tasks", list_of(str), "NAMES", f"tasks to ask (default: {tasks})"),
        ("--samples", whole(1), "N", "prompts of each task at each length (default: 8; for a needle model 200)"),
    ):
        parser.add_argument(name, type=parse, metavar=metavar, help=meaning)
    add_device(parser)
    share = f"{PrefillConfig.recommended().probe_share:g}"
    add_options(
        parser,
        ("--alphas", list_of(parse_share), "SHARES", "0.05,0.1,0.2,0.5", "alphas of the search"),
        ("--shares", list_of(parse_share), "SHARES", share, "probe shares of the two-sided search"),
        ("--methods", list_of(str), "NAMES", ",".join(USUAL), methods),
        ("--seed", whole(0), "N", "0", "seed of the prompts"),
        ("--output", Path, "DIR", "./flexprefill-eval", "folder for eval.json and eval.png, made if missing"),
    )


def execute(arguments: argparse.Namespace) -> int:
    calibrated = _load_configs(arguments.config)
    try:
        methods = make_methods(arguments.alphas, arguments.methods, PrefillConfig(), calibrated, arguments.shares)
    except ValueError as error:
        arguments.parser.error(f"argument --methods: {str(error).removeprefix('kinds ')}")
    # what does not fit is said before a model is loaded
    own = arguments.model.endswith(".safetensors")
    known = (*TASKS, TEXT) if own else prompts.TASKS
    if unknown := [name for name in arguments.tasks or () if name not in known]:
        arguments.parser.error(f"argument --tasks: must be of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    if own and (arguments.text or arguments.dtype):
        arguments.parser.error("argument --text, --dtype: are for a pretrained model, got a needle model's file")
    if not own and (short := [length for length in arguments.lengths or () if length < prompts.MIN_LENGTH]):
        arguments.parser.error(
            f"argument --lengths: must be at least {prompts.MIN_LENGTH} for a pretrained model, got {short[0]}"
        )
    subject, usual = (_needle_model if own else _pretrained)(arguments)
    if isinstance(subject, PretrainedSubject):
        check_context(subject, arguments.lengths or ())
    _check_fit(calibrated, subject)
    arguments.output.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        arguments.lengths or usual.lengths,
        arguments.tasks or usual.tasks,
        methods,
        arguments.samples or usual.samples,
        arguments.seed,
        0.0 if own else LEAST_SHARE,
    )
    figures, picture = arguments.output / "eval.json", arguments.output / "eval.png"
    beyond: list[Cell] = []
    refused: list[str] = []
    try:
        with stage("asking", len(plan.cells)) as advance:
            cells = compare(subject, plan, figures, advance, beyond.append, refused.append)
    except KeyboardInterrupt:
        print(f"{figures} has what was measured so far; the same command goes on from there", file=sys.stderr)
        raise
    _print(cells, plan, own)
    for cell in beyond:
        print(f"left out: {cell.task} at {cell.length:,} tokens, of which dense attention answers {cell.share}")
    for reason in refused:
        print(f"left out: {reason}")
    points = accuracy_points(cells) if own else loss_points(cells)
    try:
        if not points:
            what = "a task with answers" if own else "the method dense, which losses are compared with"
            raise FlexPrefillError(f"needs {what}")
        if own:
            label = "% exact answers, mean of the tasks"
            plot_trade_off(
                points, picture, title="Exact answers against kept blocks", value_label=label, limits=(-3, 103)
            )
        else:
            label = "loss over dense, nats a token"
            plot_trade_off(points, picture, title="Loss against kept blocks", value_label=label)
        drawn = str(picture)
    except FlexPrefillError as error:
        drawn = f"skipped: {error}"
    print(f"figures  {figures}\npicture  {drawn}")
    return 0


def _load_configs(paths: Sequence[Path]) -> dict[str, dict[int, PrefillConfig]]:
    """The configs of files of flexprefill calibrate, by their names in the table."""
    found: dict[str, dict[int, PrefillConfig]] = {}
    for path in paths:
        if path.stem in found:
            raise FlexPrefillError(f"{path} must have another name: an earlier --config is named {path.stem!r} too")
        found[path.stem] = PrefillConfig.load_layers(path)
    return found


def _needle_model(arguments: argparse.Namespace) -> tuple[DecoderSubject, Usual]:
    path = Path(arguments.model)
    model = load_model(path, arguments.device)
    subject = DecoderSubject(model, zlib.crc32(path.read_bytes()), read_text(held_out=True), arguments.seed)
    return subject, Usual((4096, 8192, 16384, 32768), (*TASKS, TEXT), 200)


def _pretrained(arguments: argparse.Namespace) -> tuple[PretrainedSubject, Usual]:
    subject = load_subject(arguments)
    lengths = [min(2048, subject.context)]
    while 2 * lengths[-1] <= min(subject.context, LONGEST):
        lengths.append(2 * lengths[-1])
    return subject, Usual(lengths, prompts.TASKS, 8)


def load_subject(arguments: argparse.Namespace) -> PretrainedSubject:
    """The pretrained model of --model, --device and --dtype, with prompts of --text and --seed."""
    dtype = arguments.dtype or ("bfloat16" if arguments.device.type == "cuda" else "float32")
    model, tokenizer = load_pretrained(arguments.model, arguments.device, dtype)

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    # some tokenizers put an end behind every text, too
    begin = [token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id][:1]
    corpus = prompts.read_corpus(tokenize, begin, arguments.text)
    return PretrainedSubject(model, corpus, arguments.seed, arguments.model)


def check_context(subject: PretrainedSubject, lengths: Sequence[int]) -> None:
    """Raises FlexPrefillError for a length that the model was not made for."""
    if longer := [length for length in lengths if length > subject.context]:
        raise FlexPrefillError(f"prompts must be of at most the model's {subject.context:,} tokens, got {longer[0]:,}")


def _check_fit(calibrated: dict[str, dict[int, PrefillConfig]], subject: Subject) -> None:
    """Raises FlexPrefillError unless all configs are for each of the model's layers and heads."""
    heads, kv_heads = subject.heads
    for name, layers in calibrated.items():
        if len(layers) != subject.layers:
            raise FlexPrefillError(f"--config {name} must be of the model's {subject.layers} layers, got {len(layers)}")
        for layer, config in layers.items():
            try:
                check_alphas(config, heads, kv_heads)
            except ValueError as error:
                raise FlexPrefillError(f"--config {name} does not fit the model's layer {layer}: {error}") from None


def _print(cells: list[Cell], plan: Plan, own: bool) -> None:
    _print_tables(cells, plan, own)
    for length in plan.lengths:
        densities = [cell.density for cell in cells if cell.length == length and cell.method != DENSE]
        if densities and min(densities) == 1:
            print(f"at {length:,} tokens every method keeps every block: ask for longer prompts")


def _print_tables(cells: list[Cell], plan: Plan, own: bool) -> None:
    for length in plan.lengths:
        of_length = [cell for cell in cells if cell.length == length]
        if own:
            print(f"{length:,} tokens")
            print_table(*table(of_length))
            print()
            continue
        for task in plan.tasks:
            of_task = [cell for cell in of_length if cell.task == task]
            print(f"{task}, {length:,} tokens, {plan.samples} prompts")
            print_table(*task_table(of_task))
            print()
