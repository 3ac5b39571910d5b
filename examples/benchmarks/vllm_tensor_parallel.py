"""One GPU and two in vLLM: the same tokens with the plug-in, each process searching for its own heads.

    python examples/benchmarks/vllm_tensor_parallel.py --output tensor_parallel.json

A small model of random weights in float16 answers one batch of prompts of several lengths. It does so in four engines:
stock and with the plug-in, on one GPU and on two. For two engines at a time the script prints how many tokens are the
same up to the first other one, and how far log-probabilities up to there are apart. Two GPUs add the halves of a layer
in another order. The stock engines say how much that alone changes.
"""

import argparse
import gc
import json
import os
import tempfile
from datetime import datetime, timezone
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--lengths", type=int, nargs="+", default=[300, 4000, 12_000, 32_000], help="tokens of the prompts")
parser.add_argument("--layers", type=int, default=4, help="(default: %(default)s)")
parser.add_argument("--hidden", type=int, default=2048, help="(default: %(default)s)")
parser.add_argument("--heads", type=int, default=16, help="(default: %(default)s)")
parser.add_argument("--kv-heads", type=int, default=8, help="(default: %(default)s)")
parser.add_argument("--stretch", type=int, default=400, help="tokens that are alike (default: %(default)s)")
parser.add_argument("--tokens", type=int, default=16, help="to decode (default: %(default)s)")
parser.add_argument("--alpha", type=float, default=0.18, help="(default: %(default)s)")
parser.add_argument("--min-keys", type=int, default=2048, help="of the plug-in (default: %(default)s)")
parser.add_argument("--memory", type=float, default=0.2, help="of each GPU's (default: %(default)s)")
parser.add_argument("--output", type=Path, help="a JSON file (default: none)")
settings = parser.parse_args()
VOCABULARY = 32_000

os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
import torch  # noqa: E402
import vllm  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402
from vllm import LLM  # noqa: E402
from vllm_answers import agreement, answers_of, stretched_prompt  # noqa: E402

from flexprefill import PrefillConfig  # noqa: E402
from flexprefill.integrations import vllm as plug_in  # noqa: E402
from flexprefill.runtime.machine import describe_machine, versions  # noqa: E402


def model_folder():
    folder = tempfile.mkdtemp(prefix="flexprefill-model-")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden,
        intermediate_size=2 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=max(settings.lengths) + settings.tokens + 128,
        dtype="float16",
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def answers(folder, gpus, **options):
    """The density by layer, and what `answers_of` gives, from an engine of its own."""
    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="float16",
        tensor_parallel_size=gpus,
        max_model_len=max(settings.lengths) + settings.tokens + 64,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        gpu_memory_utilization=settings.memory,
        enforce_eager=True,
        disable_custom_all_reduce=True,
        **options,
    )
    asked = [stretched_prompt(length, settings.stretch, VOCABULARY, length) for length in settings.lengths]
    found = answers_of(llm, asked, settings.tokens)
    density = plug_in.report().density if options else {}
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    return density, found


def main():
    folder = model_folder()
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(torch.device("cuda")),
        "versions": versions() | {"vllm": vllm.__version__},
        "settings": {name: setting for name, setting in vars(settings).items() if name != "output"},
        "density_by_layer": {},
    }
    found = {}

    def compared(*names):
        """Two engines' answers, compared, and kept at once."""
        pair = " and ".join(names)
        record[pair] = agreement(*(found[name] for name in names))
        for length, told in zip(settings.lengths, record[pair], strict=True):
            same = f"{told['same']} of {told['tokens']} the same, log-probabilities within {told['largest']:.4f}"
            print(f"{pair}, {length:,} tokens: {same}", flush=True)
        if settings.output:
            settings.output.write_text(json.dumps(record, indent=1) + "\n")

    plug_in.register(PrefillConfig(alpha=settings.alpha), min_keys=settings.min_keys, min_queries=512)
    for gpus in (1, 2):
        density, found[f"plug-in on {gpus}"] = answers(folder, gpus, attention_backend="CUSTOM")
        record["density_by_layer"][gpus] = density
        print(f"{gpus} GPUs: density by layer {density}", flush=True)
    compared("plug-in on 2", "plug-in on 1")
    plug_in.unregister()
    for gpus in (1, 2):
        found[f"stock on {gpus}"] = answers(folder, gpus)[1]
    compared("stock on 2", "stock on 1")
    compared("plug-in on 1", "stock on 1")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
