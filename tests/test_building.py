"""Objects from YAML: what is wanted is made, and what goes wrong is one sentence."""

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.building import Config, Part, brief, build, describe, dump, explain, make, replace
from pipeline.building.annotations import concrete
from pipeline.codec import Standardised
from pipeline.conditioning import Classes, Number, Several
from pipeline.data import DataModule, Points
from pipeline.denoisers import EDM, Denoiser, Energy
from pipeline.errors import UserError
from pipeline.guidance import Autoguidance, ClassifierFree, Guidance
from pipeline.mcmc import ULA, Gaussian, GaussianMixture, HalfDenoising, Kernel
from pipeline.networks import MLP, UNet
from pipeline.samplers import DDIM, Heun, Langevin, Sampler
from pipeline.schedules import VE, VP, Rectified, Schedule


def test_every_constructor_says_its_arguments() -> None:
    """`*args, **kwargs` would let anything in; Python 3.11.2 has that for `__new__`'s sake."""
    ours = {one for one in concrete(Part) if one.__module__.startswith("pipeline.")} - {Part}
    assert len(ours) > 60
    for cls in ours:
        kinds = {one.kind for one in inspect.signature(cls).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}, cls


def example(
    sampler: Sampler,
    guidance: Guidance | None = None,
    parts: list[Kernel] | None = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.AdamW,
    function: Callable[[torch.Tensor], torch.Tensor] | None = None,
    number: int = 3,
    rate: float = 0.5,
    name: str = "x",
    pair: tuple[float, float] = (0.0, 1.0),
    several: int | list[int] | None = None,
) -> None:
    """The keys of a YAML.

    Arguments:
        sampler: How to
            draw.
        number: How many.
    """


def written(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


HEUN = "class_path: pipeline.samplers.Heun\ninit_args: {steps: 4, rho: 5.0}\n"


def called(config: Config) -> dict[str, Any]:
    return {k: make(v) for k, v in config.call(example).arguments.items()}


def test_includes_are_found_from_the_file_that_names_them(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "b/heun.yaml").write_text(HEUN)
    (tmp_path / "b/ula.yaml").write_text("class_path: pipeline.mcmc.ULA\n")
    text = "sampler: ../b/heun.yaml\nparts: [../b/ula.yaml, {class_path: pipeline.mcmc.MALA}]\n"
    (tmp_path / "a/x.yaml").write_text(text)
    found = called(Config([tmp_path / "a/x.yaml"], ["--sampler.steps", "7"]))
    assert type(found["sampler"]) is Heun and found["sampler"].steps == 7
    assert found["sampler"].rho == 5.0 and [type(k).__name__ for k in found["parts"]] == [
        "ULA",
        "MALA",
    ]


def test_options_win_over_files_and_later_files_over_earlier(tmp_path: Path) -> None:
    first = written(tmp_path, first="sampler: heun.yaml\nnumber: 1\nname: a\n", heun=HEUN)
    second = tmp_path / "second.yaml"
    second.write_text("number: 2\nsampler: {init_args: {rho: 3.0}}\n")
    found = called(Config([first, second], ["--name=b"]))
    assert (found["number"], found["name"]) == (2, "b")
    assert (found["sampler"].steps, found["sampler"].rho) == (4, 3.0)  # merged
    # another class takes the place of the one before, with all of its arguments
    second.write_text("sampler: {class_path: pipeline.samplers.DDIM, init_args: {steps: 9}}\n")
    found = called(Config([first, second]))
    assert type(found["sampler"]) is DDIM and found["sampler"].rho == 7.0


def test_values_are_what_is_wanted(tmp_path: Path) -> None:
    file = written(tmp_path, x="sampler: heun.yaml\npair: [1, 2.5]\nrate: 1e-3\n", heun=HEUN)
    found = called(Config([file], ["--name", "007", "--several", "[1, 2]", "--number", "5"]))
    assert found["name"] == "007" and found["several"] == [1, 2] and found["number"] == 5
    assert found["pair"] == (1.0, 2.5) and found["rate"] == 1e-3
    assert isinstance(called(Config([file], ["--rate", "2"]))["rate"], float)
    assert (
        called(Config([file], ["--name", "null"]))["name"] == "null"
    )  # text where text is wanted
    assert called(Config([file], ["--several", "null"]))["several"] is None


def test_a_factory_has_an_open_end(tmp_path: Path) -> None:
    text = "sampler: heun.yaml\noptimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}\n"
    found = called(Config([written(tmp_path, x=text, heun=HEUN)], ["--optimizer.momentum", "0.5"]))
    made = found["optimizer"]([nn.Parameter(torch.zeros(1))])
    assert type(made) is torch.optim.SGD and made.defaults["momentum"] == 0.5
    assert made.defaults["lr"] == 0.1


def test_a_function_is_named_by_its_path(tmp_path: Path) -> None:
    text = "sampler: heun.yaml\nfunction: torch.nn.functional.silu\n"
    found = called(Config([written(tmp_path, x=text, heun=HEUN)]))
    assert found["function"] is nn.functional.silu


def test_lists_are_appended_to(tmp_path: Path) -> None:
    text = "sampler: heun.yaml\nparts: [{class_path: pipeline.mcmc.ULA}]\n"
    file = written(tmp_path, x=text, heun=HEUN, mala="class_path: pipeline.mcmc.MALA\n")
    found = called(Config([file], ["--parts+", str(tmp_path / "mala.yaml")]))
    assert [type(kernel).__name__ for kernel in found["parts"]] == ["ULA", "MALA"]


def test_what_was_checked_can_be_written_down_and_read_again(tmp_path: Path) -> None:
    import yaml

    text = "sampler: heun.yaml\noptimizer: {class_path: torch.optim.SGD}\npair: [0, 1]\n"
    plan = Config([written(tmp_path, x=text, heun=HEUN)]).call(example)
    told = dump(plan)["init_args"]
    assert told["sampler"]["class_path"] == "pipeline.samplers.Heun"
    assert told["sampler"]["init_args"].items() >= {"steps": 4, "rho": 5.0, "churn": 0.0}.items()
    assert told["number"] == 3  # a default is stated
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(told))
    assert dump(Config([tmp_path / "again.yaml"]).call(example))["init_args"] == told


