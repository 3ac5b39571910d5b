"""Prompts for an engine of vLLM, what it answers, and how far two engines agree. For the scripts beside it."""

import random
import statistics
from itertools import takewhile


def stretched_prompt(length, stretch, vocabulary, seed=0):
    """A prompt of so many tokens, in stretches of one token each."""
    chooser = random.Random(seed)
    topics = [chooser.randrange(2, vocabulary) for _ in range(-(-length // stretch))]
    return {"prompt_token_ids": [topic for topic in topics for _ in range(stretch)][:length]}


def answers_of(llm, asked, tokens):
    """Each prompt's next tokens, asked in one batch, and the log-probabilities of the best five of each."""
    from vllm import SamplingParams  # behind the variables that a script sets for vLLM

    wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=5)
    found = [request.outputs[0] for request in llm.generate(asked, wanted, use_tqdm=False)]
    return [
        (list(of.token_ids), [{token: log.logprob for token, log in best.items()} for best in of.logprobs])
        for of in found
    ]


def agreement(ours, stock):
    """How many tokens are the same before the first other one, and how far log-probabilities up to there are apart."""
    told = []
    for (tokens, logs), (others, other_logs) in zip(ours, stock, strict=True):
        pairs = zip(tokens, others, strict=True)
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        steps = list(zip(logs, other_logs, strict=True))[: same + 1]
        apart = [abs(one[token] - other[token]) for one, other in steps for token in one.keys() & other.keys()]
        told.append({"tokens": len(tokens), "same": same, "largest": max(apart), "mean": statistics.mean(apart)})
    return told
