"""The command line: train, eval, generate, export and the others of --help. Bad input is one line, exit code 2."""

from __future__ import annotations

import argparse
import inspect
import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import antlm_fast
from antlm_fast.cores import choose_waiting
from antlm_fast.types import InputError, Objective

if TYPE_CHECKING:
    from antlm_fast.models import LanguageModel
    from antlm_fast.prime import AttentionSizes
    from antlm_fast.training.config import TrainConfig

READ_OUTS = ("causal", "masked", "mntp")
MODEL = "run folder, model folder, or a checkpoint such as RUN/checkpoints/step_00000100"


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 bad input, 130 interrupted, 143 or 129 ended by a signal."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a character gets its number
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        for name in ("prompt", "text", "data"):
            _check_text(name, getattr(options, name, None))
            if str(getattr(options, name, "")).startswith("\ufeff"):  # the byte order mark of "$(cat FILE)"
                setattr(options, name, getattr(options, name).removeprefix("\ufeff"))
        if options.command in (_train, _eval, _generate, _fill, _doctor) and (line := choose_waiting()):
            print(line, file=sys.stderr)
        options.command(options)
    except InputError as error:
        return _complain(str(error))
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        return 0
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ModuleNotFoundError as error:
        if error.name in ("tokenizers", "tqdm", "matplotlib"):
            return _complain(f"this command needs {error.name}: pip install '.[train]' in antlm_fast's checkout")
        if error.name == "triton" and options.command is _prime:
            return _complain("prime needs triton: pip install '.[gpu]' in antlm_fast's checkout")
        raise
    except KeyboardInterrupt as error:
        if not error.args:  # where there are, `train` has said them
            print("antlm-fast: interrupted", file=sys.stderr)
        return 130
    except SystemExit as error:  # SIGTERM or SIGHUP stopped `train`
        return int(error.code or 0)
    return 0


def _check_text(name: str, value: object) -> None:
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} must be text in the terminal's encoding; got {value!r}") from None


def _complain(message: str) -> int:
    print(f"antlm-fast: {' '.join(message.split())}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """Refuses an option that is given twice, where the last would win without a word."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("action", None, _Once)


class _Once(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        given = vars(namespace).setdefault("given", set())
        if option is not None and self.dest in given:
            before = getattr(namespace, self.dest)
            raise argparse.ArgumentError(self, f"must be given once; got {str(before)!r} and {str(values)!r}")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="antlm-fast", description="Train one transformer under causal and masked language modelling.")
    parser.add_argument("--version", action="version", version=f"antlm-fast {antlm_fast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train from a recipe or a config file, or resume a run")
    train.add_argument("--recipe", metavar="NAME", help="see `antlm-fast recipes list`")
    train.add_argument("--config", metavar="FILE", type=Path, help=".toml, .json, or the config.json of a run")
    train.add_argument("--data", metavar="PATH", help="training text: file, folder, JSONL, .gz, builtin, hf:NAME")
    train.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help="such as optimizer.lr=1e-3")
    train.add_argument("--output", metavar="FOLDER", type=Path, help="run folder (runs/RECIPE)")
    train.add_argument("--resume", action="store_true", help="go on where the run in the folder was stopped")
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("eval", help="score minimal pairs and held-out text")
    evaluate.add_argument("model", type=Path, help=MODEL)
    evaluate.add_argument("--pairs", metavar="PATH", help="JSONL file or folder in BLiMP's form, or builtin")
    evaluate.add_argument("--text", metavar="PATH", help="held-out text: perplexity under each objective")
    evaluate.add_argument("--text-field", default="text", help="where a JSON line of --text has its text")
    evaluate.add_argument("--read-out", choices=READ_OUTS, action="append", help="may be repeated (causal, masked)")
    evaluate.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    evaluate.add_argument("--device", default="auto")
    evaluate.add_argument("--output", metavar="FILE", type=Path, help="also write the numbers as JSON")
    evaluate.set_defaults(command=_eval)

    generate = commands.add_parser("generate", help="continue a text (causal read-out)")
    generate.add_argument("model", type=Path, help=MODEL)
    generate.add_argument("--prompt", default="", help="text to continue")
    generate.add_argument("--max-new-tokens", type=int, default=40)
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(command=_generate)

    fill = commands.add_parser("fill", help="fill the masks of a text (masked read-out)")
    fill.add_argument("model", type=Path, help=MODEL)
    fill.add_argument("text", help="text with the model's mask token in it, such as 'The <mask> sleeps.'")
    fill.add_argument("--top-k", type=int, default=5)
    fill.add_argument("--mntp", action="store_true", help="read each mask at the position before it")
    fill.set_defaults(command=_fill)

    export = commands.add_parser("export", help="write a model, such as a checkpoint's, in Hugging Face's layout")
    export.add_argument("model", type=Path, help=MODEL)
    export.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="a folder that does not exist")
    export.set_defaults(command=_export)

    take = commands.add_parser("import", help="make a model folder of a public LTG-BERT or GPT-BERT checkpoint")
    take.add_argument("weights", type=Path, help="folder or file: .safetensors, .bin, .pt; tokenizer.json beside it")
    take.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="a folder that does not exist")
    take.add_argument("--heads", metavar="N", type=int, help="attention heads (config.json's num_attention_heads)")
    take.add_argument("--config", metavar="FILE", type=Path, help="(config.json beside the weights)")
    take.set_defaults(command=_import)

    recipes = commands.add_parser("recipes", help="list the recipes, or show one with its sources")
    kinds = recipes.add_subparsers(required=True, metavar="list|show")
    kinds.add_parser("list").set_defaults(command=_recipes_list)
    show = kinds.add_parser("show")
    show.add_argument("name")
    show.set_defaults(command=_recipes_show)

    prime = commands.add_parser("prime", help="compile the GPU kernels of a recipe ahead of its first step")
    prime.add_argument("--arch", metavar="NAME", action="append", help="such as 90; may be repeated (the GPU here)")
    prime.add_argument("--recipe", metavar="NAME", help="whose model's sizes are taken (antlm-babyllama)")
    prime.add_argument("--config", metavar="FILE", type=Path, help="the same from a config file")
    prime.add_argument("--head-dim", metavar="N", type=int, help="sizes of your own call of attention, instead")
    prime.add_argument("--heads", metavar="N", type=int, help="with --head-dim")
    prime.add_argument("--kv-heads", metavar="N", type=int, help="with --head-dim (as --heads)")
    prime.add_argument("--dropout", action="store_true", help="with --head-dim: attention with dropout")
    prime.add_argument("--precision", choices=("bfloat16", "float16", "float32"), help="(the recipe's, or bfloat16)")
    prime.set_defaults(command=_prime)

    doctor = commands.add_parser("doctor", help="what is installed, and which implementation serves which op here")
    doctor.set_defaults(command=_doctor)
    return parser


