"""A random model of 35 KB, small enough for a ConfigMap and of a shape that two ranks can hold, with its tokenizer."""

from __future__ import annotations

import base64
import string
from itertools import product
from pathlib import Path
from typing import Any

NUM_TOKENS, MAX_TOKENS = 256, 65536
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def make_config_map(folder: Path, name: str) -> dict[str, Any]:
    """Return a ConfigMap of the model's files, made in `folder`."""
    make_model(folder)
    files = {path.name: base64.b64encode(path.read_bytes()).decode() for path in folder.iterdir()}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "binaryData": files}


def mount(config_map: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the podTemplate by which the engine sees the model in `folder`, as files, not as links."""
    name = config_map["metadata"]["name"]
    mounts = [
        {"name": name, "mountPath": f"{folder}/{file}", "subPath": file, "readOnly": True}
        for file in config_map["binaryData"]
    ]
    return {"volumes": [{"name": name, "configMap": {"name": name}}], "volumeMounts": mounts}


def make_model(folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    _make_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(_TEMPLATE)


def _make_tokenizer() -> Any:
    """One token for each character of ASCII, and for as many pairs of letters: every token is text of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pairs = map("".join, product(string.ascii_lowercase, repeat=2))
    tokens = [*("Ġ" + string.digits + string.ascii_letters + string.punctuation), *pairs][:NUM_TOKENS]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
