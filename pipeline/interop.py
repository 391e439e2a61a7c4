"""A model of ours for whoever has diffusers: a `DiffusionPipeline` around it.

    pipe = ScorePipeline(ScoreModel.from_pretrained("circles"))
    pipe("a small red circle", generator=torch.Generator().manual_seed(3)).images[0]
    pipe.save_pretrained("pipe")  # ScorePipeline.from_pretrained("pipe") is diffusers' loader

It wants `pip install diffusers`; nothing of ours imports this module.
"""

import copy
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, PositiveInt, validate_call

from pipeline.building import replace
from pipeline.errors import UserError
from pipeline.generator import Generator
from pipeline.guidance import ClassifierFree

try:
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
    from PIL import Image
except ImportError as error:
    raise UserError("A diffusers pipeline wants diffusers: pip install diffusers.") from error

__all__ = ["ScoreModel", "ScorePipeline"]


Prompts = str | Annotated[list[str] | tuple[str, ...], Field(min_length=1)]
Generators = torch.Generator | list[torch.Generator]
STRICT = ConfigDict(arbitrary_types_allowed=True, strict=True)


class ScoreModel(ModelMixin):
    """An exported model as a part of a diffusers pipeline, which keeps it as `export` does.

    Arguments:
        generator: What draws, of pictures.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        if not generator.codec.pictures:
            raise UserError(f"A model of {generator.codec.plural} is no pipeline of pictures.")
        self.generator, self.denoiser = generator, generator.denoiser

    @classmethod
    def from_pretrained(cls, name: Any, **_: Any) -> "ScoreModel":  # type: ignore[override]
        """The model in a folder, or of a name on the hub; diffusers' own options do nothing."""
        return cls(Generator.from_pretrained(name))

    def save_pretrained(self, folder: Any, **_: Any) -> None:  # type: ignore[override]
        self.generator.save_pretrained(folder)


class ScorePipeline(DiffusionPipeline):
    """Draws what `Generator` draws, to the last bit, by the names of diffusers.

    Arguments:
        model: The model.
    """

    def __init__(self, model: ScoreModel) -> None:
        super().__init__()
        self.register_modules(model=model)

    @torch.inference_mode()
    @validate_call(config=STRICT)
    def __call__(
        self,
        prompt: Prompts,
        num_inference_steps: PositiveInt | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: PositiveInt = 1,
        generator: Generators | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Pictures of each prompt in turn.

        Arguments:
            prompt: A prompt, or several.
            num_inference_steps: The steps of the sampler; its own by default.
            guidance_scale: The scale of its guidance, or of `ClassifierFree`.
            num_images_per_prompt: How many of each.
            generator: Its `initial_seed` is the seed of the first picture of each prompt, as
                `generate --seed` is; those that follow have the next ones. A list has one for
                each picture.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], or "pt" (B, C, H, W) likewise.

        Raises:
            ValueError: An argument is of another kind, or out of its range, or the model was cast
                to another dtype.
        """
        if self.model.dtype != torch.float32:
            said = f"The model draws in float32 and was cast to {self.model.dtype}"
            raise ValueError(f"{said}; load it again and give `to` a device alone.")
        own: Any = copy.copy(self.model.generator)
        prompts, n = [prompt] if isinstance(prompt, str) else [*prompt], num_images_per_prompt
        values = [one for one in prompts for _ in range(n)]
        if isinstance(generator, list):
            seeds = [one.initial_seed() for one in generator]
        else:
            first = 0 if generator is None else generator.initial_seed()
            seeds = [first + k for _ in prompts for k in range(n)]
        if len(seeds) != len(values):
            said = f"generator has {len(seeds)} for {len(values)} pictures"
            raise ValueError(f"{said}; give one for each, or a single one.")
        if num_inference_steps is not None:
            own.sampler = replace(own.sampler, steps=num_inference_steps)
        if guidance_scale is not None:
            own.guidance = replace(own.guidance or ClassifierFree(), scale=guidance_scale)
        steps, bars = own.rounds(len(values)) * own.sampler.steps, self.progress_bar
        with bars(total=steps) as bar:  # type: ignore[call-arg]
            rows = torch.cat(list(own(values, seeds, progress=lambda state: bar.update())))
        images: Any = rows.float() / 255
        if output_type == "np":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        elif output_type == "pil":
            arrays = rows.permute(0, 2, 3, 1).cpu().numpy()
            images = [Image.fromarray(a if a.shape[2] > 1 else a[..., 0]) for a in arrays]
        return ImagePipelineOutput(images=images) if return_dict else (images,)