def test_every_option_is_explained(tmp_path: Path) -> None:
    plan = Config([written(tmp_path, x="sampler: heun.yaml\n", heun=HEUN)]).call(example)
    said = "\n".join(explain(plan))
    assert "--sampler  (Sampler)  How to draw." in said
    assert "--number 3  (int)  How many." in said
    assert "--sampler.steps 4  (int)  The number of times N" in said


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (
            "sampler: none.yaml",
            [],
            "none.yaml in .*x.yaml: there is no such file.*has .*heun.yaml",
        ),
        (
            "sampler: heun.yaml\nnumbr: 1",
            [],
            r"numbr is not an argument of example; did you mean number\? \(from .*x",
        ),
        ("sampler: heun.yaml", ["--sampler.stps", "3"], "stps is not an argument of Heun.*steps"),
        ("sampler: heun.yaml", ["--number", "two"], "number is 'two'; expected int"),
        ("sampler: heun.yaml\nnumber: 1.5", [], r"number is 1.5; expected int \(from .*x.yaml\)"),
        ("sampler: heun.yaml\nnumber: true", [], "number is true; expected int"),
        ("sampler: heun.yaml", ["--number"], "--number has no value"),
        ("sampler: heun.yaml", ["number", "3"], "'number' is no option"),
        (
            "sampler: heun",
            [],
            "sampler is 'heun'; expected Sampler; choose a file such as conf/sampler/heun.yaml, ",
        ),
        ("sampler: null", [], "sampler is null; expected Sampler"),
        ("number: 3", [], "sampler is needed by example and is not set"),
        ("sampler: {init_args: {steps: 3}}", [], "sampler names no class_path"),
        ("sampler: {class_path: pipeline.mcmc.ULA}", [], "ULA, which is no Sampler"),
        ("sampler: {class_path: pipeline.samplers.Sampler}", [], "Sampler, which is a family"),
        ("sampler: {class_path: pipeline.samplers.Huen}", [], "has no Huen; did you mean Heun"),
        ("sampler: {class_path: nowhere.Mine}", [], "there is no module nowhere"),
        ("sampler: {class_path: torch.nn.functional.silu}", [], "which is not a class"),
        ("sampler: {class_path: 7}", [], "has the class_path 7, which is none"),
        (
            "sampler: {class_path: pipeline.samplers.Heun, init_args: 3}",
            [],
            "has the init_args 3; expected keys",
        ),
        ("sampler: heun.yaml", ["--sampler.steps", "0"], "cannot be made: steps = 0"),
        ("sampler: heun.yaml\noptimizer: {class_path: pipeline.mcmc.ULA}", [], "no Optimizer"),
        ("sampler: heun.yaml\nfunction: nowhere.f", [], "there is no module nowhere"),
        ("sampler: heun.yaml\nparts: [heun.yaml]", [], r"parts.0 is pipeline.*Heun, .*no Kernel"),
        ("- 1", [], "holds .1.; expected keys and values"),
        ("a: [", [], "x.yaml cannot be read as YAML"),
        ("sampler: x.yaml", [], "x.yaml in .*x.yaml includes itself"),
    ],
)
def test_each_mistake_is_one_sentence(
    text: str, options: list[str], said: str, tmp_path: Path
) -> None:
    file = written(tmp_path, x=text, heun=HEUN)
    with pytest.raises(UserError, match=said) as error:
        called(Config([file], options))
    assert "\n" not in str(error.value)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbf" + HEUN.encode())
    config = Config()
    config.tree["sampler"] = None
    config.add(["--sampler", str(tmp_path / "x.yaml")])
    assert make(config.resolve("sampler", Sampler)).steps == 4


