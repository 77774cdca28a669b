"""Converts a GGUF file to a directory in Hugging Face form, by transformers' own loader."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

from headwise.workers.errors import CheckpointError, HeadwiseError, UnsupportedModelError
from headwise.workers.model.checkpoint import verify_checkpoint
from headwise.workers.model.model_config import load_model_config

STAGES = 4
"""How often :func:`convert` reports."""

_LLAMA_TENSOR = re.compile(
    r"(token_embd|output|output_norm|blk\.\d+\.(attn_(norm|q|k|v|output)|ffn_(norm|gate|up|down)))\.weight"
)


def convert(gguf: Path, directory: Path, advance: Callable[[], None]) -> None:
    """Write config.json, generation_config.json, model.safetensors (float32) and the tokenizer into ``directory``.

    Args:
        advance: called after each of STAGES stages.

    Raises:
        UnsupportedModelError: the file holds another model than a plain Llama, or one of which transformers would
            silently leave something out (biases, scaled rotary embeddings).
        CheckpointError: transformers cannot read it.
    """
    try:
        # What the libraries draw and say meanwhile would tear the progress bar; their failures are exceptions.
        with redirect_stderr(io.StringIO()):
            _refuse_unsupported(gguf)
            advance()
            _convert_tokenizer(gguf, directory)
            advance()
            _convert_model(gguf, directory, advance)
    except (HeadwiseError, OSError):
        raise
    except Exception as error:  # the loaders meet a damaged file with whatever their parsing trips over
        raise CheckpointError(f"{gguf} cannot be converted: {type(error).__name__}: {error}") from error
    verify_checkpoint(directory, load_model_config(directory))
    advance()


def _refuse_unsupported(gguf: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(gguf)  # maps the file
    field = reader.get_field("general.architecture")
    architecture = field.contents() if field else None
    if architecture != "llama":
        raise UnsupportedModelError(f"{gguf}: general.architecture={architecture!r} is not supported; only 'llama' is")
    scaling = reader.get_field("llama.rope.scaling.type")
    if scaling and scaling.contents() != "none":
        raise UnsupportedModelError(
            f"{gguf}: llama.rope.scaling.type={scaling.contents()!r} is not carried over from GGUF; "
            "use the model's safetensors checkpoint"
        )
    for tensor in reader.tensors:
        if not _LLAMA_TENSOR.fullmatch(tensor.name):
            raise UnsupportedModelError(
                f"{gguf}: the tensor {tensor.name} is not carried over from GGUF; "
                "use the model's safetensors checkpoint"
            )


def _convert_tokenizer(gguf: Path, directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
    )
    tokenizer.save_pretrained(directory)


def _convert_model(gguf: Path, directory: Path, advance: Callable[[], None]) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    advance()
    # save_pretrained refuses a model that came from a GGUF file, so this does what it would.
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
