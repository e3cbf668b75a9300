"""One run, from settings to a finished run folder: data, training, model, minimal pairs, report."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from antlm_fast.data.corpus import SPLITS, DataConfig, check_splits, open_source
from antlm_fast.data.prepare import cache_root, prepare
from antlm_fast.data.rows import Rows
from antlm_fast.data.token_store import TokenStore
from antlm_fast.data.tokenizer import Tokenizer, train_tokenizer
from antlm_fast.environment import resolve_device, resolve_precision, versions
from antlm_fast.evaluation.minimal_pairs import evaluate_pairs, format_table, load_pairs
from antlm_fast.models import LanguageModel, build_model, load_pretrained, load_public_checkpoint, save_pretrained
from antlm_fast.models.pretrained import MASKED_FOLDER, weights_file
from antlm_fast.report import write_report
from antlm_fast.schedule import Schedule
from antlm_fast.training.checkpoint import latest_checkpoint, load_weights
from antlm_fast.training.config import TrainConfig
from antlm_fast.training.metrics import check_tensorboard
from antlm_fast.training.run_lock import hold
from antlm_fast.training.run_signals import RunSignals, run_signals
from antlm_fast.training.settings import from_dict, to_dict
from antlm_fast.training.trainer import Trainer
from antlm_fast.types import InputError
from antlm_fast.user_text import read_text

# Settings that do not change what a run computes: they may differ when it is resumed. Of the paths of data, the
# fingerprint says whether the text is the same.
FREE = (
    "device",
    "data.train",
    "data.validation",
    "data.cache_dir",
    "logging.tensorboard",
    "evaluation.minimal_pairs",
    "evaluation.read_outs",
)
MANY_PHASES = 10  # whose checkpoints are a surprise on the disk


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
        KeyboardInterrupt: SIGINT (Ctrl-C) came, and the run is saved.
        SystemExit: SIGTERM or SIGHUP came, and the run is saved; the code is 128 + the signal's number.

    Signals: in the main thread, those three stop the run after the step that is going on, and SIGUSR1 saves a
    checkpoint; the handlers that were there are back when the run ends. A second signal stops at once.
    """
    _check_folder(config, run_folder, resume)
    with run_signals(run_folder / "checkpoints") as signals, hold(run_folder):
        _check_folder(config, run_folder, resume)  # another process may have been here since
        return _train_alone(config, run_folder, resume, signals)


def _check_folder(config: TrainConfig | None, run_folder: Path, resume: bool) -> None:
    begun = (run_folder / "config.json").exists()
    if begun and not resume:
        raise InputError(f"run folder {run_folder} holds a run already; resume it, or choose another --output")
    if config is None and not begun:
        raise InputError(f"run folder {run_folder} holds no run to resume; give a recipe or a config to begin one")
    if not begun and run_folder.exists() and not _is_new(run_folder):
        raise InputError(f"run folder {run_folder} must be new or empty; it holds other files")


def _train_alone(config: TrainConfig | None, run_folder: Path, resume: bool, signals: RunSignals) -> Path:
    begun = (run_folder / "config.json").exists()
    if begun:
        config, fingerprints = _stored_run(run_folder, config)
        _check_before_training(config)
        tokenizer = Tokenizer.load(run_folder / "tokenizer.json")
    else:
        assert config is not None
        _check_before_training(config)
        check_splits(config.data)
        if config.tokenizer.path is None:
            _say(f"training the tokenizer on {config.data.train}")
        with signals.at_once():  # nothing is written yet
            tokenizer = train_tokenizer(open_source(config.data, "train").documents(), config.tokenizer)
        config = _resolved(config, tokenizer)
        fingerprints = {}
    stores = {split: prepare(config.data, tokenizer, split, fingerprint=fingerprints.get(split)) for split in SPLITS}
    trainer = _trainer(config, tokenizer, stores, run_folder)
    if not begun:
        tokenizer.save(run_folder / "tokenizer.json")
        data = {split: _description(store, config.data, split) for split, store in stores.items()}
        _write_json(run_folder / "config.json", {"config": to_dict(config), "versions": versions(), "data": data})
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    _say(
        f"{config.name}: {parameters / 1e6:.2f}M parameters, {stores['train'].num_tokens:,} training tokens, "
        f"{config.schedule}, {trainer.timeline.total_steps} steps, {config.device} {config.precision}"
    )
    phases = len(trainer.timeline.phases)
    if config.checkpoint.keep_phase_ends and phases > MANY_PHASES:
        gigabytes = phases * parameters * (12 if trainer.average is None else 16) / 1e9  # weights, two moments, average
        _say(
            f"note: the checkpoints of {phases} phases' ends are kept, about {gigabytes:.1f} GB in all "
            "(checkpoint.keep_phase_ends=false drops them)"
        )
    trainer.run(resume=resume, signals=signals)
    with trainer.judged_weights():
        return _finish(config, trainer.model, tokenizer, run_folder)


