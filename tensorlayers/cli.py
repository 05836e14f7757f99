"""The command line: convert, plan, inspect, eval, calibrate, tune, demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from . import __version__, demo, evaluate, figures, hub, machine, pictures, table, tune
from .budget import Budget
from .calibrate import collect
from .convert import convert_model, plan_conversion
from .errors import TensorlayersError
from .formats import Format, available, from_dict
from .measure import measure
from .plan import ConversionPlan
from .serialize import inspect, load_pretrained, read_index, save_pretrained

_DESCRIPTION = """\
Replace the dense layers of a pretrained network by factorized ones: low rank, tensor train, Tucker, CP.

  tensorlayers plan    MODEL_DIR --format lowrank --params 0.5          what would be done; changes nothing
  tensorlayers convert MODEL_DIR --format lowrank --params 0.5 --out DIR
  tensorlayers inspect DIR                                              the layers of a converted model
  tensorlayers eval    DIR --text FILE                                  quality kept, against its source
  tensorlayers calibrate                                                measure what predicted times rest on, here
  tensorlayers tune                                                     the same for the kernels on a GPU: launch tables
  tensorlayers demo                                                     all of it on a real sentence encoder

MODEL_DIR is a local Hugging Face directory (config.json, weights, tokenizer). Nothing is downloaded."""

_TUNE = """\
Triton kernels are launched by a table for each architecture of GPU. This one starts from the table that comes with the
package, and times the neighbours of the tiles of the chain kernel's rows for half precision: on a GPU, a few minutes.
Nothing else is tuned: the rows for tf32 and float32, the entries of the other kernels and the rates are copied. On an
architecture that the package has no table for, kernels run only once there is one; what is copied to it is cut to
tiles that any GPU holds."""

_FORMATS = """\
which format:
  lowrank   2x to 16x fewer parameters, as much faster as smaller: the one to begin with
  btt       2x to 16x; block matrices, more expressive than low rank at equal cost
  tucker    2x to 16x
  tt, cp    50x to 1000x; at 2x to 16x they are slower than dense, and layers stay dense unless --force

