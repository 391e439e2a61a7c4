"""Tiny random text encoders with trained tokenizers, saved as real ones are."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

__all__ = ["KINDS", "tiny_encoder"]

LINES = ["a red circle", "a blue square at the left", "two green triangles and a yellow star"]
SIZE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 2}


def _bert() -> tuple[Any, Any]:
    from transformers import BertConfig, BertModel, BertTokenizer

    tokenizer = BertTokenizer().train_new_from_iterator(LINES, 200)
    config = BertConfig(
        **SIZE, **HEADS, vocab_size=len(tokenizer), max_position_embeddings=24, pad_token_id=0
    )
    return BertModel(config), tokenizer


def _clip_parts() -> tuple[dict[str, Any], Any]:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer().train_new_from_iterator(LINES, 300)
    tokenizer.model_max_length = 12
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(tokenizer, name) for name in names}
    text = {**SIZE, **HEADS, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 12}
    return text, tokenizer


def _clip_text() -> tuple[Any, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel

    text, tokenizer = _clip_parts()
    return CLIPTextModel(CLIPTextConfig(**text)), tokenizer


def _clip() -> tuple[Any, Any]:
    from transformers import CLIPConfig, CLIPModel

    text, tokenizer = _clip_parts()
    vision = {**SIZE, **HEADS, "image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision)), tokenizer


def _t5() -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer().train_new_from_iterator(LINES, 100)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return T5EncoderModel(config), tokenizer


def _roberta_like(name: str) -> tuple[Any, Any]:
    """Of 26 positions 24 are read: the first two are for padding."""
    import transformers

    tokenizer = transformers.RobertaTokenizer().train_new_from_iterator(LINES, 300)
    tokenizer.model_max_length = int(1e30)
    more = {"attention_window": 4} if name == "Longformer" else {}
    config = getattr(transformers, f"{name}Config")(
        **SIZE,
        **HEADS,
        **more,
        vocab_size=len(tokenizer),
        max_position_embeddings=26,
        type_vocab_size=1,
        pad_token_id=1,
    )
    return getattr(transformers, f"{name}Model")(config), tokenizer


def _modernbert() -> tuple[Any, Any]:
    from transformers import ModernBertConfig, ModernBertModel

    _, tokenizer = _bert()
    special = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    return ModernBertModel(ModernBertConfig(**SIZE, **HEADS, **size, **special)), tokenizer


def _siglip(whole: bool) -> tuple[Any, Any]:
    import transformers

    tokenizer = transformers.T5Tokenizer().train_new_from_iterator(LINES, 100)
    text = {**SIZE, **HEADS, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    vision = {**SIZE, **HEADS, "image_size": 8, "patch_size": 4}
    if not whole:
        return transformers.SiglipTextModel(transformers.SiglipTextConfig(**text)), tokenizer
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    return transformers.SiglipModel(config), tokenizer


def _bart_like(name: str) -> tuple[Any, Any]:
    import transformers

    tokenizer = transformers.RobertaTokenizer().train_new_from_iterator(LINES, 300)
    tokenizer.model_max_length = int(1e30)
    halves = ("encoder", "decoder")
    size = {f"{half}_{what}": 2 for half in halves for what in ("layers", "attention_heads")}
    size |= {f"{half}_ffn_dim": 32 for half in halves}
    size |= {f"max_{half}_position_embeddings": 24 for half in halves} if name == "LED" else {}
    more = {"attention_window": 4} if name == "LED" else {"max_position_embeddings": 24}
    config = getattr(transformers, f"{name}Config")(
        **size, **more, d_model=16, vocab_size=len(tokenizer)
    )
    return getattr(transformers, f"{name}Model")(config), tokenizer


KINDS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "bert": _bert,
    "clip_text": _clip_text,
    "clip": _clip,
    "t5": _t5,
    "siglip_text": partial(_siglip, whole=False),
    "siglip": partial(_siglip, whole=True),
    "modernbert": _modernbert,
    "bart": partial(_bart_like, "Bart"),
    "led": partial(_bart_like, "LED"),
    "roberta": partial(_roberta_like, "Roberta"),
    "camembert": partial(_roberta_like, "Camembert"),
    "xlm_roberta": partial(_roberta_like, "XLMRoberta"),
    "longformer": partial(_roberta_like, "Longformer"),
    "mpnet": partial(_roberta_like, "MPNet"),
}


def tiny_encoder(kind: str, folder: Path) -> Path:
    """Saves a random encoder of 16-d tokens (kinds: `KINDS`) and its tokenizer into `folder`.

    "bert" reads 24 tokens, "clip_text" and "clip" 12, "t5" has no limit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, tokenizer = KINDS[kind]()
        for parameter in model.parameters():  # the published initial values are too alike
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