PARTS = [
    Heun(5, 3.0),
    Langevin(ULA(0.3), [0.1, 0.2], 7),
    Langevin(kernel=HalfDenoising(1.0)),
    VE(sigma_min=0.01),
    ClassifierFree(3),
    GaussianMixture(torch.tensor([[0.0, 1.0]]), [0.5]),
    Gaussian([0.0], [[2.0]]),
    Classes(["a", "b"]),
    Several({"machine": Classes(["a", "b"]), "load": Number(0.5, 2.0)}),
    Standardised(["a", "b"], [0.0, 1.0], [1.0, 2.0], [0, None]),
    MLP(2, 3, depth=1),
    UNet(1, widths=[16], attention=[0]),
    EDM(MLP(2), Rectified(), sigma_data=0.3),
    Points(GaussianMixture([[0.0]], [1.0]), Classes(["a"]), rows=5),
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_a_part_is_built_again_from_what_it_says(part: Any) -> None:
    node = describe(part)
    again = build(node, type(part))
    assert type(again) is type(part) and describe(again) == node
    assert brief(part)["class"] == type(part).__name__


class Above(Part):
    def __init__(self, kept: int, size: int = 1, seed: int = 2, rate: float = 0.5) -> None:
        self.told = kept, size, seed, rate


class Between(Above):
    size = 7  # fixed

    def __init__(self, name: str, rate: float = 0.25, **more: Any) -> None:
        super().__init__(0, self.size, rate=rate, **more)


class Below(Between):
    pass


def test_more_are_the_arguments_of_the_class_above() -> None:
    given = {"name": "a", "seed": 5}
    plan = Config(options=["--part.class_path", f"{__name__}.Below"])
    for key, value in given.items():
        plan.set(f"part.{key}", value)
    made = make(plan.resolve("part", Above))
    assert made.told == (0, 7, 5, 0.25)
    assert describe(made)["init_args"] == {"name": "a", "rate": 0.25, "seed": 5}
    assert [*inspect.signature(Below).parameters] == ["name", "rate", "seed"]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("size", 3, "not an argument"),
        ("kept", 3, "not an argument"),
        ("seed", "x", "expected int"),
    ],
)
def test_more_are_checked(key: str, value: object, said: str) -> None:
    config = Config(options=["--part.class_path", f"{__name__}.Below", "--part.name", "a"])
    config.set(f"part.{key}", value)
    with pytest.raises(UserError, match=said):
        config.resolve("part", Above)