def _train(options: argparse.Namespace) -> None:
    from antlm_fast.pipeline import train

    if options.recipe and options.config:
        raise InputError("--recipe and --config must be given one at a time; got both")
    config = _config(options)
    if config is None:
        if not (options.resume and options.output):
            raise InputError("--recipe or --config must be given, or --resume with --output; got neither")
        run_folder: Path = options.output
    else:
        run_folder = options.output or Path("runs") / config.name
    train(config, run_folder, resume=options.resume)


def _config(options: argparse.Namespace) -> TrainConfig | None:
    """The recipe's or file's config with --data and --set; of a run that is resumed, its own with what is given."""
    from antlm_fast.pipeline import stored_config
    from antlm_fast.recipes import get_recipe
    from antlm_fast.training.settings import apply_settings, read_config_file

    if options.recipe:
        config = get_recipe(options.recipe)
        run_folder = options.output or Path("runs") / config.name
        if options.resume and (run_folder / "config.json").exists():
            config = stored_config(run_folder)
            if config.name != options.recipe:
                raise InputError(f"--recipe must be the run's in {run_folder}, {config.name!r}; got {options.recipe!r}")
    elif options.config:
        config = read_config_file(options.config)
    elif options.resume and options.output and (options.output / "config.json").exists():
        config = stored_config(options.output)
    else:
        return None
    return apply_settings(config, options.set, train=options.data)