def open_model(path: Path) -> tuple[LanguageModel, Tokenizer]:
    """Model and tokenizer of a run folder, of a model folder in Hugging Face's layout, or of a run's checkpoint.

    A checkpoint gives the weights that would have been published then: the average, where one is kept.

    Raises:
        InputError: there is none, a file is damaged, or the tokenizer has another vocabulary than the model.
    """
    if (path / "state.json").exists():
        run_folder = path.resolve().parent.parent
        if not (run_folder / "config.json").exists():
            raise InputError(f"checkpoint {path} must lie in checkpoints/ of its run; {run_folder} has no config.json")
        model = build_model(stored_config(run_folder).model)
        load_weights(path, model)
        return model.eval(), _tokenizer_of(model, run_folder / "tokenizer.json")
    folder = path / "model" if (path / "model" / "config.json").exists() else path
    missing = [file.name for file in (folder / "config.json", weights_file(folder)) if not file.exists()]
    if missing:
        why = f"it holds no {' and no '.join(missing)}"
        if (path / "checkpoints").exists():
            newest = latest_checkpoint(path / "checkpoints")
            why = "its training is not finished: resume it" + (f", or give the checkpoint {newest}" if newest else "")
        elif newest := latest_checkpoint(path):
            why = f"it holds checkpoints: give one, such as {newest}"
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
    save_model(model, _tokenizer_of(model, beside), folder)
    return model


def export_model(path: Path, folder: Path) -> LanguageModel:
    """What `open_model` finds, as a model folder in Hugging Face's layout: a run's checkpoint, above all.

    Args:
        folder: is made; must not exist.

    Raises:
        InputError: the folder exists, or there is no model; nothing is written then.
    """
    if folder.exists():
        raise InputError(f"output must be a folder that does not exist; got {folder}")
    model, tokenizer = open_model(path)
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
    try:
        train_rows = Rows(
            stores["train"], mode=mode, row_tokens=row_tokens, seed=config.seed, short_share=config.data.short_share
        )
        # the first rows of a shuffled epoch come from all of the text, and seed 0 keeps them the same in every run
        validation_rows = Rows(stores["validation"], mode=mode, row_tokens=row_tokens, seed=0)
    except InputError as error:  # it names its own argument
        raise InputError(f"data.{error}") from None
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


def _check_before_training(config: TrainConfig) -> None:
    """What would otherwise be refused only when the training is over, or when the run folder is already made."""
    resolve_device(config.device)
    cache_root(config.data)
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


def _stored_run(run_folder: Path, config: TrainConfig | None) -> tuple[TrainConfig, dict[str, str]]:
    """The run's config and its data's fingerprints; of a config given beside it, the free settings are taken."""
    stored, fingerprints, begun_with = _read_run(run_folder)
    for name, version in versions().items():
        if begun_with.get(name, version) != version:
            _say(
                f"note: the run began with {name} {begun_with[name]}, now {version}: the result may differ in last bits"
            )
    if config is None:
        return stored, fingerprints
    before = dict(_leaves(to_dict(stored)))
    for name, value in _leaves(to_dict(config)):
        derived = name == "model.vocab_size" or value == "auto"
        free_to_differ = name in FREE or name.startswith("checkpoint.")
        if not derived and not free_to_differ and before.get(name) != value:
            raise InputError(
                f"{name} must stay what the run in {run_folder} began with, {before.get(name)!r}; got {value!r} "
                f"(--resume --output {run_folder} alone goes on with its own settings)"
            )
    free = replace(config.evaluation, every_steps=stored.evaluation.every_steps)
    return replace(
        stored,
        device=resolve_device(config.device),
        data=replace(
            stored.data,
            cache_dir=config.data.cache_dir,
            train=config.data.train or stored.data.train,
            validation=config.data.validation or stored.data.validation,
        ),
        logging=replace(stored.logging, tensorboard=config.logging.tensorboard),
        checkpoint=config.checkpoint,
        evaluation=free,
    ), fingerprints


def _read_run(run_folder: Path) -> tuple[TrainConfig, dict[str, str], dict[str, str]]:
    """The run's config, the fingerprint of each split of its data, and the versions that it began with."""
    path = run_folder / "config.json"
    try:
        document = json.loads(read_text(path, "config file"))
        if not isinstance(document, dict):
            raise ValueError("it holds no table of settings")
        fingerprints = {split: document["data"][split]["fingerprint"] for split in SPLITS}
        return from_dict(document["config"]), fingerprints, document["versions"]
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
    with contextlib.suppress(OSError):  # nobody reads any more, as after Ctrl-C on `| tee`
        print(line, file=sys.stderr, flush=True)