def test_a_copy_says_the_same() -> None:
    import copy

    kernel = ULA(0.25)
    assert describe(copy.copy(kernel)) == describe(copy.deepcopy(kernel)) == describe(kernel)


def test_names_that_were_learned_are_said() -> None:
    classes = Classes()
    classes.learn(["cat", "dog"])
    assert describe(classes)["init_args"] == {"names": ["cat", "dog"]}


def test_values_of_a_dictionary_are_built() -> None:
    node = describe(Several({"machine": Classes(["a"])}))
    node["init_args"]["parts"]["load"] = {"class_path": "pipeline.samplers.Heun"}
    with pytest.raises(UserError, match="several.parts.load is pipeline.samplers.Heun, which is"):
        build(node, Several)
    told = ["--u.parts.load.mean", "2"]  # over what stands there, as everywhere
    node["init_args"]["parts"]["load"] = {"class_path": "pipeline.conditioning.Number"}
    config = Config()
    config.set("u", node)
    config.add(told)
    assert make(config.resolve("u", Several)).parts["load"].mean == 2.0


def test_what_is_no_part_cannot_be_described() -> None:
    with pytest.raises(UserError, match="Linear.*Derive its class"):
        describe(EDM(nn.Linear(2, 2), VP()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("node", "kind"),
    [
        ({"class_path": "pipeline.mcmc.ULA"}, Sampler),  # of ours, of another family
        ({"class_path": "pipeline.cli.Parser"}, Schedule),
        ({"class_path": "pipeline.module.ScoreModule"}, Denoiser),
        ({"class_path": "pipeline.data.Shapes"}, Sampler),
        ({"class_path": "torch.nn.Identity"}, Denoiser),  # foreign
        ({"class_path": "subprocess.Popen", "init_args": {"args": ["true"]}}, Sampler),
        ({"class_path": "pipeline.samplers.base.torch"}, Sampler),  # a module
        ({"class_path": "pipeline.samplers.base.torch.nn.Module"}, Sampler),  # through ours
        ({"class_path": "pipeline.cli.main"}, Sampler),  # a function
        ({"class_path": "pipeline.building.Part"}, Sampler),
        ({"class_path": "pipelines.Sampler"}, Sampler),  # begins like ours
        (
            {
                "class_path": "pipeline.denoisers.EDM",  # right itself, and wrong inside
                "init_args": {
                    "network": {
                        "class_path": "pipeline.evaluation.features.inception.InceptionV3"
                    },
                    "schedule": {"class_path": "pipeline.schedules.VP"},
                },
            },
            Denoiser,
        ),
        (
            {
                "class_path": "pipeline.samplers.Langevin",
                "init_args": {"kernel": {"class_path": "os.system"}},
            },
            Sampler,
        ),
        ("pipeline.samplers.Heun", Sampler),
        ([], Sampler),
        ({"class_path": "pipeline.samplers.Heun", "init_args": {"steps": "4"}}, Sampler),
        ({"class_path": "pipeline.samplers.Heun", "init_args": {"stps": 4}}, Sampler),
    ],
)
def test_a_description_may_name_the_wanted_families_only(node: Any, kind: type) -> None:
    with pytest.raises(UserError):
        build(node, kind)


def test_trust_lets_a_package_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_samplers.py").write_text(
        "from pipeline.samplers import Heun\nclass Mine(Heun):\n    pass\nclass Other:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    node = {"class_path": "my_samplers.Mine", "init_args": {"steps": 3}}
    with pytest.raises(UserError, match="not in a trusted package.*--trust"):
        build(node, Sampler)
    assert build(node, Sampler, ["my_samplers"]).steps == 3
    with pytest.raises(UserError, match="no Sampler"):
        build({"class_path": "my_samplers.Other"}, Sampler, ["my_samplers"])
    with pytest.raises(UserError, match="no DataModule"):
        build(node, DataModule, ["my_samplers"])


def test_a_file_may_stand_for_a_denoiser(tmp_path: Path) -> None:
    weak = Energy(MLP(2), VP())
    node = {"class_path": "pipeline.guidance.Autoguidance", "init_args": {"denoiser": "w.ckpt"}}
    config = Config()
    config.set("guidance", node)
    guidance = make(config.resolve("guidance", Guidance, openers={Denoiser: lambda file: weak}))
    assert isinstance(guidance, Autoguidance) and guidance.denoiser is weak
    assert describe(guidance)["init_args"]["denoiser"] == "w.ckpt"
    with pytest.raises(UserError, match="denoiser is 'w.ckpt'; expected Denoiser"):
        config.resolve("guidance", Guidance)


def test_a_part_is_made_anew_with_other_arguments() -> None:
    first = DDIM(7, rho=3.0)
    other = replace(first, steps=9)
    assert (other.steps, first.steps) == (9, 7)
    assert describe(other)["init_args"] == describe(first)["init_args"] | {"steps": 9}
    assert replace(ClassifierFree(2.0, [0.5, 2.0]), scale=3).interval == (0.5, 2.0)
    with pytest.raises(ValueError, match="steps = 0"):
        replace(first, steps=0)
    with pytest.raises(TypeError, match="etta"):
        replace(first, etta=1.0)


def test_conf_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the folder first, else the one that came with the package."""
    monkeypatch.chdir(tmp_path)
    assert Config(["conf/sampler/ddim.yaml"]).get("init_args.steps")
    (tmp_path / "conf/sampler").mkdir(parents=True)
    (tmp_path / "conf/sampler/ddim.yaml").write_text("class_path: a.B\ninit_args: {steps: 5}")
    assert Config(["conf/sampler/ddim.yaml"]).get("init_args.steps") == 5
    with pytest.raises(UserError, match="conf/sampler/heunn.yaml: there is no such file"):
        Config(["conf/sampler/heunn.yaml"])


def test_a_list_is_no_mapping_of_anything() -> None:
    """Of what may be anything there are no members to look for."""

    def made(options: dict[str, Any] | None = None) -> Any:
        return options

    for value in ([1], [], [[]]):
        config = Config()
        config.set("options", value)
        with pytest.raises(
            UserError, match=r"options is \[.*\]; expected dict of str, Any or null"
        ):
            config.call(made)


def test_arguments_beside_a_class_count_in_a_list_too() -> None:
    def made(callbacks: list[Sampler]) -> list[Sampler]:
        return callbacks

    config = Config()
    heun = {"class_path": "pipeline.samplers.Heun", "steps": 3}
    config.set("callbacks", [heun, {**heun, "init_args": {"churn": 0.1}}])
    assert [one.steps for one in made(**called_with(config, made))] == [3, 3]
    config.set("callbacks", [{**heun, "nonsense": 7}])
    with pytest.raises(UserError, match="nonsense is not an argument of Heun"):
        config.call(made)


def called_with(config: Config, function: Callable) -> dict[str, Any]:
    return {name: make(one) for name, one in config.call(function).arguments.items()}


def test_what_is_not_set_is_set_by_its_option() -> None:
    def made(known: str | torch.Tensor) -> Any:
        return known

    config = Config()
    config.set("known", None)
    with pytest.raises(UserError, match="known is null; expected .*; set it by --known"):
        config.call(made)


@pytest.mark.parametrize("given", ["tensorboard", ["wandb"]])
def test_a_word_is_no_member(given: Any) -> None:
    def made(logger: Sampler | Iterable[Sampler] | bool | None = None) -> Any:
        return logger

    config = Config()
    config.set("logger", given)
    with pytest.raises(UserError, match=r"logger.* is '(tensorboard|wandb)'; expected") as told:
        config.call(made)
    assert "conf/" not in str(told.value)
