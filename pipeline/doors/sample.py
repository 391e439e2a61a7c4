"""`sample`: from a target and a kernel named in YAML to draws, a table and plots."""

import argparse
import sys
import warnings

from pipeline.doors.shared import add_configuration, say_configuration
from pipeline.files import new_folder, whole

SUMMARY = "draw from a stated density by MCMC"
FREE = ("",)  # options: any argument of pipeline.mcmc.sample
USAGE = "python -m pipeline sample -c FILE.yaml [--KEY VALUE ...]"
DESCRIPTION = """\
Draw from a stated density by Markov chain Monte Carlo: a target of conf/target/ (or any of your
own, by class_path) with a kernel of conf/kernel/. No trained model is needed."""
EPILOG = """\
  --target conf/target/funnel.yaml
  --kernel conf/kernel/mala.yaml
  --kernel.step_size 0.1        any argument of target and kernel can be set like this
  --dim D                       the number of coordinates, where the target does not say
  --chains 16                   how many chains, from points around 0 of standard deviation SPREAD
  --spread 1.0
  --draws 1000                  steps of each chain that are kept
  --warmup 500                  steps before them, in which the step size and the unit of each
                                coordinate are found, and then frozen
  --compile true                compile the kernel and the density first, in some seconds
  --seed 0                      the same seed, the same draws

Prints mean, standard deviation, quantiles, effective sample sizes and R-hat of each coordinate,
and warns where the chains have not met or have diverged. The folder gets draws.safetensors with
x (draws, chains, D), config.yaml, trace.png and pairs.png."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser, "for example conf/sample/banana.yaml")
    parser.add_argument("--out", metavar="FOLDER", help="where to write (default: outputs/TIME)")


def run(args: argparse.Namespace, options: list[str], line: str) -> int:
    """Draw, print the table, and write the draws, how they were made, and their plots."""
    import yaml
    from safetensors.torch import save_file

    from pipeline.building import Config, dump, make
    from pipeline.figures import pairs, save, traces
    from pipeline.mcmc import sample
    from pipeline.mcmc.diagnostics import table

    config = Config(args.config, options)
    config.tree.pop("out", None)  # where another run was written
    plan = config.call(sample)
    text = yaml.safe_dump(dump(plan)["init_args"], sort_keys=False, allow_unicode=True)
    if say_configuration(args, plan, text):
        return 0
    parts = {name: make(part) for name, part in plan.arguments.items()}
    with new_folder(args.out, ("draws.safetensors",)) as out:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            draws = sample(**parts)
            print(table(draws))
        for warning in caught:
            print(f"warning: {warning.message}", file=sys.stderr)
        numbers = {"x": draws.x, "acceptance": draws.acceptance, "diverged": draws.diverged}
        tensors = {name: x.contiguous() for name, x in numbers.items() if x is not None}
        with whole(out / "draws.safetensors") as part:
            save_file(tensors, part, {"command": line, "config": text})
        (out / "config.yaml").write_text(text, encoding="utf-8")
        save(traces(draws.x), out / "trace.png", {"command": line})
        save(pairs(draws.x), out / "pairs.png", {"command": line})
        print(f"draws.safetensors, config.yaml, trace.png and pairs.png are in {out}")
    return 0
