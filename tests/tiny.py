"""A causal LM of 90,000 numbers with everything a large one has: grouped queries, a tokenizer of its own, a tied head.

Embedding rows (304) exceed the tokenizer's pieces, and 304 is no multiple of a head slice (128): both are ordinary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.lora import LoraConfig

PUBLISHER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
LORA = LoraConfig(r=8, alpha=16.0, targets=("q_proj", "v_proj"))
HEAD_ROWS = 128
SIZES: dict[str, Any] = {
    "vocab_size": 304,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "initializer_range": 0.15,  # at 0.02 attention is all but uniform, and a mistake in it would not show
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_SENTENCES = (
    "the quick brown fox jumps over the lazy dog and then the hen",
    "how are you today my friend i am fine and you",
    "the weather in the morning was the best of the week",
)


def write_model(folder: Path, config: Any) -> Path:
    """A model folder of random weights for a transformers configuration; biases and norms are not left at 0 and 1."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(value, std=0.1)
            elif value.dim() == 1:
                torch.nn.init.normal_(value, mean=1.0, std=0.1)
    model.save_pretrained(folder)
    write_tokenizer(folder / "tokenizer.json")
    words = {"bos_token": "<end>", "eos_token": "<end>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder


def write_tokenizer(path: Path) -> None:
    """A byte-level BPE tokenizer trained on three sentences: 300 pieces, <end> is piece 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES * 4, trainer)
    tokenizer.save(str(path))