A layer that is predicted to become more than 5 % slower than dense, or to save nothing, stays dense; the plan says
which and why. Embeddings are converted only where --layers names them: they save memory, not time."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns
    -------
    int
        0 on success, 1 where the request could not be met (one line on stderr says why). Wrong usage exits with 2.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (TensorlayersError, OSError) as error:
        print(f"tensorlayers {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tensorlayers", description=_DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    plan = commands.add_parser("plan", help="say what convert would do", epilog=_FORMATS, formatter_class=raw)
    _add_choice(plan)
    plan.add_argument("--no-errors", action="store_true", help="do not decompose the weights to state their errors")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the plan, to edit and give to convert --plan")
    plan.add_argument("--plot", type=Path, metavar="FILE", help="draw the plan: .png, .svg or .pdf (needs matplotlib)")
    plan.set_defaults(run=_plan)

    convert = commands.add_parser("convert", help="convert and save", epilog=_FORMATS, formatter_class=raw)
    _add_choice(convert)
    convert.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the converted model is saved")
    convert.add_argument(
        "--plan", type=Path, metavar="FILE", help="a plan that `plan --json` wrote, instead of a format"
    )
    convert.set_defaults(run=_convert)

    show = commands.add_parser("inspect", help="the layers of a converted model")
    show.add_argument("directory", type=Path, metavar="DIR", help="what convert saved")
    show.set_defaults(run=_inspect)

    evaluation = commands.add_parser("eval", help="quality kept, against the source")
    evaluation.add_argument("directory", type=Path, metavar="DIR", help="what convert saved")
    evaluation.add_argument(
        "--text", type=Path, required=True, metavar="FILE", help="text, one sentence a line (UTF-8)"
    )
    evaluation.add_argument(
        "--source", type=Path, metavar="MODEL_DIR", help="the dense model (default: the one recorded)"
    )
    evaluation.set_defaults(run=_eval)

    calibration = commands.add_parser("calibrate", help="measure what predicted times rest on, on this machine")
    calibration.add_argument("--out", type=Path, metavar="FILE", help="default: where it is used from then on")
    calibration.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    calibration.add_argument("--threads", type=int, metavar="N", help="of a CPU (default: as many as torch has)")
    calibration.add_argument("--quick", action="store_true", help="in a few seconds, less exactly")
    calibration.set_defaults(run=_calibrate)

    tuning = commands.add_parser(
        "tune", help="find the launch table of this machine's GPU", description=_TUNE, formatter_class=raw
    )
    tuning.add_argument("--out", type=Path, metavar="FILE", help="default: where it is used from then on")
    tuning.add_argument("--device", default="cuda", help="the GPU, as torch names it (default: cuda)")
    tuning.set_defaults(run=_tune)

    main_job = commands.add_parser("demo", help="convert a real pretrained sentence encoder and report")
    main_job.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR", help="default: demo-output")
    main_job.set_defaults(run=lambda arguments: demo.run(arguments.out))
    return parser


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a local Hugging Face directory")
    parser.add_argument("--format", choices=sorted(available()), help="default: lowrank")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--params", type=float, metavar="F", help="fraction of each layer's parameters kept (default 0.5)"
    )
    size.add_argument("--rank", type=_ranks, metavar="R[,R...]", help="one rank for all bonds, or one a bond")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="fit the layers to this text, one sentence a line (UTF-8): a few hundred, of the kind that it is for",
    )
    parser.add_argument(
        "--budget", action="store_true", help="--params is of all layers together, spent where the text needs it"
    )
    parser.add_argument("--order", type=int, metavar="N", help="modes a side (2, 3, 4; not for lowrank)")
    parser.add_argument("--split", choices=["channel", "spatial"], help="how lowrank splits a convolution")
    parser.add_argument("--spatial", action="store_true", help="tucker: factorize a kernel's dimensions too")
    parser.add_argument("--layers", metavar="REGEX", help="convert only layers whose whole name matches")
    parser.add_argument("--skip", metavar="REGEX", help="leave layers dense whose whole name matches")
    parser.add_argument(
        "--share", metavar="REGEX", help="factorize jointly the layers whose whole name matches, by captured text"
    )
    parser.add_argument(
        "--fold", action="store_true", help="fold weight norm and the like, and convert these layers too"
    )
    parser.add_argument("--force", action="store_true", help="convert also what becomes slower or larger")


def _ranks(text: str) -> int | tuple[int, ...]:
    try:
        ranks = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"integers, separated by commas; got {text!r}") from None
    return ranks[0] if len(ranks) == 1 else ranks


def _choice(arguments: argparse.Namespace) -> dict[str, Any]:
    params = 0.5 if arguments.params is None else arguments.params
    budget = Budget(params=params) if arguments.budget else None
    if budget and not arguments.text:
        raise TensorlayersError("--budget: with --text FILE, by which it is spent")
    rank = arguments.rank if arguments.rank is not None else 1.0 if budget else params
    options = {"name": arguments.format or "lowrank", "rank": rank}
    if arguments.order is not None:
        options["order"] = arguments.order
    if arguments.split is not None:
        options["split"] = arguments.split
    if arguments.spatial:
        options["spatial"] = True
    format = from_dict(options)
    choice: dict[str, Format | None] = {}
    if arguments.skip:
        choice[f"re:{arguments.skip}"] = None
    choice[f"re:{arguments.layers}" if arguments.layers else "*"] = format
    share = {f"re:{arguments.share}": format} if arguments.share else None
    return {"formats": choice, "share": share, "force": arguments.force, "fold": arguments.fold, "budget": budget}


