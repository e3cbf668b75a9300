"""One run, from settings to a finished run folder: data, training, model, minimal pairs, report."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from antlm_fast.data.corpus import DataConfig, open_source
from antlm_fast.data.prepare import prepare
from antlm_fast.data.rows import Rows
from antlm_fast.data.token_store import TokenStore
from antlm_fast.data.tokenizer import Tokenizer, train_tokenizer
from antlm_fast.evaluation.minimal_pairs import evaluate_pairs, format_table, load_pairs
from antlm_fast.models import LanguageModel, build_model, load_pretrained, load_public_checkpoint, save_pretrained
from antlm_fast.models.pretrained import MASKED_FOLDER, weights_file
from antlm_fast.report import write_report
from antlm_fast.schedule import Schedule
from antlm_fast.training.config import TrainConfig
from antlm_fast.training.metrics import check_tensorboard
from antlm_fast.training.settings import from_dict, to_dict
from antlm_fast.training.trainer import Trainer
from antlm_fast.types import InputError

# settings that do not change what a run computes: they may differ when it is resumed
FREE = (
    "device",
    "data.cache_dir",
    "logging.tensorboard",
    "checkpoint.",
    "evaluation.minimal_pairs",
    "evaluation.read_outs",
)
VERSIONED = ("antlm_fast", "torch", "numpy", "tokenizers", "safetensors")


def train(config: TrainConfig | None, run_folder: Path, *, resume: bool = False) -> Path:
    """Prepare the data, train through the schedule, and write the model, its scores and the report.

    Args:
        config: what to run; None (with resume) takes what the run folder says.
        run_folder: made here; see the README for what it holds.
        resume: go on where a run was stopped, bit-identical to one that never was; start it if it was never begun.

    Returns:
        The folder of the finished model.

    Raises:
        InputError: the settings, the data or the run folder cannot be used; what was there is left as it was.
    """
    _check_folder(config, run_folder, resume)
    with _alone(run_folder):
        _check_folder(config, run_folder, resume)  # another process may have been here since
        return _train_alone(config, run_folder, resume)


def _check_folder(config: TrainConfig | None, run_folder: Path, resume: bool) -> None:
    begun = (run_folder / "config.json").exists()
    if begun and not resume:
        raise InputError(f"run folder {run_folder} holds a run already; resume it, or choose another --output")
    if config is None and not begun:
        raise InputError(f"run folder {run_folder} holds no run to resume; give a recipe or a config to begin one")
    if not begun and run_folder.exists() and not _is_new(run_folder):
        raise InputError(f"run folder {run_folder} must be new or empty; it holds other files")


def _train_alone(config: TrainConfig | None, run_folder: Path, resume: bool) -> Path:
    begun = (run_folder / "config.json").exists()
    if begun:
        config, stored_data = _stored_run(run_folder, config)
        _check_before_training(config)
        tokenizer = Tokenizer.load(run_folder / "tokenizer.json")
    else:
        assert config is not None
        _check_before_training(config)
        if config.tokenizer.path is None:
            _say(f"training the tokenizer on {config.data.train}")
        tokenizer = train_tokenizer(open_source(config.data, "train").documents(), config.tokenizer)
        config = _resolved(config, tokenizer)
        stored_data = None
    stores = {split: prepare(config.data, tokenizer, split) for split in ("train", "validation")}
    data = {split: _description(store, config.data, split) for split, store in stores.items()}
    for split, now in data.items():
        before = now if stored_data is None else stored_data[split]
        if before["fingerprint"] != now["fingerprint"]:
            raise InputError(
                f"data must be what the run in {run_folder} began with; got other {split} text: {now['num_tokens']} "
                f"tokens, fingerprint {now['fingerprint'][:12]}, instead of {before['num_tokens']}, "
                f"{before['fingerprint'][:12]}"
            )
    trainer = _trainer(config, tokenizer, stores, run_folder)
    if not begun:
        tokenizer.save(run_folder / "tokenizer.json")
        _write_json(run_folder / "config.json", {"config": to_dict(config), "versions": versions(), "data": data})
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    _say(
        f"{config.name}: {parameters / 1e6:.2f}M parameters, {data['train']['num_tokens']:,} training tokens, "
        f"{config.schedule}, {trainer.timeline.total_steps} steps, {config.device} {config.precision}"
    )
    trainer.run(resume=resume)
    with trainer.judged_weights():
        return _finish(config, trainer.model, tokenizer, run_folder)


def open_model(path: Path) -> tuple[LanguageModel, Tokenizer]:
    """Model and tokenizer of a run folder, or of a model folder in Hugging Face's layout.

    Raises:
        InputError: there is none, a file is damaged, or the tokenizer has another vocabulary than the model.
    """
    folder = path / "model" if (path / "model" / "config.json").exists() else path
    missing = [path.name for path in (folder / "config.json", weights_file(folder)) if not path.exists()]
    if missing:
        unfinished = (path / "checkpoints").exists()
        why = "its training is not finished: resume it" if unfinished else f"it holds no {' and no '.join(missing)}"
        raise InputError(f"no model in {path}: {why}")
    model = load_pretrained(folder)
    return model, _tokenizer_of(model, folder / "tokenizer.json")


def save_model(model: LanguageModel, tokenizer: Tokenizer, folder: Path) -> None:
    """A model folder with its tokenizers, for `open_model` and for transformers.

    Raises:
        OSError: a file cannot be written.
    """
    save_pretrained(model, folder, token_ids=tokenizer.role_ids)
    longest = model.config.max_position_embeddings
    tokenizer.save_pretrained_files(folder, model_max_length=longest, causal=True)
    tokenizer.save_pretrained_files(folder / MASKED_FOLDER, model_max_length=longest)


def import_checkpoint(
    weights: Path, folder: Path, *, num_attention_heads: int | None = None, config: Path | None = None
) -> LanguageModel:
    """A public LTG-BERT or GPT-BERT checkpoint as a model folder of ours, with the tokenizer.json beside it.

    Args:
        weights, num_attention_heads, config: as for `load_public_checkpoint`.
        folder: is made; must not exist.

    Raises:
        InputError: the folder exists, or the checkpoint or its tokenizer cannot be used; nothing is written then.
    """
    if folder.exists():
        raise InputError(f"output must be a folder that does not exist; got {folder}")
    model = load_public_checkpoint(weights, num_attention_heads=num_attention_heads, config=config)
    beside = (weights if weights.is_dir() else weights.parent) / "tokenizer.json"
    tokenizer = _tokenizer_of(model, beside)
    save_model(model, tokenizer, folder)
    return model


def _tokenizer_of(model: LanguageModel, path: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise InputError(
            f"{path} must have the model's vocabulary of {model.config.vocab_size} tokens; got {tokenizer.vocab_size}"
        )
    return tokenizer


def score_pairs(
    model: LanguageModel, tokenizer: Tokenizer, source: str, read_outs: tuple[str, ...], precision: str
) -> dict[str, Any]:
    """Minimal-pair accuracies in the form of minimal_pairs.json."""
    return evaluate_pairs(
        model, tokenizer, load_pairs(source), read_outs=read_outs, source=source, precision=precision, progress=True
    )


def resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"device must be 'auto', 'cpu' or 'cuda'; got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device must be one that torch can use; got {device!r}, and torch sees no CUDA device")
    return device


def resolve_precision(precision: str, device: str) -> Literal["float32", "bfloat16"]:
    """ "auto" is bfloat16 where the hardware multiplies matrices in it, else float32."""
    if precision != "auto":
        return "bfloat16" if precision == "bfloat16" else "float32"
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    read_capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.13 has it
    capabilities = read_capabilities()
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"


def versions() -> dict[str, str]:
    """What a result depends on: packages, Python, machine, threads."""
    found = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
    for package in VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    found["torch"] = torch.__version__
    return found


def _resolved(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """The config with everything that depended on this machine and this data written out."""
    device = resolve_device(config.device)
    return replace(
        config,
        device=device,
        precision=resolve_precision(config.precision, device),
        model=replace(config.model, vocab_size=tokenizer.vocab_size),
    )


def _trainer(config: TrainConfig, tokenizer: Tokenizer, stores: dict[str, TokenStore], run_folder: Path) -> Trainer:
    torch.manual_seed(config.seed)
    model = build_model(config.model).to(config.device)
    mode, row_tokens = config.data.row_mode, config.data.row_tokens
    train_rows = Rows(
        stores["train"], mode=mode, row_tokens=row_tokens, seed=config.seed, short_share=config.data.short_share
    )
    # the first rows of a shuffled epoch come from all of the text, and seed 0 keeps them the same in every run
    validation_rows = Rows(stores["validation"], mode=mode, row_tokens=row_tokens, seed=0)
    return Trainer(config, model, tokenizer.vocabulary, train_rows, validation_rows, run_folder)


def _finish(config: TrainConfig, model: LanguageModel, tokenizer: Tokenizer, run_folder: Path) -> Path:
    """Everything after the last step; done again from the start if it was interrupted."""
    finished, writing = run_folder / "model", run_folder / ".writing_model"
    shutil.rmtree(writing, ignore_errors=True)
    try:
        save_model(model, tokenizer, writing)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    shutil.rmtree(finished, ignore_errors=True)
    writing.rename(finished)
    try:
        if config.evaluation.minimal_pairs is not None:
            results = score_pairs(
                model, tokenizer, config.evaluation.minimal_pairs, config.evaluation.read_outs, config.precision
            )
            _write_json(run_folder / "minimal_pairs.json", results)
            print(format_table(results))
    finally:  # pairs that cannot be scored must not cost the report
        for path in write_report(run_folder):
            _say(f"wrote {path}")
    return finished


@contextlib.contextmanager
def _alone(run_folder: Path) -> Iterator[None]:
    """Makes the folder and holds it: two processes in one would cut each other's files. The lock goes with the process.

    What fails before the run has its config.json leaves no folder and no lock behind.
    """
    made = [path for path in (run_folder, *run_folder.parents) if not path.exists()]
    run_folder.mkdir(parents=True, exist_ok=True)
    lock = run_folder / ".lock"
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # not one that its holder has removed in the meantime
            held = lock.exists() and lock.stat().st_ino == os.fstat(file.fileno()).st_ino
        except BlockingIOError:
            held = False
        if not held:
            raise InputError(f"run folder {run_folder} must have one process at a time; another trains in it")
        try:
            yield
        finally:
            if not (run_folder / "config.json").exists():
                lock.unlink()
                with contextlib.suppress(OSError):  # a folder that holds something stays
                    for path in made:
                        path.rmdir()


def _check_before_training(config: TrainConfig) -> None:
    """What would otherwise be refused only when the training is over, or when the run folder is already made."""
    resolve_device(config.device)
    if config.evaluation.minimal_pairs is not None:
        load_pairs(config.evaluation.minimal_pairs)
    if config.logging.tensorboard:
        check_tensorboard()
    for phase in Schedule.parse(config.schedule).phases:
        if phase.leaks_targets:
            _say(f"note: phase {phase.name} lets the model see its targets; it is a control, not a training")


def stored_config(run_folder: Path) -> TrainConfig:
    """The config that the run in a folder was begun with."""
    return _read_run(run_folder)[0]


def _stored_run(run_folder: Path, config: TrainConfig | None) -> tuple[TrainConfig, dict[str, Any]]:
    """The run's config and data; of a config given beside it, the settings that are free are taken."""
    stored, data, begun_with = _read_run(run_folder)
    for name, version in versions().items():
        if begun_with.get(name, version) != version:
            _say(
                f"note: the run began with {name} {begun_with[name]}, now {version}: the result may differ in last bits"
            )
    if config is None:
        return stored, data
    before = dict(_leaves(to_dict(stored)))
    for name, value in _leaves(to_dict(config)):
        derived = name == "model.vocab_size" or value == "auto"
        if not derived and not name.startswith(FREE) and before.get(name) != value:
            raise InputError(
                f"{name} must stay what the run in {run_folder} began with, {before.get(name)!r}; got {value!r} "
                f"(--resume --output {run_folder} alone goes on with its own settings)"
            )
    free = replace(config.evaluation, every_steps=stored.evaluation.every_steps)
    return replace(
        stored,
        device=resolve_device(config.device),
        data=replace(stored.data, cache_dir=config.data.cache_dir),
        logging=replace(stored.logging, tensorboard=config.logging.tensorboard),
        checkpoint=config.checkpoint,
        evaluation=free,
    ), data


def _read_run(run_folder: Path) -> tuple[TrainConfig, dict[str, Any], dict[str, str]]:
    path = run_folder / "config.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("it holds no table of settings")
        return from_dict(document["config"]), document["data"], document["versions"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _is_new(run_folder: Path) -> bool:
    """Empty, or with no more than a run leaves that was killed before it wrote its config.json."""
    leftovers = (".lock", "tokenizer.json", ".tokenizer.json", ".config.json")
    return run_folder.is_dir() and all(path.name.startswith(leftovers) for path in run_folder.iterdir())


def _description(store: TokenStore, config: DataConfig, split: str) -> dict[str, Any]:
    return {
        "source": str(open_source(config, split)),
        "fingerprint": store.fingerprint,
        "num_tokens": store.num_tokens,
        "num_documents": store.num_documents,
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