def _eval(options: argparse.Namespace) -> None:
    from antlm_fast.environment import resolve_device, resolve_precision
    from antlm_fast.evaluation.held_out_text import score_text
    from antlm_fast.evaluation.minimal_pairs import format_table
    from antlm_fast.pipeline import open_model, score_pairs

    if not options.pairs and not options.text:
        raise InputError("--pairs or --text must be given; got neither")
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    model, tokenizer = open_model(options.model)
    model.to(device)
    numbers: dict[str, Any] = {}
    read_outs = tuple(options.read_out or READ_OUTS[:2])
    if options.pairs:
        numbers["minimal_pairs"] = score_pairs(model, tokenizer, options.pairs, read_outs, precision)
        print(format_table(numbers["minimal_pairs"]))
    if options.text:
        numbers["text"] = score_text(
            model,
            tokenizer,
            options.text,
            precision,
            text_field=options.text_field,
            masked=[Objective.MLM, *([Objective.MNTP] if "mntp" in read_outs else [])],
        )
        print(f"{numbers['text']['num_tokens']:,} tokens of {options.text}")
        for objective, scores in numbers["text"]["objectives"].items():
            print(f"{objective:6}loss {scores['loss']:.4f}  perplexity {scores['perplexity']:.2f}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def _generate(options: argparse.Namespace) -> None:
    from antlm_fast.models.decoding import generate
    from antlm_fast.pipeline import open_model

    model, tokenizer = open_model(options.model)
    ids = tokenizer.encode_beginning(options.prompt)
    eos_id = tokenizer.role_ids.get("eos_token_id")
    generated = generate(
        model,
        ids,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        eos_id=eos_id,
        banned_ids=sorted(tokenizer.special_id_set - {eos_id}),
        seed=options.seed,
    )
    print(tokenizer.decode(generated).strip())


def _fill(options: argparse.Namespace) -> None:
    from antlm_fast.models.decoding import fill
    from antlm_fast.pipeline import open_model

    model, tokenizer = open_model(options.model)
    if tokenizer.mask_token not in options.text:
        raise InputError(f"text must contain the model's mask token {tokenizer.mask_token}; got {options.text!r}")
    ids = tokenizer.encode_with_masks(options.text)
    answers = fill(
        model,
        ids,
        tokenizer.mask_id,
        top_k=options.top_k,
        shift=1 if options.mntp else 0,
        banned_ids=sorted(tokenizer.special_id_set),
    )
    for number, candidates in enumerate(answers.values(), start=1):
        shown = "  ".join(f"{tokenizer.decode([token]).strip()} {share:.3f}" for token, share in candidates)
        print(f"mask {number}: {shown}")


def _export(options: argparse.Namespace) -> None:
    from antlm_fast.pipeline import export_model

    _print_model(export_model(options.model, options.output), options.output)


def _import(options: argparse.Namespace) -> None:
    from antlm_fast.pipeline import import_checkpoint

    model = import_checkpoint(options.weights, options.output, num_attention_heads=options.heads, config=options.config)
    _print_model(model, options.output)


def _print_model(model: LanguageModel, folder: Path) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{folder}: {model.config.architecture}, {parameters / 1e6:.2f}M parameters")


def _recipes_list(options: argparse.Namespace) -> None:
    from antlm_fast.recipes import RECIPES

    wide = max(map(len, RECIPES)) + 2
    schedules = {name: recipe().schedule for name, recipe in RECIPES.items()}
    long = max(map(len, schedules.values())) + 2
    for name, recipe in RECIPES.items():
        first_line = (inspect.getdoc(recipe) or "").splitlines()[0]
        print(f"{name:{wide}}{schedules[name]:{long}}{first_line}")


def _recipes_show(options: argparse.Namespace) -> None:
    from antlm_fast.recipes import RECIPES, get_recipe
    from antlm_fast.training.settings import to_dict

    config = get_recipe(options.name)
    print(inspect.getsource(inspect.getmodule(RECIPES[options.name]) or RECIPES[options.name]))
    print("# every setting, for --set NAME=VALUE; model.vocab_size comes from the tokenizer")
    for section, value in to_dict(config).items():
        for name, setting in value.items() if isinstance(value, dict) else [("", value)]:
            if (section, name) != ("model", "vocab_size"):
                print(f"{section}{'.' if name else ''}{name}={json.dumps(setting)}")


def _prime(options: argparse.Namespace) -> None:
    from antlm_fast.prime import cache_folder, prime

    sizes = _attention_sizes(options)
    found = [prime(sizes, arch) for arch in options.arch or [None]]  # what is wrong is said before anything is compiled
    total, compiled, seconds = 0, 0, 0.0
    for kernel in (kernel for kernels in found for kernel in kernels):
        how = "compiled" if kernel.compiled else "was there"
        print(f"{kernel.arch:8}{kernel.name:16}{kernel.seconds:6.1f} s  {how}", flush=True)
        total, compiled, seconds = total + 1, compiled + kernel.compiled, seconds + kernel.seconds
    print(f"{total} kernels in {cache_folder()}: {compiled} compiled, {total - compiled} were there, {seconds:.1f} s")


def _attention_sizes(options: argparse.Namespace) -> AttentionSizes:
    from antlm_fast.prime import DTYPES, AttentionSizes, sizes_of
    from antlm_fast.recipes import get_recipe
    from antlm_fast.training.settings import read_config_file

    if sum(map(bool, (options.recipe, options.config, options.head_dim))) > 1:
        raise InputError("--recipe, --config and --head-dim must be given one at a time; got more than one")
    if options.head_dim is None:
        if options.heads is not None or options.kv_heads is not None or options.dropout:
            raise InputError("--heads, --kv-heads and --dropout must come with --head-dim; got no --head-dim")
        config = read_config_file(options.config) if options.config else get_recipe(options.recipe or "antlm-babyllama")
        return sizes_of(config, options.precision)
    if options.heads is None:
        raise InputError("--heads must be given with --head-dim; got none")
    return AttentionSizes(
        head_dim=options.head_dim,
        heads=options.heads,
        kv_heads=options.heads if options.kv_heads is None else options.kv_heads,
        dtype=DTYPES[options.precision or "bfloat16"],
        dropout=options.dropout,
    )


def _doctor(options: argparse.Namespace) -> None:
    from antlm_fast.doctor import report_lines

    for line in report_lines():
        print(line)


if __name__ == "__main__":
    sys.exit(main())
