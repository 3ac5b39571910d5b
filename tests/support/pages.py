"""README.md and the pages of docs/, taken apart, and what stands in for the models that they download."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^( *)```(\w*)[^\n]*\n(.*?)^\1```[ \t]*\n(?:\s*?^\1```text\n(.*?)^\1```)?", re.MULTILINE | re.DOTALL
)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"(?<!\\)\[[^\[\]]*\]\(([^()\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        place: the page and the line on which it begins.
        language: such as "python".
        code: without the fence.
        prints: the block of text that follows at once, which shows what it prints; None if there is none.
    """

    place: str
    language: str
    code: str
    prints: str | None

    @property
    def downloads(self) -> str | None:
        """The model that the first line names."""
        found = re.match(r"# downloads (\S+)", self.code)
        return found and found[1]

    @property
    def needs_a_gpu(self) -> bool:
        return self.code.startswith("# needs a GPU")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page in their order."""
    text = page.read_text("utf-8")
    blocks = []
    for fence in FENCE.finditer(text):
        place = f"{name_of(page)}:{text.count(chr(10), 0, fence.start()) + 1}"
        blocks.append(Block(place, fence[2], textwrap.dedent(fence[3]), fence[4] and textwrap.dedent(fence[4])))
    return blocks


def commands_of(page: Path) -> list[str]:
    """The lines of a page's shell blocks, fenced or indented."""
    text = page.read_text("utf-8")
    lines = [
        line for block in blocks_of(page) if block.language in ("", "bash", "sh") for line in block.code.split("\n")
    ]
    outside = FENCE.sub("", text)
    lines += [line for line in outside.split("\n") if line.startswith("    ")]
    return [line.strip().removeprefix("$ ") for line in lines]


def local_model(name: str, **options):
    """A model of a few random weights, of the kind that the name says."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

    kinds = {"Qwen2.5": Qwen2Config, "Qwen3": Qwen3Config, "Llama": LlamaConfig, "SmolLM2": LlamaConfig}
    kind = next(kind for part, kind in kinds.items() if part in name)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512}
    config = kind(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=2**17)
    known = {key: value for key, value in options.items() if key in ("dtype", "attn_implementation")}
    return AutoModelForCausalLM.from_config(config, **known).eval()


def local_tokenizer():
    """A tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: token for token, letter in enumerate([*letters, "<end>"])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<end>",
        chat_template="{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
    )