def _data(arguments: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """What the layers are fitted to: nothing, or batches of text and what they say of the model."""
    if not arguments.text:
        return {}
    texts = [line for line in _read_text(arguments.text).splitlines() if line.strip()]
    batches = list(evaluate.batches_of(hub.load_tokenizer(arguments.model), sorted(texts, key=len)))
    return {"calibration": collect(model, batches), "batches": batches}


def _plan(arguments: argparse.Namespace) -> None:
    choice = _choice(arguments)
    if arguments.plot:
        figures.suffix_of(arguments.plot)  # before the work, since it may fail
    machine.read_measured()  # what a forward only warns of
    model = hub.load_model(arguments.model)
    calibration = _data(arguments, model).get("calibration")
    plan = plan_conversion(model, **choice, calibration=calibration, errors=not arguments.no_errors)
    print(plan)
    _advise(plan)
    if arguments.json:
        arguments.json.write_text(plan.to_json(), encoding="utf-8")
    if arguments.plot:
        figures.save(pictures.plot_plan(plan), arguments.plot)
        print(f"drawn to {arguments.plot}")


def _convert(arguments: argparse.Namespace) -> None:
    choice = _choice(arguments)
    machine.read_measured()
    given = _given_plan(arguments) if arguments.plan else None
    model = hub.load_model(arguments.model)
    data = _data(arguments, model)
    plan = given or plan_conversion(model, **choice, calibration=data.get("calibration"), errors=False)
    converted = convert_model(model, plan, **data)
    save_pretrained(converted, arguments.out, source=str(arguments.model))
    print(plan.with_errors(converted))
    _advise(plan)
    print(f"saved to {arguments.out}")


def _given_plan(arguments: argparse.Namespace) -> ConversionPlan:
    decided = "format params rank budget order split spatial layers skip share fold force"
    for option in decided.split():
        if getattr(arguments, option) not in (None, False):
            raise TensorlayersError(f"a plan is already decided: --plan goes without --{option}")
    return ConversionPlan.from_json(_read_text(arguments.plan))


def _advise(plan: ConversionPlan) -> None:
    if plan.advice:
        print(f"note: {plan.advice}. --force converts them all the same", file=sys.stderr)


def _inspect(arguments: argparse.Namespace) -> None:
    print(inspect(arguments.directory))


def _eval(arguments: argparse.Namespace) -> None:
    source = arguments.source or read_index(arguments.directory).get("source")
    if not source:
        raise TensorlayersError(f"{arguments.directory}: it does not record its source: pass --source MODEL_DIR")
    texts = _read_text(arguments.text).splitlines()
    converted = load_pretrained(arguments.directory)
    print(evaluate.quality(hub.load_model(source), converted, hub.load_tokenizer(source), texts))


def _tune(arguments: argparse.Namespace) -> None:
    tune.destination(arguments.device, arguments.out)  # before the work, since it may fail
    found = tune.tune(arguments.device, progress=lambda rows: tqdm(rows, unit="row", disable=not sys.stderr.isatty()))
    path = tune.write(found, arguments.out)
    if arguments.out is None:
        print(f"saved to {path}, used from now on; delete it to return to the table that comes with the package")
    else:
        print(f"saved to {path}; used in a directory that {machine.VARIABLE} names, as {found.arch}.json")


def _calibrate(arguments: argparse.Namespace) -> None:
    directory = machine.measured()
    used = directory and directory / f"{arguments.device}.json"
    path = arguments.out or used
    if path is None:
        raise TensorlayersError(f"there is no home directory: pass --out FILE, or name one in {machine.VARIABLE}")
    if path.is_dir():
        raise TensorlayersError(f"{path}: it is a directory")
    path.parent.mkdir(parents=True, exist_ok=True)  # before the work, since it may fail
    found = measure(arguments.device, arguments.threads, quick=arguments.quick)
    machine.write(found.machine, path)
    before, now = machine.shipped(arguments.device), found.machine
    rows = [("threads", str(now.threads), str(before.threads))]
    for name in {**before.constants(), **now.constants()}:
        rows.append((name, _number(now.constants().get(name)), _number(before.constants().get(name))))
    print("\n".join(table.lines(("FLOP/s, bytes/s, bytes", "measured", "shipped"), rows)))
    if found.kept:
        print(f"as shipped, since the times do not tell: {', '.join(found.kept)}")
    print(f"matrix products take what these predict within {found.error:.0%} (median)")
    if path == used:
        print(f"saved to {path}, used from now on; delete it to return to the shipped constants")
    else:
        print(f"saved to {path}; used in a directory that {machine.VARIABLE} names, as {arguments.device}.json")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return table.duration(value) if value < 1e-2 else table.count(value)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TensorlayersError(f"{path}: a text in UTF-8: {error}") from None
